"""Other optimizers' states as ours: runs of theirs, saved half-way by golden/make_states.py, go on as they did.

Those of Apex and DeepSpeed were not made with the real ones, which need a GPU, but laid out as their sources say.
"""

from __future__ import annotations

import copy
import types
import warnings

import numpy as np
import pytest
import torch
from foreign import RUNS, TOLERANCES, converted, go_on, io_of, largest_difference, mindspore_arrays, mindspore_net, saved
from torch import nn

import torchlamb
import torchlamb.mindspore
from torchlamb.convert import SOURCES, from_mindspore, lr_factor, to_adamw, to_lamb


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_as_it_did(name, dtype, record_property):
    run, note = saved(name), RUNS[name]
    difference = largest_difference(run, go_on(run, converted(run, note), "lr_factor" in (note or ""), dtype))
    record_property("largest relative difference", f"{difference:.1e}")
    assert difference <= (1e-6 if dtype is torch.float32 else TOLERANCES.get(name, 1e-13))


def test_a_wrong_step_count_would_be_seen():
    run = saved("timm")
    state_dict = converted(run)
    for entry in state_dict["state"].values():
        entry["step"] += 1
    assert largest_difference(run, go_on(run, state_dict, False, torch.float64)) > 1e-4


@pytest.mark.parametrize("name", RUNS)
def test_what_is_given_is_not_changed(name):
    run = saved(name)
    before = copy.deepcopy(run["state_dict"])
    state_dict = converted(run, RUNS[name])
    assert str(run["state_dict"]) == str(before)
    for group, theirs in zip(state_dict["param_groups"], before["param_groups"], strict=True):
        assert group["params"] == theirs["params"]
        assert group["initial_lr"] == theirs["initial_lr"] if "initial_lr" in theirs else True
    assert torch.load(io_of(state_dict), weights_only=True)


def change_timm(**changes):
    state_dict = saved("timm")["state_dict"]
    for group in state_dict["param_groups"]:
        group.update(changes)
    return state_dict


@pytest.mark.parametrize(
    ("source", "changes", "wanted"),
    [
        ("timm", {"always_adapt": True}, {"layer_adaptation": True}),
        ("timm", {"weight_decay": 0.0}, {"layer_adaptation": False, "weight_decay": 0.0}),
        ("timm", {"trust_clip": True}, {"trust_ratio_bounds": (0.0, 1.0)}),
        ("timm", {"max_grad_norm": None}, {"max_grad_norm": None}),
        ("timm", {"grad_averaging": False, "bias_correction": False}, {"grad_averaging": False, "bias_correction": False}),
        (
            "timm",
            {"lr": torch.tensor(0.5), "betas": [0.5, 0.25], "eps": 0.125},
            {"lr": 0.5, "betas": (0.5, 0.25), "eps": 0.125},
        ),
    ],
)
def test_options(source, changes, wanted):
    for group in to_lamb(change_timm(**changes), source)["param_groups"]:
        assert {name: group[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("source", "changes", "arguments", "note"),
    [
        ("timm", {"caution": True}, {}, "caution=True masks"),
        ("timm", {"decoupled_decay": True, "weight_decay": 0.1}, {}, "decoupled_decay=True decays outside"),
        ("apex", {}, {"adam_w_mode": False}, "adam_w_mode=False adds the decay to the gradient"),
        ("deepspeed", {"max_grad_norm": 1.0}, {}, "handed to its step"),
        ("deepspeed", {}, {"eps_inside_sqrt": True}, "sqrt\\(v \\+ eps\\)"),
        ("pytorch_optimizer", {"weight_decouple": True, "weight_decay": 0.1}, {}, "outside the update"),
        ("pytorch_optimizer", {"rectify": True}, {}, "rectify=True has no counterpart"),
        ("pytorch_optimizer", {}, {"pre_norm": True}, "pre_norm=True adds eps"),
        ("adam", {"weight_decay": 0.1}, {}, "in its moments"),
        ("adamw", {"weight_decay": 0.1}, {}, "outside the update"),
        ("adamw", {"amsgrad": True}, {}, "amsgrad"),
    ],
)
def test_what_cannot_be_carried_is_named(source, changes, arguments, note):
    state_dict = saved(source)["state_dict"]
    for group in state_dict["param_groups"]:
        group.update(changes)
    with pytest.warns(UserWarning, match=note):
        to_lamb(state_dict, source, arguments)


def test_arguments_that_state_dicts_do_not_hold():
    apex = saved("apex")["state_dict"]
    assert [g["layer_adaptation"] for g in to_lamb(apex, "apex")["param_groups"]] == [True, False]
    assert [g["layer_adaptation"] for g in to_lamb(apex, "apex", {"use_nvlamb": True})["param_groups"]] == [True, True]
    clamped = to_lamb(saved("torch_optimizer")["state_dict"], "torch_optimizer", {"clamp_value": 3, "adam": True})
    assert clamped["param_groups"][0]["phi_bounds"] == (0.0, 3.0)
    assert not clamped["param_groups"][0]["layer_adaptation"]
    with pytest.warns(UserWarning, match="eps"):
        groups = to_lamb(saved("pytorch_optimizer")["state_dict"], "pytorch_optimizer", {"pre_norm": True, "maximize": True})
    assert (groups["param_groups"][0]["max_grad_norm"], groups["param_groups"][0]["maximize"]) == (1.0, True)


def test_options_of_pytorch_optimizer():
    with pytest.warns(UserWarning, match="eps"):
        groups = to_lamb(saved("pytorch_optimizer")["state_dict"], "pytorch_optimizer")["param_groups"]
    for group in groups:
        assert group["phi_bounds"] == (0.0, 10.0)
        assert (group["bias_correction"], group["layer_adaptation"], group["max_grad_norm"]) == (False, True, None)


def test_one_max_grad_norm_for_all_groups():
    state_dict = saved("timm")["state_dict"]
    state_dict["param_groups"][1]["max_grad_norm"] = 2.0
    with pytest.warns(UserWarning, match="several max_grad_norm.*the first group's"):
        groups = to_lamb(state_dict, "timm")["param_groups"]
    assert [group["max_grad_norm"] for group in groups] == [1.0, 1.0]


def test_the_max_grad_norm_of_the_constructor():
    """By which timm and Apex clip, whatever their groups say."""
    run = saved("timm")
    groups = to_lamb(change_timm(max_grad_norm=2.0), "timm", {"max_grad_norm": 1.0})["param_groups"]
    assert [group["max_grad_norm"] for group in groups] == [1.0, 1.0]
    for argument in (None, float("inf")):
        groups = to_lamb(run["state_dict"], "timm", {"max_grad_norm": argument})["param_groups"]
        assert [group["max_grad_norm"] for group in groups] == [None, None]
    with pytest.raises(ValueError, match=r"max_grad_norm is 0\.0, by which gradients would be divided"):
        to_lamb(change_timm(max_grad_norm=0.0), "timm")


def test_a_clamp_value_of_0_is_adam():
    """All its norms are 0, and a ratio with a norm of 0 is 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = to_lamb(saved("torch_optimizer")["state_dict"], "torch_optimizer", {"clamp_value": 0})["param_groups"]
    assert all(group["layer_adaptation"] is False and group["phi_bounds"] is None for group in groups)


def test_masters():
    """DeepSpeed's wrapper has float32 parameters; Apex' state dicts have none, and they are made at the first step."""
    run = saved("deepspeed")
    fp32_groups = [[p.float() + 1 for p in run["params"][:2]], [p.float() + 1 for p in run["params"][2:]]]
    wrapped = {"optimizer_state_dict": run["state_dict"], "fp32_groups": fp32_groups, "cur_scale": 2.0}
    with pytest.warns(UserWarning, match="lr_factor"):
        state_dict = to_lamb(wrapped, "deepspeed")
    params = [nn.Parameter(p.half()) for p in run["params"]]
    optimizer = torchlamb.Lamb([{"params": params[:2]}, {"params": params[2:]}])
    optimizer.load_state_dict(state_dict)
    assert torch.equal(optimizer.state[params[1]]["master"], run["params"][1].float() + 1)
    mixed = to_lamb(saved("apex_mixed_precision")["state_dict"], "apex_mixed_precision")
    assert all(group["master_weights"] for group in mixed["param_groups"])
    wrapped["fp32_groups"] = fp32_groups[:1]
    with pytest.raises(ValueError, match="fp32_groups of state_dict has groups of"):
        to_lamb(wrapped, "deepspeed")


# What is refused


ALIKE = [{"adam", "adamw"}, {"apex", "apex_mixed_precision"}]  # whose state dicts cannot be told apart


@pytest.mark.parametrize(
    ("name", "source"),
    [(name, source) for name in SOURCES for source in SOURCES if name != source and {name, source} not in ALIKE],
)
def test_another_optimizers_state_dict_is_refused(name, source):
    with pytest.raises(ValueError, match=rf"param_groups\[0\] .* unlike one of .*'{name}'"):
        to_lamb(saved(name)["state_dict"], source)


def without(state_dict, *path):
    inner = state_dict
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return state_dict


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "must have 'state' and 'param_groups', got a NoneType"),
        (lambda d: {"model": d}, r"got a dict with \['model'\]"),
        (lambda d: without(d, "param_groups", 1, "step"), r"param_groups\[1\] of state_dict has no 'step'"),
        (lambda d: without(d, "param_groups", 0, "params"), r"param_groups\[0\] of state_dict has no 'params'"),
        (lambda d: without(d, "state", 1, "exp_avg_sq"), r"state\[1\] of state_dict has no 'exp_avg_sq'"),
        (
            lambda d: d["state"][0].update(exp_avg=torch.ones(2)) or d,
            r"of state\[0\] .* must be tensors of one shape, got \(2,\)",
        ),
        (lambda d: d["state"][0].update(exp_avg=3) or d, "must be tensors of one shape, got int"),
        (lambda d: {**d, "state": [1]}, "must be a dict and a list, got a list and a list"),
        (lambda d: {**d, "param_groups": 3}, "must be a dict and a list, got a dict and a int"),
        (lambda d: {**d, "param_groups": [3]}, r"param_groups\[0\] of state_dict must be a dict, got a int"),
        (lambda d: d["param_groups"][0].update(betas=0.9) or d, "betas of param_groups must be two numbers, got 0.9"),
        (lambda d: d["param_groups"][0].update(lr="fast") or d, "must each be one number, got 'fast'"),
        (lambda d: d["param_groups"][0].update(lr=torch.ones(2)) or d, "must each be one number, got tensor"),
        (lambda d: d["param_groups"][1].update(eps=-1.0) or d, r"param_groups\[1\] of timm.optim.Lamb has no counterpart.*eps"),
        (lambda _: {"state.fc.weight.exp_avg": 1}, "get it again without flatten_optimizer_state_dict"),
        (lambda _: torchlamb.Lamb([torch.ones(2)]).state_dict(), "is of torchlamb.Lamb already; load it as it is"),
    ],
)
def test_what_is_not_whole_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        to_lamb(make(saved("timm")["state_dict"]), "timm")


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match=r"source must be one of adam, .* got 'apx'"):
        to_lamb(saved("apex")["state_dict"], "apx")
    with pytest.raises(
        ValueError, match=r"arguments has 'nvlamb'; those of apex.optimizers.FusedLAMB .*: use_nvlamb, adam_w_mode"
    ):
        to_lamb(saved("apex")["state_dict"], "apex", {"nvlamb": True})
    with pytest.raises(ValueError, match="got 'timm'"):
        lr_factor("timm")


def test_before_the_first_step():
    fresh = torch.optim.AdamW([nn.Parameter(torch.ones(2))], weight_decay=0.0).state_dict()
    for state in ({}, {0: {}}):  # an optimizer's state is a defaultdict: looking at it makes an empty one
        with pytest.warns(UserWarning, match="tune it again"):
            state_dict = to_lamb({**fresh, "state": state}, "adamw")
        optimizer = torchlamb.Lamb([nn.Parameter(torch.ones(2))])
        optimizer.load_state_dict(state_dict)
        assert not optimizer.state
        with pytest.warns(UserWarning, match="tune lr"):
            assert not to_adamw({**optimizer.state_dict(), "state": state})["state"]


# Back to AdamW


@pytest.mark.parametrize("grad_averaging", [True, False])
def test_back_to_adamw(grad_averaging):
    """Without adaptation and decay both compute the same, and so go on the same."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(3, 2, dtype=torch.float64)), nn.Parameter(torch.randn(4, dtype=torch.float64))]
    options = {"layer_adaptation": False, "grad_averaging": grad_averaging}
    optimizer = torchlamb.Lamb(ours, lr=0.01, eps=1e-8, **options)
    grads = [[torch.randn_like(p) for p in ours] for _ in range(6)]
    for step in grads[:3]:
        for p, grad in zip(ours, step, strict=True):
            p.grad = grad
        optimizer.step()
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    adamw = torch.optim.AdamW(theirs)
    with pytest.warns(UserWarning, match="to torch.optim.AdamW: .*tune lr and weight_decay again$"):
        adamw.load_state_dict(to_adamw(copy.deepcopy(optimizer.state_dict())))
    assert adamw.param_groups[0]["lr"] == 0.01
    assert adamw.param_groups[0].keys() == torch.optim.AdamW(theirs).param_groups[0].keys()
    assert torch.allclose(
        adamw.state[theirs[0]]["exp_avg"], optimizer.state[ours[0]]["exp_avg"] * (1 if grad_averaging else 0.1)
    )
    if grad_averaging:
        for step in grads[3:]:
            for params, stepped in ((ours, optimizer), (theirs, adamw)):
                for p, grad in zip(params, step, strict=True):
                    p.grad = grad
                stepped.step()
        assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(ours, theirs, strict=True))


def test_there_and_back():
    run = saved("adamw")
    params = [nn.Parameter(p.clone()) for p in run["params"]]
    optimizer = torchlamb.Lamb([{"params": params[:2]}, {"params": params[2:]}])
    optimizer.load_state_dict(converted(run, "tune it again"))
    with pytest.warns(UserWarning, match="tune lr and weight_decay again"):
        again = to_adamw(optimizer.state_dict())
    for key, entry in run["state_dict"]["state"].items():
        assert all(torch.equal(again["state"][key][name], value) for name, value in entry.items())
    for group, theirs in zip(again["param_groups"], run["state_dict"]["param_groups"], strict=True):
        assert group == theirs


def test_what_adamw_has_not_is_named():
    param = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = torchlamb.Lamb([param], master_weights=True, max_grad_norm=1.0, phi_bounds=(0, 10), bias_correction=False)
    optimizer.step()
    with pytest.warns(UserWarning, match=r"always corrects.*phi_bounds has no.*max_grad_norm has no.*no masters"):
        torch.optim.AdamW([param]).load_state_dict(to_adamw(optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"unlike one of torchlamb.Lamb"):
        to_adamw(saved("timm")["state_dict"])


@pytest.mark.parametrize("front", [False, True])
def test_mindspore(front):
    """With the front, names are MindSpore's: gamma and beta."""
    arrays, net = mindspore_arrays(), mindspore_net()
    if front:
        optimizer = torchlamb.mindspore.nn.Lamb(torchlamb.mindspore.nn.trainable_params(net), learning_rate=0.5)
    else:
        rename = {"norm.weight": "norm.gamma", "norm.bias": "norm.beta"}
        pairs = [(rename.get(name, name), p) for name, p in net.named_parameters()]
        optimizer = torchlamb.Lamb([{"params": pairs[2:], "lr": 0.25}, {"params": pairs[:2]}], lr=0.5)
    with pytest.warns(UserWarning, match=r"clips the ratio to \[0, 10\]") as notes:
        state_dict = from_mindspore(arrays, optimizer.state_dict())
    assert notes[0].filename == __file__
    optimizer.load_state_dict(state_dict)
    for p, name in ((net.fc.weight, "fc.weight"), (net.norm.weight, "norm.gamma"), (net.norm.bias, "norm.beta")):
        assert np.array_equal(optimizer.state[p]["exp_avg"], arrays[f"lamb_m.{name}"])
        assert np.array_equal(optimizer.state[p]["exp_avg_sq"], arrays[f"lamb_v.{name}"])
        assert optimizer.state[p]["step"] == 7
    if front:
        assert optimizer.global_step == 7
    else:
        assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]


def test_mindspore_alone():
    arrays = mindspore_arrays()
    with pytest.warns(UserWarning, match="betas, eps, weight decay and groups"):
        state_dict = from_mindspore(arrays)
    (group,) = state_dict["param_groups"]
    assert group["param_names"] == ["fc.weight", "fc.bias", "norm.gamma", "norm.beta"]
    assert group["lr"] == pytest.approx(0.1)
    net = mindspore_net()
    with pytest.warns(UserWarning, match="parameter 2 of group 0 is 'norm.weight' here and 'norm.gamma'"):
        torchlamb.Lamb(net.named_parameters()).load_state_dict(state_dict)
    arrays["learning_rate"] = np.arange(20, dtype=np.float32)  # a list: the value of the step that comes next
    with pytest.warns(UserWarning, match="betas"):
        assert from_mindspore(arrays)["param_groups"][0]["lr"] == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("global_step"), "has no 'global_step'"),
        (lambda a: [a.pop(name) for name in list(a) if name.startswith("lamb_m.")], "nothing that begins with 'lamb_m.'"),
        (lambda a: a.pop("lamb_v.fc.bias"), "no 'lamb_v.fc.bias'"),
        (lambda a: a.update({"lamb_v.fc.bias": np.ones(7)}), r"'fc.bias' have the shapes \(4,\) and \(7,\)"),
        (lambda a: a.pop("learning_rate"), "no 'learning_rate', because it was a schedule"),
    ],
)
def test_mindspore_arrays_that_are_not_whole(change, message):
    arrays = mindspore_arrays()
    change(arrays)
    with pytest.raises(ValueError, match=message):
        from_mindspore(arrays)


def test_mindspore_arrays_of_bf16_and_read_only_ones():
    arrays, wide = mindspore_arrays(), mindspore_arrays()["lamb_m.fc.bias"]
    arrays["lamb_v.fc.bias"].setflags(write=False)
    arrays["lamb_m.fc.bias"] = types.SimpleNamespace(dtype="bfloat16", astype=wide.astype)  # as ml_dtypes' arrays are
    with pytest.warns(UserWarning, match="betas"):
        state_dict = from_mindspore(arrays)
    state = state_dict["state"][state_dict["param_groups"][0]["param_names"].index("fc.bias")]
    assert np.array_equal(state["exp_avg"], wide)
    state["exp_avg_sq"].zero_()
    assert arrays["lamb_v.fc.bias"].any()
    arrays["lamb_m.fc.bias"] = np.array(["a", "b"])
    with pytest.raises(ValueError, match="arrays has one of dtype <U1; make it float32 first"):
        from_mindspore(arrays)


def test_mindspore_like_another_model():
    unnamed = torchlamb.Lamb(mindspore_net().parameters())
    with pytest.raises(ValueError, match="like has no 'param_names'"):
        from_mindspore(mindspore_arrays(), unnamed.state_dict())
    fewer = torchlamb.Lamb([("fc.weight", nn.Parameter(torch.ones(4, 3)))])
    with pytest.raises(ValueError, match=r"moments of 'fc.bias', which is no parameter of like"):
        from_mindspore(mindspore_arrays(), fewer.state_dict())
    other = torchlamb.Lamb([("fc2.weight", nn.Parameter(torch.ones(4, 3)))])
    with pytest.raises(ValueError, match=r"no 'lamb_m.fc2.weight'"):
        from_mindspore(mindspore_arrays(), other.state_dict())
