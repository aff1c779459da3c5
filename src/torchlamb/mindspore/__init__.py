"""A front with MindSpore's words: code written for `mindspore.nn.Lamb` trains torch modules after a change of its imports.

Every class documents where it departs from the original. The arithmetic is all `torchlamb.Lamb`'s; MindSpore's words appear in
this package only.
"""

from torchlamb.mindspore import nn
from torchlamb.mindspore.callback import Callback, RunContext
from torchlamb.mindspore.loss_scale import DynamicLossScaleManager, FixedLossScaleManager
from torchlamb.mindspore.model import Model

__all__ = ["Callback", "DynamicLossScaleManager", "FixedLossScaleManager", "Model", "RunContext", "nn"]
