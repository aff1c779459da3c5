"""max_grad_norm and skip_nonfinite: a bad gradient changes nothing, and the next step is as if it had not been."""

from __future__ import annotations

import copy
import io
import math
import pickle

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
    """Parameters and state, without the count of skipped steps."""
    state = {i: {k: v for k, v in s.items() if k != "skipped"} for i, s in optimizer.state_dict()["state"].items()}
    return copy.deepcopy([p.detach() for p in params]), copy.deepcopy(state)


def assert_same(a, b) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a[0], b[0], strict=True))
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(value, b[1][i][key]) for i, state in a[1].items() for key, value in state.items())


def is_finite(params, optimizer) -> bool:
    tensors = [*params, *(value for state in optimizer.state.values() for value in state.values())]
    return all(t.isfinite().all() for t in tensors)


# Step: parameter and element that are bad then, the first, a middle and the last one of a matrix among them, and a 0-dim one.
BAD_AT = {0: (1, 0), 3: (0, 0), 4: (0, 7), 6: (0, 14), 7: (1, 0), 8: (3, 6)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *([] if GPU_KERNELS else [torch.float64])], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, pytest.param(-math.inf, marks=pytest.mark.slow), 1e30], ids=str)
@pytest.mark.parametrize("guard", [*GUARDS[:2], pytest.param(GUARDS[2], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_bad_gradient(case, guard, bad, dtype, monkeypatch):
    """At the first step and at later ones: nothing changes, it is counted, and the parameter is told."""
    use(monkeypatch, case)
    params, plain = make_params(dtype), make_params(dtype)
    names = ["matrix", "scalar", "empty", "vector"]
    optimizer = torchlamb.Lamb(zip(names, params, strict=True), weight_decay=0.1, **guard, **case.options)
    reference = torchlamb.Lamb(plain, weight_decay=0.1, **guard, **case.options)
    skipped, last = 0, []
    for step in range(10):
        if step in BAD_AT:
            before = snapshot(params, optimizer)
            set_grads(params, step)
            index, element = BAD_AT[step]
            params[index].grad.view(-1)[element] = bad
            optimizer.step()
            after = snapshot(params, optimizer)
            if step == 0:  # state exists now, and is that of no step
                assert not any(value.any() for state in after[1].values() for value in state.values())
                assert_same((before[0], {}), (after[0], {}))
            else:
                assert_same(before, after)
            assert all(ratio.isnan().all() for ratio in optimizer.trust_ratios().values())
            skipped, last = skipped + 1, [names[index]]
        else:
            for p in (params, plain):
                set_grads(p, step)
            optimizer.step()
            reference.step()
            assert all(ratio.isfinite().all() for ratio in optimizer.trust_ratios().values())
        assert optimizer.skipped_steps.item() == skipped
        assert optimizer.nonfinite_parameters() == last
        assert is_finite(params, optimizer)
    assert_same(snapshot(params, optimizer), snapshot(plain, reference))
    assert optimizer.state[params[0]]["step"].item() == 10 - len(BAD_AT)
    assert reference.skipped_steps.item() == 0
    assert reference.nonfinite_parameters() == []


@pytest.mark.parametrize(
    "options",
    [{}, {"master_weights": True}, {"stochastic_rounding": True}, {"blocks": 2}, {"layer_adaptation": False}],
    ids=str,
)
@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_an_update_whose_norm_is_not_finite(case, options, monkeypatch):
    """The parameter stays, the others and all moments go on, and it is counted; so for a parameter that is not finite.

    Divided by an infinite norm an update would move nothing: without layer adaptation it is not.
    """
    use(monkeypatch, case)
    dtype = torch.float32 if "blocks" in options else torch.bfloat16
    huge, poisoned, fine = params = [nn.Parameter(torch.full((4, 3), 2.0, dtype=dtype)) for _ in range(3)]
    poisoned.data[3, 2] = math.inf
    groups = [{"params": [huge], "weight_decay": 1e30}, {"params": [poisoned, fine]}]
    optimizer = torchlamb.Lamb(groups, lr=0.1, skip_nonfinite=True, **options, **case.options)
    for step in range(1, 4):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        left = [slice(None), slice(2, None)] if "blocks" in options else [slice(None), slice(None)]  # one block is fine
        assert torch.equal(huge[left[0]], before[0][left[0]])
        assert torch.equal(poisoned[left[1]], before[1][left[1]])
        assert not torch.equal(fine, before[2])
        assert optimizer.skipped_steps.item() == step
        assert optimizer.nonfinite_parameters() == [0, 1]
        assert [ratio.isnan().any().item() for ratio in optimizer.trust_ratios().values()] == [True, True, False]
        for p in params:
            assert optimizer.state[p]["step"].item() == step
            assert optimizer.state[p]["exp_avg"].isfinite().all()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    poisoned.data.fill_(2.0)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 3
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_gradients_that_overflow_together(case, monkeypatch):
    """Each sum is finite, the total is not: the large ones are told."""
    use(monkeypatch, case)
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = torchlamb.Lamb(params, max_grad_norm=1.0, **case.options)
    for p, size in zip(params, (1e19, 1.0, 1e19), strict=True):
        p.grad = torch.tensor([size, size, 0.0])
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.nonfinite_parameters() == [0, 2]


def skipping_once(**options):
    params = make_params()
    optimizer = torchlamb.Lamb(params, skip_nonfinite=True, **options)
    for bad in (1.0, math.nan):
        set_grads(params, 0)
        params[3].grad[2] *= bad
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("capturable", [False, True])
def test_the_last_skipped_step_is_remembered_whatever_has_gradients_since(capturable):
    params, optimizer = skipping_once(capturable=capturable)
    for absent in range(4):
        set_grads(params, absent)
        params[absent].grad = None
        optimizer.step()
        assert optimizer.nonfinite_parameters() == [3]
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.nonfinite_parameters() == [3]
    late.grad = torch.tensor([1.0, math.inf])
    optimizer.step()
    assert optimizer.nonfinite_parameters() == [4]
    assert optimizer.skipped_steps.item() == 2
    assert optimizer.state[late]["skipped"] is optimizer.skipped_steps


def test_parameters_may_be_taken_out():
    params, optimizer = skipping_once()
    optimizer.param_groups[0]["params"] = params[:2]
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.nonfinite_parameters() == []  # positions are others now


def test_gradients_that_overflow_once_they_are_unscaled():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torchlamb.Lamb([p, q], skip_nonfinite=True)
    p.grad, q.grad = torch.full((3,), 1e15), torch.ones(3)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1e-10), torch.tensor(0.0)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.nonfinite_parameters() == [0]


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("capturable", [False, True])
def test_the_count_is_saved(how, capturable):
    params, optimizer = skipping_once(capturable=capturable)
    if how == "state_dict":
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        other = make_params(torch.bfloat16)
        resumed = torchlamb.Lamb(other, skip_nonfinite=True)
        resumed.load_state_dict(torch.load(buffer, weights_only=True))
    elif how == "deepcopy":
        other, resumed = copy.deepcopy((params, optimizer))
    else:
        other, resumed = pickle.loads(pickle.dumps((params, optimizer)))
    assert resumed.skipped_steps.item() == 1
    assert resumed.skipped_steps.dtype == torch.int64
    for bad in (math.nan, 1.0):
        set_grads(other, 1)
        other[0].grad[0, 0] *= bad
        resumed.step()
    assert resumed.skipped_steps.item() == 2
    assert resumed.nonfinite_parameters() == [0]
    assert {state["skipped"].item() for state in resumed.state.values()} == {2}
    assert optimizer.skipped_steps.item() == 1


def test_nothing_is_counted_without_a_guard():
    params = make_params()
    optimizer = torchlamb.Lamb(params)
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 0
    assert optimizer.nonfinite_parameters() == []
    assert all("skipped" not in state for state in optimizer.state.values())


@pytest.mark.parametrize("fused", [True, None])
def test_steps_that_a_scaler_has_this_optimizer_skip_are_counted(fused):
    params = make_params()
    optimizer = torchlamb.Lamb(params, fused=fused)
    for found in (0.0, 1.0, 1.0, 0.0):
        set_grads(params, 0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found)
        optimizer.step()
    assert optimizer.skipped_steps.item() == 2
    assert optimizer.nonfinite_parameters() == []


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
