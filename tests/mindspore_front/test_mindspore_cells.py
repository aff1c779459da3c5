"""Cells that step, and what stands in for parameters and tensors in them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import torchlamb
import torchlamb.mindspore as mindspore
from torchlamb.mindspore import Model, Parameter, ParameterTuple, Tensor, context, nn, ops


class Net(nn.Cell):
    """Returns its loss, and has a parameter that the loss does not use."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.unused = torch.nn.Linear(4, 3), torch.nn.Linear(2, 2)
        self.loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction=reduction)

    def construct(self, x, labels):
        return self.loss(self.fc(x), labels)


def make_batch(scale: float = 1.0, seed: int = 0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator)


def make(net: nn.Cell, **words: Any) -> nn.Lamb:
    return nn.Lamb(net.trainable_params(), 0.1, weight_decay=0.1, **words)


def weights_of(net: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_equal(first: torch.nn.Module, second: torch.nn.Module, tolerance: float = 0.0) -> None:
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


def plain_step(net: nn.Cell, optimizer: Any, batch: Any, factor: float = 1.0) -> None:
    """What a training loop of torch does, with zeros where there is no gradient."""
    loss = torch.nn.functional.cross_entropy(
        net.fc(batch[0]), batch[1], reduction="sum" if net.loss.reduction == "none" else "mean"
    )
    optimizer.zero_grad()
    (loss * factor).backward()
    for p in net.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer.step()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["cell", "scaled", "model"])
def test_a_step_follows_the_sum_and_zeros(kind, reduction):
    net, twin = Net(reduction), Net(reduction)
    optimizer, other = make(net), make(twin)
    cell = {
        "cell": lambda: nn.TrainOneStepCell(net, optimizer),
        "scaled": lambda: nn.TrainOneStepWithLossScaleCell(net, optimizer, nn.FixedLossScaleUpdateCell(1024)),
        "model": lambda: Model(net, optimizer=optimizer).train_network,
    }[kind]()
    before = net.unused.weight.detach().clone()
    for seed in range(3):
        outputs = cell(*make_batch(seed=seed))
        plain_step(twin, other, make_batch(seed=seed))
    loss = outputs[0] if kind == "scaled" else outputs
    assert loss.shape == ((6,) if reduction == "none" else ())
    assert_equal(net, twin, 1e-7)
    assert optimizer.global_step == 3
    assert net.unused.weight.norm() < before.norm()  # it decays, as the original's does
    assert (optimizer.state[net.unused.weight]["exp_avg"] == 0).all()
    assert all(p.grad is None for p in net.parameters()) or kind == "model"


def test_sens_multiplies_the_gradients():
    net, twin = Net(), Net()
    nn.TrainOneStepCell(net, make(net, layer_adaptation=False, bias_correction=False), sens=3.0)(*make_batch())
    plain_step(twin, make(twin, layer_adaptation=False, bias_correction=False), make_batch(), 3.0)
    assert_equal(net, twin, 1e-7)
    _, gradients = nn.TrainOneStepCell(net, make(net), return_grad=True)(*make_batch())
    assert list(gradients) == ["fc.weight", "fc.bias", "unused.weight", "unused.bias"]
    for wrong, kind in (("1", TypeError), (True, TypeError), (0, ValueError)):
        with pytest.raises(kind, match="sens must be a number other than 0"):
            nn.TrainOneStepCell(net, make(net), sens=wrong)


@pytest.mark.parametrize(
    ("make_scale", "scales"),
    [
        (lambda: nn.DynamicLossScaleUpdateCell(2**10, 2, 2), [1024, 2048, 1024, 1024, 2048, 2048, 4096]),
        (lambda: nn.FixedLossScaleUpdateCell(256), [256] * 7),
        (lambda: Tensor(8.0), [8] * 7),
        (lambda: mindspore.DynamicLossScaleManager(2**10, 2, 2).get_update_cell(), [1024, 2048, 1024, 1024, 2048, 2048, 4096]),
    ],
    ids=["dynamic", "fixed", "tensor", "manager"],
)
def test_an_overflow_is_not_stepped_and_the_scale_is_returned(make_scale, scales):
    net = Net()
    optimizer = make(net)
    cell = nn.TrainOneStepWithLossScaleCell(net, optimizer, make_scale())
    seen, overflows = [], []
    for i in range(7):
        before = weights_of(net)
        loss, overflow, scale = cell(*make_batch(float("inf") if i == 2 else 1.0, i))
        assert loss.dim() == overflow.dim() == 0
        assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True)) == (i == 2)
        seen.append(scale.item())
        overflows.append(bool(overflow))
    assert overflows == [i == 2 for i in range(7)]
    assert optimizer.global_step == 6
    assert seen == scales
    cell.set_sense_scale(Tensor(4.0))
    assert cell(*make_batch())[2].item() == 4.0
    for wrong, kind in ((2.0, TypeError), (None, TypeError), (torch.ones(2), ValueError)):
        with pytest.raises(kind, match="scale_sense"):
            nn.TrainOneStepWithLossScaleCell(net, optimizer, wrong)


class WithStatus(nn.Cell):
    """As older scripts look for overflows: by a register, which `depend` puts behind what it is about."""

    def __init__(self, network, optimizer):
        super().__init__(auto_prefix=False)
        P = ops.operations
        self.network, self.optimizer, self.weights = network, optimizer, optimizer.parameters
        self.grad = ops.composite.GradOperation(get_by_list=True)
        self.alloc, self.get, self.clear = P.NPUAllocFloatStatus(), P.NPUGetFloatStatus(), P.NPUClearFloatStatus()
        self.reduce_sum, self.base, self.less_equal = P.ReduceSum(), Tensor(1, mindspore.float32), P.LessEqual()

    def construct(self, *inputs):
        init = self.alloc()
        loss = self.network(*inputs)
        init = ops.depend(init, loss)
        ops.depend(loss, self.clear(init))
        grads = self.grad(self.network, self.weights)(*inputs)
        init = ops.depend(init, grads)
        init = ops.depend(init, self.get(init))
        overflow = self.less_equal(self.base, self.reduce_sum(init, (0,)))
        if not overflow:
            self.optimizer(grads)
        return loss, overflow


def test_registers_of_overflows():
    net = Net()
    optimizer = make(net)
    cell = WithStatus(net, optimizer)
    overflows = [bool(cell(*make_batch(scale))[1]) for scale in (1.0, float("nan"), 1.0)]
    assert overflows == [False, True, False]
    assert optimizer.global_step == 2


def test_what_a_training_cell_takes():
    net = Net()
    with pytest.raises(TypeError, match=r"optimizer must be nn\.Lamb, or what has parameters"):
        nn.TrainOneStepCell(net, torch.optim.SGD(net.parameters(), 0.1))
    with pytest.raises(TypeError, match="network must be"):
        nn.TrainOneStepCell(print, make(net))
    with pytest.raises(TypeError, match="what network returns must be the loss, a tensor"):
        nn.TrainOneStepCell(WithStatus(net, make(net)), make(net))(*make_batch())
    for wrong, kind in ((0, ValueError), ("2", TypeError)):
        with pytest.raises(kind, match="loss_scale_value"):
            nn.DynamicLossScaleUpdateCell(wrong, 2, 2)
    with pytest.raises(TypeError, match="loss_fn must be"):
        nn.WithLossCell(net, 3)
    data, labels = make_batch()
    loss, outputs, same = nn.WithEvalCell(net.fc, net.loss)(data, labels)
    assert torch.equal(outputs, net.fc(data))
    assert torch.equal(loss, nn.WithLossCell(net.fc, net.loss)(data, labels))
    assert same is labels


# Parameters that stand for those of a module


def test_optimizer_parameters_are_used_as_tensors():
    net = Net()
    optimizer = make(net)
    weights = optimizer.parameters
    loss = net(*make_batch())
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    assert torch.equal(found[0], torch.autograd.grad(net(*make_batch()), net.fc.weight)[0])
    w = weights[0]
    assert isinstance(weights, ParameterTuple)
    assert isinstance(weights, tuple)
    assert isinstance(w, (nn.NamedParameter, Tensor, Parameter))
    assert (w.name, w.shape, w.dtype, w.requires_grad, w.size, w.ndim) == ("fc.weight", (3, 4), torch.float32, True, 12, 2)
    assert torch.equal(torch.add(w, 1), net.fc.weight + 1)
    for found, wanted in [
        (w * 2, net.fc.weight * 2), (2 - w, 2 - net.fc.weight), (w / w, net.fc.weight / net.fc.weight), (-w, -net.fc.weight),
        (w @ Tensor(torch.ones(4)), net.fc.weight @ torch.ones(4)), (Tensor(2.0) * w, 2 * net.fc.weight),
        (w**2, net.fc.weight**2),
        (w.sum(), net.fc.weight.sum()), (torch.stack(weights[:1]), torch.stack([net.fc.weight])),
    ]:  # fmt: skip
        assert torch.equal(found, wanted)
    assert np.array_equal(w.asnumpy(), net.fc.weight.detach().numpy())
    assert np.array_equal(w.data.asnumpy(), w.value().asnumpy())
    w.set_data(Tensor(np.ones((3, 4), np.float32)))
    assert (net.fc.weight == 1).all()
    with pytest.raises(ValueError, match=r"data must have shape \(3, 4\), got \(4, 3\)"):
        w.set_data(torch.ones(4, 3))
    w.requires_grad = False
    assert not net.fc.weight.requires_grad
    assert [x.name for x in net.trainable_params()] == ["fc.bias", "unused.weight", "unused.bias"]
    assert type(net.fc.weight) is torch.nn.Parameter
    name, parameter = w  # it is still a pair
    assert name == "fc.weight"
    assert parameter is net.fc.weight
    assert copy.deepcopy(w).parameter is not parameter
    assert pickle.loads(pickle.dumps(w)).name == "fc.weight"
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        w.colour  # noqa: B018


def test_parameter_tuples_are_cloned():
    net = Net()
    weights = make(net).parameters
    for init, wanted in (("zeros", 0.0), ("same", None), (2, 2.0)):
        clones = weights.clone(prefix="ema", init=init)
        assert [x.name for x in clones] == [f"ema.{x.name}" for x in weights]
        for clone, weight in zip(clones, weights, strict=True):
            assert torch.equal(clone, weight.parameter) if wanted is None else (clone == wanted).all()
            assert clone.requires_grad
    with pytest.raises(TypeError, match=r"iterable\[0\] must be a parameter"):
        ParameterTuple([3])
    assert len(pickle.loads(pickle.dumps(weights))) == len(copy.deepcopy(weights)) == len(weights)


class Counting(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.step = Parameter(Tensor([0], mindspore.int32), name="step")
        self.mean = Parameter(Tensor([0.0]), name="mean")
        self.one = Tensor([1], mindspore.int32)

    def construct(self, x):
        self.step = self.step + self.one
        self.step += 1
        self.mean = self.mean * 0.5 + x
        return self.step


def test_values_are_written_into_the_parameters_of_a_cell():
    cell = Counting()
    step = cell.step
    assert cell(torch.tensor([2.0])).item() == 2
    assert cell(torch.tensor([2.0])).item() == 4
    assert cell.step is step
    assert (step.dtype, step.requires_grad, cell.mean.item()) == (torch.int32, False, 3.0)
    assert list(cell.state_dict()) == ["step", "mean"]
    assert [p.name for p in cell.trainable_params()] == ["mean"]
    assert cell.to("meta").one.is_meta
    assert copy.deepcopy(Counting()).mean.name == "mean"


def test_a_network_of_parameters_made_by_hand_trains():
    class Own(nn.Cell):
        def __init__(self):
            super().__init__()
            self.w = Parameter(Tensor(np.ones((3, 2), np.float32)), name="own")

        def construct(self, x):
            return ops.matmul(x, self.w).square().sum()

    net = Own()
    optimizer = nn.Lamb(net.trainable_params(), 0.1)
    twin = torch.nn.Parameter(torch.ones(3, 2))
    other = torchlamb.Lamb([twin], 0.1)
    for _ in range(3):
        nn.TrainOneStepCell(net, optimizer)(torch.ones(4, 3))
        other.zero_grad()
        (torch.ones(4, 3) @ twin).square().sum().backward()
        other.step()
    torch.testing.assert_close(net.w, twin, rtol=0, atol=1e-7, check_dtype=False)
    torch.save(net.state_dict(), io := __import__("io").BytesIO())
    io.seek(0)
    assert list(torch.load(io, weights_only=True)) == ["w"]


def test_tensors():
    x = Tensor(np.array([1.0, 2.0]), mindspore.float32)
    assert isinstance(x, torch.Tensor)
    assert isinstance(torch.ones(1), Tensor)
    assert not isinstance(3, Tensor)
    assert (x.dtype, Tensor(1.5).dtype, Tensor([1, 2]).dtype, Tensor(True).dtype) == (torch.float32,) * 2 + (
        torch.int64,
        torch.bool,
    )
    assert (x + 1).asnumpy().tolist() == [2, 3]
    assert x.astype(np.int32).dtype == torch.int32
    assert x.expand_dims(0).shape == (1, 2)
    assert Tensor(torch.ones(2, dtype=torch.bfloat16)).asnumpy().dtype == np.float32
    total = Tensor(0)
    total += Tensor(1.5)
    assert total.item() == 1.5
    assert copy.deepcopy(x).asnumpy().tolist() == [1, 2]
    assert type(pickle.loads(pickle.dumps(x))) is torch.Tensor
    source = torch.ones(2)
    Tensor(source).fill_(3)
    assert source.tolist() == [1, 1]
    assert Tensor(shape=(2,), dtype=mindspore.float32, init=mindspore.common.initializer.One()).tolist() == [1, 1]


# Cells


class Wrapped(nn.Cell):
    def __init__(self, net, auto_prefix):
        super().__init__(auto_prefix=auto_prefix)
        self.net, self.norm = net, torch.nn.BatchNorm1d(2)


def test_names_of_a_cell():
    cell = Wrapped(Net(), True)
    names = ["net.fc.weight", "net.fc.bias", "net.unused.weight", "net.unused.bias", "norm.gamma", "norm.beta"]
    statistics = ["norm.moving_mean", "norm.moving_variance"]
    assert [x.name for x in cell.trainable_params()] == names
    assert [x.name for x in cell.get_parameters()] == names + statistics
    assert [name for name, _ in cell.parameters_and_names()] == names + statistics
    assert list(cell.parameters_dict()) == names + statistics
    assert [x.name for x in cell.untrainable_params()] == statistics
    assert [x.name for x in Wrapped(Net(), False).trainable_params()] == [
        n.removeprefix("net.").removeprefix("norm.") for n in names
    ]
    cell.update_parameters_name("student.")
    assert [x.name for x in cell.trainable_params()] == [f"student.{name}" for name in names]
    cell.net.update_parameters_name("inner.")
    assert next(x.name for x in cell.trainable_params()) == "student.inner.net.fc.weight"


def test_further_words_of_a_cell():
    cell = Wrapped(Net(), True)
    assert cell.set_train(False) is cell
    assert not cell.net.training
    assert cell.set_train().net.training
    assert cell.set_grad() is cell
    assert cell.add_flags(defer_inline=True) is cell
    assert cell.to_float(mindspore.float16) is cell
    assert cell.cls_name == "Wrapped"
    assert list(cell.name_cells()) == ["net", "norm"]
    assert [name for name, _ in cell.cells_and_names()][:3] == ["", "net", "net.fc"]
    cell.insert_child_to_cell("more", torch.nn.Linear(1, 1))
    cell.insert_param_to_cell("w", Parameter(1.0))
    assert "more.weight" in cell.parameters_dict()
    assert "w" in cell.parameters_dict()


def test_settings_are_kept_and_returned():
    context.set_context(mode=context.GRAPH_MODE, device_target="Ascend", device_id=3, save_graphs=True)
    assert [context.get_context(name) for name in ("mode", "device_target", "save_graphs")] == [0, "Ascend", True]
    context.set_context(mode=context.PYNATIVE_MODE, device_target="CPU", device_id=0)
    with pytest.raises(ValueError, match="parallel_mode must be one of"):
        context.set_auto_parallel_context(parallel_mode="data")
    context.set_auto_parallel_context(parallel_mode=context.ParallelMode.DATA_PARALLEL, gradients_mean=True, device_num=1)
    try:
        net = Net()
        cell = nn.TrainOneStepCell(net, make(net))
        assert cell.reducer_flag
        assert isinstance(cell.grad_reducer, nn.DistributedGradReducer)
        cell(*make_batch())
    finally:
        context.reset_auto_parallel_context()
    twin = Net()
    plain_step(twin, make(twin), make_batch())
    assert_equal(net, twin, 1e-7)
    assert not nn.TrainOneStepCell(net, make(net)).reducer_flag
    mindspore.communication.init()
    assert (mindspore.communication.get_rank(), mindspore.communication.get_group_size()) == (0, 1)
    mindspore.set_seed(5)
    first = torch.rand(1), np.random.rand()
    mindspore.set_seed(5)
    assert (torch.rand(1), np.random.rand()) == first
    assert mindspore.get_seed() == 5
    for wrong, kind in ((-1, ValueError), ("1", TypeError)):
        with pytest.raises(kind, match="seed must be an int >= 0"):
            mindspore.set_seed(wrong)
