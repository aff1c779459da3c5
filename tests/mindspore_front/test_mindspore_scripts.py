"""Scripts as people write them for MindSpore run from their import lines down, and end where the original ends.

The numbers are MindSpore's, frozen by golden/make_mindspore.py, which runs the same scripts with it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mindspore" / "scripts.json").read_text())
TOLERANCE = 3e-6


def largest_difference(found: Any, wanted: Any) -> float:
    """Return it, relative where numbers are greater than 1; whatever is no float must be equal."""
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        return max((largest_difference(x, y) for x, y in zip(found, wanted, strict=True)), default=0.0)
    if not isinstance(wanted, float):
        assert found == wanted
        return 0.0
    return abs(found - wanted) / max(1.0, abs(wanted))


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "mindspore"])
def test_a_script_ends_where_mindspore_ends(name, tmp_path, monkeypatch, record_property):
    monkeypatch.syspath_prepend(SCRIPTS)
    for module in (name, "script_numbers"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    results = importlib.import_module(name).main(str(tmp_path))
    assert results.keys() == GOLDEN[name].keys()
    differences = {key: largest_difference(results[key], wanted) for key, wanted in GOLDEN[name].items()}
    record_property("difference", max(differences.values()))
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.slow
def test_two_processes_end_with_the_model_of_one():
    """Also where gradients overflow on one of them only."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        SCRIPTS / "two_processes.py",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.count("same") == 2, done.stderr
