"""One tensor after the other, in pieces that stay in a CPU's cache. The readable backend, and the one autograd can follow.

It must not know of groups or options beyond the bucket's `Scalars`; the arithmetic itself is in `torchlamb.rule`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.backends.eager import bias_factors, count_step_, draw, left, param_draw, pieces, scaled_grad
from torchlamb.bucket import Bucket
from torchlamb.precision import cast, piece_size, select, to_exp_avg_sq, to_param, weight
from torchlamb.precision import pieces as pieces_of

Updates = list[tuple[int, Tensor, Tensor | None, Tensor]]  # of each piece: number, param, master, update


def grad_sq_norms(bucket: Bucket, out: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    for row, grad in enumerate(bucket.grads):
        out[row] = rule.sum_of_squares([cast(g, bucket.dtype) for (g,) in pieces_of(grad)])


def accumulate(bucket: Bucket, sums: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    count_step_(bucket)
    for row, factors in enumerate(bias_factors(bucket)):
        row_sums, _ = _accumulate(bucket, row, factors, keep=False)
        sums[row] = torch.stack(row_sums)


def apply(bucket: Bucket, sums: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    s, dtype = bucket.scalars, bucket.dtype
    sizes, stays = s.lr * rule.trust_ratio(sums, s), left(bucket, sums)
    for row, factors in enumerate(bias_factors(bucket)):
        for number, (p, _, m, v, master) in enumerate(pieces(bucket, row)):
            update = rule.update(weight(p, master, dtype), cast(m, dtype), cast(v, dtype), factors, s)
            _subtract_(bucket, row, number, p, master, update, sizes[row], stays[row])


def step(bucket: Bucket, sums: Tensor) -> None:
    """Do `accumulate` and `apply` at once, keeping the updates: of one large tensor, or of small ones that fit in the cache."""
    s = bucket.scalars
    count_step_(bucket)
    for rows, batch in bucket.batches(piece_size()):
        found: list[Tensor] = []
        updates: list[Updates] = []
        for row, factors in enumerate(bias_factors(batch)):
            row_sums, row_updates = _accumulate(batch, row, factors, keep=True)
            found += row_sums
            updates.append(row_updates)
        batch_sums = torch.stack(found).view(-1, len(rule.SUMS))
        sums[rows] = batch_sums.detach()
        sizes, stays = (s.lr * rule.trust_ratio(batch_sums, s)).unbind(), left(batch, sums[rows])
        # Backwards: what was walked last is still in cache.
        for row in reversed(range(len(batch))):
            for number, p, master, update in reversed(updates[row]):
                _subtract_(batch, row, number, p, master, update, sizes[row], stays[row])


def _accumulate(bucket: Bucket, row: int, factors: Sequence[float | Tensor], keep: bool) -> tuple[list[Tensor], Updates]:
    """Bring one row's moments to this step. Return its sums, in the order of `rule.SUMS`, and, if `keep`, its updates."""
    s, dtype, skip = bucket.scalars, bucket.dtype, bucket.skip
    differentiable = torch.is_grad_enabled()
    updates: Updates = []
    param_sq: list[Tensor] = []
    update_sq: list[Tensor] = []
    for number, (p, g, m, v, master) in enumerate(pieces(bucket, row)):
        if skip is None and m.dtype == v.dtype == dtype and not differentiable:
            next_m, next_v = m, v
            rule.advance_(scaled_grad(bucket, g), next_m, next_v, s)
        else:
            next_m, next_v = m.to(dtype, copy=True), v.to(dtype, copy=True)
            rule.advance_(scaled_grad(bucket, g), next_m, next_v, s)
            # The update is taken of the moments as they are stored: `apply` finds nothing else.
            next_m, next_v = cast(next_m, m.dtype), to_exp_avg_sq(next_v, v.dtype, draw(bucket, row), number)
            stays = False if skip is None else skip
            m.copy_(select(stays, m, next_m))
            v.copy_(select(stays, v, next_v))
        # Autograd remembers the parameter's value, which is about to be overwritten.
        param = p.to(dtype, copy=True) if differentiable else weight(p, master, dtype)
        update = rule.update(param, cast(next_m, dtype), cast(next_v, dtype), factors, s)
        param_sq.append(param.square().sum())
        update_sq.append(update.square().sum())
        if keep:
            updates.append((number, p, master, update))
    return [rule.total(param_sq), rule.total(update_sq)], updates


def _subtract_(
    bucket: Bucket,
    row: int,
    number: int,
    param: Tensor,
    master: Tensor | None,
    update: Tensor,
    size: Tensor,
    stays: bool | Tensor,
) -> None:
    """Take ``size * update`` from the row's piece of that number, unless it stays as it is."""
    if stays is True:
        return
    if stays is False and param.dtype == bucket.dtype:
        param.addcmul_(update, size, value=-1)
        return
    new = torch.addcmul(weight(param, master, bucket.dtype), update, size, value=-1)
    if master is not None:
        master.copy_(select(stays, master, new))
    param.copy_(select(stays, param, to_param(new, param.dtype, param_draw(bucket, row), number)))
