"""What optimizers are asked for between steps: learning rates, weight decays, and which step comes next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlamb.mindspore.common.parameter import NamedParameter, Parameter, ParameterTuple
from torchlamb.mindspore.common.tensor import Tensor as FrontTensor
from torchlamb.mindspore.common.tensor import plain, set_data
from torchlamb.mindspore.nn.optim.learning_rate import DYNAMIC, DYNAMIC_DECAY, LearningRate, WeightDecay, decay_at, value_at
from torchlamb.options import fail, flag

_TARGETS = ("CPU", "GPU", "Ascend")


class Live(Parameter):  # type: ignore[metaclass]
    """A number of an optimizer as a tensor: what is written into it, as by `ops.assign`, the optimizer takes over."""

    _write: Callable[[Tensor], None]

    def __new__(cls, values: Any, name: str, write: Callable[[Tensor], None]) -> Any:
        """Return the number as it is now, and keep how it is written."""
        made = super().__new__(cls, values, name, requires_grad=False)
        made._write = write
        return made

    def set_data(self, data: Any, slice_shape: bool = False) -> Any:  # noqa: ARG002
        """Take over a value, here and in the optimizer.

        Raises:
            TypeError, ValueError: the optimizer does not take it; nothing has changed then
        """
        values = plain(data)
        self._write(values.detach() if isinstance(values, Tensor) else torch.as_tensor(values))
        return set_data(self, data)


class Questions(Optimizer):
    """What `nn.Lamb` has of MindSpore's `Optimizer` beside stepping. It has the attributes named here."""

    _learning_rate: LearningRate
    _group_rates: list[LearningRate]
    _group_decays: list[WeightDecay]
    _written: list[Any]  # what was last written to each group's "lr" by the optimizer itself
    _order: list[int]  # positions of parameters in the concatenated groups
    _global_step: int
    _is_grouped: bool
    _has_group_lr: bool
    _unique: bool
    _target: str

    @property
    def parameters(self) -> ParameterTuple:
        """All parameters with their names, in the order in which gradients are taken."""
        flat: list[NamedParameter] = []
        for group in self.param_groups:
            names = group.get("param_names") or [f"parameters[{len(flat) + i}]" for i in range(len(group["params"]))]
            flat += map(NamedParameter, names, group["params"])
        return ParameterTuple(flat[i] for i in self._order)

    @property
    def global_step(self) -> Any:
        """The number of steps taken, which is the 0-based number of the next one: an int32 tensor of shape (1,)."""

        def write(values: Tensor) -> None:
            if values.numel() != 1 or values.item() < 0 or values.item() != int(values.item()):
                raise fail(ValueError, "global_step", "one int >= 0", values.tolist())
            self._global_step = int(values.item())

        return Live(torch.tensor([self._global_step], dtype=torch.int32, device="cpu"), "global_step", write)

    @global_step.setter
    def global_step(self, value: Any) -> None:
        self.global_step.set_data(value)

    @property
    def learning_rate(self) -> Any:
        """The learning rate as it was given: a schedule, a vector, or of a fixed one a tensor that can be written to.

        Where groups have their own: a tuple with that of each of ``optimizer.parameters``.
        """
        if not self._has_group_lr:
            return self._as_given(range(len(self.param_groups)))
        return tuple(self._as_given([i]) for i in self._groups_of_parameters())

    def get_lr(self) -> Any:
        """Return the learning rate of the coming step, whenever it is asked for: a 0-dim float32 tensor.

        Where groups have their own: a tuple with that of each of ``optimizer.parameters``. Of a vector that is used up, the
        last value.

        Raises:
            TypeError, ValueError: a schedule returned something else than a finite number >= 0
        """
        rates = [FrontTensor(self._coming_lr(i), torch.float32) for i in range(len(self.param_groups))]
        return tuple(rates[i] for i in self._groups_of_parameters()) if self._has_group_lr else rates[0]

    def get_lr_parameter(self, param: Any) -> Any:
        """Return the learning rate of a parameter, or of each in a list, as `learning_rate` does.

        Raises:
            TypeError: it is neither a parameter nor a list of them
            ValueError: the optimizer does not have it
        """
        if not isinstance(param, list):
            return self.get_lr_parameter([param])[0]
        found = []
        for i, entry in enumerate(param):
            if not isinstance(entry, Parameter):
                raise fail(TypeError, f"param[{i}]", "a parameter", type(entry))
            owners = [j for j, group in enumerate(self.param_groups) if any(p is plain(entry) for p in group["params"])]
            if not owners:
                name = getattr(entry, "name", None) or f"of shape {tuple(entry.shape)}"
                raise ValueError(f"param[{i}], {name}, is not in the optimizer; give one of optimizer.parameters")
            found.append(self._as_given(owners if self._has_group_lr else range(len(self.param_groups))))
        return found

    def get_weight_decay(self) -> Any:
        """Return the weight decay of the coming step, a 0-dim float32 tensor; with groups, a tuple with that of each parameter.

        Raises:
            TypeError, ValueError: a cell returned something else than a finite number >= 0
        """
        decays = [FrontTensor(decay, torch.float32) for decay in self._next_decays()]
        return tuple(decays[i] for i in self._groups_of_parameters()) if self._is_grouped else decays[0]

    @property
    def unique(self) -> bool:
        """Kept and returned; gradients are never sparse here."""
        return self._unique

    @unique.setter
    def unique(self, value: bool) -> None:
        self._unique = flag("unique", value)

    @property
    def target(self) -> str:
        """Kept and returned; a parameter is updated on the device that it is on."""
        on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        return self._target or ("CPU" if on_cpu else "GPU")

    @target.setter
    def target(self, value: str) -> None:
        if not isinstance(value, str):
            raise fail(TypeError, "target", "'CPU', 'GPU' or 'Ascend'", value)
        if value not in _TARGETS:
            raise fail(ValueError, "target", "'CPU', 'GPU' or 'Ascend'", value)
        self._target = value

    def _groups_of_parameters(self) -> list[int]:
        flat = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        return [flat[position] for position in self._order]

    def _as_given(self, groups: Any) -> Any:
        rate = self._group_rates[groups[0]]
        if isinstance(rate, DYNAMIC):
            return FrontTensor(rate, torch.float32) if isinstance(rate, tuple) else rate

        def write(values: Tensor) -> None:
            number = values.item()
            if not 0 <= number < float("inf"):
                raise fail(ValueError, "learning_rate", "a finite number >= 0", number)
            for i in groups:
                lr = self.param_groups[i]["lr"]
                self.param_groups[i]["lr"] = lr.fill_(number) if isinstance(lr, Tensor) else number

        now = self.param_groups[groups[0]]["lr"]
        return Live(torch.as_tensor(now, dtype=torch.float32), "learning_rate", write)

    def _coming_lr(self, i: int) -> Any:
        rate, lr = self._group_rates[i], self.param_groups[i]["lr"]
        return self._current(rate) if isinstance(rate, DYNAMIC) and lr == self._written[i] else lr

    def _current(self, rate: LearningRate) -> Any:
        """Return what a group shows before its next step; a vector that is used up shows its last value."""
        if isinstance(rate, tuple):
            return rate[min(self._global_step, len(rate) - 1)]
        return value_at(rate, self._global_step) if isinstance(rate, DYNAMIC) else rate

    def _next_decays(self) -> list[float]:
        """Return the weight decay that each group steps with."""
        pairs = zip(self.param_groups, self._group_decays, strict=True)
        return [
            decay_at(decay, self._global_step) if isinstance(decay, DYNAMIC_DECAY) else group["weight_decay"]
            for group, decay in pairs
        ]
