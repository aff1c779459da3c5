"""A training run that is killed at random moments and started again: what test_kills.py runs in processes of its own.

Processes are forked from one that has imported everything, so that a new start costs a fraction of a second.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import socket
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import torchlamb
from torchlamb import checkpoint

STEPS, SAVE_EVERY = 120, 2


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.LayerNorm(60), nn.ReLU(), nn.Dropout(0.2), nn.Linear(60, 10)).bfloat16()


def run(folder: Path, result: Path, rank: int, port: int, began: Event) -> None:
    """Train all steps, from the newest checkpoint if there is one, and write the parameters and the state at the end."""
    torch.set_num_threads(1)
    if port:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
        dist.init_process_group("gloo")
    model = make_model()
    if port:
        fully_shard(model)
    optimizer = torchlamb.Lamb(model.named_parameters(), lr=0.05, master_weights=True, max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    first = 0
    if folder.is_dir() and any(folder.glob("checkpoint-*")):
        more = checkpoint.load(folder, model, optimizer)
        first = more["step"]
        scheduler.load_state_dict(more["scheduler"])
        torch.set_rng_state(more["rng"])
    else:
        torch.manual_seed(1)
    began.set()
    for step in range(first, STEPS):
        optimizer.zero_grad()
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(100 * step + rank)).bfloat16()
        loss = model(x).float().square().mean()
        (loss * float("nan") if step == 20 else loss).backward()  # a step that is skipped and counted
        optimizer.step()
        scheduler.step()
        if (step + 1) % SAVE_EVERY == 0:
            checkpoint.save(
                folder, model, optimizer, step=step + 1, scheduler=scheduler.state_dict(), rng=torch.get_rng_state()
            )
    assert optimizer.skipped_steps.item() == 1
    tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    torch.save([getattr(t, "_local_tensor", t).detach() for t in tensors], result.with_suffix(f".{rank}"))
    if port:
        dist.barrier()
        time.sleep(0.2)  # gloo's threads need the interpreter to let go of the last tensors
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(folder: Path, result: Path, processes: int) -> tuple[Event, list[Any]]:
    """Return what is set when the first of them trains, and the processes."""
    context = mp.get_context("fork")
    port, began = free_port() if processes > 1 else 0, context.Event()
    started = [context.Process(target=run, args=(folder, result, rank, port, began)) for rank in range(processes)]
    for process in started:
        process.start()
    return began, started


def end(started: list[Any]) -> list[int]:
    """Wait for what is left to end, with a limit, and return the exit codes."""
    for process in started:
        process.join(60 if all(p.exitcode in (None, 0) for p in started) else 1)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def main(folder: Path, processes: int, kills: int, seed: int) -> None:
    """Run once in peace and once killed at random moments, and compare.

    Prints how often it was killed, and how often of those while a checkpoint was being written.
    """
    whole, killed = folder / "whole", folder / "killed"
    began, started = start(whole, folder / "whole.0", processes)
    began.wait(60)
    clock = time.monotonic()
    assert end(started) == [0] * processes, "the uninterrupted run failed"
    seconds = time.monotonic() - clock
    random.seed(seed)
    done = saving = 0
    while done < kills:
        began, started = start(killed, folder / "killed.0", processes)
        assert began.wait(60), "it did not start again"
        time.sleep(random.uniform(0, 2 * seconds / kills))
        victim = random.choice(started)
        assert victim.exitcode is None, "it ended before it was killed often enough"
        victim.kill()
        victim.join()
        done += 1
        saving += any(killed.glob(".saving-*"))
        end(started)
    assert end(start(killed, folder / "killed.0", processes)[1]) == [0] * processes, "the resumed run failed"
    for rank in range(processes):
        a, b = (torch.load(folder / f"{name}.{rank}", weights_only=True) for name in ("whole", "killed"))
        assert len(a) == len(b) > 0
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), "the resumed run ended elsewhere"
    assert len(list(killed.glob("checkpoint-*"))) == 3
    assert not list(killed.glob(".saving-*"))
    sys.stdout.write(f"killed {done} times, {saving} of them while a checkpoint was written; {seconds:.1f} s uninterrupted\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
