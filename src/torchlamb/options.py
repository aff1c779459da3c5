"""What the options and parameters of a group may be, and what is said when they are not.

Every option lives in `param_groups` as a plain bool, int, float, dtype or tuple, because checkpoints are read with
``weights_only=True``. This room knows single groups and nothing of tensors' contents, state or stepping.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from torchlamb.plain import plain
from torchlamb.sharding.layout import is_dtensor, is_plain, told_of
from torchlamb.sharding.refused import why_grad_refused, why_options_refused, why_refused

# One guard decides for the whole step, and autograd sees all of it or nothing.
_ALIKE = ("max_grad_norm", "skip_nonfinite", "differentiable")

# How a run stores things is its own affair; all other options of a checkpoint are taken over.
STORAGE = {"master_weights": False, "stochastic_rounding": False, "state_dtype": None}

# What is left of a learning rate, relative to the one it began with, where a schedule that ends at 0 has summed up roundings of
# float64: with torch's own up to a quarter of its epsilon, at all lengths up to 300. Nobody means a rate that small.
_ROUNDING = 16 * sys.float_info.epsilon


def check(options: Mapping[str, Any], label: str = "{}", written: bool = False) -> dict[str, Any]:
    """Return the options of a group as plain Python values.

    Args:
        options: of a group, all of them
        label: says in errors where the one of that name stands
        written: they may have been written by a scheduler, of which no more is asked than that numbers are finite: torch steps
            with a negative lr or decay, too

    Raises:
        TypeError: a value of a wrong type
        ValueError: a value out of range, or two that contradict each other
        RuntimeError: an implementation was asked for that cannot be had
    """
    checks = _WRITTEN if written else _CHECKS
    plain = {name: checks[name](label.format(name), value) if name in checks else value for name, value in options.items()}
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


def normalise(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as plain values where they are good ones, and as they are where `check` would refuse them."""
    normal = dict(options)
    for name in _WRITTEN.keys() & options.keys():
        if isinstance(options[name], Tensor):
            continue  # which would be read back from its device
        with contextlib.suppress(TypeError, ValueError):
            normal[name] = _WRITTEN[name](name, options[name])
    return normal


def store_plain_(group: dict[str, Any], checked: Mapping[str, Any]) -> None:
    """Put back what `check` has returned for a group, where that is not what it had: NumPy's numbers, or other sequences."""
    for name in _CHECKS:
        have, want = group[name], checked[name]
        if have is not want and (type(have) is not type(want) or type(have) is tuple) and not isinstance(have, Tensor):
            group[name] = want


def lr_of(group: Mapping[str, Any], default: float | Tensor) -> float | Tensor:
    """Return the lr that a group is stepped with: the one that was written, and 0 where that is what rounding has left of 0.

    It is not written back: schedulers compute the next one from it.

    Args:
        group: with its lr, and the "initial_lr" that schedulers add
        default: the constructor's lr
    """
    lr, began = group["lr"], group.get("initial_lr", default)
    if isinstance(lr, Tensor):  # of which nothing is read back
        if not lr.is_floating_point():
            return lr
        began = began.to(lr.device).reshape(()) if isinstance(began, Tensor) and began.numel() == 1 else began
        return torch.where(lr.abs() <= _ROUNDING * abs(began), 0.0, lr)
    scale = float(began) if isinstance(began, Real) else 1.0
    return 0.0 if abs(lr) <= _ROUNDING * abs(scale) else lr


def warn_of_misspelt(group: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    """Warn, once for each, of keys of a new group that look like options and are none. All others are the user's affair."""
    for key in group:
        if key in _CHECKS or key in ("params", "param_names") or any(key in other for other in others):
            continue
        likely = _closest(str(key))
        if likely is not None:
            warn_caller(f"{key!r} of a parameter group is no option and changes nothing; did you mean {likely!r}?")


def _closest(key: str) -> str | None:
    letters = {re.sub("[^a-z0-9]", "", name): name for name in _CHECKS}
    bare = re.sub("[^a-z0-9]", "", key.lower())
    close = difflib.get_close_matches(bare, letters, n=1, cutoff=0.85) or ([_SYNONYMS[bare]] if bare in _SYNONYMS else [])
    likely = letters.get(close[0], close[0]) if close else None
    # "initial_lr", "max_weight_decay": what schedulers and wrappers add is a word more, not a letter.
    return None if likely is None or re.search(rf"_{likely}$|^{likely}_", key) else likely


def warn_caller(message: str) -> None:
    """Warn, pointing at the first line that is neither torch's nor ours."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] in ("torch", "torchlamb"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


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


def check_params(group: Mapping[str, Any], group_index: int) -> None:
    """Raise if a parameter of the group cannot be stepped. Entries may still be (name, parameter) pairs.

    Lazy ones are checked when they have a shape, those of a dtype that cannot be stepped (`can_step`) if they get a gradient.
    """
    blocks = group["blocks"]
    for i, p in enumerate(group["params"]):
        param = p[1] if isinstance(p, tuple) else p
        if not isinstance(param, Tensor) or is_lazy(param):
            continue  # torch says what a parameter is
        reason = why_refused(param)
        if reason is not None:
            raise NotImplementedError(f"{_name(group, group_index, i)} {reason}")
        refused = why_options_refused(param, blocks, group["grad_centralization"])
        if refused is not None:
            option, why = refused
            name = _name(group, group_index, i)
            raise NotImplementedError(f"{option}={group[option]!r} of {name} {why}; or leave {option} at its default there")
        told = told_of(param)
        if group["differentiable"] and (is_dtensor(param) or (told is not None and not told.is_whole)):
            raise NotImplementedError(
                f"{_name(group, group_index, i)} is sharded, and autograd would have to see the sums over processes: "
                "differentiable=True does not support that"
            )
        if blocks != 1 and (param.dim() == 0 or param.shape[0] % blocks):
            name, shape = _name(group, group_index, i), tuple(param.shape)
            raise ValueError(f"blocks={blocks} does not divide dim 0 of {name}, whose shape is {shape}")
        if not can_step(param.dtype):
            if param.grad is not None:
                raise _unsteppable(group, group_index, i, param.dtype)
            continue
        if group["stochastic_rounding"] and param.dtype == torch.float16:
            name = _name(group, group_index, i)
            raise TypeError(f"stochastic_rounding rounds to bfloat16, and {name} has dtype {param.dtype}; use master_weights")
        if group["state_dtype"] is torch.bfloat16 and param.is_complex():
            name = _name(group, group_index, i)
            raise TypeError(
                f"state_dtype=torch.bfloat16 has no complex numbers, and {name} has dtype {param.dtype}; leave it at None"
            )


def can_step(dtype: torch.dtype) -> bool:
    """Return whether there is arithmetic for a dtype. Integers and float8 hold weights that are frozen, under LoRA say."""
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize >= 2)


def _unsteppable(group: Mapping[str, Any], group_index: int, i: int, dtype: torch.dtype) -> TypeError:
    return TypeError(
        f"{_name(group, group_index, i)} has dtype {dtype}, which cannot be stepped, and a gradient; give Lamb parameters of "
        "16 bits or more, or freeze this one"
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


def _name(group: Mapping[str, Any], group_index: int, i: int) -> str:
    p = group["params"][i]
    if isinstance(p, tuple):
        return f"parameter {p[0]!r}"
    names = group.get("param_names", [])
    return f"parameter {names[i]!r}" if i < len(names) else f"parameter {i} of group {group_index}"


def fail(kind: type[Exception], name: str, wanted: str, value: object) -> Exception:
    """Return the exception for an argument: what it must be and what was got."""
    return kind(f"{name} must be {wanted}, got {value!r}")


_FROM_0, _FINITE = "a finite number >= 0", "a finite number"


def _finite_from_0(x: float) -> bool:
    return 0 <= x < math.inf


def _number(wanted: str, accept: Callable[[float], bool]) -> Callable[[str, Any], float]:
    def check_number(name: str, value: Any) -> float:
        if type(value) is not float:
            is_number = isinstance(value, Tensor) and value.numel() == 1 and value.is_cpu and value.is_floating_point()
            number = value.item() if is_number else plain(value)  # a tensor, as AdamW takes it for betas
            if isinstance(number, bool) or not isinstance(number, Real):
                raise fail(TypeError, name, wanted, value)
            try:
                value = float(number)
            except OverflowError:
                value = math.inf
        if not accept(value):
            raise fail(ValueError, name, wanted, value)
        return value  # type: ignore[no-any-return]

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
    if not isinstance(value, (tuple, list)):  # omegaconf's lists, NumPy's arrays
        is_list = hasattr(value, "__len__") and hasattr(value, "__getitem__") and not hasattr(value, "keys")
        if not is_list or isinstance(value, (str, bytes)) or getattr(value, "ndim", 1) != 1:
            raise fail(TypeError, name, wanted, value)
    if len(value) != 2:
        raise fail(ValueError, name, wanted, value)
    return check_one(f"{name}[0]", value[0]), check_one(f"{name}[1]", value[1])


def _lr(name: str, value: Any, wanted: str = _FROM_0, accept: Callable[[float], bool] = _finite_from_0) -> float | Tensor:
    if not isinstance(value, Tensor):
        return _number(wanted, accept)(name, value)
    if value.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(value.shape)}; set one lr per parameter group")
    if value.is_complex() or value.dtype == torch.bool:
        raise fail(TypeError, name, wanted, value)
    if not value.is_meta and not is_fake(value) and not accept(value.item()):
        raise fail(ValueError, name, wanted, value)
    return value


def _written_lr(name: str, value: Any) -> float | Tensor:
    return _lr(name, value, _FINITE, math.isfinite)


def is_fake(tensor: Tensor) -> bool:
    """Return whether it has no contents that could be read, which torch's FakeTensorMode makes to estimate memory."""
    module = None if is_plain(tensor) else sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def _blocks(name: str, value: Any) -> int:
    if type(value) is not int:
        value = plain(value)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise fail(TypeError, name, "an int >= 1", value)
        value = int(value)
    if value < 1:
        raise fail(ValueError, name, "an int >= 1", value)
    return value  # type: ignore[no-any-return]


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
        value = plain(value)  # NumPy has bools of its own
        if not isinstance(value, bool):
            raise fail(TypeError, name, "True or False", value)
    return value


def _tristate(name: str, value: Any) -> bool | None:
    return None if value is None else flag(name, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "lr": _lr,
    "betas": _betas,
    "eps": _number(_FROM_0, _finite_from_0),
    "weight_decay": _number(_FROM_0, _finite_from_0),
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
# Later, in `param_groups`.
_WRITTEN = {**_CHECKS, "lr": _written_lr, "weight_decay": _number(_FINITE, math.isfinite)}
_SYNONYMS = {"learningrate": "lr", "epsilon": "eps", "wd": "weight_decay"}
