"""Parameters that are not stepped, not yet or never: lazy ones, and frozen weights in dtypes without arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torchlamb

FROZEN = [torch.uint8, torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


def reference(params, grads, **options):
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    optimizer = torchlamb.Lamb(params, **options)
    optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(
    "options", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}, {"max_grad_norm": 1.0}], ids=str
)
@pytest.mark.parametrize("dtype", FROZEN, ids=str)
def test_a_frozen_base_under_lora(dtype, options):
    """All of a model's parameters are handed over, as Trainers do: those that get no gradient are nobody's concern."""
    torch.manual_seed(0)
    base = nn.Parameter(torch.ones(4, 3).to(dtype), requires_grad=False)
    adapters = [nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 3))]
    grads = [torch.randn_like(p) for p in adapters]
    twins = [nn.Parameter(p.detach().clone()) for p in adapters]
    named = [("base", base), ("a", adapters[0]), ("b", adapters[1])]
    for params in ([base, *adapters], named, [{"params": [base]}, {"params": adapters, "weight_decay": 0.0}]):
        torchlamb.Lamb(params, **options)
    optimizer = torchlamb.Lamb(named, lr=0.1, **options)
    assert "Backends" in repr(optimizer)
    for p, grad in zip(adapters, grads, strict=True):
        p.grad = grad
    optimizer.step()
    assert torch.equal(base.float(), torch.ones(4, 3))
    wanted = reference(twins, grads, lr=0.1, **options)
    assert all(torch.equal(p, q) for p, q in zip(adapters, wanted, strict=True))
    assert base not in optimizer.state
    saved = optimizer.state_dict()
    optimizer.load_state_dict(copy.deepcopy(saved))
    torchlamb.Lamb(named, lr=0.1, **options).load_state_dict(copy.deepcopy(saved))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.zeros(2).to(dtype), requires_grad=False))]})
    copy.deepcopy(optimizer).step()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("late", [False, True])
def test_float8_with_a_gradient_is_refused_before_anything_changes(late, options):
    """Whether it has one at once, or gets one after some steps."""
    torch.manual_seed(0)
    base = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))
    other = nn.Parameter(torch.ones(3))
    optimizer = torchlamb.Lamb([("other", other), ("base", base)], **options)
    other.grad = torch.ones(3)
    if late:
        optimizer.step()
    base.grad = torch.ones(3).to(torch.float8_e4m3fn)
    before, state = other.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    for _ in range(2):
        with pytest.raises(TypeError, match=r"parameter 'base' has dtype torch.float8_e4m3fn.*16 bits or more"):
            optimizer.step()
        assert torch.equal(other, before)
        assert repr(optimizer.state_dict()["state"]) == repr(state)
    base.grad = None
    optimizer.step()
    assert not torch.equal(other, before)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize(
    "options", [{}, {"fused": True}, {"foreach": True}, {"max_grad_norm": 1.0, "weight_decay": 0.1}], ids=str
)
@pytest.mark.parametrize("group", ["all", "each", "one of one"])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_model(group, options):
    """Its parameters have no shape when the optimizer is made, and the same steps follow as from one made later."""
    runs = []
    for early in (True, False):
        torch.manual_seed(0)
        model = Lazy()
        x = torch.randn(8, 5)
        if not early:
            model(x)
            torch.manual_seed(0)
        if group == "all":
            params = list(model.named_parameters())
        elif group == "each":
            params = [{"params": [pair]} for pair in model.named_parameters()]
        else:
            params = [
                {"params": [model.norm.weight]},
                {"params": [p for p in model.parameters() if p is not model.norm.weight]},
            ]
        optimizer = torchlamb.Lamb(params, lr=0.1, **options)
        assert "Backends" in repr(optimizer)
        optimizer.step()  # without gradients
        optimizer.load_state_dict(optimizer.state_dict())
        if early:
            torch.manual_seed(0)
            model(x)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert "Backends" in repr(optimizer)
        runs.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_parameter_is_checked_when_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(3))
    optimizer = torchlamb.Lamb(model.named_parameters(), blocks=2)
    optimizer.step()
    model(torch.ones(4, 5)).sum().backward()
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"blocks=2 does not divide dim 0 of parameter '0.weight', whose shape is \(3, 5\)"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert not optimizer.state
    optimizer.param_groups[0]["blocks"] = 3
    optimizer.step()


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_moments_for_a_lazy_parameter_are_refused():
    model = nn.Sequential(nn.LazyLinear(3))
    optimizer = torchlamb.Lamb(model.parameters())
    ready = nn.Linear(5, 3)
    other = torchlamb.Lamb(ready.parameters())
    ready(torch.ones(2, 5)).sum().backward()
    other.step()
    with pytest.raises(
        ValueError, match=r"exp_avg of parameter 0 \(group 0\) has shape \(3, 5\), and the parameter none yet; load"
    ):
        optimizer.load_state_dict(other.state_dict())
    model(torch.ones(2, 5))
    optimizer.load_state_dict(other.state_dict())
