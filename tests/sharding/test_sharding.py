"""Sharded parameters step as whole ones do. For each world size, one process group runs all its cases of `sharded_cases.py`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cases import INTERPRETED
from loading import HANGS, with_helpers
from sharded_cases import CASES, SLOW

# What the GPU's kernels are interpreted for: that they step shards in two phases, in each way of storing and of placing them.
INTERPRETED_CASES = (
    "rounding_is_that_of_whole_tensors[stochastic-bf16-state-None]",
    "random_numbers[guard]",
    "low_precision[masters-None]",
    "representable_numbers[guard]",
    "blocks_that_shards_cut_through[plain]",
    "gradients_on_some_processes_only[plain]",
)
# Of what runs with two processes too, what sees the meshes of two dimensions that four have.
AT_4 = (
    *("random_numbers[decay]", "random_numbers[guard-foreach]", "representable_numbers[guard]", "other_dtypes[bfloat16]"),
    *("blocks_that_shards_cut_through[plain]", "rounding_is_that_of_whole_tensors[stochastic-bf16-state-None]"),
    *("gradients_on_some_processes_only[plain]", "one_collective_for_each_process_group", "several_groups"),
    *("one_bad_shard_skips_the_step_everywhere[single]", "tensor_parallelism[guard]"),
)
WORLDS = (2,) if INTERPRETED else (2, 3, 4)


def is_slow(world: int, name: str) -> bool:
    return world == 3 or name in SLOW or INTERPRETED or (world == 4 and 2 in CASES[name][1] and name not in AT_4)


def run_world(world: int, names: list[str], out: Path) -> None:
    """Start the processes, and stop all of them at the limit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with (out / f"log{rank}").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("sharded_cases.py")), str(out), *names],
                env=with_helpers(**environment),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
    try:
        for process in processes:
            process.wait(timeout=HANGS)
    except subprocess.TimeoutExpired:
        pass  # what was not written has not passed
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def outcome(tmp_path_factory):
    """What every process of a world wrote of a case: a traceback, or nothing."""
    folders: dict[tuple[int, bool], Path] = {}

    def look_up(world: int, name: str) -> str:
        slow = is_slow(world, name)
        if (world, slow) not in folders:
            folders[world, slow] = tmp_path_factory.mktemp(f"world{world}")
            names = [n for n, (_, worlds) in CASES.items() if world in worlds and is_slow(world, n) == slow]
            names = [n for n in names if not INTERPRETED or n in INTERPRETED_CASES]
            run_world(world, names, folders[world, slow])
        folder, found = folders[world, slow], []
        for rank in range(world):
            path = folder / f"rank{rank}.json"
            results = json.loads(path.read_text()) if path.exists() else {}
            if name not in results:
                end = (folder / f"log{rank}").read_text()[-2000:]
                found.append(f"process {rank} of {world} ended or was stopped before this case:\n{end}")
            elif results[name] is not None:
                found.append(f"process {rank} of {world}:\n{results[name]}")
        return "\n".join(found)

    return look_up


@pytest.mark.parametrize(
    ("world", "name"),
    [
        pytest.param(world, name, marks=[pytest.mark.slow] if is_slow(world, name) else [])
        for world in WORLDS
        for name, (_, worlds) in CASES.items()
        if world in worlds and (not INTERPRETED or name in INTERPRETED_CASES)
    ],
)
@pytest.mark.timeout(2 * HANGS)
def test_sharded(world, name, outcome):
    failures = outcome(world, name)
    assert not failures, failures
