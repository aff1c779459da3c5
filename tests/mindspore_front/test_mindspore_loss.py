"""Rows 10 and 13 of the specification's checklist: loss scales, and the loss; and what is resumed in the middle of an epoch."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from model_cases import (
    CLASSES,
    Recorder,
    assert_same,
    make_data,
    make_model,
    params_of,
    share_of_zeros,
    with_overflow,
)
from torch import Tensor

from torchlamb.mindspore import DynamicLossScaleManager, FixedLossScaleManager, Model, nn

# Row 10: loss scales


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedLossScaleManager(1024.0),
        lambda: FixedLossScaleManager(1024.0, False),
        lambda: DynamicLossScaleManager(2**10),
    ],
    ids=["fixed", "fixed-no-drop", "dynamic"],
)
def test_row10_the_optimizer_sees_unscaled_gradients(make, dtype):
    """A power of two scales exactly."""
    scaled, plain = make_model(dtype=dtype, loss_scale_manager=make()), make_model(dtype=dtype)
    scaled.train(1, make_data())
    plain.train(1, make_data())
    for p, q in zip(params_of(scaled), params_of(plain), strict=True):
        # In float16, products that were subnormal without the scale are not any more.
        torch.testing.assert_close(p, q, rtol=0, atol=0 if dtype != torch.float16 else 2e-3)
    assert scaled.loss_scale_manager.get_loss_scale() == 1024.0


class Faint(torch.nn.Module):
    """A loss whose gradients float16 cannot hold unless they are scaled."""

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, labels) * 1e-7


def test_row10_a_scale_saves_small_gradients():
    grads = {}
    for scale in (None, 2.0**16):
        model = make_model(dtype=torch.float16, loss_scale_manager=scale and FixedLossScaleManager(scale))
        model.loss_fn = Faint()
        model.train(1, make_data(1))
        grads[scale] = model.network.net[0].weight.grad
    assert not grads[None].any()
    assert grads[2.0**16].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "after"),
    [(lambda: FixedLossScaleManager(256.0), 256.0), (lambda: DynamicLossScaleManager(256.0, 2, 4), 128.0)],
    ids=["fixed", "dynamic"],
)
def test_row10_an_overflow_in_the_middle_is_dropped(make, after, dtype):
    schedule = [0.05, 0.04, 0.03, 0.02, 0.01]  # one value less than batches: a dropped step takes none
    model = make_model(dtype=dtype, learning_rate=schedule, loss_scale_manager=make())
    data = with_overflow(dtype)
    model.train(1, data)
    assert model.optimizer.global_step == 5
    assert model.loss_scale_manager.get_loss_scale() == after
    without = make_model(dtype=dtype, learning_rate=schedule, loss_scale_manager=make())
    without.train(1, data[:2])
    if after != 256.0:
        without.loss_scale_manager.scaler.update(after)
    without.train(1, data[3:])
    assert_same(model, without)
    assert all(p.isfinite().all() for p in params_of(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("skip", [False, True])
def test_row10_without_dropping_the_step_is_taken(dtype, skip):
    manager = FixedLossScaleManager(256.0, drop_overflow_update=False)
    model = make_model(dtype=dtype, loss_scale_manager=manager, further={"skip_nonfinite": skip})
    model.train(1, with_overflow(dtype))
    assert model.optimizer.global_step == 6
    assert all(p.isfinite().all() for p in params_of(model)) == skip
    assert manager.get_loss_scale() == 256.0
    steps = {float(state["step"]) for state in model.optimizer.state.values()}
    assert steps == ({5.0} if skip else {6.0})


def test_row10_the_dynamic_scale_grows_and_halves():
    manager = DynamicLossScaleManager(8.0, 4, 3)
    model = make_model(dtype=torch.float16, loss_scale_manager=manager)
    good, bad = make_data(1), with_overflow(torch.float16)[2:3]
    seen = []
    for batches in (good, good, good, good, bad, good, good, good, bad, bad, bad, bad, bad):
        model.train(1, batches)
        seen.append(manager.get_loss_scale())
    assert seen == [8, 8, 32, 32, 8, 8, 8, 32, 8, 2, 1, 1, 1]  # never below 1


def test_row10_a_scale_can_be_resumed():
    manager = DynamicLossScaleManager(8.0, 2, 3)
    make_model(loss_scale_manager=manager).train(1, make_data(2))
    again = DynamicLossScaleManager(1.0)
    again.load_state_dict(manager.state_dict())
    make_model(loss_scale_manager=again).train(1, make_data(1))
    assert again.get_loss_scale() == 16.0  # the third step in a row
    assert copy.deepcopy(manager).get_loss_scale() == 8.0


@pytest.mark.parametrize("make", [FixedLossScaleManager, lambda: FixedLossScaleManager(8.0, False), DynamicLossScaleManager])
def test_row10_after_an_error_the_scale_serves_again(make):
    model = make_model(learning_rate=[0.1, 0.1], loss_scale_manager=make())
    scale = model.loss_scale_manager.get_loss_scale()
    for _ in range(2):
        with pytest.raises(IndexError, match="2 values"):
            model.train(1, make_data(3))
    assert model.loss_scale_manager.get_loss_scale() == scale
    model.optimizer.add_param_group({"params": [("extra", torch.nn.Parameter(torch.ones(2)))], "lr": 0.1})
    model.optimizer.load_state_dict({**model.optimizer.state_dict(), "global_step": 0})
    model.train(1, make_data(1))


def test_row10_a_fixed_scale_that_is_loaded_stays():
    manager = FixedLossScaleManager(128.0)
    manager.load_state_dict(FixedLossScaleManager(1024.0).state_dict())
    make_model(loss_scale_manager=manager).train(1, make_data(2))
    assert manager.get_loss_scale() == 1024.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "manager", [None, FixedLossScaleManager, lambda: FixedLossScaleManager(8.0, False), DynamicLossScaleManager]
)
def test_row15_trains_on_a_gpu(manager):
    model = make_model(loss_scale_manager=manager and manager(), metrics=["accuracy", "loss", share_of_zeros])
    model.network.cuda()
    model.train(5, make_data())
    assert model.eval(make_data())["loss"] < 1.1
    assert model.predict(make_data(1)[0][0]).is_cuda


def test_row10_defaults():
    assert FixedLossScaleManager().get_loss_scale() == 128.0
    assert FixedLossScaleManager().get_drop_overflow_update() is True
    assert FixedLossScaleManager(2, False).get_drop_overflow_update() is False
    assert DynamicLossScaleManager().get_loss_scale() == 2.0**24
    assert DynamicLossScaleManager().get_drop_overflow_update() is True
    assert FixedLossScaleManager(1).get_loss_scale() == 1.0
    scaler = DynamicLossScaleManager().scaler
    assert (scaler.get_growth_interval(), scaler.get_growth_factor(), scaler.get_backoff_factor()) == (2000, 2.0, 0.5)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: FixedLossScaleManager("128"), TypeError, "loss_scale"),
        (lambda: FixedLossScaleManager(True), TypeError, "loss_scale"),
        (lambda: FixedLossScaleManager(0.5), ValueError, "loss_scale.*0.5"),
        (lambda: FixedLossScaleManager(math.inf), ValueError, "loss_scale"),
        (lambda: FixedLossScaleManager(128.0, 1), TypeError, "drop_overflow_update"),
        (lambda: DynamicLossScaleManager(0.5), ValueError, "init_loss_scale"),
        (lambda: DynamicLossScaleManager(scale_factor=1), ValueError, "scale_factor"),
        (lambda: DynamicLossScaleManager(scale_factor="2"), TypeError, "scale_factor"),
        (lambda: DynamicLossScaleManager(scale_window=0), ValueError, "scale_window"),
        (lambda: DynamicLossScaleManager(scale_window=2.0), TypeError, "scale_window"),
        (lambda: FixedLossScaleManager(10**400), ValueError, "loss_scale"),
    ],
)
def test_row10_wrong_arguments(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


def test_row10_gradscaler_decides_whether_to_step():
    """Even where torchlamb.Lamb would take found_inf itself: a dropped step must not take a learning rate."""
    optimizer = make_model().optimizer
    for group in optimizer.param_groups:
        group["fused"] = True
    assert optimizer._step_supports_amp_scaling is False


# Row 13: the loss

LOGITS = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
BY_HAND = torch.tensor([math.log(math.e + math.e**2 + math.e**3) - 3, math.log(3)])


@pytest.mark.parametrize("sparse", [False, True])
def test_row13_reductions(sparse):
    labels = torch.tensor([2, 1])
    for dtype in (torch.int32, torch.int64, torch.uint8) if sparse else (torch.float32, torch.int64, torch.bool, torch.float64):
        given = labels.to(dtype) if sparse else torch.nn.functional.one_hot(labels, CLASSES).to(dtype)
        torch.testing.assert_close(nn.SoftmaxCrossEntropyWithLogits(sparse)(LOGITS, given), BY_HAND)
        torch.testing.assert_close(nn.SoftmaxCrossEntropyWithLogits(sparse, "mean")(LOGITS, given), BY_HAND.mean())
        torch.testing.assert_close(nn.SoftmaxCrossEntropyWithLogits(sparse, reduction="sum")(LOGITS, given), BY_HAND.sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row13_losses_of_half_precision_logits_are_float32(dtype):
    logits = (LOGITS.repeat(2000, 1) * 20).to(dtype)
    labels = torch.tensor([0, 1]).repeat(2000)
    wanted = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    assert wanted > torch.finfo(torch.float16).max
    for sparse, given in ((True, labels), (False, torch.nn.functional.one_hot(labels, CLASSES).to(dtype))):
        loss = nn.SoftmaxCrossEntropyWithLogits(sparse, "sum")(logits, given)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


def test_row13_no_label_is_passed_over():
    for label in (-100, -1, 3):
        with pytest.raises(IndexError, match=f"{label} is out of bounds"):
            nn.SoftmaxCrossEntropyWithLogits(sparse=True)(LOGITS, torch.tensor([0, label]))


def test_row13_labels_may_be_shares():
    shares = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    wanted = torch.tensor([BY_HAND[0] + 0.5, BY_HAND[1]])
    torch.testing.assert_close(nn.SoftmaxCrossEntropyWithLogits()(LOGITS, shares), wanted)
    torch.testing.assert_close(nn.SoftmaxCrossEntropyWithLogits()(LOGITS.double(), shares), wanted.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("sparse", "logits", "labels", "kind", "words"),
    [
        (False, LOGITS, torch.tensor([2, 1]), ValueError, r"\(2, 3\), got \(2,\).*sparse=True"),
        (False, LOGITS, torch.ones(2, 4), ValueError, r"\(2, 3\), got \(2, 4\)"),
        (True, LOGITS, torch.ones(2, 3), ValueError, r"\(2,\), got \(2, 3\).*one-hot"),
        (True, LOGITS, torch.tensor([1]), ValueError, r"\(2,\), got \(1,\)"),
        (True, LOGITS, torch.tensor([1.0, 2.0]), TypeError, "integer dtype"),
        (True, torch.ones(3), torch.tensor(1), ValueError, r"logits.*\(3,\)"),
        (True, LOGITS, torch.tensor([1j, 0j]), TypeError, "integer dtype"),
    ],
)
def test_row13_wrong_tensors(sparse, logits, labels, kind, words):
    with pytest.raises(kind, match=words):
        nn.SoftmaxCrossEntropyWithLogits(sparse)(logits, labels)


def test_row13_wrong_arguments():
    with pytest.raises(TypeError, match="sparse"):
        nn.SoftmaxCrossEntropyWithLogits(1)
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got 'avg'"):
        nn.SoftmaxCrossEntropyWithLogits(reduction="avg")


# Rows 7, 10, 14 together: resuming in the middle of an epoch


@pytest.mark.parametrize("stop_at", [4, 6, 8])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_row14_a_resumed_training_continues_bitwise(how, stop_at):
    def make() -> Model:
        return make_model(
            dtype=torch.float16,
            learning_rate=nn.PolynomialDecayLR(0.1, 0.01, 12, 0.5),
            loss_scale_manager=DynamicLossScaleManager(256.0, 2, 3),
        )

    epoch = with_overflow(torch.float16)
    whole = make()
    whole.train(2, epoch)
    stopped = make()
    stopped.train(2, epoch, Recorder(("step_end", stop_at)))
    if how == "deepcopy":
        resumed = copy.deepcopy(stopped)
    else:
        file = io.BytesIO()
        parts = (stopped.network, stopped.optimizer, stopped.loss_scale_manager)
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        resumed = make()
        for part, state in zip(
            (resumed.network, resumed.optimizer, resumed.loss_scale_manager), torch.load(file, weights_only=True), strict=True
        ):
            part.load_state_dict(state)
    resumed.train(1, (epoch * 2)[stop_at:])
    assert_same(resumed, whole)
    assert resumed.optimizer.global_step == whole.optimizer.global_step == 10  # two steps were dropped
    assert resumed.loss_scale_manager.state_dict() == whole.loss_scale_manager.state_dict()
