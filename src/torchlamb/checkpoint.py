"""Checkpoints of a run in one folder: whole or not there at all, checksummed, and the last few of them kept.

One process writes files that `torch.load` reads; several write folders of torch.distributed.checkpoint. This room knows models
and optimizers by their state dicts only, and serves any optimizer.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchlamb.files import sync
from torchlamb.sharding import is_dtensor
from torchlamb.state import NUMBERS

T = TypeVar("T")

_SUMS = "SHA256SUMS"  # of a folder's other files, as `sha256sum` writes and checks them
_PLAIN = "plain.pt"  # of a folder: what is no shard
_SAVING = ".saving-"  # what is not complete is called this
_DIGITS = 16  # of the checksum that the name has: of the file, or of a folder's SHA256SUMS
_NAME = re.compile(rf"checkpoint-(\d{{8,}})-([0-9a-f]{{{_DIGITS}}})(\.pt)?")


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
            of a scheduler or `torch.get_rng_state()`. Of several processes, that of the first.

    Returns:
        The new checkpoint: ``path/checkpoint-00000001-<checksum>.pt``, numbered on, or a folder of such a name.

    Raises:
        TypeError, ValueError: `keep` is no int, or less than 1; or something is neither tensor nor plain value, and could not
            be loaded with ``weights_only=True``
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
    name = _on_first(lambda: _prepare(folder))
    saving = folder / (_SAVING + name)
    try:
        if _is_distributed():
            checksum = _write_shards(saving, model, optimizer, more)
        else:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "more": more}
            checksum = _write(saving, {"class": type(optimizer).__name__, **content})
        return _on_first(lambda: _publish(saving, folder / f"{name}-{checksum}{'' if saving.is_dir() else '.pt'}", keep))
    except BaseException:
        if not _is_distributed() or torch.distributed.get_rank() == 0:
            _remove(saving)
        raise


def load(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load the newest good checkpoint of a folder, or one checkpoint, into a model and its optimizer.

    Whatever is damaged is passed over with a warning that names it. Files are read with ``weights_only=True``: nothing in them
    is executed. The metadata of torch.distributed.checkpoint are a pickle: load its folders only if you trust who wrote them.

    Where torch.distributed is initialized, all processes must call this. What several have saved, any number can load, whatever
    the shards are, and one without torch.distributed.

    Args:
        path: the folder that was given to `save`, or one checkpoint in it
        model: of the same shapes
        optimizer: of its parameters in the same order

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
    source, damaged = _on_first(lambda: _find(Path(path)))
    for what in damaged:
        warnings.warn(f"{what}; taking the next older checkpoint", stacklevel=2)
    if source.is_dir():
        return _read_shards(source, model, optimizer)
    saved = _read(source, "class", "model", "optimizer", "more")
    if any(is_dtensor(p) for p in model.parameters()):
        raise ValueError(f"{source} was saved by one process; load it before the model is sharded")
    _check_class(saved["class"], optimizer, source)
    _check_model({k: getattr(v, "shape", None) for k, v in saved["model"].items()}, model.state_dict(), source)
    optimizer.load_state_dict(saved["optimizer"])
    model.load_state_dict(saved["model"])
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
    more: dict[str, Any] = _read(source / _PLAIN if source.is_dir() else source, "more", mmap=True)["more"]
    return more


# The folder.


def _prepare(folder: Path) -> str:
    """Make the folder, remove what processes that died have left, and return the next name without its checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(_SAVING + "*"):
        _remove(left)
    return f"checkpoint-{1 + max((number for number, _ in _checkpoints(folder)), default=0):08d}"


def _publish(saving: Path, final: Path, keep: int) -> Path:
    with _writing(saving):
        saving.rename(final)
        sync(final.parent)
    for _, old in _checkpoints(final.parent)[keep:]:
        _remove(old)
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
            return None if _checksum(checkpoint)[:_DIGITS] == match[2] else "is damaged: its checksum is not that of its name"
        sums = (checkpoint / _SUMS).read_bytes()
        if hashlib.sha256(sums).hexdigest()[:_DIGITS] != match[2]:
            return f"is damaged: the checksum of its {_SUMS} is not that of its name"
        wanted = {name: digest for digest, name in (line.split("  ", 1) for line in sums.decode().splitlines())}
        for name, digest in wanted.items():
            if _checksum(checkpoint / name) != digest:
                return f"is damaged: the checksum of its {name} is not that of its {_SUMS}"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"is damaged: it has no {Path(str(error.filename)).name}"
    except OSError as error:
        return f"cannot be read ({error})"
    return None


# Files.


def _write(file: Path, content: dict[str, Any]) -> str:
    """Write a file that survives a crash of the machine, and return the checksum for its name."""
    try:
        with _writing(file), open(file, "wb") as opened:
            hashing = _Hashing(opened)
            torch.save(content, hashing)  # type: ignore[arg-type]
            opened.flush()
            os.fsync(opened.fileno())
        torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError) as error:
        raise TypeError(
            "model, optimizer and what else is saved must be of tensors, numbers, strings, lists and dicts, or it could not be "
            f"loaded again: {error}"
        ) from error
    return hashing.digest.hexdigest()[:_DIGITS]


class _Hashing(io.RawIOBase):
    """A file that computes the checksum of what is written to it."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer says the latter
        raise OSError(f"{path.parent} could not be written to ({error}); checkpoints that were there stay good") from error


def _read(file: Path, *keys: str, mmap: bool = False) -> dict[str, Any]:
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


def _check_class(saved: str, optimizer: Optimizer, source: Path) -> None:
    if saved != type(optimizer).__name__:
        raise ValueError(
            f"{source} is of {saved}, and the optimizer is {type(optimizer).__name__}; give the one that was saved, or load "
            "its state dict by hand"
        )


def _check_model(saved: Mapping[str, Any], own: Mapping[str, Any], source: Path) -> None:
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


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


# Several processes.


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _together(function: Callable[[], T]) -> list[T]:
    """Return what a function returns on every process; where it raises on one, raise that on all of them."""
    if not _is_distributed():
        return [function()]
    own: tuple[T | None, Exception | None]
    try:
        own = function(), None
    except Exception as error:
        own = None, error
    results: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(results, own)
    for _, raised in results:
        if raised is not None:
            raise raised
    return [result for result, _ in results]


def _on_first(function: Callable[[], T]) -> T:
    """Return on all processes what a function returns on the first, which alone calls it."""
    is_first = not _is_distributed() or torch.distributed.get_rank() == 0
    return _together(lambda: function() if is_first else None)[0]  # type: ignore[return-value]


def _write_shards(saving: Path, model: nn.Module, optimizer: Optimizer, more: dict[str, Any]) -> str:
    """Write a folder, each process its own files and their checksums, and return the checksum for its name.

    Not with torch's `get_optimizer_state_dict`, which takes a step of an optimizer that has no state yet, and cannot load what
    lacks the state of a parameter.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    rank, params = torch.distributed.get_rank(), _params_of(optimizer)
    weights, weights_plain = _split(get_model_state_dict(model))
    state_dict = optimizer.state_dict()
    state, state_plain = _split({f"{i}.{key}": v for i, of in state_dict.pop("state").items() for key, v in of.items()})
    kinds = _agreed({key: (tuple(t.shape), t.dtype) for key, t in state.items()}, [tuple(p.shape) for p in params])
    # Processes that had no gradient of a parameter may lack its state.
    state = {key: state[key] if key in state else _empty(key, kind, params) for key, kind in kinds.items()}
    with _writing(saving):
        try:
            save_shards({"model": weights, "state": state}, storage_writer=FileSystemWriter(saving))
        except CheckpointException as error:  # on all processes
            raise OSError(str(error)) from error
    plain = {
        "class": type(optimizer).__name__,
        "model": {"shapes": {name: tuple(t.shape) for name, t in weights.items()}, "plain": weights_plain},
        "optimizer": {"kinds": kinds, "plain": state_plain, "rest": state_dict},
        "more": more,
    }
    _on_first(lambda: _write(saving / _PLAIN, plain))
    prefixes = (f"__{rank}_", ".metadata", _PLAIN) if rank == 0 else (f"__{rank}_",)
    files = _together(lambda: sorted(file for file in saving.iterdir() if file.name.startswith(prefixes)))[rank]
    lines = _together(lambda: [f"{_checksum(file)}  {file.name}" for file in files])
    sums = "".join(f"{line}\n" for of_process in lines for line in of_process)
    _on_first(lambda: _write_sums(saving / _SUMS, sums))
    return hashlib.sha256(sums.encode()).hexdigest()[:_DIGITS]


def _write_sums(file: Path, sums: str) -> None:
    with _writing(file):
        file.write_text(sums)
        sync(file)
        sync(file.parent)


def _read_shards(source: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load a folder into new tensors first: what does not fit changes nothing."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    plain = _together(lambda: _read(source / _PLAIN, "class", "model", "optimizer", "more"))[0]
    saved, params = plain["optimizer"], _params_of(optimizer)
    own, _ = _split(get_model_state_dict(model))
    _check_class(plain["class"], optimizer, source)
    _check_model(plain["model"]["shapes"], own, source)
    counts = [[len(group["params"]) for group in groups] for groups in (saved["rest"]["param_groups"], optimizer.param_groups)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{source} has groups of {counts[0]} parameters, and the optimizer of {counts[1]}; give what was saved"
        )
    weights = {name: torch.empty_like(t) for name, t in own.items()}
    state = {key: _empty(key, kind, params) for key, kind in saved["kinds"].items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # that this is one process, is meant
        load_shards({"model": weights, "state": state}, storage_reader=FileSystemReader(source))
    by_param: dict[int, dict[str, Any]] = {}
    for key, value in {**state, **saved["plain"]}.items():
        index, _, name = key.partition(".")
        by_param.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**saved["rest"], "state": by_param})
    set_model_state_dict(model, {**weights, **plain["model"]["plain"]})
    return plain["more"]  # type: ignore[no-any-return]


def _params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a state dict, and its plain values."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in state.items() if key not in tensors}


def _agreed(kinds: dict[str, Any], shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Return the shape and dtype of every state tensor that any process has.

    Raises:
        ValueError: processes have other parameters, as in pipelines
    """
    of_processes = _together(lambda: (kinds, shapes))
    if any(others != shapes for _, others in of_processes):
        raise ValueError("the optimizers of the processes have other parameters; give each its own folder and process group")
    return {key: kind for own, _ in of_processes for key, kind in own.items()}


def _empty(key: str, kind: tuple[tuple[int, ...], torch.dtype], params: list[Tensor]) -> Tensor:
    """Return zeros for a state tensor, sharded as its parameter is if it has its shape."""
    index, _, name = key.partition(".")
    (shape, dtype), param = kind, params[int(index)]
    if shape == tuple(param.shape) and name not in NUMBERS:
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype)
