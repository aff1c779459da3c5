"""Train on real handwritten digits at batch sizes from 16 to the whole training set, with LAMB, AdamW and SGD.

Every optimizer's learning rate is tuned at batch size 16 and carried to the larger batches by its usual rule; all runs see the
images equally often. How torchlamb is used stands in `OPTIMIZERS` and `train`; the rest is what makes the comparison fair.

    pip install '.[demo]'
    python examples/digits.py
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import torchlamb

try:
    import sklearn
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"digits.py needs {error.name}, which is not installed; in the torchlamb folder run: pip install '.[demo]'")

TRAIN_SIZE, TEST_SIZE, VALIDATION_SIZE = 1437, 360, 287  # the validation images are some of the training images
TUNING_BATCH_SIZE, TUNING_SEEDS = 16, 2
WARMUP_SHARE, WEIGHT_DECAY = 0.1, 1e-3
# Without smoothing, the loss on unseen images says more about how sure a network is than about how often it is right.
LOSS = nn.CrossEntropyLoss(label_smoothing=0.1)


@dataclass(frozen=True)
class Recipe:
    """How an optimizer is made, which learning rates are tried, and how the best one grows with the batch size."""

    make: Callable[[list[dict], float], torch.optim.Optimizer]
    lowest_lr: float
    lr_power: float  # 1/2: the lr grows with the square root of the batch size; 1: with the batch size

    @property
    def grid(self) -> list[float]:
        """Seven learning rates, each twice the one before."""
        return [self.lowest_lr * 2**i for i in range(7)]


OPTIMIZERS = {
    "Lamb": Recipe(lambda groups, lr: torchlamb.Lamb(groups, lr=lr), lowest_lr=0.002, lr_power=0.5),
    "AdamW": Recipe(lambda groups, lr: torch.optim.AdamW(groups, lr=lr), lowest_lr=0.004, lr_power=0.5),
    "SGD": Recipe(lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9), lowest_lr=0.016, lr_power=1.0),
}


@dataclass(frozen=True)
class Settings:
    """What the command line asks for; the batch sizes are in order."""

    epochs: int
    seeds: int
    batch_sizes: list[int]
    out: Path
    workers: int


@dataclass(frozen=True)
class Job:
    """One training run. `measured_on` is "validation" while tuning, else "test"."""

    optimizer: str
    batch_size: int
    lr: float
    seed: int
    epochs: int
    measured_on: str

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        images = TRAIN_SIZE - VALIDATION_SIZE if self.measured_on == "validation" else TRAIN_SIZE
        return self.epochs * batches_per_epoch(images, self.batch_size)

    def __str__(self) -> str:
        return f"{self.optimizer} batch {self.batch_size} lr {self.lr:.3g}"


@dataclass(frozen=True)
class Result:
    """Accuracy (0 to 1) and mean loss on images that the run was not trained on."""

    accuracy: float
    loss: float


def main() -> None:
    settings = parse_args()
    tuning = tuning_jobs(settings)
    planned = tuning + final_jobs(settings, dict.fromkeys(OPTIMIZERS, 1.0))
    print(f"{TRAIN_SIZE} training and {TEST_SIZE} test images, {settings.epochs} epochs, {len(planned)} runs", flush=True)
    bar = tqdm(total=sum(job.steps for job in planned), unit=" steps", unit_scale=True, desc="tuning", dynamic_ncols=True)
    with bar, worker_pool(settings.workers) as pool:
        tuning_results = run(tuning, pool, settings.workers, bar)
        tuned, report = choose_lrs(tuning_results)
        bar.write(report)
        bar.set_description("training", refresh=False)
        results = run(final_jobs(settings, tuned), pool, settings.workers, bar)
    print(f"\nMean +- standard deviation over seeds: {settings.seeds}\n{format_table(results, settings)}\n")
    draw(results, settings, plot := settings.out / "accuracy.png")
    write_rows({**tuning_results, **results}, rows := settings.out / "runs.csv")
    print(f"Plot: {plot}\nRows: {rows}")
    print(
        f"Every learning rate was tuned at batch size {TUNING_BATCH_SIZE} only, on {VALIDATION_SIZE} of the training images, "
        "and carried to the other batch sizes by rule: square root of the batch size ratio for Lamb and AdamW, linear for SGD."
    )


def train(job: Job) -> Result:
    parts = load_parts()
    images, labels = parts["fit" if job.measured_on == "validation" else "train"]
    torch.manual_seed(job.seed)
    order = torch.Generator().manual_seed(job.seed)
    model = build_model()
    # Weights decay. Biases and norms neither decay nor, with Lamb, adapt: as in the code that came with the paper.
    groups = torchlamb.param_groups(model, weight_decay=WEIGHT_DECAY, adapt_excluded=False)
    optimizer = OPTIMIZERS[job.optimizer].make(groups, job.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_decay(job.steps))
    for _ in range(job.epochs):
        for batch in batches(len(images), job.batch_size, order):
            optimizer.zero_grad()
            LOSS(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            scheduler.step()
    images, labels = parts[job.measured_on]
    with torch.no_grad():
        scores = model(images)
    accuracy = (scores.argmax(dim=1) == labels).double().mean().item()
    return Result(accuracy, LOSS(scores, labels).item())


@functools.cache
def load_parts() -> dict[str, tuple[Tensor, Tensor]]:
    """Return images (n, 1, 8, 8), from 0 to 1, and labels (n,) of each part."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    return {name: (images[indices], labels[indices]) for name, indices in split(labels).items()}


def split(labels: Tensor) -> dict[str, Tensor]:
    """Return the indices of each part: always the same, and with the same share of every digit in all of them."""
    train, test = train_test_split(torch.arange(len(labels)), test_size=TEST_SIZE, stratify=labels, random_state=0)
    fit, validation = train_test_split(train, test_size=VALIDATION_SIZE, stratify=labels[train], random_state=0)
    return {"train": train, "test": test, "fit": fit, "validation": validation}


def build_model() -> nn.Module:
    # Group norm, not batch norm: what the network computes must not depend on the batch size.
    convolution = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.GroupNorm(4, 8), nn.ReLU()]
    downsampling = [nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.GroupNorm(4, 16), nn.ReLU()]
    return nn.Sequential(*convolution, *downsampling, nn.Flatten(), nn.Linear(16 * 4 * 4, 10))


def warmup_then_decay(steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at each step: up in a straight line to 1, then down in one towards 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def batches(images: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Cut a random order of all images into nearly equal batches: nothing is dropped, and no small rest is left over."""
    return torch.randperm(images, generator=generator).tensor_split(batches_per_epoch(images, batch_size))


def batches_per_epoch(images: int, batch_size: int) -> int:
    return max(1, round(images / batch_size))


def tuning_jobs(settings: Settings) -> list[Job]:
    return [
        Job(name, TUNING_BATCH_SIZE, lr, seed, settings.epochs, measured_on="validation")
        for name, recipe in OPTIMIZERS.items()
        for lr in recipe.grid
        for seed in range(TUNING_SEEDS)
    ]


def final_jobs(settings: Settings, tuned: dict[str, float]) -> list[Job]:
    return [
        Job(name, size, carry_lr(tuned[name], size, recipe.lr_power), seed, settings.epochs, measured_on="test")
        for size in settings.batch_sizes
        for name, recipe in OPTIMIZERS.items()
        for seed in range(settings.seeds)
    ]


def carry_lr(lr: float, batch_size: int, power: float) -> float:
    return lr * (batch_size / TUNING_BATCH_SIZE) ** power


def choose_lrs(results: dict[Job, Result]) -> tuple[dict[str, float], str]:
    """Return the best learning rate of each optimizer, and a text that says how it was found."""
    tuned = {}
    lines = [f"Tuning at batch size {TUNING_BATCH_SIZE}: learning rates (* is the best), below them validation losses"]
    for name, recipe in OPTIMIZERS.items():
        losses = dict.fromkeys(recipe.grid, 0.0)
        for job, result in results.items():
            if job.optimizer == name:
                losses[job.lr] += result.loss / TUNING_SEEDS
        # Not by accuracy: on so few images, accuracies tie. NaN is the loss of a run that diverged.
        tuned[name] = best = min(losses, key=lambda lr: math.inf if math.isnan(losses[lr]) else losses[lr])
        lines.append(f"  {name:<6}" + "".join(f"{lr:>8.3g}{'*' if lr == best else ' '}" for lr in losses))
        lines.append(" " * 8 + "".join(f"{loss:>8.4f} " for loss in losses.values()))
        if best in (recipe.grid[0], recipe.grid[-1]):
            lines.append(f"  Note: {best:.3g} lies at the edge of the grid of {name}; a better one may lie beyond it.")
    return tuned, "\n".join(lines)


def run(jobs: list[Job], pool: Executor, workers: int, bar: tqdm) -> dict[Job, Result]:
    """Run all jobs. What comes out depends neither on the number of workers nor on who finishes first."""
    futures = {pool.submit(train, job): job for job in jobs}
    bar.set_postfix_str("; ".join(map(str, jobs[:workers])))
    for future in as_completed(futures):
        future.result()
        waiting = [str(job) for other, job in futures.items() if not other.done()]
        bar.set_postfix_str("; ".join(waiting[:workers]), refresh=False)
        bar.update(futures[future].steps)
    return {job: future.result() for future, job in futures.items()}


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    torch.set_num_threads(1)  # one run is too small to share; several runs go side by side instead
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle: it ends its workers
    parent = multiprocessing.parent_process()
    # A parent that was killed can end nothing: its workers notice and leave.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def cell(results: dict[Job, Result], optimizer: str, batch_size: int) -> tuple[Job, float, float]:
    """Return one of the runs at a place in the table, and mean and standard deviation of all accuracies there in percent."""
    runs = {job: result for job, result in results.items() if (job.optimizer, job.batch_size) == (optimizer, batch_size)}
    percents = [100 * result.accuracy for result in runs.values()]
    return next(iter(runs)), statistics.fmean(percents), statistics.stdev(percents) if len(percents) > 1 else 0.0


def format_table(results: dict[Job, Result], settings: Settings) -> str:
    lines = [" " * 12 + "".join(f"{name:>26}" for name in OPTIMIZERS)]
    lines.append("batch  steps" + f"{'lr':>9}{'test accuracy %':>17}" * len(OPTIMIZERS))
    for size in settings.batch_sizes:
        cells = [cell(results, name, size) for name in OPTIMIZERS]
        columns = [f"{job.lr:>9.3g}{mean:>9.2f} +- {spread:>4.1f}" for job, mean, spread in cells]
        lines.append(f"{size:>5}{cells[0][0].steps:>7}{''.join(columns)}")
    return "\n".join(lines)


def draw(results: dict[Job, Result], settings: Settings, path: Path) -> None:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, recipe) in enumerate(OPTIMIZERS.items()):
        jobs, means, spreads = zip(*[cell(results, name, size) for size in settings.batch_sizes], strict=True)
        shifted = [job.batch_size * 1.04 ** (i - 1) for job in jobs]  # error bars would cover each other
        label = f"{name}, lr x (batch / {TUNING_BATCH_SIZE})^{recipe.lr_power:g}"
        axes.errorbar(shifted, means, spreads, marker="os^"[i], capsize=3, label=label)
    axes.set_xscale("log")
    axes.set_xticks(settings.batch_sizes, [f"{job.batch_size}\n({job.steps})" for job in jobs])
    axes.minorticks_off()
    axes.set_xlabel("batch size in images (in brackets: optimizer steps in all)")
    axes.set_ylabel("test accuracy in %")
    axes.set_title(f"Handwritten digits: {settings.epochs} epochs, cut into fewer and larger steps")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)  # inside, it would cover points
    small_print = (
        f"{settings.epochs} epochs; mean and standard deviation over seeds: {settings.seeds}; "
        f"lr tuned at batch size {TUNING_BATCH_SIZE} only, then carried by rule\n"
        f"torchlamb {torchlamb.__version__}, torch {torch.__version__}, scikit-learn {sklearn.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    )
    figure.supxlabel(small_print, fontsize=7)
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=150)


def write_rows(results: dict[Job, Result], path: Path) -> None:
    rows = [{**asdict(job), "steps": job.steps, **asdict(result)} for job, result in results.items()]
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def parse_args(arguments: list[str] | None = None) -> Settings:
    description = __doc__.partition("\n")[0]
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    add = functools.partial(parser.add_argument, metavar="N", type=whole_number)
    add("--epochs", default=30, help="how often every run sees every training image")
    add("--seeds", default=3, help="runs per cell of the table; a seed fixes initialisation and data order")
    sizes_help = f"1 to {TRAIN_SIZE}; an epoch is cut into round({TRAIN_SIZE} / N) nearly equal batches"
    sizes_type = functools.partial(whole_number, high=TRAIN_SIZE)
    add("--batch-sizes", default=[16, 64, 256, 718, 1437], type=sizes_type, nargs="+", help=sizes_help)
    add("--out", default="out/digits", metavar="FOLDER", type=folder, help="where the plot and the rows go")
    add("--workers", default=min(os.cpu_count() or 1, 8), help="runs that go side by side")
    args = parser.parse_args(arguments)
    args.batch_sizes.sort()
    for size, following in zip(args.batch_sizes, args.batch_sizes[1:], strict=False):
        if size == following:
            parser.error(f"argument --batch-sizes: got {size} more than once; give every size once")
    return Settings(**vars(args))


def whole_number(text: str, low: int = 1, high: int | None = None) -> int:
    number = int(text) if text.strip().lstrip("+-").isdecimal() else None
    if number is None or number < low or (high is not None and number > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number {allowed}")
    return number


def folder(text: str) -> Path:
    path = Path(text)
    nearest = next(p for p in (path, *path.parents) if os.path.exists(p))
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, but {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"got {text!r}, but {nearest} cannot be written to; name another folder")
    return path


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
