"""Sharded parameters step as whole ones do. For each world size, one process group runs all its cases of `sharded_cases.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import INTERPRETED
from loading import HANGS
from sharded_cases import CASES, SLOW
from worlds import failures_of, run_world

SCRIPT = Path(__file__).with_name("sharded_cases.py")

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
    *("random_numbers[decay]", "representable_numbers[guard]", "blocks_that_shards_cut_through[plain]"),
    *("gradients_on_some_processes_only[plain]", "one_collective_for_each_process_group"),
)
WORLDS = (2,) if INTERPRETED else (2, 3, 4)


def is_slow(world: int, name: str) -> bool:
    return world == 3 or name in SLOW or INTERPRETED or (world == 4 and 2 in CASES[name][1] and name not in AT_4)


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
            run_world(SCRIPT, world, names, folders[world, slow])
        return failures_of(name, world, folders[world, slow])

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
