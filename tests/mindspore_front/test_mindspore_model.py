"""Row 14 of the specification's checklist: `Model` trains."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from model_cases import (
    Recorder,
    WithLoss,
    as_generator,
    make_data,
    make_model,
    make_net,
    params_of,
)
from torch import Tensor

from torchlamb.mindspore import Callback, Model, nn
from torchlamb.mindspore.train.batches import to_device as _to

# Row 14: training


def plain_training(epochs: int, data: list[tuple[Tensor, Tensor]], reduction: str = "sum") -> torch.nn.Module:
    net = make_net()
    optimizer = nn.Lamb(nn.trainable_params(net), 0.05, weight_decay=0.01)
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y, reduction=reduction).backward()
            optimizer.step()
    return net


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


@pytest.mark.parametrize(("reduction", "followed"), [("none", "sum"), ("sum", "sum"), ("mean", "mean")])
def test_row14_the_gradient_is_that_of_the_sum(reduction, followed):
    """Of a loss per sample. With a smaller last batch, moments of sums and of means are not the same up to a factor."""
    model, uneven = make_model(), [*make_data(), (make_data()[0][0][:3], make_data()[0][1][:3])]
    model.loss_fn = nn.SoftmaxCrossEntropyWithLogits(True, reduction)
    model.train(1, uneven)
    for p, q in zip(params_of(model), plain_training(1, uneven, followed).parameters(), strict=True):
        torch.testing.assert_close(p, q.detach())


def test_row14_without_a_loss_fn_the_network_returns_the_loss():
    net = WithLoss(make_net())
    model = Model(net, optimizer=nn.Lamb(nn.trainable_params(net), 0.05, weight_decay=0.01))
    model.train(2, make_data())
    for p, q in zip(net.parameters(), plain_training(2, make_data(), "mean").parameters(), strict=True):
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
    assert all(loss.shape == (16,) for loss in recorder.losses)
    assert shown == [f"{loss.mean().item():.4g}" for loss in [*recorder.losses, recorder.losses[-1]]]


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
    assert all(loss.shape == (16,) and not loss.requires_grad for loss in first.losses)
    assert len({float(loss.mean()) for loss in first.losses}) == 4


def test_row14_callbacks_are_called_one_after_the_other_and_while_it_trains():
    seen: list[tuple[int, str, int, bool]] = []

    class Look(Callback):
        def __init__(self, number: int) -> None:
            self.number = number

        def _look(self, name: str, run_context: Any) -> None:
            state = run_context.original_args()
            seen.append((self.number, name, int(state.optimizer.global_step), state.network.training))

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
        "Misnamed.on_train_steps_end would never be called",
    ),
    ("eval-dataset", lambda m: m.eval(None), TypeError, "valid_dataset must be an iterable"),
]


class Misnamed(Callback):
    def on_train_steps_end(self, run_context: Any) -> None:
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
        ({"metrics": {"f1"}}, ValueError, r"metrics\['f1'\] must be 'accuracy', 'acc', 'loss', .* a Metric or a callable"),
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
