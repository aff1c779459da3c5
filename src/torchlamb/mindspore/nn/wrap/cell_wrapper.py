"""Cells around a network: with its loss, and with its optimizer, so that a call is a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchlamb.mindspore.common.tensor import plain, wrap
from torchlamb.mindspore.context import ParallelMode
from torchlamb.mindspore.nn.cell import Cell
from torchlamb.mindspore.nn.clip import Identity
from torchlamb.mindspore.nn.wrap.grad_reducer import DistributedGradReducer
from torchlamb.mindspore.ops.functional import fill
from torchlamb.mindspore.ops.gradients import GradOperation
from torchlamb.mindspore.parallel._utils import _get_device_num, _get_gradients_mean, _get_parallel_mode
from torchlamb.options import fail


class WithLossCell(Cell):
    """A network and its loss as one cell of (data, label).

    Args:
        backbone: any torch module
        loss_fn: a callable of (outputs, labels)

    Raises:
        TypeError: an argument of another type

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> net = nn.WithLossCell(torch.nn.Identity(), torch.nn.MSELoss())
        >>> net(torch.zeros(3), torch.ones(3))
        tensor(1.)

    Source: `mindspore.nn.WithLossCell`.
    """

    def __init__(self, backbone: nn.Module, loss_fn: Callable[[Any, Any], Any]) -> None:
        super().__init__(auto_prefix=False)
        self._backbone = _checked("backbone", backbone)
        if not callable(loss_fn):
            raise fail(TypeError, "loss_fn", "a callable of (outputs, labels)", loss_fn)
        self._loss_fn = loss_fn

    def construct(self, data: Any, label: Any) -> Any:
        """Return the loss."""
        return self._loss_fn(self._backbone(data), label)

    @property
    def backbone_network(self) -> nn.Module:
        """The network without the loss."""
        return self._backbone


class WithEvalCell(Cell):
    """A network and its loss as one cell that returns the loss, the outputs and the labels, for metrics.

    Args:
        network: any torch module
        loss_fn: a callable of (outputs, labels); None for a loss of 0 (default: None)
        add_cast_fp32: cast the outputs to float32 (default: False)

    Raises:
        TypeError: an argument of another type

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> len(nn.WithEvalCell(torch.nn.Identity(), torch.nn.MSELoss())(torch.zeros(3), torch.ones(3)))
        3

    Source: `mindspore.nn.WithEvalCell`.
    """

    def __init__(
        self, network: nn.Module, loss_fn: Callable[[Any, Any], Any] | None = None, add_cast_fp32: bool = False
    ) -> None:
        super().__init__(auto_prefix=False)
        self._network = _checked("network", network)
        if loss_fn is not None and not callable(loss_fn):
            raise fail(TypeError, "loss_fn", "a callable of (outputs, labels)", loss_fn)
        self._loss_fn = loss_fn
        self.add_cast_fp32 = bool(add_cast_fp32)

    def construct(self, data: Any, label: Any) -> Any:
        """Return (loss, outputs, labels)."""
        outputs = self._network(data)
        if self.add_cast_fp32:
            outputs, label = outputs.float(), label.float() if label.is_floating_point() else label
        loss = torch.zeros(()) if self._loss_fn is None else self._loss_fn(outputs, label)
        return loss, outputs, label


class TrainOneStepCell(Cell):
    """A network that returns its loss, and the optimizer of its parameters: a call is a step, and returns the loss.

    The gradient is that of the sum where the loss is one for each sample. Parameters that the loss does not use get gradients
    of zeros, so they decay. Subclasses define `construct`, with ``self.network``, ``self.weights``, ``self.grad``,
    ``self.grad_reducer`` and ``self.optimizer``.

    Args:
        network: any torch module that returns the loss
        optimizer: of its parameters: `nn.Lamb`, or what else has ``parameters`` and is called with gradients
        sens: multiplies the gradients, a number other than 0; None for 1 (default: 1.0)
        return_grad: return the loss and a dict of gradients by name (default: False)

    Raises:
        TypeError: an argument of another type
        ValueError: `sens` is 0

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.WithLossCell(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> step = nn.TrainOneStepCell(net, nn.Lamb(net.trainable_params(), learning_rate=0.1))
        >>> losses = [step(torch.ones(4, 2), torch.ones(4, 1)).item() for _ in range(20)]
        >>> losses[-1] < 0.1 * losses[0]
        True

    Source: `mindspore.nn.TrainOneStepCell`.
    """

    def __init__(self, network: nn.Module, optimizer: Any, sens: float | None = 1.0, return_grad: bool = False) -> None:
        super().__init__(auto_prefix=False)
        if sens is not None and (isinstance(sens, bool) or not isinstance(sens, (int, float))):
            raise fail(TypeError, "sens", "a number other than 0, or None", sens)
        if sens == 0:
            raise fail(ValueError, "sens", "a number other than 0, or None", sens)
        self.network = _checked("network", network)
        if not callable(optimizer) or not hasattr(optimizer, "parameters"):
            raise fail(
                TypeError,
                "optimizer",
                "nn.Lamb, or what has parameters and is called with gradients; Model takes any other",
                type(optimizer),
            )
        self.optimizer = optimizer
        self.weights = optimizer.parameters
        self.grad = GradOperation(get_by_list=True, sens_param=True)
        self.grad_no_sens = GradOperation(get_by_list=True)
        self.sens: Any = 1.0 if sens is None else sens
        self.return_grad = bool(return_grad)
        self.parallel_mode = _get_parallel_mode()
        self.reducer_flag = self.parallel_mode in (ParallelMode.DATA_PARALLEL, ParallelMode.HYBRID_PARALLEL)
        self.mean, self.degree = _get_gradients_mean(), _get_device_num()
        self.grad_reducer: nn.Module = Identity()
        if self.reducer_flag:
            self.grad_reducer = DistributedGradReducer(self.weights, self.mean, self.degree)

    def construct(self, *inputs: Any) -> Any:
        """Take a step and return the loss."""
        loss = self.network(*inputs)
        if not isinstance(plain(loss), torch.Tensor):
            raise fail(TypeError, "what network returns", "the loss, a tensor; wrap both in WithLossCell", type(loss))
        sens = fill(loss.dtype, loss.shape, self.sens)
        grads = self.grad_reducer(self.grad(self.network, self.weights)(*inputs, sens))
        self.optimizer(grads)
        if self.return_grad:
            return loss, {weight.name: gradient for weight, gradient in zip(self.weights, grads, strict=True)}
        return loss


class _VirtualDatasetCell(Cell):
    """A network; what MindSpore's parallel modes do with its inputs is not needed."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(auto_prefix=False)
        self._backbone = _checked("backbone", backbone)

    def construct(self, *inputs: Any) -> Any:
        """Call the network."""
        return self._backbone(*inputs)


def _checked(name: str, network: Any) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise fail(TypeError, name, "a torch.nn.Module", type(network))
    return network


def detached(value: Any) -> Any:
    """Return tensors, alone or in tuples, lists and dicts, without their graphs; parameters as they are now."""
    if isinstance(value, nn.Parameter):
        return wrap(plain(value).detach().clone())
    if isinstance(plain(value), torch.Tensor):
        return wrap(plain(value).detach())
    if isinstance(value, (tuple, list)):
        return type(value)(map(detached, value)) if not hasattr(value, "_fields") else type(value)(*map(detached, value))
    return {key: detached(x) for key, x in value.items()} if isinstance(value, dict) else value
