"""GPT: a fixed loss scale, clipping by the global norm, decay by groups, warm-up and cosine."""

import numpy as np
import torch
from script_numbers import integers, listed, values

from torchlamb.mindspore import Model, Parameter, ParameterTuple, Tensor, nn, set_context, set_seed
from torchlamb.mindspore import dtype as mstype
from torchlamb.mindspore.common.initializer import initializer
from torchlamb.mindspore.dataset import GeneratorDataset
from torchlamb.mindspore.nn import CosineDecayLR, FixedLossScaleUpdateCell, WarmUpLR
from torchlamb.mindspore.nn.learning_rate_schedule import LearningRateSchedule
from torchlamb.mindspore.ops import composite as C
from torchlamb.mindspore.ops import functional as F
from torchlamb.mindspore.ops import operations as P
from torchlamb.mindspore.train.callback import Callback, LossMonitor, TimeMonitor

WORDS, HIDDEN, LENGTH, BATCH, STEPS, ACCUMULATION = 12, 6, 5, 3, 10, 2

grad_scale = C.MultitypeFuncGraph("grad_scale")
add_grads = C.MultitypeFuncGraph("add_grads")
store = C.MultitypeFuncGraph("store")
clear = C.MultitypeFuncGraph("clear")
average = C.MultitypeFuncGraph("average")
reciprocal, cast, zeroslike = P.Reciprocal(), P.Cast(), P.ZerosLike()


@grad_scale.register("Tensor", "Tensor")
def _grad_scale(scale, grad):
    return grad * reciprocal(scale)


@add_grads.register("Tensor", "Tensor")
def _add_grads(held, grad):
    return held + cast(grad, mstype.float32)


@store.register("Tensor", "Tensor")
def _store(held, grad):
    return F.depend(True, F.assign(held, cast(grad, mstype.float32)))


@clear.register("Tensor")
def _clear(held):
    return F.depend(True, F.assign(held, zeroslike(held)))


@average.register("Number", "Tensor", "Tensor")
def _average(factor, mean, weight):
    return F.assign(mean, mean * factor + weight * (1 - factor))


class LearningRate(LearningRateSchedule):
    def __init__(self, learning_rate, end_learning_rate, warmup_steps, decay_steps):
        super().__init__()
        self.warmup_lr = WarmUpLR(learning_rate, warmup_steps)
        self.decay_lr = CosineDecayLR(end_learning_rate, learning_rate, decay_steps)
        self.warmup_steps = Tensor(np.array([warmup_steps]).astype(np.float32))
        self.one = Tensor(np.array([1.0]).astype(np.float32))
        self.greater, self.cast = P.Greater(), P.Cast()

    def construct(self, global_step):
        decay_lr = self.decay_lr(global_step)
        is_warmup = self.cast(self.greater(self.warmup_steps, global_step), mstype.float32)
        warmup_lr = self.warmup_lr(global_step)
        return (self.one - is_warmup) * decay_lr + is_warmup * warmup_lr


class GPT(nn.Cell):
    def __init__(self):
        super().__init__()
        self.word_embedding = Parameter(initializer("normal", [WORDS, HIDDEN], mstype.float32), name="word_embedding")
        self.mix = torch.nn.Linear(HIDDEN, HIDDEN)
        self.layernorm = torch.nn.LayerNorm(HIDDEN)
        self.gather, self.tanh, self.matmul = P.Gather(), P.Tanh(), P.MatMul()
        self.reshape, self.transpose = P.Reshape(), P.Transpose()

    def construct(self, ids):
        x = self.gather(self.word_embedding, ids, 0)
        x = self.layernorm(x + self.tanh(self.mix(x)))
        return self.matmul(self.reshape(x, (-1, HIDDEN)), self.transpose(self.word_embedding, (1, 0)))


class GPTWithLoss(nn.Cell):
    def __init__(self, network, loss):
        super().__init__(auto_prefix=False)
        self.network = network
        self.loss = loss
        self.reshape = P.Reshape()

    def construct(self, ids, labels):
        return self.loss(self.network(ids), self.reshape(labels, (-1,)))


class TrainOneStep(nn.TrainOneStepWithLossScaleCell):
    """Gathers gradients over some steps, clips them, and keeps a running average of the weights."""

    def __init__(self, network, optimizer, scale_update_cell=None):
        super().__init__(network, optimizer, scale_update_cell)
        self.network = network
        self.weights = optimizer.parameters
        self.optimizer = optimizer
        self.held = self.weights.clone(prefix="accu_grads", init="zeros")
        self.means = ParameterTuple(list(network.trainable_params())).clone("ema", init="same")
        self.local_step = Parameter(initializer(0, [1], mstype.int32), name="local_step", requires_grad=False)
        self.one, self.limit = Tensor([1], mstype.int32), Tensor([ACCUMULATION], mstype.int32)
        self.zero = Tensor([0], mstype.int32)
        self.equal = P.Equal()
        self.select = P.Select()

    def construct(self, ids, labels):
        weights = self.weights
        loss = self.network(ids, labels)
        scaling_sens = self.scale_sense
        status, scaling_sens = self.start_overflow_check(loss, scaling_sens)
        scaling_sens_filled = C.ones_like(loss) * F.cast(scaling_sens, F.dtype(loss))
        grads = self.grad(self.network, weights)(ids, labels, scaling_sens_filled)
        sums = self.hyper_map(add_grads, self.held, grads)
        self.local_step = self.local_step + self.one
        cond = self.get_overflow_status(status, grads)
        if not self.equal(self.local_step, self.limit):
            self.hyper_map(store, self.held, sums)
            return loss, cond, scaling_sens.value()
        self.local_step = self.zero
        grads = self.grad_reducer(self.hyper_map(F.partial(grad_scale, scaling_sens * ACCUMULATION), sums))
        grads = C.clip_by_global_norm(grads, 0.3)
        overflow = self.process_loss_scale(cond)
        if not overflow:
            self.optimizer(grads)
            self.hyper_map(F.partial(average, 0.9), self.means, self.weights)
        self.hyper_map(clear, self.held)
        return loss, cond, scaling_sens.value()


class Losses(Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_step_end(self, run_context):
        params = run_context.original_args()
        if params.cur_step_num <= params.epoch_num * params.batch_num:
            self.seen.append(float(params.net_outputs[0].asnumpy()))


def set_weight_decay(params):
    def decays(x):
        return "layernorm" not in x.name.lower() and "bias" not in x.name.lower()

    return [
        {"params": list(filter(decays, params)), "weight_decay": 0.05},
        {"params": list(filter(lambda x: not decays(x), params)), "weight_decay": 0.0},
        {"order_params": params},
    ]


def main(folder):
    set_seed(12315)
    set_context(mode=1, device_target="CPU")
    gpt = GPT()
    for i, param in enumerate(gpt.trainable_params()):
        param.set_data(Tensor(values(param.shape, i), mstype.float32))
    loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")
    gpt_with_loss = GPTWithLoss(gpt, loss)
    rows = [(integers((LENGTH,), i, WORDS), integers((LENGTH,), 700 + i, WORDS)) for i in range(BATCH * STEPS)]
    ds = GeneratorDataset(rows, ["ids", "labels"], shuffle=False).batch(BATCH)
    rate = LearningRate(0.03, 0.001, 2, STEPS)
    optimizer = nn.Lamb(set_weight_decay(gpt_with_loss.trainable_params()), learning_rate=rate)
    step = TrainOneStep(gpt_with_loss, optimizer=optimizer, scale_update_cell=FixedLossScaleUpdateCell(1024))
    step.set_train(True)
    losses = Losses()
    model = Model(step)
    model.train(2, ds, callbacks=[TimeMonitor(ds.get_dataset_size()), LossMonitor(5), losses], dataset_sink_mode=False)
    return {
        "losses": losses.seen,
        "names": [x.name for x in gpt_with_loss.trainable_params()],
        "averages": [x.name for x in step.means],
        "weights": listed(gpt.trainable_params()),
        "means": listed(step.means),
    }
