"""Operations around an optimizer: gradients, clipping, maps over tuples, and functions of tensors."""

from torchlamb.mindspore.ops import composite, functional, operations
from torchlamb.mindspore.ops.composite import GradOperation, HyperMap, Map, MultitypeFuncGraph, add_flags, grad, value_and_grad
from torchlamb.mindspore.ops.functional import *  # noqa: F403
from torchlamb.mindspore.ops.functional import __all__ as _functions
from torchlamb.mindspore.ops.operations import *  # noqa: F403
from torchlamb.mindspore.ops.operations import __all__ as _primitives

__all__ = [
    "GradOperation",
    "HyperMap",
    "Map",
    "MultitypeFuncGraph",
    "add_flags",
    "composite",
    "functional",
    "grad",
    "operations",
    "value_and_grad",
]
__all__ += _functions
__all__ += _primitives
