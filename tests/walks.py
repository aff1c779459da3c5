"""Walks of the float64 reference over the tensors of the case table, taken once for all forms that are compared."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from cases import DEFAULTS, INTERPRETED, SEED, make_params, set_grads, to_numpy
from reference import Reference
from torch import Tensor

STEPS = 10 if INTERPRETED else 20  # from step 8 on, gradients have another layout


class Walk(NamedTuple):
    grads: list[dict[str, Tensor | None]]  # by step and name
    reference: Reference  # at the end


def start(layout: str, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(SEED)
    return make_params(layout, dtype, options)


@functools.lru_cache(maxsize=2)
def _walk(layout: str, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> Walk:
    params = start(layout, dtype, dict(options))
    values = {**DEFAULTS, **dict(options)}
    values["lr"] = float(values["lr"])
    reference = Reference([to_numpy(p) for p in params.values()], [values] * len(params))
    grads = []
    for step in range(STEPS):
        set_grads(params, step)
        grads.append({name: p.grad for name, p in params.items()})
        assert reference.step([None if p.grad is None else to_numpy(p.grad) for p in params.values()])
    return Walk(grads, reference)


def walk(layout: str, dtype: torch.dtype, options: dict[str, Any]) -> Walk:
    """The walk from the parameters of `start`. Gradients are to be copied before anybody steps with them."""
    return _walk(layout, dtype, tuple(options.items()))
