"""Row 12 of the specification's checklist: the learning rate schedules, against their formulas and MindSpore's own numbers."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchlamb.mindspore import nn
from torchlamb.mindspore.nn import learning_rate_schedule


def polynomial(s: int, lr: float, end: float, D: int, power: float, update: bool = False) -> float:
    if update:
        D = D * max(math.ceil(s / D), 1)
        return (lr - end) * (1 - s / D) ** power + end
    return (lr - end) * (1 - min(s, D) / D) ** power + end


def periods(s: int, D: int, stair: bool) -> float:
    return math.floor(s / D) if stair else s / D


def natural(s: int, lr: float, rate: float, D: int, stair: bool = False) -> float:
    return lr * math.e ** (-rate * D * math.floor(s / D)) if stair else lr * math.e ** (-rate * s)


# Schedule, its formula as documented, argument lists. Flags are given both ways, and left out.
FORMULAS: list[tuple[type, Callable[..., float], list[tuple[Any, ...]]]] = [
    (
        nn.PolynomialDecayLR,
        polynomial,
        [
            (*args, *flag)
            for args in [(0.1, 0.01, 4, 0.5), (0.1, 0.0, 10, 1.0), (0.01, 0.2, 3, 2.0)]
            for flag in [(), (False,), (True,)]
        ],
    ),
    (
        nn.ExponentialDecayLR,
        lambda s, lr, rate, D, stair=False: lr * rate ** periods(s, D, stair),
        [(*args, *flag) for args in [(0.1, 0.9, 4), (0.5, 1.1, 7)] for flag in [(), (False,), (True,)]],
    ),
    (
        nn.NaturalExpDecayLR,
        natural,
        [(*args, *flag) for args in [(0.1, 0.9, 4), (0.5, 0.01, 7)] for flag in [(), (False,), (True,)]],
    ),
    (
        nn.InverseDecayLR,
        lambda s, lr, rate, D, stair=False: lr / (1 + rate * periods(s, D, stair)),
        [(*args, *flag) for args in [(0.1, 0.9, 4), (0.5, 2.0, 7)] for flag in [(), (False,), (True,)]],
    ),
    (
        nn.CosineDecayLR,
        lambda s, low, high, D: low + (high - low) / 2 * (1 + math.cos(math.pi * min(s, D) / D)),
        [(0.01, 0.1, 4), (0.0, 0.5, 9)],
    ),
    (nn.WarmUpLR, lambda s, lr, W: lr * min(s, W) / W, [(0.1, 4), (0.0, 3), (0.7, 1)]),
]
CASES = [(cls, formula, args) for cls, formula, lists in FORMULAS for args in lists]


@pytest.mark.parametrize(("cls", "formula", "args"), CASES, ids=[f"{cls.__name__}{args}" for cls, _, args in CASES])
def test_row12_values_are_those_of_the_table(cls, formula, args):
    schedule = cls(*args)
    decay_steps = next(x for x in args if type(x) is int)
    for step in range(3 * decay_steps + 1):
        assert schedule(step) == pytest.approx(formula(step, *args), rel=1e-7, abs=1e-12)
        for form in (torch.tensor(step), torch.tensor([step]), schedule.construct):
            value = form(step) if callable(form) else schedule(form)
            assert value == schedule(step)
            assert isinstance(value, float)


def test_row12_values_by_hand():
    """So that the formulas above are not the only witness."""
    assert [round(nn.PolynomialDecayLR(0.1, 0.0, 4, 1.0, True)(s), 6) for s in (0, 2, 4, 6, 8, 12)] == [
        0.1,
        0.05,
        0,
        0.025,
        0,
        0,
    ]
    assert [nn.ExponentialDecayLR(0.8, 0.5, 2)(s) for s in (0, 2, 4)] == [0.8, 0.4, 0.2]
    assert [nn.InverseDecayLR(1.0, 1.0, 2, True)(s) for s in range(5)] == [1.0, 1.0, 0.5, 0.5, 1 / 3]
    assert nn.NaturalExpDecayLR(1.0, 1.0, 5)(1) == pytest.approx(0.36787944117)
    assert nn.NaturalExpDecayLR(1.0, 1.0, 5, True)(4) == 1.0
    assert [nn.CosineDecayLR(0.0, 1.0, 2)(s) for s in (0, 1, 2, 9)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert [nn.WarmUpLR(1.0, 4)(s) for s in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mindspore" / "schedules.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["schedule"] + str(list(case["arguments"].values())))
def test_row12_values_are_those_of_mindspore(case):
    """MindSpore computes in float32, and powers of e by a float32 base."""
    schedule = getattr(learning_rate_schedule, case["schedule"])(**case["arguments"])
    assert [schedule(step) for step in range(len(case["values"]))] == pytest.approx(case["values"], rel=2e-6, abs=1e-8)


def test_row12_the_golden_file_has_every_schedule():
    flags = {(case["schedule"], *[v for v in case["arguments"].values() if isinstance(v, bool)]) for case in GOLDEN["cases"]}
    stairs = itertools.product(
        ["ExponentialDecayLR", "NaturalExpDecayLR", "InverseDecayLR", "PolynomialDecayLR"], [False, True]
    )
    assert flags == {*stairs, ("CosineDecayLR",), ("WarmUpLR",)}
    assert all(len(case["values"]) == 13 for case in GOLDEN["cases"])


DECAY = {"learning_rate": 0.1, "decay_rate": 0.9, "decay_steps": 4, "is_stair": True}
GOOD: dict[type, dict[str, Any]] = {
    nn.PolynomialDecayLR: {
        "learning_rate": 0.1,
        "end_learning_rate": 0.01,
        "decay_steps": 4,
        "power": 0.5,
        "update_decay_steps": False,
    },
    nn.ExponentialDecayLR: DECAY,
    nn.NaturalExpDecayLR: DECAY,
    nn.InverseDecayLR: DECAY,
    nn.CosineDecayLR: {"min_lr": 0.01, "max_lr": 0.1, "decay_steps": 4},
    nn.WarmUpLR: {"learning_rate": 0.1, "warmup_steps": 4},
}
NAN, INF = float("nan"), float("inf")
COUNT = ([1.0, "4", True, None], [0, -1])
POSITIVE = ([1, "0.1", True, None, torch.tensor(0.1)], [0.0, -0.1, NAN, INF])
FROM_0 = ([1, 0, "0.1", True, None], [-0.1, NAN, INF])
FLAG: tuple[list[Any], list[Any]] = ([1, 0, None, "yes"], [])
# By argument: values of a wrong type, values out of range.
WRONG: dict[str, tuple[list[Any], list[Any]]] = {
    "learning_rate": POSITIVE,
    "end_learning_rate": FROM_0,
    "decay_rate": POSITIVE,
    "decay_steps": COUNT,
    "warmup_steps": COUNT,
    "power": POSITIVE,
    "min_lr": FROM_0,
    "max_lr": POSITIVE,
    "is_stair": FLAG,
    "update_decay_steps": FLAG,
}


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, name) for cls, arguments in GOOD.items() for name in arguments],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_row12_wrong_arguments(cls, name):
    cls(**GOOD[cls])
    for kind, values in zip((TypeError, ValueError), WRONG[name], strict=True):
        for value in values:
            if cls is nn.WarmUpLR and value == 0.0:
                continue  # allowed there
            least = {"learning_rate": "> 0", "max_lr": "> 0", "end_learning_rate": ">= 0"}.get(name, "")
            least = ">= 0" if cls is nn.WarmUpLR and name == "learning_rate" else least
            with pytest.raises(kind, match=f"^{name} must be .*{least}.*got") as error:
                cls(**{**GOOD[cls], name: value})
            assert repr(value) in str(error.value)


@pytest.mark.parametrize("max_lr", [0.01, 0.005])
def test_row12_max_lr_is_greater_than_min_lr(max_lr):
    with pytest.raises(ValueError, match=rf"max_lr must be greater than min_lr=0\.01, got {max_lr}"):
        nn.CosineDecayLR(0.01, max_lr, 4)


def test_row12_names_are_found_in_both_places():
    for name in learning_rate_schedule.__all__:
        assert getattr(nn, name) is getattr(learning_rate_schedule, name)


class TwoPhases(nn.LearningRateSchedule):
    """A user's schedule made of ours, as MindSpore's tutorials write them."""

    def __init__(self, warmup_steps: int) -> None:
        super().__init__()
        self.warmup_steps = warmup_steps
        self.warmup = nn.WarmUpLR(0.1, warmup_steps)
        self.decay = nn.PolynomialDecayLR(0.1, 0.0, 4, 1.0)

    def construct(self, global_step: int) -> float:
        if global_step < self.warmup_steps:
            return self.warmup(global_step)
        return self.decay(global_step - self.warmup_steps)


def test_row12_counts_of_other_integer_types():
    assert nn.WarmUpLR(0.1, np.int64(4))(2) == 0.05


def test_row12_users_schedules():
    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = nn.Lamb(params, TwoPhases(2))
    used = []
    for _ in range(7):
        params[0].grad = torch.ones(2)
        optimizer.step()
        used.append(round(optimizer.param_groups[0]["lr"], 6))
    assert used == [0.0, 0.05, 0.1, 0.075, 0.05, 0.025, 0.0]
    assert pickle.loads(pickle.dumps(optimizer)).global_step == 7
    with pytest.raises(NotImplementedError, match=r"must define construct\(global_step\)"):
        nn.LearningRateSchedule()(0)


def test_row12_schedules_show_their_arguments():
    assert repr(nn.WarmUpLR(0.1, 4)) == "WarmUpLR(learning_rate=0.1, warmup_steps=4)"
