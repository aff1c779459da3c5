"""Learning rates that schedulers write: rounding below 0 is no step, and what is really negative steps as torch's would."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import BACKEND_PARAMS, DEFAULTS, DEVICE, GPU_KERNELS, use
from reference import Reference
from torch import nn
from torch.optim import lr_scheduler

import torchlamb
import torchlamb.mindspore

DTYPE = torch.float32 if GPU_KERNELS else torch.float64


def params_and_grads(steps: int, dtype: torch.dtype = DTYPE):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 3), (5,), (), (0, 2))]
    return params, [[torch.randn_like(p) for p in params] for _ in range(steps)]


def run(optimizer, grads, after=lambda: None):
    for of_step in grads:
        for p, grad in zip(optimizer.param_groups[0]["params"], of_step, strict=True):
            p.grad = grad
        optimizer.step()
        after()


@pytest.mark.parametrize(
    "lr", [0.01, torch.tensor(0.01), torch.tensor([0.01], dtype=torch.float64)], ids=["float", "0-dim", "1-dim"]
)
@pytest.mark.parametrize("length", [3, 5, 9, 11, 101])
def test_a_linear_schedule_to_0_ends_without_a_step(length, lr):
    """At many lengths LinearLR ends some 1e-18 below 0."""
    params, grads = params_and_grads(length)
    optimizer = torchlamb.Lamb(params, lr=copy.deepcopy(lr))
    scheduler = lr_scheduler.LinearLR(optimizer, end_factor=0.0, total_iters=length)
    run(optimizer, grads, scheduler.step)
    written = float(optimizer.param_groups[0]["lr"])
    assert abs(written) < 1e-17
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        run(optimizer, grads[:1])
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert float(optimizer.param_groups[0]["lr"]) == written  # it is the scheduler's: recursive ones go on from it
    assert all(state["step"].item() == length + 2 for state in optimizer.state.values())


def test_some_of_these_lengths_do_end_below_0():
    ends = []
    for length in (3, 5, 9, 11, 101):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.01)
        scheduler = lr_scheduler.LinearLR(optimizer, end_factor=0.0, total_iters=length)
        for _ in range(length):
            optimizer.step()
            scheduler.step()
        ends.append(optimizer.param_groups[0]["lr"])
    assert min(ends) < 0


SCHEDULERS = {
    "LinearLR": lambda o, n: lr_scheduler.LinearLR(o, end_factor=0.0, total_iters=n - 1),
    "OneCycleLR": lambda o, n: lr_scheduler.OneCycleLR(o, 0.1, total_steps=n),
    "OneCycleLR, linear": lambda o, n: lr_scheduler.OneCycleLR(o, 0.1, total_steps=n - 1, anneal_strategy="linear"),
    "OneCycleLR, three linear phases": lambda o, n: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=n - 1, anneal_strategy="linear", three_phase=True
    ),
    "CosineAnnealingLR": lambda o, n: lr_scheduler.CosineAnnealingLR(o, n - 1),
    "PolynomialLR": lambda o, n: lr_scheduler.PolynomialLR(o, n - 1, 0.5),
    "CyclicLR": lambda o, _: lr_scheduler.CyclicLR(o, 0.0, 0.1, step_size_up=3, cycle_momentum=True),
    "LambdaLR": lambda o, n: lr_scheduler.LambdaLR(o, lambda t: 1 - t / (n - 3)),
    "SequentialLR": lambda o, n: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=n - 4)], [3]
    ),
}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step", "ignore:The epoch parameter")
def test_every_schedule_runs_to_its_end(name, as_tensor):
    """As the rule says with the lr that is written, negative or not, within rounding of 0 as with 0."""
    length = 23
    params, grads = params_and_grads(length)
    optimizer = torchlamb.Lamb(params, lr=torch.tensor(0.01, dtype=torch.float64) if as_tensor else 0.01)
    scheduler = SCHEDULERS[name](optimizer, length)
    options = [dict(DEFAULTS) for _ in params]
    reference = Reference([p.detach().cpu().numpy() for p in params], options)
    for step, of_step in enumerate(grads):
        group = optimizer.param_groups[0]
        for option in options:
            option.update(lr=float(group["lr"]), betas=group["betas"])
        reference.step([grad.cpu().numpy() for grad in of_step])
        run(optimizer, [of_step])
        if step < length - 1:
            scheduler.step()
    rtol = 1e-5 if DTYPE is torch.float32 else 1e-12
    for p, w in zip(params, reference.params, strict=True):
        torch.testing.assert_close(p.detach().cpu(), torch.from_numpy(w).to(DTYPE), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "max_grad_norm": 1.0}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_a_negative_lr_ascends_with_every_backend(case, options, monkeypatch):
    use(monkeypatch, case)
    params, grads = params_and_grads(3, torch.float32)
    reference = Reference([p.detach().cpu().numpy() for p in params], [{**DEFAULTS, **options, "lr": -0.05}] * len(params))
    optimizer = torchlamb.Lamb(params, lr=0.05, **{**options, **case.options})
    for form in (-0.05, torch.tensor(-0.05, dtype=torch.float64), -0.05):
        optimizer.param_groups[0]["lr"] = form
        of_step = grads.pop(0)
        reference.step([grad.cpu().numpy() for grad in of_step])
        run(optimizer, [of_step])
    for p, w in zip(params, reference.params, strict=True):
        torch.testing.assert_close(p.detach().cpu(), torch.from_numpy(w).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_what_rounding_leaves_of_0_is_no_step_with_any_backend(case, monkeypatch):
    """And a small lr that somebody means is one."""
    use(monkeypatch, case)
    params, grads = params_and_grads(1, torch.float32)
    with torch.no_grad():
        params[0].view(-1)[::2] = 1e-30  # which a step of 1e-18 would change
    before = [p.detach().clone() for p in params]
    optimizer = torchlamb.Lamb(params, lr=0.1, **case.options)
    for lr in (-3e-18, 3e-18, torch.tensor(-3e-18), torch.tensor(-3e-18, device=DEVICE), 0.0):
        optimizer.param_groups[0]["lr"] = lr
        run(optimizer, grads)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.param_groups[0]["lr"] = 1e-12
    run(optimizer, grads)
    assert not torch.equal(params[0], before[0])


def test_the_constructor_still_refuses_a_negative_lr():
    params, grads = params_and_grads(1)
    for lr in (-1e-3, -3e-18, torch.tensor(-1.0)):
        with pytest.raises(ValueError, match="lr must be a finite number >= 0"):
            torchlamb.Lamb(params, lr=lr)
        with pytest.raises(ValueError, match="lr must be a finite number >= 0"):
            torchlamb.Lamb([{"params": params, "lr": lr}])
    optimizer = torchlamb.Lamb(params)
    for lr in (float("nan"), float("inf"), "1e-3", None, torch.ones(2)):  # with which no run can go on
        optimizer.param_groups[0]["lr"] = lr
        with pytest.raises((TypeError, ValueError), match="lr"):
            run(optimizer, grads)
        assert not optimizer.state


def test_a_run_that_ended_below_0_is_saved_and_loaded():
    params, grads = params_and_grads(2)
    optimizer = torchlamb.Lamb(params)
    run(optimizer, grads)
    for lr in (-3e-18, -1e-4):
        optimizer.param_groups[0]["lr"] = lr
        other = torchlamb.Lamb(params)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert other.param_groups[0]["lr"] == lr
        run(other, grads)


@pytest.mark.parametrize("lr", [-0.05, 0.05])
def test_the_invariant_holds_of_the_length_of_a_step(lr):
    params, grads = params_and_grads(1)
    optimizer = torchlamb.Lamb(params)
    optimizer.param_groups[0]["lr"] = lr
    for p, grad in zip(params, grads[0], strict=True):
        p.grad = grad
    torchlamb.testing.assert_relative_step(optimizer)


def test_the_mindspore_front_takes_what_a_scheduler_wrote():
    params, grads = params_and_grads(2)
    optimizer = torchlamb.mindspore.nn.Lamb(params, learning_rate=0.01)
    run(optimizer, grads)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = -3e-18
    run(optimizer, grads)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.param_groups[0]["lr"] = -0.01
    run(optimizer, grads)
    assert not torch.equal(params[0], before[0])
