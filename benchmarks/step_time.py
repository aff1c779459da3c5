"""How long a step takes: ours, torch's AdamW, every other LAMB that is installed, and moving the memory alone; in one run.

    make bench                                  # BERT-base and 400 tiny tensors; rows appended to benchmarks/results.csv
    python benchmarks/step_time.py --help

The contestants take turns, so that a slow minute of the machine slows all of them; compare ratios, not times. They share
parameters and gradients, and each has its own moments. Other LAMBs run where they can be imported: timm, pytorch_optimizer,
torch_optimizer, optax. On a CPU two floors run along: loops over the same memory with hardly any arithmetic (floors.cpp).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from shapes import SHAPES, Shapes

import torchlamb
from torchlamb.backends import cpu

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
FP32, BF16 = torch.float32, torch.bfloat16


class Stepper(Protocol):
    def step(self) -> Any: ...


Make = Callable[[list[torch.nn.Parameter]], Stepper]


class Contestant(NamedTuple):
    make: Make
    dtype: torch.dtype = FP32  # of the parameters and gradients
    moments: int = 8  # bytes for each parameter, and those of a master with it
    exact: bool = True  # follows the rule, so that its error can be given


def lamb(**options: Any) -> Make:
    return lambda p: torchlamb.Lamb(p, **OPTIONS, **options)


def adamw(**options: Any) -> Make:
    return lambda p: torch.optim.AdamW(p, **OPTIONS, **options)


def contestants() -> dict[str, Contestant]:
    """Every optimizer that can be had here, with its rule set to the paper's where it has a choice."""
    found = {
        "torchlamb": Contestant(lamb()),
        "torchlamb max_grad_norm": Contestant(lamb(max_grad_norm=1.0), exact=False),
        "torchlamb fused=False": Contestant(lamb(fused=False)),
        "torchlamb foreach": Contestant(lamb(foreach=True)),
        "torchlamb bf16 state": Contestant(lamb(state_dtype=BF16), moments=4, exact=False),
        "torchlamb bf16": Contestant(lamb(), BF16, exact=False),
        "torchlamb bf16 stochastic": Contestant(lamb(stochastic_rounding=True), BF16, exact=False),
        "torchlamb bf16 masters": Contestant(lamb(master_weights=True), BF16, 12, exact=False),
        "torchlamb bf16 stochastic, bf16 state": Contestant(
            lamb(stochastic_rounding=True, state_dtype=BF16), BF16, 4, exact=False
        ),
        "torchlamb bf16 masters, bf16 state": Contestant(lamb(master_weights=True, state_dtype=BF16), BF16, 8, exact=False),
        "AdamW fused": Contestant(adamw(fused=True), exact=False),
        "AdamW foreach": Contestant(adamw(foreach=True), exact=False),
    }
    timm = import_alone("timm", "timm.optim", "timm.optim.lamb")
    if timm:
        paper = {**OPTIONS, "max_grad_norm": None, "always_adapt": True}
        found[f"timm {version('timm')} single"] = Contestant(lambda p: timm.Lamb(p, **paper, foreach=False))
        found[f"timm {version('timm')} foreach"] = Contestant(lambda p: timm.Lamb(p, **paper, foreach=True))
    for name in ("pytorch_optimizer", "torch_optimizer"):
        if importlib.util.find_spec(name):
            module = importlib.import_module(name)
            found[f"{name} {version(name)}"] = Contestant(lambda p, module=module: module.Lamb(p, **OPTIONS))
    if importlib.util.find_spec("optax"):
        found[f"optax {version('optax')}"] = Contestant(Optax, exact=False)
    return found


class Optax:
    """optax's LAMB, compiled by XLA, on copies of the parameters and gradients."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        import jax
        import optax

        o = OPTIONS
        rule = optax.lamb(o["lr"], b1=o["betas"][0], b2=o["betas"][1], eps=o["eps"], weight_decay=o["weight_decay"])

        def update(grads: Any, state: Any, arrays: Any) -> Any:
            updates, state = rule.update(grads, state, arrays)
            return optax.apply_updates(arrays, updates), state

        self.arrays = [jax.numpy.array(p.detach().numpy()) for p in params]
        self.grads = [jax.numpy.array(p.grad.numpy()) for p in params]
        self.state = rule.init(self.arrays)
        self.update = jax.jit(update, donate_argnums=(1, 2))
        self.wait = jax.block_until_ready

    def step(self) -> None:
        self.arrays, self.state = self.wait(self.update(self.grads, self.state, self.arrays))


class Floor:
    """A loop of floors.cpp over each parameter, its gradient and two moments, on torch's threads."""

    def __init__(self, name: str, params: list[torch.nn.Parameter]) -> None:
        self.run = getattr(floors(), name)
        self.parallel_for = ctypes.c_void_p(cpu.library.parallel_for)
        # Own parameters and small gradients: these loops diverge if they are run often.
        self.tensors([p.detach().clone(), torch.full_like(p, 1e-9), torch.zeros_like(p), torch.zeros_like(p)] for p in params)

    def tensors(self, fours: Iterable[list[torch.Tensor]]) -> None:
        self.kept = list(fours)
        self.arguments = [((ctypes.c_void_p * 4)(*(t.data_ptr() for t in four)), four[0].numel()) for four in self.kept]

    def step(self) -> None:
        for tensors, size in self.arguments:
            self.run(tensors, ctypes.c_int64(size), self.parallel_for)


FLOORS = {
    "floor: 28 bytes in one pass": Contestant(functools.partial(Floor, "floor_28"), exact=False),
    "floor: 40 bytes in two passes": Contestant(functools.partial(Floor, "floor_40"), exact=False),
}


@functools.cache
def floors() -> ctypes.CDLL | None:
    """Build and load floors.cpp; None without a compiler or torch's threads."""
    cpu.library.load()
    compiler = shutil.which("c++")
    if compiler is None or cpu.library.parallel_for is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", HERE / "floors.cpp", "-o", f"{folder}/floors.so"]
        subprocess.run(command, check=True)
        return ctypes.CDLL(f"{folder}/floors.so")


def import_alone(package: str, subpackage: str, module: str) -> types.ModuleType | None:
    """Import one module without the packages above it: timm's own import needs a torchvision that fits torch."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    for name, path in ((package, folder), (subpackage, folder / subpackage.rpartition(".")[2])):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    return importlib.import_module(module)


def version(package: str) -> str:
    return importlib.metadata.version(package)


def make_params(shapes: Shapes, device: str, dtype: torch.dtype = FP32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device, dtype)) for shape in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 0.01).to(device, dtype)
    return params


def measure(entered: dict[str, Contestant], shapes: Shapes, rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds per step, `rounds` of them for each, after one that creates the state."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    params = {dtype: make_params(shapes, device, dtype) for dtype in {c.dtype for c in entered.values()}}
    steppers = {name: contestant.make(params[contestant.dtype]) for name, contestant in entered.items()}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    shuffled = random.Random(0)
    for turn in range(rounds + 1):
        # In another order each time: a neighbour whose threads are still spinning slows the one that follows.
        for name, stepper in shuffled.sample(list(steppers.items()), len(steppers)):
            synchronize()
            start = time.perf_counter()
            stepper.step()
            synchronize()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def peak_memory(name: str, shapes: str) -> float | None:
    """MiB that a step needs beyond parameters, gradients and state, in a process of its own; Linux with glibc only."""
    command = [sys.executable, __file__, "--peak-of", name, "--shapes", shapes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    return float(done.stdout) if done.returncode == 0 else None


def own_peak_memory(contestant: Contestant, shapes: Shapes) -> float:
    optimizer = contestant.make(make_params(shapes, "cpu", contestant.dtype))
    optimizer.step()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back to the system, so that using it again counts
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    optimizer.step()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def largest_error(make: Make) -> float:
    """Distance to the float64 reference after 5 float32 steps, as a share of the distance walked."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from cases import DEFAULTS
    from reference import Reference

    params = make_params([(64, 32), (32,), (5, 3, 2)], "cpu")
    optimizer = make(params)
    reference = Reference([p.detach().double().numpy() for p in params], [{**DEFAULTS, **OPTIONS}] * len(params))
    for step in range(5):
        torch.manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape)
        reference.step([p.grad.double().numpy() for p in params])
        optimizer.step()
    off = sum(((p.detach().double().numpy() - w) ** 2).sum() for p, w in zip(params, reference.params, strict=True))
    return float((off / sum((path**2).sum() for path in reference.paths)) ** 0.5)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Return the commit that is checked out, "-dirty" if more than earlier measurements differs from it."""
    sha = ["git", "rev-parse", "--short", "HEAD"]
    changes = ["git", "status", "--porcelain", "--", ":/", ":!/benchmarks/*.csv", ":!/docs/images"]
    found, changed = (subprocess.run(c, cwd=HERE, capture_output=True, text=True, check=False).stdout for c in (sha, changes))
    return f"{found.strip() or 'unknown'}{'-dirty' if changed else ''}"


def provenance(device: str) -> dict[str, str]:
    """Return the columns that say when, with what and where a row was measured."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine(device),
    }


def least_bytes(contestant: Contestant, shapes: Shapes) -> int:
    """Return what a step has to move: the gradient read, everything else read and written."""
    each = 3 * contestant.dtype.itemsize + 2 * contestant.moments
    return each * sum(math.prod(shape) for shape in shapes)


def row(name: str, contestant: Contestant, shapes: str, device: str, times: list[float], fused: float) -> dict[str, str]:
    p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
    memory = peak_memory(name, shapes) if device == "cpu" and name not in FLOORS else None
    error = largest_error(contestant.make) if contestant.exact else None
    return {
        **provenance(device),
        "shapes": shapes,
        "dtype": str(contestant.dtype).removeprefix("torch."),
        "optimizer": name,
        "steps": str(len(times)),
        "p20_ms": f"{p20:.2f}",
        "p50_ms": f"{p50:.2f}",
        "p80_ms": f"{p80:.2f}",
        "ratio_to_adamw_fused": f"{p50 / fused:.2f}",
        "least_gb_per_s": f"{least_bytes(contestant, SHAPES[shapes]) / p50 / 1e6:.1f}",
        "extra_peak_mib": "not measured" if memory is None else f"{memory:.1f}",
        "error_to_reference": "not measured" if error is None else "another rule" if error > 1e-4 else f"{error:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["bert-base", "400-tiny"])
    parser.add_argument(
        "--only", nargs="+", metavar="REGEX", help="contestants in whose name one of these is found; AdamW fused always"
    )
    parser.add_argument("--rounds", type=int, default=21, help="steps timed for each optimizer (default: 21)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dry", action="store_true", help=f"do not append to {RESULTS.name}")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    entered = contestants()
    if args.peak_of:
        print(own_peak_memory(entered[args.peak_of], SHAPES[args.shapes[0]]))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")
    if args.rounds < 7:
        parser.error(f"--rounds must be at least 7 for a median that means something, got {args.rounds}")
    if args.device == "cpu" and floors() is not None:
        entered |= FLOORS
    if args.only:
        entered = {n: c for n, c in entered.items() if n == "AdamW fused" or any(re.search(word, n) for word in args.only)}
    rows = []
    for shapes in args.shapes:
        times = measure(entered, SHAPES[shapes], args.rounds, args.device)
        fused = statistics.median(times["AdamW fused"])
        rows += [row(name, c, shapes, args.device, times[name], fused) for name, c in entered.items()]
    shown = ["shapes", "optimizer", "p20_ms", "p50_ms", "p80_ms", "ratio_to_adamw_fused", "least_gb_per_s"]
    shown += ["extra_peak_mib", "error_to_reference"]
    for entry in [{key: key for key in shown}, *rows]:
        print("  ".join(f"{entry[key]:>{max(len(key), 12) if key != 'optimizer' else 38}}" for key in shown))
    if not args.dry:
        append(rows, RESULTS)


def append(rows: list[dict[str, str]], path: Path) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows appended to {path}")


if __name__ == "__main__":
    main()
