"""In which precision values are stored: how they are read and written, rounded, and walked in pieces.

Rounding to nearest loses every change of less than half a unit in the last place; rounding up with the probability of the part
that is cut off is right on average. The bits that decide are a function of three things alone: the parameter's seed, the
element's index in the whole tensor, and the step. So they are the same for every backend, number of threads and way of
sharding, and a resumed run goes on with them. This room must not know of buckets, groups or processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlamb.sharding.layout import is_plain
from torchlamb.sharding.place import Place, memory_order

# Elements in a piece, for each thread that shares it: half a MiB of float32. Measured: docs/log.md.
PIECE_PER_THREAD = 2**17

_MASK = 2**32 - 1
Number = int | Tensor  # a tensor is int64, and stays on its device


def weight(param: Tensor, master: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a parameter as arithmetic takes it: its master in float32, if it has one, else itself in that dtype.

    Elements that are no longer what their master was rounded to have been changed from outside, and count themselves.
    """
    if master is None:
        return cast(param, dtype)
    return torch.where(param == master.to(param.dtype), master, param.to(master.dtype))


def to_param(new: Tensor, dtype: torch.dtype, draw: Draw | None, number: int = 0) -> Tensor:
    """Return new values of a parameter as they are stored.

    Args:
        new: of all of a tensor, or of its piece of that number
        dtype: of the parameter
        draw: the random bits of bfloat16 that is rounded stochastically; None rounds to nearest
        number: see `new`
    """
    return cast(new, dtype) if draw is None else to_bfloat16(new, param_bits(draw.bits(new, number)))


def to_exp_avg_sq(new: Tensor, dtype: torch.dtype, draw: Draw | None, number: int = 0) -> Tensor:
    """Return new second moments as they are stored: see `to_param`, whose arguments it has."""
    if dtype != torch.bfloat16:
        return cast(new, dtype)
    # To nearest, a moment that changes by a thousandth of itself would never change: half a unit of bfloat16 is more.
    assert draw is not None
    return to_bfloat16(new, exp_avg_sq_bits(draw.bits(new, number)))


def select(left: bool | Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Return the old value where it is left, else the new one. Never multiplied by 0: 0 x NaN is NaN."""
    if isinstance(left, Tensor):
        return torch.where(left, old, new)
    return old if left else new


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, ten times cheaper where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def pieces(*tensors: Tensor) -> Sequence[tuple[Tensor, ...]]:
    """Cut tensors of one shape into matching pieces that fit in a CPU's cache; each piece views its tensor's memory.

    What makes eager arithmetic slow on a CPU is temporaries as large as the tensors, which fall out of the cache and fault in
    fresh pages. Elsewhere, in small tensors, in subclasses and in layouts that do not match, the one piece is the whole tensor.
    """
    first = tensors[0]
    if not first.is_cpu or first.numel() <= piece_size() or not all(map(is_plain, tensors)):
        return [tensors]
    order = memory_order(first)
    in_order = [t.permute(order) for t in tensors]
    if not all(t.is_contiguous() for t in in_order):
        return [tensors]
    return list(zip(*(torch.split(t.view(-1), piece_size()) for t in in_order), strict=True))


def piece_size() -> int:
    """Return how many elements a CPU's threads work through at a time: all where autograd or a compiler watches."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return sys.maxsize
    return PIECE_PER_THREAD * torch.get_num_threads()


# Stochastic rounding.


@dataclass(frozen=True)
class Draw:
    """What the random bits of one tensor's step follow from."""

    tensor: Tensor  # which lies in memory as what is rounded
    seed: Tensor  # 0-dim int64
    step: Tensor  # 0-dim float32
    place: Place
    host_may_read: bool  # seed and step; else they stay tensors

    def bits(self, piece: Tensor, number: int) -> Tensor:
        """Return 32 random bits for each element of all of the tensor, or of its piece of that number, in its shape."""
        on_host = self.host_may_read and self.seed.is_cpu
        drawn = keys(int(self.seed), int(self.step)) if on_host else keys(self.seed, self.step.to(torch.int64))
        runs = self.place.runs(self.tensor)
        if piece.shape != self.tensor.shape:
            first = number * piece_size()
            return random_bits(runs.indices(first, first + piece.numel(), piece.device), drawn)
        order, shape = memory_order(self.tensor), self.tensor.shape
        indices = runs.indices(0, piece.numel(), piece.device).view([shape[dim] for dim in order])
        return random_bits(indices.permute([order.index(dim) for dim in range(len(order))]), drawn)


def keys(seed: Number, step: Number) -> tuple[Number, Number]:
    """Return the two numbers of 32 bits that a parameter's random bits of one step depend on."""
    first = _mix((seed & _MASK) ^ step)
    return first, _mix(((seed >> 32) & _MASK) ^ first)


def random_bits(indices: Tensor, keys: Sequence[Number]) -> Tensor:
    """Return 32 random bits for each index, in its shape: int64, from 0 to 2^32 - 1."""
    first, second = keys
    return _mix(_mix((indices & _MASK) ^ first) ^ (indices >> 32) ^ second)  # type: ignore[no-any-return]


def seed_of(position: int) -> int:
    """Return the seed of the parameter at that position in its optimizer: 63 bits, the same on every process."""
    low = _mix(position ^ 0x6C616D62)
    return (_mix(low ^ position) >> 1) << 32 | low  # type: ignore[no-any-return]


def to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Round numbers to one of their two neighbours in bfloat16, on average to themselves.

    Args:
        x: any shape; what is not finite stays as it is
        bits: the same shape, int64: 16 random bits, from 0 to 2^16 - 1
    """
    x = x.float()
    # A bfloat16 is the upper half of a float32: adding to the lower half carries over as often as it is large.
    rounded = ((x.view(torch.int32) + bits.to(torch.int32)) & -(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def param_bits(bits: Tensor) -> Tensor:
    """Return those of the random bits that round a parameter."""
    return bits >> 16


def exp_avg_sq_bits(bits: Tensor) -> Tensor:
    """Return those of the random bits that round a second moment."""
    return bits & 0xFFFF


def _mix(x: Any) -> Any:
    """Map 32 bits to 32 bits, one to one, so that every bit depends on every other.

    Shifts and factors are those of github.com/skeeto/hash-prospector, found there by search for the least bias. The second
    factor, 0xd35a2d97, is written less 2^32, which changes no bit that is kept and stays within int64.
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * -0x2CA5D269) & _MASK
    return x ^ (x >> 15)
