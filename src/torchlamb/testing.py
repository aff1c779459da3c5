"""What can be asserted of any LAMB, for users' own tests.

The rule stands here a second time, in float64 and on its own: what is asserted of `torchlamb.Lamb` must not be its own code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def assert_relative_step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> None:
    """Take one step and assert LAMB's invariant: every adapted tensor moves by ``|lr| * |param|``.

    It holds for every tensor with a gradient and two norms above 0, as long as nothing clamps norms or ratios and a parameter
    is one block. Groups where `layer_adaptation` is False, bounds are set or `blocks` is not 1 are left out. Choose an lr well
    above the rounding of the dtype: that a bf16 parameter moved by 1e-3 of its norm cannot be told. A skipped step fails, and
    so does a LAMB whose norms lose digits, as torch's own of float32 do on a CPU: 2e-6 at 2^18 elements, 8e-5 at 2^22.

    Args:
        optimizer: any LAMB, ready to step. Parameters of any floating-point dtype.
        closure: given to ``optimizer.step`` (default: None)

    Raises:
        AssertionError: naming the first parameter that moved by another length, or if there was none to check. Tolerances,
            relative to ``lr * |param|``: 1e-6 (float64: 1e-12) plus the rounding of the parameter itself.

    Example:
        >>> import torch, torchlamb
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torchlamb.Lamb(model.parameters(), lr=0.01)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> torchlamb.testing.assert_relative_step(optimizer)

    Source: from the rule of arXiv 1904.00962, |delta w| = lr |w| / |u| * |u|.
    """
    before = [
        (f"parameter {i} of group {g}", group, p, p.detach().clone())
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
    ]
    optimizer.step(closure)
    checked = 0
    for name, group, p, old in before:
        if not _is_adapted(group) or p.grad is None or not old.any():
            continue
        new, eps = p.detach(), torch.finfo(old.dtype).eps
        wide = torch.promote_types(old.dtype, torch.float64)
        moved = _norm(new.to(wide) - old.to(wide))
        if moved == 0.0 and not p.grad.any():
            continue  # no update at all: the ratio is 1
        checked += 1
        wanted = abs(float(group["lr"])) * _norm(old.to(wide))
        tolerance = (1e-12 if eps < 1e-15 else 1e-6) * wanted + eps / 2 * _norm(new.to(wide))
        if not abs(moved - wanted) <= tolerance:
            raise AssertionError(f"{name} moved by {moved:.9g}, not by lr * |param| = {wanted:.9g} (+- {tolerance:.2g})")
    if not checked:
        raise AssertionError("nothing to check: no adapted parameter has a gradient and a norm above 0")


def assert_matches_reference(
    optimizer_factory: Callable[..., Optimizer], *, dtype: torch.dtype = torch.float32, steps: int = 12, seed: int = 0
) -> None:
    r"""Assert that a LAMB computes the paper's rule, by running it beside that rule in float64.

    .. math::
        u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda w_{t-1} \qquad
        w_t = w_{t-1} - \eta \frac{\|w_{t-1}\|}{\|u_t\|} u_t

    for every tensor on its own, with a ratio of 1 where either norm is 0. It runs with decay and without, on tensors with norms
    of 0, 1e-4 and 2e4 and gradients from 1e-4 to 1e2; on a 0-dim and an empty one, one without a gradient, one whose gradients
    are mostly 0, and one whose gradients end. What is off by default in some LAMBs has to be switched on: timm's passes as
    ``functools.partial(Lamb, max_grad_norm=None, always_adapt=True)``.

    Args:
        optimizer_factory: called with a list of parameters on the CPU and `lr`, `betas`, `eps` and `weight_decay` by name; an
            optimizer's class, say
        dtype: of the parameters, torch.float32 or torch.float64 (default: torch.float32)
        steps: how many are taken with each of the two settings, >= 1 (default: 12)
        seed: of the random numbers, which are its own: torch's stay as they are (default: 0)

    Raises:
        AssertionError: naming the first tensor that is elsewhere, the step, and what is computed instead, if that is known: a
            combination of bias correction after the ratio or none, clamped norms and ratios, decay outside the ratio, no
            adaptation without decay, clipped gradients, eps in the ratio, or zero tensors that never move. Allowed, relative to
            the length of the path: 4e-6 (float64: 1e-12), and one rounding of the parameter per step.
        ValueError: `dtype` is another, or `steps` less than 1

    Example:
        >>> import torchlamb
        >>> torchlamb.testing.assert_matches_reference(torchlamb.Lamb)
        >>> def without_bias_correction(params, **settings):
        ...     return torchlamb.Lamb(params, bias_correction=False, **settings)
        >>> torchlamb.testing.assert_matches_reference(without_bias_correction)
        Traceback (most recent call last):
            ...
        AssertionError: tensor 'matrix' is off by 0.28 after step 1 ... This is the rule with no bias correction.

    Source: arXiv 1904.00962, algorithm 2.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}; other dtypes round too much to tell")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    for settings in _SETTINGS:
        start, grads = _tensors(dtype, steps, seed)
        history = _run(optimizer_factory, start, grads, settings)
        off = _first_difference(history, start, grads, settings, ())
        if off is not None:
            name, step, error = off
            known = _explanation(history, start, grads, settings)
            raise AssertionError(
                f"tensor {name!r} is off by {error:.3g} after step {step} (in lengths of its path, with {settings}). "
                + (f"This is the rule with {' and '.join(known)}." if known else "This is no deviation that is known here.")
            )


_SETTINGS: tuple[dict[str, Any], ...] = (
    {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0},
    {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
)
_AFTER_BOTH, _AFTER_FIRST, _NO_CORRECTION = (
    "sqrt(1 - beta2^t) / (1 - beta1^t) after the ratio",
    "1 / (1 - beta1^t) after the ratio",
    "no bias correction",
)
_CLAMPED_NORM, _CLAMPED_RATIO, _RATIO_TO_1 = (
    "|param| clamped to 10",
    "the ratio clamped to [0.01, 10]",
    "the ratio clamped to 1",
)
_OUTSIDE, _PLAIN_ADAM = "decay outside the ratio", "no adaptation where weight_decay is 0"
_CLIP = "gradients clipped to a norm of 1 over all of them"
_EPS, _STUCK = "eps added to |update|", "tensors of norm 0 that never move"
_EXCLUSIVE = ({_AFTER_BOTH, _AFTER_FIRST, _NO_CORRECTION}, {_CLAMPED_RATIO, _RATIO_TO_1})
_DEVIATIONS = (
    _NO_CORRECTION, _AFTER_BOTH, _AFTER_FIRST, _PLAIN_ADAM, _OUTSIDE, _CLAMPED_NORM, _CLAMPED_RATIO, _RATIO_TO_1, _CLIP, _EPS,
    _STUCK,
)  # fmt: skip

Named = dict[str, Tensor]


def _tensors(dtype: torch.dtype, steps: int, seed: int) -> tuple[Named, list[Named]]:
    """Return parameters, and for each step gradients of those that have one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    start = {
        "matrix": normal(24, 16) * 0.05,
        "large": normal(20, 20) * 1e3,
        "small": normal(10, 10) * 1e-5,
        "vector": normal(7),
        "zero": normal(5) * 0,
        "0-dim": normal() + 3,
        "empty": normal(0, 3),
        "without a gradient": normal(4),
        "mostly zeros": normal(30, 3),
        "gradients end": normal(6, 2),
    }
    scales = {name: 10.0 ** (6 * i / (len(start) - 1) - 4) for i, name in enumerate(start)}
    grads = []
    for step in range(steps):
        now = {name: normal(*p.shape) * scales[name] * (1 + step % 3) for name, p in start.items()}
        del now["without a gradient"]
        now["0-dim"] = now["0-dim"].abs() + scales["0-dim"]  # of one sign: one number alone must not cancel
        now["mostly zeros"][torch.rand(30, generator=generator) < 0.9] = 0
        now["gradients end"] *= step < 3
        grads.append({name: g.to(dtype) for name, g in now.items()})
    return {name: p.to(dtype) for name, p in start.items()}, grads


def _run(factory: Callable[..., Optimizer], start: Named, grads: list[Named], settings: dict[str, Any]) -> list[Named]:
    """Return the parameters after each step."""
    params = {name: torch.nn.Parameter(p.clone()) for name, p in start.items()}
    optimizer = factory(list(params.values()), **settings)
    history = []
    for now in grads:
        for name, p in params.items():
            p.grad = now[name].clone() if name in now else None
        optimizer.step()
        history.append({name: p.detach().clone() for name, p in params.items()})
    return history


def _first_difference(
    history: list[Named], start: Named, grads: list[Named], settings: dict[str, Any], deviations: Sequence[str]
) -> tuple[str, int, float] | None:
    """Return which tensor is elsewhere than the rule has it, after which step, and how far in lengths of its path."""
    eps = torch.finfo(start["matrix"].dtype).eps
    share = 1e-12 if eps < 1e-15 else 4e-6
    paths = dict.fromkeys(start, 0.0)
    before = {name: p.double() for name, p in start.items()}
    for step, wanted in enumerate(_reference(start, grads, settings, deviations), start=1):
        for name, p in wanted.items():
            paths[name] += _norm(p - before[name])
            error = _norm(history[step - 1][name].double() - p)
            if not error <= share * paths[name] + step * eps / 2 * _norm(p):
                return name, step, error / paths[name] if paths[name] else error
        before = wanted
    return None


def _reference(start: Named, grads: list[Named], settings: dict[str, Any], deviations: Sequence[str]) -> Iterator[Named]:
    """Yield the parameters after each step of the rule in float64, or of a rule with these deviations from it."""
    lr, (beta1, beta2), eps, decay = (settings[name] for name in ("lr", "betas", "eps", "weight_decay"))
    params = {name: p.double() for name, p in start.items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}
    for t, now in enumerate(grads, start=1):
        correction1, correction2 = 1 - beta1**t, 1 - beta2**t
        after = {_AFTER_BOTH: correction2**0.5 / correction1, _AFTER_FIRST: 1 / correction1, _NO_CORRECTION: 1.0}
        factor = next((value for name, value in after.items() if name in deviations), None)
        if factor is not None:
            correction1 = correction2 = 1.0
        norm = sum(_norm(g.double()) ** 2 for g in now.values()) ** 0.5
        clip = max(norm, 1.0) if _CLIP in deviations else 1.0
        params = dict(params)
        for name, grad in now.items():
            g, w, (m, v) = grad.double() / clip, params[name], moments[name]
            moments[name] = m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            u = m / correction1 / ((v / correction2).sqrt() + eps)
            if _OUTSIDE in deviations:
                w = w * (1 - lr * decay)
            else:
                u = u + decay * w
            params[name] = (
                w - lr * (1.0 if factor is None else factor) * _trust_ratio(_norm(w), _norm(u), settings, deviations) * u
            )
        yield params


def _trust_ratio(param_norm: float, update_norm: float, settings: dict[str, Any], deviations: Sequence[str]) -> float:
    if _PLAIN_ADAM in deviations and settings["weight_decay"] == 0:
        return 1.0
    if param_norm == 0 or update_norm == 0:
        return 0.0 if _STUCK in deviations else 1.0
    ratio = min(param_norm, 10.0 if _CLAMPED_NORM in deviations else param_norm)
    ratio /= update_norm + (settings["eps"] if _EPS in deviations else 0.0)
    low, high = (0.01, 10.0) if _CLAMPED_RATIO in deviations else (0.0, 1.0) if _RATIO_TO_1 in deviations else (0.0, ratio)
    return min(max(ratio, low), high)


def _explanation(history: list[Named], start: Named, grads: list[Named], settings: dict[str, Any]) -> Sequence[str]:
    """Return the fewest deviations from the rule that give what was computed; none if it is something else."""
    for count in range(1, 6):
        for deviations in itertools.combinations(_DEVIATIONS, count):
            fits = all(len(exclusive & set(deviations)) <= 1 for exclusive in _EXCLUSIVE)
            if fits and _first_difference(history, start, grads, settings, deviations) is None:
                return deviations
    return ()


def _norm(t: Tensor) -> float:
    # Not torch.linalg.vector_norm, which loses digits on large tensors of a CPU.
    return float(torch.view_as_real(t).square().sum().sqrt() if t.is_complex() else t.square().sum().sqrt())


def _is_adapted(group: dict[str, Any]) -> bool:
    return (
        group.get("layer_adaptation", True)
        and group.get("phi_bounds") is None
        and group.get("trust_ratio_bounds") is None
        and group.get("blocks", 1) == 1
    )
