"""What is stored of each parameter between steps: in which precision, on which device, how it is made and loaded.

This room knows groups and single parameters; it must not know what a step does with what it stores.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from torchlamb import rounding
from torchlamb.guard import is_guarded

_LOW = (torch.bfloat16, torch.float16)


def fill_(state: dict[str, Any], group: dict[str, Any], param: Tensor, position: int) -> None:
    """Make what the parameter needs and has not stored yet, and bring the rest where the group's options want it."""
    on_device = _counts_on_device(group)
    dtype = moment_dtype(group, param)
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
        state["exp_avg"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    elif on_device and state["step"].device != param.device:  # never back: it may be compiled for
        state["step"] = state["step"].to(param.device)
    for name in ("exp_avg", "exp_avg_sq"):
        if state[name].dtype is not dtype:
            state[name] = state[name].to(dtype)
    if keeps_master(group, param) and "master" not in state:
        state["master"] = param.detach().to(torch.float32, memory_format=torch.preserve_format)
    if keeps_seed(group, param):
        if "seed" not in state:
            state["seed"] = torch.tensor(rounding.seed_of(position))
        if state["seed"].device != state["step"].device:
            state["seed"] = state["seed"].to(state["step"].device)


def keeps_master(group: Mapping[str, Any], param: Tensor) -> bool:
    """Return whether the parameter is rounded from a float32 master."""
    return group["master_weights"] and param.dtype in _LOW


def keeps_seed(group: Mapping[str, Any], param: Tensor) -> bool:
    """Return whether something of the parameter is rounded stochastically: it, or its second moment."""
    return group["state_dtype"] is torch.bfloat16 or (group["stochastic_rounding"] and param.dtype is torch.bfloat16)


def moment_dtype(group: Mapping[str, Any], param: Tensor) -> torch.dtype:
    """Return the dtype of the parameter's moments: by default its own, and float32 if it has less."""
    dtype: torch.dtype | None = group["state_dtype"]
    if dtype is None:
        return torch.float32 if param.dtype in _LOW else param.dtype
    return dtype.to_complex() if param.is_complex() else dtype


def adopt(saved: dict[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a loaded group's options with how this group stores things, as far as that is not by default."""
    rounds = {name: group[name] for name in ("master_weights", "stochastic_rounding")}  # of which one excludes the other
    kept = rounds if any(rounds.values()) else {}
    dtype = {} if group["state_dtype"] is None else {"state_dtype": group["state_dtype"]}
    return {**saved, **kept, **dtype}


def restore_(
    states: MutableMapping[Tensor, dict[str, Any]],
    loaded: Mapping[str, Any],
    group: dict[str, Any],
    saved_group: dict[str, Any],
) -> None:
    """Put back, from a dict that torch has loaded, what it rounded by its cast to the parameter's dtype."""
    for key, param in zip(saved_group["params"], group["params"], strict=True):
        for name, value in loaded.get(key, {}).items():
            if name in ("step", "seed"):
                number = torch.as_tensor(value, dtype=torch.float32 if name == "step" else torch.int64)
                states[param][name] = number.to(param.device if _counts_on_device(group) else "cpu")
            elif name == "master" and not keeps_master(group, param):
                del states[param][name]
            elif isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                dtype = torch.float32 if name == "master" else moment_dtype(group, param)
                states[param][name] = value.to(param.device, dtype)


def _counts_on_device(group: dict[str, Any]) -> bool:
    # Steps are counted on the host, as in torch, unless only the device knows whether a step was taken.
    return group["capturable"] or group["fused"] or is_guarded(group)
