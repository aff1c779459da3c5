"""Where one parameter's parts lie: its local tensor, its parts along dim 0, and the processes that hold the others.

A part is a stretch of the local tensor's dim 0 that has sums of its own: a block, or what of a block lies here. Buckets, guard,
rounding and the sums over processes know layouts and nothing else of how a parameter is sharded. What cannot be stepped for how
it is sharded is refused here.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from torchlamb.sharding.place import Place, Start

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = tuple["ProcessGroup", ...]


@dataclass(frozen=True)
class Layout:
    """Where the parts of a parameter lie in its local tensor, and over which processes their sums are added."""

    parts: tuple[tuple[int, int], ...] = ()  # of each: where it begins in dim 0, and how long it is; none where all is one
    groups: Groups = ()  # the sums of all parts are added over each, one after the other; none where nothing is sharded
    place: Place | None = None  # of the local tensor in the whole one, where that is asked for and not all of it

    @property
    def rows(self) -> int:
        """How many parts there are, each with a row of sums."""
        return len(self.parts) or 1

    def cut(self, tensor: Tensor) -> list[Tensor]:
        """Return the parts of a local tensor, complex numbers as real pairs."""
        real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        # `narrow` and not `chunk`: autograd forbids writing to one of several views of a single call.
        return [real.narrow(0, *part) for part in self.parts] if self.parts else [real]

    def places(self, tensor: Tensor) -> list[Place]:
        """Return where the parts of a local tensor lie in the whole one."""
        place = self.place or Place.of_whole(tensor)
        return [place.narrow(*part) for part in self.parts] if self.parts else [place]


WHOLE = Layout()  # of a parameter that is neither sharded nor cut


def layout_of(param: Any, blocks: int, keyed: bool) -> Layout:
    """Return how a parameter lies on this process.

    Args:
        param: the parameter, any tensor
        blocks: into how many equal parts along dim 0 the whole tensor is cut
        keyed: whether the place of its elements in the whole tensor is asked for

    Raises:
        NotImplementedError: the rows of a block that lie here do not follow each other
    """
    if is_lazy(param):
        return WHOLE  # until it has a shape
    groups = groups_of(param)
    if not groups:
        return WHOLE if blocks == 1 else Layout(_equal_parts(local(param.detach()), blocks))
    mesh, placements = param.device_mesh, param.placements
    cut_through = any(getattr(p, "dim", None) == 0 and mesh.size(i) > 1 for i, p in enumerate(placements))
    parts = () if blocks == 1 else _parts(param, blocks) if cut_through else _equal_parts(local(param.detach()), blocks)
    place = Place(tuple(param.shape), tuple(_start(param, dim) for dim in range(param.dim()))) if keyed else None
    return Layout(parts, groups, place)


def groups_of(param: Any) -> Groups:
    """Return the process groups over which shards of a parameter are added."""
    if not is_dtensor(param):
        return ()
    mesh, placements = param.device_mesh, param.placements
    # Not "is a Shard": _StridedShard, which FSDP2 over tensor parallelism gives, is no subclass of it.
    return tuple(mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate() and mesh.size(i) > 1)


def _equal_parts(tensor: Tensor, blocks: int) -> tuple[tuple[int, int], ...]:
    size = tensor.shape[0] // blocks
    return tuple((i * size, size) for i in range(blocks))


def _parts(param: Any, blocks: int) -> tuple[tuple[int, int], ...]:
    """Return where the blocks of the whole tensor lie in this process's rows of dim 0."""
    first = _start(param, 0)
    if not isinstance(first, int):
        raise NotImplementedError(
            f"blocks={blocks}: the rows of a parameter with placements {param.placements} that lie on this process do not "
            "follow each other; set blocks=1"
        )
    size, rows = param.shape[0] // blocks, param._local_tensor.shape[0]
    bounds = [min(max(b * size - first, 0), rows) for b in range(blocks + 1)]
    return tuple((start, stop - start) for start, stop in itertools.pairwise(bounds))


def _start(param: Any, dim: int) -> Start:
    """Return where this process's part of a dim begins in the whole tensor, or all its positions if they do not follow."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    if not any(getattr(p, "dim", None) == dim for p in param.placements):
        return 0
    placements = [p if getattr(p, "dim", None) == dim else Replicate() for p in param.placements]
    numbers = torch.arange(param.shape[dim], device=param.device_mesh.device_type).view(-1, *[1] * (param.dim() - 1 - dim))
    numbers = numbers.expand([1] * dim + list(numbers.shape))
    mine = local(distribute_tensor(numbers, param.device_mesh, placements, src_data_rank=None)).flatten()
    first = int(mine[0]) if len(mine) else 0
    return first if torch.equal(mine, torch.arange(first, first + len(mine), device=mine.device)) else mine


# The local tensor.


def is_plain(tensor: Tensor) -> bool:
    """Return whether it is of no subclass: the quickest question, for what is asked of each parameter in each step."""
    return type(tensor) is Tensor or type(tensor) is Parameter


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether it is a DTensor, without importing what makes them."""
    if is_plain(tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, and any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    shard: Any = tensor._local_tensor  # type: ignore[attr-defined]
    if type(shard) is Tensor:
        return shard
    return shard.trigger_wait() if hasattr(shard, "trigger_wait") else shard  # type: ignore[no-any-return]  # an AsyncCollectiveTensor


# What is refused.


def why_refused(param: Tensor) -> str | None:
    """Return what is said of a parameter that cannot be stepped because of how it is sharded, None of any other."""
    if hasattr(param, "_fsdp_flattened"):
        return (
            "is a flat parameter of FullyShardedDataParallel, in which the layers that LAMB adapts are no longer "
            "recognisable; shard the model with torch.distributed.fsdp.fully_shard instead"
        )
    if is_dtensor(param) and _has_partial(param.placements):  # type: ignore[attr-defined]
        return f"has placements {param.placements}: a sum that is still to be added cannot be stepped; redistribute it first"  # type: ignore[attr-defined]
    return None


@functools.cache  # placements are few, parameters many
def _has_partial(placements: tuple[Any, ...]) -> bool:
    return any(placement.is_partial() for placement in placements)


def why_grad_refused(param: Tensor, grad: Tensor) -> str | None:
    """Return what is said of a gradient that does not fit how its parameter is sharded."""
    param_is_dtensor, grad_is_dtensor = is_dtensor(param), is_dtensor(grad)
    if not (param_is_dtensor or grad_is_dtensor):
        return None
    if not grad_is_dtensor:
        return "is a DTensor and its gradient a plain tensor; make the gradient a DTensor too, with distribute_tensor"
    if not param_is_dtensor:
        return "is a plain tensor and its gradient a DTensor; take its full_tensor()"
    have, want = grad._spec, param._spec  # type: ignore[attr-defined]
    if have.mesh is want.mesh and have.placements == want.placements:
        return None
    if grad.device_mesh != param.device_mesh:  # type: ignore[attr-defined]
        return "lies on another device mesh than its gradient; redistribute the gradient"
    odd = [p for p in grad.placements if p.is_partial() and p.reduce_op not in ("sum", "avg")]  # type: ignore[attr-defined]
    return f"has a gradient with placement {odd[0]}; only sums and averages can be added" if odd else None


def shards_other_dim_than_0(param: Tensor) -> bool:
    """Return whether a mean over all dims but the first is not local."""
    return is_dtensor(param) and any(getattr(p, "dim", 0) != 0 for p in param.placements)  # type: ignore[attr-defined]


def why_flat(params: Sequence[Tensor], began: tuple[int, int]) -> str | None:
    """Return what is said of a group whose parameters have been replaced by one flat partition of them.

    Args:
        params: of the group now
        began: how many there were when the group was added, and how many dims the first of them had
    """
    if len(params) != 1 or began in ((0, 0), (1, 1)) or is_lazy(params[0]) or params[0].dim() != 1 or is_dtensor(params[0]):
        return None
    return (
        f"held {began[0]} parameters, the first with {began[1]} dims, and now holds one flat tensor, in which the layers that "
        "LAMB adapts are no longer recognisable; use torch.distributed.fsdp.fully_shard instead of flat partitions"
    )


def check_guard_is_global() -> None:
    """Raise if a ZeroRedundancyOptimizer is calling, whose processes each see the gradients of some parameters only.

    It leaves no mark on the optimizer that it wraps, but its frame is on the call stack.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if module is not None else None
    while frame is not None:
        if module is not None and isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            raise NotImplementedError(
                "max_grad_norm and skip_nonfinite need the norm over all gradients, and inside a ZeroRedundancyOptimizer each "
                "process sees those of its own parameters only: clip with torch.nn.utils.clip_grad_norm_ before the step"
            )
        frame = frame.f_back
