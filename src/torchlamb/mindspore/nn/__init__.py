"""What code with MindSpore's words takes from `nn`. Layers are those of `torch.nn`."""

from torchlamb.mindspore.nn import learning_rate_schedule
from torchlamb.mindspore.nn.cell import Cell, NamedParameter, trainable_params
from torchlamb.mindspore.nn.lamb import Lamb
from torchlamb.mindspore.nn.learning_rate_schedule import (
    CosineDecayLR,
    ExponentialDecayLR,
    InverseDecayLR,
    LearningRateSchedule,
    NaturalExpDecayLR,
    PolynomialDecayLR,
    WarmUpLR,
)
from torchlamb.mindspore.nn.loss import SoftmaxCrossEntropyWithLogits

__all__ = [
    "Cell",
    "CosineDecayLR",
    "ExponentialDecayLR",
    "InverseDecayLR",
    "Lamb",
    "LearningRateSchedule",
    "NamedParameter",
    "NaturalExpDecayLR",
    "PolynomialDecayLR",
    "SoftmaxCrossEntropyWithLogits",
    "WarmUpLR",
    "learning_rate_schedule",
    "trainable_params",
]
