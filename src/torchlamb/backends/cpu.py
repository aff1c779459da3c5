"""The CPU's kernels: C++ in csrc/, which walks memory as seldom as the rule allows, on torch's own threads.

This file finds the library and hands over the addresses of tensors. It must not know of groups; the arithmetic is in
csrc/kernels.cpp, which follows `torchlamb.rule` and is held to it by tests.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import torchlamb.backends.fused as fused
from torchlamb.bucket import COLUMNS, Bucket

ABI = 2
ISAS = ("baseline", "avx2", "avx512")

# In the order of `fused.GRAD_SQ_NORMS` and so on.
_FUNCTIONS = ("torchlamb_grad_sq_norms", "torchlamb_accumulate", "torchlamb_apply", "torchlamb_step")


class _Runs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("first", "starts", "length", "stride")]


_TYPED = [column.name for column in COLUMNS if column.dtype is None]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sizes", *(column.name for column in COLUMNS), "runs")),
        *((f"{name.removesuffix('s')}_dtype", ctypes.c_int64) for name in _TYPED),
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
    return fused.why_not(dtypes) if library.isa else library.why_not


def _run(call: fused.Call) -> None:
    """Call a kernel with the tensors' addresses."""
    lengths = array("q", [p.numel() for p in call.params])
    addresses = [_addresses(column) for column in call.columns.values()]
    table = (_Runs * len(call.starts))(
        *(_Runs(call.runs[3 * i], start.data_ptr(), *call.runs[3 * i + 1 : 3 * i + 3]) for i, start in enumerate(call.starts))
    )
    rows = _Rows(
        len(call.params),
        lengths.buffer_info()[0],
        *(column.buffer_info()[0] if column else None for column in addresses),
        ctypes.addressof(table) if call.starts else None,
        *(fused.DTYPES.index(call.columns[name][0].dtype) for name in _TYPED),
    )
    lr, grad_factor, skip = call.lr.double(), call.grad_factor.float(), call.skip
    options = _Options(
        *(*call.numbers, call.flags),
        *(lr.data_ptr(), grad_factor.data_ptr(), None if skip is None else skip.data_ptr()),
    )
    error = library.functions[call.function](
        *(ctypes.byref(rows), ctypes.byref(options)),
        *(ctypes.c_void_p(library.parallel_for), ctypes.c_void_p(call.out.data_ptr())),
    )
    if error:
        raise RuntimeError("torch_parallel_for failed; what the step has done until then stays")


def _addresses(tensors: list[Tensor]) -> array[int]:
    return array("Q", [t.data_ptr() for t in tensors])


_kernels = fused.kernels(_run, "CPU")


def grad_sq_norms(bucket: Bucket, out: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    fused.call(_kernels, fused.GRAD_SQ_NORMS, bucket, out)


def accumulate(bucket: Bucket, sums: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    fused.call(_kernels, fused.ACCUMULATE, bucket, sums)


def apply(bucket: Bucket, sums: Tensor) -> None:
    """See `torchlamb.backends.Backend`."""
    fused.call(_kernels, fused.APPLY, bucket, sums)


def step(bucket: Bucket, sums: Tensor) -> None:
    """Do `accumulate` and `apply` for a few rows at a time, walking back over what is still in cache."""
    fused.call(_kernels, fused.STEP, bucket, sums)
