"""Checkpoints of a run in one folder: whole or not there at all, checksummed, and the last few of them kept.

One process writes files that `torch.load` reads; several write folders of torch.distributed.checkpoint. This room knows models
and optimizers by their state dicts only, and serves any optimizer.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torchlamb.checkpoint import files, shards
from torchlamb.checkpoint.together import is_distributed, on_first
from torchlamb.files import sync
from torchlamb.plain import plain
from torchlamb.sharding.layout import is_dtensor

__all__ = ["load", "more_of", "newest", "save"]

_SAVING = ".saving-"  # what is not complete is called this
_NAME = re.compile(rf"checkpoint-(\d{{8,}})-([0-9a-f]{{{files.DIGITS}}})(\.pt)?")


def save(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, *, keep: int = 3, **more: Any) -> Path:
    """Add a checkpoint to a folder, and remove the oldest if there are more than `keep` then.

    It is written under another name, synced, and renamed: a crash at any time leaves what was there before, and nothing that
    looks like a checkpoint and is none. Where torch.distributed is initialized, all processes must call this, and share the
    folder; each writes its shards.

    Args:
        path: the folder, which is made where it is missing; one run writes to it at a time
        model: any module
        optimizer: any optimizer of its parameters
        keep: how many checkpoints stay, >= 1 (default: 3)
        more: what else the run needs to go on: numbers, strings, tensors, and lists and dicts of them, such as the state dict
            of a scheduler or `torch.get_rng_state()`; numbers of NumPy are saved as plain ones. Of several processes, that of
            the first.

    Returns:
        The new checkpoint: ``path/checkpoint-00000001-<checksum>.pt``, numbered on, or a folder of such a name.

    Raises:
        TypeError, ValueError: `keep` is no int, or less than 1; or something is neither tensor nor plain value, and could not
            be loaded with ``weights_only=True``: it says where that is
        OSError: it cannot be written, because the disk is full for example. The checkpoints that were there still are.

    Example:
        >>> import tempfile, torch, torchlamb
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torchlamb.Lamb(model.parameters())
        >>> folder = tempfile.mkdtemp()
        >>> saved = torchlamb.checkpoint.save(folder, model, optimizer, step=100)
        >>> torchlamb.checkpoint.load(folder, model, optimizer)
        {'step': 100}
    """
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise TypeError(f"keep must be an int >= 1, got {keep!r}")
    if keep < 1:
        raise ValueError(f"keep must be an int >= 1, got {keep!r}")
    folder = Path(path)
    name = on_first(lambda: _prepare(folder))
    saving = folder / (_SAVING + name)
    try:
        if is_distributed():
            checksum = shards.write(saving, model, optimizer, plain(more))
        else:
            state_dict = optimizer.state_dict()
            state_dict = {**state_dict, "param_groups": plain(state_dict["param_groups"])}
            content = {"model": model.state_dict(), "optimizer": state_dict, "more": plain(more)}
            checksum = files.write(saving, {"class": type(optimizer).__name__, **content})
        return on_first(lambda: _publish(saving, folder / f"{name}-{checksum}{'' if saving.is_dir() else '.pt'}", keep))
    except BaseException:
        if not is_distributed() or torch.distributed.get_rank() == 0:
            files.remove(saving)
        raise


def load(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load the newest good checkpoint of a folder, or one checkpoint, into a model and its optimizer.

    Whatever is damaged is passed over with a warning that names it. Files are read with ``weights_only=True``: nothing in them
    is executed. The metadata of torch.distributed.checkpoint are a pickle: load its folders only if you trust who wrote them.

    Where torch.distributed is initialized, all processes must call this. What several have saved, any number can load, whatever
    the shards are, and one without torch.distributed.

    Where optimizer and checkpoint have the same names of parameters, each once in its group, names tell which is which; else
    positions do, with a warning if names differ. What wrappers put around names (``module.``, ``_orig_mod.``) does not matter.

    Args:
        path: the folder that was given to `save`, or one checkpoint in it
        model: of the same shapes
        optimizer: of its parameters, in the same order unless they have names

    Returns:
        What was given to `save` as `more`.

    Raises:
        FileNotFoundError: there is no checkpoint
        RuntimeError: the one that was asked for, or every one, is damaged, or is none
        ValueError, TypeError: it is of another model or optimizer; nothing has changed then

    Example:
        >>> import tempfile, torch, torchlamb
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torchlamb.Lamb(model.parameters())
        >>> folder = tempfile.mkdtemp()
        >>> saved = torchlamb.checkpoint.save(folder, model, optimizer, step=7)
        >>> torchlamb.checkpoint.load(saved, model, optimizer)["step"]
        7
    """
    source, damaged = on_first(lambda: _find(Path(path)))
    for what in damaged:
        warnings.warn(f"{what}; taking the next older checkpoint", stacklevel=2)
    if source.is_dir():
        return shards.read(source, model, optimizer)
    saved = files.read(source, "class", "model", "optimizer", "more")
    if any(is_dtensor(p) for p in model.parameters()):
        raise ValueError(f"{source} was saved by one process; load it before the model is sharded")
    files.check_class(saved["class"], optimizer, source)
    weights = files.as_named(saved["model"], model.state_dict())
    files.check_model({k: getattr(v, "shape", None) for k, v in weights.items()}, model.state_dict(), source)
    optimizer.load_state_dict(files.as_ordered(saved["optimizer"], optimizer))
    model.load_state_dict(weights)
    return saved["more"]  # type: ignore[no-any-return]


def newest(path: str | os.PathLike[str]) -> Path | None:
    """Return the newest good checkpoint of a folder; None where there is none, or no folder. Of one process."""
    try:
        return _find(Path(path))[0]
    except (FileNotFoundError, RuntimeError):
        return None


def more_of(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what was given to `save` as `more`, of one checkpoint; of one process.

    Raises:
        RuntimeError: it is none
    """
    source = Path(checkpoint)
    more: dict[str, Any] = files.read(source / files.PLAIN if source.is_dir() else source, "more", mmap=True)["more"]
    return more


# The folder.


def _prepare(folder: Path) -> str:
    """Make the folder, remove what processes that died have left, and return the next name without its checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(_SAVING + "*"):
        files.remove(left)
    return f"checkpoint-{1 + max((number for number, _ in _checkpoints(folder)), default=0):08d}"


def _publish(saving: Path, final: Path, keep: int) -> Path:
    with files.writing(saving):
        saving.rename(final)
        sync(final.parent)
    for _, old in _checkpoints(final.parent)[keep:]:
        files.remove(old)
    return final


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints of a folder with their numbers, newest first."""
    matches = [(_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()]
    return sorted(((int(match[1]), entry) for match, entry in matches if match), reverse=True)


def _find(path: Path) -> tuple[Path, list[str]]:
    """Return a good checkpoint, and what is wrong with those that are newer."""
    is_one = path.is_file() or _NAME.fullmatch(path.name) is not None
    candidates = [path] if is_one else [entry for _, entry in _checkpoints(path)] if path.is_dir() else []
    if not candidates or not candidates[0].exists():
        raise FileNotFoundError(f"{path} has no checkpoint; give the folder that was given to save()")
    damaged: list[str] = []
    for candidate in candidates:
        reason = _why_damaged(candidate)
        if reason is None:
            return candidate, damaged
        damaged.append(f"{candidate} {reason}")
    raise RuntimeError(f"no checkpoint can be loaded: {'; '.join(damaged)}")


def _why_damaged(checkpoint: Path) -> str | None:
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        return "has no checksum in its name, which save() gives it"
    try:
        if checkpoint.is_file():
            return (
                None
                if files.checksum(checkpoint)[: files.DIGITS] == match[2]
                else "is damaged: its checksum is not that of its name"
            )
        sums = (checkpoint / files.SUMS).read_bytes()
        if hashlib.sha256(sums).hexdigest()[: files.DIGITS] != match[2]:
            return f"is damaged: the checksum of its {files.SUMS} is not that of its name"
        wanted = {name: digest for digest, name in (line.split("  ", 1) for line in sums.decode().splitlines())}
        for name, digest in wanted.items():
            if files.checksum(checkpoint / name) != digest:
                return f"is damaged: the checksum of its {name} is not that of its {files.SUMS}"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"is damaged: it has no {Path(str(error.filename)).name}"
    except OSError as error:
        return f"cannot be read ({error})"
    return None
