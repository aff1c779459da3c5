"""What the tests of the CPU's kernels share: instruction sets, parameters, and what a step writes."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.resources
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from loading import HANGS, ROOT
from torch import nn

import torchlamb
from torchlamb.backends import cpu

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CSRC = ROOT / "src" / "torchlamb" / "backends" / "csrc"
cpu.library.load()


def set_isa(isa: str) -> str:
    """Have the loaded kernels use an instruction set, and return the one that the machine made of it."""
    path = importlib.resources.files("torchlamb.backends").joinpath("libtorchlamb_cpu.so")
    function = ctypes.CDLL(str(path)).torchlamb_set_isa  # loading it again gives the same library
    function.restype = ctypes.c_char_p
    return function(isa.encode()).decode()


ISAS = [isa for isa in cpu.ISAS if cpu.library.isa and set_isa(isa) == isa]
each_isa = pytest.mark.parametrize("isa", ISAS)


def parameter(*shape, dtype=F32):
    p = nn.Parameter(torch.randn(shape).to(dtype))
    p.grad = torch.randn(shape).to(dtype)
    return p


def stored(params, optimizer):
    """Copies of all that a step writes, but for the count of skipped ones."""
    tensors = {(i, "param"): p.detach() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        tensors |= {(i, name): t for name, t in optimizer.state.get(p, {}).items() if name != "skipped"}
    return {key: t.clone() for key, t in tensors.items()}


def assert_same(got, wanted, what=""):
    assert got.keys() == wanted.keys()
    for key, t in wanted.items():
        assert got[key].dtype == t.dtype
        assert torch.equal(got[key], t), f"{key} {what}"


def make_optimizer(seed=0, size=40_001):
    """One whose steps are shared by threads."""
    torch.manual_seed(seed)
    params = [parameter(size), parameter(7, 5), parameter(3)]
    return params, torchlamb.Lamb(params, lr=0.02, weight_decay=0.1, fused=True)


def in_child(function, seconds=HANGS):
    """Call it in a forked process, and return its exit status: 0 where it returned true, 1 where not or where it raised."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            faulthandler.disable()
            code = 0 if function() else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "still running"


def assert_close(got, wanted, old):
    """In float32 to some millionths of the path, in 16 bits to one unit in the last place."""
    info = torch.finfo(wanted.dtype)
    got, wanted, old = (t.detach().double().numpy() for t in (got, wanted, old))
    _, exponent = np.frexp(np.maximum(np.abs(got), np.abs(wanted)))
    ulp = info.eps * np.maximum(np.ldexp(1.0, exponent - 1), info.smallest_normal)
    # What is small beside the numbers that it is the difference of has the rounding of those.
    path, largest = np.max(np.abs(wanted - old), initial=0), np.max(np.abs(old), initial=0)
    assert np.all(np.abs(got - wanted) <= 1.001 * ulp + 3e-6 * path + 2.0**-24 * largest)


# Norms and ratios


def exact_update(old, state, decay):
    """In float64, after a first step with the default betas and eps."""
    m, v = (state[name].double().numpy() for name in ("exp_avg", "exp_avg_sq"))
    return m / (1 - 0.9) / (np.sqrt(v / (1 - 0.999)) + 1e-6) + decay * old.double().numpy()
