"""The strategy of `odd_tensors.py`, with fresh seeds, in a process of its own: a crash of that is a failure, too."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from cases import SEED
from loading import HANGS, with_helpers

SCRIPT = Path(__file__).with_name("odd_tensors.py")


def search(seconds: int, seed: int, *flags: str, **environment: str) -> str:
    """Draw for so many seconds, and return what was printed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(seconds), str(seed), *flags],
        capture_output=True,
        text=True,
        timeout=seconds + HANGS,  # a failure is made smaller, which takes a while
        env=with_helpers(OMP_NUM_THREADS=1, **environment),
        cwd=SCRIPT.parent,
        check=False,
    )
    again = f"PYTHONPATH=tests python tests/kernels/{SCRIPT.name} {seconds} {seed} {' '.join(flags)}"
    assert done.returncode == 0, f"{again}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_some_odd_tensors_step_right_or_are_refused():
    """The same ones in each run."""
    assert int(search(HANGS, 0, "30").split()[0]) == 30


@pytest.mark.slow
def test_odd_tensors_step_right_or_are_refused(record_property):
    record_property("examples", search(HANGS, SEED or 12, "400"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_odd_tensors_with_the_gpus_kernels(record_property):
    """In Triton's interpreter, for which the CPU is the device."""
    record_property("examples", search(HANGS, SEED, "30", "--interpreted", TRITON_INTERPRET="1"))
