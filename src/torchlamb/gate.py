"""What may be handed to kernels, which take addresses and trust what they are handed.

Whatever this room does not know is stepped with torch's operations instead, for a reason that it gives. What those could not
step either, and what has no memory, is refused before anything changes. Objects are looked at closely once, and again when
something has changed that the answer depends on; in a step as the one before, lists are compared. This room must not know of
options or of the rule.
"""

from __future__ import annotations

import functools
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from torchlamb.sharding.layout import is_dtensor, local

_PLAIN = {Tensor, Parameter}
_KEPT = ("exp_avg", "exp_avg_sq", "step", "master", "seed")  # of a parameter's state
_IN_ITS_SHAPE = ("", "exp_avg", "exp_avg_sq", "master")  # written, as the parameter itself
_NOTHING: dict[str, Any] = {}

NEGATIVE = "its values are the negated ones of its memory; resolve_neg() it"


class Admission(NamedTuple):
    """What was decided about one parameter with its state and its gradient."""

    why_not: str | None = None  # why kernels cannot have it
    turn: int = 0  # rows that share memory are not stepped at once: the second waits for the first


_ADMITTED = Admission()


class Span(NamedTuple):
    """Memory that one row writes."""

    start: int  # addresses
    end: int
    row: int
    storage: int


@dataclass
class _Known:
    """Of one group: lists that a step compares, and what was found when they were last others."""

    seen: Sequence[Any]
    grad_dtypes: Sequence[torch.dtype]
    admissions: Sequence[Admission]
    spans: Sequence[Span]  # in the order of addresses
    ends: Sequence[int]  # of each and all before it, the last
    storages: set[int]  # addresses of the storages in which these are


def why_not(tensor: Tensor) -> str | None:
    """Return why kernels cannot have a tensor for what it is, wherever its memory may lie; None if they can."""
    kind = type(tensor)
    if kind not in _PLAIN:
        tensor = local(tensor)
        kind = type(tensor)
        if kind not in _PLAIN and not _adds_nothing(kind):
            return f"they do not know where a {kind.__name__} has its values"
    if tensor.is_neg():
        return NEGATIVE
    return "they cannot count versions of inference tensors" if tensor.is_inference() else None


@functools.cache
def _adds_nothing(kind: type) -> bool:
    """Return whether a subclass of Parameter stores its values as a Parameter does, which it does if it overrides nothing."""
    hooks = ("__torch_dispatch__", "__torch_function__")
    return issubclass(kind, Parameter) and all(getattr(kind, hook) is getattr(Parameter, hook) for hook in hooks)


class Gate:
    """What was decided about an optimizer's parameters that have gradients, by group."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self.admissions: dict[int, Sequence[Admission]] = {}  # of each such parameter; none where all are admitted at once
        self.odd_grads: dict[int, dict[int, bool]] = {}  # by place among them, whose gradients `own_grad` copies

    def look(self, index: int, group: Mapping[str, Any], states: Mapping[Tensor, Any], check: Callable[[], None]) -> None:
        """Decide about a group's parameters that have gradients.

        Args:
            index: of the group
            group: its entry in `param_groups`
            states: the optimizer's
            check: raises for what does not fit together; called where that may have changed

        Raises:
            RuntimeError: a tensor whose memory was freed or is too small, whose elements share memory, that torch lets nobody
                write to, or whose values have another layout. Nothing has changed then.
        """
        params = [p for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        kept = [states.get(p) or _NOTHING for p in params]
        columns = [params, *([state.get(key) for state in kept] for key in _KEPT)]
        plain = {*map(type, params), *map(type, grads)} <= _PLAIN
        if not plain:
            check()
            columns = [[local(t) if isinstance(t, Tensor) else t for t in column] for column in columns]
            grads = [local(grad) for grad in grads]
        form, dtypes = _form(columns[0]), [grad.dtype for grad in grads]
        options = [group[name] for name in ("foreach", "fused", "differentiable")]
        seen = [options, form, *([*map(id, column)] for column in columns), *map(_addresses, columns)]
        known, name_of = self._known.get(index), _Names(group, index)
        if plain and not (
            known is not None
            and known.seen == seen
            and form == _form(grads)
            and known.grad_dtypes == dtypes
            and all(grad.layout is torch.strided for grad in grads)
        ):
            check()
        if known is None or known.seen != seen:
            _refuse_real_among_fake(columns[0], name_of)
            spans = sorted(_spans(columns, name_of))
            ends = list(accumulate((span.end for span in spans), max))
            known = _Known(seen, dtypes, _admissions(columns, spans), spans, ends, {span.storage for span in spans})
        known.grad_dtypes = dtypes
        self._known[index] = known
        self.odd_grads[index] = _odd_grads(params, grads, known, name_of)
        self.admissions[index] = known.admissions if any(a != _ADMITTED for a in known.admissions) else ()


class _Names:
    """What the parameters of a group that have gradients are called in errors, by place among them."""

    def __init__(self, group: Mapping[str, Any], index: int) -> None:
        self.group, self.index = group, index

    def __getitem__(self, row: int) -> str:
        place = [i for i, p in enumerate(self.group["params"]) if p.grad is not None][row]
        names = self.group.get("param_names", ())
        return f"parameter {names[place] if place < len(names) else place!r} of group {self.index}"


def _form(tensors: Sequence[Tensor]) -> tuple[list[torch.Size], list[torch.device]]:
    return [t.shape for t in tensors], [t.device for t in tensors]


def _addresses(column: Sequence[Any]) -> list[int]:
    return [t.data_ptr() if (type(t) in _PLAIN or has_memory(t)) and t.layout is torch.strided else 0 for t in column]


def _spans(columns: Sequence[Sequence[Any]], name_of: _Names) -> Iterator[Span]:
    """Return the memory that is written, of all tensors that kernels might be handed.

    Raises:
        RuntimeError: as `Gate.look`
    """
    for key, column in zip(("", *_KEPT), columns, strict=True):
        for row, tensor in enumerate(column):
            if not isinstance(tensor, Tensor) or key == "seed":
                continue
            if key == "step" and tensor.numel() != 1:
                raise RuntimeError(f"the step of {name_of[row]} must be one number, got shape {tuple(tensor.shape)}")
            reason = _why_refused(tensor)
            if reason is not None:
                raise RuntimeError(f"{key + ' of ' if key else ''}{name_of[row]} {reason}")
            if has_memory(tensor):
                start = tensor.data_ptr()
                span = Span(start, start + _extent(tensor) * tensor.itemsize, row, tensor.untyped_storage().data_ptr())
                if key in _IN_ITS_SHAPE and span.end > start:
                    yield span


def _why_refused(t: Tensor) -> str | None:
    """Return what is said of a tensor that not even torch's operations could step."""
    if t.layout is not torch.strided or t.is_nested or t._is_zerotensor():
        what = " and is nested" if t.is_nested else " and no memory" if t._is_zerotensor() else ""
        return f"has layout {t.layout}{what}; give Lamb dense tensors: to_dense() or clone()"
    if t.is_conj():
        return "has a conjugate bit, and nobody can view it as real numbers; give Lamb its resolve_conj()"
    if t.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode, outside of which nobody may write to it; give Lamb a clone()"
    if not has_memory(t):
        return None
    if _is_too_short(t):
        return "is larger than its storage, which was freed or resized; restore it before step()"
    return (
        "has elements that share memory, which would be stepped several times; give Lamb a clone()"
        if _overlaps_itself(t)
        else None
    )


def has_memory(t: Any) -> bool:
    """Return whether it is a tensor with memory of its own, that is neither only described nor inside another."""
    return isinstance(t, Tensor) and type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ and not t.is_meta


def _is_too_short(t: Tensor) -> bool:
    # An empty shard may begin behind the end of what it is a shard of.
    return t.numel() > 0 and t.untyped_storage().nbytes() < (t.storage_offset() + _extent(t)) * t.itemsize


def _extent(t: Tensor) -> int:
    """Return how many elements lie from a tensor's first to its last in memory, both included."""
    size = t.numel()
    if t.is_contiguous() or size == 0:
        return size
    return 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))


def _overlaps_itself(t: Tensor) -> bool:
    if t.is_contiguous():
        return False
    span = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride < span:  # they may
            offsets = torch.zeros(t.shape, dtype=torch.int64, device="cpu")
            for dim, (n, step) in enumerate(zip(t.shape, t.stride(), strict=True)):
                offsets += (torch.arange(n, device="cpu") * step).view(-1, *[1] * (t.dim() - 1 - dim))
            return len(set(offsets.flatten().tolist())) < t.numel()
        span += (size - 1) * stride
    return False


def _admissions(columns: Sequence[Sequence[Any]], spans: Sequence[Span]) -> list[Admission]:
    """Return why kernels cannot have each parameter or its state, and its turn among those that share memory."""
    before: dict[int, set[int]] = {}  # by row, the earlier ones that it shares memory with
    open_spans: list[Span] = []
    for span in spans:
        open_spans = [other for other in open_spans if other.end > span.start]
        for other in open_spans:
            if other.row != span.row:
                before.setdefault(max(other.row, span.row), set()).add(min(other.row, span.row))
        open_spans.append(span)
    turns: dict[int, int] = {}
    for row in sorted(before):
        turns[row] = 1 + max(turns.get(other, 0) for other in before[row])
    reasons = ([why_not(t) for t in row if isinstance(t, Tensor)] for row in zip(*columns, strict=True))
    return [Admission(next(filter(None, found), None), turns.get(row, 0)) for row, found in enumerate(reasons)]


def _refuse_real_among_fake(params: Sequence[Tensor], name_of: _Names) -> None:
    module = sys.modules.get("torch._subclasses.fake_tensor")
    if module is None or not torch._C._len_torch_dispatch_stack():
        return
    if any(isinstance(mode, module.FakeTensorMode) for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack()):
        for row, p in enumerate(params):
            if type(p) in _PLAIN:
                raise RuntimeError(
                    f"{name_of[row]} has values, and step() was called under a FakeTensorMode, in which nothing has; make the "
                    "model and its optimizer under it, too"
                )


def own_grad(param: Tensor, grad: Tensor, is_in_memory: bool) -> Tensor:
    """Return a copy of a gradient: plain if it has memory of its own, else like the parameter."""
    if is_in_memory:
        return grad.as_subclass(Tensor).clone()
    return torch.empty_like(param, dtype=grad.dtype, requires_grad=False).copy_(grad)


def _odd_grads(params: Sequence[Tensor], grads: Sequence[Tensor], known: _Known, name_of: _Names) -> dict[int, bool]:
    """Return of which rows the gradient is to be copied, and whether each has memory of its own.

    It is in memory that a step writes, or of another kind than the parameter: then it would be left to a subclass what its
    operations do with what is written.

    Raises:
        RuntimeError: the memory of a gradient was freed or is too small
    """
    odd: dict[int, bool] = {}
    for row, grad in enumerate(grads):
        is_plain = type(grad) in _PLAIN
        if grad.is_meta or not (is_plain or has_memory(grad)):
            if not is_plain and type(grad) is not type(params[row]) and not is_dtensor(params[row]):
                odd[row] = False
            continue
        if not is_plain or grad._is_zerotensor():  # zeros without memory, as autograd may make them
            odd[row] = True
        if grad._is_zerotensor():
            continue
        storage, size = grad.untyped_storage(), grad.numel()
        if storage.nbytes() < (grad.storage_offset() + size) * grad.itemsize and _is_too_short(grad):
            raise RuntimeError(
                f"the gradient of {name_of[row]} is larger than its storage, which was freed or resized; restore it before "
                "step()"
            )
        if storage.data_ptr() in known.storages and size and not is_dtensor(params[row]):
            start = grad.data_ptr()
            end = start + _extent(grad) * grad.itemsize
            count = bisect_left(known.spans, end, key=itemgetter(0))  # those that begin before it ends
            if known.ends[count - 1] > start and any(
                start < span.end for span in known.spans[:count] if span.row != row or span.start != start
            ):
                odd[row] = True
    return odd
