"""Checkpoints of several processes: folders of torch.distributed.checkpoint, with checksums."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchlamb.checkpoint import files
from torchlamb.checkpoint.together import on_first, together
from torchlamb.files import sync
from torchlamb.plain import plain as as_plain
from torchlamb.state import NUMBERS


def write(saving: Path, model: nn.Module, optimizer: Optimizer, more: dict[str, Any]) -> str:
    """Write a folder, each process its own files and their checksums, and return the checksum for its name.

    Not with torch's `get_optimizer_state_dict`, which takes a step of an optimizer that has no state yet, and cannot load what
    lacks the state of a parameter.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    rank = torch.distributed.get_rank()
    weights, weights_plain = _split(get_model_state_dict(model))
    state_dict = optimizer.state_dict()
    params, states = _params_of(state_dict["param_groups"], optimizer), state_dict.pop("state")
    others = {key: value for key, value in states.items() if key not in params}  # of nobody's, or a wrapper's
    state, state_plain = _split({f"{i}.{key}": v for i in params if i in states for key, v in states[i].items()})
    kinds = _agreed({key: (tuple(t.shape), t.dtype) for key, t in state.items()}, [tuple(p.shape) for p in params.values()])
    # Processes that had no gradient of a parameter may lack its state.
    state = {key: state[key] if key in state else _empty(key, kind, params) for key, kind in kinds.items()}
    with files.writing(saving):
        try:
            save_shards({"model": weights, "state": state}, storage_writer=FileSystemWriter(saving))
        except CheckpointException as error:  # on all processes
            raise OSError(str(error)) from error
    plain = {
        "class": type(optimizer).__name__,
        "model": {"shapes": {name: tuple(t.shape) for name, t in weights.items()}, "plain": weights_plain},
        "optimizer": {"kinds": kinds, "plain": state_plain, "others": others, "rest": as_plain(state_dict)},
        "more": more,
    }
    on_first(lambda: files.write(saving / files.PLAIN, plain))
    prefixes = (f"__{rank}_", ".metadata", files.PLAIN) if rank == 0 else (f"__{rank}_",)
    written = together(lambda: sorted(file for file in saving.iterdir() if file.name.startswith(prefixes)))[rank]
    lines = together(lambda: [f"{files.checksum(file)}  {file.name}" for file in written])
    sums = "".join(f"{line}\n" for of_process in lines for line in of_process)
    on_first(lambda: _write_sums(saving / files.SUMS, sums))
    return hashlib.sha256(sums.encode()).hexdigest()[: files.DIGITS]


def _write_sums(file: Path, sums: str) -> None:
    with files.writing(file):
        file.write_text(sums)
        sync(file)
        sync(file.parent)


def read(source: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load a folder into new tensors first: what does not fit changes nothing."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    plain = together(lambda: files.read(source / files.PLAIN, "class", "model", "optimizer", "more"))[0]
    saved = plain["optimizer"]
    own, _ = _split(get_model_state_dict(model))
    files.check_class(plain["class"], optimizer, source)
    files.check_model(plain["model"]["shapes"], own, source)
    counts = [[len(group["params"]) for group in groups] for groups in (saved["rest"]["param_groups"], optimizer.param_groups)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{source} has groups of {counts[0]} parameters, and the optimizer of {counts[1]}; give what was saved"
        )
    rest = files.as_ordered(saved["rest"], optimizer)
    params = _params_of(rest["param_groups"], optimizer)
    weights = {name: torch.empty_like(t) for name, t in own.items()}
    state = {key: _empty(key, kind, params) for key, kind in saved["kinds"].items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # that this is one process, is meant
        load_shards({"model": weights, "state": state}, storage_reader=FileSystemReader(source))
    by_param: dict[int, dict[str, Any]] = {}
    for key, value in {**state, **saved["plain"]}.items():
        index, _, name = key.partition(".")
        by_param.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**rest, "state": {**by_param, **saved.get("others", {})}})
    set_model_state_dict(model, {**weights, **plain["model"]["plain"]})
    return plain["more"]  # type: ignore[no-any-return]


def _params_of(groups: list[dict[str, Any]], optimizer: Optimizer) -> dict[int, Tensor]:
    """Return an optimizer's parameters by their keys in the groups of a state dict."""
    keys = [key for group in groups for key in group["params"]]
    return dict(zip(keys, (p for group in optimizer.param_groups for p in group["params"]), strict=True))


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a state dict, and its plain values."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in state.items() if key not in tensors}


def _agreed(kinds: dict[str, Any], shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Return the shape and dtype of every state tensor that any process has.

    Raises:
        ValueError: processes have other parameters, as in pipelines
    """
    of_processes = together(lambda: (kinds, shapes))
    if any(others != shapes for _, others in of_processes):
        raise ValueError("the optimizers of the processes have other parameters; give each its own folder and process group")
    return {key: kind for own, _ in of_processes for key, kind in own.items()}


def _empty(key: str, kind: tuple[tuple[int, ...], torch.dtype], params: Mapping[int, Tensor]) -> Tensor:
    """Return zeros for a state tensor, sharded as its parameter is if it has its shape."""
    index, _, name = key.partition(".")
    (shape, dtype), param = kind, params[int(index)]
    if shape == tuple(param.shape) and name not in NUMBERS:
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype)
