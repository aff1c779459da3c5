"""One tensor after the other, in pieces that stay in a CPU's cache. The readable backend, and the one autograd can follow.

It must not know of groups or options beyond the bucket's `Scalars`; the arithmetic itself is in `torchlamb.rule`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.bucket import Bucket, cast, piece_size, pieces

Updates = list[tuple[Tensor, Tensor]]  # each piece of a parameter, and its update


def grad_sq_norms(bucket: Bucket, out: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    for row, grad in enumerate(bucket.grads):
        out[row] = rule.sum_of_squares([cast(g, bucket.dtype) for (g,) in pieces(grad)])


def accumulate(bucket: Bucket, sq_norms: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    for row, factors in enumerate(bucket.bias_factors()):
        norms, _ = _accumulate(bucket, row, factors, keep=False)
        sq_norms[row] = torch.stack(norms)


def apply(bucket: Bucket, sq_norms: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    s, dtype = bucket.scalars, bucket.dtype
    sizes = s.lr * rule.trust_ratio(sq_norms, s)
    for row, factors in enumerate(bucket.bias_factors()):
        for p, m, v in pieces(bucket.params[row], bucket.exp_avgs[row], bucket.exp_avg_sqs[row]):
            update = rule.update(cast(p, dtype), cast(m, dtype), cast(v, dtype), factors, s)
            _subtract_(p, update, sizes[row], bucket.skip)


def step(bucket: Bucket, sq_norms: Tensor) -> None:
    """Do `accumulate` and `apply` at once, keeping the updates: of one large tensor, or of small ones that fit in the cache."""
    s = bucket.scalars
    for rows, batch in bucket.batches(piece_size()):
        norms: list[Tensor] = []
        updates: list[Updates] = []
        for row, factors in enumerate(batch.bias_factors()):
            row_norms, row_updates = _accumulate(batch, row, factors, keep=True)
            norms += row_norms
            updates.append(row_updates)
        batch_norms = torch.stack(norms).view(-1, 2)
        sq_norms[rows] = batch_norms.detach()
        sizes = (s.lr * rule.trust_ratio(batch_norms, s)).unbind()
        # Backwards: what was walked last is still in cache.
        for size, row_updates in zip(reversed(sizes), reversed(updates), strict=True):
            for p, update in reversed(row_updates):
                _subtract_(p, update, size, batch.skip)


def _accumulate(bucket: Bucket, row: int, factors: Sequence[float | Tensor], keep: bool) -> tuple[list[Tensor], Updates]:
    """Bring one row's moments to this step. Return its two sums of squares and, if `keep`, its updates."""
    s, dtype, skip = bucket.scalars, bucket.dtype, bucket.skip
    differentiable = torch.is_grad_enabled()
    updates: Updates = []
    param_squares: list[Tensor] = []
    update_squares: list[Tensor] = []
    for p, g, m, v in pieces(bucket.params[row], bucket.grads[row], bucket.exp_avgs[row], bucket.exp_avg_sqs[row]):
        if skip is None and m.dtype == v.dtype == dtype and not differentiable:
            next_m, next_v = m, v
            rule.advance_(bucket.scaled_grad(g), next_m, next_v, s)
        else:
            next_m, next_v = m.to(dtype, copy=True), v.to(dtype, copy=True)
            rule.advance_(bucket.scaled_grad(g), next_m, next_v, s)
            # The update is taken of the moments as they are stored: `apply` finds nothing else.
            next_m, next_v = cast(next_m, m.dtype), cast(next_v, v.dtype)
            _store_(m, next_m, skip)
            _store_(v, next_v, skip)
        # Autograd remembers the parameter's value, which is about to be overwritten.
        param = p.to(dtype, copy=True) if differentiable else cast(p, dtype)
        update = rule.update(param, cast(next_m, dtype), cast(next_v, dtype), factors, s)
        param_squares.append(param.square().sum())
        update_squares.append(update.square().sum())
        if keep:
            updates.append((p, update))
    return [rule.total(param_squares), rule.total(update_squares)], updates


def _subtract_(param: Tensor, update: Tensor, size: Tensor, skip: Tensor | None) -> None:
    if skip is None:
        param.addcmul_(update, size, value=-1)
    else:
        _store_(param, torch.addcmul(param, update, size, value=-1), skip)


def _store_(old: Tensor, new: Tensor, skip: Tensor | None) -> None:
    # Selected, never multiplied by 0: 0 x NaN is NaN.
    old.copy_(new if skip is None else torch.where(skip, old, new))
