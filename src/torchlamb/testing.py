"""What can be asserted of any LAMB, for users' own tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def assert_relative_step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> None:
    """Take one step and assert LAMB's invariant: every adapted tensor moves by ``lr * |param|``.

    It holds for every tensor with a gradient and two norms above 0, as long as nothing clamps norms or ratios and a parameter
    is one block. Groups where `layer_adaptation` is False, bounds are set or `blocks` is not 1 are left out. Choose an lr well
    above the rounding of the dtype: that a bf16 parameter moved by 1e-3 of its norm cannot be told. A skipped step fails.

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
        checked += 1
        new, eps = p.detach(), torch.finfo(old.dtype).eps
        wide = torch.promote_types(old.dtype, torch.float64)
        moved = _norm(new.to(wide) - old.to(wide))
        if moved == 0.0 and not p.grad.any():
            continue  # no update at all: the ratio is 1
        wanted = float(group["lr"]) * _norm(old.to(wide))
        tolerance = (1e-12 if eps < 1e-15 else 1e-6) * wanted + eps / 2 * _norm(new.to(wide))
        if not abs(moved - wanted) <= tolerance:
            raise AssertionError(f"{name} moved by {moved:.9g}, not by lr * |param| = {wanted:.9g} (+- {tolerance:.2g})")
    if not checked:
        raise AssertionError("nothing to check: no adapted parameter has a gradient and a norm above 0")


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
