"""Random augmentations of images, differentiable in the image."""

from ._data._augmentation import (
    AbstractAugmentation as AbstractAugmentation,
    Affine as Affine,
    augment as augment,
    ColourJitter as ColourJitter,
    Compose as Compose,
    Crop as Crop,
    Cutout as Cutout,
    Flip as Flip,
    OneOf as OneOf,
)
from ._inner._augmented_fit import AugmentedFit as AugmentedFit
