"""`torchlamb.mindspore.nn.Lamb`. Test names give the row of the specification's checklist that they hold (row15: platforms)."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEFAULTS
from front_cases import (
    SHAPES,
    Ramp,
    assert_follows_reference,
    assert_unchanged,
    make_grads,
    make_params,
    run,
    set_grads,
    snapshot,
)
from torch import Tensor

import torchlamb
from torchlamb.backends import foreach, gpu, resolve
from torchlamb.mindspore import nn

# Row 1: the constructor


def test_row01_arguments_are_those_of_the_document():
    parameters = list(inspect.signature(nn.Lamb).parameters.values())
    required, optional = parameters[:2], parameters[2:-1]
    assert [p.name for p in required] == ["params", "learning_rate"]
    assert all(p.default is p.empty for p in required)
    assert {p.name: p.default for p in optional} == {"beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.0}
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in required + optional)


def test_row01_follows_the_float64_reference():
    params = make_params()
    optimizer = nn.Lamb(params, 0.1, 0.8, 0.95, 1e-3, 0.1)
    common = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    options = [{**common, "weight_decay": 0.0} if name.startswith("norm") else common for name in SHAPES]
    assert_follows_reference(optimizer, params, options, [[0.1] * len(params)] * 5)


@pytest.mark.parametrize(
    "further",
    [
        {"foreach": True},
        {"foreach": False},
        {"capturable": True},
        {"max_grad_norm": 0.5},
        {"skip_nonfinite": True},
        {"trust_ratio_bounds": (0.0, 10.0)},
        {"maximize": True, "bias_correction": False},
        {"grad_centralization": True},
    ],
    ids=str,
)
def test_row01_further_keywords_are_those_of_torchlamb(further):
    params = make_params()
    optimizer = nn.Lamb(params, 0.1, **further)
    assert all(group[name] == value for group in optimizer.param_groups for name, value in further.items())
    assert_follows_reference(optimizer, params, [further] * len(params), [[0.1] * len(params)] * 3)


@pytest.mark.parametrize(
    ("further", "error"), [({"lr": 0.1}, "lr"), ({"betas": (0.9, 0.9)}, "betas"), ({"beta3": 0.1}, "beta3")]
)
def test_row01_other_keywords_are_refused(further, error):
    with pytest.raises(TypeError, match=error):
        nn.Lamb(make_params(), 0.1, **further)


def test_row01_group_keys_are_the_frozen_ones():
    assert nn.Lamb(make_params(), Ramp(0.1)).param_groups[0].keys() == {*DEFAULTS, "params", "param_names"}


# Row 2: parameters


@pytest.mark.parametrize("form", ["named", "pairs", "bare", "generator", "tuple"])
def test_row02_forms_of_parameters(form):
    named = make_params()
    given: Any = {
        "named": named,
        "pairs": [tuple(x) for x in named],
        "bare": [p for _, p in named],
        "generator": (x for x in named),
        "tuple": tuple(named),
    }[form]
    optimizer = nn.Lamb(given, 0.1)
    assert all(x.parameter is p for x, (_, p) in zip(optimizer.parameters, named, strict=True))
    names = [f"parameters[{i}]" for i in range(len(named))] if form == "bare" else list(SHAPES)
    assert [x.name for x in optimizer.parameters] == names
    run(optimizer, named, 1)
    assert all(len(state) == 3 for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("params", "kind", "words"),
    [
        (None, ValueError, "params must be a list of parameters or of dicts, got None"),
        ([], ValueError, "empty"),
        ((), ValueError, "empty"),
        (3, TypeError, "params"),
        ("weights", TypeError, "params must be a list of parameters or of dicts"),
        (torch.ones(2), TypeError, "params"),
        (torch.nn.Linear(2, 2), TypeError, "params must be a list of parameters or of dicts"),
        (torch.nn.Sequential(torch.nn.Linear(2, 2)), TypeError, r"params\[0\] must be a parameter"),
        ([("w",)], TypeError, r"params\[0\] must be a parameter"),
        ([("w", torch.ones(2), 3)], TypeError, r"params\[0\] must be a parameter"),
        ([(3, torch.ones(2))], TypeError, r"params\[0\] must be a parameter"),
        ({"params": [torch.ones(2)]}, TypeError, "params must be a list of parameters or of dicts"),
        ([torch.ones(2), {"params": [torch.ones(2)]}], TypeError, r"params\[0\] must be a dict, as others are, got Tensor"),
        ([{"params": [torch.ones(2)]}, torch.ones(2)], TypeError, r"params\[1\]"),
        ([torch.ones(2), 3], TypeError, r"params\[1\] must be a parameter.* or a dict, got 3"),
        ([("w", 3)], TypeError, r"params\[0\]"),
        ([("w", torch.ones(2)), torch.ones(2)], TypeError, r"params\[1\].*name all or none"),
        ([{"params": None}], ValueError, "group 0 params"),
        ([{"params": []}], ValueError, "group 0 params.*empty"),
        ([{"params": torch.ones(2)}], TypeError, "group 0 params"),
        ([{"params": ["w"]}], TypeError, r"group 0 params\[0\]"),
    ],
    ids=lambda x: "" if not isinstance(x, str) else x[:24],
)
def test_row02_wrong_parameters(params, kind, words):
    with pytest.raises(kind, match=words):
        nn.Lamb(params, 0.1)


@pytest.mark.parametrize("grouped", [False, True])
def test_row02_duplicates_are_named(grouped):
    params = make_params()
    if not grouped:
        renamed = [("w", params[0].parameter), ("x.gamma", params[1].parameter), ("v", params[1].parameter)]
        with pytest.raises(RuntimeError, match=r"'v' is given twice, first as 'x\.gamma'"):
            nn.Lamb(renamed, 0.1)
        with pytest.raises(RuntimeError, match=r"'params\[2\]' is given twice, first as 'params\[1\]'"):
            nn.Lamb([params[0].parameter, params[1].parameter, params[1].parameter], 0.1)
    given: Any = [{"params": params}, {"params": params[1:2]}] if grouped else [*params, params[1]]
    with pytest.raises(RuntimeError, match=r"'fc\.weight' is given twice"):
        nn.Lamb(given, 0.1)


# Rows 3, 4: groups


@pytest.mark.parametrize("key", ["learning_rate", "betas", "max_grad_norm", "Params"])
def test_row03_another_key_is_refused_with_the_five(key):
    with pytest.raises(KeyError) as error:
        nn.Lamb([{"params": make_params(), key: 0.1}], 0.1)
    for name in (key, "params", "lr", "weight_decay", "grad_centralization", "order_params"):
        assert repr(name) in str(error.value.args[0])


def test_row03_the_first_wrong_key_is_named():
    with pytest.raises(KeyError, match="has the key 'betas'"):
        nn.Lamb([{"params": make_params(), "betas": 1, "eps": 2}], 0.1)


def test_row03_parameters_without_names_are_called_by_position():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    assert [x.name for x in nn.Lamb([{"params": [p]}, {"params": [q]}], 0.1).parameters] == ["parameters[0]", "parameters[1]"]
    with pytest.raises(RuntimeError, match=r"'group 1 params\[0\]' is given twice, first as 'parameters\[1\]'"):
        nn.Lamb([{"params": [p, q]}, {"params": [q]}], 0.1)


def test_row03_params_are_required():
    with pytest.raises(KeyError, match="group 0 has no 'params'"):
        nn.Lamb([{"lr": 0.1}], 0.1)


@pytest.mark.parametrize("permutation", [(4, 2, 0, 1, 3), (1, 0, 3, 2, 4)])
@pytest.mark.parametrize("form", ["named", "bare", "generator"])
def test_row03_order_params_orders_parameters_gradients_and_results(permutation, form):
    params, twins = make_params(), make_params()
    order = [params[i] for i in permutation]
    given: Any = {"named": order, "bare": [p for _, p in order], "generator": (x for x in order)}[form]
    optimizer = nn.Lamb([{"params": params[:2], "lr": 0.2}, {"order_params": given}, {"params": params[2:]}], 0.1)
    assert [x.name for x in optimizer.parameters] == [x.name for x in order]
    assert all(x.parameter is y.parameter for x, y in zip(optimizer.parameters, order, strict=True))
    twin = torchlamb.Lamb([{"params": [p for _, p in twins[:2]], "lr": 0.2}, {"params": [p for _, p in twins[2:]]}], 0.1)
    run(twin, twins, 1)
    results = optimizer([make_grads(params, 0)[i] for i in permutation])
    assert results == (True,) * len(params)
    assert all(torch.equal(x.parameter, y.parameter) for x, y in zip(params, twins, strict=True))


def test_row03_without_order_params_the_order_is_that_given():
    params = make_params()
    assert list(nn.Lamb(params, 0.1, weight_decay=0.1).parameters) == params
    shuffled = [params[i] for i in (3, 0, 4, 1, 2)]  # gamma and beta are a group of their own inside
    assert list(nn.Lamb(shuffled, 0.1, weight_decay=0.1).parameters) == shuffled
    assert list(nn.Lamb([{"params": params[3:]}, {"params": params[:3]}], 0.1).parameters) == params[3:] + params[:3]


def test_row03_wrong_order_params():
    params = make_params()
    group = {"params": params}
    for order, kind, words in [
        ({"order_params": params, "lr": 0.1}, ValueError, "'order_params' beside other keys"),
        ({"order_params": params, "params": params}, ValueError, "'order_params' beside other keys"),
        ({"order_params": 3}, TypeError, "order_params"),
        ({"order_params": None}, TypeError, "order_params"),
        ({"order_params": [3]}, TypeError, r"order_params\[0\]"),
        ({"order_params": []}, ValueError, "order_params.*empty"),
        ({"order_params": params[:-1]}, ValueError, r"order_params lacks 'norm\.beta'"),
        ({"order_params": params[:-2]}, ValueError, r"order_params lacks 'norm\.gamma'"),
        ({"order_params": [*params, params[0]]}, ValueError, "twice"),
        ({"order_params": [*params[:-1], torch.ones(2)]}, ValueError, r"order_params\[4\] is in no group"),
    ]:
        with pytest.raises(kind, match=words):
            nn.Lamb([group, order], 0.1)
    with pytest.raises(ValueError, match="given twice"):
        nn.Lamb([group, {"order_params": params}, {"order_params": params}], 0.1)
    with pytest.raises(ValueError, match="no group with 'params'"):
        nn.Lamb([{"order_params": params}], 0.1)


def test_row04_missing_values_come_from_the_optimizer():
    params = make_params()
    groups = [
        {"params": params[:1], "weight_decay": 0.01, "grad_centralization": True},
        {"params": params[1:2], "lr": Ramp(0.05)},
        {"params": params[2:]},
    ]
    kept = copy.deepcopy(groups)
    optimizer = nn.Lamb(groups, [0.3, 0.2, 0.1], weight_decay=0.1)
    assert [group.keys() for group in groups] == [group.keys() for group in kept]  # the caller's dicts stay as they were
    options = [{"weight_decay": 0.01, "grad_centralization": True}] + [{"weight_decay": 0.1}] * 4
    lrs = [[0.3, 0.05, 0.3, 0.3, 0.3], [0.2, 0.1, 0.2, 0.2, 0.2], [0.1, 0.05 * 3, 0.1, 0.1, 0.1]]
    lrs = [[float(torch.tensor(0.05) * (s + 1)) if i == 1 else lr for i, lr in enumerate(row)] for s, row in enumerate(lrs)]
    assert_follows_reference(optimizer, params, options, lrs)


@pytest.mark.parametrize("value", [1, 0, None, "yes", 1.0])
def test_row04_grad_centralization_is_a_bool(value):
    with pytest.raises(TypeError, match="group 0 grad_centralization"):
        nn.Lamb([{"params": make_params(), "grad_centralization": value}], 0.1)


# Rows 5, 6: centralization, decay by name


@pytest.mark.parametrize("channels", [3, 16])  # the original skips what 16 does not divide
def test_row05_only_convolutions_are_centralized(channels):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, channels, 3, 3), (4, channels, 3), (4, 16), (16,)]
    params = [nn.NamedParameter(str(shape), torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    for _, p in params:
        p.requires_grad_()
    optimizer = nn.Lamb([{"params": params, "grad_centralization": True}], 0.1)
    options = [{"grad_centralization": len(shape) >= 3} for shape in shapes]
    assert_follows_reference(optimizer, params, options, [[0.1] * 4] * 3)


class AllNorms(torch.nn.Module):
    """Every kind of normalisation layer that torch has, one of a stranger's, and layers that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.batch = torch.nn.BatchNorm2d(4)
        self.sync = torch.nn.SyncBatchNorm(4)
        self.layer = torch.nn.LayerNorm((4, 4))  # the weight has two dims
        self.group = torch.nn.GroupNorm(2, 4)
        self.instance = torch.nn.InstanceNorm2d(4, affine=True)
        self.rms = torch.nn.RMSNorm(4)
        self.bare = torch.nn.LayerNorm(4, elementwise_affine=False)
        self.own = self.OwnNorm()
        self.fc = torch.nn.Linear(4, 4)

    class OwnNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))


NORM_NAMES = ["batch.gamma", "batch.beta", "sync.gamma", "sync.beta", "layer.gamma", "layer.beta", "group.gamma", "group.beta"]
NORM_NAMES += ["instance.gamma", "instance.beta", "rms.gamma", "own.gamma"]


def test_row06_normalisation_layers_do_not_decay():
    model = AllNorms()
    optimizer = nn.Lamb(nn.trainable_params(model), 0.1, weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert [name for name in decay if decay[name] == 0.0] == NORM_NAMES
    assert {name for name in decay if decay[name] == 0.1} == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}


def test_row06_the_rule_is_a_substring_of_the_name():
    named = [(name, torch.nn.Parameter(torch.ones(2))) for name in ("alphabeta.weight", "GAMMA", "x.gamma_2", "weight")]
    groups = nn.Lamb(named, 0.1, weight_decay=0.1).param_groups
    assert [(g["weight_decay"], g["param_names"]) for g in groups] == [
        (0.1, ["GAMMA", "weight"]),
        (0.0, ["alphabeta.weight", "x.gamma_2"]),
    ]


def test_row06_the_decay_of_a_group_applies_to_all_of_it():
    params = make_params()
    optimizer = nn.Lamb([{"params": params[:3], "weight_decay": 0.2}, {"params": params[3:]}], 0.1, weight_decay=0.1)
    options = [{"weight_decay": 0.2}] * 3 + [{"weight_decay": 0.1}] * 2
    assert_follows_reference(optimizer, params, options, [[0.1] * 5] * 3)


# Row 8: ranges

WRONG_NUMBERS: list[tuple[str, Any, type[Exception]]] = [
    *[(name, value, TypeError) for name in ("beta1", "beta2", "eps") for value in (1, 0, True, "0.9", None, torch.tensor(0.9))],
    *[(name, value, ValueError) for name in ("beta1", "beta2") for value in (0.0, 1.0, -0.1, 1.1, float("nan"))],
    *[("eps", value, ValueError) for value in (0.0, -1e-6, float("nan"), float("inf"))],
    *[("weight_decay", value, TypeError) for value in (True, "0.1", None, torch.tensor(0.1), [0.1])],
    *[("weight_decay", value, ValueError) for value in (-0.1, -1, float("nan"), float("inf"))],
]


@pytest.mark.parametrize(("name", "value", "kind"), WRONG_NUMBERS, ids=repr)
def test_row08_wrong_numbers(name, value, kind):
    params = make_params()
    before = [p.detach().clone() for _, p in params]
    with pytest.raises(kind, match=f"{name} must be a finite (float|number).*got") as error:
        nn.Lamb(params, 0.1, **{name: value})
    assert repr(value) in str(error.value)
    if name == "weight_decay":
        with pytest.raises(kind, match="group 0 weight_decay"):
            nn.Lamb([{"params": params, name: value}], 0.1)
    assert all(torch.equal(p, old) for (_, p), old in zip(params, before, strict=True))


def test_row08_numbers_no_float_can_hold():
    with pytest.raises(ValueError, match="weight_decay must be a finite number"):
        nn.Lamb(make_params(), 0.1, weight_decay=10**400)


def test_row08_the_message_has_limits_value_and_name():
    with pytest.raises(ValueError, match=r"^beta1 must be a finite float > 0 and < 1, got 2\.0$"):
        nn.Lamb(make_params(), 0.1, beta1=2.0)


@pytest.mark.parametrize("value", [1, torch.tensor(1), np.float32(0.5), np.int64(1), [1, 2], np.array([1, 2])])
def test_row07_numbers_are_converted_to_float(value):
    params = make_params()
    optimizer = nn.Lamb(params, value)
    for step in range(2):
        run(optimizer, params, range(step, step + 1))
        assert {type(group["lr"]) for group in optimizer.param_groups} == {float}


def test_row08_limits_that_are_allowed():
    optimizer = nn.Lamb(make_params(), 0, beta1=1e-9, beta2=1 - 1e-9, eps=1e-30, weight_decay=1)
    assert optimizer.param_groups[0]["weight_decay"] == 1.0
    assert isinstance(optimizer.param_groups[0]["lr"], float)


# Row 9: gradients in, bools out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("further", [{"foreach": False}, {"foreach": True}, {"max_grad_norm": 0.5}], ids=str)
def test_row09_calling_equals_step(dtype, further):
    params, twins = make_params(dtype), make_params(dtype)
    called, stepped = (
        nn.Lamb(params, Ramp(0.1), weight_decay=0.1, **further),
        nn.Lamb(twins, Ramp(0.1), weight_decay=0.1, **further),
    )
    for step in range(3):
        assert called(tuple(make_grads(params, step))) == (True,) * 5
        run(stepped, twins, range(step, step + 1))
    assert all(torch.equal(x.parameter, y.parameter) for x, y in zip(params, twins, strict=True))
    assert called.global_step == stepped.global_step == 3
    assert all(p.grad is None for _, p in params)


def test_row09_grad_is_neither_used_nor_changed():
    params, twins = make_params(), make_params()
    set_grads(params, 7)
    kept = [p.grad for _, p in params]
    values = [grad.clone() for grad in kept]
    nn.Lamb(params, 0.1)(iter(make_grads(params, 0)))
    run(nn.Lamb(twins, 0.1), twins, 1)
    assert all(torch.equal(x.parameter, y.parameter) for x, y in zip(params, twins, strict=True))
    assert all(p.grad is grad and torch.equal(grad, value) for (_, p), grad, value in zip(params, kept, values, strict=True))


def test_row09_none_is_no_gradient():
    params, twins = make_params(), make_params()
    grads = make_grads(params, 0)
    assert nn.Lamb(params, 0.1)([None, *grads[1:]]) == (True,) * 5
    set_grads(twins, 0)
    twins[0].parameter.grad = None
    nn.Lamb(twins, 0.1).step()
    assert all(torch.equal(x.parameter, y.parameter) for x, y in zip(params, twins, strict=True))


WRONG_GRADIENTS: list[tuple[str, Any, type[Exception], str]] = [
    ("too few", lambda grads: grads[:-1], ValueError, r"5 tensors.*got 4; the first without one is 'norm\.beta'"),
    ("too many", lambda grads: [*grads, grads[0]], ValueError, "5 tensors.*got 6"),
    ("none", lambda _: (), ValueError, "5 tensors.*got 0"),
    ("one tensor", lambda grads: grads[0], TypeError, "gradients must be a tuple"),
    ("mapping", lambda grads: dict.fromkeys(grads, 1), TypeError, "gradients must be a tuple"),
    ("string", lambda _: "abc", TypeError, "gradients must be a tuple"),
    ("no iterable", lambda _: 3, TypeError, "gradients must be a tuple"),
    (
        "shape",
        lambda grads: [grads[0], grads[1].t(), *grads[2:]],
        ValueError,
        r"gradients\[1\].*'fc\.weight'.*\(5, 4\).*\(4, 5\)",
    ),
    ("dtype", lambda grads: [*grads[:4], grads[4].float()], TypeError, r"gradients\[4\].*'norm\.beta'.*float64.*float32"),
    ("device", lambda grads: [*grads[:4], grads[4].to("meta")], ValueError, r"gradients\[4\].*'norm\.beta'.*cpu.*meta"),
    ("element", lambda grads: [*grads[:4], 0.0], TypeError, r"gradients\[4\].*'norm\.beta'"),
    ("sparse", lambda grads: [*grads[:4], grads[4].to_sparse()], RuntimeError, "sparse"),
]


@pytest.mark.parametrize(
    ("make", "kind", "words"), [case[1:] for case in WRONG_GRADIENTS], ids=[case[0] for case in WRONG_GRADIENTS]
)
def test_row09_wrong_gradients_change_nothing(make, kind, words):
    params = make_params()
    optimizer = nn.Lamb(params, Ramp(0.1))
    run(optimizer, params, 2)
    before = snapshot(optimizer)
    with pytest.raises(kind, match=words):
        optimizer(make(make_grads(params, 2)))
    assert_unchanged(optimizer, before)


# Row 11: names


def test_row11_trainable_params_of_any_module():
    model = AllNorms()
    model.fc.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    entries = nn.trainable_params(model)
    wanted = [p for p in model.parameters() if p.requires_grad]
    assert all(x.parameter is p for x, p in zip(entries, wanted, strict=True))
    assert [x.name for x in entries] == ["conv.weight", "conv.bias", *NORM_NAMES, "fc.bias"]
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}


def test_row11_recurse_and_tied_parameters():
    model = torch.nn.Module()
    model.own = torch.nn.Parameter(torch.ones(2))
    model.a, model.b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    model.b.weight = model.a.weight
    assert [x.name for x in nn.trainable_params(model)] == ["own", "a.weight", "a.bias", "b.bias"]
    assert [x.name for x in nn.trainable_params(model, recurse=False)] == ["own"]
    assert nn.trainable_params(model, 0.01) == nn.trainable_params(model)  # as the document's example calls it
    assert [x.name for x in nn.trainable_params(torch.nn.BatchNorm1d(2), recurse=False)] == ["gamma", "beta"]
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        nn.trainable_params([model])


class Constructed(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)

    def construct(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.fc(x) * scale


class Forwarded(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.fc(x) * scale


@pytest.mark.parametrize("cls", [Constructed, Forwarded])
def test_row11_construct_is_another_name_for_forward(cls):
    cell, x = cls(), torch.ones(4, 3)
    wanted = cell.fc(x) * 2
    assert isinstance(cell, torch.nn.Module)
    for call in (cell, cell.forward, cell.construct):
        assert torch.equal(call(x, scale=2.0), wanted)
    assert list(cell.state_dict()) == ["fc.weight", "fc.bias"]
    assert cell.trainable_params() == nn.trainable_params(cell)
    assert cell.trainable_params(False) == []


def test_row11_a_cell_may_inherit_from_another():
    class First(nn.Cell):
        def construct(self, x: int) -> int:
            return x + 1

    class Second(First):
        def forward(self, x: int) -> int:
            return 10 * super().construct(x)

    class Third(Second):
        def construct(self, x: int) -> int:
            return 100 * super().forward(x)

    class Both(First):
        def construct(self, x: int) -> int:
            return -self.forward(x)

        def forward(self, x: int) -> int:
            return x

    for cls, wanted in ((First, 2), (Second, 20), (Third, 2000)):
        assert (cls()(1), cls().forward(1), cls().construct(1)) == (wanted,) * 3
    assert (Both()(1), Both().construct(1)) == (1, -1)


def test_row11_a_cell_with_neither_says_so():
    for call in (nn.Cell(), nn.Cell().construct):
        with pytest.raises(NotImplementedError, match="Cell must define construct or forward"):
            call(1)


# Row 15: platforms


def test_row15_other_devices_have_backends_of_their_own():
    optimizer = nn.Lamb(make_params(), 0.1)
    kernels = gpu if importlib.util.find_spec("triton") else foreach
    for device, backend in (("cuda", kernels), ("xpu", kernels), ("mps", foreach)):
        assert resolve(optimizer.param_groups[0], torch.device(device), [torch.float32], small=False)[0] is backend
    assert "cpu: foreach" in repr(nn.Lamb(make_params(), 0.1, fused=False))
