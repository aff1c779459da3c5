"""Which parameter of a state dict is which parameter of an optimizer, where both have names.

This room knows parameter groups as dicts, and of them nothing but names and keys; it serves any optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

# What wrappers put before a model's own names, and what they put between them.
_BEFORE = re.compile(r"^(module\.)+")
_BETWEEN = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def bare(name: Any) -> str:
    """Return a parameter's name without what DistributedDataParallel, torch.compile and other wrappers put around it."""
    return _BEFORE.sub("", _BETWEEN.sub("", str(name)))


def by_name(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """Return a state dict's groups in the order of an optimizer's parameters, and what is said where that was not possible.

    Where both sides have names that are unique within the group, and the same ones, whatever wrappers put around them, the keys
    in "params" are sorted by name. Everywhere else positions tell which is which, and the first name that differs is told. The
    names that stay are the optimizer's, if it has some.

    Args:
        saved: of the state dict
        own: of the optimizer, as many, each of the same length; neither is changed
    """
    groups, odd = [], None
    for i, (group, mine) in enumerate(zip(saved, own, strict=True)):
        theirs, ours, keys = group.get("param_names"), mine.get("param_names"), list(group["params"])
        if theirs is not None and ours is not None:
            order = _order(theirs, ours, len(keys))
            if order is not None:
                keys = [keys[place] for place in order]
            else:
                odd = odd or _disagreement(theirs, ours, i)
        names = theirs if ours is None and theirs is not None and len(theirs) == len(keys) else ours
        rest = {name: value for name, value in group.items() if name != "param_names"}
        groups.append({**rest, "params": keys, **({} if names is None else {"param_names": list(names)})})
    return groups, odd


def _order(theirs: Sequence[Any], ours: Sequence[Any], count: int) -> list[int] | None:
    """Return where each of our names is among theirs; None where names do not tell."""
    for key in (str, bare):
        there, here = [key(name) for name in theirs], [key(name) for name in ours]
        if len(there) == len(here) == len(set(there)) == len(set(here)) == count and set(there) == set(here):
            places = {name: place for place, name in enumerate(there)}
            return [places[name] for name in here]
    return None


def _disagreement(theirs: Sequence[Any], ours: Sequence[Any], i: int) -> str | None:
    for place, (there, here) in enumerate(zip_longest(theirs, ours)):
        if there is None or here is None or bare(there) != bare(here):
            return (
                f"parameters are told by their position, because their names are not the same ones, each once: parameter "
                f"{place} of group {i} is {here!r} here and {there!r} in what is loaded; see that it is the same parameter"
            )
    return None
