"""max_grad_norm and skip_nonfinite: a bad gradient changes nothing, and the next step is as if it had not been."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import BACKEND_PARAMS, DEVICE, GPU_KERNELS, use
from torch import nn

import torchlamb

GUARDS = [{"skip_nonfinite": True}, {"max_grad_norm": 0.5}, {"max_grad_norm": 0.5, "skip_nonfinite": True}]


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 3), (), (0,), (7,))]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def snapshot(params, optimizer):
    return copy.deepcopy([p.detach() for p in params]), copy.deepcopy(optimizer.state_dict()["state"])


def assert_same(a, b) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a[0], b[0], strict=True))
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(value, b[1][i][key]) for i, state in a[1].items() for key, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *([] if GPU_KERNELS else [torch.float64])], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30], ids=str)
@pytest.mark.parametrize("guard", GUARDS, ids=str)
@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_bad_gradient(case, guard, bad, dtype, monkeypatch):
    """At the first and at the fifth step, in a matrix and in a 0-dim parameter."""
    use(monkeypatch, case)
    params, plain = make_params(dtype), make_params(dtype)
    optimizer = torchlamb.Lamb(params, weight_decay=0.1, **guard, **case.options)
    reference = torchlamb.Lamb(plain, weight_decay=0.1, **guard, **case.options)
    for step in range(7):
        if step in (0, 4):
            before = snapshot(params, optimizer)
            set_grads(params, step)
            (params[0].grad[-1, -1] if step else params[1].grad).fill_(bad)
            optimizer.step()
            after = snapshot(params, optimizer)
            if step == 0:  # state exists now, and is that of no step
                assert not any(value.any() for state in after[1].values() for value in state.values())
                assert_same((before[0], {}), (after[0], {}))
            else:
                assert_same(before, after)
            assert all(ratio.isnan().all() for ratio in optimizer.trust_ratios().values())
            continue
        for p in (params, plain):
            set_grads(p, step)
        optimizer.step()
        reference.step()
        assert all(ratio.isfinite().all() for ratio in optimizer.trust_ratios().values())
    assert_same(snapshot(params, optimizer), snapshot(plain, reference))
    assert optimizer.state[params[0]]["step"].item() == 5


@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_clipping_equals_clip_grad_norm(case, monkeypatch):
    """Over all groups and dtypes; torch adds 1e-6 to the norm, so a large one is compared."""
    use(monkeypatch, case)
    ours, plain = (make_params() + make_params(torch.bfloat16) for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.1, "eps": 0.1, **case.options}
    groups = [{"params": ours[:2]}, {"params": ours[2:], "weight_decay": 0.0}]
    plain_groups = [{"params": plain[:2]}, {"params": plain[2:], "weight_decay": 0.0}]
    optimizer = torchlamb.Lamb(groups, max_grad_norm=2.0, **options)
    reference = torchlamb.Lamb(plain_groups, **options)
    for step in range(5):
        for params in (ours, plain):
            set_grads(params, step)
            for p in params:
                p.grad *= 10.0 ** (2 - step)
        # bf16 gradients would be rounded when written, so the clipped ones are put in as float32.
        norm = torch.sqrt(sum(p.grad.double().square().sum() for p in plain))
        for p in plain:
            p.grad_dtype = None
            p.grad = (p.grad.double() * min(1.0, 2.0 / norm.item())).float()
        optimizer.step()
        reference.step()
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5 if p.dtype == torch.float32 else 1e-2, atol=1e-6)


def test_the_guard_without_any_gradient():
    optimizer = torchlamb.Lamb(make_params(), max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.trust_ratios() == {}


def test_without_a_guard_a_nan_is_not_hidden():
    params = make_params()
    optimizer = torchlamb.Lamb(params)
    set_grads(params, 0)
    params[0].grad[0, 0] = math.nan
    optimizer.step()
    assert params[0].isnan().any()
    assert params[3].isfinite().all()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("bad_step", [0, 3])
def test_groups_of_which_only_one_is_capturable(bad_step, foreach):
    """The flag then stays a tensor for all of them."""
    a, b, c, d = (nn.Parameter(torch.ones(3)) for _ in range(4))
    groups = [{"params": [a], "capturable": True}, {"params": [b]}]
    optimizer = torchlamb.Lamb(groups, skip_nonfinite=True, foreach=foreach)
    reference = torchlamb.Lamb([c, d], skip_nonfinite=True, foreach=foreach)
    for step in range(5):
        for p in (a, c):
            p.grad = torch.full((3,), 1.0 + step)
        for p in (b, d):
            p.grad = torch.full((3,), math.nan if step == bad_step else 1.0 + step)
        optimizer.step()
        reference.step()
    torch.testing.assert_close([a, b], [c, d])
    assert optimizer.state[b]["step"].item() == 4


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bad_step", [0, 1])
def test_gradients_through_a_skipped_step(bad_step, capturable):
    first = torch.ones(3, dtype=torch.float64, requires_grad=True)
    p, grads = first.clone(), []
    optimizer = torchlamb.Lamb([p], differentiable=True, skip_nonfinite=True, capturable=capturable)
    for step in range(3):
        grad = torch.full((3,), math.nan if step == bad_step else 1.0, dtype=torch.float64, requires_grad=True)
        grads.append(grad)
        p.grad = grad
        optimizer.step()
    p.sum().backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in (first, *grads))
    assert optimizer.state[p]["step"].item() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_guard_on_sums_that_overflow_float32(dtype):
    """Each gradient is finite and so is each square; their sum is not."""
    p = nn.Parameter(torch.ones(64, dtype=dtype))
    optimizer = torchlamb.Lamb([p], skip_nonfinite=True)
    p.grad = torch.full((64,), 1e19, dtype=dtype)
    optimizer.step()
    assert torch.equal(p, torch.ones(64, dtype=dtype))
    assert optimizer.state[p]["step"].item() == 0
