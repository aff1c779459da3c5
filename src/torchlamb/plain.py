"""Plain values: what a file that is read with ``weights_only=True`` may hold beside tensors.

Schedulers and configurations bring numbers of NumPy and containers of their own. This room knows neither of them by name, nor
options or state dicts.
"""

from __future__ import annotations

import copy
import enum
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_LEAVES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def plain(value: Any) -> Any:
    """Return a value with all in it that has a plain counterpart replaced by that; itself where there is nothing to replace.

    A number of NumPy, or an array of one, becomes a bool, int, float, complex or str; so does what is derived from those, such
    as an enum's member. In dicts, lists and tuples that is done to what is in them, and other sequences become lists.
    """
    kind = type(value)
    if kind in _LEAVES or isinstance(value, (Tensor, torch.dtype)):
        return value
    if isinstance(value, enum.Enum):
        return plain(value.value) if isinstance(value, (int, float, str)) else value
    if hasattr(value, "dtype") and hasattr(value, "item"):
        return value.item() if getattr(value, "ndim", 0) == 0 else value
    bases: tuple[Callable[[Any], Any], ...] = (bool, int, float, complex, str, bytes)
    for base in bases:
        if isinstance(value, base):  # type: ignore[arg-type]
            return base(value)
    if isinstance(value, dict):
        return _dict(value)
    if kind in (list, tuple):
        entries = [plain(entry) for entry in value]
        return kind(entries) if any(new is not old for new, old in zip(entries, value, strict=True)) else value
    if isinstance(value, tuple):  # a named one
        return value
    if hasattr(value, "__len__") and hasattr(value, "__getitem__") and not callable(value):
        return {plain(k): plain(value[k]) for k in value} if isinstance(value, Mapping) else _list(value)
    return value


def _dict(value: dict[Any, Any]) -> dict[Any, Any]:
    entries = {plain(key): plain(entry) for key, entry in value.items()}
    if all(new is old for new, old in zip(entries.values(), value.values(), strict=False)) and list(entries) == list(value):
        return value if all(type(new) is type(old) for new, old in zip(entries, value, strict=True)) else entries
    if type(value) is dict:
        return entries
    changed = copy.copy(value)  # an OrderedDict, a Counter, a defaultdict
    changed.clear()
    changed.update(entries)
    return changed


def _list(value: Any) -> Any:
    try:
        return [plain(value[i]) for i in range(len(value))]
    except (TypeError, KeyError, IndexError):
        return value


def first_not_plain(content: Any) -> str | None:
    """Return where in dicts and lists something is that could not be loaded with ``weights_only=True``, and what it is."""
    return next((f"{place} is a {type(value).__name__}" for place, value in _leaves(content, "") if not _loads(value)), None)


def _leaves(content: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _leaves(key, f"a key of {place or 'it'}") if type(key) not in _LEAVES else ()
            yield from _leaves(value, f"{place}[{key!r}]" if place else str(key))
    elif type(content) in (list, tuple):
        for i, value in enumerate(content):
            yield from _leaves(value, f"{place}[{i}]")
    elif type(content) not in _LEAVES and type(content) not in (Tensor, torch.nn.Parameter):
        yield place, content


def _loads(value: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # of any kind: it is asked of whatever a user has
        return False
    return True
