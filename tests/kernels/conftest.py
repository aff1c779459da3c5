"""Kernels as they are loaded, and none."""

from __future__ import annotations

import pytest
import torch
from calling import ISAS, set_isa

from torchlamb.backends import cpu


@pytest.fixture(autouse=True)
def settings_restored(request):
    if not cpu.library.isa and "no_library" not in request.fixturenames:
        pytest.skip(f"no kernels, {cpu.library.why_not}")
    threads = torch.get_num_threads()
    if ISAS:
        set_isa(cpu.library.isa)
    yield
    torch.set_num_threads(threads)
    if ISAS:
        set_isa(cpu.library.isa)


@pytest.fixture
def no_library(monkeypatch):
    """A library that is not there, as where no compiler was."""
    library = cpu._Library()
    library.why_not, library.is_loaded = "they were left at home", True
    monkeypatch.setattr(cpu, "library", library)
    return library
