"""Rounding to 16 bits in NumPy, from its documentation: what docs/precision.md says, and no code of the library."""

from __future__ import annotations

import numpy as np

M32 = np.uint64(2**32 - 1)


def nearest(a: np.ndarray, dtype: str) -> np.ndarray:
    """Round to the nearest number of that dtype, ties to even; by way of float32, in which the arithmetic is done."""
    if dtype == "float16":
        return a.astype(np.float32).astype(np.float16).astype(np.float64)
    assert dtype == "bfloat16"
    raw = np.ascontiguousarray(a, dtype=np.float32).view(np.uint32).astype(np.uint64)
    raw = (raw + 0x7FFF + ((raw >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    return raw.astype(np.uint32).view(np.float32).astype(np.float64).reshape(a.shape)


def stochastic(a: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Round finite numbers to a neighbour in bfloat16: away from 0 where the part that is cut off is over 16 random bits."""
    raw = np.ascontiguousarray(a, dtype=np.float32).view(np.uint32).astype(np.uint64).reshape(a.shape)
    away = (raw & np.uint64(0xFFFF)) + bits >= 2**16
    raw = (raw & np.uint64(0xFFFF0000)) + away.astype(np.uint64) * np.uint64(2**16)
    return raw.astype(np.uint32).view(np.float32).astype(np.float64)


def random_bits(seed: int, shape: tuple[int, ...], step: int) -> np.ndarray:
    """32 bits for each element of a whole tensor, by its index in row-major order."""
    return bits_at(np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint64), seed, step).reshape(shape)


def bits_at(index: np.ndarray, seed: int, step: int) -> np.ndarray:
    key1 = mix(np.uint64(seed & 0xFFFFFFFF) ^ np.uint64(step))
    key2 = mix(np.uint64(seed >> 32) ^ key1)
    return mix(mix((index & M32) ^ key1) ^ (index >> np.uint64(32)) ^ key2)


def seed_of(position: int) -> int:
    low = int(mix(np.uint64(position ^ 0x6C616D62)))
    return ((int(mix(np.uint64(low ^ position))) >> 1) << 32) + low


def mix(x: np.ndarray) -> np.ndarray:
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97), (15, 1)):
        x = x ^ (x >> np.uint64(shift))
        x = (x * np.uint64(factor)) & M32
    return x
