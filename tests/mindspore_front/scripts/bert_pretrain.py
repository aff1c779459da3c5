"""BERT pre-training: a train-one-step cell that clips each gradient, a dynamic loss scale, a schedule of one's own."""

import os

import numpy as np
import torch
from script_numbers import integers, listed, values

import torchlamb.mindspore.common.dtype as mstype
import torchlamb.mindspore.communication.management as D
import torchlamb.mindspore.nn as nn
from torchlamb.mindspore import context
from torchlamb.mindspore import log as logger
from torchlamb.mindspore.common import set_seed
from torchlamb.mindspore.common.parameter import Parameter
from torchlamb.mindspore.common.tensor import Tensor
from torchlamb.mindspore.context import ParallelMode
from torchlamb.mindspore.dataset import GeneratorDataset
from torchlamb.mindspore.nn.learning_rate_schedule import LearningRateSchedule, PolynomialDecayLR, WarmUpLR
from torchlamb.mindspore.nn.optim import Lamb
from torchlamb.mindspore.nn.wrap.grad_reducer import DistributedGradReducer
from torchlamb.mindspore.nn.wrap.loss_scale import DynamicLossScaleUpdateCell
from torchlamb.mindspore.ops import composite as C
from torchlamb.mindspore.ops import functional as F
from torchlamb.mindspore.ops import operations as P
from torchlamb.mindspore.train.callback import Callback, CheckpointConfig, ModelCheckpoint, TimeMonitor
from torchlamb.mindspore.train.model import Model
from torchlamb.mindspore.train.serialization import load_checkpoint, load_param_into_net
from torchlamb.mindspore.train.train_thor import ConvertModelUtils

VOCABULARY, HIDDEN, LENGTH, MASKED, BATCH, STEPS = 30, 8, 6, 2, 4, 9
CLIP_TYPE, CLIP_VALUE = 1, 0.2

clip_each = C.MultitypeFuncGraph("clip_each")
unscale = C.MultitypeFuncGraph("unscale")
reciprocal = P.Reciprocal()


@clip_each.register("Number", "Number", "Tensor")
def _clip_each(kind, limit, grad):
    if kind not in (0, 1):
        return grad
    dtype = F.dtype(grad)
    if kind == 0:
        low, high = F.cast(F.tuple_to_array((-limit,)), dtype), F.cast(F.tuple_to_array((limit,)), dtype)
        return C.clip_by_value(grad, low, high)
    return nn.ClipByNorm()(grad, F.cast(F.tuple_to_array((limit,)), dtype))


@unscale.register("Tensor", "Tensor")
def _unscale(scale, grad):
    return grad * reciprocal(scale)


class WarmUpThenDecay(LearningRateSchedule):
    def __init__(self, learning_rate, end_learning_rate, warmup_steps, decay_steps, power):
        super().__init__()
        self.rising = WarmUpLR(learning_rate, warmup_steps)
        self.falling = PolynomialDecayLR(learning_rate, end_learning_rate, decay_steps, power)
        self.warmup_steps = Tensor(np.array([warmup_steps]).astype(np.float32))
        self.one = Tensor(np.array([1.0]).astype(np.float32))
        self.greater = P.Greater()
        self.cast = P.Cast()

    def construct(self, global_step):
        is_rising = self.cast(self.greater(self.warmup_steps, global_step), mstype.float32)
        return (self.one - is_rising) * self.falling(global_step) + is_rising * self.rising(global_step)


class Encoder(nn.Cell):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.kinds = torch.nn.Embedding(2, HIDDEN)
        self.dense = torch.nn.Linear(HIDDEN, HIDDEN)
        self.layernorm = torch.nn.LayerNorm(HIDDEN)
        self.pooler = torch.nn.Linear(HIDDEN, HIDDEN)
        self.tanh = P.Tanh()
        self.expand = P.ExpandDims()

    def construct(self, input_ids, input_mask, token_type_id):
        x = self.words(input_ids) + self.kinds(token_type_id)
        x = self.layernorm(x + self.tanh(self.dense(x)))
        return x * self.expand(input_mask, 2)


class PreTraining(nn.Cell):
    def __init__(self):
        super().__init__()
        self.bert = Encoder()
        self.mlm = torch.nn.Linear(HIDDEN, VOCABULARY)
        self.nsp = torch.nn.Linear(HIDDEN, 2)
        self.log_softmax = P.LogSoftmax(axis=-1)
        self.reshape, self.gather, self.cast = P.Reshape(), P.Gather(), P.Cast()
        self.onehot, self.reduce_sum, self.reduce_mean, self.neg = P.OneHot(), P.ReduceSum(), P.ReduceMean(), P.Neg()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)
        self.offsets = Tensor(np.arange(BATCH).reshape(-1, 1) * LENGTH, mstype.int32)

    def construct(self, input_ids, input_mask, token_type_id, next_labels, positions, masked_ids, masked_weights):
        x = self.bert(input_ids, input_mask, token_type_id)
        flat = self.reshape(positions + self.offsets, (-1,))
        picked = self.gather(self.reshape(x, (-1, HIDDEN)), flat, 0)
        words = self.log_softmax(self.mlm(picked))
        hot = self.onehot(self.reshape(masked_ids, (-1,)), VOCABULARY, self.on, self.off)
        each = self.neg(self.reduce_sum(hot * words, (-1,)))
        weights = self.reshape(masked_weights, (-1,))
        of_words = self.reduce_sum(weights * each, ()) / (self.reduce_sum(weights, ()) + 1e-5)
        following = self.log_softmax(self.nsp(self.reduce_mean(x, 1)))
        hot = self.onehot(self.reshape(next_labels, (-1,)), 2, self.on, self.off)
        of_following = self.reduce_mean(self.neg(self.reduce_sum(hot * following, (-1,))), ())
        return self.cast(of_words + of_following, mstype.float32)


class TrainOneStep(nn.TrainOneStepWithLossScaleCell):
    def __init__(self, network, optimizer, scale_update_cell=None):
        super().__init__(network, optimizer, scale_update_cell)
        self.cast = P.Cast()
        self.degree = 1
        if self.reducer_flag:
            self.degree = D.get_group_size()
            self.grad_reducer = DistributedGradReducer(optimizer.parameters, False, self.degree)
        self.loss_scale = None
        self.loss_scaling_manager = scale_update_cell
        if scale_update_cell:
            self.loss_scale = Parameter(Tensor(scale_update_cell.get_loss_scale(), dtype=mstype.float32))

    def construct(self, input_ids, input_mask, token_type_id, next_labels, positions, masked_ids, masked_weights, sens=None):
        batch = (input_ids, input_mask, token_type_id, next_labels, positions, masked_ids, masked_weights)
        loss = self.network(*batch)
        scaling_sens = self.loss_scale if sens is None else sens
        status, scaling_sens = self.start_overflow_check(loss, scaling_sens)
        grads = self.grad(self.network, self.weights)(*batch, self.cast(scaling_sens, mstype.float32))
        grads = self.grad_reducer(grads)
        grads = self.hyper_map(F.partial(unscale, self.cast(scaling_sens * self.degree, mstype.float32)), grads)
        grads = self.hyper_map(F.partial(clip_each, CLIP_TYPE, CLIP_VALUE), grads)
        cond = self.get_overflow_status(status, grads)
        overflow = cond
        if sens is None:
            overflow = self.loss_scaling_manager(self.loss_scale, cond)
        if not overflow:
            self.optimizer(grads)
        return (loss, cond, scaling_sens.value())


class Recorder(Callback):
    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer
        self.losses, self.overflows, self.scales, self.rates = [], [], [], []

    def step_begin(self, run_context):
        self.rates.append(float(self.optimizer.get_lr().asnumpy()))

    def step_end(self, run_context):
        loss, overflow, scale = run_context.original_args().net_outputs
        self.losses.append(float(loss.asnumpy()))
        self.overflows.append(bool(overflow.asnumpy()))
        self.scales.append(float(scale.asnumpy()))


def batches():
    """The fourth batch overflows: its mask is too large for float32 gradients."""
    for i in range(STEPS):
        weights = np.ones((BATCH, MASKED), np.float32)
        weights[0, 1] = 0.0
        mask = np.ones((BATCH, LENGTH), np.float32) * (3e38 if i == 3 else 1.0)
        mask[1, -2:] = 0.0
        yield (
            integers((BATCH, LENGTH), i, VOCABULARY),
            mask,
            integers((BATCH, LENGTH), 50 + i, 2),
            integers((BATCH, 1), 100 + i, 2),
            integers((BATCH, MASKED), 150 + i, LENGTH),
            integers((BATCH, MASKED), 200 + i, VOCABULARY),
            weights,
        )


def main(folder):
    set_seed(0)
    context.set_context(mode=context.PYNATIVE_MODE, device_target="CPU")
    if context.get_auto_parallel_context("parallel_mode") != ParallelMode.STAND_ALONE:
        raise ValueError("one process")
    network = PreTraining()
    for i, param in enumerate(network.trainable_params()):
        param.set_data(Tensor(values(param.shape, i), mstype.float32))

    def decays(x):
        return "layernorm" not in x.name.lower() and "bias" not in x.name.lower()

    params = network.trainable_params()
    groups = [
        {"params": list(filter(decays, params)), "weight_decay": 0.02},
        {"params": list(filter(lambda x: not decays(x), params))},
        {"order_params": params},
    ]
    rate = WarmUpThenDecay(0.05, 0.001, 3, STEPS, 1.0)
    optimizer = Lamb(groups, learning_rate=rate, beta1=0.9, beta2=0.98, eps=1e-6)
    update_cell = DynamicLossScaleUpdateCell(loss_scale_value=2**14, scale_factor=2, scale_window=3)
    net_with_grads = TrainOneStep(network, optimizer=optimizer, scale_update_cell=update_cell)

    columns = ["input_ids", "input_mask", "token_type_id", "next_labels", "positions", "masked_ids", "masked_weights"]
    ds = GeneratorDataset(list(batches()), columns, shuffle=False)
    recorder = Recorder(optimizer)
    config_ck = CheckpointConfig(save_checkpoint_steps=4, keep_checkpoint_max=2)
    callback = [
        TimeMonitor(ds.get_dataset_size()),
        recorder,
        ModelCheckpoint(prefix="checkpoint_bert", directory=folder, config=config_ck),
    ]
    model = Model(net_with_grads)
    model = ConvertModelUtils().convert_to_thor_model(model, network=net_with_grads, optimizer=optimizer)
    model.train(1, ds, callbacks=callback, dataset_sink_mode=False)
    logger.info("trained")

    fresh = PreTraining()
    load_param_into_net(fresh, load_checkpoint(os.path.join(folder, "checkpoint_bert-1_9.ckpt")))
    return {
        "losses": [x for i, x in enumerate(recorder.losses) if i != 3],
        "overflows": recorder.overflows,
        "scales": recorder.scales,
        "rates": recorder.rates,
        "files": sorted(name for name in os.listdir(folder) if name.endswith(".ckpt")),
        "weights": listed(network.trainable_params()),
        "loaded": listed(fresh.trainable_params()),
    }
