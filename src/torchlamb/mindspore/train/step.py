"""A network, its loss and any torch optimizer as one cell, of which a call is a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torchlamb.mindspore.common.tensor import Tensor, plain
from torchlamb.mindspore.nn.cell import Cell
from torchlamb.mindspore.train.loss_scale_manager import LossScaleManager, fill_gradients
from torchlamb.options import fail


class Step(Cell):
    """What `Model` trains with where it has an optimizer.

    Unlike `nn.TrainOneStepCell` it goes backward through ``.grad``, so that wrappers with hooks (DDP, FSDP) and any optimizer
    work. The gradient is that of the sum where the loss is one for each sample.
    """

    def __init__(
        self,
        network: nn.Module,
        loss_fn: Callable[[Any, Any], Any] | None,
        optimizer: Optimizer,
        manager: LossScaleManager | None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.loss_fn, self.optimizer, self.manager = loss_fn, optimizer, manager

    def construct(self, *inputs: Any) -> Any:
        """Take a step and return the loss; with a manager that drops steps, (loss, overflow, scale)."""
        loss = self.network(*inputs) if self.loss_fn is None else self.loss_fn(self.network(inputs[0]), inputs[1])
        if not isinstance(loss, torch.Tensor):
            raise fail(TypeError, "the loss", "a tensor; give Model a loss_fn, or a network that returns its loss", loss)
        total = plain(loss).sum() if loss.dim() else plain(loss)
        self.optimizer.zero_grad()
        if self.manager is None:
            total.backward()
            fill_gradients(self.optimizer)
            self.optimizer.step()
            return loss
        overflow = self.manager.train_step(total, self.optimizer)
        if not self.manager.get_drop_overflow_update():
            return loss
        return loss, Tensor(overflow), Tensor(self.manager.get_loss_scale(), torch.float32)
