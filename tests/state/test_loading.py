"""What is loaded: always what this optimizer saved, whatever stands in it; of others what fits, with what it means here."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import torchlamb
from torchlamb.convert import to_lamb


def make(dtype: torch.dtype = torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)).to(dtype)
    return model, torchlamb.Lamb(model.named_parameters(), **{"lr": 0.1, **options})


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert type(value) is type(b[key]), key
        assert (
            torch.equal(value, b[key]) and value.dtype == b[key].dtype if isinstance(value, torch.Tensor) else value == b[key]
        )


# What a scheduler, a wrapper or a user may write


WRITTEN = {
    "negative lr": {"lr": -1e-3},
    "lr of rounding": {"lr": -3e-18},
    "numpy": {"lr": np.float64(0.1), "betas": (np.float32(0.5), np.float64(0.9)), "eps": np.float64(1e-6)},
    "tensor lr": {"lr": torch.tensor([0.1])},
    "further keys": {"initial_lr": np.float32(0.5), "name": "decoder", "lr_scale": 0.5, "nested": {"a": [np.int64(1)]}},
    "NaN": {"lr": float("nan")},
    "strings": {"weight_decay": "0.1"},
    "other kinds": {"eps": None, "maximize": "yes", "blocks": 1.5},
    "out of range": {"betas": (1.5, 2.0), "weight_decay": -1.0, "blocks": 0, "max_grad_norm": -1.0},
    "blocks that do not divide": {"blocks": 7},
    "fused": {"fused": True},
    "contradiction": {"foreach": True, "fused": True},
    "two ways to round": {"master_weights": True, "stochastic_rounding": True},
    "strange storage": {"state_dtype": torch.float16},
    "no dtype": {"state_dtype": "bf16"},
    "differentiable": {"differentiable": True},
    "capturable": {"capturable": True},
}


@pytest.mark.parametrize("how", ["deepcopy", "file", "itself"])
@pytest.mark.parametrize("what", WRITTEN)
def test_an_optimizer_loads_what_it_saved(what, how):
    """Whatever was written to its groups; what cannot be stepped with is said by the next step."""
    model, optimizer = make()
    train(model, optimizer, range(2))
    optimizer.param_groups[0].update(WRITTEN[what])
    saved = optimizer.state_dict()
    if how == "file" and what != "other kinds":
        saved = through_a_file(saved)
    saved = copy.deepcopy(saved) if how == "deepcopy" else saved
    other, resumed = (model, optimizer) if how == "itself" else make()
    resumed.load_state_dict(saved)
    assert all(state["step"].item() == 2 for state in resumed.state.values())
    given = {name: value for name, value in WRITTEN[what].items() if name not in ("fused", "foreach", "differentiable")}
    for name, value in given.items() if how != "itself" else ():
        got = resumed.param_groups[0][name]
        assert str(got) == str(value) or got == value or torch.equal(got, value), name
    with warnings.catch_warnings():
        before = [p.detach().clone() for p in other.parameters()]
        try:
            train(other, resumed, range(2, 3))
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))
            resumed.param_groups[0].update({**torchlamb.Lamb(other.parameters(), lr=0.1).defaults})
    train(other, resumed, range(3, 5))
    assert all(p.isfinite().all() for p in other.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_others_keep_in_the_state_passes_through(dtype):
    """As timm's Lookahead, which keeps a buffer beside the moments, and a wrapper that keeps something under its own key."""
    model, optimizer = make(dtype)
    fresh = copy.deepcopy(optimizer.state_dict())
    for p in model.parameters():  # before the first step, as Lookahead may
        optimizer.state[p]["lookahead_slow_buff"] = p.detach().clone()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(optimizer.state[model[0].weight]["lookahead_slow_buff"], model[0].weight)
    train(model, optimizer, range(2))
    extras = {
        "text": "a note", "momentum_buffer": torch.ones(2, dtype=torch.float64), "number": 3, "list": [1, (2.5, None)],
        "counts": torch.tensor([2**40 + 1]), "nested": {"x": torch.full((3,), 1 / 3)}, "flag": True,
    }  # fmt: skip
    optimizer.state[model[1].weight].update(extras)
    optimizer.state["wrapper"] = {"calls": 7, "buffer": torch.ones(2)}
    optimizer.state["a number"] = 3
    optimizer.state["a tensor"] = torch.ones(2)
    train(model, optimizer, range(2, 4))
    saved = through_a_file(optimizer.state_dict())
    other, resumed = make(dtype)
    for target in (resumed, resumed):  # and again
        target.load_state_dict(copy.deepcopy(saved))
    other.load_state_dict(model.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        mine = optimizer.state[p]
        assert mine["lookahead_slow_buff"].dtype is dtype
        assert {k: v for k, v in resumed.state[q].items() if k == "nested"}.keys() == mine.keys() & {"nested"}
        assert_same_state(*({k: v for k, v in state.items() if k != "nested"} for state in (mine, resumed.state[q])))
    assert torch.equal(resumed.state[other[1].weight]["nested"]["x"], extras["nested"]["x"])
    assert resumed.state["wrapper"]["calls"] == 7
    assert resumed.state["a number"] == 3
    assert torch.equal(resumed.state["a tensor"], torch.ones(2))
    train(model, optimizer, range(4, 6))
    train(other, resumed, range(4, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert fresh["param_groups"][0].keys() == resumed.state_dict()["param_groups"][0].keys()
    assert resumed.skipped_steps.item() == 0
    again = pickle.loads(pickle.dumps(resumed))
    assert again.state["a number"] == 3


def test_entries_of_the_state_that_are_no_states_do_not_disturb_a_guard():
    model, optimizer = make(max_grad_norm=1.0)
    optimizer.state["note"] = torch.ones(2)
    optimizer.state["also"] = 3
    train(model, optimizer, range(2))
    assert optimizer.skipped_steps.item() == 0
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(2, 3))


def test_empty_dicts():
    model, optimizer = make()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {i: {} for i in range(6)}})
    train(model, optimizer, range(1))
    empty = copy.deepcopy(optimizer.state_dict())
    empty["state"] = {}
    optimizer.load_state_dict(empty)
    assert not optimizer.state
    train(model, optimizer, range(1))


# Numbers and memory


@pytest.mark.parametrize(
    "number", [int, float, np.int64, np.float32, lambda x: torch.tensor(int(x)), lambda x: torch.tensor([x])]
)
def test_a_step_of_any_kind_of_number(number):
    runs = []
    for convert in (number, None):
        model, optimizer = make()
        train(model, optimizer, range(3))
        saved = copy.deepcopy(optimizer.state_dict())
        if convert is not None:
            for state in saved["state"].values():
                state["step"] = convert(state["step"].item())
        optimizer.load_state_dict(saved)
        train(model, optimizer, range(3, 6))
        assert all(state["step"].dtype is torch.float32 and state["step"].dim() == 0 for state in optimizer.state.values())
        runs.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"max_grad_norm": 1.0}], ids=str)
def test_one_step_that_several_parameters_share_counts_for_each(options):
    """As other optimizers' dicts may have it. Each counts for itself afterwards, and the dict's does not count."""
    model, optimizer = make(**options)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    shared = torch.tensor(3.0)
    for state in saved["state"].values():
        state["step"] = shared
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(3, 5))
    assert [state["step"].item() for state in optimizer.state.values()] == [5.0] * 6
    assert len({state["step"].data_ptr() for state in optimizer.state.values()}) == 6
    assert shared.item() == 3


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_moments_that_share_memory_or_are_laid_out_oddly(options):
    """Zeros that all parameters share, expanded ones, views with a lazy bit: each parameter gets its own."""
    runs = []
    for odd in (False, True):
        model, optimizer = make(**options)
        zeros = torch.zeros(3, 3)
        train(model, optimizer, range(1))
        saved = copy.deepcopy(optimizer.state_dict())
        for i, name in enumerate(saved["param_groups"][0]["param_names"]):
            p = dict(model.named_parameters())[name]
            state = saved["state"][i]
            state["exp_avg_sq"] = torch.zeros(()).expand(p.shape) if odd else torch.zeros_like(p)
            state["exp_avg"] = (torch._neg_view(-state["exp_avg"]) if odd else state["exp_avg"]).requires_grad_(odd)
            if p.shape == (3, 3) or name == "1.bias":
                state["exp_avg"] = zeros[: len(p)] if p.dim() == 2 else zeros[0]
                state["exp_avg"] = state["exp_avg"] if odd else state["exp_avg"].clone()
        saved["state"][3]["exp_avg_sq"] = saved["state"][2]["exp_avg_sq"][0] if odd else torch.zeros(3)
        optimizer.load_state_dict(saved)
        train(model, optimizer, range(1, 4))
        runs.append([p.detach() for p in model.parameters()])
        assert not any(t.requires_grad for state in optimizer.state.values() for t in state.values())
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


# How another run stepped


@pytest.mark.parametrize("other", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_how_another_run_stepped_is_not_binding(other):
    """A dict written where there are kernels is loaded where there are none: here for float64."""
    model, optimizer = make()
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(other)
    for own in ({}, {"foreach": False}, {"fused": False}):
        double, resumed = make(torch.float64, **own)
        resumed.load_state_dict(copy.deepcopy(saved))
        assert {name: resumed.param_groups[0][name] for name in ("fused", "foreach")} == {"fused": None, "foreach": None, **own}
        train(double, resumed, range(2))
        assert "Backends" in repr(resumed)
    adamw = torch.optim.AdamW(model.parameters(), **other)
    train(model, adamw, range(1))
    double, resumed = make(torch.float64)
    with pytest.warns(UserWarning, match="lr is the length of each element's step"):
        resumed.load_state_dict(adamw.state_dict())
    train(double, resumed, range(1))


# Adam and its relatives


def torchs(kind, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = kind(model.parameters(), **options)
    train(model, optimizer, range(2))
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("name", "kind", "options", "words"),
    [
        ("adamw", torch.optim.AdamW, {}, "AdamW's decay"),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.0}, "tune it again"),
        ("adam", torch.optim.Adam, {"weight_decay": 0.1}, "Adam's decay is in its moments"),
        ("radam", torch.optim.RAdam, {}, "RAdam's rectification"),
        ("radam", torch.optim.RAdam, {"weight_decay": 0.1}, "Adam's decay is in its moments"),
    ],
)
def test_both_ways_to_load_adam_say_the_same_once(name, kind, options, words):
    saved = torchs(kind, **options)
    saved["param_groups"].append({**saved["param_groups"][0], "params": [6]})  # two groups, one warning
    said = []
    for convert in (True, False):
        model, _ = make()
        more = nn.Parameter(torch.ones(2))
        optimizer = torchlamb.Lamb([{"params": model.parameters()}, {"params": [more]}])
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            optimizer.load_state_dict(to_lamb(saved, name) if convert else copy.deepcopy(saved))
        assert len(notes) == 1
        assert notes[0].filename == __file__
        text = str(notes[0].message)
        assert words in text
        said.append([part.strip() for part in text.partition(": ")[2].split(". ")[0].split("; ")])
        assert "amsgrad" not in optimizer.param_groups[0]
        assert optimizer.state[model[0].weight]["step"].item() == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it is ours now
        more.grad = torch.ones(2)
        train(model, optimizer, range(1))
    assert said[0] == said[1]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_amsgrad_is_refused_both_ways_unless_its_maxima_are_taken_out(kind):
    saved, name = torchs(kind, amsgrad=True), kind.__name__.lower()
    model, optimizer = make()
    train(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for load in (optimizer.load_state_dict, lambda d: to_lamb(d, name)):
        with pytest.raises(ValueError, match=r"'max_exp_avg_sq', amsgrad's largest second moments, .* take it out"):
            load(saved)
    for i, state in optimizer.state_dict()["state"].items():
        assert_same_state(state, before[i])
    for state in saved["state"].values():
        del state["max_exp_avg_sq"]
    for load in (optimizer.load_state_dict, lambda d: to_lamb(d, name)):
        with pytest.warns(UserWarning, match="the largest second moments .* are dropped"):
            load(copy.deepcopy(saved))


@pytest.mark.parametrize(
    "kind", [torch.optim.NAdam, torch.optim.Adamax, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_other_rules_are_refused(kind):
    _, optimizer = make()
    saved = torchs(kind, **({"lr": 0.1, "momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}))
    with pytest.raises(ValueError, match=r"has no 'betas'|'mu_product'|'exp_inf'"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


def test_adams_state_with_a_buffer_of_a_wrapper():
    saved = torchs(torch.optim.AdamW)
    for state in saved["state"].values():
        state["lookahead_slow_buff"] = torch.ones(2)
    _, optimizer = make()
    for state_dict in (saved, None):
        with pytest.warns(UserWarning, match="tune it again"):
            optimizer.load_state_dict(to_lamb(saved, "adamw") if state_dict is None else state_dict)
        assert all(torch.equal(s["lookahead_slow_buff"], torch.ones(2)) for s in optimizer.state.values())
