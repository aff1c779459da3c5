"""Sums over processes: which there are, in which order they are added, and adding them.

One all-reduce for each process group adds the sums of all sharded parameters; another the squares of gradients, where a guard
asks for them. Gradients that are themselves still to be added are, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from torchlamb.rule import SUMS
from torchlamb.sharding.layout import Groups, Layout, groups_of, is_dtensor, is_plain, layout_of, local, told_version

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

# Of each bucket: the parameter's position of each row, and (rows, ...) of numbers.
Rows = Sequence[tuple[Sequence[int], Tensor]]


class Identity(NamedTuple):
    """How to tell that a parameter is still the one that a layout was made for, without a reference to it."""

    number: int  # of the object; parameters are swapped in place, which weak references would forbid
    dtype: torch.dtype | None  # None of a lazy one, which is looked at again when it has a shape
    spec: object  # of a DTensor: its mesh, placements, shape and dtype
    shape: torch.Size | None  # where blocks depend on it

    @classmethod
    def of(cls, param: Tensor, blocks: int) -> Identity:
        """Return that of a parameter of a group with so many blocks."""
        if is_lazy(param):
            return cls(id(param), None, None, None)
        return cls(id(param), param.dtype, getattr(param, "_spec", None), param.shape if blocks > 1 else None)


@dataclass
class Plan:
    """How all parameters lie, and which sums are added over which processes.

    It comes from the parameters alone, never from which gradients there are: processes may differ in those, and a process that
    left a collective out would make the others wait for ever.
    """

    options: list[Any]  # what it was made for: of every group, those that decide what can be sharded; what was told by then
    identities: list[Identity] = field(default_factory=list)  # of every parameter, in the order of the groups
    layouts: list[Layout] = field(default_factory=list)
    is_sharded: bool = False  # any of them is a DTensor, or has parts elsewhere
    indices: list[int] = field(default_factory=list)  # of each row that is added over processes: its parameter's position
    first_rows: dict[int, int] = field(default_factory=dict)  # by the parameter's position
    rows_of: dict[ProcessGroup, list[int]] = field(default_factory=dict)  # rows that are added over it
    device_type: str = "cpu"  # on which the process groups add
    device: torch.device | None = None  # of the shards: where sums are added, on every process alike
    dtype: torch.dtype = torch.float32
    # Places of rows in the table, made once: lists would be copied to the device in each step, and a graph cannot do that.
    selections: dict[tuple[int, ...], slice | Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, param_groups: Sequence[dict[str, Any]]) -> Plan:
        """Make it for these parameters."""
        plan = cls(options=_sharding_options(param_groups))
        for group in param_groups:
            keyed = group["stochastic_rounding"] or group["state_dtype"] is torch.bfloat16
            for param in group["params"]:
                plan._add(param, layout_of(param, group["blocks"], keyed), Identity.of(param, group["blocks"]))
        return plan

    def fits(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether these are the parameters it was made for; wrappers replace them after construction."""
        if _sharding_options(param_groups) != self.options:
            return False
        now = [(p, group["blocks"]) for group in param_groups for p in group["params"]]
        return len(now) == len(self.identities) and all(
            known.number == id(p)
            and known.dtype is p.dtype
            and known.spec is getattr(p, "_spec", None)
            and (blocks == 1 or known.shape == p.shape)
            for (p, blocks), known in zip(now, self.identities, strict=True)
        )

    def add_sums_(self, tables: Rows, without_grad: dict[int, Tensor]) -> Tensor:
        """Add the sums of sharded rows over processes, in place: one all-reduce for each process group.

        Args:
            tables: of each bucket of sharded rows, the sums (rows, SUMS) over this process's shards
            without_grad: by position, the sums (parts, SUMS) over this process's shards of sharded parameters that have no
                gradient: other processes may have one, and need this shard's part of the norm

        Returns:
            (rows, SUMS) the sums of all sharded rows, whose parameters' positions are `indices`
        """
        table, places = self._table(tables, (len(SUMS),))
        for index, sums in without_grad.items():
            first = self.first_rows[index]
            table[first : first + len(sums)] = sums.to(table.device, self.dtype)
        for group, rows in self.rows_of.items():
            place = self._selection(rows)
            table[place] = self._all_reduced(table[place], group)
        for place, (_, sums) in zip(places, tables, strict=True):
            sums.copy_(table[place])
        return table

    def add_grad_sq_norms(self, tables: Rows, found_inf: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums of squares, and `found_inf`, over all processes: one all-reduce for each process group.

        Args:
            tables: of each bucket of sharded rows, the sums (rows,) of its gradient over this process's shards
            found_inf: 0-dim, 0 where everything is finite

        Returns:
            (rows,) the sums of all sharded rows, whose parameters' positions are `indices`; and `found_inf`
        """
        table, _ = self._table(tables, ())
        found_inf = found_inf.to(table.device, self.dtype).reshape(1)
        for group, rows in self.rows_of.items():
            place = self._selection(rows)
            packed = self._all_reduced(torch.cat([table[place], found_inf]), group)
            table[place], found_inf = packed[:-1], packed[-1:]
        return table, found_inf.reshape(())

    def _table(self, tables: Rows, columns: tuple[int, ...]) -> tuple[Tensor, list[slice | Tensor]]:
        """Return zeros (rows, *columns) with this process's sums at their places, and the places."""
        device = self._device
        table = torch.zeros(len(self.indices), *columns, dtype=self.dtype, device=device)
        places = [self._places(indices) for indices, _ in tables]
        for place, (_, sums) in zip(places, tables, strict=True):
            table[place] = sums.to(device, self.dtype)
        return table, places

    def _add(self, param: Tensor, layout: Layout, identity: Identity) -> None:
        index = len(self.layouts)
        self.layouts.append(layout)
        self.identities.append(identity)
        self.is_sharded |= is_dtensor(param) or bool(layout.groups)
        if not layout.groups:
            return
        first = self.first_rows[index] = len(self.indices)
        self.indices += [index] * layout.rows
        for group in layout.groups:
            self.rows_of.setdefault(group, []).extend(range(first, len(self.indices)))
        self.device_type = layout.device_type
        self.device = self.device or local(param.detach()).device
        self.dtype = torch.promote_types(self.dtype, torch.promote_types(param.dtype, torch.float32).to_real())

    @property
    def _device(self) -> torch.device:
        return self.device or torch.device(self.device_type)

    def _places(self, indices: Sequence[int]) -> slice | Tensor:
        """Return where in the table the rows of a bucket stand; rows of one parameter follow each other."""
        places: list[int] = []
        for row, index in enumerate(indices):
            again = row > 0 and indices[row - 1] == index
            places.append(places[-1] + 1 if again else self.first_rows[index])
        return self._selection(places)

    def _selection(self, places: list[int]) -> slice | Tensor:
        """Return what selects these rows of the table."""
        if torch.compiler.is_compiling():
            return _slice_or_tensor(places, self._device)
        key = tuple(places)
        found = self.selections.get(key)
        if found is None:
            found = _slice_or_tensor(places, self._device)
            if len(self.selections) < 64:  # gradients may come and go; none is let go, for graphs may read it
                self.selections[key] = found
        return found

    def _all_reduced(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        # CPU-offloaded shards have CPU tensors on an accelerator's mesh, whose process groups reduce on the accelerator.
        on_mesh = tensor.to(self.device_type, copy=True)
        torch.distributed.all_reduce(on_mesh, group=group)
        return on_mesh.to(tensor.device)


NO_PLAN = Plan(options=[])  # which fits no parameters


def _sharding_options(param_groups: Sequence[dict[str, Any]]) -> list[Any]:
    names = ("blocks", "grad_centralization", "differentiable", "master_weights", "stochastic_rounding", "state_dtype")
    return [told_version(), *(tuple(group[name] for name in names) for group in param_groups)]


def _slice_or_tensor(places: list[int], device: torch.device) -> slice | Tensor:
    first = places[0] if places else 0
    contiguous = places == list(range(first, first + len(places)))
    return slice(first, first + len(places)) if contiguous else torch.tensor(places, device=device)


def total_over_shards(sums: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the total of one number (0-dim) for each parameter, over all shards of the whole tensors.

    The numbers are sums over this process's shards, on one device. Give all parameters on every process, in one order: which
    collectives there are follows from them alone, one all-reduce for each process group.
    """
    of_groups: dict[Groups, list[Tensor]] = {}
    for param, number in sums:
        of_groups.setdefault(groups_of(param), []).append(number)
    total = torch.zeros_like(sums[0][1])
    for groups, numbers in of_groups.items():
        part = torch.stack(numbers).sum()
        for group in groups:
            torch.distributed.all_reduce(part, group=group)
        total = total + part
    return total


def mean_over(number: Tensor, group: ProcessGroup) -> Tensor:
    """Return the mean of a tensor over the processes of a group."""
    total = number.clone()
    torch.distributed.all_reduce(total, group=group)
    return total / group.size()


# Gradients.


def local_grads(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients as local tensors that match their parameters' shards.

    Gradients that are still to be added over processes (`Partial`, as sequence parallelism gives them for norms) are packed:
    one all-reduce for each process group, where redistributing each gradient would take one apiece.
    """
    shards = [local(grad) for grad in grads]
    placements: dict[int, list[Any]] = {}  # of the gradients that do not lie as their parameters do
    partial: dict[ProcessGroup, list[tuple[int, str]]] = {}
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if not is_plain(grad) and _lie_apart(param, grad):
            placements[i] = list(grad.placements)  # type: ignore[attr-defined]
            for dim, placement in enumerate(grad.placements):  # type: ignore[attr-defined]
                if placement.is_partial():
                    partial.setdefault(grad.device_mesh.get_group(dim), []).append((i, placement.reduce_op))  # type: ignore[attr-defined]
                    placements[i][dim] = _replicate()
    for group, entries in partial.items():
        _add_packed_(shards, entries, group)
    for i, now in placements.items():
        if tuple(now) != params[i].placements:  # type: ignore[attr-defined]
            shards[i] = local(_as_dtensor(shards[i], grads[i], now).redistribute(placements=params[i].placements))  # type: ignore[attr-defined]
    return shards


def _lie_apart(param: Any, grad: Any) -> bool:
    return is_dtensor(param) and grad._spec is not param._spec and grad._spec.placements != param._spec.placements


def _add_packed_(shards: list[Tensor], entries: Sequence[tuple[int, str]], group: ProcessGroup) -> None:
    dtype = shards[entries[0][0]].dtype
    for i, _ in entries:
        dtype = torch.promote_types(dtype, shards[i].dtype)
    packed = torch.cat([shards[i].to(dtype).reshape(-1) for i, _ in entries])
    torch.distributed.all_reduce(packed, group=group)
    for (i, reduce_op), part in zip(entries, torch.split(packed, [shards[i].numel() for i, _ in entries]), strict=True):
        part = part / group.size() if reduce_op == "avg" else part
        shards[i] = part.view(shards[i].shape)


def _as_dtensor(shard: Tensor, like: Any, placements: Sequence[Any]) -> DTensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(shard, like.device_mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()
