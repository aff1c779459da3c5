"""Masters, and how what is stored is saved, loaded and changed."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from cases import (
    BACKEND_PARAMS,
    name_of,
    use,
)
from storing import BF16, FP16, FP32, FP64, LOW, STORAGE, bf16_model, train
from torch import nn

import torchlamb
from torchlamb import precision


@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_what_was_changed_from_outside_counts(case, monkeypatch):
    use(monkeypatch, case)
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 5).to(BF16))
    optimizer = torchlamb.Lamb([p], lr=0.01, master_weights=True, **case.options)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    master = optimizer.state[p]["master"].clone()
    assert not torch.equal(master, p.float())
    with torch.no_grad():
        p[2] = 3.0
        p[4, 1] = -7.0
    changed = torch.zeros(6, 5, dtype=torch.bool)
    changed[2], changed[4, 1] = True, True
    start = torch.where(changed, p.float(), master)
    p.grad = torch.randn_like(p)
    optimizer.step()
    delta = optimizer.state[p]["master"] - start
    ratio = (delta.norm() / start.norm()).item()
    assert ratio == pytest.approx(0.01, rel=1e-5)  # lr x norm, of what was set and not of the stale master
    assert torch.equal(p, optimizer.state[p]["master"].to(BF16))


def test_a_loaded_model_is_not_overwritten():
    model = bf16_model()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.01, master_weights=True)
    train(model, optimizer, range(3))
    other = bf16_model(seed=1)
    model.load_state_dict(other.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(1))
    for p, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, wanted)
        assert torch.equal(optimizer.state[p]["master"], wanted.float())


@pytest.mark.parametrize("case", BACKEND_PARAMS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_elements_that_were_not_finite_can_be_set_anew(case, bad, monkeypatch):
    use(monkeypatch, case)
    p = nn.Parameter(torch.tensor([1.0, bad], dtype=BF16))
    optimizer = torchlamb.Lamb([p], lr=0.125, master_weights=True, layer_adaptation=False, eps=0.0, **case.options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert not p[1].isfinite()
    with torch.no_grad():
        p[1] = 2.0
    optimizer.step()
    assert optimizer.state[p]["master"].tolist() == pytest.approx([0.75, 1.875], rel=1e-6)


def test_only_what_is_rounded_has_a_seed_or_a_master():
    low, full = nn.Parameter(torch.ones(3, dtype=BF16)), nn.Parameter(torch.ones(3))
    for storage, key in ((STORAGE["stochastic"], "seed"), (STORAGE["masters"], "master")):
        optimizer = torchlamb.Lamb([low, full], **storage)
        low.grad, full.grad = torch.ones_like(low), torch.ones_like(full)
        optimizer.step()
        assert key in optimizer.state[low]
        assert key not in optimizer.state[full]
    optimizer.param_groups[0]["master_weights"] = False
    optimizer.step()
    assert "master" not in optimizer.state[low], "it would be saved and never used"


def test_a_seed_and_a_master_may_be_given_before_the_first_step():
    p, q = (nn.Parameter(torch.full((1000,), 1.0, dtype=BF16)) for _ in range(2))
    optimizer = torchlamb.Lamb([p, q], lr=1e-3, stochastic_rounding=True)
    optimizer.state[p]["seed"] = torch.tensor(5)
    optimizer.state[q]["seed"] = torch.tensor(5)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    assert torch.equal(p, q)
    p = nn.Parameter(torch.full((4,), 1.0, dtype=BF16))
    optimizer = torchlamb.Lamb([p], lr=0.0, master_weights=True)
    optimizer.state[p]["master"] = torch.full((4,), 1.001)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["master"], torch.full((4,), 1.001))


def test_masters_that_are_not_finite():
    p = nn.Parameter(torch.tensor([1.0, 6e4], dtype=FP16))
    optimizer = torchlamb.Lamb([p], lr=10.0, master_weights=True, layer_adaptation=False)
    p.grad = torch.tensor([1.0, -1e3], dtype=FP16)
    for _ in range(2000):
        optimizer.step()
    assert p[1].isinf(), "out of float16's range"
    assert optimizer.state[p]["master"].isfinite().all(), "and in the master's"


@pytest.mark.parametrize("storage", STORAGE.values(), ids=STORAGE)
@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_a_skipped_step_changes_nothing(case, storage, monkeypatch):
    use(monkeypatch, case)
    model = bf16_model()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.01, skip_nonfinite=True, **storage, **case.options)
    train(model, optimizer, range(2))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    next(model.parameters()).grad[0, 0] = torch.nan
    optimizer.step()
    after = model.state_dict(), optimizer.state_dict()["state"]
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    for i, state in before[1].items():
        assert all(torch.equal(value, after[1][i][key]) for key, value in state.items() if key != "skipped")


# Saving and loading


def through_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_state(a: torchlamb.Lamb, b: torchlamb.Lamb) -> None:
    for p, q in zip(*([p for group in o.param_groups for p in group["params"]] for o in (a, b)), strict=True):
        assert torch.equal(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            other = b.state[q][key]
            assert value.dtype == other.dtype, key
            assert torch.equal(value, other), key


DTYPES_AND_STORAGE = [
    pytest.param(dtype, storage, id=f"{name_of(dtype)}-{name}")
    for dtype in (BF16, FP16, FP32, FP64)
    for name, storage in STORAGE.items()
    if not (dtype is FP16 and "stochastic_rounding" in storage)
]


@pytest.mark.parametrize(("dtype", "storage"), DTYPES_AND_STORAGE)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"capturable": True, "max_grad_norm": 0.5}], ids=str)
@pytest.mark.parametrize("told", [True, False])
def test_resumed_bitwise(dtype, storage, options, told):
    model = bf16_model().to(dtype)
    optimizer = torchlamb.Lamb(model.parameters(), **options, **storage)
    train(model, optimizer, range(5))
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = bf16_model(seed=1).to(dtype)
    other.load_state_dict(saved["model"])
    how = {name: value for name, value in options.items() if name == "foreach"}  # which is never taken from a file
    resumed = torchlamb.Lamb(other.parameters(), **how, **(storage if told else {}))  # what it is not told, it takes from there
    resumed.load_state_dict(saved["optimizer"])
    assert_same_state(resumed, optimizer)
    train(model, optimizer, range(5, 10))
    train(other, resumed, range(5, 10))
    assert_same_state(resumed, optimizer)


@pytest.mark.parametrize("storage", STORAGE.values(), ids=STORAGE)
def test_expected_state(storage):
    model = bf16_model()
    optimizer = torchlamb.Lamb(model.parameters(), **storage)
    train(model, optimizer, range(1))
    moments = BF16 if storage.get("state_dtype") is BF16 else FP32
    wanted = {"step": FP32, "exp_avg": moments, "exp_avg_sq": moments}
    if "master_weights" in storage:
        wanted["master"] = FP32
    if "stochastic_rounding" in storage or moments is BF16:
        wanted["seed"] = torch.int64
    for i, p in enumerate(model.parameters()):
        assert {key: value.dtype for key, value in optimizer.state[p].items()} == wanted
        assert "seed" not in wanted or optimizer.state[p]["seed"].item() == precision.seed_of(i)


def test_from_float32_to_bf16_with_masters_and_back():
    """A float32 run, gone on in bf16 with its float32 weights as masters, then in float32 again."""
    model = bf16_model().float()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    low = bf16_model(seed=1)
    low.load_state_dict(saved["model"])  # rounds
    masters = torchlamb.Lamb(low.parameters(), master_weights=True, state_dtype=FP32)
    for i, p in enumerate(model.parameters()):
        saved["optimizer"]["state"][i]["master"] = p.detach()
    masters.load_state_dict(saved["optimizer"])
    assert masters.param_groups[0]["master_weights"], "how it stores things is not taken from the file"
    for p, q in zip(low.parameters(), model.parameters(), strict=True):
        assert torch.equal(masters.state[p]["master"], q)
        assert torch.equal(p, q.to(BF16))
        assert torch.equal(masters.state[p]["exp_avg_sq"], optimizer.state[q]["exp_avg_sq"])
    before = copy.deepcopy(model.state_dict())
    train(low, masters, range(3, 6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "masters are copies"

    back = through_file({"optimizer": masters.state_dict()})
    again = bf16_model(seed=2).float()
    names = [name for name, _ in low.named_parameters()]
    again.load_state_dict({name: back["optimizer"]["state"][i]["master"] for i, name in enumerate(names)})
    resumed = torchlamb.Lamb(again.parameters())
    resumed.load_state_dict(back["optimizer"])
    for p, q in zip(again.parameters(), low.parameters(), strict=True):
        assert torch.equal(p, masters.state[q]["master"])
        assert resumed.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(resumed.state[p]["exp_avg"], masters.state[q]["exp_avg"])
    train(again, resumed, range(6, 8))


def test_without_masters_in_the_file_they_are_made_of_the_parameters():
    model = bf16_model()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.01)
    train(model, optimizer, range(2))
    masters = torchlamb.Lamb(model.parameters(), lr=0.01, master_weights=True)
    masters.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [p.detach().clone() for p in model.parameters()]
    for group in masters.param_groups:
        group["lr"] = 0.0
    train(model, masters, range(1))
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(masters.state[p]["master"], old.float())


@pytest.mark.parametrize(
    ("own", "saved", "wanted"),
    [
        ({}, {"master_weights": True}, (True, False, None)),
        ({"master_weights": True}, {}, (True, False, None)),
        ({"master_weights": True}, {"stochastic_rounding": True}, (True, False, None)),
        ({"stochastic_rounding": True}, {"master_weights": True, "state_dtype": BF16}, (False, True, BF16)),
        ({"state_dtype": BF16}, {"master_weights": True}, (True, False, BF16)),
        ({"state_dtype": FP32}, {"state_dtype": BF16}, (False, False, FP32)),
    ],
    ids=str,
)
def test_loading_keeps_how_this_run_stores_things(own, saved, wanted):
    model = bf16_model()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.5, **saved)
    train(model, optimizer, range(2))
    other = bf16_model()
    resumed = torchlamb.Lamb(other.parameters(), **own)
    saved_dict = copy.deepcopy(optimizer.state_dict())
    untouched = copy.deepcopy(saved_dict)
    resumed.load_state_dict(saved_dict)
    assert saved_dict["param_groups"] == untouched["param_groups"], "the caller's dict was written"
    group = resumed.param_groups[0]
    assert tuple(group[name] for name in ("master_weights", "stochastic_rounding", "state_dtype")) == wanted
    assert group["lr"] == 0.5
    train(other, resumed, range(2))
    for p in other.parameters():
        assert ("master" in resumed.state[p]) == wanted[0]
        assert resumed.state[p]["exp_avg"].dtype == (wanted[2] or FP32)


def test_storage_that_does_not_fit_the_parameters_is_loaded_and_refused_by_the_next_step():
    bf16, fp16 = (nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in LOW)
    saved = torchlamb.Lamb([bf16], stochastic_rounding=True).state_dict()
    optimizer = torchlamb.Lamb([fp16])
    optimizer.load_state_dict(saved)
    fp16.grad = torch.ones_like(fp16)
    with pytest.raises(TypeError, match="use master_weights"):
        optimizer.step()
    assert torch.equal(fp16, torch.ones_like(fp16))
    assert not optimizer.state


def test_a_dict_without_our_options_leaves_those_of_the_group():
    model = bf16_model()
    adam = torch.optim.Adam(model.parameters())
    optimizer = torchlamb.Lamb([{"params": list(model.parameters()), "master_weights": False}], master_weights=True)
    with pytest.warns(UserWarning, match="lr"):
        optimizer.load_state_dict(adam.state_dict())
    assert not optimizer.param_groups[0]["master_weights"]


def test_options_may_be_changed_between_steps():
    model = bf16_model()
    optimizer = torchlamb.Lamb(model.parameters())
    train(model, optimizer, range(1))
    for change in ({"state_dtype": BF16}, {"master_weights": True}, {"state_dtype": None}, {"master_weights": False}):
        optimizer.param_groups[0].update(change)
        train(model, optimizer, range(1))
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].dtype == FP32
        assert p.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "storage",
    [
        *("masters", "stochastic-bf16-state"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("stochastic", "bf16-state", "masters-bf16-state")),
    ],
)
def test_compiled(storage):
    models = [bf16_model() for _ in range(2)]
    optimizers = [torchlamb.Lamb(m.parameters(), lr=torch.tensor(0.01), capturable=True, **STORAGE[storage]) for m in models]
    torch._dynamo.reset()
    compiled = torch.compile(optimizers[0].step, backend="aot_eager")
    for step in range(3):
        for model in models:
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(BF16)
        compiled()
        optimizers[1].step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q)
