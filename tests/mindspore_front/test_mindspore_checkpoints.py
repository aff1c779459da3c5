"""Checkpoints by name: what is written, kept and loaded, and that a failure leaves what was there."""

from __future__ import annotations

import builtins
import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import Recorder, make_data, make_model, make_net, params_of

from torchlamb.mindspore import (
    Callback,
    CheckpointConfig,
    Model,
    ModelCheckpoint,
    Parameter,
    Tensor,
    load_checkpoint,
    load_param_into_net,
    nn,
    ops,
    save_checkpoint,
)


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def make_step(rate: Any = 0.05, **words: Any) -> nn.TrainOneStepWithLossScaleCell:
    net = nn.WithLossCell(make_net(), nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean"))
    optimizer = nn.Lamb(net.trainable_params(), rate, weight_decay=0.01, **words)
    return nn.TrainOneStepWithLossScaleCell(net, optimizer, nn.DynamicLossScaleUpdateCell(2**10, 2, 3))


def assert_same_step(first: Any, second: Any) -> None:
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    assert first.optimizer.global_step == second.optimizer.global_step
    for p, q in zip(first.optimizer.parameters, second.optimizer.parameters, strict=True):
        states = first.optimizer.state[p.parameter], second.optimizer.state[q.parameter]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("at", [1, 4, 6])
@pytest.mark.parametrize("rate", [0.1, nn.PolynomialDecayLR(0.1, 0.01, 12, 0.5), [0.1 / (i + 1) for i in range(12)]], ids=type)
def test_a_training_goes_on_from_its_checkpoint_bitwise(at, rate, tmp_path):
    whole, stopped, resumed = (make_step(rate) for _ in range(3))
    Model(whole).train(1, make_data(8))
    Model(stopped).train(
        1, make_data(8), [Recorder(("step_end", at)), ModelCheckpoint("run", str(tmp_path), CheckpointConfig(100))]
    )
    assert names_in(tmp_path) == [f"run-1_{at}.ckpt"]
    saved = load_checkpoint(tmp_path / f"run-1_{at}.ckpt")
    assert load_param_into_net(resumed, saved) == ([], [])
    Model(resumed).train(1, make_data(8)[at:])
    assert_same_step(resumed, whole)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))], ids=["deepcopy", "pickle"])
def test_copies_of_a_cell_that_steps_go_on_alike(again):
    step = make_step([0.1, 0.05, 0.02, 0.01])
    step.relu = ops.relu  # as scripts keep functions
    Model(step).train(1, make_data(2))
    copied = again(step)
    assert copied.weights[0].parameter is next(copied.network.parameters())
    for model in (step, copied):
        Model(model).train(1, make_data(2, seed=1))
    assert_same_step(copied, step)


def test_names_in_a_file_are_those_of_the_original(tmp_path):
    step = make_step()
    Model(step).train(1, make_data(2))
    save_checkpoint(step, str(tmp_path / "step"))
    saved = load_checkpoint(str(tmp_path / "step.ckpt"))
    own = ["0.weight", "0.bias", "1.gamma", "1.beta", "3.weight", "3.bias"]
    assert {name for name in saved if not name.startswith("lamb_")} == {
        *own, "scale_sense", "current_iterator_step", "last_overflow_iterator_step", "global_step", "learning_rate",
    }  # fmt: skip
    assert {f"{kind}.{name}" for kind in ("lamb_m", "lamb_v") for name in own} <= saved.keys()
    assert all(isinstance(value, Parameter) and value.name == name for name, value in saved.items())
    assert saved["global_step"].asnumpy().tolist() == [2]
    net, optimizer = make_net(), None
    optimizer = nn.Lamb(nn.trainable_params(net), 0.3)
    assert load_param_into_net(net, saved)[0] == []
    assert load_param_into_net(optimizer, saved)[0] == []
    assert (optimizer.global_step, optimizer.param_groups[0]["lr"]) == (2, 0.05)
    assert torch.equal(
        optimizer.state[net[0].weight]["exp_avg"], step.optimizer.state[step.network._backbone[0].weight]["exp_avg"]
    )
    save_checkpoint(optimizer, tmp_path / "optimizer.ckpt")
    assert not any(name in own for name in load_checkpoint(tmp_path / "optimizer.ckpt"))


def test_running_statistics_are_saved(tmp_path):
    def make() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))

    net, other = make(), make()
    net(torch.randn(8, 4))
    save_checkpoint(net, tmp_path / "net")
    saved = load_checkpoint(tmp_path / "net.ckpt", net=other)
    assert list(saved) == ["0.weight", "0.bias", "1.gamma", "1.beta", "1.moving_mean", "1.moving_variance"]
    assert torch.equal(net.eval()(torch.ones(2, 4)), other.eval()(torch.ones(2, 4)))


def test_the_last_few_are_kept_and_no_run_replaces_those_of_another(tmp_path):
    config = CheckpointConfig(
        save_checkpoint_steps=2, keep_checkpoint_max=2, append_info=["epoch_num", "step_num", {"note": "a"}]
    )
    checkpoints = ModelCheckpoint("net", str(tmp_path), config)
    make_model().train(2, make_data(5), checkpoints)
    assert names_in(tmp_path) == ["net-2_3.ckpt", "net-2_5.ckpt"]
    assert checkpoints.latest_ckpt_file_name == str(tmp_path / "net-2_5.ckpt")
    saved = load_checkpoint(checkpoints.latest_ckpt_file_name)
    assert (saved["epoch_num"], saved["step_num"], saved["note"]) == (2, 10, "a")
    (tmp_path / "network-1_1.ckpt").touch()
    make_model().train(1, make_data(2), ModelCheckpoint("net", str(tmp_path), config))
    make_model().train(1, make_data(2), ModelCheckpoint("net", str(tmp_path), config))
    assert names_in(tmp_path) == ["net-2_3.ckpt", "net-2_5.ckpt", "net_1-1_2.ckpt", "net_2-1_2.ckpt", "network-1_1.ckpt"]


def test_forms_of_a_checkpoint_callback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model(metrics="accuracy")
    model.fit(1, make_data(1), make_data(1), callbacks=ModelCheckpoint())
    assert names_in(tmp_path) == ["CKP-1_1.ckpt"]
    named = ModelCheckpoint(lambda state: f"at{state.cur_step_num}", lambda _: tmp_path / "deep" / "er", CheckpointConfig(1))
    model.train(1, make_data(2), named)
    assert names_in(tmp_path / "deep" / "er") == ["at1.ckpt", "at2.ckpt"]
    only = CheckpointConfig(1, saved_network=model.network)
    model.train(1, make_data(1), ModelCheckpoint("only", tmp_path / "only", only))
    assert not any("lamb" in name for name in load_checkpoint(tmp_path / "only" / "only-1_1.ckpt"))
    minutes = CheckpointConfig(1, keep_checkpoint_max=0, keep_checkpoint_per_n_minutes=5)
    model.train(1, make_data(4), ModelCheckpoint("m", tmp_path / "m", minutes))
    assert names_in(tmp_path / "m") == ["m-1_1.ckpt", "m-1_4.ckpt"]
    seconds = CheckpointConfig(0, save_checkpoint_seconds=1000)
    model.train(1, make_data(4), ModelCheckpoint("s", tmp_path / "s", seconds))
    assert names_in(tmp_path / "s") == ["s-1_4.ckpt"]
    assert only.get_checkpoint_policy()["keep_checkpoint_max"] == 5


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_file_is_whole_or_not_there(fails, tmp_path, monkeypatch):
    file, net = tmp_path / "net.ckpt", make_net()
    save_checkpoint(net, file)
    before = file.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(*{"write": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[fails], fail)
    for name in ("net.ckpt", "new.ckpt"):
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(make_net(1), tmp_path / name)
    assert names_in(tmp_path) == ["net.ckpt"]
    assert file.read_bytes() == before


def test_the_oldest_goes_only_when_the_newest_is_there(tmp_path, monkeypatch):
    class FailLater(Callback):
        def step_begin(self, run_context: Any) -> None:
            if run_context.original_args().cur_step_num == 2:
                monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))

    config = CheckpointConfig(1, keep_checkpoint_max=1)
    with pytest.raises(OSError, match="full"):
        make_model().train(1, make_data(3), [FailLater(), ModelCheckpoint("net", tmp_path, config)])
    assert names_in(tmp_path) == ["net-1_1.ckpt"]


class Outer(nn.Cell):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.bert = net


def test_names_may_have_a_prefix_more(tmp_path):
    net, other = make_net(0), make_net(1)
    save_checkpoint(Outer(net), tmp_path / "outer")
    saved = load_checkpoint(tmp_path / "outer.ckpt")
    assert next(iter(saved)) == "bert.0.weight"
    assert load_param_into_net(make_net(1), saved, strict_load=True)[0] == [n.removeprefix("bert.") for n in saved]
    assert load_param_into_net(other, saved) == ([], [])
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    partial = {name: value for name, value in saved.items() if "weight" in name}
    missing, unused = load_param_into_net(Outer(make_net(1)), {**partial, "other": saved["bert.0.weight"]})
    assert (missing, unused) == (["bert.0.bias", "bert.1.gamma", "bert.1.beta", "bert.3.bias"], ["other"])


def test_choosing_what_is_saved_and_loaded(tmp_path):
    net, file = make_net(), tmp_path / "net.ckpt"
    save_checkpoint(net, file, choice_func=lambda name: not name.startswith("3"))
    assert list(load_checkpoint(file)) == ["0.weight", "0.bias", "1.gamma", "1.beta"]
    assert list(load_checkpoint(file, specify_prefix="1.")) == ["1.gamma", "1.beta"]
    assert list(load_checkpoint(file, filter_prefix=["1.", "0.w"])) == ["0.bias"]
    assert list(load_checkpoint(file, choice_func=lambda name: "beta" in name)) == ["1.beta"]
    save_checkpoint([{"name": "a", "data": Tensor([1.0])}, {"name": "b", "data": net[0].weight}], file)
    assert list(load_checkpoint(file)) == ["a", "b"]
    save_checkpoint({"c": Tensor([1, 2])}, file, append_dict={"epoch": 3, "when": "now"})
    assert load_checkpoint(file)["c"].asnumpy().tolist() == [1, 2]
    assert load_checkpoint(file)["when"] == "now"
    with pytest.raises(ValueError, match=r"nothing of .* is left; its names are c, epoch, when"):
        load_checkpoint(file, specify_prefix="x")


def test_what_does_not_fit_changes_nothing(tmp_path):
    step = make_step()
    Model(step).train(1, make_data(1))
    save_checkpoint(step, tmp_path / "step")
    saved = load_checkpoint(tmp_path / "step.ckpt")
    other = make_step()
    before = params_of(Model(other))
    wrong = {
        "0.weight": ("has shape", Parameter(torch.ones(2, 2))),
        "3.bias": ("cast one of them", Parameter(torch.ones(3, dtype=torch.int64))),
        "lamb_m.3.bias": ("exp_avg", Parameter(torch.ones(7))),
    }
    for name, (words, value) in wrong.items():
        with pytest.raises((RuntimeError, ValueError), match=words):
            load_param_into_net(other, {**saved, name: value})
        assert all(torch.equal(p, q) for p, q in zip(params_of(Model(other)), before, strict=True))
        assert other.optimizer.global_step == 0
    half = {
        name: Parameter(value.half(), name) for name, value in saved.items() if "lamb" not in name and value.is_floating_point()
    }
    with pytest.raises(RuntimeError, match="cast one of them"):
        load_param_into_net(make_net(), half, strict_load=True)
    net = make_net()
    load_param_into_net(net, half)
    assert net[0].weight.dtype == torch.float32
    with pytest.raises(TypeError, match="net must be"):
        load_param_into_net(3, saved)
    with pytest.raises(TypeError, match="parameter_dict must be"):
        load_param_into_net(net, [1])


def test_what_is_no_checkpoint_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.setattr(builtins, "exec", None)
    with pytest.raises(ValueError, match="which is not there"):
        load_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("no file of torch")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.ckpt")
    for name in ("text", "module"):
        with pytest.raises(ValueError, match="nothing in it was executed"):
            load_checkpoint(tmp_path / f"{name}.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="no parameters by name"):
        load_checkpoint(tmp_path / "list.ckpt")
    with pytest.raises(TypeError, match="save_obj must be a network"):
        save_checkpoint(3, tmp_path / "x")
    with pytest.raises(TypeError, match="append_dict"):
        save_checkpoint(make_net(), tmp_path / "x", append_dict={"a": [1]})
    twice = nn.Cell(auto_prefix=False)
    twice.a, twice.b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"two parameters are called 'weight'; .* auto_prefix=True"):
        save_checkpoint(twice, tmp_path / "x")
    assert not (tmp_path / "x.ckpt").exists()


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: CheckpointConfig(0, 0, 0, 0), ValueError, "one of save_checkpoint_steps"),
        (lambda: CheckpointConfig(-1), ValueError, "save_checkpoint_steps must be an int >= 1"),
        (lambda: CheckpointConfig(keep_checkpoint_max=1.5), TypeError, "keep_checkpoint_max"),
        (lambda: CheckpointConfig(saved_network=3), TypeError, "saved_network"),
        (lambda: CheckpointConfig(append_info="epoch_num"), TypeError, "append_info must be a list"),
        (lambda: CheckpointConfig(append_info=["loss"]), ValueError, r"append_info\[0\]"),
        (lambda: CheckpointConfig(append_info=[{}, {}]), TypeError, r"append_info\[0\]"),
        (lambda: ModelCheckpoint("a/b"), ValueError, "prefix must be a string without '/'"),
        (lambda: ModelCheckpoint(3), TypeError, "prefix"),
        (lambda: ModelCheckpoint(directory=3), TypeError, "directory"),
        (lambda: ModelCheckpoint(config=3), TypeError, "config"),
    ],
)
def test_wrong_arguments(make, kind, words):
    with pytest.raises(kind, match=words):
        make()
