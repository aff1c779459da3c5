"""Whether a step is taken at all, and what its gradients are multiplied by: clipping, non-finite gradients, loss scaling.

Everything is decided from one number, the squared norm over all gradients, and stays on the device unless the host can read it
for free (or has to, for autograd). This room must not know how a backend computes, nor write a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.backends import Work


def is_guarded(group: dict[str, Any]) -> bool:
    """Return whether steps of the group's optimizer depend on the norm over all gradients."""
    return group["max_grad_norm"] is not None or group["skip_nonfinite"]


def guard(work: Work, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
    """Set each bucket's gradient factor and skip flag.

    Args:
        work: the buckets of all groups, with their backends
        group: any group; the options read here are the same in all of them
        grad_scale: (1,) or 0-dim, what the loss was multiplied by; set by torch.amp.GradScaler around step()
        found_inf: (1,) or 0-dim, not 0 where the scaler found a gradient that is not finite

    Returns:
        True where the host knows that nothing is to be stepped.
    """
    factor: Tensor | None = None if grad_scale is None else 1.0 / grad_scale.reshape(())
    skip: Tensor | None = None if found_inf is None else found_inf.reshape(()) != 0
    if work and is_guarded(group):
        sq_norm = _total_grad_sq_norm(work)
        if factor is not None:
            sq_norm = sq_norm * factor.to(sq_norm.device) ** 2
        nonfinite = ~torch.isfinite(sq_norm.float())
        skip = nonfinite if skip is None else nonfinite | skip.to(nonfinite.device)
        if group["max_grad_norm"] is not None:
            coefficient = rule.clip_coefficient(sq_norm, group["max_grad_norm"])
            factor = coefficient if factor is None else coefficient * factor.to(coefficient.device)
    host_reads = skip is not None and _host_may_read(skip, work, group)
    for _, bucket in work:
        if factor is not None:
            bucket.grad_factor = factor.to(bucket.device, bucket.dtype) * bucket.grad_factor
        if skip is not None and not host_reads:
            bucket.skip = skip.to(bucket.device)
            bucket.on_device = True  # a skipped first step leaves step counts of 0, which only tensors survive
    skipped = host_reads and bool(skip)
    if skipped:
        for _, bucket in work:
            bucket.skip = skip
    return skipped


def _host_may_read(skip: Tensor, work: Work, group: dict[str, Any]) -> bool:
    if group["differentiable"]:
        return True  # through a step that is selected away, autograd would pass 0 x NaN on
    return skip.is_cpu and not torch.compiler.is_compiling() and not any(bucket.on_device for _, bucket in work)


def _total_grad_sq_norm(work: Work) -> Tensor:
    total: Tensor | None = None
    for backend, bucket in work:
        rows = torch.zeros(len(bucket), dtype=bucket.dtype, device=bucket.device)
        backend.grad_sq_norms(bucket, rows)
        total = rows.sum() if total is None else total + rows.sum().to(total.device)
    assert total is not None
    return total
