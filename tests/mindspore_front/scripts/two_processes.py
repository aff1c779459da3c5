"""Data parallel training on two processes, which `torchrun` starts: gradients are averaged, so both end with one model."""

import sys

import torch

from torchlamb.mindspore import Model, context, nn, set_seed
from torchlamb.mindspore.communication import get_group_size, get_rank, init, release


def make(net):
    loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")
    network = nn.WithLossCell(net, loss)
    optimizer = nn.Lamb(network.trainable_params(), learning_rate=0.05, weight_decay=0.01)
    return nn.TrainOneStepWithLossScaleCell(network, optimizer, nn.DynamicLossScaleUpdateCell(1024, 2, 100))


def main():
    init()
    rank, size = get_rank(), get_group_size()
    assert size == 2
    context.set_auto_parallel_context(parallel_mode=context.ParallelMode.DATA_PARALLEL, gradients_mean=True, device_num=size)
    set_seed(0)
    step = make(torch.nn.Linear(4, 3))
    data = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(4)]
    data.insert(2, (torch.full((8, 4), float("nan")) if rank == 1 else data[0][0], data[0][1]))  # overflows on one process
    data[2][0][:4] = data[0][0][:4]
    Model(step).train(1, [(x[rank * 4 : rank * 4 + 4], y[rank * 4 : rank * 4 + 4]) for x, y in data])
    context.reset_auto_parallel_context()
    set_seed(0)
    whole = make(torch.nn.Linear(4, 3))
    Model(whole).train(1, [batch for i, batch in enumerate(data) if i != 2])
    for p, q in zip(step.network.parameters(), whole.network.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert step.optimizer.global_step == whole.optimizer.global_step == 4
    release()
    sys.stdout.write("same\n")


if __name__ == "__main__":
    main()
