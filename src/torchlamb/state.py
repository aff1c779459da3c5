"""What is stored of each parameter between steps: in which precision, on which device, and how it is made.

This room knows groups and single parameters; it must not know what a step does with what it stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlamb import precision
from torchlamb.backends import counts_on_device, resolve
from torchlamb.gate import why_not
from torchlamb.guard import is_guarded
from torchlamb.options import can_step, check_params

_LOW = (torch.bfloat16, torch.float16)
MOMENTS = ("exp_avg", "exp_avg_sq")
# One of each parameter, whatever its shape.
NUMBERS = {"step": torch.float32, "seed": torch.int64, "skipped": torch.int64}


class Storage:
    """How one group stores what its parameters need between steps. Made anew for each step: options may change."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        # Steps are counted on the host, as in torch, unless only the device knows whether one was taken, or its kernels count.
        self.on_device: bool = group["capturable"] or group["fused"] or is_guarded(group)
        self.group = group
        self.devices: dict[torch.device, torch.device | str] = {}  # where steps of parameters there are counted
        self.masters: bool = group["master_weights"]
        self.rounds_params: bool = group["stochastic_rounding"]
        self.state_dtype: torch.dtype | None = group["state_dtype"]

    def fill_(self, state: dict[str, Any], param: Tensor, position: int) -> None:
        """Make what the parameter needs and has not stored yet, and bring the rest to the dtype and device it should have."""
        dtype = self.moment_dtype(param)
        if "exp_avg" not in state:  # a seed or a master may have been set before the first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=self.device_of_step(param))
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        elif type(state["step"]) is not Tensor and not isinstance(state["step"], Tensor):
            state["step"] = torch.tensor(float(state["step"]), device=self.device_of_step(param))
        elif (self.on_device or not param.is_cpu) and state["step"].device != param.device == self.device_of_step(param):
            state["step"] = state["step"].to(param.device)  # never back: it may be compiled for
        if state["step"].dtype is not torch.float32:
            state["step"] = state["step"].to(torch.float32)
        if state["exp_avg"].dtype is not dtype or state["exp_avg_sq"].dtype is not dtype:
            state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].to(dtype), state["exp_avg_sq"].to(dtype)
        if self.keeps_master(param):
            if "master" not in state:
                state["master"] = param.detach().to(torch.float32, memory_format=torch.preserve_format)
            elif state["master"].dtype is not torch.float32:
                state["master"] = state["master"].to(torch.float32)
        else:
            state.pop("master", None)
        if self.keeps_seed(param):
            if "seed" not in state:
                state["seed"] = torch.tensor(precision.seed_of(position))
            if state["seed"].device != state["step"].device:
                state["seed"] = state["seed"].to(state["step"].device)

    def columns(self, params: list[Tensor], states: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Return, of parameters with gradients, what a step takes: by the names of `torchlamb.bucket.COLUMNS`."""
        return {
            "params": params,
            "grads": [p.grad for p in params],
            "exp_avgs": [state["exp_avg"] for state in states],
            "exp_avg_sqs": [state["exp_avg_sq"] for state in states],
            "masters": [s["master"] if self.keeps_master(p) else None for p, s in zip(params, states, strict=True)],
            "steps": [state["step"] for state in states],
            "seeds": [s["seed"] if self.keeps_seed(p) else None for p, s in zip(params, states, strict=True)],
        }

    def keeps_master(self, param: Tensor) -> bool:
        """Return whether the parameter is rounded from a float32 master."""
        return self.masters and param.dtype in _LOW

    def keeps_seed(self, param: Tensor) -> bool:
        """Return whether something of the parameter is rounded stochastically: it, or its second moment."""
        return self.state_dtype is torch.bfloat16 or (self.rounds_params and param.dtype is torch.bfloat16)

    def moment_dtype(self, param: Tensor) -> torch.dtype:
        """Return the dtype of the parameter's moments: by default its own, and float32 if it has less."""
        if self.state_dtype is None:
            return torch.float32 if param.dtype in _LOW else param.dtype
        return self.state_dtype.to_complex() if param.is_complex() else self.state_dtype

    def device_of_step(self, param: Tensor) -> torch.device | str:
        """Return where the parameter's steps are counted, and its seed is kept."""
        device = self.devices.get(param.device)
        if device is None:
            on_device = self.on_device or counts_on_device(self.group, param.device)
            device = self.devices[param.device] = param.device if on_device else "cpu"
        return device


def check_state(group: Mapping[str, Any], states: Mapping[Tensor, dict[str, Any]], group_index: int) -> None:
    """Raise if what a step needs does not fit the parameters, or has no kernels that were asked for; before it makes any state.

    Raises:
        TypeError: a parameter's dtype cannot be stepped
        RuntimeError: of any other reason; both name the parameter
    """
    kinds = set()
    for i, param in enumerate(group["params"]):
        grad = param.grad
        if grad is None:
            continue
        shape, device, state = param.shape, param.device, states.get(param)
        fits = grad.shape == shape and grad.device == device
        if state and fits:
            fits = _fits(state, shape, device)
        if not fits:
            raise _misfit(group, group_index, i, state or {})
        kinds.add((device, param.dtype, grad.dtype, why_not(param)))
    for _, dtype, _, _ in kinds:
        if not can_step(dtype):
            check_params(group, group_index)  # which says of which parameter
    for device, param_dtype, grad_dtype, refused in kinds if group["fused"] or group["foreach"] else ():
        resolve(dict(group), device, [param_dtype.to_real(), grad_dtype.to_real()], small=False, refused=refused)


def _fits(state: Mapping[str, Any], shape: torch.Size, device: torch.device) -> bool:
    first, second, master = state.get("exp_avg"), state.get("exp_avg_sq"), state.get("master")
    if first is None and second is None and master is None:
        return True  # nothing yet, or what others keep there
    for t in (first, second) if master is None else (first, second, master):
        if t is None and first is second is None:
            continue  # a master that was set before the first step
        if not isinstance(t, Tensor) or t.shape != shape or t.device != device:
            return False
    return first is None or "step" in state


def _misfit(group: Mapping[str, Any], group_index: int, i: int, state: Mapping[str, Any]) -> RuntimeError:
    """Return what is said of the first thing that does not fit a parameter."""
    names, param = group.get("param_names", ()), group["params"][i]
    name = f"parameter {names[i] if i < len(names) else i!r} of group {group_index}"
    for key, t in (("gradient", param.grad), *((key, state.get(key)) for key in (*MOMENTS, "master"))):
        if isinstance(t, Tensor) and (t.shape != param.shape or t.device != param.device):
            return RuntimeError(
                f"{name} has shape {tuple(param.shape)} on {param.device}, and its {key} {tuple(t.shape)} on {t.device}; a "
                "parameter that was resized or moved needs a new optimizer"
            )
    key = next(
        key
        for key in (*MOMENTS, "step", "master")
        if (key != "step" and not isinstance(state.get(key), Tensor)) or key not in state
    )
    return RuntimeError(
        f"the state of {name} has {state.get(key)!r} for {key!r}, which must be a tensor beside the others; load a whole state "
        "dict, or clear the state of this parameter"
    )
