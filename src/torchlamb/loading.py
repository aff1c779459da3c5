"""What is taken over from a state dict: whose it is, whether it fits, and as which tensors it is stored.

All of it happens before anything changes. What `state_dict()` of a Lamb returned is never refused for what its options or
further entries say; that is the next step's affair. This room must not know what a step does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from torchlamb.foreign import adam_notes, is_adams, is_ours, why_state_refused
from torchlamb.gate import has_memory
from torchlamb.names import by_name
from torchlamb.options import normalise, warn_caller
from torchlamb.plain import plain
from torchlamb.sharding.layout import is_dtensor, is_plain
from torchlamb.state import MOMENTS, NUMBERS, Storage

State = dict[str, Any]

# How an optimizer steps is its own affair, as the machine is that it runs on. So is how it stores things, if it says so.
_HOW = ("foreach", "fused", "differentiable")
_STEPPED = {"step", *MOMENTS}  # what there is of a parameter that has been stepped
_REMEDY = "load what state_dict() returned"


def read(
    state_dict: Any, groups: Sequence[Mapping[str, Any]], states: Mapping[Any, Any]
) -> tuple[dict[str, Any], dict[Any, State]]:
    """Return a state dict as torch is to load it, without states of parameters, and those as they are to be stored.

    Args:
        state_dict: what was given; it is not changed, and moments of the right dtype are shared with it, as in torch
        groups: of this optimizer
        states: of this optimizer, by parameter

    Raises:
        TypeError: it is no state dict
        ValueError: it is that of other parameters, or of another optimizer than Lamb, Adam, AdamW and RAdam

    Warns:
        UserWarning: its parameters have other names, or it is of Adam, AdamW or RAdam
    """
    _check_form(state_dict, groups)
    saved, disagreement = by_name(state_dict["param_groups"], groups)
    ours = is_ours(saved)
    adopted = [_adopt(*pair) for pair in zip(saved, groups, strict=True)]
    entries, loaded = dict(state_dict["state"]), {}
    taken = _Memory(p for group in groups for p in group["params"])
    for i, (new, group) in enumerate(zip(adopted, groups, strict=True)):
        storage = _storage(new)
        for place, (key, param) in enumerate(zip(new["params"], group["params"], strict=True)):
            if key not in entries:
                continue
            name = f"parameter {_name(group, place)!r} (group {i})"
            _check_entry(entries[key], name, param, None if ours else name, states.get(param, {}))
            loaded[param] = _stored(entries[key], param, storage, taken)
            entries[key] = {}
    if disagreement is not None:
        warn_caller(disagreement)
    notes = dict.fromkeys(note for group in saved if is_adams(group) for note in adam_notes(group))
    if notes:
        warn_caller(
            f"this is a state dict of torch's {_title(saved)}: {'; '.join(notes)}. Set param_groups' lr to what you want after "
            "loading, before a scheduler is made"
        )
    return {**state_dict, "param_groups": adopted, "state": entries}, loaded


def _check_form(state_dict: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise if it is no state dict, or one of other groups."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        got = f"a dict with {list(state_dict)[:4]}" if isinstance(state_dict, Mapping) else f"a {type(state_dict).__name__}"
        raise TypeError(
            f"state_dict must be a dict with 'state' and 'param_groups', got {got}; give what state_dict() returned"
        )
    state, saved = state_dict["state"], state_dict["param_groups"]
    if not (isinstance(state, Mapping) and isinstance(saved, (list, tuple)) and all(isinstance(g, Mapping) for g in saved)):
        got = f"a {type(state).__name__} and a {type(saved).__name__}"
        raise TypeError(f"'state' and 'param_groups' of state_dict must be a dict and a list of dicts, got {got}; {_REMEDY}")
    if len(saved) != len(groups):
        raise ValueError(
            f"state_dict has {len(saved)} parameter groups, and this optimizer {len(groups)}; construct it with the same groups"
        )
    ours = is_ours(saved)
    for i, (saved_group, group) in enumerate(zip(saved, groups, strict=True)):
        for name in ("params",) if ours else ("params", "lr", "betas", "eps", "weight_decay"):
            if name not in saved_group:
                raise ValueError(
                    f"param_groups[{i}] of state_dict has no {name!r}, as those of Lamb, Adam and AdamW have; if it is another "
                    "optimizer's, torchlamb.convert.to_lamb may know it"
                )
        if len(saved_group["params"]) != len(group["params"]):
            raise ValueError(
                f"param_groups[{i}] of state_dict has {len(saved_group['params'])} parameters, and this optimizer's "
                f"{len(group['params'])}; construct it with the same parameters in the same groups"
            )


def _adopt(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a loaded group with this group's options where it has none, and with how this one steps and stores things.

    The latter as far as it is not by default.
    """
    rounds = {name: group[name] for name in ("master_weights", "stochastic_rounding")}  # of which one excludes the other
    kept = {name: group[name] for name in _HOW} | (rounds if any(rounds.values()) else {})
    if group["state_dtype"] is not None:
        kept["state_dtype"] = group["state_dtype"]
    own = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    theirs = {name: plain(value) for name, value in saved.items()}
    if is_adams(saved):
        theirs = {name: value for name, value in theirs.items() if name not in ("amsgrad", "decoupled_weight_decay")}
    return {**own, **normalise(theirs), **kept}


def _storage(options: Mapping[str, Any]) -> Storage | None:
    """Return how a group with these options stores things; None where they are such that the next step will refuse them."""
    flags = ("capturable", "master_weights", "stochastic_rounding", "skip_nonfinite")
    is_good = all(isinstance(options[name], bool) for name in flags) and options["state_dtype"] in (
        None,
        torch.float32,
        torch.bfloat16,
    )
    return Storage(options) if is_good else None


def _check_entry(entry: Any, name: str, param: Tensor, foreign: str | None, own: Any) -> None:
    """Raise if a parameter's state does not fit it, unless what it has now does not fit in the same way."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"the state of {name} must be a dict, got a {type(entry).__name__}; {_REMEDY}")
    own = own if isinstance(own, Mapping) else {}
    reason = None if foreign is None else why_state_refused(entry, name)
    if reason is not None:
        raise ValueError(reason)
    missing = _STEPPED - entry.keys()
    if missing and missing != _STEPPED and missing != _STEPPED - own.keys():
        key = next(key for key in ("step", *MOMENTS) if key in missing)
        raise ValueError(f"the state of {name} has no {key!r}; load a complete state dict, or start with a fresh Lamb")
    for key, value in entry.items():
        if key in NUMBERS and not _is_number(value):
            raise ValueError(f"{key} of {name} must be one number, got {value!r}; {_REMEDY}")
        if key in (*MOMENTS, "master") and not _is_like(value, own.get(key)):
            _check_tensor(value, f"{key} of {name}", param)


def _is_number(value: Any) -> bool:
    return isinstance(plain(value), (int, float)) or (
        isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    )


def _is_like(value: Any, own: Any) -> bool:
    """Return whether an optimizer that has one may have saved the other: as it has gone on with one, it takes the other."""
    if not isinstance(value, Tensor) or not isinstance(own, Tensor):
        return own is not None and type(value) is type(own)
    mine, theirs = ((t.shape, t.is_complex(), t.layout, t.is_meta, is_dtensor(t)) for t in (own, value))
    return mine == theirs


def _check_tensor(value: Any, name: str, param: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got a {type(value).__name__}; {_REMEDY}")
    if is_lazy(param):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, and the parameter none yet; load after the first forward pass"
        )
    if value.shape != param.shape or value.is_complex() != param.is_complex():
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}, and the parameter {tuple(param.shape)} and "
            f"{param.dtype}; load the state dict of the same model, with its parameters in the same order"
        )
    if value.layout != torch.strided:
        raise ValueError(f"{name} has layout {value.layout}; make it dense first, with to_dense()")
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{name} is on the meta device, where it has no contents; load it with another map_location")
    if is_dtensor(value) != is_dtensor(param):
        kinds = ("a DTensor", "a plain tensor") if is_dtensor(value) else ("a plain tensor", "a DTensor")
        raise ValueError(
            f"{name} is {kinds[0]} and the parameter {kinds[1]}; load it with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )


def _stored(entry: Mapping[str, Any], param: Tensor, storage: Storage | None, taken: _Memory) -> State:
    """Return a parameter's state as it is stored, which shares nothing that a step writes with another parameter's."""
    state: State = {}
    for key, value in entry.items():
        if key in NUMBERS:
            number = _plainest(value) if isinstance(value, Tensor) else torch.tensor(plain(value), device="cpu")
            device = number.device if number.is_meta or storage is None else storage.device_of_step(param)
            state[key] = number.detach().reshape(()).to(device, NUMBERS[key], copy=True)  # each counts for itself
        elif key in (*MOMENTS, "master") and isinstance(value, Tensor):
            if key == "master" and storage is not None and not storage.keeps_master(param):
                continue
            dtype = value.dtype if storage is None else torch.float32 if key == "master" else storage.moment_dtype(param)
            # Moments are shared with the dict, as in torch. Masters are copied: a dict may have been given weights.
            copy = key == "master" or not taken.add(value)
            value = _plainest(value).detach().resolve_conj().resolve_neg()
            state[key] = (value.clone(memory_format=_layout(value)) if copy else value).to(param.device, dtype)
        else:  # of a wrapper, or the user's own
            state[key] = _moved(value, param.device)
    return state


def _plainest(tensor: Tensor) -> Tensor:
    """Return a tensor of a subclass that has words of its own, but memory as any, as what it is in memory."""
    return tensor.as_subclass(Tensor) if has_memory(tensor) else tensor


class _Memory:
    """What memory is written by a step already: two threads that write to one place leave either's result."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.ranges: dict[int, list[tuple[int, int]]] = {}  # of each storage, by address
        for param in params:
            self.add(param)

    def add(self, tensor: Tensor) -> bool:
        """Return whether nobody has the tensor's memory yet, and none of its own elements share any."""
        if not is_plain(tensor) or tensor.is_meta or is_lazy(tensor) or tensor.layout != torch.strided or not tensor.numel():
            return True  # it has none that is known here
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            return False
        start = tensor.storage_offset() * tensor.itemsize
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        stop = start + (last + 1) * tensor.itemsize
        others = self.ranges.setdefault(tensor.untyped_storage().data_ptr(), [])
        is_free = all(stop <= first or end <= start for first, end in others)
        others.append((int(start), int(stop)))
        return is_free


def _layout(tensor: Tensor) -> torch.memory_format:
    is_expanded = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.contiguous_format if is_expanded else torch.preserve_format


def _moved(value: Any, device: torch.device) -> Any:
    """Return what is not ours on the parameter's device, as torch does, but in its own precision."""
    if isinstance(value, Tensor):
        return value if value.is_meta or is_dtensor(value) else value.to(device)
    if type(value) is dict:
        return {key: _moved(entry, device) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(entry, device) for entry in value)
    return value


def _name(group: Mapping[str, Any], place: int) -> Any:
    names = group.get("param_names", ())
    return names[place] if place < len(names) else place


def _title(groups: Sequence[Mapping[str, Any]]) -> str:
    first = next(group for group in groups if is_adams(group))
    return "RAdam" if "amsgrad" not in first else "AdamW" if first.get("decoupled_weight_decay", True) else "Adam"
