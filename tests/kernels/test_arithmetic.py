"""The CPU's kernels compute eager arithmetic's numbers, in every layout and size, and norms that are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calling import BF16, F16, F32, F64, assert_close, each_isa, exact_update, set_isa
from cases import in_two_phases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchlamb
from torchlamb import rule

# Eager arithmetic


def laid_out(values, layout):
    """The same values in another layout of memory."""
    shape, dims = values.shape, values.dim()
    if layout == "offset":
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(shape)
    if dims == 0 or layout == "contiguous":
        return values.clone()
    if layout == "strided":
        return torch.empty((*shape[:-1], 2 * shape[-1]), dtype=values.dtype)[..., ::2].copy_(values)
    order = list(range(dims))[::-1] if layout == "transposed" else [0, *range(2, dims), 1][:dims]  # or channels last
    return values.permute(order).contiguous().permute([order.index(dim) for dim in range(dims)])


LAYOUTS = st.sampled_from(["contiguous", "transposed", "channels-last", "strided", "offset"])
TENSORS = st.fixed_dictionaries(
    {
        "shape": st.lists(st.integers(0, 9), max_size=2).map(tuple) | st.tuples(st.integers(1, 4), *[st.integers(0, 70)] * 2),
        "dtype": st.sampled_from([F32, BF16, F16]),
        "float32_grad": st.booleans(),
        "layout": LAYOUTS,
        "grad_layout": LAYOUTS,
        "scale": st.sampled_from([0.0, 0.01, 1.0, 30.0]),
        "has_grad": st.sampled_from([True, True, True, False]),
    }
)
BOUNDS = st.sampled_from([None, (0.0, 1.0), (0.5, 20.0)])
OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.001, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "phi_bounds": BOUNDS,
        "trust_ratio_bounds": BOUNDS,
        "bias_correction": st.booleans(),
        "grad_averaging": st.booleans(),
        "layer_adaptation": st.sampled_from([True, True, False]),
        "maximize": st.booleans(),
        "max_grad_norm": st.sampled_from([None, 0.5, 1e6]),
        "master_weights": st.booleans(),
    }
)


def grouped(params, blocks):
    cut = [p for p in params if p.dim() and p.shape[0] % blocks == 0]
    groups = [{"params": cut, "blocks": blocks}, {"params": [p for p in params if all(p is not q for q in cut)]}]
    return [group for group in groups if group["params"]]


@settings(max_examples=60)
@given(st.lists(TENSORS, min_size=1, max_size=5), OPTIONS, st.sampled_from([1, 1, 2, 3]), st.integers(0, 2**30))
def test_kernels_do_what_eager_arithmetic_does(tensors, options, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    values = [(torch.randn(t["shape"], generator=generator) * t["scale"]).to(t["dtype"]) for t in tensors]
    ours = [nn.Parameter(laid_out(v, t["layout"])) for v, t in zip(values, tensors, strict=True)]
    eager = [nn.Parameter(v.clone()) for v in values]
    fused = torchlamb.Lamb(grouped(ours, blocks), fused=True, **options)
    single = torchlamb.Lamb(grouped(eager, blocks), foreach=False, **options)
    largest = [0.0] * len(tensors)  # of the gradients so far, whose sum, the first moment, can cancel
    for _ in range(3):
        for i, (p, q, t) in enumerate(zip(ours, eager, tensors, strict=True)):
            p.grad = q.grad = None
            p.grad_dtype = q.grad_dtype = F32 if t["float32_grad"] else t["dtype"]
            if t["has_grad"]:
                grad = torch.randn(p.shape, generator=generator).to(p.grad_dtype)
                p.grad, q.grad = laid_out(grad, t["grad_layout"]), grad
                largest[i] = max(largest[i], grad.abs().max().item() if grad.numel() else 0.0)
        before = [q.detach().clone() for q in eager]
        fused.step()
        single.step()
        for i, (p, q, old, t) in enumerate(zip(ours, eager, before, tensors, strict=True)):
            assert (p in fused.state) == (q in single.state) == t["has_grad"]
            assert_close(p.detach(), q.detach(), old)
            if not t["has_grad"]:
                assert torch.equal(p, old)
                continue
            for name, exact in single.state[q].items():
                close = fused.state[p][name]
                if name == "master":
                    assert_close(close, exact, old)
                else:
                    terms = exact.abs().amax().item() if exact.numel() else 0.0
                    terms = max(terms, largest[i]) if name == "exp_avg" else terms
                    torch.testing.assert_close(close, exact, rtol=1e-6, atol=2e-6 * terms)
                exact.copy_(close)  # both go on from here: a rounding that differs counts once
            q.data.copy_(p)
    for key, ratio in single.trust_ratios().items():
        few = eager[key].numel() // ratio.numel() < 4  # so that all of an update can cancel, and its norm with it
        torch.testing.assert_close(fused.trust_ratios()[key], ratio, rtol=1e-3 if few else 3e-6, atol=0)


def walled(values, dtype):
    """The values with a wall of other numbers before and behind them, and the whole."""
    whole = torch.full((values.numel() + 64,), 77.0, dtype=dtype)
    inside = whole[32 : 32 + values.numel()]
    return inside.copy_(values), whole


@each_isa
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_size_is_stepped_to_its_end_and_no_further(dtype, isa):
    set_isa(isa)
    torch.manual_seed(0)
    sizes = [*range(100), 511, 512, 513, 1023, 32_767, 32_768, 32_799]
    values = [torch.randn(size).to(dtype) for size in sizes]
    ours, wholes = zip(*(walled(v, dtype) for v in values), strict=True)
    params, eager = [nn.Parameter(t) for t in ours], [nn.Parameter(v.clone()) for v in values]
    wholes = list(wholes)
    fused = torchlamb.Lamb(params, lr=0.02, weight_decay=0.1, fused=True)
    single = torchlamb.Lamb(eager, lr=0.02, weight_decay=0.1, foreach=False)
    for step in range(2):
        for p, q in zip(params, eager, strict=True):
            q.grad = torch.randn(q.shape).to(dtype)
            p.grad = walled(q.grad, dtype)[0]
        fused.step()
        single.step()
        for state in fused.state.values() if step == 0 else ():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name], whole = walled(state[name], F32)
                wholes.append(whole)
    for p, q, v in zip(params, eager, values, strict=True):
        assert_close(p, q, v)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(fused.state[p][name], single.state[q][name], rtol=1e-6, atol=1e-7)
    for whole in wholes:
        assert (whole[:32] == 77).all()
        assert (whole[-32:] == 77).all()
    ratios, exact = (torch.stack([*optimizer.trust_ratios().values()]) for optimizer in (fused, single))
    torch.testing.assert_close(ratios, exact, rtol=2e-6 if dtype is F32 else 1e-2, atol=0)


@each_isa
def test_ratio_of_a_tensor_of_very_uneven_sizes(isa):
    set_isa(isa)
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3_000_001).mul_(0.01))
    p.data[torch.randperm(p.numel())[:100]] = 1000.0
    old, p.grad = p.detach().clone(), torch.randn(p.shape)
    optimizer = torchlamb.Lamb([p], lr=0.1, weight_decay=0.1, fused=True)
    optimizer.step()
    update = exact_update(old, optimizer.state[p], 0.1)
    wanted = np.sqrt(np.square(old.double().numpy()).sum()) / np.sqrt(np.square(update).sum())
    assert optimizer.trust_ratios()[0].item() == pytest.approx(wanted, rel=1e-6)


@each_isa
def test_gradient_norm_of_very_uneven_sizes(isa):
    """Seen through the clipped first moment."""
    set_isa(isa)
    torch.manual_seed(0)
    p = nn.Parameter(torch.ones(3_000_001))
    p.grad = torch.randn(p.shape).mul_(0.01)
    p.grad[::30_011] = 1000.0
    optimizer = torchlamb.Lamb([p], lr=0.0, betas=(0.0, 0.0), max_grad_norm=1.0, fused=True)
    optimizer.step()
    norm = np.sqrt(np.square(p.grad.double().numpy()).sum())
    assert optimizer.state[p]["exp_avg"][0].item() * norm == pytest.approx(1000.0, rel=1e-6)


@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"phi_bounds": (0.5, 3.0)},
        {"trust_ratio_bounds": (0.1, 1.0), "weight_decay": 0.1},
        {"phi_bounds": (0.5, 3.0), "trust_ratio_bounds": (0.1, 1.0)},
        {"phi_bounds": (2.0, 2.0)},
        {"state_dtype": BF16},
        {"layer_adaptation": False, "phi_bounds": (0.5, 3.0), "weight_decay": 0.1},
    ],
    ids=str,
)
def test_movement_is_lr_times_the_rules_ratio_times_the_update(options, phases, monkeypatch):
    if phases == 2:
        in_two_phases(monkeypatch)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(33, 7) * 10.0**size) for size in range(-4, 4)]
    zero, still = nn.Parameter(torch.zeros(9)), nn.Parameter(torch.randn(9))
    params += [zero, still]
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape) * 10.0 ** (i % 3) if p is not still else torch.zeros(9)
    before = [p.detach().clone() for p in params]
    optimizer = torchlamb.Lamb(params, lr=0.1, fused=True, **options)
    optimizer.step()
    ((indices, scalars, sums, *_),) = optimizer._last.buckets
    assert indices == list(range(len(params)))
    updates = [exact_update(old, optimizer.state[p], scalars.weight_decay) for p, old in zip(params, before, strict=True)]
    exact = [[old.double().square().sum().item(), np.square(u).sum()] for old, u in zip(before, updates, strict=True)]
    torch.testing.assert_close(rule.norms(sums).double() ** 2, torch.tensor(exact, dtype=F64), rtol=2e-6, atol=0)
    ratios = rule.trust_ratio(sums, scalars)
    assert ratios[8] == 1
    if not options.get("weight_decay"):
        assert ratios[9] == 1
        assert torch.equal(still, before[9])
    for p, old, ratio, u in zip(params, before, ratios, updates, strict=True):
        move = 0.1 * ratio.double().item() * u
        error = np.abs(p.detach().double().numpy() - (old.double().numpy() - move))
        assert np.all(error <= 1e-6 * np.abs(move) + 2.0**-24 * np.abs(p.detach().double().numpy()) + 1e-12)
