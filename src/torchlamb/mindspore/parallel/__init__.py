"""What MindSpore's `parallel` has of one process and of data parallel ones."""

from torchlamb.mindspore.parallel import _utils

__all__ = ["_utils"]
