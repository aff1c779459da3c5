"""Scripts of the project, as modules and as processes, for tests."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# Seconds after which what runs is taken to hang. No test may assume more of a clock: with busy neighbours, all takes many times
# as long.
HANGS = 900


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def with_helpers(**environment: object) -> dict[str, str]:
    """The environment of a process that imports what the tests share."""
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **{key: str(value) for key, value in environment.items()}}


def start_script(script: Path, *flags: object, processes: int, cwd: Path) -> subprocess.Popen[str]:
    """Start a script under torchrun; 0 processes are one without it. End it with `end`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes else []
    command = [str(part) for part in (sys.executable, *launcher, script, *flags)]
    # What started pytest may itself be one of several processes: its rank is none of the script's business.
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
    environment = {key: value for key, value in os.environ.items() if key not in ranks} | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", start_new_session=True
    )


def run_script(script: Path, *flags: object, processes: int, cwd: Path, limit: float) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, for so many seconds at most."""
    process = start_script(script, *flags, processes=processes, cwd=cwd)
    try:
        stdout, stderr = process.communicate(timeout=limit)
    finally:
        end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def end(process: subprocess.Popen[str]) -> None:
    """End it and what it started: torchrun gives every process a session of its own, and ends them when it is told to."""
    try:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=HANGS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
