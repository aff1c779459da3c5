"""Loss scales for loops of one's own, and the managers."""

from __future__ import annotations

from typing import Any

import torch

from torchlamb.mindspore.checks import check_count, check_number
from torchlamb.mindspore.common.parameter import Parameter
from torchlamb.mindspore.common.tensor import Tensor, plain, wrap
from torchlamb.mindspore.train.loss_scale_manager import DynamicLossScaleManager, FixedLossScaleManager, LossScaleManager

__all__ = [
    "DynamicLossScaleManager",
    "DynamicLossScaler",
    "FixedLossScaleManager",
    "LossScaleManager",
    "LossScaler",
    "StaticLossScaler",
    "all_finite",
    "auto_mixed_precision",
]


class LossScaler:
    """Multiplies and divides tensors by ``scale_value``."""

    scale_value: Any

    def scale(self, inputs: Any) -> Any:
        """Return a tensor, or a tuple of them, multiplied by the scale."""
        return _mapped(lambda x: x * plain(self.scale_value).to(x), inputs)

    def unscale(self, inputs: Any) -> Any:
        """Return a tensor, or a tuple of them, divided by the scale."""
        return _mapped(lambda x: x / plain(self.scale_value).to(x), inputs)

    def adjust(self, grads_finite: Any) -> bool:
        """Set the next scale, and return whether there is any other."""
        raise NotImplementedError(f"{type(self).__name__} must define adjust(grads_finite)")


class StaticLossScaler(LossScaler):
    """A scale that stays.

    Args:
        scale_value: a number >= 1

    Raises:
        TypeError, ValueError: it is none

    Example:
        >>> import torch
        >>> from torchlamb.mindspore.amp import StaticLossScaler
        >>> StaticLossScaler(4).scale(torch.tensor(0.5))
        Tensor(2.)

    Source: `mindspore.amp.StaticLossScaler`.
    """

    def __init__(self, scale_value: float) -> None:
        self.scale_value = Parameter(check_number("scale_value", scale_value, least=1), "scale_value", requires_grad=False)

    def adjust(self, grads_finite: Any) -> bool:  # noqa: ARG002
        """Return False."""
        return False


class DynamicLossScaler(LossScaler):
    """A scale that is divided where gradients are not finite, down to 1, and multiplied when they were for a while.

    Args:
        scale_value: the first scale, a number >= 1
        scale_factor: by which, an int >= 1
        scale_window: after so many steps in a row, an int >= 1

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore import Tensor
        >>> from torchlamb.mindspore.amp import DynamicLossScaler
        >>> scaler = DynamicLossScaler(1024, 2, 1)
        >>> scaler.adjust(Tensor(False)), scaler.scale_value.item()
        (True, 512.0)

    Source: `mindspore.amp.DynamicLossScaler`.
    """

    def __init__(self, scale_value: float, scale_factor: int, scale_window: int) -> None:
        self.scale_value = Parameter(check_number("scale_value", scale_value, least=1), "scale_value", requires_grad=False)
        self.scale_factor = check_count("scale_factor", scale_factor)
        self.scale_window = check_count("scale_window", scale_window)
        self.counter = Parameter(0, "counter", requires_grad=False)

    def adjust(self, grads_finite: Any) -> bool:
        """Set the next scale, and return True."""
        finite = bool(plain(grads_finite))
        scale, count = self.scale_value.item(), int(self.counter)
        if not finite:
            scale = max(1.0, scale / self.scale_factor)
        elif count == self.scale_window - 1 and torch.tensor(scale * self.scale_factor, dtype=torch.float32).isfinite():
            scale *= self.scale_factor
        self.scale_value.set_data(torch.tensor(scale))
        self.counter.set_data(torch.tensor((count + 1) % self.scale_window if finite else 0))
        return True


def all_finite(inputs: Any) -> Any:
    """Return whether all elements of a tensor, or of a tuple or list of them, are finite: a 0-dim bool tensor."""
    tensors = [plain(inputs)] if isinstance(plain(inputs), torch.Tensor) else [plain(x) for x in inputs]
    return Tensor(all(bool(t.isfinite().all()) for t in tensors))


def auto_mixed_precision(network: Any, amp_level: str = "O0", *_: Any, **__: Any) -> Any:  # noqa: ARG001
    """Return the network as it is; `torch.autocast` in its `construct` computes in low precision."""
    return network


def _mapped(function: Any, inputs: Any) -> Any:
    if isinstance(plain(inputs), torch.Tensor):
        return wrap(function(plain(inputs)))
    return tuple(_mapped(function, x) for x in inputs)
