r"""Learning rates as functions of the step.

A schedule is called with the 0-based step and returns the learning rate. Formulas and argument checks are those of MindSpore's
schedules of the same names; values are Python floats, computed in float64.
"""

from __future__ import annotations

import math
from typing import Any

from torchlamb.mindspore.checks import check_count, check_float
from torchlamb.options import fail, flag

__all__ = [
    "CosineDecayLR",
    "ExponentialDecayLR",
    "InverseDecayLR",
    "LearningRateSchedule",
    "NaturalExpDecayLR",
    "PolynomialDecayLR",
    "WarmUpLR",
]


class LearningRateSchedule:
    """A learning rate for every step. Subclasses define `construct`.

    Optimizers keep schedules when they are pickled or copied, so a subclass has to be picklable if its optimizer is to be; what
    `construct` returns must depend on the step alone, or a resumed run will not continue as it was. Optimizers call them with a
    `Tensor` of one int, of shape (1,).

    Example:
        >>> from torchlamb.mindspore.nn import LearningRateSchedule
        >>> class Halving(LearningRateSchedule):
        ...     def construct(self, global_step):
        ...         return 0.1 * 0.5**global_step
        >>> Halving()(2)
        0.025
    """

    def __call__(self, global_step: Any) -> Any:
        """Return the learning rate at the 0-based step: an int, or a tensor with one element."""
        return self.construct(global_step)

    def construct(self, global_step: Any) -> Any:
        """Return the learning rate at the 0-based step, as a number or a tensor with one element.

        Raises:
            NotImplementedError: the subclass does not define it
        """
        raise NotImplementedError(f"{type(self).__name__} must define construct(global_step)")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class PolynomialDecayLR(LearningRateSchedule):
    r"""From one learning rate to another along a polynomial.

    .. math::
        (learning\_rate - end\_learning\_rate) (1 - \min(s, D) / D)^{power} + end\_learning\_rate

    With `update_decay_steps`, :math:`D` grows to the next multiple of `decay_steps` when it is reached, so that the learning
    rate rises and falls again.

    Args:
        learning_rate: at step 0; a float > 0
        end_learning_rate: from step `decay_steps` on; a float >= 0
        decay_steps: D, an int >= 1
        power: a float > 0
        update_decay_steps: let D grow (default: False)

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore.nn import PolynomialDecayLR
        >>> schedule = PolynomialDecayLR(0.1, 0.01, decay_steps=4, power=0.5)
        >>> [round(schedule(step), 4) for step in range(6)]
        [0.1, 0.0879, 0.0736, 0.055, 0.01, 0.01]

    Source: `mindspore.nn.PolynomialDecayLR`.
    """

    def __init__(
        self,
        learning_rate: float,
        end_learning_rate: float,
        decay_steps: int,
        power: float,
        update_decay_steps: bool = False,
    ) -> None:
        self.learning_rate = check_float("learning_rate", learning_rate, above=0)
        self.end_learning_rate = check_float("end_learning_rate", end_learning_rate, least=0)
        self.decay_steps = check_count("decay_steps", decay_steps)
        self.power = check_float("power", power, above=0)
        self.update_decay_steps = flag("update_decay_steps", update_decay_steps)

    def construct(self, global_step: Any) -> float:
        """Return the learning rate at the 0-based step."""
        step, decay_steps = int(global_step), self.decay_steps
        if self.update_decay_steps:
            decay_steps *= max(math.ceil(step / decay_steps), 1)
        left = 1 - min(step, decay_steps) / decay_steps
        return (self.learning_rate - self.end_learning_rate) * math.pow(left, self.power) + self.end_learning_rate


class ExponentialDecayLR(LearningRateSchedule):
    r"""Multiplied by `decay_rate` every `decay_steps`.

    .. math::
        learning\_rate \cdot decay\_rate^p, \quad p = s / D, \text{ rounded down with } is\_stair

    Args:
        learning_rate: at step 0; a float > 0
        decay_rate: a float > 0
        decay_steps: D, an int >= 1
        is_stair: change only every `decay_steps` (default: False)

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore.nn import ExponentialDecayLR
        >>> schedule = ExponentialDecayLR(0.1, 0.5, decay_steps=2, is_stair=True)
        >>> [schedule(step) for step in range(5)]
        [0.1, 0.1, 0.05, 0.05, 0.025]

    Source: `mindspore.nn.ExponentialDecayLR`.
    """

    def __init__(self, learning_rate: float, decay_rate: float, decay_steps: int, is_stair: bool = False) -> None:
        self.learning_rate = check_float("learning_rate", learning_rate, above=0)
        self.decay_rate = check_float("decay_rate", decay_rate, above=0)
        self.decay_steps = check_count("decay_steps", decay_steps)
        self.is_stair = flag("is_stair", is_stair)

    def construct(self, global_step: Any) -> float:
        """Return the learning rate at the 0-based step."""
        return self.learning_rate * math.pow(self.decay_rate, self._periods(int(global_step)))

    def _periods(self, step: int) -> float:
        return step // self.decay_steps if self.is_stair else step / self.decay_steps


class NaturalExpDecayLR(ExponentialDecayLR):
    r"""Multiplied by :math:`e^{-decay\_rate}` at every step.

    .. math::
        learning\_rate \cdot e^{-decay\_rate \cdot p}, \quad p = s, \text{ or } D \lfloor s / D \rfloor \text{ with } is\_stair

    The documentation of the original divides the step by `decay_steps`; its code does not, and this follows the code: without
    `is_stair`, `decay_steps` has no effect.

    Args:
        learning_rate: at step 0; a float > 0
        decay_rate: a float > 0
        decay_steps: D, an int >= 1
        is_stair: change only every `decay_steps` (default: False)

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore.nn import NaturalExpDecayLR
        >>> schedule = NaturalExpDecayLR(0.1, 0.9, decay_steps=4)
        >>> [round(schedule(step), 4) for step in range(3)]
        [0.1, 0.0407, 0.0165]

    Source: `mindspore.nn.NaturalExpDecayLR`, its code.
    """

    def construct(self, global_step: Any) -> float:
        """Return the learning rate at the 0-based step."""
        step = int(global_step)
        passed = step // self.decay_steps * self.decay_steps if self.is_stair else step
        return self.learning_rate * math.exp(-self.decay_rate * passed)


class InverseDecayLR(ExponentialDecayLR):
    r"""Divided by a number that grows with the step.

    .. math::
        learning\_rate / (1 + decay\_rate \cdot p), \quad p = s / D, \text{ rounded down with } is\_stair

    Args:
        learning_rate: at step 0; a float > 0
        decay_rate: a float > 0
        decay_steps: D, an int >= 1
        is_stair: change only every `decay_steps` (default: False)

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore.nn import InverseDecayLR
        >>> schedule = InverseDecayLR(0.1, 1.0, decay_steps=2)
        >>> [round(schedule(step), 4) for step in range(3)]
        [0.1, 0.0667, 0.05]

    Source: `mindspore.nn.InverseDecayLR`.
    """

    def construct(self, global_step: Any) -> float:
        """Return the learning rate at the 0-based step."""
        return self.learning_rate / (1 + self.decay_rate * self._periods(int(global_step)))


class CosineDecayLR(LearningRateSchedule):
    r"""From `max_lr` to `min_lr` along half a cosine.

    .. math::
        min\_lr + \tfrac12 (max\_lr - min\_lr) (1 + \cos(\pi \min(s, D) / D))

    Args:
        min_lr: from step `decay_steps` on; a float >= 0
        max_lr: at step 0; a float > `min_lr`
        decay_steps: D, an int >= 1

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore.nn import CosineDecayLR
        >>> schedule = CosineDecayLR(0.01, 0.1, decay_steps=4)
        >>> [round(schedule(step), 4) for step in range(5)]
        [0.1, 0.0868, 0.055, 0.0232, 0.01]

    Source: `mindspore.nn.CosineDecayLR`.
    """

    def __init__(self, min_lr: float, max_lr: float, decay_steps: int) -> None:
        self.min_lr = check_float("min_lr", min_lr, least=0)
        self.max_lr = check_float("max_lr", max_lr, above=0)
        if max_lr <= min_lr:
            raise fail(ValueError, "max_lr", f"greater than min_lr={min_lr}", max_lr)
        self.decay_steps = check_count("decay_steps", decay_steps)

    def construct(self, global_step: Any) -> float:
        """Return the learning rate at the 0-based step."""
        passed = min(int(global_step), self.decay_steps) / self.decay_steps
        return self.min_lr + (self.max_lr - self.min_lr) / 2 * (1 + math.cos(math.pi * passed))


class WarmUpLR(LearningRateSchedule):
    r"""From 0 up to `learning_rate` in a straight line.

    .. math::
        learning\_rate \cdot \min(s, W) / W

    The first step, at :math:`s = 0`, has a learning rate of 0.

    Args:
        learning_rate: from step `warmup_steps` on; a float >= 0
        warmup_steps: W, an int >= 1

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore.nn import WarmUpLR
        >>> schedule = WarmUpLR(0.1, warmup_steps=4)
        >>> [round(schedule(step), 4) for step in range(6)]
        [0.0, 0.025, 0.05, 0.075, 0.1, 0.1]

    Source: `mindspore.nn.WarmUpLR`.
    """

    def __init__(self, learning_rate: float, warmup_steps: int) -> None:
        self.learning_rate = check_float("learning_rate", learning_rate, least=0)
        self.warmup_steps = check_count("warmup_steps", warmup_steps)

    def construct(self, global_step: Any) -> float:
        """Return the learning rate at the 0-based step."""
        return self.learning_rate * min(int(global_step), self.warmup_steps) / self.warmup_steps
