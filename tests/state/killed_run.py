"""A training run that is killed at random moments and started again: what test_kills.py runs in processes of its own.

Moments are counted in function calls, not in seconds, and the process kills itself: no clock decides whether it gets there.
Processes are forked from one that has imported everything, so that a new start costs a fraction of a second.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import torchlamb
from torchlamb import checkpoint

STEPS, SAVE_EVERY = 120, 2
HANGS = 600.0  # seconds, a limit against hangs only
LEFT = 1  # seconds for a process whose partner was killed


class Moment(NamedTuple):
    """When a process kills itself: at so many function calls, of Python's or C's, from the beginning of a step."""

    step: int
    calls: int


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.LayerNorm(60), nn.ReLU(), nn.Dropout(0.2), nn.Linear(60, 10)).bfloat16()


def run(folder: Path, result: Path, rank: int, port: int, moment: Moment | None) -> None:
    """Train all steps, from the newest checkpoint if there is one, and write the parameters and the state at the end.

    Between the first two steps that are saved it counts function calls, and writes their number beside the result.
    """
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
    calls = Calls(None if moment is None else moment.calls)
    for step in range(first, STEPS):
        if step == (SAVE_EVERY if moment is None else moment.step):
            sys.setprofile(calls.count)
        if moment is None and step == 2 * SAVE_EVERY:
            sys.setprofile(None)
            result.with_suffix(".calls").write_text(str(calls.number))
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


class Calls:
    """Counts function calls, and kills the process at one of them."""

    def __init__(self, last: int | None) -> None:
        self.number, self.last = 0, last

    def count(self, _frame: Any, _event: str, _arg: Any) -> None:
        """Count, as a function for `sys.setprofile`: before and after what is called."""
        self.number += 1
        if self.number == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(folder: Path, result: Path, processes: int, moments: dict[int, Moment]) -> list[Any]:
    """Return the processes, of which those with a moment kill themselves then."""
    port = free_port() if processes > 1 else 0
    started = [
        mp.get_context("fork").Process(target=run, args=(folder, result, rank, port, moments.get(rank)))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    return started


def end(started: list[Any]) -> list[int]:
    """Wait for what is left to end, with a limit, and return the exit codes."""
    for process in started:
        process.join(HANGS if all(p.exitcode in (None, 0) for p in started) else LEFT)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def newest_step(folder: Path) -> int:
    """Return the step to go on with from the newest checkpoint, 0 where there is none."""
    if not folder.is_dir() or not any(folder.glob("checkpoint-*")):
        return 0
    return int(checkpoint.more_of(checkpoint.newest(folder))["step"])


def main(folder: Path, processes: int, kills: int, seed: int) -> None:
    """Run once in peace and once killed at random moments, and compare.

    Prints how often it was killed, and how often of those while a checkpoint was being written.
    """
    whole, killed = folder / "whole", folder / "killed"
    clock = time.monotonic()
    assert end(start(whole, folder / "whole.0", processes, {})) == [0] * processes, "the uninterrupted run failed"
    seconds = time.monotonic() - clock
    calls = int((folder / "whole.calls").read_text())  # in as many steps as lie between two checkpoints
    random.seed(seed)
    saving = 0
    for kill in range(kills):
        first = newest_step(killed)
        left = kills - kill
        ahead = random.uniform(0, 2 * (STEPS - first) / left)  # on average, the kills spread over all steps
        # A kill goes at most one checkpoint beyond its step: so many steps are left for those that follow.
        moment = Moment(min(first + int(ahead), STEPS - 2 * SAVE_EVERY * left), random.randint(1, calls))
        victim = random.randrange(processes)
        started = start(killed, folder / "killed.0", processes, {victim: moment})
        started[victim].join(HANGS)
        assert started[victim].exitcode == -signal.SIGKILL, f"it ended with {started[victim].exitcode} before {moment}"
        saving += any(killed.glob(".saving-*"))
        end(started)
    assert end(start(killed, folder / "killed.0", processes, {})) == [0] * processes, "the resumed run failed"
    for rank in range(processes):
        a, b = (torch.load(folder / f"{name}.{rank}", weights_only=True) for name in ("whole", "killed"))
        assert len(a) == len(b) > 0
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), "the resumed run ended elsewhere"
    assert len(list(killed.glob("checkpoint-*"))) == 3
    assert not list(killed.glob(".saving-*"))
    sys.stdout.write(f"killed {kills} times, {saving} of them while a checkpoint was written; {seconds:.1f} s uninterrupted\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
