"""Functions of tensors with MindSpore's names and meanings, on torch's. They take numbers, tensors and named parameters.

They are what training cells, losses and schedules use around an optimizer; layers are torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from torchlamb.mindspore.common.dtype import pytype_to_dtype
from torchlamb.mindspore.common.tensor import plain, set_data, wrap
from torchlamb.options import fail

partial = functools.partial


def of_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a torch function take numbers, front tensors and named parameters, and return front tensors."""

    def call(*inputs: Any, **keywords: Any) -> Any:
        given = plain(inputs)
        device = next((x.device for x in given if isinstance(x, torch.Tensor)), None)
        tensors = (torch.as_tensor(x, device=device) if isinstance(x, (bool, int, float)) else x for x in given)
        return wrap(function(*tensors, **plain(keywords)))

    return call


_SAME = """abs add ceil cos erf exp floor isfinite isinf isnan log logical_and logical_not logical_or matmul maximum minimum mul
neg pow reciprocal round rsqrt sigmoid sign sin sqrt square sub tan tanh"""
# By their names here; in capitals they are primitives of `ops.operations`.
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    **{name: of_tensors(getattr(torch, name)) for name in _SAME.split()},
    "div": of_tensors(torch.true_divide),
    "equal": of_tensors(torch.eq),
    "floor_div": of_tensors(torch.floor_divide),
    "gelu": of_tensors(functional.gelu),
    "greater": of_tensors(torch.gt),
    "greater_equal": of_tensors(torch.ge),
    "less": of_tensors(torch.lt),
    "less_equal": of_tensors(torch.le),
    "not_equal": of_tensors(torch.ne),
    "relu": of_tensors(torch.relu),
    "select": of_tensors(torch.where),
}
globals().update(ELEMENTWISE)
tensor_add, tensor_sub, tensor_mul, tensor_div = (ELEMENTWISE[name] for name in ("add", "sub", "mul", "div"))
tensor_pow, bmm, batch_mat_mul, where = (ELEMENTWISE[name] for name in ("pow", "matmul", "matmul", "select"))


# Without arithmetic.


def cast(input: Any, dtype: Any) -> Any:
    """Return a tensor or number in another dtype."""
    return of_tensors(lambda x: x.to(pytype_to_dtype(dtype)))(input)


def dtype(input: Any) -> torch.dtype:
    """Return the dtype of a tensor."""
    return plain(input).dtype  # type: ignore[no-any-return]


def shape(input_x: Any) -> tuple[int, ...]:
    """Return the sizes of a tensor."""
    return tuple(plain(input_x).shape)


def rank(input_x: Any) -> int:
    """Return the number of dims of a tensor."""
    return plain(input_x).dim()  # type: ignore[no-any-return]


class Status(torch.Tensor):
    """Eight zeros that stand for overflow flags; `depend` tells it which values they are about."""

    watched: Any = ()


def depend(value: Any, expr: Any) -> Any:
    """Return `value`. Everything runs in the order in which it is written."""
    if isinstance(value, Status):
        value.watched = expr
    return value


def identity(x: Any) -> Any:
    """Return the argument."""
    return x


def stop_gradient(value: Any) -> Any:
    """Return a tensor without its graph."""
    return wrap(plain(value).detach())


def assign(variable: Any, value: Any) -> Any:
    """Write a value into a parameter or tensor and return that.

    Raises:
        ValueError: the value has another shape
    """
    return variable.set_data(value) if hasattr(variable, "set_data") else set_data(variable, value)


def assign_add(variable: Any, value: Any) -> Any:
    """Add a value to a parameter or tensor, in place."""
    return assign(variable, plain(variable).detach() + plain(value))


def assign_sub(variable: Any, value: Any) -> Any:
    """Subtract a value from a parameter or tensor, in place."""
    return assign(variable, plain(variable).detach() - plain(value))


def tuple_to_array(input_x: Sequence[Any]) -> Any:
    """Return a tensor of numbers."""
    return wrap(torch.tensor([float(x) if isinstance(x, float) else x for x in input_x]))


# New tensors.


def fill(type: Any, shape: Sequence[int], value: Any) -> Any:
    """Return a tensor of one value."""
    return wrap(torch.full(tuple(shape), plain(value), dtype=type))


def ones(shape: Any, dtype: Any = torch.float32) -> Any:
    """Return a tensor of ones."""
    return wrap(torch.ones(shape, dtype=dtype))


def zeros(shape: Any, dtype: Any = torch.float32) -> Any:
    """Return a tensor of zeros."""
    return wrap(torch.zeros(shape, dtype=dtype))


ones_like: Callable[[Any], Any] = of_tensors(lambda x: torch.ones_like(x, requires_grad=False))
zeros_like: Callable[[Any], Any] = of_tensors(lambda x: torch.zeros_like(x, requires_grad=False))


def one_hot(indices: Any, depth: int, on_value: Any = 1, off_value: Any = 0, axis: int = -1) -> Any:
    """Return rows with `on_value` where the index is, and `off_value` elsewhere, in the dtype of `on_value`."""
    on, off = (torch.as_tensor(plain(value)) for value in (on_value, off_value))
    hot = functional.one_hot(plain(indices).long(), depth).bool()
    return wrap(torch.where(hot, on.to(hot.device), off.to(hot.device)).movedim(-1, axis))


# Shapes.


def reshape(input: Any, shape: Sequence[int]) -> Any:
    """Return a tensor of another shape."""
    return wrap(torch.reshape(plain(input), tuple(shape)))


def transpose(input: Any, input_perm: Sequence[int]) -> Any:
    """Return a tensor whose dims are in another order."""
    return wrap(plain(input).permute(*input_perm))


def expand_dims(input_x: Any, axis: int) -> Any:
    """Return a tensor with one more dim of size 1."""
    return wrap(plain(input_x).unsqueeze(axis))


def squeeze(input: Any, axis: Any = None) -> Any:
    """Return a tensor without dims of size 1."""
    return wrap(plain(input).squeeze() if axis in (None, ()) else plain(input).squeeze(axis))


def tile(input: Any, dims: Sequence[int]) -> Any:
    """Return a tensor repeated along each dim."""
    return wrap(torch.tile(plain(input), tuple(dims)))


def cat(tensors: Sequence[Any], axis: int = 0) -> Any:
    """Return tensors joined along a dim."""
    return wrap(torch.cat([plain(x) for x in tensors], dim=axis))


concat = cat


def stack(tensors: Sequence[Any], axis: int = 0) -> Any:
    """Return tensors of one shape along a new dim."""
    return wrap(torch.stack([plain(x) for x in tensors], dim=axis))


def gather(input_params: Any, input_indices: Any, axis: int) -> Any:
    """Return the slices of a tensor along a dim that are indexed, as embeddings are looked up."""
    values, indices = plain(input_params), plain(input_indices)
    picked = values.index_select(axis, indices.reshape(-1))
    return wrap(picked.reshape(*values.shape[:axis], *indices.shape, *values.shape[axis % values.dim() + 1 :]))


# Sums.


def _reduction(reduce: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Any, axis: Any = (), keep_dims: bool = False) -> Any:
        """Return a tensor reduced over some dims; over all of them without `axis`."""
        value = plain(x)
        dims = tuple(range(value.dim())) if axis is None or axis == () else (axis,) if isinstance(axis, int) else tuple(axis)
        return wrap(reduce(value, dims, keep_dims) if dims else value)

    return call


reduce_sum = _reduction(lambda x, dims, keep: x.sum(dim=dims, keepdim=keep))
reduce_mean = _reduction(lambda x, dims, keep: x.mean(dim=dims, keepdim=keep))
reduce_max = _reduction(lambda x, dims, keep: x.amax(dim=dims, keepdim=keep))
reduce_min = _reduction(lambda x, dims, keep: x.amin(dim=dims, keepdim=keep))
reduce_all = _reduction(lambda x, dims, keep: x.bool().all(dim=dims, keepdim=keep))
reduce_any = _reduction(lambda x, dims, keep: x.bool().any(dim=dims, keepdim=keep))


def addn(x: Sequence[Any]) -> Any:
    """Return the sum of tensors of one shape."""
    return wrap(functools.reduce(torch.add, [plain(t) for t in x]))


add_n = addn


def softmax(input: Any, axis: int = -1) -> Any:
    """Return the softmax along a dim."""
    return wrap(torch.softmax(plain(input), dim=axis))


def log_softmax(logits: Any, axis: int = -1) -> Any:
    """Return the logarithm of the softmax along a dim."""
    return wrap(torch.log_softmax(plain(logits), dim=axis))


def argmax(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """Return the index of the largest element."""
    return wrap(torch.argmax(plain(input), dim, keepdim))


# Clipping.


def clip_by_value(x: Any, clip_value_min: Any = None, clip_value_max: Any = None) -> Any:
    """Return a tensor, or each of a tuple or list of tensors, with values between two limits.

    Raises:
        ValueError: neither limit is given
    """
    if clip_value_min is None and clip_value_max is None:
        raise ValueError("clip_value_min or clip_value_max must be given, got None for both")
    if isinstance(x, (tuple, list)) and not hasattr(type(x), "__torch_function__"):
        return type(x)(clip_by_value(t, clip_value_min, clip_value_max) for t in x)
    clipped = plain(x)
    for function, limit in ((torch.maximum, clip_value_min), (torch.minimum, clip_value_max)):
        if limit is not None:
            clipped = function(clipped, torch.as_tensor(plain(limit), device=clipped.device).to(clipped.dtype))
    return wrap(clipped)


def clip_by_norm(x: Any, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Any:
    """Return a tensor, or a tuple or list of tensors, scaled so that the norm over all of it is `max_norm` at most.

    As in the original, 1e-6 is added to the norm before it divides. `ClipByNorm` of `nn` has no such term.

    Raises:
        RuntimeError: with `error_if_nonfinite`, the norm is not finite
    """
    alone = isinstance(x, torch.Tensor) or hasattr(type(x), "__torch_function__")
    tensors = [plain(x)] if alone else [plain(t) for t in x]
    norm = torch.stack([torch.linalg.vector_norm(t.float(), norm_type) for t in tensors])
    total = torch.linalg.vector_norm(norm, norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(f"x has a norm of {total.item()}, which cannot be clipped; mend what made it so")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    clipped = [wrap(t * factor.to(t.dtype)) for t in tensors]
    return clipped[0] if alone else type(x)(clipped) if isinstance(x, list) else tuple(clipped)


def clip_by_global_norm(x: Sequence[Any], clip_norm: float = 1.0, use_norm: Any = None) -> Any:
    """Return tensors scaled so that the norm over all of them is `clip_norm` at most.

    Args:
        x: a tuple or list of tensors
        clip_norm: a number > 0 (default: 1.0)
        use_norm: only None, as in the original (default: None)

    Raises:
        ValueError: `clip_norm` is not greater than 0; or `use_norm` is given
    """
    if use_norm is not None:
        raise ValueError(f"use_norm must be None, got {use_norm!r}; the norm is computed")
    if isinstance(clip_norm, bool) or not isinstance(clip_norm, (int, float)) or not clip_norm > 0:
        raise fail(ValueError, "clip_norm", "a number > 0", clip_norm)
    tensors = [plain(t) for t in x]
    squares = [t.float().square().sum() for t in tensors]
    norm = torch.stack(squares).sum().sqrt().clamp(min=clip_norm)
    return tuple(wrap((t * clip_norm / norm).to(t.dtype)) for t in tensors)


# Where a cell has one as an attribute and is pickled, it has to be found by its name.
for _name, _function in list(globals().items()):
    if "<locals>" in getattr(_function, "__qualname__", ""):
        _function.__module__, _function.__name__, _function.__qualname__ = __name__, _name, _name

__all__ = sorted(
    name
    for name, value in list(globals().items())
    if callable(value)
    and not name.startswith("_")
    and name not in ("Any", "Callable", "Sequence", "fail", "plain", "wrap")
    and name not in ("of_tensors", "pytype_to_dtype", "set_data", "Status")
)
