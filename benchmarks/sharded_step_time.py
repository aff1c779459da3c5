"""How long a step on sharded parameters takes: ours, torch's AdamW and timm's LAMB where it is installed, in one run.

    torchrun --nproc-per-node 2 benchmarks/sharded_step_time.py

398 small parameters, as many tensors as BERT-large pre-training has, are sharded with FSDP2's layout; so small that what is
measured is the host's work and the collectives, not the arithmetic. The contestants take turns; compare ratios, not times.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from step_time import OPTIONS, append, import_alone, provenance, version
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import torchlamb

RESULTS = Path(__file__).parent / "sharded_results.csv"
SHAPES = [(64, 32), (64,)] * 199


def contestants() -> dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]:
    found = {
        "torchlamb": lambda p: torchlamb.Lamb(p, **OPTIONS),
        "torchlamb foreach": lambda p: torchlamb.Lamb(p, **OPTIONS, foreach=True),
        "torchlamb foreach, max_grad_norm": lambda p: torchlamb.Lamb(p, **OPTIONS, foreach=True, max_grad_norm=1.0),
        "AdamW foreach": lambda p: torch.optim.AdamW(p, **OPTIONS, foreach=True),
    }
    timm = import_alone("timm", "timm.optim", "timm.optim.lamb")
    if timm:
        paper = {**OPTIONS, "max_grad_norm": None, "always_adapt": True}
        found[f"timm {version('timm')} foreach"] = lambda p: timm.Lamb(p, **paper, foreach=True)
        found[f"timm {version('timm')} defaults"] = lambda p: timm.Lamb(p, **OPTIONS)
    return found


def make_params(mesh: DeviceMesh) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)

    def shards(scale: float) -> list[torch.Tensor]:
        full = [torch.randn(shape, generator=generator) * scale for shape in SHAPES]
        return [distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) for x in full]

    params = [torch.nn.Parameter(x) for x in shards(0.02)]
    for p, grad in zip(params, shards(0.01), strict=True):
        p.grad = grad
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="steps timed for each optimizer, at least 7 (default: 21)")
    parser.add_argument("--dry", action="store_true", help=f"do not append to {RESULTS.name}")
    args = parser.parse_args()
    if args.rounds < 7:
        parser.error(f"--rounds must be at least 7 for a median that means something, got {args.rounds}")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    optimizers = {name: make(make_params(mesh)) for name, make in contestants().items()}
    collectives = {}
    for name, optimizer in optimizers.items():
        optimizer.step()
        with CommDebugMode() as mode:
            optimizer.step()
        collectives[name] = mode.get_total_counts()
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(args.rounds):
        for name, optimizer in optimizers.items():
            dist.barrier()
            start = time.perf_counter()
            optimizer.step()
            dist.barrier()  # all processes have stepped
            times[name].append(1e3 * (time.perf_counter() - start))
    if dist.get_rank() == 0:
        report(times, collectives, args.dry)
    dist.destroy_process_group()


def report(times: dict[str, list[float]], collectives: dict[str, int], dry: bool) -> None:
    adamw = statistics.median(times["AdamW foreach"])
    rows = []
    for name, taken in times.items():
        p20, p50, p80 = (statistics.quantiles(taken, n=10)[i] for i in (1, 4, 7))
        rows.append(
            {
                **provenance("cpu"),
                "processes": dist.get_world_size(),
                "parameters": len(SHAPES),
                "optimizer": name,
                "steps": len(taken),
                "p20_ms": f"{p20:.2f}",
                "p50_ms": f"{p50:.2f}",
                "p80_ms": f"{p80:.2f}",
                "ratio_to_adamw_foreach": f"{p50 / adamw:.2f}",
                "collectives": collectives[name],
            }
        )
    shown = ["optimizer", "p20_ms", "p50_ms", "p80_ms", "ratio_to_adamw_foreach", "collectives"]
    for entry in [{key: key for key in shown}, *rows]:
        print("  ".join(f"{entry[key]!s:>{max(len(key), 12)}}" for key in shown))
    if not dry:
        append(rows, RESULTS)


if __name__ == "__main__":
    main()
