"""How a step on a CPU grows with the number of parameters: as a ratio to the loop that moves the least bytes, size by size.

    python benchmarks/scaling.py                # rows appended to benchmarks/scaling.csv, plot in docs/images/scaling.png

From a million parameters to a thousand million, in tensors of at most 768 x 3072 elements. Both work on the same tensors, 16
bytes for each parameter, and take turns.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from step_time import OPTIONS, Floor, append, floors, provenance

import torchlamb

RESULTS = Path(__file__).parent / "scaling.csv"
PLOT = Path(__file__).parent.parent / "docs" / "images" / "scaling.png"
TENSOR = 768 * 3072


def make_params(size: int) -> list[torch.nn.Parameter]:
    sizes = [TENSOR] * (size // TENSOR) + [size % TENSOR] * (size % TENSOR > 0)
    params = [torch.nn.Parameter(torch.full((n,), 0.02)) for n in sizes]
    for p in params:
        p.grad = torch.full_like(p, 0.01)
    return params


def measure(size: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return the milliseconds of our step and of the floor's, over the same parameters, gradients and moments."""
    params = make_params(size)
    optimizer = torchlamb.Lamb(params, **OPTIONS)
    optimizer.step()
    floor = Floor("floor_28", params[:1])
    floor.tensors([p.detach(), p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]] for p in params)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for stepper, taken in zip((optimizer, floor), times, strict=True):
            start = time.perf_counter()
            stepper.step()
            if turn:
                taken.append(1e3 * (time.perf_counter() - start))
    return times


def draw(rows: list[dict[str, str]]) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6))
    axes.plot([float(row["parameters"]) for row in rows], [float(row["ratio_to_28_bytes"]) for row in rows], "o-")
    axes.axhline(40 / 28, color="0.5", linestyle=":")
    axes.text(float(rows[0]["parameters"]), 40 / 28, "40 bytes", va="bottom", color="0.4")
    axes.set(xscale="log", ylim=(0, None), xlabel="parameters", ylabel="step / loop that moves 28 bytes")
    axes.set_title("One LAMB step beside the least that an optimizer can move, float32")
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.01, f"{rows[0]['machine']} | torch {rows[0]['torch']} | {rows[0]['date']}", fontsize=7, color="0.4")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(PLOT, dpi=150)
    print(f"Plot: {PLOT}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1000], help="parameters")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--dry", action="store_true", help=f"do not append to {RESULTS.name} nor draw")
    parser.add_argument("--plot-only", action="store_true", help="draw the newest rows again")
    args = parser.parse_args()
    if args.plot_only:
        with RESULTS.open(newline="") as file:
            rows = list(csv.DictReader(file))
        draw([row for row in rows if row["commit"] == rows[-1]["commit"]])
        return
    if floors() is None:
        parser.error("floors.cpp cannot be built: install a C++ compiler (c++)")
    rows = []
    for millions in args.millions:
        ours, floor = (statistics.median(times) for times in measure(millions * 10**6, args.rounds))
        rows.append(
            {
                **provenance("cpu"),
                "parameters": str(millions * 10**6),
                "steps": str(args.rounds),
                "p50_ms": f"{ours:.2f}",
                "floor_28_p50_ms": f"{floor:.2f}",
                "ratio_to_28_bytes": f"{ours / floor:.2f}",
            }
        )
        shown = ("parameters", "p50_ms", "floor_28_p50_ms", "ratio_to_28_bytes")
        print("  ".join(f"{key} {rows[-1][key]}" for key in shown), flush=True)
    if not args.dry:
        append(rows, RESULTS)
        draw(rows)


if __name__ == "__main__":
    main()
