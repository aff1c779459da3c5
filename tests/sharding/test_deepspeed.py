"""Lamb under DeepSpeed steps as it does on one process. DeepSpeed runs on CPUs, in processes of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed_cases import CASES
from loading import HANGS, with_helpers
from worlds import failures_of, run_world

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * HANGS),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed"),
]
SCRIPT = Path(__file__).with_name("deepspeed_cases.py")
WORLDS = (2, 3, 4)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """What each world wrote, one after the other: four processes take up what two have left."""
    shared = tmp_path_factory.mktemp("universal")
    found = {}
    for world in WORLDS:
        found[world] = tmp_path_factory.mktemp(f"deepspeed{world}")
        names = [name for name, (_, worlds) in CASES.items() if world in worlds]
        run_world(SCRIPT, world, names, found[world], DS_ACCELERATOR="cpu", TORCHLAMB_UNIVERSAL=shared)
        if world == 2:
            for stage in (1, 2):
                make_universal(shared / f"of{stage}")
    return found


def make_universal(folder: Path) -> None:
    tool = Path(importlib.util.find_spec("deepspeed.checkpoint.ds_to_universal").origin)
    flags = [
        "--input_folder",
        folder / "last",
        "--output_folder",
        folder / "universal",
        "--num_extract_workers",
        1,
        "--inject_missing_state",
    ]
    command = [sys.executable, "-W", "ignore", str(tool), *map(str, flags), "--num_merge_workers", "1"]
    done = subprocess.run(
        command, env=with_helpers(DS_ACCELERATOR="cpu"), capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world in WORLDS for name, (_, worlds) in CASES.items() if world in worlds]
)
def test_under_deepspeed(world, name, folders):
    failures = failures_of(name, world, folders[world])
    assert not failures, failures
