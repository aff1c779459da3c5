"""Gradients over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchlamb.checkpoint.together import is_distributed
from torchlamb.mindspore.common.tensor import plain, wrap
from torchlamb.mindspore.communication.management import get_group_size
from torchlamb.mindspore.nn.cell import Cell
from torchlamb.mindspore.parallel._utils import _get_gradients_mean


class DistributedGradReducer(Cell):
    """Sums gradients over the processes of torch.distributed, or averages them; of one process it returns them.

    Not for networks that reduce gradients themselves (DDP, FSDP).

    Args:
        parameters: those that the gradients are of
        mean: divide the sum by `degree`; None for the `gradients_mean` of the parallel context (default: None)
        degree: what to divide by; None for the number of processes (default: None)
        fusion_type: accepted, does nothing (default: 1)
        group: accepted, does nothing (default: None)

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> nn.DistributedGradReducer(nn.trainable_params(torch.nn.Linear(1, 1)))((torch.ones(1, 1), torch.ones(1)))
        (tensor([[1.]]), tensor([1.]))

    Source: `mindspore.nn.DistributedGradReducer`.
    """

    def __init__(
        self,
        parameters: Any,  # noqa: ARG002
        mean: bool | None = None,
        degree: int | None = None,
        fusion_type: int = 1,  # noqa: ARG002
        group: Any = None,  # noqa: ARG002
    ) -> None:
        super().__init__(auto_prefix=False)
        self.mean = _get_gradients_mean() if mean is None else bool(mean)
        self.degree = degree

    def construct(self, grads: Sequence[Any]) -> Sequence[Any]:
        """Return the gradients over all processes; every process calls this."""
        if not is_distributed():
            return grads
        reduced = []
        for gradient in plain(tuple(grads)):
            total = gradient.detach().clone()
            torch.distributed.all_reduce(total)
            reduced.append(wrap(total / (self.degree or get_group_size()) if self.mean else total))
        return tuple(reduced)
