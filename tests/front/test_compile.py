"""torch.compile of step(): one graph, no recompilation, the eager result."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import torchlamb

CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "false"
HAS_COMPILER = subprocess.run([CXX, "--version"], capture_output=True, check=False).returncode == 0
# What was traced is run as it is; in `make test-all` also what a C++ compiler makes of it.
BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")]),
]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def make_params() -> list[nn.Parameter]:
    torch.manual_seed(0)
    tensors = [
        torch.randn(40, 3),
        torch.randn(4, 3, 2),
        torch.randn(6).bfloat16(),
        torch.ones(2),
        torch.zeros(4),
        torch.randn(2),
    ]
    return [nn.Parameter(t) for t in tensors]  # the last one stays without a gradient


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "blocks": 2, "grad_centralization": True}], ids=str)
@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_step(backend, foreach, options):
    torch._dynamo.reset()
    counters.clear()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it says that the profiler's record function is ignored
    compiled_params, eager_params = make_params(), make_params()
    lr = torch.tensor(0.01)
    optimizers = [
        torchlamb.Lamb(params, lr=lr, weight_decay=0.1, foreach=foreach, **options)
        for params in (compiled_params, eager_params)
    ]
    compiled = torch.compile(optimizers[0].step, backend=backend)
    for step in range(5):
        for params in (compiled_params, eager_params):
            torch.manual_seed(step)
            for p in params[:-1]:
                p.grad = torch.randn_like(p)
        lr.fill_(0.01 * (step + 1))
        compiled()
        optimizers[1].step()
        if step == 0:
            frames = counters["frames"]["ok"]
            assert counters["stats"]["unique_graphs"] == 1
            assert sum(counters["graph_break"].values()) <= 1
            assert frames > 0, "nothing was compiled"
    assert counters["frames"]["ok"] == frames, "a later step recompiled"
    assert sum(counters["graph_break"].values()) <= 1
    for p, q in zip(compiled_params, eager_params, strict=True):
        torch.testing.assert_close(p, q)
    ours, eager = (optimizer.trust_ratios() for optimizer in optimizers)
    assert ours.keys() == eager.keys() == {0, 1, 2, 3, 4}
    for key, ratio in ours.items():
        torch.testing.assert_close(ratio, eager[key])
    assert [optimizers[0].state[p]["step"].item() for p in compiled_params[:-1]] == [5] * 5


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_guard_skips(backend, foreach):
    torch._dynamo.reset()
    params = make_params()
    optimizer = torchlamb.Lamb(params, skip_nonfinite=True, foreach=foreach)
    compiled = torch.compile(optimizer.step, backend=backend)
    for step in range(3):
        before = [p.detach().clone() for p in params]
        for p in params[:-1]:
            p.grad = torch.full_like(p, float("nan") if step == 1 else 1.0)
        compiled()
        moved = [not torch.equal(p, q) for p, q in zip(params, before, strict=True)]
        assert moved == [step != 1] * 5 + [False]
    assert optimizer.state[params[0]]["step"].item() == 2


def test_what_cannot_be_stepped_is_refused_when_compiled_too():
    torch._dynamo.reset()
    optimizer = torchlamb.Lamb([nn.Parameter(torch.ones(4))], blocks=2)
    swapped = nn.Parameter(torch.ones(5))
    swapped.grad = torch.ones(5)
    optimizer.param_groups[0]["params"][0] = swapped
    with pytest.raises(Exception, match="blocks=2 does not divide dim 0"):
        torch.compile(optimizer.step, backend="aot_eager")()
    assert torch.equal(swapped, torch.ones(5))
