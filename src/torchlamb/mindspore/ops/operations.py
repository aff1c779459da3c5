"""Primitives: functions of `ops.functional` as objects that are made once and called often."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from torchlamb.checkpoint.together import is_distributed
from torchlamb.mindspore.common.tensor import plain, wrap
from torchlamb.mindspore.ops import functional as F


class Primitive:
    """What can be called with tensors; settings are those of its constructor.

    Source: `mindspore.ops.Primitive`.
    """

    function: Callable[..., Any]
    names: tuple[str, ...] = ()

    def __init__(self, *settings: Any, **named: Any) -> None:
        given = {**dict(zip(self.names, settings, strict=False)), **named}
        unknown = [name for name in given if name not in self.names]
        if unknown or len(settings) > len(self.names):
            what = repr(unknown[0]) if unknown else f"{len(settings)} settings"
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.names) or 'no settings'}, got {what}")
        self.settings = given

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Compute the result."""
        return type(self).function(*inputs, **keywords, **self.settings)

    def shard(self, *_: Any, **__: Any) -> Primitive:
        """Return itself; there are no layouts to say here."""
        return self

    def add_prim_attr(self, *_: Any, **__: Any) -> Primitive:
        """Return itself."""
        return self

    set_device = set_stage = recompute = add_prim_attr


def _make(name: str, function: Callable[..., Any], *names: str) -> type[Primitive]:
    kind = {"function": staticmethod(function), "names": names, "__doc__": f"`{name}` as an object.", "__module__": __name__}
    return type(name, (Primitive,), kind)


Equal: type[Primitive]
LessEqual: type[Primitive]
LogicalNot: type[Primitive]
_OTHER_NAMES = {"Gelu": "GeLU", "Relu": "ReLU", "Isfinite": "IsFinite", "Isnan": "IsNan", "Isinf": "IsInf", "Matmul": "MatMul"}
for _name, _function in F.ELEMENTWISE.items():
    _title = _name.title().replace("_", "")
    globals()[_OTHER_NAMES.get(_title, _title)] = _make(_OTHER_NAMES.get(_title, _title), _function)
TensorAdd, RealDiv = _make("TensorAdd", F.tensor_add), _make("RealDiv", F.tensor_div)
BatchMatMul = _make("BatchMatMul", F.batch_mat_mul)

Assign, AssignAdd, AssignSub = _make("Assign", F.assign), _make("AssignAdd", F.assign_add), _make("AssignSub", F.assign_sub)
Cast, DType, Shape, Rank = _make("Cast", F.cast), _make("DType", F.dtype), _make("Shape", F.shape), _make("Rank", F.rank)
Depend, Identity = _make("Depend", F.depend), _make("Identity", F.identity)
Fill, OnesLike, ZerosLike = _make("Fill", F.fill), _make("OnesLike", F.ones_like), _make("ZerosLike", F.zeros_like)
Ones, Zeros, OneHot = _make("Ones", F.ones), _make("Zeros", F.zeros), _make("OneHot", F.one_hot, "axis")
Reshape, Transpose, Tile = _make("Reshape", F.reshape), _make("Transpose", F.transpose), _make("Tile", F.tile)
ExpandDims, Squeeze = _make("ExpandDims", F.expand_dims), _make("Squeeze", F.squeeze, "axis")
Concat, Stack = _make("Concat", F.concat, "axis"), _make("Stack", F.stack, "axis")
Gather = GatherV2 = _make("Gather", F.gather)
ReduceSum, ReduceMean = _make("ReduceSum", F.reduce_sum, "keep_dims"), _make("ReduceMean", F.reduce_mean, "keep_dims")
ReduceMax, ReduceMin = _make("ReduceMax", F.reduce_max, "keep_dims"), _make("ReduceMin", F.reduce_min, "keep_dims")
ReduceAll, ReduceAny = _make("ReduceAll", F.reduce_all, "keep_dims"), _make("ReduceAny", F.reduce_any, "keep_dims")
AddN = _make("AddN", F.addn)
Softmax, LogSoftmax = _make("Softmax", F.softmax, "axis"), _make("LogSoftmax", F.log_softmax, "axis")
Partial = _make("Partial", F.partial)


class Argmax(Primitive):
    """The index of the largest element along a dim."""

    def __init__(self, axis: int = -1, output_type: Any = torch.int32) -> None:
        super().__init__()
        self.axis, self.output_type = axis, output_type

    def __call__(self, x: Any) -> Any:
        """Return the index."""
        return F.cast(F.argmax(x, self.axis), self.output_type)


class AllReduce(Primitive):
    """The sum over processes, of torch.distributed; of one process the tensor itself."""

    def __init__(self, op: str = "sum", group: Any = None) -> None:
        super().__init__()
        self.op, self.group = op, group

    def __call__(self, x: Any) -> Any:
        """Return the sum in a new tensor."""
        if not is_distributed():
            return x
        summed = plain(x).detach().clone()
        operation = getattr(torch.distributed.ReduceOp, self.op.upper())
        torch.distributed.all_reduce(summed, operation)
        return wrap(summed)


# Flags of overflow. Other machines than MindSpore's have no such register: what is not finite is looked for.


def _not_finite(values: Any) -> Any:
    value = plain(values)
    if isinstance(value, (tuple, list)):
        return _any([_not_finite(x) for x in value])
    return (
        (~value.detach().isfinite().all()).reshape(1) if isinstance(value, torch.Tensor) else torch.zeros(1, dtype=torch.bool)
    )


def _any(flags: list[torch.Tensor]) -> torch.Tensor:
    first = flags[0] if flags else torch.zeros(1, dtype=torch.bool)
    return torch.stack([flag.to(first.device) for flag in flags] or [first]).any(dim=0)


FloatStatus = _make("FloatStatus", lambda x: wrap(_not_finite(x).float()))


def _allocate() -> Any:
    return torch.zeros(8).as_subclass(F.Status)


def _get_status(status: Any) -> Any:
    flags = _not_finite(getattr(status, "watched", ())).float()
    flags = torch.cat([flags, torch.zeros(7, device=flags.device)])
    with torch.no_grad():
        status.as_subclass(torch.Tensor).copy_(flags)
    return wrap(flags)


def _clear_status(status: Any) -> Any:
    if isinstance(status, F.Status):
        status.watched = ()
        status.as_subclass(torch.Tensor).zero_()
    return wrap(torch.zeros(8))


NPUAllocFloatStatus = _make("NPUAllocFloatStatus", _allocate)
NPUGetFloatStatus, NPUGetFloatStatusV2 = _make("NPUGetFloatStatus", _get_status), _make("NPUGetFloatStatusV2", _get_status)
NPUClearFloatStatus = _make("NPUClearFloatStatus", _clear_status)
NPUClearFloatStatusV2 = _make("NPUClearFloatStatusV2", _clear_status)


class ScalarSummary(Primitive):
    """Accepted, does nothing; torch.utils.tensorboard writes summaries."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""


class Print(Primitive):
    """Prints its arguments."""

    def __call__(self, *values: Any) -> None:
        """Write the arguments to the standard output, each on a line of its own."""
        sys.stdout.writelines(f"{value}\n" for value in values)


__all__ = sorted(name for name, value in list(globals().items()) if isinstance(value, type) and issubclass(value, Primitive))
