"""What the kernels of every device are handed: one operator on lists of tensors, which `torch.compile` can put in a graph.

This room knows buckets and the rule's numbers. It must not know how kernels are found, called or written: cpu.py and gpu.py do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchlamb.bucket import Bucket
from torchlamb.rounding import memory_order

GRAD_SQ_NORMS, ACCUMULATE, APPLY, STEP = range(4)  # the functions of `torchlamb.backends.Backend`
BIAS_CORRECTION, GRAD_AVERAGING, LAYER_ADAPTATION, STOCHASTIC_ROUNDING, GUARDED = 1, 2, 4, 8, 16  # flags; rounds parameters

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of parameters and gradients; in C++, these positions stand for them


def why_not(dtypes: Sequence[torch.dtype]) -> str | None:
    """Return why kernels cannot step tensors of these dtypes, None if they can."""
    odd = [dtype for dtype in dtypes if dtype not in DTYPES]
    return f"they have no {str(odd[0]).removeprefix('torch.')}" if odd else None


class Call(NamedTuple):
    """The arguments of the operator `torchlamb::lamb_`, in its order; lists are of rows, and empty where there are none."""

    function: int
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    masters: list[Tensor]
    steps: list[Tensor]
    seeds: list[Tensor]
    starts: list[Tensor]  # of each row with a seed: those of its `Runs`, empty where there are none
    runs: list[int]  # and its first, length and stride
    out: Tensor  # (rows, 2) sums of squares that are read or written, (rows,) for those of gradients
    lr: Tensor
    grad_factor: Tensor
    skip: Tensor | None
    numbers: list[float]  # beta1, beta2, eps, weight_decay, and both bounds' low and high
    flags: int


def functions(run: Callable[[Call], None], *keys: str) -> list[Callable[[Bucket, Tensor], None]]:
    """Return the four functions of a backend, in the order of the numbers above.

    Args:
        run: calls a device's kernels
        keys: of torch's dispatcher, for which it becomes the operator
    """

    def lamb_(*arguments: Any) -> None:
        call = Call(*arguments)
        if any(g.is_neg() for g in call.grads):
            call = call._replace(grads=[g.resolve_neg() for g in call.grads])
        run(call)

    for key in keys:
        operators.impl("lamb_", lamb_, key)  # type: ignore[no-untyped-call]
    return [functools.partial(_call, lamb_, function) for function in (GRAD_SQ_NORMS, ACCUMULATE, APPLY, STEP)]


def _call(kernels: Callable[..., None], function: int, bucket: Bucket, out: Tensor) -> None:
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
    columns = [bucket.params, bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs, *([bucket.masters] if bucket.masters else [])]
    handed, copied = _alike(columns)
    params, grads, exp_avgs, exp_avg_sqs, *masters = handed
    runs = [place.runs(p) for place, p in zip(bucket.places, params, strict=True)] if bucket.seeds else []
    no_starts = torch.empty(0, dtype=torch.int64, device="cpu")
    compiling = torch.compiler.is_compiling()
    (torch.ops.torchlamb.lamb_ if compiling else kernels)(
        function,
        *(params, grads, exp_avgs, exp_avg_sqs, masters[0] if masters else [], bucket.steps, bucket.seeds),
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
    for row in copied:
        for column, originals in zip(handed, columns, strict=True):
            if column is not grads:
                originals[row].copy_(column[row])
    if function in (APPLY, STEP) and not compiling:
        torch.autograd.graph.increment_version(params)  # as operations in place do: a later backward is told


def _alike(columns: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[int]]:
    """Return the tensors, each row's in one dense layout, and the rows that had to be copied for that."""
    if all(t.is_contiguous() for column in columns for t in column):
        return columns, []
    copied = [row for row, tensors in enumerate(zip(*columns, strict=True)) if not _lie_alike(tensors)]
    handed = [list(column) for column in columns]
    for column in handed:
        for row in copied:
            column[row] = column[row].clone(memory_format=torch.contiguous_format)
    return handed, copied


def _lie_alike(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    dense = first.permute(memory_order(first)).is_contiguous()
    return dense and all(t.stride() == first.stride() for t in tensors)


operators = torch.library.Library("torchlamb", "DEF")  # type: ignore[no-untyped-call]
operators.define(  # type: ignore[no-untyped-call]
    "lamb_(int function, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] masters, Tensor(e!)[] steps, Tensor[] seeds, Tensor[] starts, int[] runs, Tensor(f!) out, Tensor lr, "
    "Tensor grad_factor, Tensor? skip, float[] numbers, int flags) -> ()"
)


@torch.library.register_fake("torchlamb::lamb_", lib=operators)  # type: ignore[untyped-decorator]
def _fake(*_: object) -> None:
    return None
