"""The state of `mindspore.nn.Lamb`, from arrays by name, as its checkpoints have them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_FIRST, _SECOND, _STEP, _LR = "lamb_m.", "lamb_v.", "global_step", "learning_rate"


def from_mindspore(arrays: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the state of `mindspore.nn.Lamb` as a state dict for `torchlamb.Lamb` and `torchlamb.mindspore.nn.Lamb`.

    Its checkpoints have one step count for all parameters, and no options but the lr; those come from `like`.

    Args:
        arrays: by name, as ``mindspore.load_checkpoint`` returns them: ``lamb_m.<name>`` and ``lamb_v.<name>`` for each
            parameter, of its shape, ``global_step``, and ``learning_rate`` if that was a number or a list. Tensors of torch or
            MindSpore, or NumPy arrays.
        like: the state dict of the optimizer that is to load the result, constructed with named parameters: its groups, options
            and lr are taken. None for one group with all parameters in the order of `arrays`, the stored lr, and MindSpore's
            defaults (default: None)

    Returns:
        A state dict with a further entry, "global_step".

    Raises:
        ValueError: something is missing, has another shape, or belongs to no parameter; it names the first

    Warns:
        UserWarning: with what `arrays` cannot tell

    Example:
        >>> import torch, torchlamb, warnings
        >>> model = torch.nn.Linear(4, 2, bias=False)
        >>> optimizer = torchlamb.Lamb(model.named_parameters(), lr=0.1)
        >>> moments = {"lamb_m.weight": torch.zeros(2, 4), "lamb_v.weight": torch.zeros(2, 4)}
        >>> arrays = {"global_step": torch.tensor([7]), **moments}
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     state_dict = torchlamb.convert.from_mindspore(arrays, optimizer.state_dict())
        >>> optimizer.load_state_dict(state_dict)
        >>> optimizer.state[model.weight]["step"]
        tensor(7.)
    """
    names = [name[len(_FIRST) :] for name in arrays if name.startswith(_FIRST)]
    if not names or _STEP not in arrays:
        what = f"no {_STEP!r}" if names else f"nothing that begins with {_FIRST!r}"
        raise ValueError(f"arrays has {what}: {list(arrays)[:6]}; give a checkpoint that was saved with its mindspore.nn.Lamb")
    tensors = {name: _tensor(array) for name, array in arrays.items() if name.startswith((_FIRST, _SECOND))}
    step = int(_tensor(arrays[_STEP]).reshape(-1)[0])
    notes = [
        "its checkpoints do not say where it ran: on GPUs it clips the ratio to [0, 10], which is trust_ratio_bounds=(0, 10), "
        "and takes the norm of an update with eps under the root"
    ]
    if like is None:
        groups = [_group(arrays, names, step)]
        notes.append("nor betas, eps, weight decay and groups: MindSpore's defaults and one group are taken")
    else:
        groups = [dict(group) for group in like["param_groups"]]
        if not all("param_names" in group for group in groups):
            raise ValueError(
                "like has no 'param_names'; construct its optimizer with named parameters: model.named_parameters()"
            )
    state = {}
    for group in groups:
        for key, name in zip(group["params"], group["param_names"], strict=True):
            state[key] = {"step": torch.tensor(float(step)), **_moments(tensors, name)}
    strange = sorted(set(names) - {name for group in groups for name in group["param_names"]})
    if strange:
        raise ValueError(f"arrays has moments of {strange[0]!r}, which is no parameter of like; give the same parameters")
    warnings.warn("from mindspore.nn.Lamb: " + "; ".join(notes), stacklevel=2)
    return {"state": state, "param_groups": groups, _STEP: step}


def _group(arrays: Mapping[str, Any], names: list[str], step: int) -> dict[str, Any]:
    if _LR not in arrays:
        raise ValueError(
            f"arrays has no {_LR!r}, because it was a schedule, or groups had their own; construct the optimizer with those, "
            "and give its state dict as like"
        )
    rates = _tensor(arrays[_LR]).reshape(-1)
    lr = float(rates[min(step, len(rates) - 1)])
    plain = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    return {"params": list(range(len(names))), "param_names": names, **plain}


def _moments(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    for prefix in (_FIRST, _SECOND):
        if prefix + name not in tensors:
            raise ValueError(f"arrays has no {prefix + name!r}; name the parameters as they were in MindSpore")
    first, second = tensors[_FIRST + name], tensors[_SECOND + name]
    if first.shape != second.shape:
        raise ValueError(f"the moments of {name!r} have the shapes {tuple(first.shape)} and {tuple(second.shape)}, not one")
    return {"exp_avg": first, "exp_avg_sq": second}


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    array = array.asnumpy() if hasattr(array, "asnumpy") else array
    if str(getattr(array, "dtype", "")) == "bfloat16":  # which NumPy does not know by itself
        array = array.astype("float32")
    try:
        return torch.tensor(array)
    except TypeError as error:
        raise ValueError(f"arrays has one of dtype {getattr(array, 'dtype', type(array))}; make it float32 first") from error
