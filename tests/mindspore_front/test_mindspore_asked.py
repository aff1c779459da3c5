"""What `nn.Lamb` is asked between steps, weight decays that change, and which gradients are centralized."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from front_cases import Ramp, assert_unchanged, make_grads, make_params, run, set_grads, snapshot

import torchlamb
from torchlamb.mindspore import Tensor, nn, ops


class Halving(nn.Cell):
    """A weight decay of one's own."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.first = first

    def construct(self, global_step: Any) -> Any:
        return self.first * 0.5 ** global_step.astype("float32")


# Learning rates


@pytest.mark.parametrize(
    ("rate", "coming"),
    [
        (0.25, [0.25] * 3),
        (nn.WarmUpLR(1.0, 4), [0.0, 0.25, 0.5]),
        ([0.5, 0.25, 0.125], [0.5, 0.25, 0.125]),
        (Ramp(0.5), [0.5, 1.0, 1.5]),
    ],
    ids=["fixed", "schedule", "vector", "own"],
)
def test_get_lr_is_that_of_the_coming_step_whenever_it_is_asked(rate, coming):
    params = make_params()
    optimizer = nn.Lamb(params, rate)
    for step, wanted in enumerate(coming):
        for _ in range(2):
            lr = optimizer.get_lr()
            assert (lr.shape, lr.dtype, lr.item()) == ((), torch.float32, wanted)
        run(optimizer, params, range(step, step + 1))
        assert optimizer.param_groups[0]["lr"] == wanted
    if isinstance(rate, list):
        assert optimizer.get_lr().item() == 0.125  # used up: the last one, so that a callback can print it
    resumed = pickle.loads(pickle.dumps(optimizer))
    assert resumed.get_lr().item() == optimizer.get_lr().item()


def test_get_lr_knows_what_was_written_by_hand():
    params = make_params()
    optimizer = nn.Lamb(params, Ramp(0.5))
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    assert optimizer.get_lr().item() == 0.125
    run(optimizer, params, 1)
    assert optimizer.get_lr().item() == 1.0


def test_groups_with_their_own_rates_give_one_for_each_parameter():
    params = make_params()
    groups = [{"params": params[:2], "lr": Ramp(0.5)}, {"params": params[2:]}, {"order_params": params[::-1]}]
    optimizer = nn.Lamb(groups, 0.25, weight_decay=0.125)
    assert [lr.item() for lr in optimizer.get_lr()] == [0.25, 0.25, 0.25, 0.5, 0.5]
    assert [decay.item() for decay in optimizer.get_weight_decay()] == [0.125] * 5
    assert isinstance(optimizer.learning_rate[-1], Ramp)
    rates = optimizer.get_lr_parameter([params[0], params[4]])
    assert isinstance(rates[0], Ramp)
    assert rates[1].item() == optimizer.get_lr_parameter(params[4].parameter).item() == 0.25
    with pytest.raises(ValueError, match="is not in the optimizer"):
        optimizer.get_lr_parameter(make_params()[0])
    with pytest.raises(TypeError, match="param"):
        optimizer.get_lr_parameter("fc.weight")


def test_a_fixed_rate_can_be_written_to():
    params = make_params()
    optimizer = nn.Lamb(params, 0.5)
    assert len(optimizer.param_groups) == 2
    ops.assign(optimizer.learning_rate, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    optimizer.get_lr_parameter(params[0]).set_data(Tensor(0.125))
    assert optimizer.get_lr().item() == 0.125
    rate = optimizer.learning_rate
    rate *= 2
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    with pytest.raises(ValueError, match="learning_rate must be a finite number >= 0, got -1"):
        ops.assign(optimizer.learning_rate, -1.0)
    assert optimizer.get_lr().item() == 0.25


def test_the_step_can_be_asked_and_set():
    params = make_params()
    optimizer = nn.Lamb(params, Ramp(0.5))
    run(optimizer, params, 2)
    step = optimizer.global_step
    assert (step.shape, step.dtype, step.asnumpy()[0], int(step)) == ((1,), torch.int32, 2, 2)
    optimizer.global_step = 5
    assert optimizer.get_lr().item() == 3.0
    ops.assign(optimizer.global_step, Tensor([7]))
    assert (optimizer.global_step, optimizer.state_dict()["global_step"]) == (7, 7)
    with pytest.raises(ValueError, match="global_step must be one int >= 0"):
        optimizer.global_step = -1
    assert optimizer.global_step == 7


def test_unique_and_target_are_accepted():
    optimizer = nn.Lamb(make_params(), 0.1)
    assert (optimizer.unique, optimizer.target) == (True, "CPU")
    optimizer.unique, optimizer.target = False, "Ascend"
    assert (optimizer.unique, optimizer.target) == (False, "Ascend")
    for name, wrong, kind in (("unique", 1, TypeError), ("target", 3, TypeError), ("target", "TPU", ValueError)):
        with pytest.raises(kind, match=name):
            setattr(optimizer, name, wrong)


# Weight decays


@pytest.mark.parametrize("place", ["optimizer", "group"])
@pytest.mark.parametrize("make", [lambda: Halving(0.25), lambda: nn.ExponentialDecayLR(0.25, 0.5, 1)], ids=["cell", "schedule"])
def test_a_weight_decay_that_changes(make, place):
    params, twins = make_params(), make_params()
    if place == "optimizer":
        optimizer = nn.Lamb(params, 0.1, weight_decay=make())
        twin = torchlamb.Lamb(
            [{"params": [p for n, p in twins if "norm" not in n]}, {"params": [p for n, p in twins if "norm" in n]}], 0.1
        )
    else:
        optimizer = nn.Lamb([{"params": params[:2], "weight_decay": make()}, {"params": params[2:]}], 0.1)
        twin = torchlamb.Lamb([{"params": [p for _, p in twins[:2]]}, {"params": [p for _, p in twins[2:]]}], 0.1)
    for step in range(4):
        asked = optimizer.get_weight_decay()
        assert (asked[0] if place == "group" else asked).item() == 0.25 * 0.5**step
        twin.param_groups[0]["weight_decay"] = 0.25 * 0.5**step
        for o, ps in ((optimizer, params), (twin, twins)):
            run(o, ps, range(step, step + 1))
        if step == 1:
            optimizer, params = copy.deepcopy((optimizer, params))
    for (_, p), (_, q) in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("value", "kind"), [("0.1", TypeError), (-1.0, ValueError), (float("nan"), ValueError)])
def test_a_weight_decay_that_fails_changes_nothing(value, kind):
    class Fails(nn.Cell):
        def construct(self, global_step: Any) -> Any:
            return 0.1 if global_step < 1 else value

    params = make_params()
    optimizer = nn.Lamb(params, Ramp(0.1), weight_decay=Fails())
    run(optimizer, params, 1)
    set_grads(params, 1)
    before = snapshot(optimizer)
    with pytest.raises(kind, match="the weight decay of Fails at step 1"):
        optimizer.step()
    assert_unchanged(optimizer, before)


# Centralization


class Layers(torch.nn.Module):
    """Tensors of 3 and more dims of which only two are convolutions'."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3)
        self.bilinear = torch.nn.Bilinear(3, 2, 4)
        self.norm = torch.nn.LayerNorm((2, 3, 2))
        self.transposed = torch.nn.ConvTranspose1d(3, 2, 3)
        self.own = torch.nn.Parameter(torch.randn(2, 3, 4))
        self.fc = torch.nn.Linear(3, 2)


def centralized(optimizer: nn.Lamb) -> set[str]:
    """Step without anything that hides it: the first moment tells."""
    for _, p in optimizer.parameters:
        p.grad = torch.randn(p.shape) + 1
    grads = {name: p.grad.clone() for name, p in optimizer.parameters}
    optimizer.step()
    found = set()
    for name, p in optimizer.parameters:
        moment = optimizer.state[p]["exp_avg"]
        if not torch.allclose(moment, 0.1 * grads[name], atol=1e-6):
            dims = tuple(range(1, p.dim()))
            assert torch.allclose(moment, 0.1 * (grads[name] - grads[name].mean(dims, keepdim=True)), atol=1e-6)
            found.add(name)
    return found


def test_only_convolutions_are_centralized_where_modules_are_known():
    entries = nn.trainable_params(Layers())
    convolutions = {"conv.weight", "transposed.weight"}
    assert centralized(nn.Lamb([{"params": entries, "grad_centralization": True}], 0.1)) == convolutions
    assert centralized(nn.Lamb(nn.trainable_params(Layers()), 0.1, grad_centralization=True)) == convolutions
    assert centralized(nn.Lamb([{"params": nn.trainable_params(Layers())}], 0.1)) == set()
    named = list(Layers().named_parameters())  # whose modules are not known: by dims
    assert centralized(nn.Lamb([{"params": named, "grad_centralization": True}], 0.1)) == {
        "conv.weight", "bilinear.weight", "norm.weight", "norm.bias", "transposed.weight", "own",
    }  # fmt: skip


def test_groups_that_are_taken_apart_keep_their_order_and_rates():
    net = Layers()
    entries = nn.trainable_params(net)
    groups = [
        {"params": entries[:5], "grad_centralization": True, "lr": Ramp(0.5), "weight_decay": 0.1},
        {"params": entries[5:]},
    ]
    optimizer = nn.Lamb(groups, 0.25)
    assert [x.name for x in optimizer.parameters] == [x.name for x in entries]
    assert len(optimizer.param_groups) == 3
    assert [lr.item() for lr in optimizer.get_lr()] == [0.5] * 5 + [0.25] * (len(entries) - 5)
    ordered = nn.Lamb([*groups, {"order_params": entries[::-1]}], 0.25)
    assert [x.name for x in ordered.parameters] == [x.name for x in entries[::-1]]
    grads = [torch.ones_like(x.parameter) for x in entries]
    assert optimizer(grads) == (True,) * len(entries)
    added = nn.Lamb(entries[:1], 0.1)
    before = len(added.param_groups), added.parameters
    bad = nn.NamedParameter("no leaf", net.own * 2)
    with pytest.raises(ValueError, match="leaf"):
        added.add_param_group({"params": [*entries[1:4], bad], "grad_centralization": True})
    assert (len(added.param_groups), added.parameters) == before


# Messages


def test_messages_of_wrong_params_have_an_or():
    with pytest.raises(TypeError, match=r"params\[0\] must be a parameter, a \(name, parameter\) pair or a dict, got 3"):
        nn.Lamb([3], 0.1)
    with pytest.raises(TypeError, match=r"group 0 params\[0\] must be a parameter or a \(name, parameter\) pair, got 3"):
        nn.Lamb([{"params": [3]}], 0.1)


def test_gradients_may_be_front_tensors_with_graphs():
    params, twins = make_params(), make_params()
    factor = torch.ones((), requires_grad=True, dtype=torch.float64)
    nn.Lamb(params, 0.1)([Tensor(g) * factor for g in make_grads(params, 0)])
    nn.Lamb(twins, 0.1)(make_grads(twins, 0))
    assert all(torch.equal(x.parameter, y.parameter) for x, y in zip(params, twins, strict=True))
