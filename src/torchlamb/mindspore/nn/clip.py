"""Clipping of one tensor by its own norm."""

from __future__ import annotations

from typing import Any

import torch

from torchlamb.mindspore.common.tensor import plain, wrap
from torchlamb.mindspore.nn.cell import Cell
from torchlamb.options import fail


class ClipByNorm(Cell):
    r"""Scales a tensor so that its norm is `clip_norm` at most.

    .. math::
        x \frac{clip\_norm}{\max(\|x\|, clip\_norm)}

    Args:
        axis: the dim or dims over which the norm is taken, an int or a tuple of ints; None for all (default: None)

    Raises:
        TypeError: `axis` of another type

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> nn.ClipByNorm()(torch.tensor([3.0, 4.0]), 1.0).asnumpy()
        array([0.6, 0.8], dtype=float32)

    Source: `mindspore.nn.ClipByNorm`.
    """

    def __init__(self, axis: int | tuple[int, ...] | None = None) -> None:
        super().__init__()
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, (int, tuple))):
            raise fail(TypeError, "axis", "None, an int or a tuple of ints", axis)
        self.axis = axis

    def construct(self, x: Any, clip_norm: Any) -> Any:
        """Return the clipped tensor, in float32 at least."""
        values = plain(x)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        limit = torch.as_tensor(plain(clip_norm), device=values.device).to(values.dtype)
        dims = tuple(range(values.dim())) if self.axis is None else self.axis
        squares = values.square()
        norm = (squares.sum(dim=dims, keepdim=True) if dims != () else squares).sqrt()
        return wrap(values * limit / torch.maximum(norm, limit))


class Identity(Cell):
    """Returns its argument."""

    def construct(self, x: Any) -> Any:
        """Return the argument."""
        return x
