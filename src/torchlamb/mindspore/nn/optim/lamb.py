"""`torchlamb.Lamb` with MindSpore's arguments: how its parameters, groups and learning rates are worded.

All arithmetic is the base class's. This room adds where the learning rate of a step comes from, and the order in which
gradients are taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from torchlamb import lamb
from torchlamb.backends import Work
from torchlamb.mindspore.checks import check_float, check_number
from torchlamb.mindspore.nn.optim.groups import (
    Group,
    centralized_apart,
    check_gradients,
    check_no_duplicates,
    positions,
    read_global_step,
    read_group,
    read_params,
)
from torchlamb.mindspore.nn.optim.learning_rate import DYNAMIC, decay_at, parse, parse_decay, value_at
from torchlamb.mindspore.nn.optim.optimizer import Questions


class Lamb(lamb.Lamb, Questions):
    r"""LAMB with the arguments of `mindspore.nn.Lamb`.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda w_{t-1} \\
        w_t &= w_{t-1} - \eta_t \frac{\|w_{t-1}\|}{\|u_t\|} u_t

    It is a :class:`torchlamb.Lamb`, and so a :class:`torch.optim.Optimizer`: gradients are taken from ``.grad`` by `step()`, or
    given by calling it. ``optimizer.parameters`` holds all parameters in order, ``optimizer.global_step`` the number of steps.

    Args:
        params: an iterable of parameters: tensors, (name, tensor) pairs or what `trainable_params` returns, or an iterable of
            dicts, the groups. Without groups, parameters with "beta" or "gamma" in their names do not decay. A group has the
            key "params"; optionally "lr" (in all forms of `learning_rate`) and "weight_decay", by default the optimizer's; and
            "grad_centralization", by default False, for the weights of convolutions: where `trainable_params` named a
            parameter, those of torch's convolution layers, and else those with 3 or more dims. One more dict,
            {"order_params": [...]} with the parameters of all groups, puts them in order.
        learning_rate: fixed: an int, a float or a 0-dim tensor, >= 0. Dynamic: a 1-D tensor or an iterable with one value for
            each step, or a LearningRateSchedule, which is called with the step. Steps count from 0.
        beta1: decay rate of the first moment, a float in (0, 1) (default: 0.9)
        beta2: decay rate of the second moment, a float in (0, 1) (default: 0.999)
        eps: added to the root of the second moment, a float > 0 (default: 1e-6)
        weight_decay: factor of the parameter in its own update: a number >= 0, or a `Cell` or LearningRateSchedule that is
            called with the step (default: 0.0)
        options: further keyword arguments of :class:`torchlamb.Lamb`, for all groups

    A dynamic learning rate or weight decay is written to ``param_groups`` at each step. A learning rate written there by hand
    in between is taken for one step. The state dict has a further entry, "global_step", from which a resumed run goes on.

    Raises:
        TypeError: an argument, or an element of one, of another type; dicts mixed with parameters
        ValueError: an argument out of range; no parameters; vectors of different lengths; a wrong "order_params"
        KeyError: a group with another key, or without "params"
        RuntimeError: a parameter that is given twice

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> net = torch.nn.Linear(4, 2)
        >>> schedule = nn.PolynomialDecayLR(0.1, 0.01, decay_steps=4, power=0.5)
        >>> optimizer = nn.Lamb(nn.trainable_params(net), learning_rate=schedule, weight_decay=0.01)
        >>> loss = net(torch.ones(8, 4)).square().mean()
        >>> optimizer(torch.autograd.grad(loss, optimizer.parameters))
        (True, True)

    Source: the documentation of `mindspore.nn.Lamb`, with the misprint in its bias corrections (beta^t for 1 - beta^t) mended;
    arXiv 1904.00962, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        learning_rate: Any,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-6,
        weight_decay: Any = 0.0,
        **options: Any,
    ) -> None:
        betas = check_float("beta1", beta1, above=0, below=1), check_float("beta2", beta2, above=0, below=1)
        check_float("eps", eps, above=0)
        self._weight_decay = parse_decay("weight_decay", weight_decay)
        groups, ordered, self._is_grouped = read_params(params)
        self._learning_rate = parse("learning_rate", learning_rate)
        self._group_rates, self._group_decays, self._written = [], [], []
        self._order = []
        self._global_step = 0
        self._has_group_lr = False
        self._unique, self._target = True, ""
        lr = self._current(self._learning_rate)
        super().__init__(groups, lr, betas, eps, decay_at(self._weight_decay, 0), **options)
        if ordered is not None:
            self._order = [self._order[i] for i in positions(ordered, self.parameters)]

    def __call__(self, gradients: Iterable[Tensor | None]) -> tuple[bool, ...]:
        """Take one step with these gradients; ``.grad`` is neither used nor changed.

        Args:
            gradients: a tensor for each of ``optimizer.parameters``, of its shape and dtype, or None for no gradient

        Returns:
            True for each parameter.

        Raises:
            TypeError: not an iterable of tensors, or a gradient of another dtype
            ValueError: a wrong number of gradients, or a gradient of another shape or device
            IndexError: a dynamic learning rate that is used up
            RuntimeError: as `step()` does. Nothing has changed after any of these.
        """
        parameters = self.parameters
        given = check_gradients(gradients, parameters)
        kept = [x.parameter.grad for x in parameters]
        try:
            for x, gradient in zip(parameters, given, strict=True):
                x.parameter.grad = gradient
            self.step()
        finally:
            for x, gradient in zip(parameters, kept, strict=True):
                x.parameter.grad = gradient
        return (True,) * len(parameters)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, a dict with the keys of the constructor's groups but "order_params"; its parameters come last in order.

        Raises:
            TypeError, ValueError, KeyError, RuntimeError: as the constructor does; nothing is added then
        """
        index = len(self.param_groups)
        group = read_group(param_group, index)
        pairs = [entry if isinstance(entry, tuple) else (None, entry) for entry in group["params"]]
        check_no_duplicates(pairs, f"group {index} params", {id(p): name for name, p in self.parameters})
        if self.param_groups and (pairs[0][0] is None) != ("param_names" not in self.param_groups[0]):
            raise TypeError(
                f"group {index} params must have names where other groups have them; name the parameters of all or none"
            )
        has_lr = "lr" in group
        rate, decay = group.pop("lr", self._learning_rate), group.pop("weight_decay", self._weight_decay)
        for other in self._group_rates:
            if isinstance(rate, tuple) and isinstance(other, tuple) and len(rate) != len(other):
                raise ValueError(
                    f"the learning rate of group {index} has {len(rate)} values, that of another group {len(other)}; "
                    "give one value for every step in both"
                )
        group["lr"], group["weight_decay"] = self._current(rate), decay_at(decay, self._global_step)
        group.setdefault("grad_centralization", self.defaults["grad_centralization"])
        ordered = [id(tensor) for _, tensor in pairs]
        parts = centralized_apart(group)
        if len(parts) > 1:  # what one of them is refused for, is said before any is added
            lamb.Lamb([dict(part) for part in parts], **self.defaults)
        for part in parts:
            super().add_param_group(part)
        self._group_rates += [rate] * len(parts)
        self._group_decays += [decay] * len(parts)
        self._written += [group["lr"]] * len(parts)
        self._has_group_lr |= has_lr
        place = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        self._order += [place[key] for key in ordered]

    def state_dict(self) -> StateDict:
        """Return torch's state dict with a further entry, "global_step". Schedules and vectors are not in it."""
        hook = self.register_state_dict_post_hook(lambda _, state: state.update(global_step=self._global_step), prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict()` returned, here or in `torchlamb.Lamb`.

        Without a "global_step", the largest step count of a parameter is taken, as in checkpoints of torch.distributed, which
        drop the entry.

        Raises:
            TypeError, ValueError: a "global_step" that is no int >= 0; groups or their sizes that differ. Nothing has changed.
        """
        loaded: list[int] = []

        def own_post_hook(_: Any) -> None:
            self._global_step = loaded[-1]
            self._written = [group["lr"] for group in self.param_groups]

        # As hooks, so that the user's own see and may change the entry, as everything else.
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, state: loaded.append(read_global_step(state))),
            self.register_load_state_dict_post_hook(own_post_hook, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = [name for name in Questions.__annotations__ if name in self.__dict__] + ["_weight_decay"]
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A step that the scaler drops must not take a learning rate: let it decide whether step() is called.
        return False

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled, it would replay the first call's lr and count
    def _resolve(self) -> Work:
        """Take this step's learning rates and count it, unless it cannot be taken."""
        lrs, decays = self._next_lrs(), self._next_decays()
        self._written = lrs
        for group, lr, decay in zip(self.param_groups, lrs, decays, strict=True):
            group.update(lr=lr, weight_decay=decay)
        resolved = super()._resolve()
        self._global_step += 1
        return resolved

    def _next_lrs(self) -> list[Any]:
        """Return what each group steps with: its dynamic value unless another was written to the group since the last step.

        torch.distributed.checkpoint relies on that: it takes a step with an lr of 0 to create the state.
        """
        if any(isinstance(rate, DYNAMIC) for rate in self._group_rates) and lamb.is_capturing():
            raise RuntimeError(
                "step() is being captured in a graph, which would replay one value of a dynamic learning_rate for ever; "
                "give learning_rate as a 0-dim tensor and change it in place"
            )
        lrs = []
        for i, (group, rate, written) in enumerate(zip(self.param_groups, self._group_rates, self._written, strict=True)):
            lr = group["lr"]
            if isinstance(rate, DYNAMIC) and lr == written:
                lr = value_at(rate, self._global_step)
            elif not isinstance(lr, Tensor):
                check_number(f"param_groups[{i}]['lr']", lr)  # negative ones are stepped with, as torch does
            lrs.append(lr)
        return lrs
