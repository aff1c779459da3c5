"""Pre-train BERT by masked language modelling, with LAMB, on your own text: one process, or many with DDP or FSDP2.

    pip install '.[bert]'
    python examples/bert/pretrain.py --trust-ratios --noise-scale
    torchrun --nproc-per-node 2 examples/bert/pretrain.py --shard fsdp2 --out out/bert-fsdp2
    python examples/bert/pretrain.py --help

The loop is in `train`; how the optimizer is made, in `make_optimizer`. SIGTERM saves and leaves; --resume goes on from there,
on any number of processes.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import torch
    import torch.distributed as dist
    from corpus import IGNORED, Corpus, CorpusError, MaskedSequences, Share, cached, hash_of, load, write_whole
    from report import plot_metrics
    from settings import Phase, Settings, UsageError, check, check_resumed, parse
    from torch import Tensor, nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import DataLoader
    from tqdm import tqdm
    from transformers import BertForMaskedLM
except ModuleNotFoundError as error:
    sys.exit(f"pretrain.py needs {error.name}, which is not installed; in the torchlamb folder run: pip install '.[bert]'")

import torchlamb
from torchlamb.noise_scale import NoiseScale
from torchlamb.telemetry import Telemetry, plot

TIMEOUT = datetime.timedelta(minutes=30)  # tokenizing a large corpus takes its time, while the other processes wait
HELD_OUT_SAMPLES = 1024
TERMINATED = 128 + signal.SIGTERM  # exit status


@dataclass
class Run:
    """What training changes, and what it is done with."""

    settings: Settings
    corpus: Corpus
    device: torch.device
    model: nn.Module  # as it is called: wrapped, with DDP
    progress: dict[str, Any]  # step, samples, and the losses of the steps since the last line of metrics

    @property
    def rank(self) -> int:
        """Of this process."""
        return dist.get_rank()


class Terminated(Exception):
    """SIGTERM has come, or --stop-at; everything is saved."""


def main() -> int:
    stop = StopFlag()
    device = join_processes()
    try:
        settings, digest, checkpoint = on_first(prepare)
        corpus = cached(digest, settings.cache)
        model = build_model(settings, corpus, device)
        run = Run(settings, corpus, device, model, {"step": 0, "samples": 0, "losses": []})
        if run.rank == 0:
            print(describe(run), flush=True)
        for phase in settings.phases:
            if checkpoint is None or phase.last > torchlamb.checkpoint.more_of(checkpoint)["progress"]["step"]:
                train(run, phase, checkpoint, stop)
                checkpoint = None
        if checkpoint is not None and run.rank == 0:
            print(f"All steps were taken before; for another run, name another --out than {settings.out}")
        finish(run)
    except (UsageError, CorpusError) as error:
        return leave(f"error: {error}", 2)
    except Terminated as end:
        return leave(str(end), TERMINATED if stop.is_set else 0)
    except OSError as error:  # it may be this process's alone: the others end when it has gone
        print(f"error: {error}; make room, and go on with --resume", file=sys.stderr, flush=True)
        os._exit(1)
    return leave("", 0)


def prepare() -> tuple[Settings, str, Path | None]:
    """Check everything that can be checked, tokenize the corpus, and only then make the folder. Of the first process."""
    settings = check(parse(), dist.get_world_size())
    corpus = load(settings.corpus, settings.vocab_size, settings.cache)
    for phase in settings.phases:
        MaskedSequences(corpus, phase.length, settings.seed)  # raises where the text is too short
    checkpoint = torchlamb.checkpoint.newest(settings.out / "checkpoints") if settings.resume else None
    if checkpoint is not None:
        check_resumed(settings, torchlamb.checkpoint.more_of(checkpoint), corpus.digest)
    settings.out.mkdir(parents=True, exist_ok=True)
    return settings, corpus.digest, checkpoint


def build_model(settings: Settings, corpus: Corpus, device: torch.device) -> nn.Module:
    torch.manual_seed(settings.seed)  # every process begins with the same numbers
    model: nn.Module = MaskedLanguageModel(BertForMaskedLM(settings.config(corpus.vocab_size))).to(device)
    if settings.shard == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if settings.shard == "fsdp2":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in model.bert.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


class MaskedLanguageModel(nn.Module):
    """The mean loss over masked tokens. The head sees those alone: it is most of a small model's work."""

    def __init__(self, bert: BertForMaskedLM) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        hidden = self.bert.bert(input_ids=ids).last_hidden_state
        masked = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        scores = self.bert.cls(masked)
        return nn.functional.cross_entropy(scores.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def make_optimizer(run: Run, phase: Phase) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Make what the recipe says: LAMB as it is built by recipes, or AdamW with the same groups and schedule."""
    settings, model = run.settings, unwrapped(run.model)
    recipe = settings.recipe_of(phase)
    if settings.optimizer == "lamb":
        return recipe.build(model, fused=None if settings.fused else False)
    groups = torchlamb.param_groups(model, recipe.weight_decay)
    options = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps, "fused": settings.fused}
    optimizer = torch.optim.AdamW(groups, **options)
    return optimizer, LambdaLR(optimizer, recipe.lr_factor)


def begin(run: Run, phase: Phase) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """Return a phase's optimizer, and by name what else has a state."""
    optimizer, scheduler = make_optimizer(run, phase)
    parts: dict[str, Any] = {"scheduler": scheduler}
    if run.settings.noise_scale:
        group = dist.group.WORLD if run.settings.shard == "ddp" else None
        parts["noise_scale"] = NoiseScale(unwrapped(run.model).parameters(), process_group=group)
    return optimizer, parts


def train(run: Run, phase: Phase, checkpoint: Path | None, stop: StopFlag) -> None:
    """Take the steps of a phase that are left, on this process's share of each batch."""
    settings, progress = run.settings, run.progress
    optimizer, parts = begin(run, phase)
    if checkpoint is not None:
        resume(run, checkpoint, optimizer, parts)
        if progress["step"] == phase.first:  # the phase before has ended with it: its weights are all that counts
            optimizer, parts = begin(run, phase)
    metrics = Metrics(run, phase, optimizer)
    batches = iter(samples_of(run, phase, first=progress["step"] - phase.first))
    with stop, metrics:
        while progress["step"] < phase.last:
            loss = accumulate_gradients(run, batches, parts.get("noise_scale"))
            with metrics.optimizing():
                if settings.optimizer == "adamw":  # Lamb clips by itself
                    nn.utils.clip_grad_norm_(run.model.parameters(), settings.recipe_of(phase).max_grad_norm or float("inf"))
                optimizer.step()
            optimizer.zero_grad()
            parts["scheduler"].step()
            progress["step"] += 1
            progress["samples"] += settings.batch_size
            metrics.record(loss, parts.get("noise_scale"))
            stopping = stop.on_any() or progress["step"] == settings.stop_at
            if stopping or progress["step"] % settings.save_every == 0 or progress["step"] == phase.last:
                metrics.gather_losses()
                save(run, optimizer, parts)
            if stopping and progress["step"] < settings.phases[-1].last:
                raise Terminated(f"Saved after {progress['step']} of {settings.phases[-1].last} steps; go on with --resume")
    loss = held_out_loss(run, phase)
    if run.rank == 0:
        print(f"Phase {phase.number}: held-out loss {loss:.4f}, of single tokens {run.corpus.unigram_loss():.4f}", flush=True)


def accumulate_gradients(run: Run, batches: Iterator[list[Tensor]], noise_scale: NoiseScale | None) -> Tensor:
    """Take a step's micro-batches of this process, and return their mean loss."""
    settings, processes = run.settings, dist.get_world_size()
    count = settings.batch_size // processes // settings.micro_batch_size
    torch.manual_seed(hash_of(settings.seed, run.progress["step"], run.rank))  # of dropout: nothing else is random here
    total = torch.zeros((), device=run.device)
    for i in range(count):
        ids, places, targets = (part.to(run.device, non_blocking=True) for part in next(batches))
        ddp = isinstance(run.model, DistributedDataParallel)
        with run.model.no_sync() if ddp and i < count - 1 else contextlib.nullcontext():
            with torch.autocast(run.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = run.model(ids, places, targets) / count
            loss.backward()
        total += loss.detach()
        if i == 0 and noise_scale is not None:
            # DDP has this process's samples here, FSDP2 those of all processes, already averaged.
            shared = 1 if ddp else processes
            own = settings.batch_size // processes
            noise_scale.micro_batch(samples=settings.micro_batch_size * shared, of=own * shared)
    if noise_scale is not None:
        noise_scale.step(settings.batch_size)
    return total


def samples_of(run: Run, phase: Phase, first: int) -> DataLoader:
    settings, processes = run.settings, dist.get_world_size()
    samples = MaskedSequences(run.corpus, phase.length, settings.seed)
    share = Share(first, phase.steps, settings.batch_size, settings.micro_batch_size, run.rank, processes)
    pinned = run.device.type == "cuda"
    return DataLoader(samples, batch_sampler=share, num_workers=settings.workers, pin_memory=pinned)


@torch.no_grad()
def held_out_loss(run: Run, phase: Phase) -> float:
    """Return the mean loss on sequences that training does not see; the same number of them on every process."""
    samples = MaskedSequences(run.corpus, phase.length, run.settings.seed, held_out=True)
    size, processes = run.settings.micro_batch_size, dist.get_world_size()
    count = max(1, min(HELD_OUT_SAMPLES, samples.count) // size)
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    run.model.eval()
    for i in range(count):
        numbers = [n % samples.count for n in range(i * size, (i + 1) * size)]
        columns = zip(*(samples[n] for n in numbers), strict=True)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.settings.precision == "bf16"):
            total += run.model(*(torch.stack(column).to(run.device) for column in columns)) / count
    run.model.train()
    dist.all_reduce(total)
    return float(total) / processes


# Saving and resuming.


def save(run: Run, optimizer: torch.optim.Optimizer, parts: dict[str, Any]) -> None:
    more = {name: part.state_dict() for name, part in parts.items()}
    torchlamb.checkpoint.save(
        run.settings.out / "checkpoints",
        unwrapped(run.model),
        optimizer,
        keep=2,
        progress=run.progress,
        settings=run.settings.same_run(),
        corpus=run.corpus.digest,
        parts=more,
    )


def resume(run: Run, checkpoint: Path, optimizer: torch.optim.Optimizer, parts: dict[str, Any]) -> None:
    more = torchlamb.checkpoint.load(checkpoint, unwrapped(run.model), optimizer)
    run.progress.update(more["progress"])
    for name, part in parts.items():
        part.load_state_dict(more["parts"][name])


class StopFlag:
    """Whether SIGTERM has come to any process. While it is entered, the signal waits for the end of a step."""

    def __init__(self) -> None:
        self.is_set = False

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGTERM, self._set)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _set(self, *_: object) -> None:
        self.is_set = True

    def on_any(self) -> bool:
        """Return the same on all processes, which must leave together."""
        if dist.get_world_size() > 1:
            flag = torch.tensor(int(self.is_set), device=device_of_process())
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.is_set = bool(flag)
        return self.is_set


# What is told of a run.


class Metrics:
    """The progress bar, metrics.jsonl, and what is written to TensorBoard and of trust ratios."""

    def __init__(self, run: Run, phase: Phase, optimizer: torch.optim.Optimizer) -> None:
        self.run, self.phase, self.optimizer = run, phase, optimizer
        settings, step = run.settings, run.progress["step"]
        first = run.rank == 0
        self.file = settings.out / "metrics.jsonl"
        drop_rows_after(self.file, step) if first else None
        self.bar = tqdm(
            total=phase.steps,
            initial=step - phase.first,
            desc=f"phase {phase.number}",
            unit="step",
            disable=not first,
            dynamic_ncols=True,
        )
        self.telemetry = None
        if settings.trust_ratios and isinstance(optimizer, torchlamb.Lamb):
            path = settings.out / "trust_ratios.jsonl" if first else None
            self.telemetry = Telemetry(optimizer, path, every=settings.log_every, start=step)
        self.board = None
        if settings.tensorboard and first:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(settings.out / "tensorboard"), purge_step=step)
        self.losses: list[Tensor] = []  # of this process, of the steps that run.progress has not
        self.in_optimizer, self.began, self.since = 0.0, clock(), step

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()

    @contextlib.contextmanager
    def optimizing(self) -> Iterator[None]:
        """Measure how long the optimizer takes."""
        self.lr, started = self.optimizer.param_groups[0]["lr"], clock()
        yield
        self.in_optimizer += clock() - started

    def record(self, loss: Tensor, noise_scale: NoiseScale | None) -> None:
        """Note a step's loss; write what has come together at every `log_every`-th step, and at the last."""
        progress, step = self.run.progress, self.run.progress["step"]
        self.losses.append(loss)
        if self.telemetry is not None:
            self.telemetry.step()
        if step % self.run.settings.log_every == 0 or step == self.phase.last:
            self.gather_losses()
            self.write(math.fsum(progress["losses"]) / len(progress["losses"]), noise_scale)
            progress["losses"] = []
            self.in_optimizer, self.began, self.since = 0.0, clock(), step
        self.bar.update(1)

    def gather_losses(self) -> None:
        """Move losses, as means over all processes, to where they are saved."""
        if self.losses:
            losses = torch.stack(self.losses)
            dist.all_reduce(losses)
            self.run.progress["losses"] += (losses / dist.get_world_size()).tolist()
            self.losses = []

    def write(self, loss: float, noise_scale: NoiseScale | None) -> None:
        step, seconds = self.run.progress["step"], clock() - self.began
        row = {
            "step": step,
            "phase": self.phase.number,
            "samples": self.run.progress["samples"],
            "loss": loss,
            "lr": self.lr,
            "tokens_per_second": round((step - self.since) * self.run.settings.batch_size * self.phase.length / seconds),
            "optimizer_share": round(self.in_optimizer / seconds, 4),
        }
        if noise_scale is not None:
            value = noise_scale.value
            row["noise_scale"] = value if value == value else None  # NaN while it is not known
        if self.run.rank:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, step)
        shown = {"loss": f"{loss:.3f}", "lr": f"{row['lr']:.2g}", "tokens/s": f"{row['tokens_per_second']:,}"}
        self.bar.set_postfix({**shown, "optimizer": f"{row['optimizer_share']:.1%}"}, refresh=False)


def drop_rows_after(file: Path, step: int) -> None:
    """Remove what a run that died has written after its last checkpoint."""
    if file.exists():
        rows = [
            line for line in file.read_text(encoding="utf-8").splitlines() if is_row(line) and json.loads(line)["step"] <= step
        ]
        write_whole(file, lambda path: path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8"))


def is_row(line: str) -> bool:
    try:
        return "step" in json.loads(line)
    except ValueError:  # a crash has cut it
        return False


def finish(run: Run) -> None:
    """Draw the plots, and say where everything is."""
    out = run.settings.out
    if run.rank:
        return
    rows = plot_metrics(out / "metrics.jsonl", out / "loss.png", run.corpus.unigram_loss())
    print(f"Loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}; {rows[-1]['samples']:,} sequences; plot: {out / 'loss.png'}")
    if (out / "trust_ratios.jsonl").exists():
        plot(out / "trust_ratios.jsonl", out / "trust_ratios.png")
        print(f"Trust ratios by layer: {out / 'trust_ratios.png'}")
    if rows[-1].get("noise_scale"):
        print(f"Gradient noise scale at the end: {rows[-1]['noise_scale']:,.0f} sequences")
    print(f"Checkpoints: {out / 'checkpoints'}", flush=True)


def describe(run: Run) -> str:
    s = run.settings
    parameters = sum(p.numel() for p in run.model.parameters())
    steps = " + ".join(str(phase.steps) for phase in s.phases)
    where = f"{dist.get_world_size()} x {run.device.type}, --shard {s.shard}, {s.precision}"
    what = (
        f"BERT-{s.model}, {parameters / 1e6:.1f} M parameters, {s.optimizer}; {len(run.corpus.ids) / 1e6:.1f} M tokens of text"
    )
    return f"{what}; {steps} steps of {s.batch_size} sequences on {where}"


# Processes.


def join_processes() -> torch.device:
    """Join the processes that torchrun started, or be the only one; return the device of this one."""
    alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    device = device_of_process()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device, **alone)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT, **alone)
    return device


def device_of_process() -> torch.device:
    local_rank, local_processes = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return torch.device("cuda", local_rank) if torch.cuda.device_count() >= local_processes else torch.device("cpu")


def leave(message: str, status: int) -> int:
    """Print the message once, and leave together."""
    if message and dist.get_rank() == 0:
        print(message, file=sys.stderr if status == 2 else sys.stdout, flush=True)
    dist.barrier()
    # gloo's threads need the interpreter to let go of the last tensors. It is free while this sleeps; one that is ending would
    # abort the process instead: github.com/pytorch/pytorch/pull/179291.
    time.sleep(0.2)
    dist.destroy_process_group()
    return status


def on_first(function: Callable[[], Any]) -> Any:
    """Return on all processes what the function returns, or raise what it raises, on the first, which alone calls it."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (UsageError, CorpusError, OSError) as error:
            outcome[1] = error
        except SystemExit as error:  # of the command line's parser, whose message is out
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
