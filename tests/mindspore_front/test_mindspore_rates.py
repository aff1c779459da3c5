"""Row 7 of the specification's checklist: learning rates of `torchlamb.mindspore.nn.Lamb`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from front_cases import (
    Calls,
    Ramp,
    assert_follows_reference,
    assert_unchanged,
    make_grads,
    make_params,
    run,
    set_grads,
    snapshot,
)

import torchlamb
from torchlamb.mindspore import nn

# Row 7: learning rates

FORMS: list[tuple[str, Any, list[float]]] = [
    ("float", 0.1, [0.1, 0.1, 0.1, 0.1]),
    ("zero", 0.0, [0.0, 0.0, 0.0, 0.0]),
    ("int", 1, [1.0, 1.0, 1.0, 1.0]),
    ("scalar-tensor", torch.tensor(0.125), [0.125, 0.125, 0.125, 0.125]),
    ("int-tensor", torch.tensor(1), [1.0, 1.0, 1.0, 1.0]),
    ("vector", torch.tensor([0.5, 0.25, 0.125, 0.0625]), [0.5, 0.25, 0.125, 0.0625]),
    ("list", [0.4, 0.3, 0, 1], [0.4, 0.3, 0.0, 1.0]),
    ("longer-list", [0.4, 0.3, 0.2, 0.1, 7.0], [0.4, 0.3, 0.2, 0.1]),
    ("generator", "made in the test", [0.25, 0.5, 0.75, 1.0]),
    ("array", np.array([0.4, 0.3, 0.2, 0.1]), [0.4, 0.3, 0.2, 0.1]),
    ("list-of-tensors", [torch.tensor(0.5), torch.tensor(0.25), 0.1, 0.2], [0.5, 0.25, 0.1, 0.2]),
    ("schedule", nn.WarmUpLR(0.4, 4), [0.0, 0.1, 0.2, 0.3]),
    ("stair", nn.ExponentialDecayLR(0.4, 0.5, 2, is_stair=True), [0.4, 0.4, 0.2, 0.2]),
    ("own-schedule", Ramp(0.25), [0.25, 0.5, 0.75, 1.0]),
    ("one-element-tensors", Calls(*torch.tensor([[0.5], [0.25], [0.75], [1.0]])), [0.5, 0.25, 0.75, 1.0]),
]


def form_of(name: str) -> tuple[Any, list[float]]:
    value, wanted = next((value, wanted) for form, value, wanted in FORMS if form == name)
    return (x / 4 for x in range(1, 5)) if name == "generator" else value, wanted


@pytest.mark.parametrize("name", [form[0] for form in FORMS])
@pytest.mark.parametrize("place", ["optimizer", "group"])
def test_row07_the_step_at_which_each_value_is_used(name, place):
    value, wanted = form_of(name)
    params = make_params()
    optimizer = nn.Lamb(params, value) if place == "optimizer" else nn.Lamb([{"params": params, "lr": value}], 7.0)
    assert_follows_reference(optimizer, params, [{}] * 5, [[lr] * 5 for lr in wanted])
    assert all(float(group["lr"]) == pytest.approx(wanted[-1]) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "names", [pair for pair in itertools.combinations([form[0] for form in FORMS], 2) if "longer-list" not in pair]
)
def test_row07_mixed_forms(names):
    (first, wanted_first), (second, wanted_second) = map(form_of, names)
    params = make_params()
    optimizer = nn.Lamb([{"params": params[:2], "lr": first}, {"params": params[2:]}], second)
    lrs = [[a, a, b, b, b] for a, b in zip(wanted_first, wanted_second, strict=True)]
    assert_follows_reference(optimizer, params, [{}] * 5, lrs)


def test_row07_schedules_count_from_0_and_bias_correction_from_1():
    params = make_params()
    schedule = Calls(0.5, 0.25, 0.125)
    optimizer = nn.Lamb(params, schedule)
    assert_follows_reference(optimizer, params, [{}] * 5, [[0.5] * 5, [0.25] * 5, [0.125] * 5])
    assert all(step.shape == (1,) and step.dtype == torch.int32 for step in schedule.steps)
    steps = [int(step) for step in schedule.steps]
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2}
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}
    assert optimizer.global_step == 3


@pytest.mark.parametrize("take", ["step", "call"])
def test_row07_a_used_up_vector_raises_before_anything_changes(take):
    params = make_params()
    optimizer = nn.Lamb([{"params": params[:2], "lr": [0.2, 0.1]}, {"params": params[2:]}], Ramp(0.1))
    run(optimizer, params, 2)
    set_grads(params, 2)
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(IndexError, match=r"2 values and step 2 \(counted from 0\)"):
            optimizer.step() if take == "step" else optimizer(make_grads(params, 2))
        assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ("0.1", TypeError, "learning_rate must be"),
        (b"0.1", TypeError, "learning_rate must be"),
        (None, TypeError, "learning_rate must be"),
        (True, TypeError, "learning_rate"),
        (object(), TypeError, "learning_rate must be"),
        ({0.1: 0.2}, TypeError, "learning_rate must be"),
        (lambda _: 0.1, TypeError, "learning_rate must be"),
        (1j, TypeError, "learning_rate"),
        (-0.1, ValueError, "learning_rate.*-0.1"),
        (-1, ValueError, "learning_rate"),
        (float("nan"), ValueError, "learning_rate"),
        (float("inf"), ValueError, "learning_rate"),
        (torch.tensor(-0.1), ValueError, "learning_rate"),
        (torch.tensor(True), TypeError, "learning_rate"),
        (torch.tensor(1j), TypeError, "learning_rate"),
        (torch.ones(2, 2), ValueError, r"learning_rate.*\(2, 2\)"),
        (torch.ones(1, 1), ValueError, r"learning_rate.*\(1, 1\)"),
        (torch.ones(0), ValueError, "learning_rate has no values"),
        (torch.tensor([0.1, -0.1]), ValueError, r"learning_rate\[1\]"),
        ([], ValueError, "learning_rate has no values"),
        ([0.1, "0.1"], TypeError, r"learning_rate\[1\]"),
        ([0.1, True], TypeError, r"learning_rate\[1\]"),
        ([0.1, float("nan")], ValueError, r"learning_rate\[1\]"),
        (np.ones((2, 2)), TypeError, r"learning_rate\[0\]"),
        (np.array(0.1), TypeError, "learning_rate must be"),
        (Calls("0.1"), TypeError, "step 0"),
        (Calls(torch.ones(2)), TypeError, "step 0"),
        (Calls(-1.0), ValueError, "step 0.*-1.0"),
        (Calls(float("nan")), ValueError, "step 0"),
        (nn.LearningRateSchedule(), NotImplementedError, "construct"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)
def test_row07_wrong_learning_rates(value, kind, words):
    with pytest.raises(kind, match=words):
        nn.Lamb(make_params(), value)
    with pytest.raises(kind, match=words.replace("learning_rate", "group 0 lr")):
        nn.Lamb([{"params": make_params(), "lr": value}], 0.1)


def test_row07_vectors_have_one_length():
    params = make_params()
    groups = [{"params": params[:2], "lr": [0.1, 0.2]}, {"params": params[2:], "lr": torch.ones(3)}]
    with pytest.raises(ValueError, match="group 1 has 3 values, that of another group 2"):
        nn.Lamb(groups, 0.1)
    with pytest.raises(ValueError, match="group 1 has 3 values, that of another group 2"):
        nn.Lamb([groups[0], {"params": params[2:]}], [0.1, 0.2, 0.3])
    nn.Lamb(groups[:1], [0.1, 0.2, 0.3])  # no group uses the three


@pytest.mark.parametrize("value", ["0.1", -1.0, torch.ones(2), None])
def test_row07_a_schedule_that_fails_later_changes_nothing(value):
    params = make_params()
    optimizer = nn.Lamb(params, Calls(0.1, value, 0.1))
    run(optimizer, params, 1)
    set_grads(params, 1)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match="step 1"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_row07_a_step_that_fails_takes_no_value():
    params = make_params()
    optimizer = nn.Lamb(params, [0.3, 0.2, 0.1], foreach=True)
    run(optimizer, params, 1)
    set_grads(params, 1)
    before = snapshot(optimizer)
    optimizer.param_groups[0]["blocks"] = 3
    with pytest.raises(ValueError, match="blocks"):
        optimizer.step()
    optimizer.param_groups[0]["blocks"] = 1
    assert_unchanged(optimizer, before)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_row07_a_step_that_fails_late_takes_no_value_either(monkeypatch):
    def fail(*_: Any) -> None:
        raise MemoryError

    params = make_params()
    optimizer = nn.Lamb(params, [0.3, 0.2])
    set_grads(params, 0)
    with monkeypatch.context() as patch:
        patch.setattr(torchlamb.Lamb, "_init_group", fail)
        with pytest.raises(MemoryError):
            optimizer.step()
    assert optimizer.global_step == 0
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_row07_a_fixed_tensor_can_be_changed_in_place():
    params, twins = make_params(), make_params()
    lr = torch.tensor(0.5)
    optimizer, twin = nn.Lamb(params, lr), nn.Lamb(twins, [0.5, 0.25])
    run(optimizer, params, 1)
    lr.fill_(0.25)
    run(optimizer, params, range(1, 2))
    run(twin, twins, 2)
    assert all(torch.equal(x.parameter, y.parameter) for x, y in zip(params, twins, strict=True))


def test_row07_a_value_written_by_hand_holds_for_one_step():
    params = make_params()
    optimizer = nn.Lamb(params, Ramp(0.25))
    used = []
    for step in range(4):
        if step == 2:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        before = [p.detach().clone() for _, p in params]
        run(optimizer, params, range(step, step + 1))
        used.append(optimizer.param_groups[0]["lr"])
        assert all(torch.equal(p, old) == (step == 2) for (_, p), old in zip(params, before, strict=True))
    assert used == [0.25, 0.5, 0.0, 1.0]


@pytest.mark.parametrize(
    ("value", "kind"), [("0.1", TypeError), (float("nan"), ValueError), (float("inf"), ValueError), (True, TypeError)]
)
@pytest.mark.parametrize("rate", [0.5, Ramp(0.25)], ids=["fixed", "dynamic"])
def test_row07_a_wrong_value_written_by_hand_is_refused(rate, value, kind):
    params = make_params()
    optimizer = nn.Lamb(params, rate)
    run(optimizer, params, 1)
    set_grads(params, 1)
    optimizer.param_groups[0]["lr"] = value
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(kind, match=r"param_groups\[0\]\['lr'\]"):
            optimizer.step()
    if value == value:  # a NaN in a snapshot equals nothing
        assert_unchanged(optimizer, before)
    assert optimizer.global_step == 1


class Unspeakable(nn.LearningRateSchedule):
    def construct(self, global_step: int) -> float:
        return 0.1 * (global_step + 1)

    def __repr__(self) -> str:
        raise AssertionError("a step has no need of it: it may be long, or read from a device")


def test_row07_no_step_needs_the_text_of_a_schedule():
    params = make_params()
    run(nn.Lamb(params, Unspeakable()), params, 2)


def test_row07_a_fixed_learning_rate_takes_torch_schedulers():
    params = make_params()
    optimizer = nn.Lamb(params, 1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    used = []
    for step in range(3):
        run(optimizer, params, range(step, step + 1))
        used.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert used == [1.0, 0.5, 0.25]


def test_row07_a_dynamic_learning_rate_is_not_captured(monkeypatch):
    params = make_params()
    optimizer = nn.Lamb([{"params": params[:2]}, {"params": params[2:], "lr": Ramp(0.1)}], 0.1, capturable=True)
    set_grads(params, 0)
    before = snapshot(optimizer)
    monkeypatch.setattr("torchlamb.lamb.is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"captured.*learning_rate"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    nn.Lamb(params, 0.1, capturable=True).step()
