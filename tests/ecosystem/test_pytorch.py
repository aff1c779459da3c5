"""PyTorch's own tools around an optimizer. torch.amp.GradScaler has tests of its own, in test_scaler.py."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from ecosystem.common import LAMB, assert_same, make_batches, make_model, run_processes, train
from torch.nn.functional import cross_entropy

import torchlamb

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own
def test_compiled_model_and_step():
    torch._dynamo.reset()
    model = make_model()
    wanted = train(model, make_batches())
    compiled = torch.compile(model)
    optimizer = torchlamb.Lamb(model.parameters(), **LAMB)
    step = torch.compile(optimizer.step)
    for x, y in make_batches():
        optimizer.zero_grad()
        cross_entropy(compiled(x), y).backward()
        step()
    assert_same(model, wanted, 1e-5)  # a compiled network rounds its own way


def test_averaged_weights():
    """SWA and EMA keep copies of the parameters, and SWALR writes the lr."""
    from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

    model, batches = make_model(), make_batches()
    optimizer = torchlamb.Lamb(model.parameters(), **LAMB)
    swa, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    scheduler = SWALR(optimizer, swa_lr=0.01, anneal_epochs=4)
    lrs, snapshots = [], []
    for x, y in batches:
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        swa.update_parameters(model)
        ema.update_parameters(model)
        snapshots.append([p.detach().clone() for p in model.parameters()])
    torch.optim.swa_utils.update_bn(batches, swa)
    plain = make_model()
    by_hand = torchlamb.Lamb(plain.parameters(), **LAMB)
    averages = snapshots[0]
    for (x, y), lr, seen in zip(batches, lrs, snapshots, strict=True):
        by_hand.param_groups[0]["lr"] = lr
        by_hand.zero_grad()
        cross_entropy(plain(x), y).backward()
        by_hand.step()
        assert all(torch.equal(p, s) for p, s in zip(plain.parameters(), seen, strict=True))
        averages = [0.5 * a + 0.5 * s for a, s in zip(averages, seen, strict=True)]
    assert lrs[0] == 0.02
    assert lrs[-1] == pytest.approx(0.01)
    for averaged, wanted in ((swa, [torch.stack(list(s)).mean(0) for s in zip(*snapshots, strict=True)]), (ema, averages)):
        for p, w in zip(averaged.module.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-6)


def test_functional_call():
    model = make_model()
    wanted = train(model, make_batches())
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer = torchlamb.Lamb(params.items(), **LAMB)
    for x, y in make_batches():
        loss = cross_entropy(torch.func.functional_call(model, params, (x,)), y)
        for p, grad in zip(params.values(), torch.autograd.grad(loss, params.values()), strict=True):
            p.grad = grad
        optimizer.step()
    for name, p in wanted.named_parameters():
        assert torch.equal(params[name], p)
    assert_same(model, make_model())  # which is untouched


def test_optimizer_in_backward():
    """One optimizer for each parameter, stepped as soon as its gradient is there, which then is freed."""
    model = make_model()
    wanted = train(model, make_batches())
    optimizers = {p: torchlamb.Lamb([p], **LAMB) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for x, y in make_batches():
        cross_entropy(model(x), y).backward()
        assert all(p.grad is None for p in model.parameters())
    assert_same(model, wanted)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:.*TorchScript.*")
def test_apply_optimizer_in_backward():
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = make_model()
    wanted = train(model, make_batches())
    _apply_optimizer_in_backward(torchlamb.Lamb, model.parameters(), LAMB)
    for x, y in make_batches():
        cross_entropy(model(x), y).backward()
    assert_same(model, wanted)


def test_gradient_accumulation():
    """Two micro-batches for each step, as PyTorch's documents have it, are the batch of both."""
    model = make_model()
    batches = make_batches()
    wanted = train(model, [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(batches[::2], batches[1::2])])  # noqa: B905
    got = copy.deepcopy(model)
    optimizer = torchlamb.Lamb(got.parameters(), **LAMB)
    for i, (x, y) in enumerate(batches):
        (cross_entropy(got(x), y) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(got, wanted, 1e-5)  # gradients are summed in another order


@pytest.mark.parametrize("case", ["ddp", "zero"])
def test_two_processes(case):
    run_processes(Path(__file__).with_name("two_processes.py"), 2, case)
