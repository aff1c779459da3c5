"""A loop of one's own: value_and_grad with a loss scaler, clipping, and a weight decay that changes from step to step."""

import numpy as np
import torch
from script_numbers import integers, listed, values

import torchlamb.mindspore as mindspore
from torchlamb.mindspore import Tensor, nn, ops
from torchlamb.mindspore.amp import DynamicLossScaler, all_finite
from torchlamb.mindspore.dataset import GeneratorDataset

FEATURES, HIDDEN, CLASSES, BATCH, STEPS = 5, 6, 3, 8, 8


class Falling(nn.Cell):
    """A weight decay that halves with every step."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def construct(self, global_step):
        return self.first * 0.5 ** ops.cast(global_step, mindspore.float32)


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(FEATURES, HIDDEN)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.out = torch.nn.Linear(HIDDEN, CLASSES)
        self.spare = torch.nn.Linear(HIDDEN, 2)

    def construct(self, x):
        return self.out(self.norm(ops.tanh(self.hidden(x))))


def main(folder):
    mindspore.set_seed(3)
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    rows = [(values((FEATURES,), i, 1.0), integers((), 300 + i, CLASSES)) for i in range(BATCH * STEPS)]
    dataset = GeneratorDataset(rows, ["data", "label"], shuffle=False).batch(BATCH)
    model = Net()
    for i, (name, param) in enumerate(model.parameters_and_names()):
        assert name == param.name
        param.set_data(Tensor(values(param.shape, i), mindspore.float32))
    loss_fn = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")
    rate = nn.piecewise_constant_lr([3, 6, STEPS], [0.04, 0.02, 0.01])
    optimizer = nn.Lamb(model.trainable_params(), learning_rate=rate, weight_decay=Falling(0.08))
    loss_scaler = DynamicLossScaler(scale_value=2**10, scale_factor=2, scale_window=3)

    def forward_fn(data, label):
        logits = model(data)
        loss = loss_fn(logits, label)
        return loss_scaler.scale(loss), logits

    grad_fn = mindspore.value_and_grad(forward_fn, None, optimizer.parameters, has_aux=True)
    model.set_train()
    losses, rates, decays, scales = [], [], [], []
    for step, (data, label) in enumerate(dataset.create_tuple_iterator()):
        if step == 4:
            data = data * 1e38 * 1e38
        rates.append(float(optimizer.get_lr().asnumpy()))
        decays.append(float(np.reshape(optimizer.get_weight_decay().asnumpy(), ())))
        (loss, _), grads = grad_fn(data, label)
        loss, grads = loss_scaler.unscale(loss), loss_scaler.unscale(grads)
        is_finite = all_finite(grads)
        if is_finite:
            grads = ops.clip_by_global_norm(grads, 0.4)
            optimizer(grads)
            losses.append(float(loss.asnumpy()))
        loss_scaler.adjust(is_finite)
        scales.append(float(loss_scaler.scale_value.asnumpy()))
    return {
        "losses": losses,
        "rates": rates,
        "decays": decays,
        "scales": scales,
        "weights": listed(model.trainable_params()),
    }
