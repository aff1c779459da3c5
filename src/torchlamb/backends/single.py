"""One tensor after the other, in pieces that stay in a CPU's cache. The readable backend, and the one autograd can follow.

It must not know of groups or options beyond the bucket's `Scalars`; the arithmetic itself is in `torchlamb.rule`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.bucket import Bucket, pieces


def grad_sq_norms(bucket: Bucket, out: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    for row, grad in enumerate(bucket.grads):
        out[row] = rule.sum_of_squares([g.to(bucket.dtype) for (g,) in pieces(grad)])


def accumulate(bucket: Bucket, sq_norms: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    for row, factors in enumerate(bucket.bias_factors()):
        sq_norms[row], _ = _accumulate(bucket, row, factors, keep=False)


def apply(bucket: Bucket, sq_norms: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    s = bucket.scalars
    sizes = s.lr * rule.trust_ratio(sq_norms, s)
    for row, factors in enumerate(bucket.bias_factors()):
        for p, m, v in pieces(bucket.params[row], bucket.exp_avgs[row], bucket.exp_avg_sqs[row]):
            update = rule.update(p.to(bucket.dtype), m.to(bucket.dtype), v.to(bucket.dtype), factors, s)
            _subtract_(p, update, sizes[row], bucket.skip)


def step(bucket: Bucket, sq_norms: Tensor) -> None:
    """Do `accumulate` and `apply` tensor by tensor, keeping the update instead of computing it twice."""
    s = bucket.scalars
    for row, factors in enumerate(bucket.bias_factors()):
        norms, updates = _accumulate(bucket, row, factors, keep=True)
        size = s.lr * rule.trust_ratio(norms, s)
        sq_norms[row] = norms.detach()
        for p, update in reversed(updates):  # backwards: the pieces that were walked last are still in cache
            _subtract_(p, update, size, bucket.skip)


def _accumulate(
    bucket: Bucket, row: int, factors: Sequence[float | Tensor], keep: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Update one row's moments. Return its (2,) sums of squares and, if `keep`, each piece with its update."""
    s, dtype = bucket.scalars, bucket.dtype
    updates: list[tuple[Tensor, Tensor]] = []
    param_squares: list[Tensor] = []
    update_squares: list[Tensor] = []
    for p, g, m, v in pieces(bucket.params[row], bucket.grads[row], bucket.exp_avgs[row], bucket.exp_avg_sqs[row]):
        next_m, next_v = rule.moments(bucket.scaled_grad(g), m.to(dtype), v.to(dtype), s)
        # The update is taken of the moments as they are stored: `apply` finds nothing else.
        next_m, next_v = next_m.to(m.dtype), next_v.to(v.dtype)
        _store_(m, next_m, bucket.skip)
        _store_(v, next_v, bucket.skip)
        # Autograd remembers the parameter's value, which is about to be overwritten.
        param = p.to(dtype, copy=torch.is_grad_enabled())
        update = rule.update(param, next_m.to(dtype), next_v.to(dtype), factors, s)
        param_squares.append(param.square().sum())
        update_squares.append(update.square().sum())
        if keep:
            updates.append((p, update))
    return torch.stack([rule.total(param_squares), rule.total(update_squares)]), updates


def _subtract_(param: Tensor, update: Tensor, size: Tensor, skip: Tensor | None) -> None:
    if skip is None:
        param.addcmul_(update, size, value=-1)
    else:
        param.copy_(torch.where(skip, param, torch.addcmul(param, update, size, value=-1)))


def _store_(old: Tensor, new: Tensor, skip: Tensor | None) -> None:
    # Selected, never multiplied by 0: 0 x NaN is NaN.
    old.copy_(new if skip is None else torch.where(skip, old, new))
