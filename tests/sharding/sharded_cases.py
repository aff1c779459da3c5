"""What the processes of `test_sharding.py` run: every case of one world size, in one process group."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
import traceback
from pathlib import Path

import cases_alone  # noqa: F401
import cases_checkpoints  # noqa: F401
import cases_collectives  # noqa: F401
import cases_models  # noqa: F401
import cases_refused  # noqa: F401
import cases_state  # noqa: F401
import pytest
import torch
import torch.distributed as dist
from cases import INTERPRETED, interpret
from sharded import CASES, SLOW, TIMEOUT

__all__ = ["CASES", "SLOW"]


def main() -> None:
    """Run all cases of this world and write what failed: {case: null or traceback}."""
    out = Path(sys.argv[1])
    wanted = sys.argv[2:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if INTERPRETED:
        interpret()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    results: dict[str, str | None] = {}
    for name, (function, worlds) in CASES.items():
        if world not in worlds or (wanted and name not in wanted):
            continue
        try:
            function(world)
            results[name] = None
        except (Exception, pytest.fail.Exception):
            results[name] = traceback.format_exc()
        (out / f"rank{rank}.json").write_text(json.dumps(results))
        dist.barrier()
    time.sleep(0.2)  # while gloo's threads let go of the last tensors: see examples/fsdp2.py
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
