"""Where the elements of a tensor lie in the whole tensor of which it is a shard, a block or all.

What is rounded stochastically asks for that: its random bits follow from an element's index in the whole tensor, so that they
are the same however it is sharded. This room must not know of parameters, processes or rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
