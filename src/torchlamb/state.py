"""What is stored of each parameter between steps: in which precision, on which device, how it is made and loaded.

This room knows groups and single parameters; it must not know what a step does with what it stores.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlamb import precision
from torchlamb.backends import counts_on_device, resolve
from torchlamb.guard import is_guarded
from torchlamb.sharding.layout import is_dtensor

_LOW = (torch.bfloat16, torch.float16)
_MOMENTS = ("exp_avg", "exp_avg_sq")
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
            state["step"] = torch.zeros((), dtype=torch.float32, device=self._device(param))
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        elif (self.on_device or not param.is_cpu) and state["step"].device != param.device == self._device(param):
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

    def restore_(
        self,
        states: MutableMapping[Tensor, dict[str, Any]],
        loaded: Mapping[Any, dict[str, Any]],
        keys: Sequence[Any],
        params: Sequence[Tensor],
    ) -> None:
        """Put back, from a state dict that torch has loaded, what it rounded by its cast to the parameter's dtype.

        Args:
            states: the optimizer's, of which those of the parameters are corrected
            loaded: the dict's
            keys: of the parameters in `loaded`
            params: of the group
        """
        for key, param in zip(keys, params, strict=True):
            for name, value in loaded.get(key, {}).items():
                if name in NUMBERS:
                    number = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
                    states[param][name] = number.to(self._device(param), NUMBERS[name])
                elif name == "master" and not self.keeps_master(param):
                    del states[param][name]
                elif isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                    # Moments are shared with the dict, as in torch. Masters are copied: a dict may have been given weights.
                    is_master = name == "master"
                    dtype = torch.float32 if is_master else self.moment_dtype(param)
                    states[param][name] = value.to(param.device, dtype, copy=is_master)

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

    def _device(self, param: Tensor) -> torch.device | str:
        device = self.devices.get(param.device)
        if device is None:
            on_device = self.on_device or counts_on_device(self.group, param.device)
            device = self.devices[param.device] = param.device if on_device else "cpu"
        return device


def check_state(group: Mapping[str, Any], states: Mapping[Tensor, dict[str, Any]], group_index: int) -> None:
    """Raise if what a step needs does not fit the parameters, or has no kernels that were asked for; before it makes any state.

    Raises:
        RuntimeError: with the parameter
    """
    names = group.get("param_names", range(len(group["params"])))
    kinds = set()
    for name, param in zip(names, group["params"], strict=False):
        if param.grad is None:
            continue
        shape, device, state = param.shape, param.device, states.get(param, {})
        for key, t in (("gradient", param.grad), *((key, state.get(key)) for key in (*_MOMENTS, "master"))):
            if t is not None and (t.shape != shape or t.device != device):
                raise RuntimeError(
                    f"parameter {name!r} of group {group_index} has shape {tuple(shape)} on {device}, and its {key} "
                    f"{tuple(t.shape)} on {t.device}; a parameter that was resized or moved needs a new optimizer"
                )
        if group["fused"]:
            kinds.add((device, param.dtype.to_real(), param.grad.dtype.to_real()))
    for device, *dtypes in kinds:
        resolve(dict(group), device, dtypes, small=False)


def check_loaded(state_dict: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise for the first thing in a state dict that these groups cannot take over.

    Raises:
        TypeError: it is no state dict
        ValueError: it is that of other parameters, or of another optimizer than Lamb, Adam and AdamW
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        got = f"a dict with {list(state_dict)[:4]}" if isinstance(state_dict, Mapping) else f"a {type(state_dict).__name__}"
        raise TypeError(
            f"state_dict must be a dict with 'state' and 'param_groups', got {got}; give what state_dict() returned"
        )
    state, saved = state_dict["state"], state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            f"state_dict has {len(saved)} parameter groups, and this optimizer {len(groups)}; construct it with the same groups"
        )
    for i, (saved_group, group) in enumerate(zip(saved, groups, strict=True)):
        _check_loaded_group(saved_group, group, i)
        names = group.get("param_names", range(len(group["params"])))
        for key, name, param in zip(saved_group["params"], names, group["params"], strict=True):
            if key in state:
                _check_loaded_state(state[key], f"parameter {name!r} (group {i})", param)
    known = {key for group in saved for key in group["params"]}
    for key in state:
        if key not in known:
            raise ValueError(f"state of state_dict has an entry {key!r} that is in none of its param_groups; take it out")


def _check_loaded_group(saved: Mapping[str, Any], group: Mapping[str, Any], i: int) -> None:
    for name in ("params", "lr", "betas", "eps", "weight_decay"):
        if name not in saved:
            raise ValueError(
                f"param_groups[{i}] of state_dict has no {name!r}, as those of Lamb, Adam and AdamW have; if it is another "
                "optimizer's, torchlamb.convert.to_lamb may know it"
            )
    if len(saved["params"]) != len(group["params"]):
        raise ValueError(
            f"param_groups[{i}] of state_dict has {len(saved['params'])} parameters, and this optimizer's "
            f"{len(group['params'])}; construct it with the same parameters in the same groups"
        )


def _check_loaded_state(state: Mapping[str, Any], name: str, param: Tensor) -> None:
    for key in state:
        if key not in (*_MOMENTS, *NUMBERS, "master"):
            raise ValueError(
                f"the state of {name} has {key!r}, which is not of Lamb, Adam or AdamW; if it is another LAMB's, "
                "torchlamb.convert.to_lamb may know it"
            )
    for key in ("step", *_MOMENTS):
        if key not in state and not set(state) <= {"seed", "master", "skipped"}:  # which may be there before the first step
            raise ValueError(f"the state of {name} has no {key!r}; load a complete state dict, or start with a fresh Lamb")
    for key, value in state.items():
        if key in NUMBERS:
            if not (isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)):
                raise ValueError(f"{key} of {name} must be one number, got {value!r}; load what state_dict() returned")
        else:
            _check_loaded_tensor(value, f"{key} of {name}", param)


def _check_loaded_tensor(value: Any, name: str, param: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got a {type(value).__name__}; load what state_dict() returned")
    if value.shape != param.shape or value.is_complex() != param.is_complex():
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}, and the parameter {tuple(param.shape)} and "
            f"{param.dtype}; load the state dict of the same model, with its parameters in the same order"
        )
    if is_dtensor(value) != is_dtensor(param):
        kinds = ("a DTensor", "a plain tensor") if is_dtensor(value) else ("a plain tensor", "a DTensor")
        raise ValueError(
            f"{name} is {kinds[0]} and the parameter {kinds[1]}; load it with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )


def adopt(saved: dict[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a loaded group's options with this group's where it has none, and with how this one stores things.

    The latter as far as it is not by default.
    """
    rounds = {name: group[name] for name in ("master_weights", "stochastic_rounding")}  # of which one excludes the other
    kept = rounds if any(rounds.values()) else {}
    dtype = {} if group["state_dtype"] is None else {"state_dtype": group["state_dtype"]}
    own = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    return {**own, **saved, **kept, **dtype}
