"""What can be asserted of any LAMB, for users' own tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


def assert_relative_step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> None:
    """Take one step and assert LAMB's invariant: every adapted tensor moves by ``lr * |param|``.

    It holds for every tensor with a gradient and two norms above 0, as long as nothing clamps norms or ratios and a parameter
    is one block. Groups where `layer_adaptation` is False, bounds are set or `blocks` is not 1 are left out.

    Args:
        optimizer: any LAMB, ready to step. Parameters of any floating-point dtype.
        closure: given to ``optimizer.step`` (default: None)

    Raises:
        AssertionError: naming the first parameter that moved by another length. Tolerances, relative to ``lr * |param|``: 1e-6
            (float64: 1e-12) plus the rounding of the parameter itself.

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
    for name, group, p, old in before:
        if not _is_adapted(group) or p.grad is None or not old.any():
            continue
        wide = torch.promote_types(old.dtype, torch.float64)
        old_norm = torch.linalg.vector_norm(old.to(wide)).item()
        moved = torch.linalg.vector_norm(p.detach().to(wide) - old.to(wide)).item()
        if moved == 0.0 and not p.grad.any():
            continue  # no update at all: the ratio is 1
        wanted = float(group["lr"]) * old_norm
        tolerance = (1e-12 if old.dtype in (torch.float64, torch.complex128) else 1e-6) * wanted
        tolerance += torch.finfo(old.dtype).eps / 2 * old_norm
        if not abs(moved - wanted) <= tolerance:
            raise AssertionError(f"{name} moved by {moved:.9g}, not by lr * |param| = {wanted:.9g} (+- {tolerance:.2g})")


def _is_adapted(group: dict[str, Any]) -> bool:
    return (
        group.get("layer_adaptation", True)
        and group.get("phi_bounds") is None
        and group.get("trust_ratio_bounds") is None
        and group.get("blocks", 1) == 1
    )
