"""Converts files: `python -m torchlamb.convert OLD NEW --from apex`.

OLD is read with `weights_only=True`, and NEW is there only when it is whole.
"""

from __future__ import annotations

import argparse
import ast
import pickle
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
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
    parser.add_argument("--key", help="the entry of OLD that is the optimizer's state dict; the others are kept as they are")
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
    content = {".ckpt": _read_ckpt, ".npz": _read_npz}.get(old.suffix, _read)(old)
    inner = content
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f"{old} has no entry {key!r}: {_entries(content)}")
        inner = content[key]
    elif isinstance(content, Mapping) and "param_groups" not in content:
        inside = [name for name, entry in content.items() if isinstance(entry, Mapping) and "param_groups" in entry]
        if inside:
            raise ValueError(
                f"{old} has no optimizer's state dict of its own, and one in {inside[0]!r}: give --key {inside[0]}"
            )
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            converted = _converted(inner, source, arguments)
    except ValueError as error:
        raise ValueError(f"{old}: {error}") from error
    for note in notes:
        sys.stderr.write(f"{note.message}\n")
    whole = converted if key is None else {**content, key: converted}
    write_whole(new, lambda file: torch.save(whole, file), replace=False)


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
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is truncated, or no file of torch.save: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} has more in it than tensors and plain values, or is no file of torch.save. If you trust who wrote it, "
            "load it with weights_only=False, and save what torchlamb.convert.to_lamb makes of the optimizer's state dict"
        ) from error


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
    except ValueError as error:
        raise ValueError(f"{path} is truncated, or no checkpoint of MindSpore: {error}") from error


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError(f"{path} is read by numpy, which is not installed: pip install numpy") from error
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is truncated, or no file of numpy.savez: {error}") from error


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--argument must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(f"--argument {name} must be a number, True or False, got {value!r}") from None


def _entries(content: Any) -> str:
    return f"it has {list(content)[:6]}" if isinstance(content, Mapping) else f"it is a {type(content).__name__}"


if __name__ == "__main__":
    main()
