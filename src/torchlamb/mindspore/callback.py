"""What runs beside a training and can stop it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class TrainState:
    """Where a training stands; numbers count from 1."""

    network: nn.Module
    loss_fn: Any
    optimizer: Optimizer
    train_dataset: Any
    epoch_num: int  # epochs in all
    batch_num: int | None  # steps in an epoch; None where the dataset has no length
    cur_epoch_num: int = 0
    cur_step_num: int = 0  # over all epochs of this training
    net_outputs: Tensor | None = None  # the last loss, 0-dim


class RunContext:
    """What callbacks are given."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._stop = False

    def original_args(self) -> TrainState:
        """Return where the training stands."""
        return self._state

    def request_stop(self) -> None:
        """End the training after this step."""
        self._stop = True

    def get_stop_requested(self) -> bool:
        """Return whether a callback has asked to stop."""
        return self._stop


class Callback:
    """Base class of callbacks; each method does nothing until it is defined.

    Example:
        >>> from torchlamb.mindspore import Callback
        >>> class StopAtStep(Callback):
        ...     def __init__(self, step):
        ...         self.step = step
        ...     def step_end(self, run_context):
        ...         if run_context.original_args().cur_step_num == self.step:
        ...             run_context.request_stop()
    """

    def begin(self, run_context: RunContext) -> None:
        """Run before the first epoch."""

    def epoch_begin(self, run_context: RunContext) -> None:
        """Run before each epoch."""

    def step_begin(self, run_context: RunContext) -> None:
        """Run before each step."""

    def step_end(self, run_context: RunContext) -> None:
        """Run after each step."""

    def epoch_end(self, run_context: RunContext) -> None:
        """Run after each epoch, also after one that was stopped."""

    def end(self, run_context: RunContext) -> None:
        """Run after the last epoch, also after a stop, but not after an error."""
