"""Steps with a loss scale: the loss is scaled, gradients are unscaled, and a step that overflowed is not taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torchlamb.mindspore.checks import check_count, check_number
from torchlamb.mindspore.common.parameter import Parameter
from torchlamb.mindspore.common.tensor import Tensor, plain, set_data, wrap
from torchlamb.mindspore.context import ParallelMode, get_context
from torchlamb.mindspore.nn.cell import Cell
from torchlamb.mindspore.nn.wrap.cell_wrapper import TrainOneStepCell
from torchlamb.mindspore.ops import operations as P
from torchlamb.mindspore.ops.composite import HyperMap
from torchlamb.mindspore.ops.functional import cast, depend, ones_like
from torchlamb.options import fail


class DynamicLossScaleUpdateCell(Cell):
    """Divides a loss scale after an overflow, down to 1 at least, and multiplies it when there was none for a while.

    Args:
        loss_scale_value: the first scale, a number > 0
        scale_factor: by which, a number >= 1
        scale_window: after so many steps in a row without an overflow, an int >= 1

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore import Parameter, Tensor, nn
        >>> update, scale = nn.DynamicLossScaleUpdateCell(2**12, 2, 1000), Parameter(Tensor(4096.0), requires_grad=False)
        >>> update(scale, Tensor(True)), scale.item()
        (Tensor(True), 2048.0)

    Source: `mindspore.nn.DynamicLossScaleUpdateCell`.
    """

    def __init__(self, loss_scale_value: float, scale_factor: float, scale_window: int) -> None:
        super().__init__()
        self.loss_scale_value = check_number("loss_scale_value", loss_scale_value, above=0)
        self.scale_factor = check_number("scale_factor", scale_factor, least=1)
        self.scale_window = check_count("scale_window", scale_window)
        self.cur_iter = Parameter(1, "current_iterator_step", requires_grad=False)
        self.last_overflow_iter = Parameter(0, "last_overflow_iterator_step", requires_grad=False)

    def get_loss_scale(self) -> float:
        """Return the first scale."""
        return self.loss_scale_value

    def construct(self, loss_scale: Any, overflow: Any) -> Any:
        """Write the next scale into `loss_scale` and return `overflow`. Nothing is read back from the device."""
        scale, now, last = plain(loss_scale).detach(), plain(self.cur_iter).detach(), plain(self.last_overflow_iter).detach()
        overflown = torch.as_tensor(plain(overflow), device=scale.device)
        grows = (now - last).to(scale.device) >= self.scale_window
        shrunk = torch.where(overflown, (scale / self.scale_factor).clamp(min=1.0), scale)
        set_data(loss_scale, torch.where(grows & ~overflown, shrunk * self.scale_factor, shrunk))
        set_data(self.last_overflow_iter, torch.where((overflown | grows).reshape(()).to(now.device), now, last))
        set_data(self.cur_iter, now + 1)
        return overflow


class FixedLossScaleUpdateCell(Cell):
    """Leaves a loss scale as it is.

    Args:
        loss_scale_value: the scale, a number > 0

    Raises:
        TypeError, ValueError: it is none

    Example:
        >>> from torchlamb.mindspore import nn
        >>> nn.FixedLossScaleUpdateCell(1024).get_loss_scale()
        1024.0

    Source: `mindspore.nn.FixedLossScaleUpdateCell`.
    """

    def __init__(self, loss_scale_value: float) -> None:
        super().__init__()
        self.loss_scale_value = check_number("loss_scale_value", loss_scale_value, above=0)

    def get_loss_scale(self) -> float:
        """Return the scale."""
        return self.loss_scale_value

    def construct(self, loss_scale: Any, overflow: Any) -> Any:  # noqa: ARG002
        """Return `overflow`."""
        return overflow


class TrainOneStepWithLossScaleCell(TrainOneStepCell):
    """A `TrainOneStepCell` with a loss scale: a call returns the loss, whether gradients overflowed, and the scale.

    Subclasses define `construct`, with ``self.scale_sense``, `start_overflow_check`, `get_overflow_status` and
    `process_loss_scale` beside what `TrainOneStepCell` has.

    Args:
        network: any torch module that returns the loss
        optimizer: of its parameters, as in `TrainOneStepCell`
        scale_sense: a `DynamicLossScaleUpdateCell`, a `FixedLossScaleUpdateCell` or a cell of one's own; or a tensor with one
            element, which `set_sense_scale` changes

    Raises:
        TypeError: an argument of another type
        ValueError: a tensor of more elements

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> net = nn.WithLossCell(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> optimizer = nn.Lamb(net.trainable_params(), learning_rate=0.1)
        >>> step = nn.TrainOneStepWithLossScaleCell(net, optimizer, nn.DynamicLossScaleUpdateCell(2**12, 2, 1000))
        >>> loss, overflow, scale = step(torch.full((4, 2), torch.inf), torch.ones(4, 1))
        >>> overflow.item(), scale.item(), int(optimizer.global_step)
        (True, 2048.0, 0)

    Source: `mindspore.nn.TrainOneStepWithLossScaleCell`.
    """

    def __init__(self, network: nn.Module, optimizer: Any, scale_sense: Any) -> None:
        super().__init__(network, optimizer, None)
        self.loss_scaling_manager = None
        if isinstance(scale_sense, nn.Module):
            self.loss_scaling_manager = scale_sense
            scale_sense = Tensor(scale_sense.get_loss_scale(), torch.float32)  # type: ignore[operator]
        elif not isinstance(plain(scale_sense), torch.Tensor):
            raise fail(TypeError, "scale_sense", "an update cell or a tensor with one element", scale_sense)
        elif tuple(scale_sense.shape) not in ((), (1,)):
            raise fail(ValueError, "scale_sense", "of shape () or (1,)", tuple(scale_sense.shape))
        self.scale_sense = Parameter(scale_sense, "scale_sense", requires_grad=False)
        self.hyper_map = HyperMap()
        self.base, self.base0 = Tensor(1, torch.float32), Tensor(0, torch.int32)
        self.reduce_sum, self.reduce_all = P.ReduceSum(keep_dims=False), P.ReduceAll(keep_dims=False)
        self.less_equal, self.equal, self.logic_not = P.LessEqual(), P.Equal(), P.LogicalNot()
        self.allreduce = P.AllReduce()
        self.is_distributed = self.parallel_mode != ParallelMode.STAND_ALONE
        self.gpu_target = get_context("device_target") == "GPU"

    def construct(self, *inputs: Any) -> Any:
        """Take a step unless gradients overflow, and return (loss, overflow, scale)."""
        loss = self.network(*inputs)
        scale = self.scale_sense
        status, scale = self.start_overflow_check(loss, scale)
        grads = self.grad(self.network, self.weights)(*inputs, ones_like(loss) * cast(scale, loss.dtype))
        grads = tuple(gradient / cast(scale, gradient.dtype) for gradient in grads)
        grads = self.grad_reducer(grads)
        overflow = self.get_overflow_status(status, grads)
        if not self.process_loss_scale(overflow):
            self.optimizer(grads)
        return loss, overflow, scale

    def set_sense_scale(self, sens: Any) -> None:
        """Change the scale.

        Raises:
            TypeError: `sens` is no tensor
            ValueError: of another shape
        """
        if not isinstance(plain(sens), torch.Tensor):
            raise fail(TypeError, "sens", "a tensor", type(sens))
        self.scale_sense.set_data(sens)

    def start_overflow_check(self, pre_cond: Any, compute_input: Any) -> tuple[Any, Any]:  # noqa: ARG002
        """Return a status for `get_overflow_status`, and `compute_input`."""
        return P.NPUAllocFloatStatus()(), compute_input

    def get_overflow_status(self, status: Any, compute_output: Sequence[Any]) -> Any:
        """Return whether a tensor of `compute_output` is not finite, on any process: a 0-dim bool tensor."""
        flags = P.NPUGetFloatStatus()(depend(status, tuple(compute_output)))
        count = plain(self.allreduce(flags) if self.is_distributed else flags).sum()
        return wrap(count > 0)

    def process_loss_scale(self, overflow: Any) -> Any:
        """Let the update cell, if there is one, set the next scale, and return `overflow`."""
        return overflow if self.loss_scaling_manager is None else self.loss_scaling_manager(self.scale_sense, overflow)
