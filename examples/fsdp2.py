"""Train a network that FSDP2 shards over several processes, and show that LAMB's steps stay those of the unsharded network.

How torchlamb is used stands in `main`, `make_optimizer` and `train`: exactly as without shards. A run can be stopped, and
resumed on another number of processes; at the end the parameters are compared with those of an unsharded run of all steps.

    pip install '.[demo]'
    torchrun --nproc-per-node 2 examples/fsdp2.py --stop-at 30
    torchrun --nproc-per-node 4 examples/fsdp2.py --resume
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import torchlamb

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    sys.exit(f"fsdp2.py needs {error.name}, which is not installed; in the torchlamb folder run: pip install '.[demo]'")

TRAIN_SIZE, TEST_SIZE = 1437, 360
LR, WEIGHT_DECAY, MAX_GRAD_NORM = 0.04, 1e-3, 1.0
TIMEOUT = datetime.timedelta(seconds=60)  # for which processes wait for one that hangs


@dataclass(frozen=True)
class Settings:
    """What the command line asks for, and where it begins. Steps are counted from 0 over all runs."""

    steps: int
    batch_size: int  # images in a step, over all processes
    stop_at: int | None
    out: Path
    checkpoint: Path | None  # what the run resumes from
    first: int  # step


def main() -> None:
    device = join_processes()
    rank, processes = dist.get_rank(), dist.get_world_size()
    settings = agree_on_settings()
    if rank == 0:
        asked = f"steps {settings.first} to {settings.stop_at or settings.steps}, images in a step: {settings.batch_size}"
        print(f"Processes: {processes} ({device.type}), {asked}", flush=True)
    model = build_model().to(device)
    mesh = init_device_mesh(device.type, (processes,))
    for part in (model[0], model[1], model):
        fully_shard(part, mesh=mesh)
    optimizer = make_optimizer(model)
    if settings.checkpoint is not None:
        torchlamb.checkpoint.load(settings.checkpoint, model, optimizer)  # cut into as many shards as there are processes now
    middle = settings.stop_at or max(settings.first, settings.steps // 2)
    train(model, optimizer, range(settings.first, middle), settings, rank, processes)
    if middle > settings.first:
        save(model, optimizer, middle, settings)
    train(model, optimizer, range(middle, settings.stop_at or settings.steps), settings, rank, processes)
    trained = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    leave_processes()  # before process 0 goes on alone: for as long as that takes, no other has to wait
    if rank == 0 and settings.stop_at is None:
        compare_with_unsharded(trained, settings, device)


def join_processes() -> torch.device:
    """Join the processes that torchrun started, or be the only one; return the device of this one."""
    local_rank, local_processes = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if torch.cuda.device_count() < local_processes:
        dist.init_process_group("gloo", timeout=TIMEOUT, **alone)
        return torch.device("cpu")
    # With TensorFloat-32, the comparison at the end would show what that rounds away, not what sharding does.
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device, **alone)
    return device


def leave_processes() -> None:
    dist.barrier()
    # gloo's threads need the interpreter to let go of the last tensors. It is free while this sleeps; one that is ending would
    # abort the process instead: github.com/pytorch/pytorch/pull/179291.
    time.sleep(0.2)
    dist.destroy_process_group()


def build_model() -> nn.Sequential:
    torch.manual_seed(0)  # every process begins with the same numbers, of which it then keeps its shards
    convolution = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.GroupNorm(4, 8), nn.ReLU())
    downsampling = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.GroupNorm(4, 16), nn.ReLU())
    return nn.Sequential(convolution, downsampling, nn.Flatten(), nn.Linear(16 * 4 * 4, 10))


def make_optimizer(model: nn.Module) -> torchlamb.Lamb:
    groups = torchlamb.param_groups(model, weight_decay=WEIGHT_DECAY, adapt_excluded=False)
    return torchlamb.Lamb(groups, lr=LR, max_grad_norm=MAX_GRAD_NORM)


def train(
    model: nn.Module, optimizer: torchlamb.Lamb, steps: range, settings: Settings, share: int = 0, shares: int = 1
) -> None:
    """Take these steps, on one share of every batch. Data and learning rate follow from the step: they need no checkpoint."""
    device = next(model.parameters()).device
    images, labels = (part.to(device) for part in load_parts()["train"])
    for step in steps:
        batch = batch_of(step, settings.batch_size).tensor_split(shares)[share].to(device)
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / settings.steps)
        losses = nn.functional.cross_entropy(model(images[batch]), labels[batch], reduction="none")
        # FSDP averages over the processes, whose shares may differ by an image: so a mean of means would not do.
        (losses.sum() * shares / settings.batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()


def batch_of(step: int, batch_size: int) -> Tensor:
    """Return the indices of the images in a step: a piece of its epoch's random order."""
    epoch, piece = divmod(step, TRAIN_SIZE // batch_size)
    order = torch.randperm(TRAIN_SIZE, generator=torch.Generator().manual_seed(epoch))
    return order[piece * batch_size : (piece + 1) * batch_size]


@functools.cache
def load_parts() -> dict[str, tuple[Tensor, Tensor]]:
    """Return images (n, 1, 8, 8), from 0 to 1, and labels (n,) of each part."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=TEST_SIZE, stratify=labels, random_state=0)
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def save(model: nn.Module, optimizer: torchlamb.Lamb, step: int, settings: Settings) -> None:
    """Save all shards, and what a later run has to know before it begins."""
    torchlamb.checkpoint.save(
        settings.out, model, optimizer, keep=2, step=step, steps=settings.steps, batch_size=settings.batch_size
    )
    if dist.get_rank() == 0:
        print(f"Saved after {step} of {settings.steps} steps: {settings.out}", flush=True)


def compare_with_unsharded(trained: dict[str, Tensor], settings: Settings, device: torch.device) -> None:
    sharded, unsharded = build_model(), build_model().to(device)
    sharded.load_state_dict(trained)
    train(unsharded, make_optimizer(unsharded), range(settings.steps), settings)
    unsharded.cpu()
    difference = max(float((trained[name] - p).norm() / p.norm()) for name, p in unsharded.state_dict().items())
    print(f"Test accuracy: sharded {accuracy(sharded):.2%}, unsharded {accuracy(unsharded):.2%}")
    print(f"Largest relative difference of a parameter tensor: {difference:.1e}")


def accuracy(model: nn.Module) -> float:
    images, labels = load_parts()["test"]
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).double().mean())


def agree_on_settings() -> Settings:
    """Let process 0 read the command line and the checkpoint for all, so that all go on or all exit."""
    agreed: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            agreed = [parse_args(processes=dist.get_world_size())]
        except SystemExit as end:  # its message is out: torchrun ends this process as soon as another one has exited
            agreed = [end.code]
    dist.broadcast_object_list(agreed)
    if not isinstance(agreed[0], Settings):
        leave_processes()
        sys.exit(agreed[0])
    return agreed[0]


def parse_args(arguments: list[str] | None = None, processes: int = 1) -> Settings:
    description = __doc__.partition("\n")[0]
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    add = functools.partial(parser.add_argument, metavar="N", type=whole_number)
    add("--steps", default=60, help="steps in all, over which the learning rate falls to 0")
    size_type = functools.partial(whole_number, low=processes, high=TRAIN_SIZE)
    add("--batch-size", default=256, type=size_type, help="images in a step, over all processes; at least one for each")
    add("--stop-at", default=None, help="save and stop after N steps; without it, save half way and go on")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    out_help = "where the checkpoints are, in reach of all processes"
    parser.add_argument("--out", default="out/fsdp2", metavar="FOLDER", type=Path, help=out_help)
    args = parser.parse_args(arguments)
    first, checkpoint = 0, None
    if args.resume:
        checkpoint = torchlamb.checkpoint.newest(args.out)
        if checkpoint is None:
            parser.error(f"argument --resume: no checkpoint in {args.out}; save one with --stop-at, or name another --out")
        progress = torchlamb.checkpoint.more_of(checkpoint)
        first, steps, batch_size = progress["step"], progress["steps"], progress["batch_size"]
        if (args.steps, args.batch_size) != (steps, batch_size):
            got = f"got --steps {args.steps} --batch-size {args.batch_size}"
            saved = f"{checkpoint} was saved with --steps {steps} --batch-size {batch_size}"
            parser.error(f"argument --resume: {got}, but {saved}; give the same, or name another --out")
    if args.stop_at is not None and not first < args.stop_at < args.steps:
        parser.error(f"argument --stop-at: got {args.stop_at}; give a whole number above {first} and below {args.steps}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: got {str(args.out)!r}, which cannot be a folder ({error.strerror}); name another one")
    if not os.access(args.out, os.W_OK | os.X_OK):
        parser.error(f"argument --out: got {str(args.out)!r}, which cannot be written to; name another folder")
    return Settings(args.steps, args.batch_size, args.stop_at, args.out, checkpoint, first)


def whole_number(text: str, low: int = 1, high: int | None = None) -> int:
    number = int(text) if text.strip().lstrip("+-").isdecimal() else None
    if number is None or number < low or (high is not None and number > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"got {text!r}; give a whole number {allowed}")
    return number


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
