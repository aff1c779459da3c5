"""Files that are whole or not there at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, replace: bool) -> None:
    """Write a file under another name, sync it, and give it its name, which survives a crash at any time.

    Raises:
        FileExistsError: the file is there and is not to be replaced
        OSError: it cannot be written. Nothing is left then, and what was there before stays; after a replacement, only that
            the new name survives a crash is not certain
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # a temporary file is its owner's alone
        if replace:
            os.replace(name, path)
        else:
            _name(name, path)
    finally:
        if os.path.exists(name):
            os.unlink(name)
    try:
        sync(path.parent)
    except OSError:
        if not replace:
            path.unlink()
        raise


def _name(name: str, path: Path) -> None:
    """Give a file a name that no other has."""
    try:
        os.link(name, path)  # unlike a rename, never over what has come there meanwhile
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(f"{path} exists; remove it, or choose another name") from None
        os.rename(name, path)


def sync(path: Path) -> None:
    """Make what the system holds back of a file, or of the names in a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
