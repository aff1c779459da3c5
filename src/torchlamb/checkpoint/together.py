"""Doing something on one process or on all, such that all go on or all raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def is_distributed() -> bool:
    """Return whether there may be other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def together(function: Callable[[], T]) -> list[T]:
    """Return what a function returns on every process; where it raises on one, raise that on all of them."""
    if not is_distributed():
        return [function()]
    own: tuple[T | None, Exception | None]
    try:
        own = function(), None
    except Exception as error:
        own = None, error
    results: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(results, own)
    for _, raised in results:
        if raised is not None:
            raise raised
    return [result for result, _ in results]


def on_first(function: Callable[[], T]) -> T:
    """Return on all processes what a function returns on the first, which alone calls it."""
    is_first = not is_distributed() or torch.distributed.get_rank() == 0
    return together(lambda: function() if is_first else None)[0]  # type: ignore[return-value]
