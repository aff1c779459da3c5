"""Whether a step is taken at all, and what its gradients are multiplied by: clipping, non-finite gradients, loss scaling.

Everything is decided from one number, the squared norm over all gradients, and stays on the device unless the host can read it
for free (or has to, for autograd). This room must not know how a backend computes, nor write a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.backends import Work
from torchlamb.sharding import Groups, Plan


def is_guarded(group: Mapping[str, Any]) -> bool:
    """Return whether steps of the group's optimizer depend on the norm over all gradients."""
    return group["max_grad_norm"] is not None or group["skip_nonfinite"]


def guard(
    work: Work,
    plan: Plan | None,
    groups: Sequence[dict[str, Any]],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> bool:
    """Set each bucket's gradient factor and skip flag.

    Args:
        work: the buckets of all groups, with their backends
        plan: how parameters are sharded; None where nothing is
        groups: the parameter groups; max_grad_norm, skip_nonfinite and differentiable are the same in all of them
        grad_scale: (1,) or 0-dim, what the loss was multiplied by; set by torch.amp.GradScaler around step()
        found_inf: (1,) or 0-dim, not 0 where the scaler found a gradient that is not finite

    Returns:
        True where the host knows that nothing is to be stepped.
    """
    group = groups[0]
    factor: Tensor | None = None if grad_scale is None else 1.0 / grad_scale.reshape(())
    guarded = is_guarded(group) and (bool(work) or plan is not None)
    sq_norm = None
    if guarded or (plan is not None and found_inf is not None):
        sq_norm, found_inf = _over_all_processes(work, plan, guarded, found_inf)
    skip: Tensor | None = None if found_inf is None else found_inf.reshape(()) != 0
    if guarded and sq_norm is not None:
        if factor is not None:
            sq_norm = sq_norm * factor.to(sq_norm.device) ** 2
        nonfinite = ~torch.isfinite(sq_norm.float())
        skip = nonfinite if skip is None else nonfinite | skip.to(nonfinite.device)
        if group["max_grad_norm"] is not None:
            coefficient = rule.clip_coefficient(sq_norm, group["max_grad_norm"])
            factor = coefficient if factor is None else coefficient * factor.to(coefficient.device)
    host_reads = skip is not None and _host_may_read(skip, work, plan, groups)
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


def _host_may_read(skip: Tensor, work: Work, plan: Plan | None, groups: Sequence[dict[str, Any]]) -> bool:
    if groups[0]["differentiable"]:
        return True  # through a step that is selected away, autograd would pass 0 x NaN on
    if plan is not None:
        # Every process must decide alike, whatever gradients it has: one that returns early leaves out a collective.
        return skip.is_cpu and not any(group["capturable"] for group in groups)
    return skip.is_cpu and not torch.compiler.is_compiling() and not any(bucket.on_device for _, bucket in work)


def _over_all_processes(
    work: Work, plan: Plan | None, guarded: bool, found_inf: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the squared norm over all gradients, if `guarded`, and the scaler's flag, both the same on every process."""
    sums: list[tuple[Groups, Tensor]] = []
    for backend, bucket in work if guarded else []:
        rows = torch.zeros(len(bucket), dtype=bucket.dtype, device=bucket.device)
        backend.grad_sq_norms(bucket, rows)
        sums.append((bucket.process_groups, rows.sum()))
    if plan is not None:
        total, flag = plan.added(sums, torch.zeros(()) if found_inf is None else found_inf.reshape(()))
        return total, None if found_inf is None else flag
    total = sums[0][1]
    for _, other in sums[1:]:
        total = total + other.to(total.device)
    return total, found_inf
