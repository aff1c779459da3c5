"""The command line: what can be asked for, and what is wrong with it before anything is written."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from transformers import BertConfig

import torchlamb
from torchlamb import recipes
from torchlamb.recipes import Recipe

# layers, width, heads
MODELS = {"tiny": (2, 128, 2), "small": (4, 512, 8), "base": (12, 768, 12), "large": (24, 1024, 16)}
VOCAB_SIZES = {"tiny": 2048, "small": 8192, "base": 30522, "large": 30522}
# Tried on the tiny model; the warm-up is long for a batch so small because BERT has its layer norms last.
OWN = {
    "lamb": Recipe(256, 0.01, "examples/bert", betas=(0.9, 0.98), warmup_share=0.05, max_grad_norm=1.0),
    "adamw": Recipe(256, 0.002, "examples/bert", betas=(0.9, 0.98), warmup_share=0.05, max_grad_norm=1.0),
}


class UsageError(Exception):
    """What is wrong with the command line, and what to do."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one sequence length and one schedule. Steps are counted over all phases."""

    number: int  # 1 or 2
    length: int
    first: int
    last: int

    @property
    def steps(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Settings:
    """Pre-train BERT on your text by masked language modelling."""

    corpus: tuple[str, ...] = ("stdlib",)
    """stdlib: the source of Python's standard library; files and folders; or hf:NAME[:CONFIG], a dataset of the hub."""
    model: Literal["tiny", "small", "base", "large"] = "tiny"
    batch_size: int = 256
    """Sequences in a step, over all processes."""
    micro_batch_size: int | None = None
    """Sequences that a process takes at once; the rest of its share is accumulated. Default: at most 64."""
    samples: int = 262144
    """Sequences of phase 1."""
    seq_len: int = 32
    """Tokens of a sequence in phase 1, with [CLS] and [SEP]."""
    phase2_samples: int = 0
    """Sequences of phase 2, which goes on with the same weights and begins a new schedule."""
    phase2_seq_len: int = 128
    optimizer: Literal["lamb", "adamw"] = "lamb"
    recipe: Literal["own", "mlperf", "nvidia"] = "own"
    """Learning rate and schedule, carried to the batch size by rule: of the tiny model here, or published for BERT-large."""
    lr: float | None = None
    """Peak of the learning rate, instead of the recipe's."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes in it, under autocast; parameters stay in float32."""
    shard: Literal["none", "ddp", "fsdp2"] = "none"
    fused: bool = True
    """Take the fused kernels of the optimizer; --no-fused for those of torch."""
    out: Path = Path("out/bert")
    """Folder for checkpoints, metrics.jsonl and plots, in reach of all processes."""
    cache: Path = Path("out/bert-cache")
    """Folder for tokenized corpora, in reach of all processes."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    trust_ratios: bool = False
    """Record the trust ratios of all layers, and plot them."""
    noise_scale: bool = False
    """Measure the gradient noise scale: up to which batch size more samples save steps."""
    tensorboard: bool = False
    """Write the metrics to TensorBoard, too."""
    vocab_size: int | None = None
    """Of the tokenizer, which is trained on the corpus. Default: by model."""
    dropout: float = 0.0
    save_every: int = 500
    """Steps from one checkpoint to the next."""
    log_every: int = 10
    """Steps from one line of metrics to the next."""
    stop_at: int | None = None
    """Save and leave after so many steps."""
    seed: int = 0
    workers: int = 0
    """Processes that prepare samples, for each training process."""

    @property
    def phases(self) -> list[Phase]:
        first, second = (samples // self.batch_size for samples in (self.samples, self.phase2_samples))
        both = [Phase(1, self.seq_len, 0, first), Phase(2, self.phase2_seq_len, first, first + second)]
        return [phase for phase in both if phase.steps]

    def recipe_of(self, phase: Phase) -> Recipe:
        """Return learning rate and schedule of a phase, for this batch size."""
        if self.recipe == "own":
            recipe = recipes.scale(OWN[self.optimizer], self.batch_size)
        elif self.recipe == "mlperf":
            recipe = recipes.mlperf_bert(self.batch_size)
        else:
            recipe = recipes.scale(recipes.nvidia_bert(phase.number), self.batch_size)
        recipe = replace(recipe, total_steps=phase.steps)
        return recipe if self.lr is None else replace(recipe, lr=self.lr)

    def config(self, vocab_size: int) -> BertConfig:
        layers, width, heads = MODELS[self.model]
        return BertConfig(
            vocab_size=vocab_size,
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=max(phase.length for phase in self.phases),
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
        )

    def same_run(self) -> dict[str, Any]:
        """Return what must not change when a run is resumed, as plain values."""
        mine = asdict(self)
        names = ("model", "batch_size", "samples", "seq_len", "phase2_samples", "phase2_seq_len", "optimizer", "recipe", "lr")
        return {name: mine[name] for name in (*names, "precision", "dropout", "seed", "noise_scale")}


def parse(arguments: list[str] | None = None) -> Settings:
    return tyro.cli(Settings, args=arguments, prog="pretrain.py")


def check(settings: Settings, processes: int) -> Settings:
    """Return the settings with what was left open, or raise UsageError. Nothing has been written then."""
    s = settings
    low = {
        "batch_size": 1,
        "samples": 1,
        "seq_len": 4,
        "phase2_samples": 0,
        "phase2_seq_len": 4,
        "save_every": 1,
        "log_every": 1,
    }
    for name, least in {**low, "workers": 0}.items():
        if getattr(s, name) < least:
            raise UsageError(f"{flag(name)} must be at least {least}, got {getattr(s, name)}")
    if s.shard == "none" and processes > 1:
        raise UsageError(f"--shard none is for one process, and there are {processes}; give --shard ddp or --shard fsdp2")
    if s.batch_size % processes:
        raise UsageError(
            f"--batch-size {s.batch_size} does not divide among {processes} processes; give a multiple of {processes}"
        )
    own = s.batch_size // processes
    micro = s.micro_batch_size
    if micro is None:
        micro = next(size for size in range(min(64, own), 0, -1) if own % size == 0)
    if micro < 1 or own % micro:
        raise UsageError(
            f"--micro-batch-size {micro} does not divide the {own} sequences of a process; give a divisor of {own}"
        )
    if s.noise_scale and own == micro:
        raise UsageError(
            f"--noise-scale compares a micro-batch with the batch, and each process has one micro-batch of {micro}; give a "
            "smaller --micro-batch-size"
        )
    for name in ("samples", "phase2_samples"):
        if 0 < getattr(s, name) < s.batch_size:
            raise UsageError(f"{flag(name)} {getattr(s, name)} is less than one batch of {s.batch_size}; give more")
    s = replace(s, micro_batch_size=micro, vocab_size=s.vocab_size or VOCAB_SIZES[s.model])
    if s.stop_at is not None and not 0 < s.stop_at < s.phases[-1].last:
        raise UsageError(f"--stop-at must be above 0 and below all {s.phases[-1].last} steps, got {s.stop_at}")
    try:
        for phase in s.phases:
            s.recipe_of(phase).lr_factor(0)
    except ValueError as error:
        raise UsageError(f"--batch-size {s.batch_size} with --recipe {s.recipe} and {s.samples} samples: {error}") from error
    check_folder(s)
    return s


def check_folder(settings: Settings) -> None:
    out = settings.out
    nearest = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise UsageError(f"--out {out} cannot be a folder: {nearest} is a file; name another one")
    has_run = (out / "checkpoints").is_dir() and any((out / "checkpoints").iterdir())
    if has_run and not settings.resume:
        raise UsageError(f"--out {out} holds a run already; give --resume to go on with it, or name another folder")
    if settings.resume and torchlamb.checkpoint.newest(out / "checkpoints") is None:
        raise UsageError(f"--resume: {out} has no checkpoint; leave it out, or name the --out of the run")
    layers, width, _ = MODELS[settings.model]
    parameters = 12 * layers * width**2 + (settings.vocab_size or 0) * width
    needed, free = 3 * 12 * parameters, shutil.disk_usage(nearest).free  # of two checkpoints and a third that is being written
    if free < needed:
        raise UsageError(
            f"--out {out} has {free / 1e9:.2f} GB left, and checkpoints need {needed / 1e9:.2f}; make room, or name another"
        )


def check_resumed(settings: Settings, saved: dict[str, Any], tokenizer: str) -> None:
    """Raise UsageError if a checkpoint is of another run."""
    for name, value in settings.same_run().items():
        if saved["settings"].get(name) != value:
            before = saved["settings"].get(name)
            raise UsageError(
                f"--resume: {settings.out} was made with {flag(name)} {before}, and now it is {value}; give the same, or name "
                "another --out"
            )
    if saved["corpus"] != tokenizer:
        raise UsageError(
            f"--resume: {settings.out} was made with another corpus or tokenizer; give the same --corpus and --vocab-size, or "
            "name another --out"
        )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
