"""Where one parameter's parts lie: its local tensor, its parts along dim 0, and the processes that hold the others.

A part is a stretch of the local tensor's dim 0 that has sums of its own: a block, or what of a block lies here, or what lies
here of one of the parameters that a flat tensor holds. Buckets, guard, rounding and the sums over processes know layouts and
nothing else of how a parameter is sharded. DTensors say themselves how they lie; of all others it is known if somebody has
told (`torchlamb.shard`).
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from torchlamb.sharding.place import Place, Start

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as ProcessGroup

Groups = tuple["ProcessGroup", ...]


@dataclass(frozen=True)
class Layout:
    """Where the parts of a parameter lie in its local tensor, and over which processes their sums are added."""

    parts: tuple[tuple[int, int], ...] = ()  # of each: where it begins in dim 0, and how long it is; none where all is one
    groups: Groups = ()  # the sums of all parts are added over each, one after the other; none where nothing is sharded
    place: Place | None = None  # of the local tensor in the whole one, where that is asked for and not all of it
    device_type: str = "cpu"  # on which the groups add
    ranks: frozenset[int] = frozenset()  # of all processes that are known to hold this parameter, or parts of it
    number: int | None = None  # in the place of a position in the optimizer, where that is handed one partition at a time

    @property
    def is_whole(self) -> bool:
        """Whether the local tensor is one whole parameter."""
        return not self.groups and not self.parts

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
    known = told_of(param)
    if known is not None and not known.is_whole:
        return known
    groups = groups_of(param)
    if not groups:
        parts = () if blocks == 1 else _equal_parts(local(param.detach()), blocks)
        ranks = _ranks_of(param) if known is None else known.ranks
        return Layout(parts, ranks=ranks) if parts or ranks else WHOLE
    mesh, placements = param.device_mesh, param.placements
    cut_through = any(getattr(p, "dim", None) == 0 and mesh.size(i) > 1 for i, p in enumerate(placements))
    parts = () if blocks == 1 else _parts(param, blocks) if cut_through else _equal_parts(local(param.detach()), blocks)
    place = Place(tuple(param.shape), tuple(_start(param, dim) for dim in range(param.dim()))) if keyed else None
    return Layout(parts, groups, place, mesh.device_type, _ranks_of(param))


def groups_of(param: Any) -> Groups:
    """Return the process groups over which shards of a parameter are added."""
    known = told_of(param)
    if known is not None:
        return known.groups
    if not is_dtensor(param) or param.device_mesh.get_coordinate() is None:
        return ()  # of a mesh that this process is not in, it holds nothing
    mesh, placements = param.device_mesh, param.placements
    # Not "is a Shard": _StridedShard, which FSDP2 over tensor parallelism gives, is no subclass of it.
    return tuple(mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate() and mesh.size(i) > 1)


def _ranks_of(param: Any) -> frozenset[int]:
    return frozenset(param.device_mesh.mesh.flatten().tolist()) if is_dtensor(param) else frozenset()


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


# What others have told, of tensors that do not know it themselves. Not an attribute of those, which wrappers would pickle, no
# weak reference to them, which torch.utils.swap_tensors forbids, and no strong one, which would keep models alive: by identity,
# for as long as what holds them lives and holds them.


class _Owned(NamedTuple):
    tensors: Callable[[Any], Iterable[Tensor]]  # which the owner holds now: a number of one that is gone may be another's
    layouts: dict[int, Layout]


class _Told:
    def __init__(self) -> None:
        self.by_owner: MutableMapping[Any, _Owned] = weakref.WeakKeyDictionary()
        self.version = 0  # counts what was told: plans that were made before are made again


_TOLD = _Told()


def tell(owner: object, tensors: Callable[[Any], Iterable[Tensor]], layouts: Mapping[Tensor, Layout]) -> None:
    """Say how tensors lie.

    Args:
        owner: holds the tensors; with it, what was said is forgotten
        tensors: returns those that an owner holds
        layouts: of each
    """
    known = _TOLD.by_owner[owner].layouts if owner in _TOLD.by_owner else {}
    _TOLD.by_owner[owner] = _Owned(tensors, {**known, **{id(tensor): layout for tensor, layout in layouts.items()}})
    _TOLD.version += 1


def told_of(tensor: Tensor) -> Layout | None:
    """Return what was said of how a tensor lies."""
    for owner, (tensors, layouts) in list(_TOLD.by_owner.items()):
        if id(tensor) in layouts and any(held is tensor for held in tensors(owner)):
            return layouts[id(tensor)]
    return None


def told_version() -> int:
    """Return a number that changes when something is said."""
    return _TOLD.version


def same(found: Tensor, wanted: Tensor) -> bool:
    """Return whether a slice is what it was said to be: the same numbers, of which some may be NaN."""
    return found.numel() == wanted.numel() and torch.allclose(found.flatten(), wanted.flatten(), 0.0, 0.0, equal_nan=True)


def on_any(wrong: list[str], groups: Iterable[ProcessGroup | None], device: torch.device | str) -> list[str]:
    """Return what is wrong here, or that something is on another process of the groups: all of them raise, or none."""
    elsewhere = False
    for group in groups:
        if group is not None:
            found = torch.tensor(float(bool(wrong)), device=device)
            torch.distributed.all_reduce(found, group=group)
            elsewhere |= bool(found.item())
    return wrong or (["some of another process"] if elsewhere else [])


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
