"""Draws the newest rows of results.csv for one set of shapes: `python benchmarks/plot.py --shapes bert-base`."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results.csv"


def newest_rows(shapes: str, commit: str | None) -> list[dict[str, str]]:
    with RESULTS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["shapes"] == shapes and commit in (None, row["commit"])]
    if not rows:
        raise SystemExit(f"{RESULTS} has no rows for {shapes}; run step_time.py --shapes {shapes} first")
    return [row for row in rows if (row["date"], row["commit"]) == (rows[-1]["date"], rows[-1]["commit"])]


def draw(rows: list[dict[str, str]], out: Path) -> None:
    rows = sorted(rows, key=lambda row: float(row["p50_ms"]), reverse=True)
    median, low, high = ([float(row[key]) for row in rows] for key in ("p50_ms", "p20_ms", "p80_ms"))
    spread = [[m - lo for m, lo in zip(median, low, strict=True)], [hi - m for m, hi in zip(median, high, strict=True)]]
    colors = ["tab:blue" if row["optimizer"].startswith("torchlamb") else "0.6" for row in rows]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.4))
    bars = axes.barh([row["optimizer"] for row in rows], median, xerr=spread, color=colors, ecolor="0.3")
    axes.bar_label(bars, labels=[f" {row['ratio_to_adamw_fused']} x" for row in rows], label_type="edge", padding=14)
    axes.set_xlim(right=1.25 * max(high))
    axes.set_xlabel("milliseconds per step, median of " + rows[0]["steps"] + " (bars: 20th to 80th percentile)")
    axes.set_title(f"One step on {rows[0]['shapes']}, float32 (x: ratio to torch's fused AdamW)")
    axes.spines[["top", "right"]].set_visible(False)
    note = f"{rows[0]['machine']} | torch {rows[0]['torch']} | commit {rows[0]['commit']} | {rows[0]['date']}"
    figure.text(0.01, 0.01, note, fontsize=7, color="0.4")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="bert-base")
    parser.add_argument("--commit", help="of the rows (default: that of the newest)")
    parser.add_argument("--out", type=Path, default=Path("docs/images/step_time.png"))
    args = parser.parse_args()
    draw(newest_rows(args.shapes, args.commit), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
