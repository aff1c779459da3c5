"""What all tests share: the printed seed, and a summary of the largest numeric errors."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from cases import DEVICE, FRESH_SEED, INTERPRETED, interpret, small_pieces  # noqa: F401

_shares: dict[tuple[str, str], float] = defaultdict(float)


@pytest.fixture(scope="session", autouse=True)
def device():
    """Put all tensors on the device that is tested; if the GPU's kernels are interpreted, step the CPU's with them."""
    if INTERPRETED:
        interpret()
    torch.set_default_device(DEVICE)


@pytest.fixture
def record_share():
    """Record an error as a share of its tolerance, by backend and dtype, for the summary."""

    def record(backend: str, dtype: str, share: float) -> None:
        _shares[backend, dtype] = max(_shares[backend, dtype], share)

    return record


def pytest_report_header() -> str:
    return f"fresh seed: {FRESH_SEED} (set TORCHLAMB_TEST_SEED to repeat)"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _shares:
        terminalreporter.section("largest error as a share of its tolerance")
        for (backend, dtype), share in sorted(_shares.items()):
            terminalreporter.write_line(f"{backend:30s} {dtype:10s} {share:.3f}")
