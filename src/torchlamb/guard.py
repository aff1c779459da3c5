"""Whether a step is taken at all, and what its gradients are multiplied by: clipping, non-finite gradients, loss scaling.

Everything is decided from one number, the squared norm over all gradients, and stays on the device unless the host can read it
for free (or has to, for autograd). This room must not know how a backend computes, nor write a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.backends import Work
from torchlamb.bucket import Bucket
from torchlamb.sharding.layout import is_plain
from torchlamb.sharding.norm_group import NormGroup, sum_of
from torchlamb.sharding.sums import Plan, Rows


@dataclass(frozen=True)
class Verdict:
    """What the guard has decided about a step."""

    factor: Tensor | None = None  # 0-dim: what gradients are multiplied by; None for 1
    guarded: bool = False  # parameters whose norms are not finite stay
    skip: Tensor | None = None  # 0-dim bool: whether nothing is stepped; None where the host knows that something is
    skipped: bool = False  # the host knows that nothing is
    grad_sq_norms: Rows = ()  # over all processes; none where they did not matter
    overflows: Tensor | None = None  # 0-dim bool: the total of these is not finite, which it may be though each of them is

    def on(self, bucket: Bucket) -> Bucket:
        """Return a bucket that steps accordingly, with gradients that are centralized, if that is asked for."""
        factor, skip = bucket.grad_factor, self.skip
        if self.factor is not None:
            factor = self.factor.to(bucket.device, bucket.dtype) * factor
        # A skipped first step leaves counts of 0, which only tensors survive.
        host_may_read = bucket.host_may_read and (skip is None or self.skipped)
        skip = None if skip is None else skip.to(bucket.device)
        judged = replace(bucket, grad_factor=factor, skip=skip, is_guarded=self.guarded, host_may_read=host_may_read)
        return judged if self.skipped else judged.centralized()


def is_guarded(group: Mapping[str, Any]) -> bool:
    """Return whether steps of the group's optimizer depend on the norm over all gradients."""
    return group["max_grad_norm"] is not None or group["skip_nonfinite"]


def check_devices(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise if some parameters have values and others, with gradients, only a shape: there is no norm over all of them.

    Raises:
        RuntimeError: a parameter with a gradient is on the meta device, and others are not
    """
    params = [p for group in groups for p in group["params"]]
    if any(p.is_meta and p.grad is not None for p in params) and not all(p.is_meta for p in params):
        raise RuntimeError(
            "max_grad_norm and skip_nonfinite need the norm over all gradients, and some are on the meta device, where they "
            "have no values; move all parameters there, or none"
        )


def guard(
    work: Work,
    plan: Plan,
    groups: Sequence[dict[str, Any]],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm_group: NormGroup | None,
) -> Verdict:
    """Decide what gradients are multiplied by, and whether a step is taken.

    Args:
        work: the buckets of all groups, with their backends
        plan: how parameters are sharded
        groups: the parameter groups; max_grad_norm, skip_nonfinite and differentiable are the same in all of them
        grad_scale: (1,) or 0-dim, what the loss was multiplied by; set by torch.amp.GradScaler around step()
        found_inf: (1,) or 0-dim, not 0 where the scaler found a gradient that is not finite
        norm_group: processes that hold other parameters, whose gradients count, too
    """
    group = groups[0]
    if found_inf is not None and not isinstance(found_inf, Tensor):
        found_inf = torch.tensor(float(found_inf))  # where no parameter has a gradient, scalers leave the number 0
    factor: Tensor | None = None if grad_scale is None else 1.0 / grad_scale.reshape(())
    several = plan.is_sharded or norm_group is not None  # processes, which all take part, whatever gradients they have
    guarded = is_guarded(group) and (bool(work) or several)
    sums: Rows = ()
    if guarded or (several and found_inf is not None):
        sums, found_inf = _over_shards(work, plan, guarded, found_inf)
    if guarded or found_inf is not None:
        here = sum_of(sums, norm_group) if sums else torch.zeros((), device=None if found_inf is None else found_inf.device)
        if guarded and factor is not None:
            here = here * factor.to(here.device) ** 2  # before processes are added, whose scales may differ
        sq_norm, found_inf = (here, found_inf) if norm_group is None else norm_group.add(here, found_inf)
    skip: Tensor | None = None if found_inf is None else found_inf.reshape(()) != 0
    overflows: Tensor | None = None
    if guarded:
        nonfinite = ~torch.isfinite(sq_norm.float())
        overflows = nonfinite if norm_group is None else ~torch.isfinite(here.float())
        skip = nonfinite if skip is None else nonfinite | skip.to(nonfinite.device)
        if group["max_grad_norm"] is not None:
            coefficient = rule.clip_coefficient(sq_norm, group["max_grad_norm"])
            factor = coefficient if factor is None else coefficient * factor.to(coefficient.device)
    host_reads = skip is not None and _host_may_read(skip, work, plan, groups)
    skipped = host_reads and bool(skip)
    return Verdict(factor, guarded, skip if skipped or not host_reads else None, skipped, sums if guarded else (), overflows)


def _host_may_read(skip: Tensor, work: Work, plan: Plan, groups: Sequence[dict[str, Any]]) -> bool:
    if groups[0]["differentiable"]:
        return True  # through a step that is selected away, autograd would pass 0 x NaN on
    if plan.is_sharded:
        # Every process must decide alike, whatever gradients it has: one that returns early leaves out a collective.
        return skip.is_cpu and is_plain(skip) and not any(group["capturable"] for group in groups)
    return (
        skip.is_cpu and is_plain(skip) and not torch.compiler.is_compiling() and all(bucket.host_may_read for _, bucket in work)
    )


def _over_shards(work: Work, plan: Plan, guarded: bool, found_inf: Tensor | None) -> tuple[Rows, Tensor | None]:
    """Return the sums of squares of gradients, if `guarded`, and the scaler's flag, both over all shards."""
    own: list[tuple[Sequence[int], Tensor]] = []
    sharded: list[tuple[Sequence[int], Tensor]] = []
    for backend, bucket in work if guarded else []:
        rows = torch.zeros(len(bucket), dtype=bucket.dtype, device=bucket.device)
        backend.grad_sq_norms(bucket, rows)
        (sharded if bucket.process_groups else own).append((bucket.indices, rows))
    if not plan.is_sharded:
        return own, found_inf
    table, flag = plan.add_grad_sq_norms(sharded, torch.zeros(()) if found_inf is None else found_inf.reshape(()))
    return [*own, (plan.indices, table)], None if found_inf is None else flag
