"""Many tensors in one call: torch's multi-tensor operations, for devices where launching a kernel is what costs.

The same arithmetic as `torchlamb.rule`, on lists. Temporaries are as large as what is stepped at once, so a bucket is walked in
batches of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.backends.eager import bias_factors, count_step_, draw, left, param_draw, scaled_grad, weights
from torchlamb.bucket import Bucket, is_small
from torchlamb.precision import cast, piece_size, pieces, select, to_exp_avg_sq, to_param

BATCH = 2**24  # elements stepped at once; two float32 temporaries of it are 128 MiB. On a CPU, what its cache holds.


def grad_sq_norms(bucket: Bucket, out: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    for rows, batch in _batches(bucket):
        out[rows] = _squares(_cast(batch.grads, batch.dtype))


def accumulate(bucket: Bucket, sums: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    count_step_(bucket)
    for rows, batch in _batches(bucket):
        params = weights(batch)
        updates = _updates(batch, params, *_advance_(batch))
        sums[rows] = _sums(params, updates)
        if bucket.is_small:  # computing them again would cost more calls than memory
            bucket.kept_updates.extend(updates)


def apply(bucket: Bucket, sums: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    for rows, batch in _batches(bucket):
        params = weights(batch)
        updates = bucket.kept_updates[rows] or _updates(batch, params, batch.exp_avgs, batch.exp_avg_sqs)
        _subtract_(batch, params, updates, sums[rows])


def step(bucket: Bucket, sums: Tensor) -> None:
    """Do `accumulate` and `apply` batch by batch, keeping the updates instead of computing them twice."""
    count_step_(bucket)
    for rows, batch in _batches(bucket):
        params = weights(batch)
        updates = _updates(batch, params, *_advance_(batch))
        found = _sums(params, updates)  # of a subclass, maybe: the ratio follows from these
        sums[rows] = found
        _subtract_(batch, params, updates, found)


def _batches(bucket: Bucket) -> Iterator[tuple[slice, Bucket]]:
    return bucket.batches(min(BATCH, piece_size()) if bucket.device.type == "cpu" else BATCH)


def _advance_(batch: Bucket) -> tuple[list[Tensor], list[Tensor]]:
    """Update the moments, and return them as they would be stored if the step is not skipped."""
    s = batch.scalars
    grads = [scaled_grad(batch, g) for g in batch.grads]
    exp_avgs = _working_copy(batch.exp_avgs, batch)
    if s.grad_averaging:
        torch._foreach_lerp_(exp_avgs, grads, 1 - s.beta1)
    else:
        torch._foreach_mul_(exp_avgs, s.beta1)
        torch._foreach_add_(exp_avgs, grads)
    exp_avg_sqs = _working_copy(batch.exp_avg_sqs, batch)
    torch._foreach_mul_(exp_avg_sqs, s.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - s.beta2)
    rounded, dtype = exp_avg_sqs, batch.exp_avg_sqs[0].dtype
    if dtype != batch.dtype:
        rounded = [to_exp_avg_sq(v, dtype, draw(batch, row)) for row, v in enumerate(exp_avg_sqs)]
    stays = [False if batch.skip is None else batch.skip] * len(batch)
    return _store_(batch.exp_avgs, exp_avgs, stays), _store_(batch.exp_avg_sqs, rounded, stays)


def _updates(batch: Bucket, params: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor]) -> list[Tensor]:
    s, dtype = batch.scalars, batch.dtype
    eps, k = (list(column) for column in zip(*bias_factors(batch), strict=True))
    denominators = torch._foreach_sqrt(_cast(exp_avg_sqs, dtype))
    torch._foreach_add_(denominators, eps)
    if batch.host_may_read and s.weight_decay:  # in fewer passes, but its factors have to be numbers
        updates = torch._foreach_mul(params, s.weight_decay)
        torch._foreach_addcdiv_(updates, _cast(exp_avgs, dtype), denominators, k)
        return list(updates)
    updates = torch._foreach_div(_cast(exp_avgs, dtype), denominators)
    if s.bias_correction:
        torch._foreach_mul_(updates, k)
    if s.weight_decay:
        torch._foreach_add_(updates, params, alpha=s.weight_decay)
    return list(updates)


def _sums(params: list[Tensor], updates: list[Tensor]) -> Tensor:
    return torch.stack([_squares(params), _squares(updates)], dim=1)  # in the order of `rule.SUMS`


def _squares(tensors: list[Tensor]) -> Tensor:
    if tensors[0].is_cpu and all(map(is_small, tensors)):
        return torch.stack(torch._foreach_norm(tensors, dtype=torch.float64)).square().to(tensors[0].dtype)
    if tensors[0].is_cpu:  # in float32, a CPU's _foreach_norm is off by 1.7e-3 on 31 M elements
        return torch.stack([rule.sum_of_squares([piece for (piece,) in pieces(t)]) for t in tensors])
    return torch.stack(torch._foreach_norm(tensors)).square()


def _subtract_(batch: Bucket, params: list[Tensor], updates: list[Tensor], sums: Tensor) -> None:
    sizes = list((batch.scalars.lr * rule.trust_ratio(sums, batch.scalars)).unbind())
    stays = left(batch, sums)
    torch._foreach_mul_(updates, sizes)
    if batch.params[0].dtype == batch.dtype and not any(x is not False for x in stays):
        torch._foreach_sub_(batch.params, updates)
        return
    new = torch._foreach_sub(params, updates)
    if batch.masters:
        _store_(batch.masters, new, stays)
    dtype = batch.params[0].dtype
    _store_(batch.params, [to_param(x, dtype, param_draw(batch, row)) for row, x in enumerate(new)], stays)


def _working_copy(state: list[Tensor], batch: Bucket) -> list[Tensor]:
    """Return the state itself where it can be updated in place, else copies in the dtype of the arithmetic."""
    if batch.skip is None and state[0].dtype == batch.dtype:
        return state
    return [t.to(batch.dtype, copy=True) for t in state]


def _store_(old: list[Tensor], new: list[Tensor] | tuple[Tensor, ...], stays: Sequence[bool | Tensor]) -> list[Tensor]:
    """Write `new` to `old` where that does not stay as it is; return `new` in the dtype of `old`."""
    if new is old:
        return old
    new = _cast(new, old[0].dtype)
    torch._foreach_copy_(old, list(map(select, stays, old, new)))
    return new


def _cast(tensors: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [cast(t, dtype) for t in tensors]
