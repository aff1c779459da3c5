"""Norms over whole tensors: right to 1e-6 on 31 million elements, where torch's own norm of a CPU tensor is off by 1.7e-3."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, PLAIN, use

import torchlamb

NUMEL = 31_000_000
# In two phases, and beside small tensors, the same sums are taken.
CASES = [
    pytest.param(case, id=case.name, marks=[] if case.name in PLAIN else [pytest.mark.slow])
    for case in BACKENDS
    if not case.options.get("capturable")
]


def norms_of(param: torch.Tensor, grad: torch.Tensor, case) -> tuple[torch.Tensor, torch.Tensor]:
    """The two norms of one step and, in float64, what they should be."""
    p = torch.nn.Parameter(param)
    p.grad = grad
    optimizer = torchlamb.Lamb([p], lr=0.0, weight_decay=0.1, **case.options)
    optimizer.step()
    state = optimizer.state[p]
    exact_param_sq = exact_update_sq = 0.0
    for w, m, v in zip(*(t.flatten().split(2**20) for t in (param, state["exp_avg"], state["exp_avg_sq"])), strict=True):
        update = (m.double() / 0.1) / ((v.double() / 0.001).sqrt() + 1e-6) + 0.1 * w.double()
        exact_param_sq += w.double().square().sum().item()
        exact_update_sq += update.square().sum().item()
    return optimizer.norms()[0].double(), torch.tensor([exact_param_sq, exact_update_sq], dtype=torch.float64).sqrt()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("values", ["weights", pytest.param("few large ones", marks=pytest.mark.slow)])
def test_31_million_elements(values, case, monkeypatch):
    use(monkeypatch, case)
    torch.manual_seed(0)
    param = torch.randn(NUMEL).mul_(0.02).add_(0.01)
    if values == "few large ones":  # whose sum swallows small squares added to it one by one
        param[:100] = 1000.0
    norms, exact = norms_of(param, torch.randn(NUMEL), case)
    torch.testing.assert_close(norms, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_gradient_norm_of_31_million_elements(case):
    """The guard's norm, seen through the clipped first moment."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.ones(NUMEL))
    p.grad = torch.randn(NUMEL).mul_(0.02).add_(0.01)
    exact = sum(chunk.double().square().sum().item() for chunk in p.grad.split(2**20)) ** 0.5
    optimizer = torchlamb.Lamb([p], lr=0.0, betas=(0.0, 0.0), max_grad_norm=1.0, **case.options)
    optimizer.step()
    coefficient = (optimizer.state[p]["exp_avg"][:1000].double() / p.grad[:1000].double()).mean().item()
    assert coefficient == pytest.approx(1.0 / exact, rel=1e-6)
