"""Stochastic rounding to bfloat16, with random bits that anyone can compute again.

Rounding to nearest loses every change of less than half a unit in the last place; rounding up with the probability of the part
that is cut off is right on average. The bits that decide are a function of three things alone: the parameter's seed, the
element's index in the whole tensor, and the step. So they are the same for every backend, number of threads and way of
sharding, and a resumed run goes on with them. This room must not know of parameters, groups or processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MASK = 2**32 - 1
Number = int | Tensor  # a tensor is int64, and stays on its device
Start = int | Tensor  # where a dim begins in the whole tensor, or (size,) int64: where each of its positions lies


@dataclass(frozen=True)
class Place:
    """Where a tensor's elements lie in the whole tensor of which it is a shard, a block or all."""

    shape: tuple[int, ...]  # of the whole
    starts: tuple[Start, ...]  # of each dim

    @classmethod
    def of_whole(cls, tensor: Tensor) -> Place:
        """Return the place of a tensor that is all there is."""
        return cls(tuple(tensor.shape), (0,) * tensor.dim())

    def narrow(self, start: int, length: int) -> Place:
        """Return the place of a part along dim 0."""
        first = self.starts[0]
        first = first + start if isinstance(first, int) else first[start : start + length]
        return Place(self.shape, (first, *self.starts[1:]))

    def runs(self, tensor: Tensor) -> Runs:
        """Return the indices in the whole tensor of `tensor`'s elements, in the order of its memory."""
        if tensor.shape == self.shape and tensor.is_contiguous():
            return Runs(0, None, tensor.numel(), 1)
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        outer = memory_order(tensor)
        length = stride = 1
        while outer and isinstance(self.starts[outer[-1]], int):
            size, step = tensor.shape[outer[-1]], strides[outer[-1]]
            if length == 1:
                stride = step
            elif size != 1 and step != stride * length:
                break
            length *= size
            outer.pop()
        first = sum(start * strides[dim] for dim, start in enumerate(self.starts) if isinstance(start, int))
        starts = torch.zeros([tensor.shape[dim] for dim in outer], dtype=torch.int64)
        for i, dim in enumerate(outer):
            start = self.starts[dim]
            steps = torch.arange(tensor.shape[dim]) if isinstance(start, int) else start.cpu()
            starts += (steps * strides[dim]).view(-1, *[1] * (len(outer) - 1 - i))
        return Runs(first, starts.flatten() if outer else None, length, stride)


@dataclass(frozen=True)
class Runs:
    """Indices ``first + starts[e // length] + stride * (e % length)`` of the elements e = 0, 1, ..."""

    first: int
    starts: Tensor | None  # (runs,) int64, on the CPU; None where all is one run
    length: int
    stride: int

    def indices(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Return those of the elements from `start` to before `stop`: (elements,) int64."""
        elements = torch.arange(start, stop, device=device)
        if self.starts is None:
            return elements.mul_(self.stride).add_(self.first)
        within = (elements % self.length).mul_(self.stride).add_(self.first)
        return within.add_(self.starts.to(device)[elements // self.length])


def memory_order(tensor: Tensor) -> list[int]:
    """Return the dims of a tensor from the one with the largest stride to the one with the smallest."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


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
