"""What the processes of `test_sharding.py` run: every case of one world size, in one process group."""

from __future__ import annotations

import cases_alone  # noqa: F401
import cases_checkpoints  # noqa: F401
import cases_collectives  # noqa: F401
import cases_flat  # noqa: F401
import cases_models  # noqa: F401
import cases_norm_group  # noqa: F401
import cases_refused  # noqa: F401
import cases_state  # noqa: F401
import worlds
from cases import INTERPRETED, interpret
from sharded import CASES, SLOW

__all__ = ["CASES", "SLOW"]

if __name__ == "__main__":
    if INTERPRETED:
        interpret()
    worlds.main(CASES)
