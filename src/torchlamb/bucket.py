"""Which parameters step together.

A `Bucket` holds the tensors of one group that share a device and their dtypes, ready for arithmetic: local tensors, complex
ones as real pairs, parameters with several parts as so many rows. Its columns are declared here, once; whoever walks them,
checks them or hands them on goes by the declaration. Backends see buckets and nothing above them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.gate import Admission
from torchlamb.precision import cast, pieces, weight
from torchlamb.rule import PARAM_SQ, SUMS, Scalars
from torchlamb.sharding.layout import Groups, Layout, is_plain, local
from torchlamb.sharding.place import Place
from torchlamb.sharding.sums import Plan, local_grads

# Elements of a CPU's tensor up to which calling torch costs more than the arithmetic. Measured: docs/log.md.
SMALL = 2**14


class Column(NamedTuple):
    """What is declared of a column of tensors, one of each row."""

    name: str
    written: bool  # by a step
    is_number: bool  # 0-dim, and shared by the rows of a parameter; else of the row's shape
    optional: bool  # of all rows or none
    dtype: torch.dtype | None  # None where buckets differ in it


def _column(*, written: bool, number: bool = False, optional: bool = False, dtype: torch.dtype | None = None) -> Any:
    return {"column": (written, number, optional, dtype)}


@dataclass(frozen=True)
class Bucket:
    """Rows that step together: row i is one parameter, or one of its parts."""

    scalars: Scalars
    indices: list[int]  # position of the row's parameter in the optimizer
    params: list[Tensor] = field(default_factory=list, metadata=_column(written=True))  # each a view of its own memory
    grads: list[Tensor] = field(default_factory=list, metadata=_column(written=False))
    exp_avgs: list[Tensor] = field(default_factory=list, metadata=_column(written=True))
    exp_avg_sqs: list[Tensor] = field(default_factory=list, metadata=_column(written=True))
    # What low-precision params are rounded from; steps taken; what the random bits follow from that something is rounded by.
    masters: list[Tensor] = field(default_factory=list, metadata=_column(written=True, optional=True, dtype=torch.float32))
    steps: list[Tensor] = field(default_factory=list, metadata=_column(written=True, number=True, dtype=torch.float32))
    seeds: list[Tensor] = field(
        default_factory=list, metadata=_column(written=False, number=True, optional=True, dtype=torch.int64)
    )
    places: list[Place] = field(default_factory=list)  # where the rows with a seed lie in the whole tensors
    kept_updates: list[Tensor] = field(default_factory=list)  # what `accumulate` may leave to `apply`: of all rows, or none
    is_small: bool = False  # none of the rows' parameters has more than SMALL elements
    is_complex: bool = False  # the tensors' last dim holds real and imaginary parts
    process_groups: Groups = ()  # over which the sums of all rows are added; none where nothing is sharded
    host_may_read: bool = True  # step counts and seeds; else they stay tensors, and nothing is read back
    grad_factor: float | Tensor = 1.0  # sign, clip coefficient and loss scale in one; 0-dim where a tensor
    skip: Tensor | None = None  # 0-dim bool: keep every old value
    why_eager: str | None = None  # why kernels cannot have the tensors, if they cannot
    is_guarded: bool = False  # keep the parameters whose norms are not finite

    def __len__(self) -> int:
        return len(self.params)

    @property
    def device(self) -> torch.device:
        """The device that all rows share."""
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float64 for float64 parameters, float32 for all others."""
        return torch.promote_types(self.params[0].dtype, torch.float32)

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Those of the columns that buckets differ in: parameters, gradients and moments, which each have one for all rows."""
        return [self.column(column)[0].dtype for column in COLUMNS if column.dtype is None]

    def column(self, column: Column) -> list[Tensor]:
        """Return the tensors of a column, none where it is left out."""
        return getattr(self, column.name)  # type: ignore[no-any-return]

    def check(self) -> None:
        """Raise if a step count is out of reach.

        Raises:
            RuntimeError: with the parameter's position in the optimizer
        """
        if self.steps[0].device not in (self.device, torch.device("cpu")):  # one device for all of them
            raise RuntimeError(f"the step of parameter {self.indices[0]} is on {self.steps[0].device}, and it on {self.device}")

    def new_sums(self) -> Tensor:
        """Return zeros (rows, SUMS), for what `accumulate` adds up."""
        return torch.zeros(len(self), len(SUMS), dtype=self.dtype, device=self.device)

    def centralized(self) -> Bucket:
        """Return it with centralized gradients, if that is asked for."""
        if not self.scalars.grad_centralization:
            return self
        return replace(self, grads=[self._centralized(g) for g in self.grads])

    def _centralized(self, grad: Tensor) -> Tensor:
        dims, grad = grad.dim() - self.is_complex, cast(grad, self.dtype)
        return rule.centralize(grad, dims) if dims >= 3 else grad

    def batches(self, elements: int) -> Iterator[tuple[slice, Bucket]]:
        """Cut into buckets of at most that many elements, or of one row where a single row is larger."""
        start, size = 0, 0
        for row, param in enumerate(self.params):
            if row > start and size + param.numel() > elements:
                yield slice(start, row), self._rows(slice(start, row))
                start, size = row, 0
            size += param.numel()
        yield slice(start, len(self)), self._rows(slice(start, len(self)))

    def _rows(self, rows: slice) -> Bucket:
        return replace(self, **{name: getattr(self, name)[rows] for name in _OF_ROWS})


COLUMNS = tuple(Column(f.name, *f.metadata["column"]) for f in fields(Bucket) if "column" in f.metadata)
_OF_ROWS = ("indices", *(column.name for column in COLUMNS), "places")
# Of a row in the making: its parameter's position, a tensor of each column, its place.
_PARAM, _STEP, _SEED = (_OF_ROWS.index(name) for name in ("params", "steps", "seeds"))

# By the names of COLUMNS, of the parameters of one group: None where an optional one is left out.
Columns = dict[str, list[Any]]


def new_columns() -> Columns:
    """Return an empty list for each column."""
    return {column.name: [] for column in COLUMNS}


def make_local_(columns_of_groups: Sequence[Columns]) -> None:
    """Replace DTensors by this process's shards."""
    params = [p for columns in columns_of_groups for p in columns["params"]]
    grads = iter(local_grads(params, [g for columns in columns_of_groups for g in columns["grads"]]))
    for columns in columns_of_groups:
        for name, tensors in columns.items():
            if name == "grads":
                columns[name] = [next(grads) for _ in tensors]
            else:
                columns[name] = [t if t is None or type(t) is Tensor else local(t) for t in tensors]


def sort_into_buckets(
    scalars: Scalars,
    columns: Columns,  # of local tensors
    indices: Sequence[int],  # positions of the parameters in the optimizer
    layouts: Sequence[Layout],  # of all the optimizer's parameters
    admissions: Sequence[Admission],  # to kernels, of each; none where all are admitted at once
    capturable: bool,
) -> list[Bucket]:
    """Return the parameters of one group in buckets of one device, size class, set of dtypes and of process groups.

    Those that kernels cannot have are apart, by reason, and those that share memory are never in one bucket.
    """
    rows_of: dict[tuple[object, ...], list[tuple[Any, ...]]] = {}
    dtypes = zip(*([t.dtype for t in columns[column.name]] for column in COLUMNS if column.dtype is None), strict=True)
    table = zip(indices, *columns.values(), strict=True)
    for row, row_dtypes, admission in zip(table, dtypes, admissions or itertools.repeat(None, len(indices)), strict=True):
        layout, param, seed = layouts[row[0]], row[_PARAM], row[_SEED]
        device = param.device
        small = param.numel() <= SMALL and device.type == "cpu"
        # Which optional columns there are follows from the group and the parameter's dtype.
        key = (small, device, row[_STEP].device, layout.groups, row_dtypes, admission)
        rows = rows_of.get(key)
        if rows is None:
            rows = rows_of[key] = []
        if layout.parts or seed is not None or param.is_complex():
            rows += _rows_of_parts(row, layout)
        else:
            rows.append((*row, None))
    return [_bucket(scalars, key, rows, capturable) for key, rows in rows_of.items()]


def _rows_of_parts(row: Sequence[Any], layout: Layout) -> Iterator[tuple[Any, ...]]:
    """Return a row for each part of a parameter: its position in the optimizer, a tensor of each column, and its place."""
    index, *tensors = row
    parts = [
        [t] * layout.rows if t is None or column.is_number else layout.cut(t)
        for column, t in zip(COLUMNS, tensors, strict=True)
    ]
    places = [None] * layout.rows if row[_SEED] is None else layout.places(row[_PARAM])
    return zip([index] * layout.rows, *parts, places, strict=True)


def _bucket(scalars: Scalars, key: tuple[Any, ...], rows: Sequence[tuple[Any, ...]], capturable: bool) -> Bucket:
    small, device, step_device, groups, (param_dtype, *_), admission = key
    names = (*(column.name for column in COLUMNS), "places")
    optional = {column.name for column in COLUMNS if column.optional} | {"places"}
    indices, *lists = map(list, zip(*rows, strict=True))
    columns: dict[str, Any] = {
        name: [] if name in optional and values[0] is None else values for name, values in zip(names, lists, strict=True)
    }
    return Bucket(
        scalars.on(device),
        indices,
        **columns,
        is_small=small,
        is_complex=param_dtype.is_complex,
        process_groups=groups,
        host_may_read=not capturable and step_device.type == "cpu" and is_plain(columns["steps"][0]),
        why_eager=None if admission is None else admission.why_not,
        grad_factor=-1.0 if scalars.maximize else 1.0,
    )


def sums_without_grad(
    plan: Plan, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Tensor]]
) -> dict[int, Tensor]:
    """Return, by position, what this process adds to the sums (parts, SUMS) of sharded parameters that have no gradient here.

    Frozen parameters are left out: no process has a gradient of them.
    """
    found: dict[int, Tensor] = {}
    params = [(p, group["master_weights"]) for group in groups for p in group["params"]]
    for index, ((p, masters), layout) in enumerate(zip(params, plan.layouts, strict=True)):
        if p.grad is None and p.requires_grad and layout.groups:
            dtype = torch.promote_types(p.dtype, torch.float32).to_real()
            shard, master = local(p.detach()), state[p].get("master") if masters and p in state else None
            parts = layout.cut(shard if master is None else weight(shard, local(master), dtype))
            found[index] = torch.zeros(len(parts), len(SUMS), dtype=dtype, device=shard.device)
            found[index][:, PARAM_SQ] = torch.stack(
                [rule.sum_of_squares([cast(x, dtype) for (x,) in pieces(t)]) for t in parts]
            )
    return found


def is_small(param: Tensor) -> bool:
    """Return whether a CPU steps the parameter faster together with others than alone."""
    return param.is_cpu and param.numel() <= SMALL
