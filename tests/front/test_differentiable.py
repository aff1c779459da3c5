"""differentiable=True: gradients through a step, to gradients, parameters and the learning rate."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

import torchlamb

OPTIONS = [
    {},
    {"weight_decay": 0.1, "grad_averaging": False},
    {"bias_correction": False, "trust_ratio_bounds": (0.0, 0.5)},
    {"layer_adaptation": False},
    {"phi_bounds": (0.1, 0.5), "maximize": True},
    {"blocks": 2, "max_grad_norm": 0.7},
    {"grad_centralization": True, "skip_nonfinite": True, "capturable": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options):
    torch.manual_seed(0)
    shape = (2, 2, 2)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def two_steps(param, lr, *grads):
        param = param.clone()
        optimizer = torchlamb.Lamb([param], lr=lr, differentiable=True, **options)
        for grad in grads:
            param.grad = grad
            optimizer.step()
        state = optimizer.state[param]
        return param, state["exp_avg"], state["exp_avg_sq"]

    assert gradcheck(two_steps, (inputs[0], lr, *inputs[1:]))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("param", "grad"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_gradients_are_finite_at_zero(param, grad, options):
    """The roots in norms and moments have an infinite derivative there."""
    param = torch.full((2, 2, 2), param, dtype=torch.float64, requires_grad=True)
    grads = [torch.full((2, 2, 2), grad, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    updated = param.clone()
    optimizer = torchlamb.Lamb([updated], lr=0.1, differentiable=True, **options)
    for g in grads:
        updated.grad = g
        optimizer.step()
    updated.sum().backward()
    for t in (param, *grads):
        assert t.grad is not None
        assert t.grad.isfinite().all(), t.grad


def test_the_step_is_the_same():
    results = []
    for differentiable in (False, True):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(5, 4))
        value = param.clone() if differentiable else param
        optimizer = torchlamb.Lamb([value], weight_decay=0.1, differentiable=differentiable)
        for _ in range(3):
            value.grad = torch.randn(5, 4)
            optimizer.step()
        results.append(value.detach())
        assert not any(ratio.requires_grad for ratio in optimizer.trust_ratios().values())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
