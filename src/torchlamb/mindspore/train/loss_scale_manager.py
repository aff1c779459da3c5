"""Loss scales for float16 gradients, on top of `torch.amp.GradScaler`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from torchlamb.mindspore.checks import check_count, check_number
from torchlamb.mindspore.common.tensor import plain
from torchlamb.mindspore.nn.wrap.loss_scale import DynamicLossScaleUpdateCell, FixedLossScaleUpdateCell
from torchlamb.options import flag


class LossScaleManager:
    """What both managers have in common: a loss is scaled, gradients are unscaled before the optimizer sees them.

    `scaler` is the GradScaler that does it. Made for "cpu", it serves every device: its tensors follow the loss.
    """

    def __init__(self, **keywords: Any) -> None:
        self.scaler = GradScaler("cpu", **keywords)

    def get_loss_scale(self) -> float:
        """Return what the next loss is multiplied by."""
        return self.scaler.get_scale()

    def get_drop_overflow_update(self) -> bool:
        """Return whether a step whose gradients overflowed is dropped."""
        return True

    def get_update_cell(self) -> nn.Module | None:
        """Return a new cell for `nn.TrainOneStepWithLossScaleCell`, with a scale of its own; None if nothing is dropped."""
        raise NotImplementedError

    def update_loss_scale(self, overflow: Any) -> None:
        """Take note of a step that was made without `train_step`: whether its gradients overflowed."""

    def train_step(self, loss: Tensor, optimizer: Optimizer) -> bool:
        """Go backward from the scaled loss, unscale the gradients, step, and update the scale.

        Parameters that the loss does not use get gradients of zeros.

        Args:
            loss: 0-dim
            optimizer: any, with its gradients cleared

        Returns:
            Whether the step was dropped, because gradients overflowed.

        Raises:
            ValueError: parameters that are float16 themselves, as GradScaler says
        """
        taken: list[bool] = []

        def note(stepping: Optimizer, *_: Any) -> None:
            found = getattr(stepping, "found_inf", None)  # of those that the scaler lets decide themselves
            taken.append(found is None or not found)

        self.scaler.scale(plain(loss)).backward()
        fill_gradients(optimizer)
        hook = optimizer.register_step_pre_hook(note)
        try:
            self.scaler.unscale_(optimizer)
            if self.get_drop_overflow_update():
                self.scaler.step(optimizer)
            else:
                optimizer.step()
        except BaseException:
            self._keep_scale()  # or the scaler would say of every later step that unscale_() has been called
            raise
        finally:
            hook.remove()
        self._update()
        return taken != [True]

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes to go on with the same scale."""
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned."""
        self.scaler.load_state_dict(state_dict)

    def _update(self) -> None:
        raise NotImplementedError

    def _keep_scale(self) -> None:
        """Tell the scaler that the step is over. GradScaler has no factor of 1, but takes a new scale."""
        self.scaler.update(self.scaler.get_scale())


class FixedLossScaleManager(LossScaleManager):
    """A loss scale that stays.

    Args:
        loss_scale: what the loss is multiplied by, a number >= 1 (default: 128.0)
        drop_overflow_update: drop a step whose gradients are not all finite; if False it is taken with them, and only
            `skip_nonfinite=True` of the optimizer keeps them out of the parameters (default: True)

    Raises:
        TypeError: an argument of another type
        ValueError: `loss_scale` is less than 1

    Example:
        >>> from torchlamb.mindspore import FixedLossScaleManager
        >>> FixedLossScaleManager(1024.0).get_loss_scale()
        1024.0

    Source: `mindspore.amp.FixedLossScaleManager`.
    """

    def __init__(self, loss_scale: float = 128.0, drop_overflow_update: bool = True) -> None:
        self._drop = flag("drop_overflow_update", drop_overflow_update)
        super().__init__(init_scale=check_number("loss_scale", loss_scale, least=1))

    def get_drop_overflow_update(self) -> bool:
        """Return whether a step whose gradients overflowed is dropped."""
        return self._drop

    def get_update_cell(self) -> nn.Module | None:
        """Return a new cell that `nn.TrainOneStepWithLossScaleCell` takes; None if nothing is dropped."""
        return FixedLossScaleUpdateCell(self.get_loss_scale()) if self._drop else None

    def _update(self) -> None:
        self._keep_scale()


class DynamicLossScaleManager(LossScaleManager):
    """A loss scale that shrinks when gradients overflow, dropping that step, and grows when they have not for a while.

    Args:
        init_loss_scale: the first scale, a number >= 1 (default: 2 ** 24)
        scale_factor: divides the scale after an overflow, down to 1 at least, and multiplies it, a number > 1 (default: 2)
        scale_window: after so many steps in a row without an overflow, an int >= 1 (default: 2000)

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range

    Example:
        >>> from torchlamb.mindspore import DynamicLossScaleManager
        >>> DynamicLossScaleManager(scale_window=100).get_loss_scale()
        16777216.0

    Source: `mindspore.amp.DynamicLossScaleManager`.
    """

    def __init__(self, init_loss_scale: float = 2**24, scale_factor: float = 2, scale_window: int = 2000) -> None:
        factor = check_number("scale_factor", scale_factor, above=1)
        self._good_steps = 0  # in a row, that update_loss_scale() was told of
        super().__init__(
            init_scale=check_number("init_loss_scale", init_loss_scale, least=1),
            growth_factor=factor,
            backoff_factor=1 / factor,
            growth_interval=check_count("scale_window", scale_window),
        )

    def get_update_cell(self) -> nn.Module | None:
        """Return a new cell that `nn.TrainOneStepWithLossScaleCell` takes, and begins with the present scale."""
        factor = self.scaler.get_growth_factor()
        return DynamicLossScaleUpdateCell(self.get_loss_scale(), factor, self.scaler.get_growth_interval())

    def update_loss_scale(self, overflow: Any) -> None:
        """Take note of a step that was made without `train_step`: whether its gradients overflowed."""
        factor, scale = self.scaler.get_growth_factor(), self.get_loss_scale()
        self._good_steps = 0 if overflow else self._good_steps + 1
        if overflow:
            scale = max(scale / factor, 1.0)
        elif self._good_steps == self.scaler.get_growth_interval():
            scale, self._good_steps = scale * factor, 0
        self.scaler.scale(torch.zeros(()))  # it makes its tensor at the first use
        self.scaler.update(scale)

    def _update(self) -> None:
        self.scaler.update()
        if self.scaler.get_scale() < 1:
            self.scaler.update(1.0)


def fill_gradients(optimizer: Optimizer) -> None:
    """Give zeros as gradients to those parameters that have none, as MindSpore does, so that they decay."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None and p.requires_grad:
                p.grad = torch.zeros_like(p)
