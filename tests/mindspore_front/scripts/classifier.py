"""Fine-tuning a classifier: a step cell of its own kind, checkpoints, and a second run that goes on from the newest."""

import os

import torch
from script_numbers import integers, listed, values

import torchlamb.mindspore as ms
import torchlamb.mindspore.common.dtype as mstype
import torchlamb.mindspore.nn as nn
from torchlamb.mindspore import Tensor, context
from torchlamb.mindspore.common.parameter import Parameter
from torchlamb.mindspore.context import ParallelMode
from torchlamb.mindspore.dataset import GeneratorDataset
from torchlamb.mindspore.nn.learning_rate_schedule import PolynomialDecayLR
from torchlamb.mindspore.nn.optim import Lamb
from torchlamb.mindspore.nn.wrap.grad_reducer import DistributedGradReducer
from torchlamb.mindspore.nn.wrap.loss_scale import DynamicLossScaleUpdateCell
from torchlamb.mindspore.ops import composite as C
from torchlamb.mindspore.ops import functional as F
from torchlamb.mindspore.ops import operations as P
from torchlamb.mindspore.parallel._utils import _get_device_num, _get_gradients_mean, _get_parallel_mode
from torchlamb.mindspore.train.callback import Callback, CheckpointConfig, LossMonitor, ModelCheckpoint
from torchlamb.mindspore.train.model import Model
from torchlamb.mindspore.train.serialization import load_checkpoint, load_param_into_net, save_checkpoint

WORDS, HIDDEN, LENGTH, CLASSES, BATCH, BATCHES = 20, 6, 5, 3, 4, 4

grad_scale = C.MultitypeFuncGraph("grad_scale")
reciprocal = P.Reciprocal()


@grad_scale.register("Tensor", "Tensor")
def tensor_grad_scale(scale, grad):
    return grad * F.cast(reciprocal(scale), F.dtype(grad))


class ClipGradients(nn.Cell):
    def __init__(self):
        super().__init__()
        self.clip = nn.ClipByNorm()
        self.cast = P.Cast()

    def construct(self, grads, limit):
        clipped = ()
        for grad in grads:
            clipped = clipped + (self.clip(grad, self.cast(F.tuple_to_array((limit,)), F.dtype(grad))),)
        return clipped


class Body(nn.Cell):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(WORDS, HIDDEN)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.mean = P.ReduceMean()

    def construct(self, ids):
        return self.norm(self.mean(self.words(ids), 1))


class Classifier(nn.Cell):
    def __init__(self, is_training=True):
        super().__init__()
        self.bert = Body()
        self.head = torch.nn.Linear(HIDDEN, CLASSES)
        self.loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")
        self.is_training = is_training

    def construct(self, ids, labels):
        logits = self.head(self.bert(ids))
        return self.loss(logits, labels) if self.is_training else logits


class FinetuneCell(nn.Cell):
    def __init__(self, network, optimizer, scale_update_cell=None):
        super().__init__(auto_prefix=False)
        self.network = network
        self.network.set_grad()
        self.weights = optimizer.parameters
        self.optimizer = optimizer
        self.grad = C.GradOperation(get_by_list=True, sens_param=True)
        self.reducer_flag = False
        self.allreduce = P.AllReduce()
        self.parallel_mode = _get_parallel_mode()
        if self.parallel_mode in [ParallelMode.DATA_PARALLEL, ParallelMode.HYBRID_PARALLEL]:
            self.reducer_flag = True
        self.grad_reducer = None
        if self.reducer_flag:
            self.grad_reducer = DistributedGradReducer(optimizer.parameters, _get_gradients_mean(), _get_device_num())
        self.is_distributed = self.parallel_mode != ParallelMode.STAND_ALONE
        self.clip_gradients = ClipGradients()
        self.cast = P.Cast()
        self.alloc_status = P.NPUAllocFloatStatus()
        self.get_status = P.NPUGetFloatStatus()
        self.clear_status = P.NPUClearFloatStatus()
        self.reduce_sum = P.ReduceSum(keep_dims=False)
        self.base = Tensor(1, mstype.float32)
        self.less_equal = P.LessEqual()
        self.hyper_map = C.HyperMap()
        self.loss_scale = None
        self.loss_scaling_manager = scale_update_cell
        if scale_update_cell:
            self.loss_scale = Parameter(Tensor(scale_update_cell.get_loss_scale(), dtype=mstype.float32), name="loss_scale")

    def construct(self, ids, labels, sens=None):
        weights = self.weights
        init = self.alloc_status()
        loss = self.network(ids, labels)
        scaling_sens = self.loss_scale if sens is None else sens
        init = F.depend(init, loss)
        clear_status = self.clear_status(init)
        scaling_sens = F.depend(scaling_sens, clear_status)
        grads = self.grad(self.network, weights)(ids, labels, self.cast(scaling_sens, mstype.float32))
        grads = self.hyper_map(F.partial(grad_scale, scaling_sens), grads)
        grads = self.clip_gradients(grads, 0.5)
        if self.reducer_flag:
            grads = self.grad_reducer(grads)
        init = F.depend(init, grads)
        get_status = self.get_status(init)
        init = F.depend(init, get_status)
        flag_sum = self.reduce_sum(init, (0,))
        if self.is_distributed:
            cond = self.less_equal(self.base, self.allreduce(flag_sum))
        else:
            cond = self.less_equal(self.base, flag_sum)
        overflow = cond
        if sens is None:
            overflow = self.loss_scaling_manager(self.loss_scale, cond)
        if overflow:
            succ = False
        else:
            succ = self.optimizer(grads)
        return F.depend((loss, cond), succ)


class Losses(Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def step_end(self, run_context):
        self.seen.append(float(run_context.original_args().net_outputs[0].asnumpy()))


def newest(folder, prefix):
    names = [name for name in os.listdir(folder) if name.startswith(prefix) and name.endswith(".ckpt")]
    return os.path.join(folder, max(names, key=lambda name: os.path.getmtime(os.path.join(folder, name))))


def make_dataset(first):
    rows = [(integers((LENGTH,), first + i, WORDS), integers((), 500 + first + i, CLASSES)) for i in range(BATCH * BATCHES)]
    return GeneratorDataset(rows, ["ids", "labels"], shuffle=False).batch(BATCH, drop_remainder=True)


def do_train(folder, checkpoint, epochs, resume, losses):
    network = Classifier()
    dataset = make_dataset(0)
    rate = PolynomialDecayLR(0.04, 0.002, dataset.get_dataset_size() * 4, 1.0)
    optimizer = Lamb(network.trainable_params(), learning_rate=rate, weight_decay=0.01)
    param_dict = load_checkpoint(checkpoint)
    load_param_into_net(network, param_dict)
    if resume:
        load_param_into_net(optimizer, param_dict)
    config = CheckpointConfig(
        save_checkpoint_steps=dataset.get_dataset_size(), keep_checkpoint_max=1, append_info=["epoch_num", "step_num"]
    )
    checkpoints = ModelCheckpoint(prefix="classifier", directory=folder, config=config)
    update_cell = DynamicLossScaleUpdateCell(loss_scale_value=2**20, scale_factor=2, scale_window=1000)
    model = Model(FinetuneCell(network, optimizer=optimizer, scale_update_cell=update_cell))
    model.train(epochs, dataset, callbacks=[losses, LossMonitor(4), checkpoints], dataset_sink_mode=False)
    return network, optimizer


def as_number(value):
    return value.asnumpy() if hasattr(value, "asnumpy") else value


def main(folder):
    if ms.get_context("device_target") not in ("CPU", "GPU", "Ascend"):
        raise ValueError("no such device")
    context.set_context(mode=context.PYNATIVE_MODE)
    pretrained = Body()
    for i, param in enumerate(pretrained.trainable_params()):
        param.set_data(Tensor(values(param.shape, i), mstype.float32))
    start = Classifier()
    for i, param in enumerate(start.trainable_params()):
        param.set_data(Tensor(values(param.shape, i), mstype.float32))
    save_checkpoint(start, os.path.join(folder, "start.ckpt"))

    losses = Losses()
    do_train(folder, os.path.join(folder, "start.ckpt"), 2, False, losses)
    network, optimizer = do_train(folder, newest(folder, "classifier"), 2, True, losses)
    saved = load_checkpoint(newest(folder, "classifier"))

    tester = Classifier(False)
    tester.set_train(False)
    load_param_into_net(tester, saved)
    model = Model(tester)
    right, count = 0, 0
    for data in make_dataset(40).create_dict_iterator(num_epochs=1):
        logits = model.predict(data["ids"], data["labels"])
        right += int((logits.asnumpy().argmax(axis=1) == data["labels"].asnumpy()).sum())
        count += len(data["labels"].asnumpy())
    return {
        "losses": losses.seen,
        "steps": int(optimizer.global_step.asnumpy()[0]),
        "right": [right, count],
        "epoch_and_step": [int(as_number(saved[name])) for name in ("epoch_num", "step_num")],
        "moments": listed([saved[f"{kind}.{name}"] for kind in ("lamb_m", "lamb_v") for name in ("head.weight", "head.bias")]),
        "weights": listed(network.trainable_params()),
    }
