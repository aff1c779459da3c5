"""What all tests share: the printed seed, and a summary of the largest numeric errors."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest
import torch
from cases import DEVICE, INTERPRETED, SEED, interpret, small_pieces  # noqa: F401
from hypothesis import HealthCheck, settings

# One thread for each of the processes that share the cores, and those they start: what is about threads asks for more.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# With the seed that all runs have, Hypothesis draws the same examples too; soak.py gives it a fresh one.
settings.register_profile(
    "torchlamb",
    derandomize=SEED == 0,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("torchlamb")

# Of test_options and test_combinations.
INTERPRETED_CORE = (
    *(f"float32-{name}-gpu" for name in ("defaults", "everything", "clip", "no-bias-correction", "no-layer-adaptation")),
    *("gpu-everything-bfloat16", "gpu-clip-float16"),
    *(f"gpu-bfloat16-bfloat16-{name}" for name in ("masters", "stochastic", "stochastic-bf16-state")),
    *("gpu-float16-float32-masters", "gpu-float32-bfloat16-bf16-state"),
)

_shares: dict[tuple[str, str], float] = defaultdict(float)


@pytest.fixture(scope="session", autouse=True)
def device():
    """Put all tensors on the device that is tested; if the GPU's kernels are interpreted, step the CPU's with them."""
    if INTERPRETED:
        interpret()
    if DEVICE.type != "cpu":  # as a mode in Python it takes part in every call of torch
        torch.set_default_device(DEVICE)


@pytest.fixture
def record_share():
    """Record an error as a share of its tolerance, by backend and dtype, for the summary."""

    def record(backend: str, dtype: str, share: float) -> None:
        _shares[backend, dtype] = max(_shares[backend, dtype], share)

    return record


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what starts processes, and of the case table, in the interpreter, which is slow, take less."""
    items.sort(key=lambda item: not {"sharding", "house"} & set(item.path.parts))  # the others keep two workers busy to the end
    for item in items if INTERPRETED else []:
        name = item.name.removesuffix("]").partition("[")[2]
        if item.path.name not in ("test_gpu_kernels.py", "test_sharding.py") and name not in INTERPRETED_CORE:
            item.add_marker(pytest.mark.slow)


def pytest_report_header() -> str:
    return f"seed: {SEED} (TORCHLAMB_TEST_SEED)"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes, which leave the summary to the first
        session.config.workeroutput["shares"] = [(*key, share) for key, share in _shares.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for backend, dtype, share in getattr(node, "workeroutput", {}).get("shares", []):
        _shares[backend, dtype] = max(_shares[backend, dtype], share)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _shares:
        terminalreporter.section("largest error as a share of its tolerance")
        for (backend, dtype), share in sorted(_shares.items()):
            terminalreporter.write_line(f"{backend:30s} {dtype:10s} {share:.3f}")
