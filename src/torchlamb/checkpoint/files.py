"""Files of a checkpoint: written so that they survive a crash, checksummed, read without executing anything in them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchlamb.names import bare, by_name
from torchlamb.options import warn_caller
from torchlamb.plain import first_not_plain

SUMS = "SHA256SUMS"  # of a folder's other files, as `sha256sum` writes and checks them
PLAIN = "plain.pt"  # of a folder: what is no shard
DIGITS = 16  # of the checksum that the name has: of the file, or of a folder's SHA256SUMS


def write(file: Path, content: dict[str, Any]) -> str:
    """Write a file that survives a crash of the machine, and return the checksum for its name."""
    try:
        with writing(file), open(file, "wb") as opened:
            hashing = _Hashing(opened)
            torch.save(content, hashing)  # type: ignore[arg-type]
            opened.flush()
            os.fsync(opened.fileno())
        torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            "model, optimizer and what else is saved must be of tensors, numbers, strings, lists and dicts, or it could not be "
            f"loaded again: {first_not_plain(content) or error}"
        ) from error
    return hashing.digest.hexdigest()[:DIGITS]


class _Hashing(io.RawIOBase):
    """A file that computes the checksum of what is written to it."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of what cannot be written which folder it is in, and that nothing is lost."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer says the latter
        raise OSError(f"{path.parent} could not be written to ({error}); checkpoints that were there stay good") from error


def read(file: Path, *keys: str, mmap: bool = False) -> dict[str, Any]:
    """Return what a file has, none of which is executed."""
    try:
        if not zipfile.is_zipfile(file):
            raise RuntimeError("it is not of torch.save()")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise RuntimeError(f"{file} is no checkpoint of save(), and nothing in it was executed: {error}") from error
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise RuntimeError(f"{file} is no checkpoint of save(): it has not all of {', '.join(keys)}")
    return content


def check_class(saved: str, optimizer: Optimizer, source: Path) -> None:
    """Raise ValueError if another class of optimizer was saved."""
    if saved != type(optimizer).__name__:
        raise ValueError(
            f"{source} is of {saved}, and the optimizer is {type(optimizer).__name__}; give the one that was saved, or load "
            "its state dict by hand"
        )


def as_ordered(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict in the order of its parameters, as far as names tell; warn where they differ."""
    groups, own = saved["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
        return saved  # which the optimizer refuses
    ordered, disagreement = by_name(groups, own)
    if disagreement is not None:
        warn_caller(disagreement)
    return {**saved, "param_groups": ordered}


def as_named(saved: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a model's state dict with the names that the model has, where only what wrappers put around them differs."""
    names = {bare(name): name for name in own}
    bares = {bare(name) for name in saved}
    if saved.keys() == own.keys() or bares != names.keys() or len(bares) != len(saved) or len(names) != len(own):
        return saved
    return {names[bare(name)]: value for name, value in saved.items()}


def check_model(saved: Mapping[str, Any], own: Mapping[str, Any], source: Path) -> None:
    """Raise ValueError for the first difference of names and shapes: torch would load half of it before it raises."""
    for name, value in own.items():
        if name not in saved:
            raise ValueError(f"{source} has no {name!r}, as the model has; give the model that was saved")
        if isinstance(value, Tensor) and tuple(saved[name] or ()) != tuple(value.shape):
            raise ValueError(
                f"{name!r} has shape {tuple(saved[name] or ())} in {source}, and {tuple(value.shape)} in the model; give the "
                "model that was saved"
            )
    for name in saved:
        if name not in own:
            raise ValueError(f"{source} has {name!r}, which the model has not; give the model that was saved")


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that can be done."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
