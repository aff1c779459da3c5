"""Parameters, gradients and schedules for the tests of `torchlamb.mindspore.nn.Lamb`."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from cases import DEFAULTS
from reference import Reference
from torch import Tensor

from torchlamb.mindspore import nn

SHAPES = {"conv.weight": (4, 3, 2, 2), "fc.weight": (5, 4), "fc.bias": (5,), "norm.gamma": (4,), "norm.beta": (4,)}


class Ramp(nn.LearningRateSchedule):
    """A user's schedule, with what users' schedules compute with."""

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def construct(self, global_step: Any) -> Any:
        return torch.tensor(self.slope) * (global_step + 1)


class Calls(nn.LearningRateSchedule):
    """Returns what it was made with, step by step, and keeps the steps it was asked for."""

    def __init__(self, *values: Any) -> None:
        self.values, self.steps = values, []

    def construct(self, global_step: Any) -> Any:
        self.steps.append(global_step)
        return self.values[global_step]


def make_params(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.NamedParameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.NamedParameter(name, torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)))
        for name, shape in SHAPES.items()
    ]


def make_grads(params: list[nn.NamedParameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for _, p in params]


def set_grads(params: list[nn.NamedParameter], step: int) -> None:
    for (_, p), grad in zip(params, make_grads(params, step), strict=True):
        p.grad = grad


def run(optimizer: torch.optim.Optimizer, params: list[nn.NamedParameter], steps: range | int = 3) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        set_grads(params, step)
        optimizer.step()


def assert_follows_reference(
    optimizer: nn.Lamb, params: list[nn.NamedParameter], options: list[dict[str, Any]], lrs: list[list[float]]
) -> None:
    """Step with random gradients and compare with the reference; `options` and each row of `lrs` are per parameter."""
    reference = Reference([p.detach().numpy() for _, p in params], [{**DEFAULTS, **o} for o in options])
    for step, row in enumerate(lrs):
        set_grads(params, step)
        optimizer.step()
        for o, lr in zip(reference.options, row, strict=True):
            o["lr"] = lr
        reference.step([p.grad.numpy() for _, p in params])
    for (name, p), wanted, path in zip(params, reference.params, reference.paths, strict=True):
        error = np.abs(p.detach().numpy() - wanted)
        assert (error <= 1e-12 * path + 2.0**-52 * np.abs(wanted) * len(lrs)).all(), name


def snapshot(optimizer: nn.Lamb) -> Any:
    state = copy.deepcopy(optimizer.state_dict())
    return state, [p.detach().clone() for _, p in optimizer.parameters], [p.grad for _, p in optimizer.parameters]


def assert_unchanged(optimizer: nn.Lamb, before: Any) -> None:
    state, params, grads = before
    now = optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"]
    assert now["global_step"] == state["global_step"]
    assert now["state"].keys() == state["state"].keys()
    for key, entry in now["state"].items():
        assert all(torch.equal(value, state["state"][key][name]) for name, value in entry.items())
    assert all(torch.equal(p, old) for (_, p), old in zip(optimizer.parameters, params, strict=True))
    assert all(p.grad is grad for (_, p), grad in zip(optimizer.parameters, grads, strict=True))
