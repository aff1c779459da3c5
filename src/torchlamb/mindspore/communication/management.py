"""How many processes there are, and which one this is: those of torch.distributed, else one."""

from __future__ import annotations

import os
from typing import Any

import torch

from torchlamb.checkpoint.together import is_distributed

__all__ = ["GlobalComm", "get_group_size", "get_local_rank", "get_rank", "init", "release"]


class GlobalComm:
    """The group of all processes."""

    WORLD_COMM_GROUP = "world"
    INITED = False


def init(backend_name: Any = None) -> None:  # noqa: ARG001
    """Initialize torch.distributed where torchrun has started this process; else there is one process, and nothing to do."""
    if "RANK" in os.environ and torch.distributed.is_available() and not torch.distributed.is_initialized():
        torch.distributed.init_process_group()
    GlobalComm.INITED = True


def release() -> None:
    """Leave torch.distributed."""
    if is_distributed():
        torch.distributed.destroy_process_group()
    GlobalComm.INITED = False


def get_rank(group: Any = None) -> int:  # noqa: ARG001
    """Return the number of this process, 0 where there is one."""
    return torch.distributed.get_rank() if is_distributed() else 0


def get_local_rank(group: Any = None) -> int:  # noqa: ARG001
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", get_rank()))


def get_group_size(group: Any = None) -> int:  # noqa: ARG001
    """Return the number of processes."""
    return torch.distributed.get_world_size() if is_distributed() else 1
