import numpy as np


def to_pictures(images: np.ndarray) -> np.ndarray:
    """Arranges images of shape `(n, *shape)` as Pillow and Matplotlib expect them: grey
    ones in shape `(n, height, width)`, colour ones in shape `(n, height, width, 3)`."""
    n, *shape = images.shape
    large = [size for size in shape if size != 1]
    is_colour = len(shape) == 3 and 1 not in shape
    if len(shape) == 2 or (is_colour and shape[2] == 3):
        return images
    if is_colour and shape[0] == 3:
        return np.moveaxis(images, 1, 3)
    if len(large) == 2:
        return images.reshape(n, *large)
    raise ValueError(
        "`distilled` must have grey images of shape (height, width), up to axes of "
        "size 1, or colour images of shape (height, width, 3) or (3, height, width); "
        f"got {tuple(shape)}."
    )


def height_and_width(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Checks that the argument `name` has images, channels first."""
    is_channels_last = len(shape) == 3 and shape[2] in (1, 3) and shape[0] > 3
    if len(shape) not in (2, 3) or is_channels_last:
        raise ValueError(
            f"`{name}` must have images of shape (height, width) or (channels, height, "
            f"width); got {shape}."
        )
    return shape[-2], shape[-1]
