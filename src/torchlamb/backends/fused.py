"""What the kernels of every device are handed: one operator on lists of tensors, which `torch.compile` can put in a graph.

This room knows buckets and the rule's numbers. It must not know how kernels are found, called or written: cpu.py and gpu.py do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from string import ascii_lowercase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchlamb.bucket import COLUMNS, Bucket
from torchlamb.sharding.place import memory_order

GRAD_SQ_NORMS, ACCUMULATE, APPLY, STEP = range(4)  # the functions of `torchlamb.backends.Backend`
BIAS_CORRECTION, GRAD_AVERAGING, LAYER_ADAPTATION, STOCHASTIC_ROUNDING, GUARDED = 1, 2, 4, 8, 16  # flags; rounds parameters

_OF_ELEMENTS = tuple(column for column in COLUMNS if not column.is_number)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of parameters and gradients; in C++, these positions stand for them


def why_not(dtypes: Sequence[torch.dtype]) -> str | None:
    """Return why kernels cannot step tensors of these dtypes, None if they can."""
    odd = [dtype for dtype in dtypes if dtype not in DTYPES]
    return f"they have no {str(odd[0]).removeprefix('torch.')}" if odd else None


class Call(NamedTuple):
    """The arguments of the operator `torchlamb::lamb_`."""

    function: int
    columns: dict[str, list[Tensor]]  # by the names of `bucket.COLUMNS`, empty where there are none
    starts: list[Tensor]  # of each row with a seed: those of its `Runs`, empty where there are none
    runs: list[int]  # and its first, length and stride
    out: Tensor  # (rows, SUMS) that is read or written, (rows,) for squares of gradients
    lr: Tensor
    grad_factor: Tensor
    skip: Tensor | None
    numbers: list[float]  # beta1, beta2, eps, weight_decay, and both bounds' low and high
    flags: int

    @property
    def params(self) -> list[Tensor]:
        """The rows' parameters."""
        return self.columns["params"]


def _schema() -> str:
    """Return that of the operator, which has an argument for each column in place of all of them."""
    written = iter(ascii_lowercase)
    columns = [f"Tensor{f'({next(written)}!)' if column.written else ''}[] {column.name}" for column in COLUMNS]
    return (
        f"lamb_(int function, {', '.join(columns)}, Tensor[] starts, int[] runs, Tensor({next(written)}!) out, Tensor lr, "
        "Tensor grad_factor, Tensor? skip, float[] numbers, int flags) -> ()"
    )


operators = torch.library.Library("torchlamb", "DEF")  # type: ignore[no-untyped-call]
operators.define(_schema())  # type: ignore[no-untyped-call]


@torch.library.register_fake("torchlamb::lamb_", lib=operators)  # type: ignore[untyped-decorator]
def _fake(*_: object) -> None:
    return None


def kernels(run: Callable[[Call], None], *keys: str) -> Callable[..., None]:
    """Return what a backend hands to `call`: its kernels, with the arguments of the operator.

    Args:
        run: calls a device's kernels
        keys: of torch's dispatcher, for which it becomes the operator
    """

    def lamb_(function: int, *arguments: Any) -> None:
        count = len(COLUMNS)
        columns = dict(zip((column.name for column in COLUMNS), arguments[:count], strict=True))
        if any(g.is_neg() for g in columns["grads"]):
            columns["grads"] = [g.resolve_neg() for g in columns["grads"]]
        run(Call(function, columns, *arguments[count:]))

    for key in keys:
        operators.impl("lamb_", lamb_, key)  # type: ignore[no-untyped-call]
    return lamb_


def call(lamb_: Callable[..., None], function: int, bucket: Bucket, out: Tensor) -> None:
    """Call the kernels on a bucket, or leave the call to a graph that is being compiled."""
    s = bucket.scalars
    phi, ratio = s.phi_bounds or (0.0, math.inf), s.trust_ratio_bounds or (0.0, math.inf)
    flags = (
        BIAS_CORRECTION * s.bias_correction
        | GRAD_AVERAGING * s.grad_averaging
        | LAYER_ADAPTATION * s.layer_adaptation
        | GUARDED * bucket.is_guarded
        | STOCHASTIC_ROUNDING * (s.stochastic_rounding and not bucket.masters and bucket.params[0].dtype == torch.bfloat16)
    )
    columns = {column.name: bucket.column(column) for column in COLUMNS}
    handed, copied = _alike(columns)
    runs = [place.runs(p) for place, p in zip(bucket.places, handed["params"], strict=bool(bucket.places))]
    no_starts = torch.empty(0, dtype=torch.int64, device="cpu")
    compiling = torch.compiler.is_compiling()
    (torch.ops.torchlamb.lamb_ if compiling else lamb_)(
        function,
        *handed.values(),
        [no_starts if run.starts is None else run.starts for run in runs],
        [number for run in runs for number in (run.first, run.length, run.stride)],
        out,
        *(
            n if isinstance(n, Tensor) else torch.tensor(n, dtype=torch.float64, device="cpu")
            for n in (s.lr, bucket.grad_factor)
        ),
        bucket.skip,
        [s.beta1, s.beta2, s.eps, s.weight_decay, *phi, *ratio],
        flags,
    )
    for column in _OF_ELEMENTS:
        for row in copied if column.written and columns[column.name] else ():
            columns[column.name][row].copy_(handed[column.name][row])
    if function in (APPLY, STEP) and not compiling:
        torch.autograd.graph.increment_version(handed["params"])  # as operations in place do: a later backward is told


def _alike(columns: dict[str, list[Tensor]]) -> tuple[dict[str, list[Tensor]], list[int]]:
    """Return the columns with each row's tensors in one dense layout, and the rows that had to be copied for that."""
    elements = [columns[column.name] for column in _OF_ELEMENTS if columns[column.name]]
    if all(t.is_contiguous() for column in elements for t in column):
        return columns, []
    copied = [row for row, tensors in enumerate(zip(*elements, strict=True)) if not _lie_alike(tensors)]
    handed = dict(columns)
    for column in _OF_ELEMENTS if copied else ():
        handed[column.name] = list(columns[column.name])
        for row in copied if columns[column.name] else ():
            handed[column.name][row] = handed[column.name][row].clone(memory_format=torch.contiguous_format)
    return handed, copied


def _lie_alike(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    dense = first.permute(memory_order(first)).is_contiguous()
    return dense and all(t.stride() == first.stride() for t in tensors)
