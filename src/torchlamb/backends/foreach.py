"""Many tensors in one call: torch's multi-tensor operations, for devices where launching a kernel is what costs.

The same arithmetic as `torchlamb.rule`, on lists. Temporaries are as large as what is stepped at once, so a bucket is walked in
batches of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.bucket import Bucket, cast, is_small, piece_size, pieces, select

BATCH = 2**24  # elements stepped at once; two float32 temporaries of it are 128 MiB. On a CPU, what its cache holds.


def grad_sq_norms(bucket: Bucket, out: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    for rows, batch in _batches(bucket):
        out[rows] = _squares(_cast(batch.grads, batch.dtype))


def accumulate(bucket: Bucket, sq_norms: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    for rows, batch in _batches(bucket):
        weights = batch.weights()
        updates = _updates(batch, weights, *_advance_(batch))
        sq_norms[rows] = _sq_norms(weights, updates)
        if bucket.is_small:  # computing them again would cost more calls than memory
            bucket.updates += updates


def apply(bucket: Bucket, sq_norms: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    for rows, batch in _batches(bucket):
        weights = batch.weights()
        updates = bucket.updates[rows] or _updates(batch, weights, batch.exp_avgs, batch.exp_avg_sqs)
        _subtract_(batch, weights, updates, sq_norms[rows])


def step(bucket: Bucket, sq_norms: Tensor) -> None:
    """Do `accumulate` and `apply` batch by batch, keeping the updates instead of computing them twice."""
    for rows, batch in _batches(bucket):
        weights = batch.weights()
        updates = _updates(batch, weights, *_advance_(batch))
        sq_norms[rows] = _sq_norms(weights, updates)
        _subtract_(batch, weights, updates, sq_norms[rows])


def _batches(bucket: Bucket) -> Iterator[tuple[slice, Bucket]]:
    return bucket.batches(min(BATCH, piece_size()) if bucket.device.type == "cpu" else BATCH)


def _advance_(batch: Bucket) -> tuple[list[Tensor], list[Tensor]]:
    """Update the moments, and return them as they would be stored if the step is not skipped."""
    s = batch.scalars
    grads = [batch.scaled_grad(g) for g in batch.grads]
    exp_avgs = _working_copy(batch.exp_avgs, batch)
    if s.grad_averaging:
        torch._foreach_lerp_(exp_avgs, grads, 1 - s.beta1)
    else:
        torch._foreach_mul_(exp_avgs, s.beta1)
        torch._foreach_add_(exp_avgs, grads)
    exp_avg_sqs = _working_copy(batch.exp_avg_sqs, batch)
    torch._foreach_mul_(exp_avg_sqs, s.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - s.beta2)
    rounded = exp_avg_sqs
    if batch.exp_avg_sqs[0].dtype != batch.dtype:
        rounded = [batch.to_exp_avg_sq(v, row) for row, v in enumerate(exp_avg_sqs)]
    left = [False if batch.skip is None else batch.skip] * len(batch)
    return _store_(batch.exp_avgs, exp_avgs, left), _store_(batch.exp_avg_sqs, rounded, left)


def _updates(batch: Bucket, weights: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor]) -> list[Tensor]:
    s, dtype = batch.scalars, batch.dtype
    eps, k = (list(column) for column in zip(*batch.bias_factors(), strict=True))
    denominators = torch._foreach_sqrt(_cast(exp_avg_sqs, dtype))
    torch._foreach_add_(denominators, eps)
    if not batch.on_device and s.weight_decay:  # in fewer passes, but its factors have to be numbers
        updates = torch._foreach_mul(weights, s.weight_decay)
        torch._foreach_addcdiv_(updates, _cast(exp_avgs, dtype), denominators, k)
        return list(updates)
    updates = torch._foreach_div(_cast(exp_avgs, dtype), denominators)
    if s.bias_correction:
        torch._foreach_mul_(updates, k)
    if s.weight_decay:
        torch._foreach_add_(updates, weights, alpha=s.weight_decay)
    return list(updates)


def _sq_norms(weights: list[Tensor], updates: list[Tensor]) -> Tensor:
    return torch.stack([_squares(weights), _squares(updates)], dim=1)


def _squares(tensors: list[Tensor]) -> Tensor:
    if tensors[0].is_cpu and all(map(is_small, tensors)):
        return torch.stack(torch._foreach_norm(tensors, dtype=torch.float64)).square().to(tensors[0].dtype)
    if tensors[0].is_cpu:  # in float32, a CPU's _foreach_norm is off by 1.7e-3 on 31 M elements
        return torch.stack([rule.sum_of_squares([piece for (piece,) in pieces(t)]) for t in tensors])
    return torch.stack(torch._foreach_norm(tensors)).square()


def _subtract_(batch: Bucket, weights: list[Tensor], updates: list[Tensor], sq_norms: Tensor) -> None:
    sizes = list((batch.scalars.lr * rule.trust_ratio(sq_norms, batch.scalars)).unbind())
    left = batch.left(sq_norms)
    torch._foreach_mul_(updates, sizes)
    if batch.params[0].dtype == batch.dtype and not any(x is not False for x in left):
        torch._foreach_sub_(batch.params, updates)
        return
    new = torch._foreach_sub(weights, updates)
    if batch.masters:
        _store_(batch.masters, new, left)
    _store_(batch.params, [batch.to_param(x, row) for row, x in enumerate(new)], left)


def _working_copy(state: list[Tensor], batch: Bucket) -> list[Tensor]:
    """Return the state itself where it can be updated in place, else copies in the dtype of the arithmetic."""
    if batch.skip is None and state[0].dtype == batch.dtype:
        return state
    return [t.to(batch.dtype, copy=True) for t in state]


def _store_(old: list[Tensor], new: list[Tensor] | tuple[Tensor, ...], left: Sequence[bool | Tensor]) -> list[Tensor]:
    """Write `new` to `old` where that is not left as it is; return `new` in the dtype of `old`."""
    if new is old:
        return old
    new = _cast(new, old[0].dtype)
    torch._foreach_copy_(old, list(map(select, left, old, new)))
    return new


def _cast(tensors: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [cast(t, dtype) for t in tensors]
