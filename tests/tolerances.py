"""How far apart two right computations of the rule may be: every tolerance against the reference comes from here.

Let e be half a unit in the last place of what is computed in, 2^-24 or 2^-53, and c the number of roundings that a number
went through. To first order in e, and elementwise if nothing else is said:

- A moment is a sum of terms; the one that is j steps old was multiplied by beta j times. Its error is at most c e times the sum
  of the terms' sizes: `uncancelled`, and `uncancelled_sq` for the second one, in which nothing cancels unless gradients are
  centralised, so that a term is the difference of a gradient and a mean, and counts as the sum of their sizes.
- The update, m_hat / (sqrt(v_hat) + eps) + decay w, has the error of its terms: c e times `terms_of_update`. A term is no
  smaller for what it cancels with, so of an update in which gradients cancel, or gradients and decay, a larger share is error.
- Its norm has that error too, relative to what is left of it: c e |terms| / |u|. The parameter's norm has the error of the
  steps taken so far: c e |path| / |w|. The larger of the two is the `cancellation` of a ratio: 1 to 4 for tensors of some
  elements, of which a few cancel; of a tensor of one element, all can. Where only a hundred-thousandth is left, the sign of
  such an update is float32's error, and nothing is said of the tensor from then on.
- So a step, lr ratio u, has the error c e lr ratio max(terms, |u| cancellation), which is c e times the size that it had if
  nothing cancelled: its `blur`, and a parameter c e times its path, the sum of those. Each subtraction adds e |w|.

c is counted for 20 steps: at most one rounding for each step that a term of m is old, half of one for those of v, of which the
root is taken, 2 for the term itself, up to 8 for clipping, and 12 for corrections, root, quotient, decay, norms, ratio
and product: 32 where most terms are young. That is 2e-6 of the path in float32. In float64 the reference rounds as much itself.

What is rounded to 16 bits is compared with the reference's number a before it is rounded, of error d: it has to be what some
number in [a - d, a + d] is rounded to, which is the rounded a or, near a rounding border, its neighbour. The reference goes on
from what was stored, so that a number on the other side of a border changes nothing that comes after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from reference import Reference

Array = np.ndarray[Any, Any]

# By name of the dtype that is computed in.
SHARE_OF_PATH = {"float64": 1e-12, "float32": 2e-6}
SHARE_OF_MOMENT = {"float64": 1e-13, "float32": 2e-6}
SHARE_OF_RATIO = {"float64": 1e-12, "float32": 1e-5}
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24}
MOST = 1e5  # a cancellation beyond which nothing can be said
ROUNDINGS = 32


def terms_of_update(reference: Reference, i: int, exp_avg_sq: Array, divisor: Array) -> Array:
    """The sizes of what an update of parameter i is the sum of; the parameter itself has the error of its path."""
    cancelled = np.ones_like(exp_avg_sq)  # in the second moment
    np.divide(reference.uncancelled_sq[i], exp_avg_sq, out=cancelled, where=exp_avg_sq > 0)
    terms = reference.uncancelled[i] * np.maximum(cancelled, 1.0) / divisor
    if decay := reference.options[i]["weight_decay"]:
        terms = terms + decay * (np.abs(reference.params[i]) + _path(reference, i))
    return terms


def cancellation(reference: Reference, i: int, block: Any, update: Array, terms: Array) -> float:
    """How much larger the relative error of a ratio is than that of its norms' terms."""
    pairs = (terms, update), (_path(reference, i), reference.params[i])
    found = [np.linalg.norm(a[block]) / (np.linalg.norm(b[block]) or 1.0) for a, b in pairs]
    most = float(max(1.0, *found))
    return most if most <= MOST else np.inf


def _path(reference: Reference, i: int) -> Array:
    """With the roundings of the subtractions."""
    return reference.paths[i] + reference.walked[i] / ROUNDINGS


def blur(length: float, update: Array, terms: Array, cancels: float) -> Array:
    """The size of the step that is so many times the update, if nothing cancelled."""
    if cancels == np.inf:
        return np.full_like(update, np.inf if length else 0.0)
    return abs(length) * np.maximum(terms, np.abs(update) * cancels)


def of_param(reference: Reference, i: int, dtype: str) -> Array:
    """Of a parameter that was computed in that dtype at all steps."""
    return _of_steps(reference.paths[i], reference.walked[i], dtype)


def of_last_step(reference: Reference, i: int, dtype: str) -> Array:
    """Of a parameter that was the reference's before the last step."""
    return _of_steps(reference.blurs[i], np.abs(reference.params[i]), dtype)


def _of_steps(blurs: Array, walked: Array, dtype: str) -> Array:
    return SHARE_OF_PATH[dtype] * blurs + ROUNDING[dtype] * walked


def of_moment(reference: Reference, name: str, i: int, dtype: str) -> Array:
    terms = {"exp_avg": reference.uncancelled, "exp_avg_sq": reference.uncancelled_sq}[name][i]
    return SHARE_OF_MOMENT[dtype] * terms


def assert_ratio(got: float, expected: tuple[float, float], dtype: str, name: object) -> None:
    wanted, cancels = expected
    assert abs(got - wanted) <= SHARE_OF_RATIO[dtype] * cancels * wanted, f"ratio of {name}: {got}, not {wanted}"


def assert_rounded(got: Array, exact: Array, error: Array, rounded: Callable[[Array], Array], name: object) -> None:
    """Assert that it is what a number within the error was rounded to. Rounding may not change the order of numbers."""
    low, high = rounded(exact - error), rounded(exact + error)
    assert np.all((low <= got) & (got <= high)), f"{name}: {got}, not from {low} to {high}"


def largest_share(error: Array, tolerance: Array, name: object) -> float:
    """Assert that errors are within their tolerances, and return the largest share of them."""
    assert np.all(error <= tolerance), f"{name}: {np.max(error / np.where(tolerance > 0, tolerance, 1e-300))} x tolerance"
    return float(np.max(error / np.where(tolerance > 0, tolerance, 1.0), initial=0))
