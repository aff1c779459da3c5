"""`torchlamb.mindspore.nn.Lamb` as an optimizer of torch: state dicts, copies, groups that are added, hooks, closures."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from front_cases import (
    SHAPES,
    Ramp,
    assert_unchanged,
    make_grads,
    make_params,
    run,
    set_grads,
    snapshot,
)

import torchlamb
from torchlamb.mindspore import nn

# An optimizer of torch in every other respect


def resume_by_state_dict(
    optimizer: nn.Lamb, params: list[nn.NamedParameter], make: Any
) -> tuple[nn.Lamb, list[nn.NamedParameter]]:
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for _, p in params]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again = [nn.NamedParameter(x.name, torch.nn.Parameter(p)) for x, p in zip(params, loaded["params"], strict=True)]
    resumed = make(again)
    resumed.load_state_dict(loaded["optimizer"])
    return resumed, again


def resume_by_pickle(optimizer: nn.Lamb, params: list[nn.NamedParameter], _: Any) -> tuple[nn.Lamb, list[nn.NamedParameter]]:
    return pickle.loads(pickle.dumps((optimizer, params)))


def resume_by_deepcopy(optimizer: nn.Lamb, params: list[nn.NamedParameter], _: Any) -> tuple[nn.Lamb, list[nn.NamedParameter]]:
    return copy.deepcopy((optimizer, params))


@pytest.mark.parametrize("resume", [resume_by_state_dict, resume_by_pickle, resume_by_deepcopy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row07_a_resumed_run_takes_the_next_values(resume, dtype):
    def make(params: list[nn.NamedParameter]) -> nn.Lamb:
        groups = [
            {"params": params[:1], "lr": nn.PolynomialDecayLR(0.1, 0.01, 6, 0.5), "grad_centralization": True},
            {"params": params[1:3], "lr": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]},
            {"params": params[3:]},
            {"order_params": params[::-1]},
        ]
        return nn.Lamb(groups, Ramp(0.05), weight_decay=0.01)

    params = make_params(dtype)
    optimizer = make(params)
    run(optimizer, params, 3)
    resumed, again = resume(optimizer, params, make)
    assert resumed.global_step == 3
    assert [x.name for x in resumed.parameters] == [x.name for x in optimizer.parameters]
    for o, ps in ((optimizer, params), (resumed, again)):
        run(o, ps, range(3, 6))
    assert [group["lr"] for group in resumed.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert resumed.param_groups[1]["lr"] == 0.6
    for x, y in zip(params, again, strict=True):
        assert x.parameter is not y.parameter
        assert torch.equal(x.parameter, y.parameter)
    with pytest.raises(IndexError, match="6 values and step 6"):
        resumed.step()


def test_row07_the_position_is_a_top_level_entry():
    params = make_params()
    optimizer = nn.Lamb(params, Ramp(0.1))
    run(optimizer, params, 2)
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups", "global_step"}
    assert state["global_step"] == 2
    optimizer.step()
    assert optimizer.state_dict()["global_step"] == 3


def test_row07_without_the_entry_the_largest_step_count_is_the_position():
    params, twins = make_params(), make_params()
    twin = torchlamb.Lamb([tuple(x) for x in twins[:3]], 0.1)
    run(twin, twins, 4)
    optimizer = nn.Lamb(params[:3], Ramp(0.1))
    optimizer.load_state_dict(twin.state_dict())
    assert optimizer.global_step == 4
    run(optimizer, params, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    for fresh in (nn.Lamb(params, Ramp(0.1)) for _ in range(2)):
        assert not fresh.state[params[0].parameter]  # which leaves an empty entry
        fresh.load_state_dict({"state": fresh.state_dict()["state"], "param_groups": fresh.state_dict()["param_groups"]})
        assert fresh.global_step == 0
        fresh.load_state_dict(fresh.state_dict())
        assert fresh.global_step == 0
    grads = make_grads(params, 0)
    fresh([None, *grads[1:]])
    fresh(grads)
    fresh.load_state_dict({key: value for key, value in fresh.state_dict().items() if key != "global_step"})
    assert fresh.global_step == 2


@pytest.mark.parametrize(
    ("value", "kind"), [("3", TypeError), (3.0, TypeError), (True, TypeError), (None, TypeError), (-1, ValueError)]
)
def test_row07_a_wrong_position_is_refused(value, kind):
    params = make_params()
    optimizer = nn.Lamb(params, Ramp(0.1))
    run(optimizer, params, 2)
    before = snapshot(optimizer)
    other = nn.Lamb(make_params(), 0.5)
    with pytest.raises(kind, match="global_step"):
        optimizer.load_state_dict({**other.state_dict(), "global_step": value})
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(
            {**nn.Lamb([{"params": params}, {"params": make_params()}], 0.1).state_dict(), "global_step": 9}
        )
    assert_unchanged(optimizer, before)


def test_row03_groups_can_be_added():
    params = make_params()
    optimizer = nn.Lamb([{"params": params[:2]}, {"order_params": params[1::-1]}], [0.3, 0.2, 0.1], weight_decay=0.1)
    set_grads(params, 0)
    optimizer.step()
    optimizer.add_param_group({"params": params[2:4], "lr": Ramp(0.5), "grad_centralization": True})
    optimizer.add_param_group({"params": params[4:]})
    assert [x.name for x in optimizer.parameters] == [params[i].name for i in (1, 0, 2, 3, 4)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 1.0, 0.2]
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 1.0, 0.2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1]


def test_row03_a_group_added_after_its_vector_is_used_up():
    params = make_params()
    optimizer = nn.Lamb(params[:2], 0.1)
    run(optimizer, params[:2], 2)
    optimizer.add_param_group({"params": params[2:], "lr": [0.2, 0.1]})
    assert optimizer.param_groups[-1]["lr"] == 0.1
    with pytest.raises(IndexError, match="2 values and step 2"):
        optimizer.step()


def test_row03_a_copy_knows_the_learning_rate_of_groups_to_come():
    params = make_params()
    optimizer = copy.deepcopy(nn.Lamb(params[:2], [0.3, 0.2]))
    optimizer.add_param_group({"params": params[2:]})
    assert optimizer.param_groups[-1]["lr"] == 0.3


def test_row03_a_group_that_is_refused_is_not_added():
    params = make_params()
    optimizer = nn.Lamb(params[:3], [0.1, 0.2])
    run(optimizer, params[:3], 1)
    before = snapshot(optimizer)
    extra = params[3:]
    for group, kind in [
        ({"params": extra, "betas": (0.9, 0.9)}, KeyError),
        ({"lr": 0.1}, KeyError),
        ({"params": params[:1]}, RuntimeError),
        ({"params": [*extra, extra[0]]}, RuntimeError),
        ({"params": extra, "lr": [0.1]}, ValueError),
        ({"params": extra, "lr": "0.1"}, TypeError),
        ({"params": extra, "weight_decay": -1.0}, ValueError),
        ({"params": [p for _, p in extra]}, TypeError),  # the others have names
        ({"params": [("w", extra[0].parameter * 2)]}, ValueError),  # no leaf
        ({"order_params": params}, ValueError),
        ("group", TypeError),
    ]:
        with pytest.raises(kind):
            optimizer.add_param_group(group)
        assert_unchanged(optimizer, before)
    run(optimizer, params[:3], 1)


def test_hooks_see_and_may_change_the_position():
    params = make_params()
    optimizer = nn.Lamb(params, Ramp(0.1))
    run(optimizer, params, 2)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(state["global_step"]))
    state = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "global_step": 7})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.global_step))
    optimizer.load_state_dict(state)
    assert seen == [2, 7]
    assert optimizer.global_step == 7


def test_hooks_run_once():
    params = make_params()
    torchlamb.Lamb([torch.nn.Parameter(torch.ones(2))]).step()  # the base class wraps its own step() on construction
    optimizer = nn.Lamb(params, 0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run(optimizer, params, 1)
    assert calls == ["before", "after"]


def test_skipped_steps_count_as_calls():
    params = make_params()
    optimizer = nn.Lamb(params, [0.1, 0.2, 0.3], skip_nonfinite=True)
    run(optimizer, params, 1)
    set_grads(params, 1)
    params[0].parameter.grad[0] = torch.inf
    before = [p.detach().clone() for _, p in params]
    optimizer.step()
    assert all(torch.equal(p, old) for (_, p), old in zip(params, before, strict=True))
    assert optimizer.global_step == 2
    run(optimizer, params, 1)
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_a_closure_is_evaluated():
    params = make_params()
    optimizer = nn.Lamb(params, Ramp(0.1))

    def closure() -> float:
        set_grads(params, 0)
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert optimizer.global_step == 1


def test_a_compiled_step_counts():
    params, twins = make_params(torch.float32), make_params(torch.float32)
    optimizer, twin = nn.Lamb(params, Ramp(0.01)), nn.Lamb(twins, Ramp(0.01))
    torch._dynamo.reset()
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(3):
        set_grads(params, step)
        compiled()
    run(twin, twins, 3)
    assert optimizer.global_step == 3
    assert optimizer.param_groups[0]["lr"] == twin.param_groups[0]["lr"]
    for x, y in zip(params, twins, strict=True):
        assert torch.allclose(x.parameter, y.parameter, rtol=1e-6, atol=1e-7)


def test_names_reach_the_trust_ratios():
    params = make_params()
    optimizer = nn.Lamb(params, 0.1)
    run(optimizer, params, 1)
    assert set(optimizer.trust_ratios()) == set(SHAPES)
