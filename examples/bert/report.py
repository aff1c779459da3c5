"""The picture of a run's metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from corpus import write_whole
from matplotlib.figure import Figure


def plot_metrics(metrics: Path, picture: Path, unigram_loss: float) -> list[dict[str, Any]]:
    """Draw loss and learning rate over the steps, and return the rows."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [row["loss"] for row in rows], color="C0", linewidth=1)
    axes.axhline(unigram_loss, color="0.5", linestyle=":")
    axes.annotate("how often each token comes", (steps[-1], unigram_loss), ha="right", va="bottom", fontsize=8, color="0.4")
    axes.set(xlabel="step", ylabel="loss of masked tokens, nats", title="Masked language modelling")
    axes.grid(alpha=0.3)
    lr_axes = axes.twinx()
    lr_axes.plot(steps, [row["lr"] for row in rows], color="C1", linewidth=0.8, alpha=0.7)
    lr_axes.set_ylabel("learning rate", color="C1")
    lr_axes.set_ylim(bottom=0)
    write_whole(picture, lambda path: figure.savefig(path, format="png", dpi=120))
    return rows
