"""Layers and networks."""

from ._nn._conv2d import Conv2d as Conv2d, quick_convolutions as quick_convolutions
from ._nn._networks import (
    AlexNet as AlexNet,
    average_pool as average_pool,
    ConvNet as ConvNet,
    group_norm as group_norm,
    he as he,
    initialise as initialise,
    instance_norm as instance_norm,
    lecun as lecun,
    LeNet as LeNet,
    max_pool as max_pool,
    MLP as MLP,
    Network as Network,
    ResNet18 as ResNet18,
    VGG11 as VGG11,
    zero_head as zero_head,
)
