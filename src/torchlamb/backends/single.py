"""One tensor after the other, in pieces that stay in a CPU's cache. The readable backend, and the one autograd can follow.

It must not know of groups or options beyond the bucket's `Scalars`; the arithmetic itself is in `torchlamb.rule`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.bucket import Bucket, cast, piece_size, pieces, select, weight

Updates = list[tuple[int, Tensor, Tensor | None, Tensor]]  # of each piece: number, param, master, update


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
    sizes, left = s.lr * rule.trust_ratio(sq_norms, s), bucket.left(sq_norms)
    for row, factors in enumerate(bucket.bias_factors()):
        for number, (p, _, m, v, master) in enumerate(bucket.pieces(row)):
            update = rule.update(weight(p, master, dtype), cast(m, dtype), cast(v, dtype), factors, s)
            _subtract_(bucket, row, number, p, master, update, sizes[row], left[row])


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
        sizes, left = (s.lr * rule.trust_ratio(batch_norms, s)).unbind(), batch.left(batch_norms)
        # Backwards: what was walked last is still in cache.
        for row in reversed(range(len(batch))):
            for number, p, master, update in reversed(updates[row]):
                _subtract_(batch, row, number, p, master, update, sizes[row], left[row])


def _accumulate(bucket: Bucket, row: int, factors: Sequence[float | Tensor], keep: bool) -> tuple[list[Tensor], Updates]:
    """Bring one row's moments to this step. Return its two sums of squares and, if `keep`, its updates."""
    s, dtype, skip = bucket.scalars, bucket.dtype, bucket.skip
    differentiable = torch.is_grad_enabled()
    updates: Updates = []
    param_squares: list[Tensor] = []
    update_squares: list[Tensor] = []
    for number, (p, g, m, v, master) in enumerate(bucket.pieces(row)):
        if skip is None and m.dtype == v.dtype == dtype and not differentiable:
            next_m, next_v = m, v
            rule.advance_(bucket.scaled_grad(g), next_m, next_v, s)
        else:
            next_m, next_v = m.to(dtype, copy=True), v.to(dtype, copy=True)
            rule.advance_(bucket.scaled_grad(g), next_m, next_v, s)
            # The update is taken of the moments as they are stored: `apply` finds nothing else.
            next_m, next_v = cast(next_m, m.dtype), bucket.to_exp_avg_sq(next_v, row, number)
            left = False if skip is None else skip
            m.copy_(select(left, m, next_m))
            v.copy_(select(left, v, next_v))
        # Autograd remembers the parameter's value, which is about to be overwritten.
        param = p.to(dtype, copy=True) if differentiable else weight(p, master, dtype)
        update = rule.update(param, cast(next_m, dtype), cast(next_v, dtype), factors, s)
        param_squares.append(param.square().sum())
        update_squares.append(update.square().sum())
        if keep:
            updates.append((number, p, master, update))
    return [rule.total(param_squares), rule.total(update_squares)], updates


def _subtract_(
    bucket: Bucket,
    row: int,
    number: int,
    param: Tensor,
    master: Tensor | None,
    update: Tensor,
    size: Tensor,
    left: bool | Tensor,
) -> None:
    """Take ``size * update`` from the row's piece of that number, unless it is left as it is."""
    if left is True:
        return
    if left is False and param.dtype == bucket.dtype:
        param.addcmul_(update, size, value=-1)
        return
    new = torch.addcmul(weight(param, master, bucket.dtype), update, size, value=-1)
    if master is not None:
        master.copy_(select(left, master, new))
    param.copy_(select(left, param, bucket.to_param(new, row, number)))
