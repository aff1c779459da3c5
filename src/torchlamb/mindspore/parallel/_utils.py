"""What training cells ask of the parallel context."""

from __future__ import annotations

from torchlamb.mindspore.communication.management import get_group_size, get_rank
from torchlamb.mindspore.context import get_auto_parallel_context


def _get_parallel_mode() -> str:
    return str(get_auto_parallel_context("parallel_mode"))


def _get_gradients_mean() -> bool:
    return bool(get_auto_parallel_context("gradients_mean"))


def _get_device_num() -> int:
    return get_group_size()


def _get_global_rank() -> int:
    return get_rank()
