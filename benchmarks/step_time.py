"""How long a step takes: ours, torch's AdamW and every other LAMB that is installed, in one run.

    make bench                                  # BERT-base shapes, rows appended to benchmarks/results.csv
    python benchmarks/step_time.py --help

The contestants take turns, so that a slow minute of the machine slows all of them; compare ratios, not times. Other LAMBs run
where they can be imported: timm, pytorch_optimizer, torch_optimizer.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import importlib
import importlib.metadata
import importlib.util
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from shapes import SHAPES

import torchlamb

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def contestants() -> dict[str, Make]:
    """Every optimizer that can be had here, with its rule set to the paper's where it has a choice."""
    found: dict[str, Make] = {
        "torchlamb": lambda p: torchlamb.Lamb(p, **OPTIONS),
        "torchlamb foreach": lambda p: torchlamb.Lamb(p, **OPTIONS, foreach=True),
        "AdamW fused": lambda p: torch.optim.AdamW(p, **OPTIONS, fused=True),
        "AdamW foreach": lambda p: torch.optim.AdamW(p, **OPTIONS, foreach=True),
        "AdamW single": lambda p: torch.optim.AdamW(p, **OPTIONS, foreach=False),
    }
    timm = import_alone("timm", "timm.optim", "timm.optim.lamb")
    if timm:
        paper = {**OPTIONS, "max_grad_norm": None, "always_adapt": True}
        found[f"timm {version('timm')} single"] = lambda p: timm.Lamb(p, **paper, foreach=False)
        found[f"timm {version('timm')} foreach"] = lambda p: timm.Lamb(p, **paper, foreach=True)
    if importlib.util.find_spec("pytorch_optimizer"):
        module = importlib.import_module("pytorch_optimizer")
        found[f"pytorch_optimizer {version('pytorch_optimizer')}"] = lambda p: module.Lamb(p, **OPTIONS)
    if importlib.util.find_spec("torch_optimizer"):
        other = importlib.import_module("torch_optimizer")
        found[f"torch_optimizer {version('torch_optimizer')}"] = lambda p: other.Lamb(p, **OPTIONS)
    return found


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


def make_params(shapes: list[tuple[int, ...]], device: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device)) for shape in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 0.01).to(device)
    return params


def measure(makers: dict[str, Make], shapes: list[tuple[int, ...]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds per step, `rounds` of them for each, after one that creates the state."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    optimizers = {name: make(make_params(shapes, device)) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(rounds + 1):
        for name, optimizer in optimizers.items():
            synchronize()
            start = time.perf_counter()
            optimizer.step()
            synchronize()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def peak_memory(name: str, shapes: str) -> float | None:
    """MiB that a step needs beyond parameters, gradients and state, in a process of its own; Linux with glibc only."""
    command = [sys.executable, __file__, "--peak-of", name, "--shapes", shapes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    return float(done.stdout) if done.returncode == 0 else None


def own_peak_memory(make: Make, shapes: list[tuple[int, ...]]) -> float:
    optimizer = make(make_params(shapes, "cpu"))
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
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def row(
    name: str, shapes: str, device: str, times: list[float], fused: float, memory: float | None, error: float
) -> dict[str, str]:
    p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine(device),
        "shapes": shapes,
        "dtype": "float32",
        "optimizer": name,
        "steps": str(len(times)),
        "p20_ms": f"{p20:.2f}",
        "p50_ms": f"{p50:.2f}",
        "p80_ms": f"{p80:.2f}",
        "ratio_to_adamw_fused": f"{p50 / fused:.2f}",
        "extra_peak_mib": "not measured" if memory is None else f"{memory:.0f}",
        "error_to_reference": "another rule" if error > 1e-4 else f"{error:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["bert-base", "400-tiny"])
    parser.add_argument("--rounds", type=int, default=21, help="steps timed for each optimizer (default: 21)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dry", action="store_true", help=f"do not append to {RESULTS.name}")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    makers = contestants()
    if args.peak_of:
        print(own_peak_memory(makers[args.peak_of], SHAPES[args.shapes[0]]))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")
    if args.rounds < 7:
        parser.error(f"--rounds must be at least 7 for a median that means something, got {args.rounds}")
    rows = []
    for shapes in args.shapes:
        memory = {n: peak_memory(n, shapes) if args.device == "cpu" else None for n in makers}
        times = measure(makers, SHAPES[shapes], args.rounds, args.device)
        fused = statistics.median(times["AdamW fused"])
        rows += [row(n, shapes, args.device, times[n], fused, memory[n], largest_error(makers[n])) for n in makers]
    shown = [
        "shapes",
        "optimizer",
        "p20_ms",
        "p50_ms",
        "p80_ms",
        "ratio_to_adamw_fused",
        "extra_peak_mib",
        "error_to_reference",
    ]
    for entry in [{key: key for key in shown}, *rows]:
        print("  ".join(f"{entry[key]:>{max(len(key), len(str(entry[key])), 12)}}" for key in shown))
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
