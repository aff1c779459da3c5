"""Checkpoints as one file of parameters by name: those of a network, and of its optimizer where there is one.

Files are written whole or not at all, and read without executing anything in them. Names are those of `Cell.get_parameters`; of
`nn.Lamb` there are ``lamb_m.<name>``, ``lamb_v.<name>`` and ``global_step``, as in the original, and further state as
``lamb_<key>.<name>``.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchlamb.files import write_whole
from torchlamb.mindspore.common.parameter import Parameter
from torchlamb.mindspore.common.tensor import plain
from torchlamb.mindspore.nn.cell import named_tensors
from torchlamb.mindspore.nn.optim.lamb import Lamb
from torchlamb.options import fail

__all__ = ["load_checkpoint", "load_param_into_net", "save_checkpoint"]

_SUFFIX = ".ckpt"
_MOMENTS = {"exp_avg": "lamb_m", "exp_avg_sq": "lamb_v"}
_STEP, _RATE = "global_step", "learning_rate"


def save_checkpoint(
    save_obj: Any,
    ckpt_file_name: str | os.PathLike[str],
    integrated_save: bool = True,  # noqa: ARG001
    async_save: Any = False,  # noqa: ARG001
    append_dict: Mapping[str, Any] | None = None,
    choice_func: Callable[[str], bool] | None = None,
    **ignored: Any,  # noqa: ARG001
) -> None:
    """Write parameters to a file, whole or not at all; it has that name only when all of it is there.

    Args:
        save_obj: a network; a cell that has an optimizer, which is saved with it; an optimizer; a dict from names to tensors;
            or a list of dicts with "name" and "data"
        ckpt_file_name: the file; ".ckpt" is added where it is missing. The folder is made
        integrated_save: accepted, does nothing (default: True)
        async_save: accepted, does nothing: the file is there on return (default: False)
        append_dict: numbers, strings and tensors by name that are saved too (default: None)
        choice_func: a function of a name that says whether it is saved; None for all (default: None)
        ignored: further words of the original (encryption, `crc_check`, `format`), which do nothing

    Raises:
        TypeError: something of another type
        ValueError: two parameters of one name
        OSError: it cannot be written; what was there before stays

    Example:
        >>> import tempfile, torch
        >>> from torchlamb.mindspore import load_checkpoint, save_checkpoint
        >>> file = tempfile.mkdtemp() + "/net.ckpt"
        >>> save_checkpoint(torch.nn.Linear(2, 1), file, append_dict={"epoch_num": 3})
        >>> list(load_checkpoint(file))
        ['weight', 'bias', 'epoch_num']

    Source: `mindspore.save_checkpoint`.
    """
    entries = dict(_unique(_entries(save_obj)))
    for name, value in (append_dict or {}).items():
        if not isinstance(name, str) or not isinstance(plain(value), (torch.Tensor, bool, int, float, str)):
            raise fail(TypeError, f"append_dict[{name!r}]", "a number, a string or a tensor", value)
        entries[name] = value
    content = {
        name: plain(value).detach().cpu().contiguous() if isinstance(plain(value), torch.Tensor) else value
        for name, value in entries.items()
        if choice_func is None or choice_func(name)
    }
    file = Path(ckpt_file_name)
    file = file if file.suffix == _SUFFIX else file.with_name(file.name + _SUFFIX)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda opened: torch.save(content, opened), replace=True)


def load_checkpoint(
    ckpt_file_name: str | os.PathLike[str],
    net: Any = None,
    strict_load: bool = False,
    filter_prefix: Any = None,
    specify_prefix: Any = None,
    choice_func: Callable[[str], bool] | None = None,
    **ignored: Any,  # noqa: ARG001
) -> dict[str, Any]:
    """Return what a file of `save_checkpoint` has: parameters by name, on the CPU.

    Args:
        ckpt_file_name: the file
        net: what `load_param_into_net` is to load it into as well (default: None)
        strict_load: as in `load_param_into_net` (default: False)
        filter_prefix: a string or several: names that begin so are left out (default: None)
        specify_prefix: a string or several: other names are left out (default: None)
        choice_func: a function of a name that says whether it is taken; None for all (default: None)
        ignored: further words of the original, which do nothing

    Raises:
        ValueError: there is no such file, it is none of `save_checkpoint`, or nothing of it is left

    Example:
        >>> import tempfile, torch
        >>> from torchlamb.mindspore import load_checkpoint, load_param_into_net, save_checkpoint
        >>> file = tempfile.mkdtemp() + "/net.ckpt"
        >>> save_checkpoint(torch.nn.Linear(2, 1), file)
        >>> load_param_into_net(torch.nn.Linear(2, 1), load_checkpoint(file))
        ([], [])

    Source: `mindspore.load_checkpoint`.
    """
    file = Path(ckpt_file_name)
    if not file.is_file():
        raise ValueError(f"ckpt_file_name must be a file of save_checkpoint(), got {str(file)!r}, which is not there")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} is no file of save_checkpoint(), and nothing in it was executed; `python -m torchlamb.convert` reads "
            "one of MindSpore itself, where that is installed"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{file} is no file of save_checkpoint(): it has no parameters by name")
    dropped, wanted = _strings(filter_prefix), _strings(specify_prefix)
    taken = {
        name: Parameter(value, name, requires_grad=False) if isinstance(value, torch.Tensor) else value
        for name, value in content.items()
        if not name.startswith(dropped)
        and (not wanted or name.startswith(wanted))
        and (choice_func is None or choice_func(name))
    }
    if not taken:
        raise ValueError(f"nothing of {file} is left; its names are {', '.join(content) or 'none'}")
    if net is not None:
        load_param_into_net(net, taken, strict_load)
    return taken


def load_param_into_net(
    net: Any,
    parameter_dict: Mapping[str, Any],
    strict_load: bool = False,
    remove_redundancy: bool = False,  # noqa: ARG001
) -> tuple[list[str], list[str]]:
    """Load parameters by name into a network, a cell with its optimizer, or an optimizer.

    Names that are not there are left alone. Where names in the dict differ from those of the network by one prefix, they are
    taken without it, unless `strict_load`.

    Args:
        net: any torch module, or `nn.Lamb`
        parameter_dict: what `load_checkpoint` returned
        strict_load: take names as they are, and values of the same dtype only (default: False)
        remove_redundancy: accepted, does nothing (default: False)

    Returns:
        The names of the network that were not in the dict, and those in the dict that were not taken.

    Raises:
        TypeError: an argument of another type
        RuntimeError: a value of another shape, or with `strict_load` of another dtype; nothing has changed then
        ValueError: an optimizer's state that does not fit

    Source: `mindspore.load_param_into_net`.
    """
    if not isinstance(net, (nn.Module, Lamb)):
        raise fail(TypeError, "net", "a torch.nn.Module or nn.Lamb", type(net))
    if not isinstance(parameter_dict, Mapping):
        raise fail(TypeError, "parameter_dict", "a dict from names to parameters", type(parameter_dict))
    optimizers = [net] if isinstance(net, Lamb) else optimizers_of(net)
    targets = {} if isinstance(net, Lamb) else {entry.name: entry.parameter for entry in named_tensors(net)}
    found = {name: name for name in targets if name in parameter_dict}
    missing = [name for name in targets if name not in found]
    if missing and not strict_load:
        found.update(_by_suffix(missing, parameter_dict))
    for name, source in found.items():
        _check_fits(name, targets[name], parameter_dict[source], strict_load)
    states = [_state_of(optimizer, parameter_dict) for optimizer in optimizers]
    taken = set(found.values())
    for optimizer, (state_dict, used, _) in zip(optimizers, states, strict=True):
        if used:
            optimizer.load_state_dict(state_dict)
        taken |= used
    with torch.no_grad():
        for name, source in found.items():
            targets[name].copy_(plain(parameter_dict[source]).reshape(targets[name].shape))
    not_loaded = [name for name in targets if name not in found]
    not_loaded += [name for _, _, lacking in states for name in lacking]
    return not_loaded, [name for name in parameter_dict if name not in taken]


def optimizers_of(network: nn.Module) -> list[Any]:
    """Return the optimizers that a network and the modules in it have as attributes: of such a network a call is a step."""
    held = [
        value for module in network.modules() for value in vars(module).values() if isinstance(value, torch.optim.Optimizer)
    ]
    return list({id(optimizer): optimizer for optimizer in held}.values())


def _entries(save_obj: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(save_obj, Lamb):
        yield from _entries_of(save_obj)
    elif isinstance(save_obj, nn.Module):
        for entry in named_tensors(save_obj):
            yield entry.name, entry.parameter
        for optimizer in optimizers_of(save_obj):
            yield from _entries_of(optimizer) if isinstance(optimizer, Lamb) else ()
    elif isinstance(save_obj, Mapping):
        yield from save_obj.items()
    elif isinstance(save_obj, Sequence) and all(isinstance(x, Mapping) and {"name", "data"} <= x.keys() for x in save_obj):
        yield from ((x["name"], x["data"]) for x in save_obj)
    else:
        raise fail(
            TypeError, "save_obj", "a network, nn.Lamb, a dict, or a list of dicts with 'name' and 'data'", type(save_obj)
        )


def _entries_of(optimizer: Lamb) -> Iterator[tuple[str, Any]]:
    state_dict = optimizer.state_dict()
    for group in state_dict["param_groups"]:
        names = group.get("param_names") or [f"parameters[{i}]" for i in group["params"]]
        for index, name in zip(group["params"], names, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                yield f"{_MOMENTS.get(key, f'lamb_{key}')}.{name}", value
    yield _STEP, torch.tensor([state_dict["global_step"]], dtype=torch.int32)
    if isinstance(optimizer.learning_rate, Parameter):
        yield _RATE, torch.tensor(float(state_dict["param_groups"][0]["lr"]), dtype=torch.float64)


def _state_of(optimizer: Any, arrays: Mapping[str, Any]) -> tuple[Any, set[str], list[str]]:
    """Return a state dict with what a dict has of an optimizer, the names that are used, and those that are missing."""
    if not isinstance(optimizer, Lamb) or _STEP not in arrays:
        return None, set(), []
    step = int(plain(arrays[_STEP]).reshape(-1)[0])
    state_dict, used = {**optimizer.state_dict(), _STEP: step}, {_STEP}
    state_dict["param_groups"] = [dict(group) for group in state_dict["param_groups"]]
    state, missing = {}, []
    for group in state_dict["param_groups"]:
        names = group.get("param_names") or [f"parameters[{i}]" for i in group["params"]]
        for index, name in zip(group["params"], names, strict=True):
            own = {key: f"{prefix}.{name}" for key, prefix in _MOMENTS.items()}
            own |= {
                key.partition(".")[0][5:]: key for key in arrays if key.startswith("lamb_") and key.partition(".")[2] == name
            }
            own = {_KEYS.get(key, key): entry for key, entry in own.items()}
            there = {key: entry for key, entry in own.items() if entry in arrays}
            used |= set(there.values())
            missing += [] if step == 0 or there else [entry for entry in own.values() if entry not in arrays]
            if {"exp_avg", "exp_avg_sq"} <= there.keys():
                state[index] = {"step": torch.tensor(float(step)), **{key: plain(arrays[e]) for key, e in there.items()}}
    if _RATE in arrays and isinstance(optimizer.learning_rate, Parameter):
        used.add(_RATE)
        for group in state_dict["param_groups"]:
            number = float(plain(arrays[_RATE]).reshape(-1)[0])
            group["lr"] = torch.full_like(group["lr"], number) if isinstance(group["lr"], torch.Tensor) else number
    state_dict["state"] = state
    return state_dict, used, missing


_KEYS = {"m": "exp_avg", "v": "exp_avg_sq"}


def _by_suffix(missing: Sequence[str], names: Mapping[str, Any]) -> dict[str, str]:
    """Return where parameters stand whose names have one more prefix in the dict."""
    for name in missing:
        for longer in names:
            if longer.endswith(f".{name}"):
                prefix = longer.removesuffix(name)
                return {other: prefix + other for other in missing if prefix + other in names}
    return {}


def _check_fits(name: str, target: torch.Tensor, value: Any, strict: bool) -> None:
    found = plain(value)
    if not isinstance(found, torch.Tensor):
        raise fail(TypeError, f"parameter_dict[{name!r}]", "a parameter or tensor", type(found))
    if found.shape != target.shape:
        raise RuntimeError(
            f"{name!r} has shape {tuple(found.shape)} in parameter_dict and {tuple(target.shape)} in net; give what was saved "
            "of such a network"
        )
    kinds = {(t.dtype.is_floating_point, t.dtype.is_complex) for t in (found, target)}
    if found.dtype != target.dtype and (strict or len(kinds) > 1):
        raise RuntimeError(f"{name!r} is {found.dtype} in parameter_dict and {target.dtype} in net; cast one of them")


def _unique(entries: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    seen = set()
    for name, value in entries:
        if name in seen:
            raise ValueError(f"two parameters are called {name!r}; give one of the cells that hold them auto_prefix=True")
        seen.add(name)
        yield name, value


def _strings(value: Any) -> tuple[str, ...]:
    return () if not value else (value,) if isinstance(value, str) else tuple(value)
