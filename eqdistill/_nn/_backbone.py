from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_positive
from .._conversions import as_ints


class Backbone(eqx.Module):
    r"""A pre-trained network as a feature extractor for images of any size, greyscale
    or colour. Greyscale images become colour images with three equal channels. Images
    are enlarged or downsampled by bilinear interpolation, and each channel is
    standardised as the network expects, $(x_c - \mu_c) / \sigma_c$.

    !!! Example
        A vision transformer from [Equimo](https://github.com/clementpoiret/Equimo),
        with its features of the real images cached in the folder `features`:

        ```python
        vit = equimo.models.dinov3_vits16_pretrain_lvd1689m(pretrained=True)
        vit = equinox.Partial(vit, inference=True)
        backbone = eqd.nn.Backbone(vit, (3, 224, 224))
        cached = eqd.Cached(backbone, "DINOv3", directory="features")
        head = eqd.linear.LogisticRegression(384, 10).head
        model = eqd.linear.LinearClassifier(cached, head)
        ```

    """

    network: Callable
    mean: Float[Array, "channels"]
    deviation: Float[Array, "channels"]
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        network: Callable,
        shape: Sequence[int],
        *,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        deviation: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        r"""**Arguments:**

        - `network`: any module that maps one image to a vector of features. Dropout in
            it is turned off. Bind a `key`, or other arguments that it needs, with
            `equinox.Partial(network, key=key)`.
        - `shape`: the shape of the images that it takes, `(channels, height, width)`.
        - `mean`, `deviation`: $\mu$ and $\sigma$ for each channel, for images with
            values from 0 to 1. By default, those of ImageNet. (Keyword only arguments.)
        """
        self.network = eqx.nn.inference_mode(network)
        self.shape = as_ints("shape", shape)
        if len(self.shape) != 3 or not len(mean) == len(deviation) == self.shape[0]:
            raise ValueError(
                "`shape` must be (channels, height, width), with a `mean` and a "
                f"`deviation` for each channel; got {self.shape}, and {len(mean)} and "
                f"{len(deviation)} numbers."
            )
        check_positive(deviation=min(deviation))
        self.mean, self.deviation = (jnp.asarray(x, float) for x in (mean, deviation))

    def __call__(self, image: Float[Array, "*shape"]) -> Any:
        """Returns the features of one image of shape `(height, width)` or `(channels,
        height, width)`, in the units of [`eqdistill.Dataset.floating`][]."""
        channels = image.shape[0] if image.ndim == 3 else 1
        if image.ndim not in (2, 3) or channels not in (1, self.shape[0]):
            raise ValueError(
                "`image` must have shape (height, width), (1, height, width) or "
                f"({self.shape[0]}, height, width); got {image.shape}."
            )
        image = image.reshape(channels, *image.shape[-2:])
        resized = jax.image.resize(image, (channels, *self.shape[1:]), "bilinear")
        per_channel = lambda x: x[:, None, None].astype(image.dtype)
        mean, deviation = per_channel(self.mean), per_channel(self.deviation)
        return self.network((resized - mean) / deviation)
