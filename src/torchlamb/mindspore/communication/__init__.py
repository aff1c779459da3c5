"""Processes."""

from torchlamb.mindspore.communication import management
from torchlamb.mindspore.communication.management import GlobalComm, get_group_size, get_local_rank, get_rank, init, release

__all__ = ["GlobalComm", "get_group_size", "get_local_rank", "get_rank", "init", "management", "release"]
