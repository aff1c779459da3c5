"""A run that is killed again and again, and goes on from its newest checkpoint, ends as the one that was left in peace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cases import SEED
from loading import HANGS

KILLS = 20


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2], ids=["torch.save", "sharded-over-2-of-which-one-is-killed"])
def test_a_run_that_is_killed_ends_bitwise_as_one_that_is_not(processes, tmp_path):
    """At moments drawn from the seed; most of them fall into the writing of a checkpoint."""
    script = Path(__file__).with_name("killed_run.py")
    arguments = [str(tmp_path), str(processes), str(KILLS), str(SEED)]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"killed {KILLS} times, " in done.stdout
