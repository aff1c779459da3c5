"""Parallel modes, where older scripts import them."""

from torchlamb.mindspore.context import ParallelMode

__all__ = ["ParallelMode"]
