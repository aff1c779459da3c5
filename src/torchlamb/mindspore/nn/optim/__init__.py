"""The optimizer, and the names of those that are elsewhere."""

from torch.optim import Optimizer

from torchlamb.mindspore.nn.optim import lamb, optimizer
from torchlamb.mindspore.nn.optim.elsewhere import LARS, SGD, THOR, Adagrad, Adam, AdamWeightDecay, Momentum, RMSProp, thor
from torchlamb.mindspore.nn.optim.lamb import Lamb

__all__ = [
    "LARS",
    "SGD",
    "THOR",
    "Adagrad",
    "Adam",
    "AdamWeightDecay",
    "Lamb",
    "Momentum",
    "Optimizer",
    "RMSProp",
    "lamb",
    "optimizer",
    "thor",
]
