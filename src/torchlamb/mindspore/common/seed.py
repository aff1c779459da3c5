"""The seed of everything random."""

from __future__ import annotations

import random
import sys

import torch

from torchlamb.options import fail

__all__ = ["get_seed", "set_seed"]

_seeds: list[int] = []


def set_seed(seed: int) -> None:
    """Seed torch, Python's `random`, and NumPy where it has been imported.

    Raises:
        TypeError: no int
        ValueError: less than 0
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise fail(TypeError, "seed", "an int >= 0", seed)
    if seed < 0:
        raise fail(ValueError, "seed", "an int >= 0", seed)
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    _seeds[:] = [seed]


def get_seed() -> int | None:
    """Return what was given to `set_seed` last; None before."""
    return _seeds[0] if _seeds else None
