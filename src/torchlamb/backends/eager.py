"""What both backends of torch's operations share: a bucket read as arithmetic takes it, and written as it is stored.

This room knows buckets and how values are stored. It must not know in which order a backend walks them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.bucket import Bucket
from torchlamb.precision import Draw, cast, weight
from torchlamb.precision import pieces as pieces_of
from torchlamb.sharding.layout import is_plain

Piece = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # param, grad, exp_avg, exp_avg_sq, master


def count_step_(bucket: Bucket) -> None:
    """Count this step, unless it is skipped."""
    # The parts of a parameter share its count.
    steps = [step for row, step in enumerate(bucket.steps) if row == 0 or step is not bucket.steps[row - 1]]
    if bucket.skip is not None:
        # As a list: given one tensor to add to all, torch reads it back.
        torch._foreach_add_(steps, [(~bucket.skip).to(steps[0].dtype)] * len(steps))
    elif steps[0].is_cpu and is_plain(steps[0]) and not torch.compiler.is_compiling():
        one = torch.ones((), device="cpu")  # torch would make a tensor of the number once for each step count
        torch._foreach_add_(steps, one)
    else:
        torch._foreach_add_(steps, 1)


def bias_factors(bucket: Bucket) -> list[tuple[float | Tensor, float | Tensor]]:
    """Return the factors of `rule.bias_factors` for each row: numbers where the host may read steps, else 0-dim tensors."""
    s = bucket.scalars
    if not s.bias_correction:
        return [(s.eps, 1.0)] * len(bucket)
    if not bucket.host_may_read:
        eps, k = rule.bias_factors(torch.stack(bucket.steps).to(bucket.device, bucket.dtype), s)
        assert isinstance(eps, Tensor)
        assert isinstance(k, Tensor)
        return list(zip(eps.unbind(), k.unbind(), strict=True))
    by_step: dict[float, tuple[float | Tensor, float | Tensor]] = {}
    steps = [step.item() for step in bucket.steps]
    return [by_step.get(t) or by_step.setdefault(t, rule.bias_factors(t, s)) for t in steps]


def scaled_grad(bucket: Bucket, grad: Tensor) -> Tensor:
    """Return a gradient, or a piece of one, as the rule takes it: in the bucket's dtype, times `grad_factor`."""
    grad, factor = cast(grad, bucket.dtype), bucket.grad_factor
    return grad if isinstance(factor, float) and factor == 1.0 else grad * factor


def pieces(bucket: Bucket, row: int) -> Sequence[Piece]:
    """Cut a row's param, grad, exp_avg, exp_avg_sq and master, if it has one, as `precision.pieces` does."""
    tensors = (bucket.params[row], bucket.grads[row], bucket.exp_avgs[row], bucket.exp_avg_sqs[row])
    if not bucket.masters:
        return [(p, g, m, v, None) for p, g, m, v in pieces_of(*tensors)]
    return [(p, g, m, v, master) for p, g, m, v, master in pieces_of(*tensors, bucket.masters[row])]


def weights(bucket: Bucket) -> list[Tensor]:
    """Return the parameters as arithmetic takes them: see `precision.weight`."""
    if not bucket.masters:
        return [cast(p, bucket.dtype) for p in bucket.params]
    return [weight(p, m, bucket.dtype) for p, m in zip(bucket.params, bucket.masters, strict=True)]


def draw(bucket: Bucket, row: int) -> Draw | None:
    """Return the random bits with which second moments of a row are rounded, if they are."""
    if not bucket.seeds:
        return None
    return Draw(bucket.params[row], bucket.seeds[row], bucket.steps[row], bucket.places[row], bucket.host_may_read)


def param_draw(bucket: Bucket, row: int) -> Draw | None:
    """Return the random bits with which the row's parameter is rounded, if it is."""
    stochastic = bucket.scalars.stochastic_rounding and not bucket.masters
    return draw(bucket, row) if stochastic and bucket.params[row].dtype == torch.bfloat16 else None


def left(bucket: Bucket, sums: Tensor) -> Sequence[bool | Tensor]:
    """Return, for each row, whether its parameter stays as it is: a bool where the host may know, else a 0-dim tensor.

    It stays where the whole step is skipped and, under a guard, where one of its norms is not finite.
    """
    if not bucket.is_guarded:
        return [False if bucket.skip is None else bucket.skip] * len(bucket)
    leaves = rule.leaves(sums)
    return leaves.tolist() if bucket.skip is None else (leaves | bucket.skip).unbind()
