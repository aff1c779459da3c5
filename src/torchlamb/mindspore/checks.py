"""Arguments as MindSpore's documentation words them: a float is no int, a bool is no number."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from torchlamb.options import fail


def check_float(name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf) -> float:
    """Return a finite float > `above`, >= `least` and < `below`.

    Raises:
        TypeError: it is no float; an int is none
        ValueError: it is out of range
    """
    return _check(name, value, "float", lambda v: isinstance(v, float), above, least, below)


def check_number(name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf) -> float:
    """Return a finite int or float as a float.

    Raises:
        TypeError: it is neither; a bool is none
        ValueError: it is out of range
    """
    return _check(name, value, "number", lambda v: isinstance(v, Real) and not isinstance(v, bool), above, least, math.inf)


def check_count(name: str, value: Any) -> int:
    """Return an int >= 1.

    Raises:
        TypeError: it is no int; a bool is none
        ValueError: it is less than 1
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise fail(TypeError, name, "an int >= 1", value)
    if value < 1:
        raise fail(ValueError, name, "an int >= 1", value)
    return int(value)


def _check(name: str, value: Any, kind: str, accept: Callable[[Any], bool], above: float, least: float, below: float) -> float:
    limits = [f"{sign} {limit}" for sign, limit in ((">", above), (">=", least), ("<", below)) if math.isfinite(limit)]
    wanted = f"a finite {kind} {' and '.join(limits)}"
    if not accept(value):
        raise fail(TypeError, name, wanted, value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (above < number < below and least <= number):
        raise fail(ValueError, name, wanted, value)
    return number
