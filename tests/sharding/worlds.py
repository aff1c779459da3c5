"""Cases that several processes run together: for each world size, one process group runs all of its cases.

A script of cases calls `main`; its test calls `run_world` once for each world and asks `failures_of` each case.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from loading import HANGS, end, with_helpers
from sharded import TIMEOUT, Case


def run_world(script: Path, world: int, names: list[str], out: Path, **environment: object) -> None:
    """Run cases of a script in that many processes, and stop all of them at the limit."""
    command = [sys.executable, str(script), str(world), str(out), *names]
    with (out / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=with_helpers(**environment), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        process.wait(timeout=HANGS)
    except subprocess.TimeoutExpired:
        pass  # what was not written has not passed
    finally:
        end(process)


def failures_of(name: str, world: int, out: Path) -> str:
    """Return the tracebacks of a case, by process, or nothing."""
    found = []
    for rank in range(world):
        path = out / f"rank{rank}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        if name not in results:
            said = (out / "log").read_text()[-2000:]
            found.append(f"process {rank} of {world} ended or was stopped before this case:\n{said}")
        elif results[name] is not None:
            found.append(f"process {rank} of {world}:\n{results[name]}")
    return "\n".join(found)


def main(cases: Mapping[str, tuple[Case, tuple[int, ...]]], begin: Callable[[int, int], None] | None = None) -> None:
    """Fork the processes of a world: `SCRIPT WORLD FOLDER CASE...`. Each calls `begin` with its rank and their number."""
    world, out, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)

    def run(rank: int) -> None:
        store = f"file://{out / 'store'}"
        dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=TIMEOUT))
        if begin is not None:
            begin(rank, world)
        results: dict[str, str | None] = {}
        for name in names:
            try:
                cases[name][0](world)
                results[name] = None
            except (Exception, pytest.fail.Exception):
                results[name] = traceback.format_exc()
            (out / f"rank{rank}.json").write_text(json.dumps(results))
            dist.barrier()
        time.sleep(0.2)  # while gloo's threads let go of the last tensors: see examples/fsdp2.py
        dist.destroy_process_group()

    # From one process that has imported everything, which takes longer than many a case.
    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
