"""Whether a step is taken at all, and what its gradients are multiplied by: clipping, non-finite gradients, loss scaling.

Everything is decided from one number, the squared norm over all gradients, and stays on the device unless the host can read it
for free (or has to, for autograd); so does what is remembered of steps that were not taken. This room must not know how a
backend computes, nor write a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.backends import Work
from torchlamb.sharding import Plan, Rows


@dataclass
class Record:
    """What is remembered of the steps that left parameters as they were, on the device."""

    skipped: Tensor  # 0-dim int64: how many they are. The state of each parameter has it.
    nonfinite: Tensor  # (params,) bool: because of which parameters the last of them did
    places: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # positions of parameters, as tensors

    def place(self, indices: Sequence[int]) -> Tensor:
        """Return positions as a tensor, made once: a graph must not copy them from the host while it is captured."""
        if torch.compiler.is_compiling():
            return torch.tensor(indices, dtype=torch.int64, device=self.skipped.device)
        key = tuple(indices)
        if key not in self.places:
            place = torch.tensor(indices, dtype=torch.int64, device=self.skipped.device)
            if len(self.places) == 64:  # none is let go: graphs may read it
                return place
            self.places[key] = place
        return self.places[key]


@dataclass
class Verdict:
    """What the guard has decided about a step."""

    skipped: bool = False  # the host knows that nothing is to be stepped
    skip: Tensor | None = None  # 0-dim bool: whether nothing is; None where the host knows that something is
    grad_sq_norms: Rows = ()  # over all processes; none where they did not matter


def is_guarded(group: Mapping[str, Any]) -> bool:
    """Return whether steps of the group's optimizer depend on the norm over all gradients."""
    return group["max_grad_norm"] is not None or group["skip_nonfinite"]


def guard(
    work: Work,
    plan: Plan | None,
    groups: Sequence[dict[str, Any]],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Verdict:
    """Set each bucket's gradient factor and skip flag.

    Args:
        work: the buckets of all groups, with their backends
        plan: how parameters are sharded; None where nothing is
        groups: the parameter groups; max_grad_norm, skip_nonfinite and differentiable are the same in all of them
        grad_scale: (1,) or 0-dim, what the loss was multiplied by; set by torch.amp.GradScaler around step()
        found_inf: (1,) or 0-dim, not 0 where the scaler found a gradient that is not finite
    """
    group = groups[0]
    factor: Tensor | None = None if grad_scale is None else 1.0 / grad_scale.reshape(())
    guarded = is_guarded(group) and (bool(work) or plan is not None)
    sums: Rows = ()
    if guarded or (plan is not None and found_inf is not None):
        sums, found_inf = _over_all_processes(work, plan, guarded, found_inf)
    skip: Tensor | None = None if found_inf is None else found_inf.reshape(()) != 0
    if guarded:
        sq_norm = _total([rows for _, rows in sums])
        if factor is not None:
            sq_norm = sq_norm * factor.to(sq_norm.device) ** 2
        nonfinite = ~torch.isfinite(sq_norm.float())
        skip = nonfinite if skip is None else nonfinite | skip.to(nonfinite.device)
        if group["max_grad_norm"] is not None:
            coefficient = rule.clip_coefficient(sq_norm, group["max_grad_norm"])
            factor = coefficient if factor is None else coefficient * factor.to(coefficient.device)
    host_reads = skip is not None and _host_may_read(skip, work, plan, groups)
    skipped = host_reads and bool(skip)
    for _, bucket in work:
        bucket.is_guarded = guarded
        if factor is not None:
            bucket.grad_factor = factor.to(bucket.device, bucket.dtype) * bucket.grad_factor
        if skip is not None and (skipped or not host_reads):
            bucket.skip = skip.to(bucket.device)
            bucket.on_device |= not host_reads  # a skipped first step leaves counts of 0, which only tensors survive
    return Verdict(skipped, skip if skipped or not host_reads else None, sums if guarded else ())


def note_(record: Record, verdict: Verdict, updates: Rows) -> None:
    """Count a step that left parameters as they were, and remember because of which.

    Args:
        record: changed in place
        verdict: on the step
        updates: the sums of squares (rows, 2) of parameters and updates, in the order of `verdict.grad_sq_norms`; none where
            those do not matter
    """
    device, skip = record.skipped.device, verdict.skip
    by_update = torch.cat([rule.leaves(sq_norms).to(device) for _, sq_norms in updates]) if updates else None
    if skip is None:
        if by_update is None or not bool(by_update.any()):
            return
        left, because = by_update.any(), by_update
    else:
        left = skip.to(device)
        because = _of_gradients(verdict.grad_sq_norms, device)
        if by_update is not None:
            because = torch.where(left, because, by_update)
            left = left | by_update.any()
    indices = [index for rows, _ in verdict.grad_sq_norms for index in rows]
    counts = torch.zeros(record.nonfinite.shape, dtype=torch.int32, device=device)
    counts.index_add_(0, record.place(indices), because.to(torch.int32))
    record.nonfinite.copy_(torch.where(left, counts > 0, record.nonfinite))
    record.skipped.add_(left)


def _of_gradients(sums: Rows, device: torch.device) -> Tensor:
    """Return of which rows the gradient is to blame where their total is not finite: it is not itself, or it is the largest."""
    rows = torch.cat([rows.to(device).float() for _, rows in sums]) if sums else torch.zeros(0, device=device)
    if len(rows) == 0:
        return torch.zeros(0, dtype=torch.bool, device=device)
    nonfinite = ~torch.isfinite(rows)
    large = rows.max().clamp(max=torch.finfo(torch.float32).max / len(rows))
    return torch.where(nonfinite.any(), nonfinite, rows >= large)


def _host_may_read(skip: Tensor, work: Work, plan: Plan | None, groups: Sequence[dict[str, Any]]) -> bool:
    if groups[0]["differentiable"]:
        return True  # through a step that is selected away, autograd would pass 0 x NaN on
    if plan is not None:
        # Every process must decide alike, whatever gradients it has: one that returns early leaves out a collective.
        return skip.is_cpu and not any(group["capturable"] for group in groups)
    return skip.is_cpu and not torch.compiler.is_compiling() and not any(bucket.on_device for _, bucket in work)


def _over_all_processes(work: Work, plan: Plan | None, guarded: bool, found_inf: Tensor | None) -> tuple[Rows, Tensor | None]:
    """Return the sums of squares of gradients, if `guarded`, and the scaler's flag, both the same on every process."""
    own: list[tuple[Sequence[int], Tensor]] = []
    sharded: list[tuple[Sequence[int], Tensor]] = []
    for backend, bucket in work if guarded else []:
        rows = torch.zeros(len(bucket), dtype=bucket.dtype, device=bucket.device)
        backend.grad_sq_norms(bucket, rows)
        (sharded if bucket.process_groups else own).append((bucket.indices, rows))
    if plan is None:
        return own, found_inf
    table, flag = plan.add_grad_sq_norms(sharded, torch.zeros(()) if found_inf is None else found_inf.reshape(()))
    return [*own, (plan.indices, table)], None if found_inf is None else flag


def _total(sums: Sequence[Tensor]) -> Tensor:
    total = sums[0].sum()
    for rows in sums[1:]:
        total = total + rows.sum().to(total.device)
    return total
