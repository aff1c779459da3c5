"""Functions around an optimizer: lists of learning rates, clips, metrics, maps, and gradients as values."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchlamb.mindspore as mindspore
from torchlamb.mindspore import Parameter, Tensor, nn, ops

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mindspore" / "functions.json").read_text())
TENSORS = [torch.tensor(x) for x in ([3.0, 4.0], [0.3, -0.4], [[1.0, 2.0], [-2.0, 0.5]])]

# As scripts have them, with torchlamb.mindspore for mindspore.
LINES = """
from mindspore import Model, Tensor, Parameter, ParameterTuple, context, nn, ops, set_seed, set_context, value_and_grad, amp
from mindspore import FixedLossScaleManager, DynamicLossScaleManager, save_checkpoint, load_checkpoint, load_param_into_net
from mindspore import dtype as mstype, log as logger, float32, int32, GRAPH_MODE, PYNATIVE_MODE, ms_function, jit
import mindspore.common.dtype as mstype
from mindspore.common import set_seed, dtype
from mindspore.common.api import ms_function
from mindspore.common.initializer import initializer, Normal, TruncatedNormal
from mindspore.common.parameter import Parameter, ParameterTuple
from mindspore.common.tensor import Tensor
import mindspore.communication.management as D
from mindspore.communication.management import init, get_rank, get_group_size
from mindspore.context import ParallelMode
from mindspore.dataset import GeneratorDataset, NumpySlicesDataset
from mindspore.nn import TrainOneStepCell, TrainOneStepWithLossScaleCell, WithLossCell, DistributedGradReducer, ClipByNorm
from mindspore.nn.cell import Cell
from mindspore.nn.dynamic_lr import piecewise_constant_lr, cosine_decay_lr
from mindspore.nn.learning_rate_schedule import LearningRateSchedule, PolynomialDecayLR, WarmUpLR
from mindspore.nn.metrics import Accuracy, Metric
from mindspore.nn.optim import Lamb, Momentum, AdamWeightDecay, thor, THOR
from mindspore.nn.optim.lamb import Lamb
from mindspore.nn.optim.optimizer import Optimizer
from mindspore.nn.wrap.cell_wrapper import TrainOneStepCell, WithLossCell, _VirtualDatasetCell
from mindspore.nn.wrap.grad_reducer import DistributedGradReducer
from mindspore.nn.wrap.loss_scale import DynamicLossScaleUpdateCell, FixedLossScaleUpdateCell, TrainOneStepWithLossScaleCell
from mindspore.ops import composite as C, functional as F, operations as P
from mindspore.parallel._utils import _get_device_num, _get_gradients_mean, _get_parallel_mode
from mindspore.train import Model, Callback, LossMonitor
from mindspore.train.callback import CheckpointConfig, ModelCheckpoint, LossMonitor, TimeMonitor, Callback, RunContext
from mindspore.train.loss_scale_manager import DynamicLossScaleManager, FixedLossScaleManager
from mindspore.train.metrics import Accuracy
from mindspore.train.model import Model
from mindspore.train.parallel_utils import ParallelMode
from mindspore.train.serialization import load_checkpoint, load_param_into_net, save_checkpoint
from mindspore.train.train_thor import ConvertModelUtils
"""


def difference(found: Any, wanted: Any) -> float:
    return float(np.abs(np.asarray(found, np.float64) - np.asarray(wanted, np.float64)).max())


def test_import_lines_of_scripts():
    for line in LINES.strip().splitlines():
        exec(line.replace("mindspore", "torchlamb.mindspore", 1), {})
    for name in ("common", "communication", "context", "dataset", "log", "nn", "ops", "parallel", "train", "amp"):
        assert getattr(mindspore, name) is importlib.import_module(f"torchlamb.mindspore.{name}")


def test_names_of_optimizers_that_are_elsewhere_say_where():
    with pytest.raises(NotImplementedError, match=r"nn.Momentum is not here; give Model torch\.optim\.SGD with momentum"):
        nn.Momentum([], 0.1, 0.9)


@pytest.mark.parametrize(("name", "words", "wanted"), GOLDEN["lists"], ids=lambda x: x if isinstance(x, str) else "")
def test_lists_of_learning_rates(name, words, wanted):
    found = getattr(nn, name)(**words)
    assert len(found) == len(wanted)
    assert difference(found, wanted) < 1e-9
    assert getattr(nn.dynamic_lr, name) is getattr(nn, name)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: nn.piecewise_constant_lr(3, [0.1]), TypeError, "milestone must be a list or tuple, got 3"),
        (lambda: nn.piecewise_constant_lr([3], [0.1, 0.2]), ValueError, "for each of 1 milestones, got 2"),
        (lambda: nn.piecewise_constant_lr([3, 2], [0.1, 0.2]), ValueError, r"milestone\[1\]"),
        (lambda: nn.piecewise_constant_lr([3], [1]), TypeError, r"learning_rates\[0\]"),
        (lambda: nn.exponential_decay_lr(0.1, 0.9, 4, 2, 0), ValueError, "decay_epoch must be an int >= 1, got 0"),
        (lambda: nn.natural_exp_decay_lr(1, 0.9, 4, 2, 1), TypeError, "learning_rate"),
        (lambda: nn.inverse_decay_lr(0.1, 0.9, 4.0, 2, 1), TypeError, "total_step"),
        (lambda: nn.cosine_decay_lr(0.1, 0.1, 4, 2, 1), ValueError, "max_lr"),
        (lambda: nn.polynomial_decay_lr(0.1, 0.0, 4, 0, 1, 1.0), ValueError, "step_per_epoch"),
        (lambda: nn.warmup_lr(0.1, 4, 2, True), TypeError, "warmup_epoch"),
    ],
)
def test_wrong_arguments_of_lists(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


CLIPS = {
    "ClipByNorm": lambda: [nn.ClipByNorm()(x, Tensor([1.0])) for x in TENSORS],
    "clip_by_norm": lambda: [ops.clip_by_norm(x, 1.0) for x in TENSORS],
    "clip_by_norm of all": lambda: ops.clip_by_norm(TENSORS, 1.0),
    "clip_by_global_norm": lambda: ops.clip_by_global_norm(TENSORS, 2.0),
    "clip_by_value": lambda: [ops.clip_by_value(x, -1.0, 2.0) for x in TENSORS],
}


@pytest.mark.parametrize("name", CLIPS)
def test_clips(name):
    found = CLIPS[name]()
    assert all(difference(x.asnumpy(), wanted) < 3e-7 for x, wanted in zip(found, GOLDEN["clips"][name], strict=True))


def test_clips_of_other_kinds():
    rows = nn.ClipByNorm(axis=1)(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    assert difference(rows.asnumpy(), [[0.6, 0.8], [0.3, 0.4]]) < 1e-7
    assert nn.ClipByNorm()(torch.zeros(3), 1.0).tolist() == [0, 0, 0]
    assert nn.ClipByNorm()(torch.full((2,), 3.0, dtype=torch.float16), 1.0).dtype == torch.float32
    assert not nn.ClipByNorm()(torch.tensor([torch.inf, 1.0]), 1.0).isfinite().all()
    assert type(ops.clip_by_norm(tuple(TENSORS), 1.0)) is tuple
    with pytest.raises(RuntimeError, match="norm of inf"):
        ops.clip_by_norm(torch.tensor([torch.inf]), 1.0, error_if_nonfinite=True)
    for wrong in (0, -1.0, "1", True):
        with pytest.raises(ValueError, match="clip_norm must be a number > 0"):
            ops.clip_by_global_norm(TENSORS, wrong)
    with pytest.raises(ValueError, match="use_norm must be None"):
        ops.clip_by_global_norm(TENSORS, 1.0, 2.0)
    with pytest.raises(ValueError, match="clip_value_min or clip_value_max"):
        ops.clip_by_value(TENSORS[0])
    with pytest.raises(TypeError, match="axis"):
        nn.ClipByNorm("all")


def test_metrics():
    outputs, labels = torch.tensor([[0.1, 0.5, 0.4], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]), torch.tensor([2, 0, 1])
    found = {
        "Accuracy": nn.Accuracy()(outputs, labels),
        "TopKCategoricalAccuracy": nn.TopKCategoricalAccuracy(2)(outputs, labels),
        "MAE": nn.MAE()(TENSORS[0], TENSORS[1]),
        "MSE": nn.MSE()(TENSORS[2], TENSORS[2] * 2),
        "Loss": nn.Loss()(TENSORS[0]),
    }
    assert found == pytest.approx(GOLDEN["metrics"], rel=1e-6)
    hot = torch.nn.functional.one_hot(labels, 3)
    assert nn.Accuracy()(outputs, hot) == found["Accuracy"]
    assert nn.TopKCategoricalAccuracy(2)(outputs, hot) == found["TopKCategoricalAccuracy"]
    assert nn.Top1CategoricalAccuracy().set_indexes([2, 0])(labels, 0, outputs) == found["Accuracy"]
    assert nn.Accuracy()(torch.eye(3).reshape(1, 3, 3), torch.tensor([[0, 1, 2]])) == 1.0  # classes in dim 1
    assert nn.Accuracy("multilabel")(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 1], [1, 0]])) == 0.5
    with pytest.raises(RuntimeError, match="no value before update"):
        nn.Loss().eval()
    with pytest.raises(ValueError, match="takes 2 inputs, got 3"):
        nn.Accuracy().update(outputs, labels, labels)


def test_functions_by_types_and_over_tuples():
    scale = ops.MultitypeFuncGraph("scale")

    @scale.register("Number", "Tensor")
    def _scale(factor, tensor):
        return factor * tensor

    @scale.register("Number", "Tuple")
    def _scale_all(factor, tensors):
        return tuple(_scale(factor, t) for t in tensors)

    one = nn.NamedParameter("w", torch.ones(1))
    assert scale(2.0, one).item() == 2.0
    assert ops.HyperMap()(ops.partial(scale, 2.0), [one, (one, one)]) == (2.0, (2.0, 2.0))
    assert ops.Map(scale)((1.0, 3.0), (one, (one, one))) == (1.0, (3.0, 3.0))
    order = []
    assert ops.HyperMap(reverse=True)(lambda x: order.append(x) or x, (1, 2)) == (1, 2)
    assert order == [2, 1]
    with pytest.raises(TypeError, match=r"scale has no body for \(str\), only for \(Number, Tensor; Number, Tuple\)"):
        scale("a")
    with pytest.raises(ValueError, match="sequences of one length"):
        ops.HyperMap()(scale, (1.0, 2.0), (one,))


def test_primitives_and_functions():
    x = Tensor([[1.0, 2.0], [3.0, 4.0]])
    P = ops.operations
    assert P.ReduceSum()(x).item() == 10
    assert P.ReduceSum(keep_dims=True)(x, 1).shape == (2, 1)
    assert P.ReduceMean()(x, (0, 1)).item() == 2.5
    assert P.Cast()(3, mindspore.float32).dtype == torch.float32
    assert P.Greater()(Tensor([2.0]), 1).tolist() == [True]
    assert P.Minimum()(3, Tensor([1, 5])).tolist() == [1, 3]
    assert P.Select()(Tensor([True, False]), Tensor([1, 1]), Tensor([2, 2])).tolist() == [1, 2]
    assert P.OneHot()(Tensor([1]), 3, Tensor(1.0), Tensor(0.0)).tolist() == [[0, 1, 0]]
    assert P.Gather()(x, Tensor([[1], [0]]), 0).shape == (2, 1, 2)
    assert P.Concat(axis=1)((x, x)).shape == (2, 4)
    assert P.Mul().shard(((1,), (1,)))(x, x).tolist() == (x * x).tolist()
    assert P.FloatStatus()(Tensor([1.0, float("inf")])).tolist() == [1.0]
    assert ops.tuple_to_array((1.0, 2.0)).dtype == torch.float32
    assert ops.fill(mindspore.float32, (2,), 3).tolist() == [3, 3]
    assert ops.addn([x, x, x]).tolist() == (3 * x).tolist()
    with pytest.raises(TypeError, match="ReduceSum takes keep_dims, got 'axis'"):
        P.ReduceSum(axis=1)
    held = Parameter(torch.zeros(2), name="held")
    assert ops.assign(held, Tensor([1.0, 2.0])) is held
    ops.assign_add(held, Tensor([1.0, 1.0]))
    assert held.asnumpy().tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"data must have shape \(2,\), got \(3,\)"):
        ops.assign(held, torch.zeros(3))


# Gradients


class Square(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.w = Parameter(torch.tensor([1.0, 2.0]), name="w")
        self.unused = Parameter(torch.ones(3), name="unused")
        self.calls = 0

    def construct(self, x, y):
        self.calls += 1
        return self.w * x * x + y


def test_grad_operation_takes_inputs_weights_or_both():
    net, x, y = Square(), Tensor([3.0, 4.0]), Tensor([1.0, 1.0])
    weights = net.trainable_params()
    of_w, of_x, of_y = [9.0, 16.0], [6.0, 16.0], [1.0, 1.0]
    assert ops.GradOperation()(net)(x, y).tolist() == of_x
    assert [g.tolist() for g in ops.GradOperation(get_all=True)(net)(x, y)] == [of_x, of_y]
    assert [g.tolist() for g in ops.GradOperation(get_by_list=True)(net, weights)(x, y)] == [of_w, [0, 0, 0]]
    assert [g.tolist() for g in ops.GradOperation(get_by_list=True)(net)(x, y)] == [of_w, [0, 0, 0]]
    inputs, found = ops.GradOperation(get_all=True, get_by_list=True)(net, weights)(x, y)
    assert ([g.tolist() for g in inputs], found[0].tolist()) == ([of_x, of_y], of_w)
    scaled = ops.GradOperation(get_by_list=True, sens_param=True)(net, weights)
    for sens in (2.0, Tensor([2.0]), Tensor([2.0, 2.0])):
        assert scaled(x, y, sens)[0].tolist() == [18.0, 32.0]
    assert all(isinstance(g, Tensor) and not g.requires_grad for g in found)
    with pytest.raises(TypeError, match="get_all"):
        ops.GradOperation(1)


def test_value_and_grad():
    net, x, y = Square(), Tensor([3.0, 4.0]), Tensor([1.0, 1.0])
    weights = net.trainable_params()
    value, found = mindspore.value_and_grad(net, None, weights)(x, y)
    assert (value.tolist(), found[0].tolist(), found[1].tolist()) == ([10.0, 33.0], [9.0, 16.0], [0, 0, 0])
    assert not value.requires_grad
    assert mindspore.value_and_grad(net)(x, y)[1].tolist() == [6.0, 16.0]
    (of_x, of_y), of_w = mindspore.value_and_grad(net, (0, 1), weights[0])(x, y)[1]
    assert (of_x.tolist(), of_y.tolist(), of_w.tolist()) == ([6.0, 16.0], [1.0, 1.0], [9.0, 16.0])
    aux = mindspore.value_and_grad(lambda x: (net(x, y).sum(), x * 10), None, weights, has_aux=True)
    (loss, extra), found = aux(x)
    assert (loss.item(), extra.tolist(), found[0].tolist()) == (43.0, [30.0, 40.0], [9.0, 16.0])
    assert mindspore.grad(net, None, weights)(x, y)[0].tolist() == [9.0, 16.0]
    gradients, (extra,) = ops.grad(lambda x: (net(x, y).sum(), x), None, weights, has_aux=True)(x)
    assert gradients[0].tolist() == [9.0, 16.0]
    assert [g.tolist() for g in mindspore.value_and_grad(lambda i: i * 2, (0,))(Tensor([1, 2]))[1]] == [[0, 0]]
    with pytest.raises(ValueError, match="grad_position or weights must be given"):
        mindspore.value_and_grad(net, None)
    with pytest.raises(ValueError, match="grad_position 2 must be that of one of 2 inputs"):
        mindspore.value_and_grad(net, 2)(x, y)


class Asks(nn.Cell):
    """Calls its network, and asks for gradients of that call and of another."""

    def __init__(self, net):
        super().__init__()
        self.net, self.grad = net, ops.GradOperation(get_by_list=True)

    def construct(self, x, y):
        loss = self.net(x, y)
        return loss, self.grad(self.net)(x, y), self.grad(self.net)(y, x)


def test_a_cell_that_asks_for_gradients_of_a_call_runs_it_once():
    """A second run would draw other dropout masks, and count a batch twice in running statistics."""
    asks, x, y = Asks(Square()), torch.tensor([3.0, 4.0]), torch.ones(2)
    for turn in (1, 2):
        loss, first, second = asks(x, y)
        assert (loss.tolist(), first[0].tolist(), second[0].tolist()) == ([10.0, 33.0], [9.0, 16.0], [1.0, 1.0])
        assert asks.net.calls == 2 * turn
    norm = torch.nn.BatchNorm1d(2, momentum=1.0)

    class Normed(nn.Cell):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = norm, torch.nn.Dropout()

        def construct(self, x, y):
            return self.drop(self.norm(x)).sum() + y.sum()

    data = torch.randn(8, 2)
    Asks(Normed())(data, data.clone())
    assert norm.num_batches_tracked == 2  # of two calls with different arguments


def test_an_error_within_a_cell_leaves_no_hooks():
    asks = Asks(Square())
    with pytest.raises(RuntimeError):
        asks(torch.ones(2), torch.ones(3))
    assert not asks.net._forward_hooks
    assert asks(torch.ones(2), torch.ones(2))[1][0].tolist() == [1.0, 1.0]
