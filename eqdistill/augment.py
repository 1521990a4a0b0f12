"""Random augmentations of images, differentiable in the image."""

from ._data._augmentation import (
    AbstractAugmentation as AbstractAugmentation,
    augment as augment,
    Compose as Compose,
    OneOf as OneOf,
)
from ._data._image_augmentations import (
    Affine as Affine,
    ColourJitter as ColourJitter,
    Crop as Crop,
    Cutout as Cutout,
    Flip as Flip,
)
