"""Settings of MindSpore's own machinery. They are kept and returned; what runs where is torch's affair."""

from __future__ import annotations

from typing import Any

__all__ = [
    "GRAPH_MODE",
    "PYNATIVE_MODE",
    "ParallelMode",
    "get_auto_parallel_context",
    "get_context",
    "reset_auto_parallel_context",
    "set_auto_parallel_context",
    "set_context",
]

GRAPH_MODE = 0
PYNATIVE_MODE = 1


class ParallelMode:
    """Names of parallel modes. Data parallel cells reduce gradients; of the others nothing is done here."""

    STAND_ALONE = "stand_alone"
    DATA_PARALLEL = "data_parallel"
    HYBRID_PARALLEL = "hybrid_parallel"
    SEMI_AUTO_PARALLEL = "semi_auto_parallel"
    AUTO_PARALLEL = "auto_parallel"
    MODE_LIST = (STAND_ALONE, DATA_PARALLEL, HYBRID_PARALLEL, SEMI_AUTO_PARALLEL, AUTO_PARALLEL)


_context: dict[str, Any] = {"mode": PYNATIVE_MODE, "device_target": "CPU", "device_id": 0}
_PARALLEL = {"parallel_mode": ParallelMode.STAND_ALONE, "gradients_mean": False, "device_num": 1, "global_rank": 0}
_parallel: dict[str, Any] = dict(_PARALLEL)


def set_context(**settings: Any) -> None:
    """Keep settings for `get_context`; they do nothing else. A network is put on its device by ``net.to("cuda")``."""
    _context.update(settings)


def get_context(attr_key: str) -> Any:
    """Return a setting; None where it was not set."""
    return _context.get(attr_key)


def set_auto_parallel_context(**settings: Any) -> None:
    """Keep settings. With a data parallel `parallel_mode`, training cells reduce gradients, by mean with `gradients_mean`.

    Raises:
        ValueError: a `parallel_mode` that is none of `ParallelMode`
    """
    mode = settings.get("parallel_mode", ParallelMode.STAND_ALONE)
    if mode not in ParallelMode.MODE_LIST:
        raise ValueError(f"parallel_mode must be one of {', '.join(map(repr, ParallelMode.MODE_LIST))}, got {mode!r}")
    _parallel.update(settings)


def get_auto_parallel_context(attr_key: str) -> Any:
    """Return a setting; None where it was not set."""
    return _parallel.get(attr_key)


def reset_auto_parallel_context() -> None:
    """Return to one process that reduces nothing."""
    _parallel.clear()
    _parallel.update(_PARALLEL)
