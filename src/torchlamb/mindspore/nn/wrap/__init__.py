"""Cells around a network."""

from torchlamb.mindspore.nn.wrap import cell_wrapper, grad_reducer, loss_scale
from torchlamb.mindspore.nn.wrap.cell_wrapper import TrainOneStepCell, WithEvalCell, WithLossCell
from torchlamb.mindspore.nn.wrap.grad_reducer import DistributedGradReducer
from torchlamb.mindspore.nn.wrap.loss_scale import (
    DynamicLossScaleUpdateCell,
    FixedLossScaleUpdateCell,
    TrainOneStepWithLossScaleCell,
)

__all__ = [
    "DistributedGradReducer",
    "DynamicLossScaleUpdateCell",
    "FixedLossScaleUpdateCell",
    "TrainOneStepCell",
    "TrainOneStepWithLossScaleCell",
    "WithEvalCell",
    "WithLossCell",
    "cell_wrapper",
    "grad_reducer",
    "loss_scale",
]
