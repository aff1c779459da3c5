"""The CPU's kernels: C++ in csrc/, which walks memory as seldom as the rule allows, on torch's own threads.

This file finds the library and hands over the addresses of tensors. It must not know of groups; the arithmetic is in
csrc/kernels.cpp, which follows `torchlamb.rule` and is held to it by tests.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import math
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchlamb.bucket import Bucket
from torchlamb.rounding import memory_order

ABI = 1
ISAS = ("baseline", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

COUNTS_STEPS = True  # see `torchlamb.backends.Backend`

_GRAD_SQ_NORMS, _ACCUMULATE, _APPLY, _STEP = range(4)
_FUNCTIONS = ("torchlamb_grad_sq_norms", "torchlamb_accumulate", "torchlamb_apply", "torchlamb_step")
_BIAS_CORRECTION, _GRAD_AVERAGING, _LAYER_ADAPTATION, _STOCHASTIC_ROUNDING = 1, 2, 4, 8


class _Runs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("first", "starts", "length", "stride")]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sizes", "params", "grads", "exp_avgs", "exp_avg_sqs")),
        *((name, ctypes.c_void_p) for name in ("masters", "steps", "seeds", "runs")),
        *((f"{name}_dtype", ctypes.c_int64) for name in ("param", "grad", "exp_avg", "exp_avg_sq")),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps", "weight_decay")),
        *((name, ctypes.c_double) for name in ("phi_low", "phi_high", "ratio_low", "ratio_high")),
        ("flags", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("lr", "grad_factor", "skip")),
    ]


class _Library:
    """The loaded kernels. `isa` is the instruction set in use, `why_not` what is said where they cannot be had."""

    def __init__(self) -> None:
        self.isa = ""
        self.why_not = "they are not loaded yet"
        self.functions: Sequence[ctypes._NamedFuncPointer] = ()
        self.parallel_for: int | None = None
        self.forked = False
        self.is_loaded = False

    def load(self) -> None:
        """Load them, once; the reason is kept where that fails.

        Raises:
            ValueError: TORCHLAMB_CPU_ISA is not one of `ISAS`
        """
        if self.is_loaded:
            return
        try:
            self._load()
        except OSError as error:
            self.why_not = f"they cannot be loaded: {error}"
        self.is_loaded = True

    def forget_threads(self) -> None:
        """Run on one thread from now on: torch's others are not in a forked child, and waiting for them would never end."""
        self.forked, self.parallel_for = True, None

    def _load(self) -> None:
        highest = os.environ.get("TORCHLAMB_CPU_ISA", ISAS[-1])
        if highest not in ISAS:
            raise ValueError(f"TORCHLAMB_CPU_ISA must be one of {', '.join(ISAS)}, got {highest!r}")
        torch_library = next(iter((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")), None)
        parallel_for = torch_library and getattr(ctypes.CDLL(str(torch_library)), "torch_parallel_for", None)
        if parallel_for is None:
            self.why_not = f"torch {torch.__version__} does not share its threads"
            return
        path = importlib.resources.files("torchlamb.backends").joinpath("libtorchlamb_cpu.so")
        if not path.is_file():
            self.why_not = "they were not built, for want of a C++ compiler, when torchlamb was installed"
            return
        kernels = ctypes.CDLL(str(path))
        if kernels.torchlamb_abi() != ABI:
            self.why_not = "they were built for another version of torchlamb; install it again"
            return
        kernels.torchlamb_set_isa.restype = ctypes.c_char_p
        self.isa = kernels.torchlamb_set_isa(highest.encode()).decode()
        self.functions = [getattr(kernels, name) for name in _FUNCTIONS]
        self.parallel_for = None if self.forked else ctypes.cast(parallel_for, ctypes.c_void_p).value  # type: ignore[arg-type]


library = _Library()
if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=library.forget_threads)


def why_not(dtypes: Sequence[torch.dtype]) -> str | None:
    """Return why tensors of these dtypes cannot be stepped by the kernels, None if they can."""
    if not library.isa:
        return library.why_not
    odd = [dtype for dtype in dtypes if dtype not in DTYPES]
    return f"they have no {str(odd[0]).removeprefix('torch.')}" if odd else None


def grad_sq_norms(bucket: Bucket, out: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    _call(_GRAD_SQ_NORMS, bucket, out)


def accumulate(bucket: Bucket, sq_norms: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    _call(_ACCUMULATE, bucket, sq_norms)


def apply(bucket: Bucket, sq_norms: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    _call(_APPLY, bucket, sq_norms)


def step(bucket: Bucket, sq_norms: Tensor) -> None:
    """Do `accumulate` and `apply` for a few rows at a time, walking back over what is still in cache."""
    _call(_STEP, bucket, sq_norms)


def _call(function: int, bucket: Bucket, out: Tensor) -> None:
    s = bucket.scalars
    phi, ratio = s.phi_bounds or (0.0, math.inf), s.trust_ratio_bounds or (0.0, math.inf)
    flags = (
        _BIAS_CORRECTION * s.bias_correction
        | _GRAD_AVERAGING * s.grad_averaging
        | _LAYER_ADAPTATION * s.layer_adaptation
        | _STOCHASTIC_ROUNDING * (s.stochastic_rounding and not bucket.masters and bucket.params[0].dtype == torch.bfloat16)
    )
    columns = [bucket.params, bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs, *([bucket.masters] if bucket.masters else [])]
    handed, copied = _alike(columns)
    params, grads, exp_avgs, exp_avg_sqs, *masters = handed
    runs = [place.runs(p) for place, p in zip(bucket.places, params, strict=True)] if bucket.seeds else []
    no_starts = torch.empty(0, dtype=torch.int64)
    call = torch.ops.torchlamb.cpu_lamb_ if torch.compiler.is_compiling() else _lamb_
    call(
        function,
        *(params, grads, exp_avgs, exp_avg_sqs, masters[0] if masters else [], bucket.steps, bucket.seeds),
        [no_starts if run.starts is None else run.starts for run in runs],
        [number for run in runs for number in (run.first, run.length, run.stride)],
        out,
        torch.as_tensor(s.lr, dtype=torch.float64),
        torch.as_tensor(bucket.grad_factor, dtype=torch.float32),
        bucket.skip,
        [s.beta1, s.beta2, s.eps, s.weight_decay, *phi, *ratio],
        flags,
    )
    for row in copied:
        for column, originals in zip(handed, columns, strict=True):
            if column is not grads:
                originals[row].copy_(column[row])


def _lamb_(
    function: int,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    seeds: list[Tensor],
    starts: list[Tensor],  # of each row with a seed: those of its `Runs`, empty where there are none
    runs: list[int],  # and its first, length and stride
    out: Tensor,
    lr: Tensor,
    grad_factor: Tensor,
    skip: Tensor | None,
    numbers: list[float],
    flags: int,
) -> None:
    """Call a kernel with the tensors' addresses."""
    if any(g.is_neg() for g in grads):
        grads = [g.resolve_neg() for g in grads]
    sizes = [p.numel() for p in params]
    lengths = array("q", sizes)
    tensors = [_addresses(column) for column in (params, grads, exp_avgs, exp_avg_sqs)]
    others = [_addresses(column) if column else None for column in (masters, steps, seeds)]
    table = (_Runs * len(seeds))(
        *(_Runs(runs[3 * i], start.data_ptr(), *runs[3 * i + 1 : 3 * i + 3]) for i, start in enumerate(starts))
    )
    rows = _Rows(
        len(params),
        lengths.buffer_info()[0],
        *(None if addresses is None else addresses.buffer_info()[0] for addresses in (*tensors, *others)),
        ctypes.addressof(table) if seeds else None,
        *(DTYPES[column[0].dtype] for column in (params, grads, exp_avgs, exp_avg_sqs)),
    )
    options = _Options(*numbers, flags, lr.data_ptr(), grad_factor.data_ptr(), None if skip is None else skip.data_ptr())
    error = library.functions[function](
        ctypes.byref(rows), ctypes.byref(options), ctypes.c_void_p(library.parallel_for), ctypes.c_void_p(out.data_ptr())
    )
    if function in (_APPLY, _STEP):
        torch.autograd.graph.increment_version(params)  # as operations in place do: a later backward is told
    if error:
        raise RuntimeError("torch_parallel_for failed; what the step has done until then stays")


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


def _addresses(tensors: list[Tensor]) -> array[int]:
    return array("Q", [t.data_ptr() for t in tensors])


_ops = torch.library.Library("torchlamb", "DEF")  # type: ignore[no-untyped-call]
_ops.define(  # type: ignore[no-untyped-call]
    "cpu_lamb_(int function, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] masters, Tensor(e!)[] steps, Tensor[] seeds, Tensor[] starts, int[] runs, Tensor(f!) out, Tensor lr, "
    "Tensor grad_factor, Tensor? skip, float[] numbers, int flags) -> ()"
)
_ops.impl("cpu_lamb_", _lamb_, "CPU")  # type: ignore[no-untyped-call]


@torch.library.register_fake("torchlamb::cpu_lamb_", lib=_ops)  # type: ignore[untyped-decorator]
def _fake(*_: object) -> None:
    return None
