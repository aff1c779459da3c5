"""A vision model: `Model` with a loss per sample, a list of learning rates, metrics, and the best checkpoint by accuracy."""

import os

import numpy as np
import torch
from script_numbers import integers, listed, values

import torchlamb.mindspore as ms
from torchlamb.mindspore import Model, Tensor, nn, ops
from torchlamb.mindspore.dataset import GeneratorDataset
from torchlamb.mindspore.train.callback import Callback, TimeMonitor

SIZE, CLASSES, SAMPLES, BATCH, EPOCHS = 6, 6, 22, 8, 3


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3, bias=False, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4 * SIZE * SIZE, CLASSES)
        self.prelu = torch.nn.PReLU()

    def construct(self, x):
        x = self.prelu(self.norm(self.conv(x)))
        return self.fc(ops.reshape(x, (x.shape[0], -1)))


class BestMonitor(Callback):
    def __init__(self, model, dataset, path):
        super().__init__()
        self.model, self.dataset, self.path = model, dataset, path
        self.best, self.losses, self.results, self.rates = -1.0, [], [], []

    def on_train_step_end(self, run_context):
        cb_params = run_context.original_args()
        loss = cb_params.net_outputs
        if isinstance(loss, (tuple, list)):
            loss = loss[0]
        self.losses.append(float(np.mean(loss.asnumpy())))

    def on_train_epoch_end(self, run_context):
        cb_params = run_context.original_args()
        result = self.model.eval(self.dataset, dataset_sink_mode=False)
        self.results.append(result)
        if result["Top_1_Accuracy"] > self.best:
            self.best = result["Top_1_Accuracy"]
            ms.save_checkpoint(cb_params.train_network, self.path, async_save=False)

    def on_train_end(self, run_context):
        loaded = ms.load_checkpoint(self.path)
        assert any(name.startswith("lamb_m.") for name in loaded)


def make_dataset(samples):
    rows = [(values((1, SIZE, SIZE), i, 1.0), integers((), 900 + i, CLASSES)) for i in range(samples)]
    return GeneratorDataset(rows, ["image", "label"], shuffle=False).batch(BATCH, drop_remainder=False)


def main(folder):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_seed(1)
    loader_train, loader_eval = make_dataset(SAMPLES), make_dataset(SAMPLES - 2)
    network = Net()
    for i, param in enumerate(network.trainable_params()):
        param.set_data(Tensor(values(param.shape, i), ms.float32))
    num_params = sum([int(np.prod(param.shape)) for param in network.get_parameters()])
    num_batches = loader_train.get_dataset_size()
    rate = nn.warmup_lr(0.1, num_batches, num_batches, 2)
    rate += nn.cosine_decay_lr(0.001, 0.1, num_batches * (EPOCHS - 1), 1, num_batches * EPOCHS)
    groups = [
        {"params": [p for p in network.trainable_params() if len(p.shape) == 1], "weight_decay": 0.0},
        {"params": [p for p in network.trainable_params() if len(p.shape) > 1]},
    ]
    optimizer = nn.Lamb(params=groups, learning_rate=[x + 0.01 for x in rate], weight_decay=0.03)
    metrics = {"Top_1_Accuracy": nn.Top1CategoricalAccuracy(), "Top_5_Accuracy": nn.Top5CategoricalAccuracy()}
    loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True)
    model = Model(network, loss_fn=loss, optimizer=optimizer, metrics=metrics, amp_level="O0")
    monitor = BestMonitor(model, loader_eval, os.path.join(folder, "best.ckpt"))
    model.train(EPOCHS, loader_train, callbacks=[monitor, TimeMonitor(num_batches)], dataset_sink_mode=False)
    return {
        "losses": monitor.losses,
        "accuracies": [float(result[name]) for result in monitor.results for name in metrics],
        "parameters": num_params,
        "weights": listed(network.trainable_params()),
    }
