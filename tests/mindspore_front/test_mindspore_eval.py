"""Row 14 of the specification's checklist: `Model` evaluates and predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import (
    CLASSES,
    WithLoss,
    as_generator,
    make_data,
    make_model,
    make_net,
    share_of_zeros,
)
from torch import Tensor

from torchlamb.mindspore import Model, nn

# Row 14: evaluation and prediction


def uneven() -> list[tuple[Tensor, Tensor]]:
    data, labels = map(torch.cat, zip(*make_data(), strict=True))
    return list(zip(data.split([50, 1, 45]), labels.split([50, 1, 45]), strict=True))


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
