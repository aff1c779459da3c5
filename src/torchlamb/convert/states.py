"""State dicts of other torch optimizers, rewritten as those of `torchlamb.Lamb`, and back to torch's AdamW.

What each of them looks like, and which options compute its rule, is `torchlamb.convert.sources`'.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchlamb.convert.sources import COMMON, SOURCES, Source, looks_like
from torchlamb.foreign import why_state_refused
from torchlamb.lamb import Lamb

StateDict = dict[str, Any]

# Of a group of Lamb: all options, and those whose absence in AdamW changes what is computed.
_OPTIONS = set(inspect.signature(Lamb).parameters) - {"params"}
_WITHOUT_COUNTERPART = ("phi_bounds", "trust_ratio_bounds", "grad_centralization", "max_grad_norm", "skip_nonfinite")
_WRAPPED = ("adam", "adamw", "radam")
_REMEDY = "give what its state_dict() returned"
_OURS = Source(
    "torchlamb.Lamb",
    ("layer_adaptation", "phi_bounds", "blocks", "grad_averaging", "max_grad_norm"),
    "state",
    lambda *_: ({}, []),
)


def to_lamb(state_dict: Mapping[str, Any], source: str, arguments: Mapping[str, Any] | None = None) -> StateDict:
    """Return another optimizer's state dict as one for :meth:`torchlamb.Lamb.load_state_dict`.

    Moments are taken over as they are, step counts of groups become the parameters', and options those that compute the same
    rule (docs/variants.md). Differences that remain are named in one warning.

    Args:
        state_dict: what the other optimizer's ``state_dict()`` returned; it is not changed, and its tensors are shared. Of
            DeepSpeed also that of the wrapper around it, whose float32 parameters become masters.
        source: "adam", "adamw", "radam", "apex" (FusedLAMB), "apex_mixed_precision" (FusedMixedPrecisionLamb), "deepspeed"
            (FusedLamb), "pytorch_optimizer", "timm" or "torch_optimizer"
        arguments: what was given to its constructor and is not in its state dicts: `use_nvlamb` and `adam_w_mode` of Apex,
            `max_grad_norm` of Apex and timm where that of their groups is another, `eps_inside_sqrt` of DeepSpeed,
            `clamp_value`, `adam` and `debias` of torch_optimizer, `pre_norm` and `maximize` of pytorch_optimizer. None for its
            defaults (default: None)

    Returns:
        A state dict with the same parameters in the same groups.

    Raises:
        ValueError: no such source or argument, or the state dict is not one of that optimizer; it says what was found

    Warns:
        UserWarning: with each difference in the rule that stays

    Example:
        >>> import torch, torchlamb, warnings
        >>> model = torch.nn.Linear(4, 2)
        >>> old = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> old.step()
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # what stays different: the meaning of the lr
        ...     state_dict = torchlamb.convert.to_lamb(old.state_dict(), "adamw")
        >>> optimizer = torchlamb.Lamb(model.parameters())
        >>> optimizer.load_state_dict(state_dict)
        >>> optimizer.state[model.weight]["step"]
        tensor(1.)
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    peer = SOURCES[source]
    given = {**peer.arguments, **(arguments or {})}
    unknown = sorted(given.keys() - peer.arguments.keys())
    if unknown:
        known = ", ".join(peer.arguments) or "none"
        raise ValueError(f"arguments has {unknown[0]!r}; those of {peer.title} that its state dicts do not hold are: {known}")
    inner, masters = _unwrapped(state_dict)
    _check(inner, peer)
    state: dict[Any, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    notes: list[str] = []
    for group in inner["param_groups"]:
        options, differences = peer.translate({"decoupled_weight_decay": source == "adamw", **group}, given)
        notes += differences
        if masters:
            options["master_weights"] = True
        _check_options({**_common(group), **options}, len(groups), peer)
        groups.append({**{k: v for k, v in group.items() if k not in peer.consumed}, **_common(group), **options})
        for key in group["params"]:
            if inner["state"].get(key):
                old = inner["state"][key]
                step = group["step"] if peer.step_in == "group" else old["step"]
                state[key] = {"step": _step(step), "exp_avg": old["exp_avg"], "exp_avg_sq": old["exp_avg_sq"]}
                if source in _WRAPPED:  # whose states may have more in them, of wrappers
                    state[key] = {**old, **state[key]}
                if key in masters:
                    state[key]["master"] = masters[key]
    if len({group.get("max_grad_norm") for group in groups}) > 1:
        notes.append(
            "its groups have several max_grad_norm, and it clips by the one of its constructor alone: give that as an "
            "argument; the first group's is taken"
        )
        for group in groups:
            group["max_grad_norm"] = groups[0]["max_grad_norm"]
    if notes:
        warnings.warn(f"from {peer.title}: " + "; ".join(dict.fromkeys(notes)), stacklevel=2)
    return {"state": state, "param_groups": groups}


def to_adamw(state_dict: Mapping[str, Any]) -> StateDict:
    """Return a state dict of :class:`torchlamb.Lamb` as one for :meth:`torch.optim.AdamW.load_state_dict`.

    Args:
        state_dict: of a Lamb; it is not changed, and its tensors are shared

    Returns:
        A state dict with the same parameters in the same groups; moments that were in bf16 for parameters that torch keeps in
        another dtype are cast by torch when it loads them.

    Raises:
        ValueError: it is not one of a Lamb; it says what was found

    Warns:
        UserWarning: with what cannot be carried over; at least that the lr means something else

    Example:
        >>> import torch, torchlamb, warnings
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torchlamb.Lamb(model.parameters())
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     state_dict = torchlamb.convert.to_adamw(optimizer.state_dict())
        >>> torch.optim.AdamW(model.parameters()).load_state_dict(state_dict)
    """
    _check(state_dict, _OURS)
    state: dict[Any, dict[str, Any]] = {}
    groups = []
    notes = ["its lr is a share of each tensor's norm, and its decay inside the update; tune lr and weight_decay again"]
    for group in state_dict["param_groups"]:
        kept = {name: group[name] for name in ("maximize", "capturable", "differentiable", "param_names") if name in group}
        torchs = {"amsgrad": False, "foreach": None, "fused": None, "decoupled_weight_decay": True}
        groups.append({**{k: v for k, v in group.items() if k not in _OPTIONS}, **_common(group), **torchs, **kept})
        beta3 = 1.0 if group["grad_averaging"] else 1.0 - group["betas"][0]
        notes += [] if group["bias_correction"] else ["AdamW always corrects the bias of its moments"]
        notes += [f"{name} has no counterpart" for name in _WITHOUT_COUNTERPART if group[name]]
        for key in group["params"]:
            if state_dict["state"].get(key):
                old = state_dict["state"][key]
                if "exp_avg" in old:
                    first = old["exp_avg"] if beta3 == 1.0 else old["exp_avg"] * beta3
                    state[key] = {"step": _step(old["step"]), "exp_avg": first, "exp_avg_sq": old["exp_avg_sq"]}
                if "master" in old:
                    notes.append("AdamW has no masters: the parameters go on as they are, rounded")
    warnings.warn("to torch.optim.AdamW: " + "; ".join(dict.fromkeys(notes)), stacklevel=2)
    return {"state": state, "param_groups": groups}


def _unwrapped(state_dict: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[Any, Tensor]]:
    """Return the optimizer's own state dict and, where DeepSpeed's wrapper was given, its float32 parameters by key."""
    if not (isinstance(state_dict, Mapping) and {"optimizer_state_dict", "fp32_groups"} <= state_dict.keys()):
        return state_dict, {}
    inner, groups = state_dict["optimizer_state_dict"], state_dict["fp32_groups"]
    if not isinstance(inner, Mapping) or "param_groups" not in inner:
        return inner, {}
    keys = [group["params"] for group in inner["param_groups"]]
    if [len(group) for group in groups] != [len(group) for group in keys]:
        raise ValueError(
            f"fp32_groups of state_dict has groups of {[len(group) for group in groups]} parameters, and its param_groups "
            f"{[len(group) for group in keys]}; give the state dict as it was saved"
        )
    pairs = zip(_flat(keys), _flat(groups), strict=True)
    return inner, {key: master.detach() for key, master in pairs}


def _flat(groups: Iterable[Iterable[Any]]) -> list[Any]:
    return [entry for group in groups for entry in group]


def _check(state_dict: Any, peer: Source) -> None:
    """Raise for the first thing that a state dict of that optimizer does not have."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        got = f"a dict with {list(state_dict)[:6]}" if isinstance(state_dict, Mapping) else f"a {type(state_dict).__name__}"
        flat = isinstance(state_dict, Mapping) and any(str(key).startswith("state.") for key in state_dict)
        remedy = "get it again without flatten_optimizer_state_dict" if flat else _REMEDY
        raise ValueError(f"state_dict must have 'state' and 'param_groups', got {got}; {remedy}")
    state = state_dict["state"]
    if not isinstance(state, Mapping) or not isinstance(state_dict["param_groups"], (list, tuple)):
        got = f"a {type(state).__name__} and a {type(state_dict['param_groups']).__name__}"
        raise ValueError(f"'state' and 'param_groups' of state_dict must be a dict and a list, got {got}; {_REMEDY}")
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping):
            raise ValueError(f"param_groups[{i}] of state_dict must be a dict, got a {type(group).__name__}; {_REMEDY}")
        if peer is not _OURS and "layer_adaptation" in group:
            raise ValueError(f"param_groups[{i}] of state_dict is of torchlamb.Lamb already; load it as it is")
        keys = group.get("params", [])
        states = [(key, state[key]) for key in keys if state.get(key)]
        found = "group" if "step" in group else "state" if any("step" in s for _, s in states) else None
        wanted = (*COMMON, *peer.group_keys, *(("step",) if states and peer.step_in == "group" else ()))
        missing = [name for name in wanted if name not in group]
        likely = [name for name in looks_like(group, found) if SOURCES[name] is not peer]
        strange = [name for name in peer.absent if name in group]
        if missing or strange or (likely and len(SOURCES[likely[0]].group_keys) > len(peer.group_keys)):
            what = (
                f"has no {missing[0]!r}"
                if missing
                else f"has {(*strange, *[SOURCES[name].group_keys[-1] for name in likely])[0]!r}"
            )
            remedy = f"; it looks like one of {' or '.join(map(repr, likely))}" if likely else ""
            raise ValueError(f"param_groups[{i}] of state_dict {what}, unlike one of {peer.title}: {sorted(group)}{remedy}")
        for key, entry in states:
            _check_entry(entry, f"state[{key!r}] of state_dict", peer)


def _check_options(options: Mapping[str, Any], i: int, peer: Source) -> None:
    """Raise if Lamb would refuse what a group was translated to."""
    try:
        Lamb([torch.zeros(1)], **{name: value for name, value in options.items() if name in _OPTIONS})
    except (TypeError, ValueError) as error:
        raise ValueError(f"param_groups[{i}] of {peer.title} has no counterpart in Lamb: {error}") from error


def _check_entry(entry: Mapping[str, Any], name: str, peer: Source) -> None:
    reason = None if peer is _OURS else why_state_refused(entry, name)
    if reason is not None:
        raise ValueError(reason)
    for part in ("exp_avg", "exp_avg_sq", *(("step",) if peer.step_in == "state" else ())):
        if part not in entry:
            if peer is _OURS and "exp_avg" not in entry:  # a seed or a master, before the first step
                return
            raise ValueError(f"{name} has no {part!r}, unlike one of {peer.title}: {sorted(entry)}; give a complete state dict")
    first, second = entry["exp_avg"], entry["exp_avg_sq"]
    if not (isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape):
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (first, second)]
        raise ValueError(f"exp_avg and exp_avg_sq of {name} must be tensors of one shape, got {shapes[0]} and {shapes[1]}")


def _common(group: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: _plain(group[name]) for name in ("lr", "eps", "weight_decay")}
    try:
        beta1, beta2 = group["betas"]
    except (TypeError, ValueError):
        raise ValueError(f"betas of param_groups must be two numbers, got {group['betas']!r}; {_REMEDY}") from None
    return {"params": list(group["params"]), "betas": (float(beta1), float(beta2)), **plain}


def _plain(value: Any) -> float:
    try:
        return float(value.item() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"lr, eps, weight_decay and step must each be one number, got {value!r}; {_REMEDY}") from None


def _step(value: Any) -> Tensor:
    return torch.tensor(_plain(value), dtype=torch.float32)
