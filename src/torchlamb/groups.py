"""Sorting a model's parameters into groups with and without weight decay."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

Group = dict[str, Any]

_NORMALISATION = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(
    model: nn.Module, weight_decay: float, adapt_excluded: bool = True, no_decay: Iterable[str] | None = None
) -> list[Group]:
    """Sort a model's parameters into one group that decays and one that does not.

    Biases and the parameters of normalisation layers do not decay. Which those are is read from the modules: a parameter whose
    own name contains "bias", and every parameter of a torch normalisation layer or of a module whose class has "norm" in its
    name and only vectors as parameters. With `no_decay`, the names decide alone.

    Args:
        model: any module; frozen parameters are included, so that they can be unfrozen later
        weight_decay: of the group that decays
        adapt_excluded: whether the parameters without decay are adapted by layer, as the paper's algorithm says; False trains
            them with plain Adam, as the paper's own code does, and is worth trying where training diverges (default: True)
        no_decay: regular expressions, searched in the full parameter names, whose matches do not decay (default: None)

    Returns:
        At most two dicts for the first argument of `torchlamb.Lamb`, without empty ones. ``"params"`` holds (name, parameter)
        pairs in the model's order, tied parameters once, under their first name.

    Raises:
        TypeError: `model` is no module, or `no_decay` is a string: an iterable of strings was meant
        ValueError: the model has no parameters, or a pattern is no regular expression or matches none

    Example:
        >>> import torch, torchlamb
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.LayerNorm(2))
        >>> groups = torchlamb.param_groups(model, weight_decay=0.01)
        >>> [(group["weight_decay"], [name for name, _ in group["params"]]) for group in groups]
        [(0.01, ['0.weight']), (0.0, ['0.bias', '1.weight', '1.bias'])]
        >>> optimizer = torchlamb.Lamb(groups, lr=1e-3)
    """
    if isinstance(no_decay, str):
        raise TypeError(f"no_decay must be an iterable of patterns, got the string {no_decay!r}; write [{no_decay!r}]")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; pass the model, not its parameters")
    named = list(model.named_parameters())
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameters to sort")
    if no_decay is None:
        excluded = _biases_and_normalisation(model)
    else:
        patterns = [_compiled(pattern) for pattern in no_decay]
        excluded = {id(p) for name, p in named if any(pattern.search(name) for pattern in patterns)}
        for pattern in patterns:
            if not any(pattern.search(name) for name, _ in named):
                raise ValueError(
                    f"no_decay pattern {pattern.pattern!r} matches no parameter; the first is called {named[0][0]!r}"
                )
    decayed: Group = {"params": [pair for pair in named if id(pair[1]) not in excluded], "weight_decay": weight_decay}
    undecayed: Group = {"params": [pair for pair in named if id(pair[1]) in excluded], "weight_decay": 0.0}
    if not adapt_excluded:
        undecayed["layer_adaptation"] = False
    return [group for group in (decayed, undecayed) if group["params"]]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no_decay pattern {pattern!r} is no regular expression: {error}") from error


def _biases_and_normalisation(model: nn.Module) -> set[int]:
    excluded: set[int] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        norm = is_normalisation(module)
        excluded.update(id(p) for name, p in own.items() if norm or "bias" in name)
    return excluded


def is_normalisation(module: nn.Module) -> bool:
    """Return whether it is a torch normalisation layer, or of a class with "norm" in its name and has only vectors itself."""
    vectors_only = all(p.dim() <= 1 for p in module.parameters(recurse=False))
    return isinstance(module, _NORMALISATION) or (vectors_only and "norm" in type(module).__name__.lower())
