"""The GPU's kernels: some launches for all tensors of a bucket, however many, and nothing that the host waits for.

This file finds Triton, writes the table of addresses and launches. It must not know of groups; the arithmetic is in
gpu_kernels.py, which follows `torchlamb.rule` and is held to it by tests.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate as running_sums
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import torchlamb.backends.fused as fused
from torchlamb.bucket import COLUMNS, Bucket
from torchlamb.rule import SUMS

DEVICES = ("cuda", "xpu")  # torch calls AMD's GPUs cuda, too
OLDEST = (8, 0)  # of NVIDIA's compute capabilities that Triton serves

# Whether `step` is one launch. No test on a CPU can find a mistake in how its programs wait for each other: it stays off until
# benchmarks/gpu_check.py has passed on a GPU.
ONE_LAUNCH = False
WINDOW = 2**20  # elements that it accumulates ahead of those it applies; not measured


class _Kernels:
    """The module gpu_kernels, once there is a GPU, and why it cannot be had."""

    def __init__(self) -> None:
        self.module: Any = None
        self.reasons: dict[torch.device, str | None] = {}

    def load(self) -> None:
        """Load them, if that has not been done.

        Raises:
            ImportError: there is no Triton
        """
        if self.module is None:
            self.module = importlib.import_module("torchlamb.backends.gpu_kernels")

    def why_not(self, device: torch.device) -> str | None:
        """Return why they cannot be launched on the device, None if they can."""
        if device not in self.reasons:
            self.reasons[device] = self._why_not(device)
        return self.reasons[device]

    def _why_not(self, device: torch.device) -> str | None:
        if torch.version.cuda is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
            return f"Triton needs a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer"
        try:
            self.load()
            if torch.accelerator.is_available():
                self.module.find_launcher()
        except ImportError as error:
            return f"Triton cannot be imported ({error}); install it with: pip install 'torchlamb[gpu]'"
        except Exception as error:  # of whatever kind: torch's operations serve as well
            return f"Triton cannot launch any ({error})"
        return None


kernels = _Kernels()


def why_not(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Return why tensors of these dtypes on this device cannot be stepped by the kernels, None if they can."""
    if device.type not in DEVICES:
        return f"there are none for {device.type}"
    return kernels.why_not(device) or fused.why_not(dtypes)


def _run(call: fused.Call) -> None:
    """Launch the kernels of a function on the tensors' device."""
    k, device, rows, skip, out = kernels.module, call.params[0].device, len(call.params), call.skip, call.out
    function, flags, columns = call.function, call.flags, call.columns
    chunks = _Chunks([p.numel() for p in call.params], _are_aligned(columns), k.CHUNK.value)
    beta1, beta2, eps, weight_decay, *bounds = map(float, call.numbers)  # Triton would compile anew for an int
    kinds = k.Kinds(
        *(k.TYPES[columns[column.name][0].dtype] for column in COLUMNS if column.dtype is None),
        masters=bool(columns["masters"]),
        rounds_params=bool(flags & fused.STOCHASTIC_ROUNDING),
        bias_correction=bool(flags & fused.BIAS_CORRECTION),
        grad_averaging=bool(flags & fused.GRAD_AVERAGING),
        layer_adaptation=bool(flags & fused.LAYER_ADAPTATION),
        decays=weight_decay != 0,
        guarded=bool(flags & fused.GUARDED),
    )
    scalars = k.Numbers(
        *(n.item() if _is_number(n, device) else n for n in (call.lr, call.grad_factor)),
        *(beta1, beta2, 1 - beta1, 1 - beta2),
        *(math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)),
        *(eps, weight_decay, *bounds),
    )
    with _on(device):
        table = _to_device(_table(chunks, call), device)
        partials = torch.empty(chunks.count, len(SUMS), dtype=torch.float32, device=device)

        def launch(kernel: Any, *arguments: Any) -> None:
            for full, programs in ((True, chunks.full_firsts[-1]), (False, chunks.rest_firsts[-1])):
                if programs:
                    kernel[(programs,)](table, rows, kinds, *arguments, full, **k.OPTIONS)

        if function == fused.GRAD_SQ_NORMS:
            launch(k.grad_sq_norms, partials)
            k.add_partials[(rows,)](table, rows, None, partials, out, 1, False, **k.OPTIONS)
        elif function == fused.STEP and ONE_LAUNCH and chunks.count:
            order, segments, tickets = _order(chunks)
            counters = torch.zeros(2 + 2 * rows, dtype=torch.int32, device=device)
            k.step[(tickets,)](
                *(table, rows, kinds, scalars, skip, partials, out, _to_device(order, device), segments, tickets, counters),
                **k.OPTIONS,
            )
        else:
            if function in (fused.ACCUMULATE, fused.STEP):
                launch(k.accumulate, scalars, skip, partials)
                k.add_partials[(rows,)](table, rows, skip, partials, out, len(SUMS), True, **k.OPTIONS)
            if function in (fused.APPLY, fused.STEP):
                launch(k.apply, scalars, skip, out)


_kernels = fused.kernels(_run, "CUDA", "XPU")


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
    """Do with one table, or with one launch, what `accumulate` and `apply` do."""
    fused.call(_kernels, fused.STEP, bucket, sums)


def _is_number(n: Tensor, device: torch.device) -> bool:
    # For the interpreter, whose device is the CPU, a number of the caller is float64; other tensors stand for a GPU's.
    return n.is_cpu and (device.type != "cpu" or n.dtype == torch.float64)


# The table: see gpu_kernels.py.


class _Chunks:
    """How rows are cut: full chunks of aligned rows, which are numbered apart, and the rest."""

    def __init__(self, sizes: list[int], aligned: list[bool], chunk: int) -> None:
        full = [size // chunk if row_aligned else 0 for size, row_aligned in zip(sizes, aligned, strict=True)]
        self.sizes = sizes
        self.counts = [-(-size // chunk) for size in sizes]  # of both kinds
        self.count = sum(self.counts)
        self.full_firsts = [0, *running_sums(full)]
        self.rest_firsts = [0, *running_sums(count - f for count, f in zip(self.counts, full, strict=True))]


def _are_aligned(columns: dict[str, list[Tensor]]) -> list[bool]:
    of_elements = [columns[column.name] for column in COLUMNS if not column.is_number and columns[column.name]]
    addresses = zip(*([t.data_ptr() for t in column] for column in of_elements), strict=True)
    return [all(address % 16 == 0 for address in row) for row in addresses]


def _table(chunks: _Chunks, call: fused.Call) -> array[int]:
    """Return the table that the kernels read."""
    rows, steps, starts, runs = len(chunks.sizes), call.columns["steps"], call.starts, call.runs
    counts = [row == 0 or step is not steps[row - 1] for row, step in enumerate(steps)]
    none = [0] * rows
    addresses = [[t.data_ptr() for t in column] if column else none for column in call.columns.values()]
    end = 2 * (rows + 1) + kernels.module.FIELDS.value * rows
    ends = list(running_sums((len(start) for start in starts), initial=end))
    places = [place if len(start) else 0 for place, start in zip(ends, starts, strict=False)] if starts else none
    firsts, lengths, strides = (runs[0::3], runs[1::3], runs[2::3]) if runs else (none, none, none)
    records = zip(chunks.sizes, *addresses, counts, firsts, places, lengths, strides, strict=True)
    table = array("q", chain(chunks.full_firsts, chunks.rest_firsts, chain.from_iterable(records)))
    for start in starts:
        table.frombytes(start.numpy().tobytes())
    return table


def _order(chunks: _Chunks) -> tuple[array[int], int, int]:
    """Return the order of the one launch, with the number of its segments and tickets: see `gpu_kernels.step`."""
    segments = []
    waiting: list[int] = []  # rows that are accumulated, and to be applied after those of the next window
    for window in _windows(chunks.sizes):
        segments += [(row, 0) for row in window]
        segments += [(row, 1) for row in reversed(waiting)]
        waiting = window
    segments += [(row, 1) for row in reversed(waiting)]
    firsts = list(running_sums((chunks.counts[row] for row, _ in segments), initial=0))
    return array("q", chain(firsts, chain.from_iterable(segments))), len(segments), firsts[-1]


def _windows(sizes: list[int]) -> Iterator[list[int]]:
    window: list[int] = []
    elements = 0
    for row, size in enumerate(sizes):
        if window and elements + size > WINDOW:
            yield window
            window, elements = [], 0
        window.append(row)
        elements += size
    yield window


# Memory.


class _Pinned:
    """Memory of the host that the device reads by itself, so that a copy from it stops nobody.

    A graph reads it again whenever it is replayed, and must not allocate any while it is captured: what graphs take is cut from
    a reserve that is made before, and never given back.
    """

    RESERVED = 16  # times the largest table so far: what can be captured before there is another step outside of a graph

    def __init__(self) -> None:
        self.reserve = torch.empty(0, dtype=torch.int64, device="cpu")
        self.captured: list[Tensor] = []

    def take(self, count: int) -> Tensor:
        """Return memory for that many int64."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            if count > len(self.reserve):
                raise RuntimeError("no more can be captured in a graph now; take a step outside of one before, and between two")
            self.captured.append(self.reserve[:count])
            self.reserve = self.reserve[count:]
            return self.captured[-1]
        if len(self.reserve) < self.RESERVED // 2 * count:
            self.reserve = torch.empty(self.RESERVED * count, dtype=torch.int64, device="cpu", pin_memory=True)
        return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=True)


_pinned = _Pinned()


def _to_device(numbers: array[int], device: torch.device) -> Tensor:
    host = torch.frombuffer(numbers, dtype=torch.int64)
    if device.type == "cpu":
        return host
    return _pinned.take(len(host)).copy_(host).to(device, non_blocking=True)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which launches go to the device. The interpreter's is the CPU."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)
