"""How Lamb, AdamW and SGD train one network from batch size 32 to 8192, with the same samples in every run.

    python benchmarks/batch_scaling.py                  # about 100 runs, 75 CPU minutes; again, it goes on where it stopped
    python benchmarks/batch_scaling.py --report         # the tables and the plot of the rows there are

Two curves for each optimizer: the learning rate that is best at batch size 32, carried to the others by rule; and the best of a
grid at every batch size. Learning rates are chosen by the loss on one held-out part of the text; reported is that on another.
docs/large_batch.md says what was found, and how the task was chosen before any two optimizers were compared.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import torchlamb
from torchlamb.recipes import Recipe, scale

HERE = Path(__file__).parent
RESULTS = HERE / "batch_scaling.csv"
PLOT = HERE.parent / "docs" / "images" / "batch_scaling.png"

SAMPLES = 2**19  # windows of text in every run
BATCH_SIZES = [32, 128, 512, 2048, 8192]
WINDOW, WIDTH, LAYERS, HEADS, VOCABULARY = 16, 32, 2, 2, 128
SEEDS = 3  # at the first and last batch size; 1 between
REACH = 2  # factors of 2 on either side of the carried learning rate; more where the best lies at an edge
MOST_EXTENSIONS = 4
HELD_OUT = {"validation": 8192, "test": 16384}  # windows


class Contestant(NamedTuple):
    """How the best learning rate at the smallest batch is searched, and carried to the others."""

    middle: int  # of the first grid, as a power of 2
    lr_power: float  # 1/2: the lr grows with the square root of the batch size; 1: with the batch size


CONTESTANTS = {"Lamb": Contestant(-6, 0.5), "AdamW": Contestant(-8, 0.5), "SGD": Contestant(-3, 1.0)}


@dataclass(frozen=True)
class Job:
    """One run. Learning rates are powers of 2."""

    optimizer: str
    batch_size: int
    lr: float
    seed: int

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return SAMPLES // self.batch_size

    def __str__(self) -> str:
        return f"{self.optimizer:<5} batch {self.batch_size:>4} lr {self.lr:<9.4g} seed {self.seed}"


class Result(NamedTuple):
    """Mean loss of a character in nats, inf where a run diverged, and how long the run took."""

    validation_loss: float
    test_loss: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs side by side, of one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    results = read_rows()
    if not args.report:
        start = time.perf_counter()
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), start_worker) as pool:
            study(results, pool, args.workers)
        print(f"done in {(time.perf_counter() - start) / 60:.0f} minutes; {len(results)} runs in {RESULTS}")
    report(results)


# The task: the next character in the source of the Python standard library. A transformer with layer norm first.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        heads = [part(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(WINDOW, WIDTH)
        for part in (self.embedding, self.position):
            nn.init.normal_(part.weight, std=0.02)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, characters: Tensor) -> Tensor:
        places = torch.arange(characters.shape[1])
        return self.out(self.norm(self.blocks(self.embedding(characters) + self.position(places))))


@functools.cache
def texts() -> dict[str, Tensor]:
    """Return the characters of each part. Which part a file belongs to follows from its name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(f.parts))
    parts: dict[str, list[bytes]] = {"validation": [], "test": [], "train": []}
    for file in files:
        share = hashlib.sha256(file.relative_to(root).as_posix().encode()).digest()[0] / 256
        parts["validation" if share < 0.05 else "test" if share < 0.1 else "train"].append(file.read_bytes())
    whole = {name: torch.frombuffer(bytearray(b"\0".join(part)), dtype=torch.uint8) for name, part in parts.items()}
    return {name: text.clamp(max=VOCABULARY - 1) for name, text in whole.items()}


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    taken = text[starts.unsqueeze(1) + torch.arange(WINDOW + 1)].long()
    return taken[:, :-1], taken[:, 1:]


def loss_of(network: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
    characters, following = windows(text, starts)
    return nn.functional.cross_entropy(network(characters).flatten(0, 1), following.flatten())


def train(job: Job) -> Result:
    began = time.perf_counter()
    text = texts()["train"]
    torch.manual_seed(job.seed)
    network = Network()
    # Every batch size sees the same windows in the same order.
    order = torch.Generator().manual_seed(job.seed)
    batches = torch.randint(len(text) - WINDOW, (SAMPLES,), generator=order).split(job.batch_size)
    optimizer, scheduler = build(job, network)
    for i, starts in enumerate(batches):
        loss = loss_of(network, text, starts)
        if i % 64 == 0 and not math.isfinite(loss.item()):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    losses = [held_out_loss(network, part) for part in HELD_OUT]
    return Result(*losses, time.perf_counter() - began)


def build(job: Job, network: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Return the optimizer and its scheduler: by the paper's rule, a warm-up of 1/1024 of training at the smallest batch."""
    smallest = BATCH_SIZES[0]
    tuned = Recipe(smallest, job.lr, "this study", warmup_share=2**-10, total_steps=SAMPLES // smallest)
    recipe = scale(tuned, job.batch_size)
    groups = torchlamb.param_groups(network, recipe.weight_decay, adapt_excluded=False)
    if job.optimizer == "Lamb":
        optimizer: torch.optim.Optimizer = torchlamb.Lamb(groups, lr=job.lr)
    elif job.optimizer == "AdamW":
        optimizer = torch.optim.AdamW(groups, lr=job.lr, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=job.lr, momentum=0.9, fused=True)
    return optimizer, LambdaLR(optimizer, recipe.lr_factor)


def held_out_loss(network: nn.Module, part: str) -> float:
    text = texts()[part]
    starts = torch.randint(len(text) - WINDOW, (HELD_OUT[part],), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(loss_of(network, text, starts))
    return loss if math.isfinite(loss) else math.inf


def baselines() -> dict[str, float]:
    """Return the test losses of what knows how often each character comes, and how often after which other one."""
    train, test = texts()["train"].long(), texts()["test"].long()
    single = torch.bincount(train, minlength=VOCABULARY).double() + 0.01
    pairs = torch.bincount(train[:-1] * VOCABULARY + train[1:], minlength=VOCABULARY**2).double().view(VOCABULARY, -1) + 0.01
    after = -(pairs / pairs.sum(dim=1, keepdim=True)).log()[test[:-1], test[1:]]
    return {"single characters": float(-(single / single.sum()).log()[test].mean()), "pairs": float(after.mean())}


# Which runs there are. What is next follows from the results there are: so a study goes on where it was stopped.


def study(results: dict[Job, Result], pool: ProcessPoolExecutor, workers: int) -> None:
    running: dict[Future[Result], Job] = {}
    while True:
        waiting = [job for job in wanted(results) if job not in running.values()]
        for job in waiting[: workers - len(running)]:
            running[pool.submit(train, job)] = job
        if not running:
            return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            job = running.pop(future)
            results[job] = result = future.result()
            append_row(job, result)
            seconds = f"{result.seconds:.0f} s"
            print(f"{job}: validation {result.validation_loss:.4f}, test {result.test_loss:.4f} ({seconds})", flush=True)


def wanted(results: dict[Job, Result]) -> list[Job]:
    """Return the runs that are missing and whose settings are known by now, the most telling first."""
    found: list[Job] = []
    for seed in range(SEEDS):
        for size in (BATCH_SIZES[0], BATCH_SIZES[-1], *BATCH_SIZES[1:-1]):
            for name in CONTESTANTS:
                found += missing(results, name, size, seed)
    return list(dict.fromkeys(found))


def missing(results: dict[Job, Result], name: str, size: int, seed: int) -> list[Job]:
    tuned, complete = best_lr(results, name, BATCH_SIZES[0])
    if size == BATCH_SIZES[0] and seed == 0:
        return complete
    if complete or (seed > 0 and size not in (BATCH_SIZES[0], BATCH_SIZES[-1])):
        return []
    lr = carried_lr(name, tuned, size)
    if seed == 0:
        return best_lr(results, name, size, lr)[1]
    best, incomplete = best_lr(results, name, size, lr)
    lrs = {lr} if incomplete else {lr, best}
    return [job for job in (Job(name, size, one, seed) for one in sorted(lrs)) if job not in results]


def best_lr(results: dict[Job, Result], name: str, size: int, middle: float | None = None) -> tuple[float, list[Job]]:
    """Return the best of a grid, by the loss on the validation part, and the runs that are missing to know it."""
    middle = 2.0 ** CONTESTANTS[name].middle if middle is None else middle
    low, high = -REACH, REACH
    for _ in range(2 * MOST_EXTENSIONS + 1):
        grid = [Job(name, size, middle * 2.0**i, seed=0) for i in range(low, high + 1)]
        absent = [job for job in grid if job not in results]
        if absent:
            return middle, absent
        best = min(grid, key=lambda job: results[job].validation_loss)
        if best is grid[0] and low > -REACH - MOST_EXTENSIONS:
            low -= 1
        elif best is grid[-1] and high < REACH + MOST_EXTENSIONS:
            high += 1
        else:
            break
    return best.lr, []


def carried_lr(name: str, tuned: float, size: int) -> float:
    return tuned * (size / BATCH_SIZES[0]) ** CONTESTANTS[name].lr_power


def start_worker() -> None:
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(10)


# Rows.


def setting() -> dict[str, str]:
    """Return what has to be the same for a row to count: the task, and the text."""
    digest = hashlib.sha256()
    for part in texts().values():
        digest.update(part.numpy().tobytes())
    task = f"{SAMPLES} x {WINDOW}, width {WIDTH}, {LAYERS} layers"
    return {"task": task, "corpus": digest.hexdigest()[:12]}


def provenance() -> dict[str, str]:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False)
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    versions = {"torchlamb": torchlamb.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"date": date.today().isoformat(), "commit": git.stdout.strip() or "unknown", **versions, "cpu": cpu}


def append_row(job: Job, result: Result) -> None:
    row = {**setting(), **asdict(job), "steps": job.steps, **result._asdict(), **provenance()}
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        file.flush()
        os.fsync(file.fileno())


def read_rows() -> dict[Job, Result]:
    """Return what is known of this task with this text."""
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    mine = setting()
    of_task = [row for row in rows if row["task"] == mine["task"]]
    if "--report" not in sys.argv:
        of_task = [row for row in of_task if row["corpus"] == mine["corpus"]]
    return {
        Job(row["optimizer"], int(row["batch_size"]), float(row["lr"]), int(row["seed"])): Result(
            float(row["validation_loss"]), float(row["test_loss"]), float(row["seconds"])
        )
        for row in of_task
    }


# The report.


def report(results: dict[Job, Result]) -> None:
    chosen = {(name, size): choose(results, name, size) for name in CONTESTANTS for size in BATCH_SIZES}
    for curve, title in (
        (0, "learning rate tuned at the smallest batch, carried by rule"),
        (1, "best of a grid at every batch"),
    ):
        print(f"\nTest loss, {title}\n\n| batch | steps | " + " | ".join(f"{name} lr | loss" for name in CONTESTANTS) + " |")
        print("|---" * (2 + 2 * len(CONTESTANTS)) + "|")
        for size in BATCH_SIZES:
            cells = [format_cell(results, name, size, chosen[name, size][curve]) for name in CONTESTANTS]
            print(f"| {size} | {SAMPLES // size} | " + " | ".join(cells) + " |")
    print("\nLosses by learning rate, seed 0")
    for name in CONTESTANTS:
        for size in BATCH_SIZES:
            runs = sorted(
                (job.lr, results[job].test_loss)
                for job in results
                if (job.optimizer, job.batch_size, job.seed) == (name, size, 0)
            )
            print(f"{name:<5} {size:>5}  " + "  ".join(f"{lr:.4g}: {loss:.3f}" for lr, loss in runs))
    for name, loss in baselines().items():
        print(f"{name}: {loss:.3f}")
    print(f"CPU time of all runs: {sum(result.seconds for result in results.values()) / 3600:.1f} hours")
    draw(results, chosen)


def choose(results: dict[Job, Result], name: str, size: int) -> tuple[float, float]:
    """Return the carried learning rate and the best one."""
    tuned, _ = best_lr(results, name, BATCH_SIZES[0])
    lr = carried_lr(name, tuned, size)
    return lr, best_lr(results, name, size, None if size == BATCH_SIZES[0] else lr)[0]


def losses_at(results: dict[Job, Result], name: str, size: int, lr: float) -> list[float]:
    jobs = (Job(name, size, lr, seed) for seed in range(SEEDS))
    return [results[job].test_loss for job in jobs if job in results]


def format_cell(results: dict[Job, Result], name: str, size: int, lr: float) -> str:
    losses = losses_at(results, name, size, lr)
    if not losses:
        return f"{lr:.4g} | not measured"
    if not math.isfinite(max(losses)):
        return f"{lr:.4g} | diverged"
    spread = f" +- {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{lr:.4g} | {statistics.fmean(losses):.3f}{spread}"


def draw(results: dict[Job, Result], chosen: dict[tuple[str, int], tuple[float, float]]) -> None:
    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    titles = ("tuned at batch size 32 only, carried by rule", "best of a grid at every batch size")
    for curve, (axes, title) in enumerate(zip(figure.subplots(1, 2, sharey=True), titles, strict=True)):
        for i, name in enumerate(CONTESTANTS):
            cells = [losses_at(results, name, size, chosen[name, size][curve]) or [math.nan] for size in BATCH_SIZES]
            means = [statistics.fmean(cell) for cell in cells]
            spreads = [statistics.stdev(cell) if len(cell) > 1 and math.isfinite(max(cell)) else 0 for cell in cells]
            axes.errorbar(BATCH_SIZES, means, spreads, marker="os^"[i], capsize=3, label=name)
        for label, loss in baselines().items():
            axes.axhline(loss, color="0.6", linestyle=":", linewidth=1)
            axes.annotate(label, (BATCH_SIZES[0], loss), fontsize=7, color="0.4", va="bottom")
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(BATCH_SIZES, [f"{size}\n({SAMPLES // size})" for size in BATCH_SIZES])
        axes.set(xlabel="batch size (in brackets: steps)", title=f"Learning rate {title}")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test loss, nats per character")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supxlabel(f"{SAMPLES:,} windows of {WINDOW} characters in every run; {small_print()}", fontsize=7)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=120)
    print(f"Plot: {PLOT}")


def small_print() -> str:
    versions = f"torchlamb {torchlamb.__version__}, torch {torch.__version__.partition('+')[0]}"
    return f"{versions}, {platform.system()} {platform.machine()}"


if __name__ == "__main__":
    main()
