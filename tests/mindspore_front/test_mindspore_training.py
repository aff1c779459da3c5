"""`Model` around networks that step themselves: callbacks of both generations, monitors, evaluation within a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import make_data, make_model, make_net, params_of

from torchlamb.mindspore import Callback, FixedLossScaleManager, LossMonitor, Model, TimeMonitor, dataset, nn


def make_step(**words: Any) -> nn.TrainOneStepCell:
    net = nn.WithLossCell(make_net(), nn.SoftmaxCrossEntropyWithLogits(sparse=True))
    return nn.TrainOneStepCell(net, nn.Lamb(net.trainable_params(), 0.05, weight_decay=0.01), **words)


class Around(nn.Cell):
    """A network around one that steps."""

    def __init__(self, step: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.step = step

    def construct(self, *batch: Any) -> Any:
        return self.step(*batch)


def test_a_network_that_steps_itself_needs_neither_loss_nor_optimizer():
    """And ends where `Model` with both ends."""
    step, model = make_step(), make_model()
    Model(step).train(2, make_data())
    model.train(2, make_data())
    for p, q in zip(step.network.parameters(), model.network.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert step.optimizer.global_step == 12
    around = Around(make_step())
    Model(around).train(1, make_data())
    assert around.step.optimizer.global_step == 6


@pytest.mark.parametrize("wrap", [lambda step: step, Around])
@pytest.mark.parametrize("name", ["optimizer", "loss_fn", "loss_scale_manager"])
def test_two_that_step_are_refused_before_any_step(name, wrap):
    step = make_step()
    before = params_of(Model(step))
    given = {"optimizer": step.optimizer, "loss_fn": torch.nn.CrossEntropyLoss(), "loss_scale_manager": FixedLossScaleManager()}
    with pytest.raises(ValueError, match=f"{name} must not be given beside a network that steps itself"):
        Model(wrap(step), **{name: given[name]})
    assert all(torch.equal(p, q) for p, q in zip(params_of(Model(step)), before, strict=True))
    with pytest.raises(ValueError, match="optimizer must be given to Model with a loss_scale_manager"):
        Model(make_net(), loss_scale_manager=FixedLossScaleManager())
    with pytest.raises(ValueError, match="optimizer must be given to Model in order to train"):
        Model(nn.WithLossCell(make_net(), torch.nn.CrossEntropyLoss())).train(1, make_data())


def test_the_network_that_was_called_last_is_in_training_mode():
    """Also where a callback has evaluated it."""
    step = make_step()
    modes = []
    step.network.register_forward_pre_hook(lambda module, _: modes.append(module.training))

    class Evaluate(Callback):
        def step_end(self, _: Any) -> None:
            step.network.set_train(False)

    Model(step).train(1, make_data(3), Evaluate())
    assert modes == [True] * 3


class Moments(Callback):
    """Of the second generation; keeps what it was called for."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __enter__(self) -> Callback:
        self.seen.append("enter")
        return self

    def __exit__(self, *error: object) -> None:
        self.seen.append("exit")

    def on_train_begin(self, run_context: Any) -> None:
        self.seen.append(("train_begin", run_context.original_args().mode))

    def on_train_step_end(self, run_context: Any) -> None:
        state = run_context.original_args()
        self.seen.append(("step", state.cur_epoch_num, state.cur_step_num, state["net_outputs"].shape))

    def on_train_epoch_end(self, run_context: Any) -> None:
        state = run_context.original_args()
        self.seen.append(
            ("epoch", state.cur_epoch_num, sorted(state.get("metrics", {})), "eval_loss" in state.get("eval_results", {}))
        )

    def on_eval_begin(self, run_context: Any) -> None:
        self.seen.append(("eval_begin", run_context.original_args().mode, run_context.original_args().batch_num))

    def on_eval_step_end(self, run_context: Any) -> None:
        self.seen.append(("eval_step", run_context.original_args().cur_step_num))

    def on_eval_end(self, run_context: Any) -> None:
        self.seen.append(("eval_end", sorted(run_context.original_args().metrics)))

    def on_train_end(self, run_context: Any) -> None:
        self.seen.append(("train_end", run_context.original_args().cur_step_num))


def test_fit_evaluates_between_epochs():
    moments, model = Moments(), make_model(metrics={"accuracy", "loss"})
    model.fit(2, make_data(1), make_data(2, seed=1), valid_frequency=2, callbacks=[moments])
    assert moments.seen == [
        "enter",
        ("train_begin", "train"),
        ("step", 1, 1, (16,)),
        ("epoch", 1, [], False),
        ("step", 2, 2, (16,)),
        ("eval_begin", "eval", 2),
        ("eval_step", 1),
        ("eval_step", 2),
        ("eval_end", ["accuracy", "loss"]),
        ("epoch", 2, ["accuracy", "loss"], True),
        ("train_end", 2),
        "exit",
    ]
    again = Moments()
    model.fit(3, make_data(1), make_data(1), valid_frequency=[1, 3], callbacks=again)
    assert [entry[1] for entry in again.seen if entry[0] == "epoch" and entry[2]] == [1, 3]
    assert model.eval(make_data(1), callbacks=again) == pytest.approx(model.eval(make_data(1)))
    with pytest.raises(ValueError, match="metrics must be given"):
        make_model().fit(1, make_data(1), make_data(1))
    with pytest.raises(ValueError, match="valid_frequency must be an int >= 1"):
        model.fit(1, make_data(1), make_data(1), 0)


def test_old_names_are_called_in_evaluations_too():
    calls = []

    class Old(Callback):
        def step_end(self, run_context: Any) -> None:
            calls.append(run_context.original_args().mode)

    model = make_model(metrics="accuracy")
    model.fit(1, make_data(2), make_data(1), callbacks=Old())
    assert calls == ["train", "train", "eval"]


def test_callbacks_leave_after_an_error():
    class Raises(Callback):
        def step_end(self, _: Any) -> None:
            raise KeyError("stop")

    moments = Moments()
    with pytest.raises(KeyError):
        make_model().train(1, make_data(1), [moments, Raises()])
    assert moments.seen[-1] == "exit"


def test_what_callbacks_find():
    class Look(Callback):
        def step_end(self, run_context: Any) -> None:
            self.state = run_context.original_args()
            self.state.own = 3

    look, model = Look(), make_model(loss_scale_manager=FixedLossScaleManager(8.0))
    model.train(1, make_data(2), look)
    state = look.state
    loss, overflow, scale = state.net_outputs
    assert (loss.shape, overflow.item(), scale.item()) == ((16,), False, 8.0)
    assert state.train_network.network is model.network
    assert state.train_network.optimizer is state.optimizer is model.optimizer
    assert (state.get("own"), "mode" in state, state.list_callback) == (3, True, [look])
    assert not hasattr(state, "nothing")
    with pytest.raises(AttributeError, match="there is no 'nothing' here"):
        state.nothing  # noqa: B018


# How many steps


def test_sink_size_is_the_length_of_an_epoch():
    """Scripts divide their epochs by it: ignored, it would train that much longer. The dataset goes on from epoch to epoch."""
    seen, model, twin = [], make_model(), make_model()

    class Look(Callback):
        def epoch_end(self, run_context: Any) -> None:
            state = run_context.original_args()
            seen.append((state.cur_epoch_num, state.cur_step_num, state.batch_num))

    data = make_data(3)
    model.train(2, data, Look(), dataset_sink_mode=True, sink_size=2)
    assert seen == [(1, 2, 2), (2, 4, 2)]
    twin.train(1, [*data, data[0]])
    for p, q in zip(params_of(model), params_of(twin), strict=True):
        assert torch.equal(p, q)
    seen.clear()
    model.train(1, data, Look(), dataset_sink_mode=True)
    model.train(1, data, Look(), dataset_sink_mode=False, sink_size=2)
    assert seen == [(1, 3, 3), (1, 3, 3)]
    for wrong, kind in ((0, ValueError), (-2, ValueError), (1.0, TypeError)):
        with pytest.raises(kind, match="sink_size must be an int >= 1"):
            model.train(1, data, sink_size=wrong)


def test_initial_epoch_is_the_number_of_epochs_before():
    seen, model = [], make_model()

    class Look(Callback):
        def epoch_end(self, run_context: Any) -> None:
            seen.append((run_context.original_args().cur_epoch_num, run_context.original_args().epoch_num))

    model.train(4, make_data(1), Look(), initial_epoch=2)
    assert seen == [(3, 2), (4, 2)]
    for wrong, kind in ((4, ValueError), (-1, ValueError), ("0", TypeError)):
        with pytest.raises(kind, match="initial_epoch must be an int >= 0"):
            model.train(4, make_data(1), initial_epoch=wrong)


# Monitors


def test_the_loss_monitor_prints_and_ends_at_nan(capsys):
    model = make_model()
    model.train(2, make_data(4), LossMonitor(3))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(", loss is ")[0] for line in lines] == ["epoch: 1 step: 3", "epoch: 2 step: 2"]
    assert all(0 < float(line.partition(", loss is ")[2]) < 10 for line in lines)
    make_model().train(1, make_data(2), LossMonitor(0))
    assert capsys.readouterr().out == ""
    bad = [(torch.full((16, 4), torch.nan), make_data(1)[0][1])]
    with pytest.raises(ValueError, match="the loss is nan in epoch 1, step 2"):
        make_model().train(1, make_data(1) + bad, LossMonitor(0))
    make_model(metrics="accuracy").fit(1, make_data(1), make_data(1), callbacks=LossMonitor())
    assert "Eval result: epoch 1, metrics: {'accuracy': " in capsys.readouterr().out
    for wrong, kind in ((-1, ValueError), (1.5, TypeError), (False, TypeError)):
        with pytest.raises(kind, match="per_print_times"):
            LossMonitor(wrong)


def test_the_time_monitor_prints(capsys):
    model = make_model()
    model.train(1, make_data(2), [TimeMonitor()])
    model.train(1, lambda: iter(make_data(2)), [TimeMonitor(2)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("Train epoch time: ") and ", per step time: " in line for line in lines)
    with pytest.raises(ValueError, match="data_size must be given where the dataset has no length"):
        model.train(1, lambda: iter(make_data(2)), [TimeMonitor()])
    with pytest.raises(ValueError, match="data_size"):
        TimeMonitor(0)


# Evaluation


class Sums(nn.Metric):
    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.total, self.batches = 0.0, 0

    def update(self, *inputs: Any) -> None:
        assert len(inputs) == 2
        self.total += float(self._convert_data(inputs[0]).sum() - self._convert_data(inputs[1]).sum())
        self.batches += 1

    def eval(self) -> float:
        return self.total / self.batches


class Both(nn.Cell):
    def construct(self, data: Any, labels: Any) -> Any:
        return data.sum(), labels.sum()


def test_eval_network_gives_metrics_all_it_returns():
    step, metric = make_step(), Sums()
    model = Model(step, eval_network=Both(), metrics={"sums": metric})
    wanted = sum(float(x.sum() - y.sum()) for x, y in make_data(2)) / 2
    for _ in range(2):  # it is cleared each time
        assert model.eval(make_data(2), dataset_sink_mode=True)["sums"] == pytest.approx(wanted)
    net, loss = make_net(), nn.SoftmaxCrossEntropyWithLogits(sparse=True)
    plain = Model(net, loss, metrics=["accuracy", "loss"]).eval(make_data(2))
    metrics = {"Top_1_Accuracy": nn.Top1CategoricalAccuracy(), "loss": nn.Loss()}
    indexed = Model(step, eval_network=nn.WithEvalCell(net, loss), metrics=metrics, eval_indexes=[0, 1, 2]).eval(make_data(2))
    assert indexed["Top_1_Accuracy"] == plain["accuracy"]
    assert indexed["loss"] == pytest.approx(plain["loss"])
    for wrong in ([0, 1], (0, 1, 2)):
        with pytest.raises(ValueError, match="eval_indexes must be a list of three ints"):
            Model(step, eval_network=Both(), eval_indexes=wrong)
    with pytest.raises(ValueError, match="eval_network returned 2 values"):
        Model(step, eval_network=Both(), metrics=metrics, eval_indexes=[0, 1, 2]).eval(make_data(2))
    with pytest.raises(TypeError, match="eval_network must be"):
        Model(step, eval_network=print)


def test_metric_objects_beside_a_loss():
    model = make_model(metrics={"acc": nn.Accuracy(), "mean": nn.Loss(), "sums": Sums(), "five": nn.TopKCategoricalAccuracy(2)})
    found = model.eval(make_data(2))
    assert found["mean"] == pytest.approx(make_model(metrics="loss").eval(make_data(2))["loss"])
    assert found["acc"] <= found["five"] <= 1


def test_words_that_do_nothing_are_accepted():
    words = {"amp_level": "O2", "boost_level": "O1", "keep_batchnorm_fp32": False, "boost_config_dict": {}}
    make_model(**words).train(1, make_data(1))
    with pytest.raises(TypeError, match="Model takes no argument 'optimiser'"):
        Model(make_net(), optimiser=3)


# Datasets with MindSpore's words


def test_datasets_of_rows():
    rows = [(torch.full((2,), float(i)), i) for i in range(5)]
    data = dataset.GeneratorDataset(rows, ["data", "label"], shuffle=False)
    batched = data.map(lambda x: x + 1, "data").batch(2)
    assert (batched.get_dataset_size(), data.batch(2, drop_remainder=True).get_dataset_size()) == (3, 2)
    assert [d["label"].tolist() for d in batched.create_dict_iterator(num_epochs=1)] == [[0, 1], [2, 3], [4]]
    assert next(x.tolist() for x, _ in batched.create_tuple_iterator(output_numpy=True)) == [[1, 1], [2, 2]]
    assert data.repeat(2).get_dataset_size() == 10
    assert sorted(int(y) for _, y in data.shuffle(4)) == list(range(5))
    assert dataset.GeneratorDataset(lambda: iter(rows), ["a", "b"]).batch(2).get_dataset_size() == 3
    slices = dataset.NumpySlicesDataset({"x": [[1.0], [2.0]], "y": [0, 1]}, shuffle=False)
    assert slices.get_col_names() == ["x", "y"]
    for wrong, kind in ((lambda: data.batch(0), ValueError), (lambda: data.repeat(-1), ValueError),
                        (lambda: dataset.GeneratorDataset(3), TypeError), (lambda: data.map(print, "image"), ValueError),
                        (lambda: dataset.NumpySlicesDataset(([1], [1, 2])), ValueError)):  # fmt: skip
        with pytest.raises(kind):
            wrong()
    seen = []

    class Look(Callback):
        def step_end(self, run_context: Any) -> None:
            seen.append(run_context.original_args().batch_num)

    rows = [(x, y) for xs, ys in make_data(2) for x, y in zip(xs, ys, strict=True)]
    model, twin = make_model(), make_model()
    model.train(1, dataset.GeneratorDataset(rows, ["x", "y"], shuffle=False).batch(16), Look())
    twin.train(1, make_data(2))
    assert seen == [2, 2]
    for p, q in zip(params_of(model), params_of(twin), strict=True):
        assert torch.equal(p, q)
