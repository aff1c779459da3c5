"""Rows 10, 13 and 14 of the specification's checklist: loss scales, the loss, and `Model`."""

from __future__ import annotations

import copy
import io
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from torchlamb.mindspore import Callback, DynamicLossScaleManager, FixedLossScaleManager, Model, nn
from torchlamb.mindspore.model import _to

CLASSES = 3


def make_net(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, CLASSES))


def make_data(batches: int = 6, batch_size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Points labelled by the largest of their first three coordinates."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn((batches, batch_size, 4), generator=generator)
    return [(data, data[:, :CLASSES].argmax(dim=1)) for data in points]


class Autocast(torch.nn.Module):
    """A network that computes in low precision, as a user would write it."""

    def __init__(self, net: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            return self.net(x)


def make_model(seed: int = 0, dtype: torch.dtype | None = None, learning_rate: Any = 0.05, **keywords: Any) -> Model:
    net = make_net(seed) if dtype is None else Autocast(make_net(seed), dtype)
    further = keywords.pop("further", {})
    optimizer = nn.Lamb(nn.trainable_params(net), learning_rate, weight_decay=0.01, **further)
    return Model(net, nn.SoftmaxCrossEntropyWithLogits(sparse=True), optimizer, **keywords)


def params_of(model: Model) -> list[Tensor]:
    return [p.detach().clone() for p in model.network.parameters()]


def assert_same(first: Model, second: Model) -> None:
    assert all(torch.equal(p, q) for p, q in zip(params_of(first), params_of(second), strict=True))


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


def with_overflow(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The third of six batches is too large for the dtype's forward or backward pass."""
    data = make_data()
    data[2] = (torch.full((16, 4), 3e38 if dtype != torch.float16 else 3e5), data[2][1])
    return data


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


# Row 14: training


def plain_training(epochs: int, data: list[tuple[Tensor, Tensor]]) -> torch.nn.Module:
    net = make_net()
    optimizer = nn.Lamb(nn.trainable_params(net), 0.05, weight_decay=0.01)
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net


def as_generator() -> Any:
    yield from make_data()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return as_generator()


DATASETS = {
    "list": make_data,
    "loader": lambda: torch.utils.data.DataLoader(make_data(), batch_size=None),
    "batching-loader": lambda: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.cat, zip(*make_data(), strict=True))), batch_size=16
    ),
    "generator-function": lambda: as_generator,
    "loader-without-length": lambda: torch.utils.data.DataLoader(Stream(), batch_size=None),
    "lists": lambda: [list(batch) for batch in make_data()],
}


@pytest.mark.parametrize("name", DATASETS)
def test_row14_train_equals_a_plain_loop(name):
    model = make_model()
    assert model.train(2, DATASETS[name]()) is None
    for p, q in zip(model.network.parameters(), plain_training(2, make_data()).parameters(), strict=True):
        assert torch.equal(p, q)
    assert model.optimizer.global_step == 12


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_row14_a_loss_per_sample_is_averaged(reduction):
    model, wanted = make_model(), make_model()
    model.loss_fn = nn.SoftmaxCrossEntropyWithLogits(True, reduction)
    model.train(1, make_data())
    wanted.train(1, make_data())
    for p, q in zip(params_of(model), params_of(wanted), strict=True):
        torch.testing.assert_close(p, q)


class WithLoss(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, data: Tensor, label: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(self.net(data), label)


def test_row14_without_a_loss_fn_the_network_returns_the_loss():
    net = WithLoss(make_net())
    model = Model(net, optimizer=nn.Lamb(nn.trainable_params(net), 0.05, weight_decay=0.01))
    model.train(2, make_data())
    for p, q in zip(net.parameters(), plain_training(2, make_data()).parameters(), strict=True):
        assert torch.equal(p, q)


class Own(torch.nn.Module):
    """Returns its loss of any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, *inputs: Tensor) -> Tensor:
        return sum((self.weight * x).sum() for x in inputs)


@pytest.mark.parametrize("batch", [torch.ones(2), [torch.ones(2)] * 3, (torch.ones(2),) * 3])
def test_row14_without_a_loss_fn_batches_may_have_any_length(batch):
    net = Own()
    model = Model(net, optimizer=torch.optim.SGD(net.parameters(), 0.5))
    model.train(1, [batch])
    assert torch.equal(net.weight, torch.full((2,), 1 - 0.5 * (len(batch) if not isinstance(batch, Tensor) else 1)))


class Seen(torch.nn.Module):
    """Has a parameter on another device, and keeps where its inputs were."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.devices = torch.nn.Parameter(torch.ones(1, device="meta")), []

    def forward(self, *inputs: Tensor) -> Tensor:
        self.devices += [x.device.type for x in inputs]
        raise KeyError("seen")


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.predict(torch.ones(2)),
        lambda model: model.eval([(torch.ones(2), torch.ones(2))]),
        lambda model: model.train(1, [(torch.ones(2), torch.ones(2))]),
    ],
)
def test_row14_batches_are_moved_to_the_network(call):
    net = Seen()
    with pytest.raises(KeyError, match="seen"):
        call(Model(net, torch.nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters()), metrics="accuracy"))
    assert net.devices == ["meta"]
    assert torch.equal(Model(torch.nn.Identity()).predict(torch.ones(2)), torch.ones(2))  # one without parameters


def test_row14_any_torch_optimizer_trains():
    net = make_net()
    model = Model(net, torch.nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.5), metrics="accuracy")
    before = model.eval(make_data())["accuracy"]
    model.train(20, make_data())
    assert model.eval(make_data())["accuracy"] > max(before, 0.9)


def test_row14_the_bar_shows_epoch_steps_and_loss(capsys):
    make_model().train(2, make_data())
    shown = capsys.readouterr().err
    assert "epoch 1/2: 100%" in shown
    assert "epoch 2/2: 100%" in shown
    assert "6/6" in shown
    assert "loss=" in shown
    make_model().train(1, as_generator)
    assert "6step" in capsys.readouterr().err.replace(" ", "")  # no length, no percentage


def test_row14_the_bar_shows_the_loss_of_the_step_it_is_drawn_at(monkeypatch):
    shown = []

    class Bar:
        def __init__(self, **_: Any) -> None:
            pass

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self) -> bool:
            return True

        def set_postfix(self, loss: str) -> None:
            shown.append(loss)

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    recorder = Recorder()
    make_model().train(1, make_data(3), recorder)
    assert shown == [f"{loss.item():.4g}" for loss in [*recorder.losses, recorder.losses[-1]]]


class Recorder(Callback):
    def __init__(self, stop_at: tuple[str, int] = ("", 0)) -> None:
        self.events, self.stop_at, self.losses = [], stop_at, []

    def _record(self, name: str, run_context: Any) -> None:
        state = run_context.original_args()
        self.events.append((name, state.cur_epoch_num, state.cur_step_num))
        if (name, state.cur_step_num) == self.stop_at:
            assert not run_context.get_stop_requested()
            run_context.request_stop()

    def begin(self, run_context: Any) -> None:
        self._record("begin", run_context)

    def epoch_begin(self, run_context: Any) -> None:
        self._record("epoch_begin", run_context)

    def step_begin(self, run_context: Any) -> None:
        self._record("step_begin", run_context)

    def step_end(self, run_context: Any) -> None:
        self.losses.append(run_context.original_args().net_outputs)
        self._record("step_end", run_context)

    def epoch_end(self, run_context: Any) -> None:
        self._record("epoch_end", run_context)

    def end(self, run_context: Any) -> None:
        self._record("end", run_context)


def test_row14_callbacks_are_called_in_order():
    first, second = Recorder(), Recorder()
    model = make_model()
    model.train(2, make_data(2), callbacks=[first, second])
    epochs = [
        [
            ("epoch_begin", e, s),
            *[("step_begin", e, s + 1), ("step_end", e, s + 1), ("step_begin", e, s + 2), ("step_end", e, s + 2)],
            ("epoch_end", e, s + 2),
        ]
        for e, s in ((1, 0), (2, 2))
    ]
    assert first.events == [("begin", 0, 0), *epochs[0], *epochs[1], ("end", 2, 4)]
    assert second.events == first.events
    assert all(loss.dim() == 0 and not loss.requires_grad for loss in first.losses)
    assert len({float(loss) for loss in first.losses}) == 4


def test_row14_callbacks_are_called_one_after_the_other_and_while_it_trains():
    seen: list[tuple[int, str, int, bool]] = []

    class Look(Callback):
        def __init__(self, number: int) -> None:
            self.number = number

        def _look(self, name: str, run_context: Any) -> None:
            state = run_context.original_args()
            seen.append((self.number, name, state.optimizer.global_step, state.network.training))

        def step_begin(self, run_context: Any) -> None:
            self._look("step_begin", run_context)

        def end(self, run_context: Any) -> None:
            self._look("end", run_context)

    model = make_model()
    model.network.eval()
    model.train(1, make_data(2), [Look(1), Look(2)])
    events = [("step_begin", 0, True), ("step_begin", 1, True), ("end", 2, True)]
    assert seen == [(number, *event) for event in events for number in (1, 2)]


def test_row14_callbacks_see_the_training():
    class Look(Callback):
        def begin(self, run_context: Any) -> None:
            self.state = run_context.original_args()

    look, model, data = Look(), make_model(), make_data()
    model.train(3, data, look)
    assert (look.state.epoch_num, look.state.batch_num) == (3, 6)
    assert look.state.network is model.network
    assert look.state.optimizer is model.optimizer
    assert look.state.loss_fn is model.loss_fn
    assert look.state.train_dataset is data
    model.train(1, as_generator, look)
    assert look.state.batch_num is None


@pytest.mark.parametrize(
    ("stop_at", "steps", "epochs"),
    [(("step_end", 3), 3, 1), (("step_end", 9), 9, 2), (("epoch_end", 6), 6, 1), (("step_begin", 2), 2, 1)],
)
def test_row14_callbacks_can_stop(stop_at, steps, epochs):
    recorder, model = Recorder(stop_at), make_model()
    model.train(5, make_data(), recorder)
    assert model.optimizer.global_step == steps
    assert recorder.events[-2:] == [("epoch_end", epochs, steps), ("end", epochs, steps)]


def test_row14_modes_are_put_back():
    model = make_model(metrics="accuracy")
    frozen = model.network[1].eval()
    modes = []
    model.network.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    model.train(1, make_data(1))
    assert (model.network.training, frozen.training) == (True, False)
    model.network.eval()
    model.train(1, make_data(1))
    assert not model.network.training
    model.network.train()
    model.eval(make_data(1))
    model.predict(make_data(1)[0][0])
    assert model.network.training
    assert modes == [(True, True)] * 2 + [(False, False)] * 2
    with pytest.raises(ValueError, match=r"batches \(data, label\), got int"):
        model.eval([3])
    assert model.network.training
    shared = torch.nn.Dropout()
    net = torch.nn.Sequential(torch.nn.Sequential(shared), torch.nn.Sequential(shared))
    shared.eval()
    Model(net).predict(torch.ones(2))
    assert net[1].training
    assert not shared.training


# Row 14: what a dataset may be


def test_row14_a_generator_serves_one_epoch():
    model = make_model()
    model.train(1, as_generator())
    assert model.optimizer.global_step == 6


def test_row14_an_exhausted_generator_says_so():
    model = make_model(metrics="accuracy")
    before = params_of(model)
    generator = as_generator()
    with pytest.raises(
        ValueError, match=r"train_dataset is a generator, which is exhausted after one of 2 epochs.*without calling it"
    ):
        model.train(2, generator)
    assert all(torch.equal(p, old) for p, old in zip(params_of(model), before, strict=True))
    assert len(list(generator)) == 6  # untouched
    for used_up in (generator, iter([]), []):
        with pytest.raises(ValueError, match=r"train_dataset gave no batches.*exhausted"):
            model.train(1, used_up)
        with pytest.raises(ValueError, match=r"valid_dataset gave no batches.*exhausted"):
            model.eval(used_up)
    with pytest.raises(ValueError, match="exhausted"):
        model.train(2, iter(make_data()))  # found out in the second epoch
    assert model.optimizer.global_step == 6


@pytest.mark.parametrize("batch", [torch.ones(2, 4), (torch.ones(2, 4),), {"data": 1}, (1, 2, 3)])
def test_row14_batches_are_pairs(batch):
    model = make_model(metrics="accuracy")
    for call in (lambda data: model.train(1, data), model.eval):
        with pytest.raises(ValueError, match=r"_dataset must give batches \(data, label\)"):
            call([batch])


def test_row14_batches_are_moved_whatever_holds_them():
    x = torch.ones(2)
    moved = _to({"a": [x, (x, "text")], "b": 3}, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].is_meta
    assert (moved["a"][1][1], moved["b"]) == ("text", 3)
    pair = _to(nn.NamedParameter("w", x), torch.device("meta"))
    assert pair.name == "w"
    assert pair.parameter.is_meta
    assert _to(x, None) is x


WRONG_CALLS: list[tuple[str, Any, type[Exception], str]] = [
    ("epoch-type", lambda m: m.train(1.0, make_data()), TypeError, "epoch must be an int >= 1, got 1.0"),
    ("epoch-bool", lambda m: m.train(True, make_data()), TypeError, "epoch"),
    ("epoch-zero", lambda m: m.train(0, make_data()), ValueError, "epoch must be an int >= 1, got 0"),
    ("no-dataset", lambda m: m.train(1, None), TypeError, "train_dataset must be an iterable"),
    ("tensor", lambda m: m.train(1, torch.ones(2)), TypeError, "train_dataset must be an iterable"),
    ("callback", lambda m: m.train(1, make_data(), [print]), TypeError, "callbacks must be a Callback"),
    ("callback-alone", lambda m: m.train(1, make_data(), 3), TypeError, "callbacks must be a Callback"),
    (
        "callback-name",
        lambda m: m.train(1, make_data(), Misnamed()),
        TypeError,
        "Misnamed.on_train_step_end would never be called",
    ),
    ("eval-dataset", lambda m: m.eval(None), TypeError, "valid_dataset must be an iterable"),
]


class Misnamed(Callback):
    def on_train_step_end(self, run_context: Any) -> None:
        pass


def test_row14_a_wrong_dataset_is_found_before_callbacks_run():
    for dataset in (None, "ab"):
        recorder = Recorder()
        with pytest.raises(TypeError, match="train_dataset must be an iterable"):
            make_model().train(1, dataset, recorder)
        assert recorder.events == []


@pytest.mark.parametrize(("call", "kind", "words"), [case[1:] for case in WRONG_CALLS], ids=[case[0] for case in WRONG_CALLS])
def test_row14_wrong_calls_change_nothing(call, kind, words):
    model = make_model(metrics="accuracy")
    before = params_of(model)
    with pytest.raises(kind, match=words):
        call(model)
    assert all(torch.equal(p, old) for p, old in zip(params_of(model), before, strict=True))
    assert model.optimizer.global_step == 0


@pytest.mark.parametrize(
    ("keywords", "kind", "words"),
    [
        ({"network": print}, TypeError, "network must be a torch.nn.Module"),
        ({"loss_fn": "cross entropy"}, TypeError, "loss_fn must be a callable"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be a torch.optim.Optimizer"),
        ({"loss_scale_manager": 128.0}, TypeError, "loss_scale_manager must be"),
        ({"metrics": 3}, TypeError, "metrics must be"),
        ({"metrics": [3]}, TypeError, "metrics"),
        ({"metrics": {"acc": None}}, TypeError, r"metrics\['acc'\]"),
        ({"metrics": {"f1"}}, ValueError, r"metrics\['f1'\] must be 'accuracy' \(or 'acc'\), 'loss' or a callable"),
        ({"metrics": [lambda *_: 1, lambda *_: 2]}, ValueError, "two of one name"),
    ],
)
def test_row14_wrong_models(keywords, kind, words):
    with pytest.raises(kind, match=words):
        Model(**{"network": make_net(), **keywords})


def test_row14_what_is_missing_is_named():
    net, data = make_net(), make_data()
    with pytest.raises(ValueError, match="optimizer must be given"):
        Model(net, torch.nn.CrossEntropyLoss()).train(1, data)
    with pytest.raises(ValueError, match="metrics must be given"):
        Model(net, torch.nn.CrossEntropyLoss()).eval(data)
    with pytest.raises(ValueError, match="loss_fn must be given"):
        Model(net, metrics={"loss"}).eval(data)
    with pytest.raises(TypeError, match="the loss must be a tensor"):
        Model(net, lambda *_: 1.0, torch.optim.SGD(net.parameters())).train(1, data)


def test_row14_a_missing_progress_bar_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ModuleNotFoundError, match=r"tqdm: pip install 'torchlamb\[mindspore\]'"):
        make_model().train(1, make_data())


# Row 14: evaluation and prediction


def uneven() -> list[tuple[Tensor, Tensor]]:
    data, labels = map(torch.cat, zip(*make_data(), strict=True))
    return list(zip(data.split([50, 1, 45]), labels.split([50, 1, 45]), strict=True))


def share_of_zeros(outputs: Tensor, labels: Tensor) -> float:
    assert outputs.shape == (96, CLASSES)
    return (labels == 0).float().mean().item()


@pytest.mark.parametrize("dataset", [make_data, uneven, lambda: as_generator])
def test_row14_metrics_are_of_the_whole_dataset(dataset):
    model = make_model(metrics=["accuracy", "loss", share_of_zeros])
    model.train(1, make_data())
    data, labels = map(torch.cat, zip(*make_data(), strict=True))
    with torch.no_grad():
        outputs = model.network(data)
    values = model.eval(dataset())
    assert list(values) == ["accuracy", "loss", "share_of_zeros"]
    assert values["accuracy"] == (outputs.argmax(1) == labels).double().mean().item()
    assert values["loss"] == pytest.approx(torch.nn.functional.cross_entropy(outputs, labels).item(), rel=1e-5)
    assert values["share_of_zeros"] == pytest.approx((labels == 0).double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_row14_forms_of_metrics(reduction):
    net = make_net()
    loss = nn.SoftmaxCrossEntropyWithLogits(reduction=reduction)
    one_hot = [(x, torch.nn.functional.one_hot(y, CLASSES).float()) for x, y in make_data()]
    wanted = Model(net, torch.nn.CrossEntropyLoss(), metrics={"accuracy", "loss"}).eval(make_data())
    for metrics, names in [
        ("accuracy", ["accuracy"]),
        ({"top": "accuracy", "cost": "loss"}, ["top", "cost"]),
        ((x for x in ["loss", "accuracy"]), ["loss", "accuracy"]),
        ({"count": lambda outputs, _: len(outputs)}, ["count"]),
        (share_of_zeros, ["share_of_zeros"]),
    ]:
        values = Model(net, loss, metrics=metrics).eval(one_hot)
        assert list(values) == names
        assert values.get("accuracy", wanted["accuracy"]) == wanted["accuracy"]
        assert values.get("cost", values.get("loss", wanted["loss"])) == pytest.approx(wanted["loss"], rel=1e-6)
        assert values.get("count", 96) == 96


def test_row14_metrics_that_need_no_loss_take_none():
    def fail(*_: Any) -> None:
        raise AssertionError("called")

    metrics = {"a": "accuracy"}
    model = Model(make_net(), fail, metrics=metrics)
    metrics["b"] = "f1"  # the model has its own copy
    assert list(model.eval(make_data())) == ["a"]


def test_row14_accuracy_of_labels_with_more_dims():
    labels = torch.tensor([[0, 1], [2, 0]])
    outputs = torch.nn.functional.one_hot(labels, 3).float()
    assert Model(torch.nn.Identity(), metrics="accuracy").eval([(outputs, labels)]) == {"accuracy": 1.0}


def test_row14_accuracy_of_one_hot_rows_of_any_dtype():
    net = torch.nn.Identity()
    outputs, labels = torch.eye(3), torch.eye(3)[[0, 2, 2]]
    for dtype in (torch.bool, torch.int64, torch.float32, torch.bfloat16):
        assert Model(net, metrics="acc").eval([(outputs, labels.to(dtype))]) == {"acc": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("outputs", "labels"), [((4, 3), (4, 1)), ((4, 1), (4, 1)), ((4, 3), (1,)), ((4, 3), (4, 2)), ((4,), (4,))]
)
def test_row14_accuracy_refuses_what_it_would_get_wrong(outputs, labels):
    with pytest.raises(ValueError, match="accuracy takes outputs"):
        Model(torch.nn.Identity(), metrics="accuracy").eval([(torch.ones(outputs), torch.ones(labels, dtype=torch.int64))])


def test_row14_predict():
    model = make_model()
    x = make_data(1)[0][0]
    outputs = model.predict(x)
    assert not outputs.requires_grad
    assert torch.equal(outputs, model.network(x))
    assert Model(WithLoss(make_net())).predict(*make_data(1)[0]).dim() == 0


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
