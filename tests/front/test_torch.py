"""Lamb as a torch optimizer: everything around step() that users of AdamW rely on."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import weakref

import pytest
import torch
from cases import BACKEND_PARAMS, DEFAULTS, use
from reference import Reference
from torch import nn
from torch.optim import lr_scheduler

import torchlamb


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, scheduler=None) -> None:
    for step in steps:
        data = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(data.to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def roundtrip(value, weights_only: bool = True):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


OPTIONS = [
    {},
    {"foreach": True, "weight_decay": 0.1},
    {"capturable": True, "max_grad_norm": 0.1, "phi_bounds": (0.0, 10.0)},
    {"lr": torch.tensor(0.01), "skip_nonfinite": True},
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "weights_only", "weights_only after pickle"])
def test_saved_in_mid_training_continues_bitwise(how, options, dtype):
    model = make_model(dtype)
    optimizer = torchlamb.Lamb(model.named_parameters(), **options)
    train(model, optimizer, range(5))
    if how == "pickle":
        other, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    elif how == "deepcopy":
        other, resumed = copy.deepcopy((model, optimizer))
    else:
        other = copy.deepcopy(model)
        resumed = torchlamb.Lamb(other.named_parameters(), foreach=options.get("foreach"))
        saved = pickle.loads(pickle.dumps(optimizer)) if "after pickle" in how else optimizer
        resumed.load_state_dict(roundtrip(saved.state_dict()))
    train(model, optimizer, range(5, 10))
    train(other, resumed, range(5, 10))
    assert_equal(model, other)
    assert resumed.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert repr(resumed) == repr(optimizer)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert value.dtype == (torch.int64 if key == "skipped" else torch.float32)
            assert torch.equal(value, resumed.state[q][key]), key
    assert resumed.trust_ratios().keys() == optimizer.trust_ratios().keys()


def test_state_is_float32_for_bf16_parameters_after_load_state_dict():
    model = make_model(torch.bfloat16)
    optimizer = torchlamb.Lamb(model.parameters())
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = torchlamb.Lamb(make_model(torch.bfloat16).parameters())
    fresh.load_state_dict(saved)
    for i, state in fresh.state_dict()["state"].items():
        for key, value in state.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, saved["state"][i][key])


def test_hooks_run_as_in_torch():
    model = make_model()
    optimizer = torchlamb.Lamb(model.named_parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("state_dict post"))
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    assert seen == ["step pre", "step post", "state_dict pre", "state_dict post"]

    def double_exp_avg(_, state_dict):
        state_dict["state"] = {i: {**s, "exp_avg": s["exp_avg"] * 2} for i, s in state_dict["state"].items()}
        return state_dict

    other = torchlamb.Lamb(make_model(torch.bfloat16).named_parameters())
    other.register_load_state_dict_pre_hook(double_exp_avg)
    dtypes = []
    other.register_load_state_dict_post_hook(lambda o: dtypes.extend(s["exp_avg"].dtype for s in o.state.values()))
    for _ in range(2):  # and again: no hook of ours stays behind
        other.load_state_dict(saved)
    assert set(dtypes) == {torch.float32}
    assert len(other._optimizer_load_state_dict_pre_hooks) == len(other._optimizer_load_state_dict_post_hooks) == 1
    first = next(iter(other.state.values()))
    assert torch.equal(first["exp_avg"], saved["state"][0]["exp_avg"] * 2)
    assert other.param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]


def test_loading_refuses_before_anything_changes():
    model = make_model()
    optimizer = torchlamb.Lamb(model.parameters())
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    for change, words in (
        ({"exp_avg": torch.ones(7)}, "exp_avg of parameter 0"),
        ({"step": torch.ones(2)}, "step of parameter 0"),
    ):
        bad = copy.deepcopy(before)
        bad["state"][0].update(change)
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(bad)
    bad = copy.deepcopy(before)
    bad["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="has 5 parameters, and this optimizer's 6"):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(v, before["state"][i][k]) for i, s in after["state"].items() for k, v in s.items())
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_loading_fills_options_that_an_older_checkpoint_lacks():
    model = make_model()
    optimizer = torchlamb.Lamb(model.parameters(), weight_decay=0.5)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["blocks"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["blocks"] == 1


def test_adamw_state_warm_starts():
    """Adam's state has our names: loading it keeps moments and step counts."""
    model = make_model()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, range(3))
    optimizer = torchlamb.Lamb(model.parameters())
    with pytest.warns(UserWarning, match="tune it again"):
        optimizer.load_state_dict(adamw.state_dict())
    for p in model.parameters():
        assert optimizer.state[p]["step"].item() == 3
        assert torch.equal(optimizer.state[p]["exp_avg"], adamw.state[p]["exp_avg"])
    train(model, optimizer, range(3, 5))


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda s: 1 / (s + 1)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.PolynomialLR(o, 8, 0.5)], [3]
    ),
}


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01), torch.tensor([0.01])], ids=["float", "0-dim", "1-dim"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_lr_schedulers(name, lr):
    """The same values as with AdamW, and steps of that length."""
    runs = []
    for kind in (torchlamb.Lamb, torch.optim.AdamW):
        model = make_model()
        optimizer = kind(model.parameters(), lr=copy.deepcopy(lr))
        scheduler = SCHEDULERS[name](optimizer)
        values = []
        for step in range(10):
            train(model, optimizer, range(step, step + 1))
            values.append((float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["betas"]))
            scheduler.step()
        runs.append(values)
    assert runs[0] == runs[1]
    model = make_model()
    optimizer = torchlamb.Lamb(model.parameters(), lr=copy.deepcopy(lr))
    scheduler = SCHEDULERS[name](optimizer)
    for step in range(10):
        optimizer.zero_grad()
        model(torch.randn(16, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        torchlamb.testing.assert_relative_step(optimizer)
        scheduler.step()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_cycled_momentum_follows_the_rule(name, foreach):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((4, 3), (5,))]
    optimizer = torchlamb.Lamb(params, lr=0.01, weight_decay=0.1, foreach=foreach)
    options = [{**DEFAULTS, "weight_decay": 0.1} for _ in params]
    reference = Reference([p.detach().numpy() for p in params], options)
    scheduler = SCHEDULERS[name](optimizer)
    seen = set()
    for _ in range(10):
        group = optimizer.param_groups[0]
        seen.add(group["betas"])
        for option in options:
            option.update(lr=group["lr"], betas=group["betas"])
        for p in params:
            p.grad = torch.randn(p.shape, dtype=torch.float64)
        reference.step([p.grad.numpy() for p in params])
        optimizer.step()
        scheduler.step()
    assert len(seen) > 3
    for p, w in zip(params, reference.params, strict=True):
        torch.testing.assert_close(p.detach(), torch.from_numpy(w), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_lr_equals_float_lr(shape, foreach, capturable):
    a, b = make_model(torch.float64), make_model(torch.float64)
    train(a, torchlamb.Lamb(a.parameters(), lr=0.01, foreach=foreach), range(5))
    lr = torch.full(shape, 0.01, dtype=torch.float64)
    train(b, torchlamb.Lamb(b.parameters(), lr=lr, foreach=foreach, capturable=capturable), range(5))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
    assert lr.item() == 0.01


def test_closure_runs_with_gradients_and_its_loss_comes_back():
    model = make_model()
    optimizer = torchlamb.Lamb(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    before = closure().item()
    with torch.no_grad():
        assert optimizer.step(closure).item() == before
    assert closure().item() < before
    assert optimizer.step() is None


@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 1.0}, {"state_dtype": torch.bfloat16}, {"capturable": True}], ids=str
)
@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_another_default_device(case, options, monkeypatch):
    """What a step makes for itself is made where it belongs."""
    use(monkeypatch, case)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torchlamb.Lamb([p], lr=0.5, **{**options, **case.options})
    for device in ("cpu", "meta"):
        p.grad = torch.ones(3)
        with torch.device(device):
            optimizer.step()
    assert p.device.type == "cpu"
    assert p[0].item() == pytest.approx(0.25)


@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_late_parameters_count_their_own_steps(case, monkeypatch):
    use(monkeypatch, case)
    early, unfrozen, late = (nn.Parameter(torch.ones(3)) for _ in range(3))
    unfrozen.requires_grad_(False)
    optimizer = torchlamb.Lamb([early, unfrozen], **case.options)
    for step in range(6):
        if step == 2:
            unfrozen.requires_grad_(True)
        if step == 4:
            optimizer.add_param_group({"params": [late], "lr": 0.5})
        for p in (early, unfrozen, late):
            p.grad = torch.full((3,), 2.0) if p.requires_grad else None
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (early, unfrozen, late)] == [6, 4, 2]
    assert optimizer.state[late]["exp_avg"][0].item() == pytest.approx(2 * (1 - 0.9**2))
    assert late[0].item() == pytest.approx(0.25)  # two steps of half its norm


def test_parameters_swapped_after_construction():
    """As accelerate does before the first step."""
    model, swapped = make_model(), make_model()
    optimizer = torchlamb.Lamb(model.parameters())
    optimizer.param_groups[0]["params"] = list(swapped.parameters())
    train(swapped, optimizer, range(3))
    reference = make_model()
    train(reference, torchlamb.Lamb(reference.parameters()), range(3))
    assert_equal(swapped, reference)
    assert_equal(model, make_model())
    first = next(swapped.parameters())
    gone = weakref.ref(first)
    del first
    optimizer.param_groups[0]["params"], swapped = list(model.parameters()), None
    optimizer.state.clear()
    assert gone() is None, "a parameter is kept alive outside param_groups and state"


def test_optimizer_in_backward():
    """One optimizer per parameter, stepped as soon as its gradient is there."""
    a, b = make_model(), make_model()
    optimizers = {p: torchlamb.Lamb([p], weight_decay=0.1) for p in a.parameters()}

    def step_now(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in a.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    whole = torchlamb.Lamb(b.parameters(), weight_decay=0.1)
    for step in range(3):
        data = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        a(data).square().mean().backward()
        assert all(p.grad is None for p in a.parameters())
    train(b, whole, range(3))
    assert_equal(a, b)


def test_swa():
    """Under SWALR, the same steps as with the learning rates it sets, and their average."""
    model, plain = make_model(), make_model()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.05)
    by_hand = torchlamb.Lamb(plain.parameters(), lr=0.05)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2, anneal_strategy="linear")
    history = []
    for step, lr in enumerate([0.05, 0.03, 0.01, 0.01]):
        by_hand.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        train(model, optimizer, range(step, step + 1), scheduler)
        train(plain, by_hand, range(step, step + 1))
        averaged.update_parameters(model)
        history.append([p.detach().clone() for p in plain.parameters()])
    for p, values in zip(averaged.module.parameters(), zip(*history, strict=True), strict=True):
        torch.testing.assert_close(p, torch.stack(values).mean(0))


@pytest.mark.parametrize("foreach", [False, True])
def test_grad_scaler_skips_an_overflow(foreach):
    model, plain = make_model(), make_model()
    optimizer = torchlamb.Lamb(model.parameters(), foreach=foreach)
    reference = torchlamb.Lamb(plain.parameters(), foreach=foreach)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        data = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(data).square().mean()
        scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            train(plain, reference, range(step, step + 1))
    assert scaler.get_scale() == 512.0
    assert_equal(model, plain)
    assert all(state["step"].item() == 3 for state in optimizer.state.values())


@pytest.mark.parametrize("case", BACKEND_PARAMS)
@pytest.mark.parametrize("guard", [{}, {"max_grad_norm": 0.05}], ids=str)
def test_grad_scale_and_found_inf_as_the_scaler_leaves_them(case, guard, monkeypatch):
    """What torch.amp.GradScaler sets around step() for an optimizer that unscales by itself."""
    use(monkeypatch, case)
    a, b = make_model(), make_model()
    scaled = torchlamb.Lamb(a.parameters(), **guard, **case.options)
    plain = torchlamb.Lamb(b.parameters(), **guard, **case.options)
    assert not scaled._step_supports_amp_scaling
    scaled.param_groups[0]["fused"] = True
    assert scaled._step_supports_amp_scaling
    scaled.param_groups[0]["fused"] = case.options.get("fused")
    train(b, plain, range(2))
    for step in (0, 7, 1):
        data = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        scaled.zero_grad()
        (a(data).square().mean() * 64).backward()
        scaled.grad_scale, scaled.found_inf = torch.tensor([64.0]), torch.tensor([float(step == 7)])
        scaled.step()
        del scaled.grad_scale, scaled.found_inf
    assert_equal(a, b)
    assert all(state["step"].item() == 2 for state in scaled.state.values())


def test_sparse_gradients_raise_before_anything_changes():
    dense, embedding = nn.Parameter(torch.ones(2)), nn.Embedding(4, 2, sparse=True)
    optimizer = torchlamb.Lamb([{"params": [("dense", dense)]}, {"params": [("words", embedding.weight)]}])
    (dense.sum() + embedding(torch.tensor([1])).sum()).backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*'words'.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))
    assert not optimizer.state


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("foreach", [False, True])
def test_gradients_of_another_dtype(param_dtype, grad_dtype, foreach):
    """A gradient is converted, not the arithmetic: the same as its float32 value."""
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(40).to(param_dtype))
        p.grad_dtype = None
        optimizer = torchlamb.Lamb([p], lr=0.1, foreach=foreach)
        for _ in range(3):
            grad = torch.randn(40).to(grad_dtype)
            p.grad = grad.float() if convert else grad
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_zero_gradients_give_state_without_nan():
    """Distributed checkpointing initialises a fresh optimizer with such a step."""
    model = make_model()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.0, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_equal(model, make_model())
    assert len(optimizer.state) == len(list(model.parameters()))
    assert all(v.isfinite().all() for s in optimizer.state.values() for v in s.values())


def test_parameters_of_two_dtypes_in_one_group():
    """Each is stepped in its own bucket, with the same result as alone."""
    torch.manual_seed(0)
    values = [torch.randn(5).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32)]
    grads = [torch.randn_like(v) for v in values]
    together, alone = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    for params in [together, *([p] for p in alone)]:
        for p, grad in zip(together + alone, itertools.cycle(grads), strict=False):
            p.grad = grad
        torchlamb.Lamb(params, weight_decay=0.1).step()
    for p, q in zip(together, alone, strict=True):
        assert torch.equal(p, q)


def test_trust_ratios_by_name_index_and_block():
    weight, bias, dead = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
    weight.grad, bias.grad = torch.ones(4, 2), torch.ones(4)
    by_name = torchlamb.Lamb([("weight", weight), ("dead", dead), ("bias", bias)], eps=0.0)
    assert by_name.trust_ratios() == {}
    by_name.step()
    assert {name: ratio.item() for name, ratio in by_name.trust_ratios().items()} == {"weight": pytest.approx(1), "bias": 1}
    weight.data[:2] = 3.0
    groups = [{"params": [dead]}, {"params": [weight, bias], "blocks": 2, "eps": 0.0}]
    by_index = torchlamb.Lamb(groups)
    by_index.step()
    ratios = by_index.trust_ratios()
    assert list(ratios) == [1, 2]
    assert ratios[1].shape == (2,)
    assert ratios[1][0].item() == pytest.approx(3.0)


def test_trust_ratios_of_parameters_whose_names_are_not_unique():
    """Two models of one class, say: positions tell them apart."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(2)
    optimizer = torchlamb.Lamb([("weight", params[0]), ("weight", params[1])])
    optimizer.step()
    assert set(optimizer.trust_ratios()) == {0, 1}
    optimizer.param_groups[0]["params"].append(params[2])
    optimizer.step()
    assert set(optimizer.trust_ratios()) == {0, 1, 2}


@pytest.mark.parametrize("foreach", [False, True])
def test_zero_grad_set_to_none_false(foreach):
    """Zeroed gradients are accumulated into: the same steps as with fresh ones."""
    a, b = make_model(), make_model()
    ours, fresh = (torchlamb.Lamb(m.parameters(), foreach=foreach) for m in (a, b))
    for step in range(3):
        data = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        for model, optimizer, to_none in ((a, ours, False), (b, fresh, True)):
            optimizer.zero_grad(set_to_none=to_none)
            model(data).square().mean().backward()
            optimizer.step()
    assert_equal(a, b)


def test_flat_parameters_of_fsdp_are_refused():
    flat = nn.Parameter(torch.ones(3))
    flat._fsdp_flattened = True
    for params in ([flat], [{"params": flat}]):
        with pytest.raises(NotImplementedError, match="flat parameter of FullyShardedDataParallel"):
            torchlamb.Lamb(params)


@pytest.mark.parametrize("held", [2, 1])
def test_flat_partitions_are_refused(held):
    """As ZeRO makes them: the parameters of a group are replaced by one flat tensor, after the construction."""
    params = [nn.Parameter(torch.ones(2, 3)) for _ in range(held)]
    optimizer = torchlamb.Lamb(params)
    flat = nn.Parameter(torch.ones(6 * held // 2))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"vectors that are not those that Lamb was given.*fully_shard"):
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())  # which does not make it forget
    assert torch.equal(flat, torch.ones_like(flat))
    assert not optimizer.state
    vector = nn.Parameter(torch.ones(3))
    vector.grad = torch.ones(3)
    torchlamb.Lamb([vector]).step()  # a group that began so cannot be told apart


def foreign_dicts(model):
    """By what is wrong with them: state dicts that are not ours, and the words that must be in what is said of each."""
    own = torchlamb.Lamb(model.parameters())
    train(model, own, range(2))

    def changed(change):
        state_dict = copy.deepcopy(own.state_dict())
        change(state_dict["state"], state_dict["param_groups"])
        return state_dict

    def of(optimizer):
        train(model, optimizer, range(1))
        return optimizer.state_dict()

    params = list(model.parameters())
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    return {
        "no dict": ([1], TypeError, "must be a dict with 'state' and 'param_groups', got a list"),
        "a model's": (model.state_dict(), TypeError, "got a dict with"),
        "SGD's": (of(torch.optim.SGD(params, lr=0.1, momentum=0.9)), ValueError, "no 'betas'.*torchlamb.convert.to_lamb"),
        "amsgrad's": (
            of(torch.optim.Adam(params, amsgrad=True)),
            ValueError,
            "parameter 0 .*'max_exp_avg_sq'.*convert.to_lamb",
        ),
        "Adamax's": (of(torch.optim.Adamax(params)), ValueError, "parameter 0 .*'exp_inf'.*convert.to_lamb"),
        "extra group": (of(torchlamb.Lamb(groups)), ValueError, "has 2 parameter groups, and this optimizer 1; construct"),
        "moment missing": (changed(lambda s, _: s[2].pop("exp_avg_sq")), ValueError, "parameter 2 .*no 'exp_avg_sq'; load"),
        "step missing": (changed(lambda s, _: s[2].pop("step")), ValueError, "parameter 2 .*no 'step'; load"),
        "wrong shape": (
            changed(lambda s, _: s[1].update(exp_avg=torch.ones(2, 7))),
            ValueError,
            r"exp_avg of parameter 1 .*\(2, 7\).*same model",
        ),
        "broadcasts": (changed(lambda s, _: s[1].update(exp_avg=torch.ones(()))), ValueError, "exp_avg of parameter 1"),
        "complex": (
            changed(lambda s, _: s[1].update(exp_avg=s[1]["exp_avg"].to(torch.complex64))),
            ValueError,
            "exp_avg of parameter 1 .*complex64",
        ),
        "no tensor": (changed(lambda s, _: s[1].update(exp_avg=[0.0])), ValueError, "exp_avg of parameter 1 .*got a list"),
        "many steps": (changed(lambda s, _: s[1].update(step=torch.ones(3))), ValueError, "step of parameter 1 .*one number"),
        "list": (
            changed(lambda s, _: s.update({1: [1]})),
            ValueError,
            "the state of parameter 1 .* must be a dict, got a list",
        ),
        "no groups": ({"state": {}, "param_groups": 3}, TypeError, "must be a dict and a list of dicts, got a dict and a int"),
        "on no device": (
            changed(lambda s, _: s[1].update(exp_avg=s[1]["exp_avg"].to("meta"))),
            ValueError,
            "on the meta device",
        ),
        "sparse": (changed(lambda s, _: s[0].update(exp_avg=s[0]["exp_avg"].to_sparse())), ValueError, "make it dense first"),
    }


@pytest.mark.parametrize("what", sorted(foreign_dicts(make_model())))
def test_what_is_not_ours_is_refused_by_its_first_difference(what):
    model = make_model()
    state_dict, kind, words = foreign_dicts(model)[what]
    optimizer = torchlamb.Lamb(model.parameters(), weight_decay=0.1)
    train(model, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(kind, match=words):
        optimizer.load_state_dict(state_dict)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(v, before["state"][i][k]) for i, s in after["state"].items() for k, v in s.items())
    train(model, optimizer, range(3, 5))
