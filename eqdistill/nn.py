"""Layers and networks, and which of their arrays are trained."""

from ._classifier import (
    Frozen as Frozen,
    HasPenalised as HasPenalised,
    parameters as parameters,
)
from ._nn._backbone import Backbone as Backbone
from ._nn._convolve import (
    average_pool as average_pool,
    Conv2d as Conv2d,
    fast_convolutions as fast_convolutions,
    max_pool as max_pool,
)
from ._nn._network import (
    group_norm as group_norm,
    he as he,
    initialise as initialise,
    instance_norm as instance_norm,
    lecun as lecun,
    Network as Network,
    zero_head as zero_head,
)
from ._nn._networks import (
    AlexNet as AlexNet,
    ConvNet as ConvNet,
    LeNet as LeNet,
    MLP as MLP,
    ResNet18 as ResNet18,
    VGG11 as VGG11,
)
