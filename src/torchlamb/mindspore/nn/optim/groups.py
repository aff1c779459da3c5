"""How parameters, groups and gradients are worded, and what is said when they are not. It knows no optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any

from torch import Tensor

from torchlamb.mindspore.common.parameter import NamedParameter, Parameter
from torchlamb.mindspore.common.tensor import plain
from torchlamb.mindspore.nn.optim.learning_rate import parse, parse_decay
from torchlamb.options import fail, flag

Group = dict[str, Any]

KEYS = ("params", "lr", "weight_decay", "grad_centralization", "order_params")


def read_params(params: Any) -> tuple[list[Group], list[Tensor] | None, bool]:
    """Return the groups that `params` stands for, the order asked for by "order_params", and whether it has groups.

    Parameters without groups become at most two: those that decay, and those with "beta" or "gamma" in their names. In both
    forms the tensors are still as they were given.
    """
    entries = _listed("params", params)
    if any(isinstance(entry, dict) for entry in entries):
        return *_read_groups(entries), True
    pairs = _pairs("params", entries, may_be_dict=True)
    check_no_duplicates(pairs, "params", {})
    excluded = [name is not None and ("beta" in name or "gamma" in name) for name, _ in pairs]
    decaying: Group = {"params": [entry for entry, out in zip(entries, excluded, strict=True) if not out]}
    others: Group = {"params": [entry for entry, out in zip(entries, excluded, strict=True) if out], "weight_decay": 0.0}
    return [group for group in (decaying, others) if group["params"]], [tensor for _, tensor in pairs], False


def read_group(group: Any, index: int) -> Group:
    """Return a group with torch's values for the keys it has: "lr" is parsed, "params" are tensors or (name, tensor) pairs."""
    if not isinstance(group, dict):
        raise fail(TypeError, f"group {index}", "a dict", group)
    unknown = [key for key in group if key not in KEYS]
    if unknown:
        raise KeyError(f"group {index} has the key {unknown[0]!r}; the keys of a group are {', '.join(map(repr, KEYS))}")
    if "order_params" in group:
        raise ValueError(
            f"group {index} has 'order_params' beside other keys or groups; give it to the constructor, alone in a dict"
        )
    if "params" not in group:
        raise KeyError(f"group {index} has no 'params'; it takes a list of parameters")
    where = f"group {index} params"
    pairs = _pairs(where, _listed(where, group["params"]))
    read: Group = {"params": [pair[1] if pair[0] is None else pair for pair in pairs]}
    if "lr" in group:
        read["lr"] = parse(f"group {index} lr", group["lr"])
    if "weight_decay" in group:
        read["weight_decay"] = parse_decay(f"group {index} weight_decay", group["weight_decay"])
    if "grad_centralization" in group:
        read["grad_centralization"] = flag(f"group {index} grad_centralization", group["grad_centralization"])
    return read


def centralized_apart(group: Group) -> list[Group]:
    """Return a group, or two of it: of its tensors with 3 or more dims, those of convolutions alone are to be centralized.

    Whether a tensor is a convolution's, is known of what `trainable_params` returned; any other counts by its dims.
    """
    if not group.get("grad_centralization"):
        return [group]
    others = [x for x in group["params"] if getattr(x, "is_convolution", None) is False and x.parameter.dim() >= 3]
    if not others:
        return [group]
    left = {id(x) for x in others}
    convolutions = [x for x in group["params"] if id(x) not in left]
    apart = [{**group, "params": convolutions}, {**group, "params": others, "grad_centralization": False}]
    return [part for part in apart if part["params"]]


def check_no_duplicates(pairs: Iterable[tuple[str | None, Tensor]], where: str, known: dict[int, str]) -> None:
    """Raise RuntimeError if a parameter is given twice, or is one of `known`, names by the identity of parameters."""
    known = dict(known)
    for i, (name, tensor) in enumerate(pairs):
        label = name or f"{where}[{i}]"
        if id(tensor) in known:
            raise RuntimeError(f"parameter {label!r} is given twice, first as {known[id(tensor)]!r}; give it once")
        known[id(tensor)] = label


def positions(order: Sequence[Tensor], parameters: Sequence[NamedParameter]) -> list[int]:
    """Return where in `parameters` each tensor of `order` stands; ValueError unless it holds each of them once."""
    place = {id(x.parameter): i for i, x in enumerate(parameters)}
    for i, tensor in enumerate(order):
        if id(tensor) not in place:
            raise ValueError(f"order_params[{i}] is in no group; it must hold exactly the parameters of the groups")
    found = [place[id(tensor)] for tensor in order]
    missing = set(place.values()) - set(found)
    if missing:
        name = parameters[min(missing)].name
        raise ValueError(f"order_params lacks {name!r}; it must hold exactly the parameters of the groups")
    if len(found) != len(place):
        raise ValueError("order_params holds a parameter twice; it must hold each parameter of the groups once")
    return found


def check_gradients(gradients: Any, parameters: Sequence[NamedParameter]) -> list[Tensor | None]:
    """Return the gradients as a list if they fit the parameters."""
    if isinstance(gradients, (Tensor, str, Mapping)) or not isinstance(gradients, Iterable):
        raise fail(TypeError, "gradients", "a tuple of tensors, one for each of optimizer.parameters", type(gradients))
    given = [gradient.detach() if isinstance(gradient, Tensor) else gradient for gradient in map(plain, gradients)]
    if len(given) != len(parameters):
        at = f"; the first without one is {parameters[len(given)].name!r}" if len(given) < len(parameters) else ""
        raise ValueError(f"gradients must hold {len(parameters)} tensors, as optimizer.parameters does, got {len(given)}{at}")
    for i, ((name, p), gradient) in enumerate(zip(parameters, given, strict=True)):
        if gradient is None:
            continue
        if not isinstance(gradient, Tensor):
            raise fail(TypeError, f"gradients[{i}], of {name!r},", "a tensor or None", type(gradient))
        if gradient.dtype != p.dtype:
            raise fail(TypeError, f"gradients[{i}], of {name!r},", f"of dtype {p.dtype}", gradient.dtype)
        if gradient.shape != p.shape:
            raise fail(ValueError, f"gradients[{i}], of {name!r},", f"of shape {tuple(p.shape)}", tuple(gradient.shape))
        if gradient.device != p.device:
            raise fail(ValueError, f"gradients[{i}], of {name!r},", f"on {p.device}", gradient.device)
    return given


def read_global_step(state_dict: Mapping[str, Any]) -> int:
    """Return the step a state dict was saved at: its entry, or the largest step count of a parameter."""
    if "global_step" not in state_dict:
        steps = [state["step"] for state in state_dict["state"].values() if "step" in state]
        return int(max(map(float, steps), default=0))
    value = state_dict["global_step"]
    if isinstance(value, bool) or not isinstance(value, int):
        raise fail(TypeError, "state_dict['global_step']", "an int >= 0", value)
    if value < 0:
        raise fail(ValueError, "state_dict['global_step']", "an int >= 0", value)
    return value


def _read_groups(entries: list[Any]) -> tuple[list[Group], list[Tensor] | None]:
    groups, order = [], None
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise TypeError(f"params[{i}] must be a dict, as others are, got {type(entry).__name__}; give parameters or groups")
        if set(entry) != {"order_params"}:
            groups.append(entry)
        elif order is not None:
            raise ValueError("order_params is given twice; give it once")
        else:
            listed = _listed("order_params", entry["order_params"])
            order = [tensor for _, tensor in _pairs("order_params", listed, may_mix=True)]
    if not groups:
        raise ValueError("params holds no group with 'params'")
    return groups, order


def _pairs(
    where: str, entries: Iterable[Any], may_be_dict: bool = False, may_mix: bool = False
) -> list[tuple[str | None, Tensor]]:
    """Return the name, if it has one, and the tensor of each parameter, in any of its forms."""
    pairs: list[Any] = []
    for i, entry in enumerate(entries):
        pair = entry if not isinstance(entry, Tensor) else (entry.name if type(entry) is Parameter else None, entry)
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], (str, NoneType)) and isinstance(pair[1], Tensor)
        ):
            wanted = (
                "a parameter, a (name, parameter) pair or a dict" if may_be_dict else "a parameter or a (name, parameter) pair"
            )
            raise fail(TypeError, f"{where}[{i}]", wanted, entry)
        pairs.append(pair)
        if not may_mix and (pair[0] is None) != (pairs[0][0] is None):
            raise TypeError(
                f"{where}[{i}] must have a name where others have one, and none where they have none; name all or none"
            )
    return pairs


def _listed(name: str, value: Any) -> list[Any]:
    wanted = "a list of parameters" + (" or of dicts" if name == "params" else "")
    if value is None and name != "order_params":
        raise fail(ValueError, name, wanted, value)
    if isinstance(value, (Tensor, str, Mapping)) or not isinstance(value, Iterable):
        raise fail(TypeError, name, wanted, type(value))
    entries = list(value)
    if not entries:
        raise ValueError(f"{name} must be {wanted}, got an empty one")
    return entries
