r"""Learning rates as lists, one value for each step, that change from epoch to epoch.

In all formulas :math:`e = \lfloor i / step\_per\_epoch \rfloor` is the epoch of step :math:`i`, from 0, and :math:`D` is
`decay_epoch`. Formulas and argument checks are those of MindSpore's functions of the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torchlamb.mindspore.checks import check_count, check_float
from torchlamb.mindspore.nn.learning_rate_schedule import (
    CosineDecayLR,
    ExponentialDecayLR,
    InverseDecayLR,
    LearningRateSchedule,
    NaturalExpDecayLR,
    PolynomialDecayLR,
    WarmUpLR,
)
from torchlamb.options import fail

__all__ = [
    "cosine_decay_lr",
    "exponential_decay_lr",
    "inverse_decay_lr",
    "natural_exp_decay_lr",
    "piecewise_constant_lr",
    "polynomial_decay_lr",
    "warmup_lr",
]


def piecewise_constant_lr(milestone: Any, learning_rates: Any) -> list[float]:
    """Return each learning rate up to its milestone.

    Args:
        milestone: steps, a list or tuple of ints >= 1 that do not fall
        learning_rates: a list or tuple of floats, one for each milestone

    Returns:
        As many values as the last milestone says.

    Raises:
        TypeError: an argument, or an element of one, of another type
        ValueError: lengths that differ, or a milestone before the one before it

    Example:
        >>> from torchlamb.mindspore import nn
        >>> nn.piecewise_constant_lr([2, 3], [0.1, 0.05])
        [0.1, 0.1, 0.05]

    Source: `mindspore.nn.piecewise_constant_lr`.
    """
    for name, value in (("milestone", milestone), ("learning_rates", learning_rates)):
        if not isinstance(value, (list, tuple)):
            raise fail(TypeError, name, "a list or tuple", value)
    if len(milestone) != len(learning_rates):
        raise ValueError(f"learning_rates must have a value for each of {len(milestone)} milestones, got {len(learning_rates)}")
    rates: list[float] = []
    for i, (step, rate) in enumerate(zip(milestone, learning_rates, strict=True)):
        check_count(f"milestone[{i}]", step)
        check_float(f"learning_rates[{i}]", rate)
        if step < len(rates):
            raise fail(ValueError, f"milestone[{i}]", f"an int >= the one before it, {len(rates)}", step)
        rates += [rate] * (step - len(rates))
    return rates


def exponential_decay_lr(
    learning_rate: float, decay_rate: float, total_step: int, step_per_epoch: int, decay_epoch: int, is_stair: bool = False
) -> list[float]:
    r"""Return learning rates that are multiplied by `decay_rate` every `decay_epoch` epochs.

    .. math::
        learning\_rate \cdot decay\_rate^p, \quad p = e / D, \text{ rounded down with } is\_stair

    Args:
        learning_rate: of the first epoch; a float > 0
        decay_rate: a float > 0
        total_step: how many values, an int >= 1
        step_per_epoch: an int >= 1
        decay_epoch: an int >= 1
        is_stair: change only every `decay_epoch` epochs (default: False)

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore import nn
        >>> nn.exponential_decay_lr(0.1, 0.5, total_step=4, step_per_epoch=2, decay_epoch=1)
        [0.1, 0.1, 0.05, 0.05]

    Source: `mindspore.nn.exponential_decay_lr`.
    """
    return _by_epoch(
        lambda epochs: ExponentialDecayLR(learning_rate, decay_rate, epochs, is_stair), total_step, step_per_epoch, decay_epoch
    )


def natural_exp_decay_lr(
    learning_rate: float, decay_rate: float, total_step: int, step_per_epoch: int, decay_epoch: int, is_stair: bool = False
) -> list[float]:
    r"""Return learning rates that are multiplied by :math:`e^{-decay\_rate}` every epoch.

    .. math::
        learning\_rate \cdot \exp(-decay\_rate \cdot p), \quad p = e, \text{ or } D \lfloor e/D \rfloor \text{ with } is\_stair

    Args:
        learning_rate: of the first epoch; a float > 0
        decay_rate: a float > 0
        total_step: how many values, an int >= 1
        step_per_epoch: an int >= 1
        decay_epoch: an int >= 1
        is_stair: change only every `decay_epoch` epochs (default: False)

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore import nn
        >>> [round(rate, 4) for rate in nn.natural_exp_decay_lr(0.1, 0.9, total_step=4, step_per_epoch=2, decay_epoch=2)]
        [0.1, 0.1, 0.0407, 0.0407]

    Source: `mindspore.nn.natural_exp_decay_lr`.
    """
    return _by_epoch(
        lambda epochs: NaturalExpDecayLR(learning_rate, decay_rate, epochs, is_stair), total_step, step_per_epoch, decay_epoch
    )


def inverse_decay_lr(
    learning_rate: float, decay_rate: float, total_step: int, step_per_epoch: int, decay_epoch: int, is_stair: bool = False
) -> list[float]:
    r"""Return learning rates that fall with the inverse of the epoch.

    .. math::
        \frac{learning\_rate}{1 + decay\_rate \cdot p}, \quad p = e / D, \text{ rounded down with } is\_stair

    Args:
        learning_rate: of the first epoch; a float > 0
        decay_rate: a float > 0
        total_step: how many values, an int >= 1
        step_per_epoch: an int >= 1
        decay_epoch: an int >= 1
        is_stair: change only every `decay_epoch` epochs (default: False)

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore import nn
        >>> nn.inverse_decay_lr(0.1, 1.0, total_step=4, step_per_epoch=2, decay_epoch=1)
        [0.1, 0.1, 0.05, 0.05]

    Source: `mindspore.nn.inverse_decay_lr`.
    """
    return _by_epoch(
        lambda epochs: InverseDecayLR(learning_rate, decay_rate, epochs, is_stair), total_step, step_per_epoch, decay_epoch
    )


def cosine_decay_lr(min_lr: float, max_lr: float, total_step: int, step_per_epoch: int, decay_epoch: int) -> list[float]:
    r"""Return learning rates that fall along half a cosine.

    .. math::
        min\_lr + \frac{max\_lr - min\_lr}{2} \left(1 + \cos\left(\pi \frac{\min(e, D)}{D}\right)\right)

    Args:
        min_lr: from epoch `decay_epoch` on; a float >= 0
        max_lr: of the first epoch; a float > `min_lr`
        total_step: how many values, an int >= 1
        step_per_epoch: an int >= 1
        decay_epoch: an int >= 1

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore import nn
        >>> [round(rate, 4) for rate in nn.cosine_decay_lr(0.01, 0.1, total_step=3, step_per_epoch=1, decay_epoch=2)]
        [0.1, 0.055, 0.01]

    Source: `mindspore.nn.cosine_decay_lr`.
    """
    return _by_epoch(lambda epochs: CosineDecayLR(min_lr, max_lr, epochs), total_step, step_per_epoch, decay_epoch)


def polynomial_decay_lr(
    learning_rate: float,
    end_learning_rate: float,
    total_step: int,
    step_per_epoch: int,
    decay_epoch: int,
    power: float,
    update_decay_epoch: bool = False,
) -> list[float]:
    r"""Return learning rates from one to another along a polynomial.

    .. math::
        (learning\_rate - end\_learning\_rate) (1 - \min(e, D) / D)^{power} + end\_learning\_rate

    With `update_decay_epoch`, :math:`D` grows to the next multiple of `decay_epoch` when it is reached.

    Args:
        learning_rate: of the first epoch; a float > 0
        end_learning_rate: from epoch `decay_epoch` on; a float >= 0
        total_step: how many values, an int >= 1
        step_per_epoch: an int >= 1
        decay_epoch: an int >= 1
        power: a float > 0
        update_decay_epoch: let D grow (default: False)

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore import nn
        >>> nn.polynomial_decay_lr(0.5, 0.25, total_step=3, step_per_epoch=1, decay_epoch=2, power=1.0)
        [0.5, 0.375, 0.25]

    Source: `mindspore.nn.polynomial_decay_lr`.
    """

    def make(epochs: int) -> LearningRateSchedule:
        return PolynomialDecayLR(learning_rate, end_learning_rate, epochs, power, update_decay_epoch)

    return _by_epoch(make, total_step, step_per_epoch, decay_epoch)


def warmup_lr(learning_rate: float, total_step: int, step_per_epoch: int, warmup_epoch: int) -> list[float]:
    r"""Return learning rates that rise in a straight line from 0.

    .. math::
        learning\_rate \cdot \min(e, W) / W

    Args:
        learning_rate: from epoch `warmup_epoch` on; a float >= 0
        total_step: how many values, an int >= 1
        step_per_epoch: an int >= 1
        warmup_epoch: W, an int >= 1

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore import nn
        >>> nn.warmup_lr(0.5, total_step=4, step_per_epoch=1, warmup_epoch=2)
        [0.0, 0.25, 0.5, 0.5]

    Source: `mindspore.nn.warmup_lr`.
    """
    return _by_epoch(lambda epochs: WarmUpLR(learning_rate, epochs), total_step, step_per_epoch, warmup_epoch, "warmup_epoch")


def _by_epoch(
    make: Callable[[int], LearningRateSchedule], total_step: int, step_per_epoch: int, epochs: int, name: str = "decay_epoch"
) -> list[float]:
    """Return a schedule of the epoch at each step. Its own check would name the epochs as steps."""
    for label, value in (("total_step", total_step), ("step_per_epoch", step_per_epoch), (name, epochs)):
        check_count(label, value)
    schedule = make(epochs)
    return [schedule(math.floor(i / step_per_epoch)) for i in range(total_step)]
