"""The five forms of a learning rate, the two of a weight decay, and their values at a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from torchlamb.mindspore.checks import check_number
from torchlamb.mindspore.common import tensor as front
from torchlamb.mindspore.nn.learning_rate_schedule import LearningRateSchedule
from torchlamb.options import fail

# Fixed: a number, or a 0-dim tensor that the user may change in place. Dynamic: one value for each step, or a schedule.
LearningRate = float | Tensor | tuple[float, ...] | LearningRateSchedule
DYNAMIC = (tuple, LearningRateSchedule)
# Fixed: a number. Dynamic: a cell or a schedule, which is called with the step.
WeightDecay = float | LearningRateSchedule | nn.Module
DYNAMIC_DECAY = (LearningRateSchedule, nn.Module)


def parse(name: str, value: Any) -> LearningRate:
    """Return a learning rate in one of its plain forms; an iterable is read to its end.

    Raises:
        TypeError: `value` is none of the five, or an element is no number
        ValueError: a tensor with more dims, no values at all, or a value that is negative or not finite
    """
    if isinstance(value, LearningRateSchedule):
        return value
    value = front.plain(value)
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


def parse_decay(name: str, value: Any) -> WeightDecay:
    """Return a weight decay in one of its two forms.

    Raises:
        TypeError: it is neither a number nor a cell
        ValueError: it is negative or not finite
    """
    return value if isinstance(value, DYNAMIC_DECAY) else check_number(name, value, least=0)


def decay_at(decay: WeightDecay, step: int) -> float:
    """Return a weight decay's value at the 0-based step.

    Raises:
        TypeError, ValueError: a cell returned something else than a finite number >= 0
    """
    return _called("weight decay", decay, step) if isinstance(decay, DYNAMIC_DECAY) else decay


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
    return _called("learning rate", lr, step)


def _called(what: str, schedule: Any, step: int) -> float:
    with torch.no_grad():
        value = front.plain(schedule(front.Tensor([step], torch.int32)))
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return check_number(f"the {what} of {type(schedule).__name__} at step {step}", value, least=0)


def _vector(name: str, values: Iterable[Any]) -> tuple[float, ...]:
    items = (value.item() if isinstance(value, Tensor) and value.dim() == 0 else value for value in values)
    vector = tuple(check_number(f"{name}[{i}]", value, least=0) for i, value in enumerate(items))
    if not vector:
        raise ValueError(f"{name} has no values; give one for every step")
    return vector
