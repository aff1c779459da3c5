"""Weights and data that both frameworks can make alike, for the scripts beside this file."""

import numpy as np


def values(shape, seed, scale=0.5):
    """Numbers between -scale and scale that look random and depend on the shape and seed alone."""
    count = int(np.prod(shape))
    return (scale * np.sin(12.9898 * (np.arange(count) + 1) + 78.233 * (seed + 1))).reshape(shape).astype(np.float32)


def integers(shape, seed, below):
    """Ints >= 0 and less than `below`."""
    return np.floor((values(shape, seed, 0.4999) + 0.5) * below).astype(np.int32)


def listed(parameters):
    """Parameters as lists, in order."""
    return [np.asarray(p.asnumpy(), dtype=np.float64).reshape(-1).tolist() for p in parameters]
