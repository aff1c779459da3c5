"""What the options and parameters of a group may be, and what is said when they are not.

Every option lives in `param_groups` as a plain bool, int, float, dtype or tuple, because checkpoints are read with
``weights_only=True``. This room knows single groups and nothing of tensors' contents, state or stepping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from torchlamb.sharding.layout import is_dtensor, is_plain, shards_other_dim_than_0, why_grad_refused, why_refused

# One guard decides for the whole step, and autograd sees all of it or nothing.
_ALIKE = ("max_grad_norm", "skip_nonfinite", "differentiable")

# How a run stores things is its own affair; all other options of a checkpoint are taken over.
STORAGE = {"master_weights": False, "stochastic_rounding": False, "state_dtype": None}


def check(options: dict[str, Any], label: str = "{}") -> dict[str, Any]:
    """Return the options of a group as plain Python values. `label` says in errors where the one of that name stands.

    Raises:
        TypeError: a value of a wrong type
        ValueError: a value out of range, or two that contradict each other
        RuntimeError: an implementation was asked for that cannot be had
    """
    plain = {name: _CHECKS[name](label.format(name), value) if name in _CHECKS else value for name, value in options.items()}
    if plain["master_weights"] and plain["stochastic_rounding"]:
        raise ValueError(
            "master_weights=True and stochastic_rounding=True exclude each other: what has a float32 master is rounded from it "
            "to nearest; set one of them to False, in this group too"
        )
    if plain["differentiable"]:
        for name, default in STORAGE.items():
            if plain[name] != default:
                raise ValueError(
                    f"{name}={plain[name]!r} cannot be differentiated; with differentiable=True leave it at {default}"
                )
    if plain["fused"] and plain["foreach"]:
        raise RuntimeError("foreach=True and fused=True exclude each other; set one of them")
    if plain["fused"] and plain["differentiable"]:
        raise RuntimeError("fused=True cannot be differentiated; with differentiable=True leave fused=None")
    if plain["differentiable"] and plain["foreach"]:
        raise RuntimeError("foreach=True cannot be differentiated; with differentiable=True leave foreach=None")
    return plain


def check_alike(groups: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> None:
    """Raise ValueError if groups differ in an option that is one for the whole optimizer."""
    for name in _ALIKE:
        first = defaults[name] if name == "differentiable" else groups[0][name]  # torch reads this one from the defaults
        for group in groups:
            if group[name] != first:
                raise ValueError(
                    f"{name} must be the same in all parameter groups, got {group[name]!r} beside {first!r}; "
                    "set it in the constructor only"
                )


def check_params(group: dict[str, Any], group_index: int) -> None:
    """Raise if a parameter of the group cannot be stepped. Entries may still be (name, parameter) pairs."""
    blocks = group["blocks"]
    for i, p in enumerate(group["params"]):
        param = p[1] if isinstance(p, tuple) else p
        if not isinstance(param, Tensor):
            continue  # torch says what a parameter is
        reason = why_refused(param)
        if reason is not None:
            raise NotImplementedError(f"{_name(group, group_index, i)} {reason}")
        if group["grad_centralization"] and param.dim() >= 3 and shards_other_dim_than_0(param):
            name = _name(group, group_index, i)
            raise NotImplementedError(
                f"grad_centralization needs means over all dims of {name} but the first, which is not all that its placements "
                "shard; shard it on dim 0, or set grad_centralization=False for its group"
            )
        if group["differentiable"] and is_dtensor(param):
            raise NotImplementedError(
                f"{_name(group, group_index, i)} is a DTensor, which differentiable=True does not support"
            )
        if blocks != 1 and (param.dim() == 0 or param.shape[0] % blocks):
            name, shape = _name(group, group_index, i), tuple(param.shape)
            raise ValueError(f"blocks={blocks} does not divide dim 0 of {name}, whose shape is {shape}")
        if param.is_floating_point() and param.dtype.itemsize < 2:
            name = _name(group, group_index, i)
            raise TypeError(f"{name} has dtype {param.dtype}, which cannot be stepped; give Lamb parameters of 16 bits or more")
        if group["stochastic_rounding"] and param.dtype == torch.float16:
            name = _name(group, group_index, i)
            raise TypeError(f"stochastic_rounding rounds to bfloat16, and {name} has dtype {param.dtype}; use master_weights")
        if group["state_dtype"] is torch.bfloat16 and param.is_complex():
            name = _name(group, group_index, i)
            raise TypeError(
                f"state_dtype=torch.bfloat16 has no complex numbers, and {name} has dtype {param.dtype}; leave it at None"
            )


def check_grads(group: dict[str, Any], group_index: int) -> None:
    """Raise if the group's gradients cannot be stepped with."""
    for i, p in enumerate(group["params"]):
        grad = p.grad
        if grad is None:
            continue
        reason = None if is_plain(p) and is_plain(grad) else why_grad_refused(p, grad)
        if reason is not None:
            raise RuntimeError(f"{_name(group, group_index, i)} {reason}")
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"Lamb does not support sparse gradients, and that of {_name(group, group_index, i)} has layout "
                f"{grad.layout}; build the embedding with sparse=False"
            )
        if group["differentiable"] and p.is_leaf and p.requires_grad:
            raise RuntimeError(
                f"{_name(group, group_index, i)} is a leaf, which autograd does not let step() write to; with "
                "differentiable=True give Lamb clones of the parameters"
            )


def _name(group: dict[str, Any], group_index: int, i: int) -> str:
    p = group["params"][i]
    if isinstance(p, tuple):
        return f"parameter {p[0]!r}"
    names = group.get("param_names", [])
    return f"parameter {names[i]!r}" if i < len(names) else f"parameter {i} of group {group_index}"


def fail(kind: type[Exception], name: str, wanted: str, value: object) -> Exception:
    """Return the exception for an argument: what it must be and what was got."""
    return kind(f"{name} must be {wanted}, got {value!r}")


def _number(wanted: str, accept: Callable[[float], bool]) -> Callable[[str, Any], float]:
    def check_number(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise fail(TypeError, name, wanted, value)
        if not accept(float(value)):
            raise fail(ValueError, name, wanted, value)
        return float(value)

    return check_number


def _bounds(name: str, value: Any) -> tuple[float, float] | None:
    wanted = "None or two numbers (low, high) with 0 <= low <= high and high > 0"
    if value is None:
        return None
    low, high = _pair(name, value, wanted, _number("a number >= 0", lambda x: x >= 0))
    if not (low <= high and high > 0):
        raise fail(ValueError, name, wanted, value)
    return low, high


def _betas(name: str, value: Any) -> tuple[float, float]:
    wanted = "two floats in [0, 1)"
    return _pair(name, value, wanted, _number("a float in [0, 1)", lambda x: 0 <= x < 1))


def _pair(name: str, value: Any, wanted: str, check_one: Callable[[str, Any], float]) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)):
        raise fail(TypeError, name, wanted, value)
    if len(value) != 2:
        raise fail(ValueError, name, wanted, value)
    return check_one(f"{name}[0]", value[0]), check_one(f"{name}[1]", value[1])


def _lr(name: str, value: Any) -> float | Tensor:
    wanted = "a finite number >= 0"
    if not isinstance(value, Tensor):
        return _number(wanted, _finite_from_0)(name, value)
    if value.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(value.shape)}; set one lr per parameter group")
    if value.is_complex() or value.dtype == torch.bool:
        raise fail(TypeError, name, wanted, value)
    if not value.is_meta and not _finite_from_0(value.item()):
        raise fail(ValueError, name, wanted, value)
    return value


def _blocks(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise fail(TypeError, name, "an int >= 1", value)
    if value < 1:
        raise fail(ValueError, name, "an int >= 1", value)
    return value


def _max_grad_norm(name: str, value: Any) -> float | None:
    wanted = "None or a finite number > 0"
    return None if value is None else _number(wanted, lambda x: 0 < x < math.inf)(name, value)


def _state_dtype(name: str, value: Any) -> torch.dtype | None:
    wanted = "None, torch.float32 or torch.bfloat16"
    if value is not None and not isinstance(value, torch.dtype):
        raise fail(TypeError, name, wanted, value)
    if value not in (None, torch.float32, torch.bfloat16):
        # In float16 the square of a gradient of 1e-4 is 0.
        raise fail(ValueError, name, wanted, value)
    return value


def flag(name: str, value: Any) -> bool:
    """Return a bool, and nothing that only looks like one.

    Raises:
        TypeError: it is none
    """
    if not isinstance(value, bool):
        raise fail(TypeError, name, "True or False", value)
    return value


def _tristate(name: str, value: Any) -> bool | None:
    return None if value is None else flag(name, value)


def _finite_from_0(x: float) -> bool:
    return 0 <= x < math.inf


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "lr": _lr,
    "betas": _betas,
    "eps": _number("a finite number >= 0", _finite_from_0),
    "weight_decay": _number("a finite number >= 0", _finite_from_0),
    "bias_correction": flag,
    "layer_adaptation": flag,
    "grad_averaging": flag,
    "phi_bounds": _bounds,
    "trust_ratio_bounds": _bounds,
    "blocks": _blocks,
    "grad_centralization": flag,
    "max_grad_norm": _max_grad_norm,
    "skip_nonfinite": flag,
    "master_weights": flag,
    "stochastic_rounding": flag,
    "state_dtype": _state_dtype,
    "maximize": flag,
    "foreach": _tristate,
    "fused": _tristate,
    "capturable": flag,
    "differentiable": flag,
}
