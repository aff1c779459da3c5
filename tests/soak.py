"""Run the tests of random numbers with fresh seeds: `python tests/soak.py --minutes 60`, or `--rounds 2`.

A round draws one seed for all tests marked `seeded` and all of Hypothesis's, and begins as long as there is time. The exit
status is 1 if a seed failed; each one is printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND = [
    *["-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-n", "2", "--dist", "loadfile"],
    "-m",
    "(seeded or hypothesis) and not slow",
]
# The GPU's kernels, where there is Triton to interpret them.
RUNS = [{}, {"TRITON_INTERPRET": "1"}] if sys.platform == "linux" else [{}]
NO_TESTS = 5  # pytest's status where none was collected


def fails(seed: int) -> list[str]:
    """The commands that fail with the seed."""
    failed = []
    for variables in RUNS:
        variables = {**variables, "TORCHLAMB_TEST_SEED": str(seed)}
        command = [sys.executable, *COMMAND, f"--hypothesis-seed={seed}"]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
        if done.returncode not in (0, NO_TESTS):
            print(done.stdout[-20_000:], done.stderr[-2000:], sep="\n", flush=True)
            prefix = [f"{name}={value}" for name, value in variables.items()]
            failed.append(" ".join([*prefix, ".venv/bin/python", *COMMAND[:-1], f"'{COMMAND[-1]}'", command[-1]]))
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no round after that")
    parser.add_argument("--rounds", type=int, default=1, help="at least so many rounds (default: %(default)s)")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    rounds, failed = 0, []
    while rounds < arguments.rounds or time.monotonic() < end:
        seed = random.SystemRandom().randrange(1, 2**31)
        print(f"seed {seed}", flush=True)
        failed += fails(seed)
        rounds += 1
    print(f"{rounds} fresh seeds, {len(failed)} failures", *failed, sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
