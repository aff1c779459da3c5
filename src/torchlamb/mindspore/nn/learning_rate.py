"""The five forms of a learning rate, and its value at a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from torchlamb.mindspore.checks import check_number
from torchlamb.mindspore.nn.learning_rate_schedule import LearningRateSchedule
from torchlamb.options import fail

# Fixed: a number, or a 0-dim tensor that the user may change in place. Dynamic: one value for each step, or a schedule.
LearningRate = float | Tensor | tuple[float, ...] | LearningRateSchedule
DYNAMIC = (tuple, LearningRateSchedule)


def parse(name: str, value: Any) -> LearningRate:
    """Return a learning rate in one of its plain forms; an iterable is read to its end.

    Raises:
        TypeError: `value` is none of the five, or an element is no number
        ValueError: a tensor with more dims, no values at all, or a value that is negative or not finite
    """
    if isinstance(value, LearningRateSchedule):
        return value
    if isinstance(value, Tensor):
        if value.dim() == 0:
            number = check_number(name, value.item(), least=0)
            return value if value.is_floating_point() else number
        if value.dim() > 1:
            raise ValueError(f"{name} must be a 0-dim or 1-D tensor, got shape {tuple(value.shape)}")
        return _vector(name, value.tolist())
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        if isinstance(value, Real):
            return check_number(name, value, least=0)
        wanted = "a number >= 0, a 0-dim or 1-D tensor, an iterable of numbers or a LearningRateSchedule"
        raise fail(TypeError, name, wanted, value)
    return _vector(name, value)


def value_at(lr: tuple[float, ...] | LearningRateSchedule, step: int) -> float:
    """Return a dynamic learning rate's value at the 0-based step.

    Raises:
        IndexError: a vector that is used up
        TypeError, ValueError: a schedule returned something else than a finite number >= 0
    """
    if isinstance(lr, tuple):
        if step >= len(lr):
            raise IndexError(
                f"learning_rate has {len(lr)} values and step {step} (counted from 0) was asked for; "
                "give one value for every step, or a LearningRateSchedule"
            )
        return lr[step]
    value = lr(step)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return check_number(f"the learning rate of {type(lr).__name__} at step {step}", value, least=0)


def _vector(name: str, values: Iterable[Any]) -> tuple[float, ...]:
    items = (value.item() if isinstance(value, Tensor) and value.dim() == 0 else value for value in values)
    vector = tuple(check_number(f"{name}[{i}]", value, least=0) for i, value in enumerate(items))
    if not vector:
        raise ValueError(f"{name} has no values; give one for every step")
    return vector
