"""Callbacks that print the loss and the time."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from torchlamb.mindspore.checks import check_count
from torchlamb.mindspore.common.tensor import plain
from torchlamb.mindspore.train.callback.base import Callback, RunContext
from torchlamb.options import fail, flag


class LossMonitor(Callback):
    """Prints the loss, and ends the training with an error where it is NaN or infinite.

    Args:
        per_print_times: after how many steps, an int >= 0; 0 for never (default: 1)

    Raises:
        TypeError, ValueError: it is none

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import LossMonitor, Model, nn
        >>> net = torch.nn.Linear(1, 1)
        >>> model = Model(net, torch.nn.MSELoss(), nn.Lamb(nn.trainable_params(net), 0.0))
        >>> batch = (torch.ones(2, 1), net(torch.ones(2, 1)).detach())
        >>> model.train(1, [batch] * 4, callbacks=[LossMonitor(2)])
        epoch: 1 step: 2, loss is 0.0
        epoch: 1 step: 4, loss is 0.0

    Source: `mindspore.train.LossMonitor`.
    """

    def __init__(self, per_print_times: int = 1) -> None:
        if per_print_times != 0 or isinstance(per_print_times, bool):
            check_count("per_print_times", per_print_times)
        self._per_print_times = per_print_times
        self._last_print_time = 0

    def step_end(self, run_context: RunContext) -> None:
        """Print the loss.

        Raises:
            ValueError: it is not finite
        """
        state = run_context.original_args()
        if state.cur_step_num <= self._last_print_time:  # of another training
            self._last_print_time = 0
        due = self._per_print_times and state.cur_step_num - self._last_print_time >= self._per_print_times
        loss = mean_loss(state.net_outputs)
        number = loss.item() if isinstance(loss, torch.Tensor) else loss
        epoch, step = state.get("cur_epoch_num", 1), state.cur_step_num
        step = (step - 1) % state.batch_num + 1 if state.get("batch_num") else step
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"the loss is {number} in epoch {epoch}, step {step}; the training ends here")
        if due:
            self._last_print_time = state.cur_step_num
            show(f"epoch: {epoch} step: {step}, loss is {number}")

    def on_train_epoch_end(self, run_context: RunContext) -> None:
        """Print the metrics of `Model.fit`, where this epoch was evaluated."""
        state = run_context.original_args()
        if state.get("metrics") and state.mode == "train":
            show(f"Eval result: epoch {state.cur_epoch_num}, metrics: {state['metrics']}")
        super().on_train_epoch_end(run_context)


class TimeMonitor(Callback):
    """Prints how long an epoch has taken, and each of its steps.

    Args:
        data_size: steps of an epoch, an int >= 1, where the dataset has no length (default: None)
        data_time: accepted, does nothing (default: False)

    Raises:
        TypeError, ValueError: `data_size` is no int >= 1

    Example:
        >>> from torchlamb.mindspore import TimeMonitor
        >>> monitor = TimeMonitor(data_size=100)

    Source: `mindspore.train.TimeMonitor`.
    """

    def __init__(self, data_size: int | None = None, data_time: bool = False) -> None:
        self.data_size = None if data_size is None else check_count("data_size", data_size)
        self.data_time = flag("data_time", data_time)
        self.epoch_time = time.time()

    def epoch_begin(self, run_context: RunContext) -> None:  # noqa: ARG002
        """Note the time."""
        self.epoch_time = time.time()

    def epoch_end(self, run_context: RunContext) -> None:
        """Print the time since.

        Raises:
            ValueError: neither the dataset nor this has a number of steps
        """
        milliseconds = (time.time() - self.epoch_time) * 1000
        state = run_context.original_args()
        steps = state.get("batch_num") or self.data_size
        if steps is None:
            raise fail(ValueError, "data_size", "given where the dataset has no length", None)
        mode = str(state.get("mode", "")).title()
        show(f"{mode} epoch time: {milliseconds:5.3f} ms, per step time: {milliseconds / steps:5.3f} ms")


def mean_loss(outputs: Any) -> Any:
    """Return the mean of the loss in what a step returned: the outputs themselves, or the first of them."""
    first = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    loss = plain(first)
    return loss.detach().float().mean() if isinstance(loss, torch.Tensor) else loss


def show(line: str) -> None:
    """Print a line without breaking a progress bar."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    tqdm.write(line)
