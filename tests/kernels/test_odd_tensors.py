"""The strategy of `odd_tensors.py`, with fresh seeds, in a process of its own: a crash of that is a failure, too."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from cases import SEED
from loading import HANGS

FRESH = SEED or random.SystemRandom().randrange(1, 2**31)  # printed where it fails
SCRIPT = Path(__file__).with_name("odd_tensors.py")


def search(seconds: int, seed: int, *flags: str, **environment: str) -> str:
    """Draw for so many seconds, and return what was printed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(seconds), str(seed), *flags],
        capture_output=True,
        text=True,
        timeout=seconds + HANGS,  # a failure is made smaller, which takes a while
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1]), **environment},
        cwd=SCRIPT.parent,
        check=False,
    )
    again = f"PYTHONPATH=tests python tests/kernels/{SCRIPT.name} {seconds} {seed} {' '.join(flags)}"
    assert done.returncode == 0, f"{again}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    ("seconds", "seed"), [pytest.param(8, 0, id="short"), pytest.param(120, FRESH, id="long", marks=pytest.mark.slow)]
)
def test_odd_tensors_step_right_or_are_refused(seconds, seed, record_property):
    said = search(seconds, seed)
    record_property("examples", said)
    assert int(said.split()[0]) > 2 * seconds


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_odd_tensors_with_the_gpus_kernels():
    """In Triton's interpreter, for which the CPU is the device."""
    said = search(40, FRESH, "--interpreted", TRITON_INTERPRET="1")
    assert int(said.split()[0]) > 20
