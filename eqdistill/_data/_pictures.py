from collections.abc import Sequence

import numpy as np


def are_pictures(shape: Sequence[int]) -> bool:
    """Whether arrays of this shape are pictures, in grey or in colour."""
    is_colour = len(shape) == 3 and 1 not in shape and 3 in (shape[0], shape[2])
    return len(shape) == 2 or is_colour or sum(size != 1 for size in shape) == 2


def to_pictures(images: np.ndarray) -> np.ndarray:
    """Arranges images of shape `(n, *shape)` as Pillow and Matplotlib expect them: grey
    ones in shape `(n, height, width)`, colour ones in shape `(n, height, width, 3)`."""
    n, *shape = images.shape
    if not are_pictures(shape):
        raise ValueError(
            "`distilled` must have grey images of shape (height, width), apart from "
            "axes of size 1, or colour images of shape (height, width, 3) or (3, "
            f"height, width); got {tuple(shape)}."
        )
    if len(shape) == 2:
        return images
    if len(shape) == 3 and 1 not in shape:
        return images if shape[2] == 3 else np.moveaxis(images, 1, 3)
    return images.reshape(n, *(size for size in shape if size != 1))


def height_and_width(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the height and the width of the images of the argument `name`. Raises a
    `ValueError` unless their channels come first."""
    is_channels_last = len(shape) == 3 and shape[2] in (1, 3) and shape[0] > 3
    if len(shape) not in (2, 3) or is_channels_last:
        raise ValueError(
            f"`{name}` must have images of shape (height, width) or (channels, height, "
            f"width); got {shape}."
        )
    return shape[-2], shape[-1]
