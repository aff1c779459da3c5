"""Converts files: `python -m torchlamb.convert OLD NEW --from apex`.

OLD is read with `weights_only=True`, and NEW is there only when it is whole.
"""

from __future__ import annotations

import argparse
import ast
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchlamb.convert import SOURCES, from_mindspore, to_adamw, to_lamb
from torchlamb.files import write_whole

_OURS, _MINDSPORE = "torchlamb", "mindspore"


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(
        prog="python -m torchlamb.convert", description="Convert an optimizer's state to torchlamb.Lamb's."
    )
    parser.add_argument(
        "old",
        type=Path,
        help="a file of torch.save; of MindSpore a .npz with its arrays by name, or its .ckpt where it is installed",
    )
    parser.add_argument("new", type=Path, help="the file to write; it must not exist")
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        choices=[*SOURCES, _MINDSPORE, _OURS],
        help=f"whose state it is; {_OURS} is converted to torch.optim.AdamW's",
    )
    parser.add_argument(
        "--key",
        help="the entry of OLD that is the optimizer's state dict, as optimizer or optimizer_states.0; the others are kept",
    )
    parser.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what its constructor was given and its state dict does not hold, such as use_nvlamb=True",
    )
    options = parser.parse_args(argv)
    try:
        convert_file(options.old, options.new, options.source, options.key, dict(map(_argument, options.argument)))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"{parser.prog}: {error}")


def convert_file(old: Path, new: Path, source: str, key: str | None, arguments: Mapping[str, Any]) -> None:
    """Read, convert and write.

    Raises:
        ValueError: the file is truncated, foreign, or of another optimizer
        OSError: it cannot be read or written
        ImportError: a .ckpt, and MindSpore is not installed
    """
    if new.exists():
        raise FileExistsError(f"{new} exists; remove it, or choose another name")
    readers = {".ckpt": _read_ckpt, ".npz": _read_npz} if source == _MINDSPORE else {}
    content = readers.get(old.suffix, _read)(old)
    inner = _entry(content, [] if key is None else key.split("."), old)
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            converted = _converted(inner, source, arguments)
    except ValueError as error:
        raise ValueError(f"{old}: {error}") from error
    for note in notes:
        sys.stderr.write(f"{note.message}\n")
    whole = converted if key is None else _replaced(content, key.split("."), converted)
    write_whole(new, lambda file: torch.save(whole, file), replace=False)


def _entry(content: Any, path: Sequence[str], old: Path) -> Any:
    """Return the entry of a checkpoint that the path leads to, or say where there are state dicts."""
    inner = content
    for name in path:
        if isinstance(inner, Mapping) and "fp32_groups" in inner:
            raise ValueError(f"{name!r} of {old} lies beside fp32_groups, the masters: leave --key out, or its last part")
        if isinstance(inner, Mapping) and name in inner:
            inner = inner[name]
        elif isinstance(inner, (list, tuple)) and name.isdigit() and int(name) < len(inner):
            inner = inner[int(name)]
        else:
            raise ValueError(f"{old} has no entry {'.'.join(path)!r}: {_entries(inner)}")
    if not _is_state_dict(inner):
        inside = list(_state_dicts(inner))
        if inside:
            start = "".join(f"{name}." for name in path)
            raise ValueError(f"{old} has an optimizer's state dict in {start}{inside[0]}: give --key {start}{inside[0]}")
    return inner


def _is_state_dict(content: Any) -> bool:
    """Return whether it is an optimizer's, or DeepSpeed's wrapper with one and the masters."""
    return isinstance(content, Mapping) and (
        "param_groups" in content or {"optimizer_state_dict", "fp32_groups"} <= content.keys()
    )


def _state_dicts(content: Any) -> Iterator[str]:
    """Yield where in a checkpoint there are some, up to two levels down."""
    for name, entry in content.items() if isinstance(content, Mapping) else ():
        if _is_state_dict(entry):
            yield str(name)
        elif isinstance(entry, (list, tuple)):
            yield from (f"{name}.{i}" for i, one in enumerate(entry) if _is_state_dict(one))


def _replaced(content: Any, path: Sequence[str], new: Any) -> Any:
    """Return the checkpoint with another entry there."""
    if not path:
        return new
    if isinstance(content, Mapping):
        return {**content, path[0]: _replaced(content[path[0]], path[1:], new)}
    return [_replaced(one, path[1:], new) if i == int(path[0]) else one for i, one in enumerate(content)]


def _converted(inner: Any, source: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    if source in (_MINDSPORE, _OURS):
        if arguments:
            raise ValueError(f"--argument is of no use with --from {source}")
        return from_mindspore(inner) if source == _MINDSPORE else to_adamw(inner)
    return to_lamb(inner, source, arguments)


def _read(path: Path) -> Any:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} has more in it than tensors and plain values, or is no file of torch.save. If you trust who wrote it, "
            "load it with weights_only=False, and save what torchlamb.convert.to_lamb makes of the optimizer's state dict"
        ) from error
    except Exception as error:  # of damaged files, of any kind
        raise ValueError(f"{path} is truncated, or no file of torch.save: {error}") from error


def _read_ckpt(path: Path) -> Any:
    try:
        from mindspore import load_checkpoint  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(
            f"{path} is read by mindspore, which is not installed; where it is, make a .npz and convert that: "
            "numpy.savez(NEW, **{name: p.asnumpy() for name, p in mindspore.load_checkpoint(OLD).items()})"
        ) from error
    try:
        return load_checkpoint(str(path))
    except Exception as error:  # of damaged files, of any kind
        raise ValueError(f"{path} is truncated, or no checkpoint of MindSpore: {error}") from error


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError(f"{path} is read by numpy, which is not installed: pip install numpy") from error
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # of damaged files, of any kind
        raise ValueError(f"{path} is truncated, or no file of numpy.savez: {error}") from error


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--argument must be NAME=VALUE, got {text!r}")
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        parsed = value
    if parsed is not None and not isinstance(parsed, (bool, int, float)):
        raise ValueError(f"--argument {name} must be a number, True, False or None, got {value!r}")
    return name, parsed


def _entries(content: Any) -> str:
    return f"it has {list(content)[:6]}" if isinstance(content, Mapping) else f"it is a {type(content).__name__}"


if __name__ == "__main__":
    main()
