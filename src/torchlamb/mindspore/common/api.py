"""Decorators that compile in MindSpore. Here they return what they are given; `torch.compile` compiles."""

from __future__ import annotations

from typing import Any

__all__ = ["jit", "jit_class", "ms_class", "ms_function", "mutable"]


def jit(fn: Any = None, *_: Any, **__: Any) -> Any:
    """Return the function as it is, with or without arguments of the decorator."""
    return fn if callable(fn) else lambda function: function


ms_function = jit_class = ms_class = jit


def mutable(input_data: Any, dynamic_len: bool = False) -> Any:  # noqa: ARG001
    """Return the data as it is."""
    return input_data
