from typing import Any

import equinox as eqx
from jaxtyping import Array, Float

from .._checks import check_at_least


class Network(eqx.Module):
    """A sequence of layers that remembers how it was made, so that it can be rebuilt
    from a file.

    **Attributes:**

    - `layers`: the layers, from one image to its logits. The last one is an
        `equinox.nn.Linear`.
    - `architecture`: the name of the function that made the network.
    - `settings`: the arguments of that function, as pairs of a name and a value.
    """

    layers: eqx.nn.Sequential
    architecture: str = eqx.field(static=True)
    settings: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __call__(self, image: Float[Array, "*shape"]) -> Float[Array, " c"]:
        """**Arguments:**

        - `image`: one image, of the shape that the network was made for.

        **Returns:**

        The logits.

        **Raises:**

        A `ValueError` if the image has another shape.
        """
        wanted = dict(self.settings)["shape"]
        if image.shape != wanted:
            raise ValueError(
                f"`image` must have shape {wanted}, the shape that this "
                f"`{self.architecture}` was made for; got shape {image.shape}."
            )
        return self.layers(image)


def instance_norm(channels: int) -> eqx.nn.GroupNorm:
    """Instance normalisation with a learned scale and shift for each channel.

    Source: Ulyanov et al., *Instance normalization*, 2016.
    """
    check_at_least(1, channels=channels)
    return eqx.nn.GroupNorm(int(channels), int(channels))


def group_norm(channels: int) -> eqx.nn.GroupNorm:
    """Group normalisation in four groups.

    Source: Wu and He, *Group normalization*, 2018.
    """
    if channels < 1 or channels % 4 != 0:
        raise ValueError(f"`channels` must be a multiple of 4; got {channels}.")
    return eqx.nn.GroupNorm(4, int(channels))
