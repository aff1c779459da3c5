"""A small network and its data, and a training loop in plain PyTorch, which each integration must end like."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import torchlamb

LAMB = {"lr": 0.02, "weight_decay": 0.01}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def make_batches(count: int = 12, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 8, generator=generator), torch.randint(0, 3, (size,), generator=generator)) for _ in range(count)
    ]


def train(model: nn.Module, batches, optimizer=None, **options) -> nn.Module:
    """The loop of PyTorch's tutorials, on a copy of the model."""
    model = copy.deepcopy(model)
    optimizer = torchlamb.Lamb(model.parameters(), **{**LAMB, **options})
    for x, y in batches:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def assert_same(model: nn.Module, wanted: nn.Module, tolerance: float = 0.0) -> None:
    """Compare bitwise, or to a share of each parameter's norm."""
    pairs = dict(wanted.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert names == list(pairs)
    for name, p in model.named_parameters():
        error = float((p - pairs[name]).detach().norm() / pairs[name].detach().norm().clamp(min=1e-3))
        assert error <= tolerance, f"{name} is off by {error:.1e} of its norm"


def run_processes(script: Path, world: int, *arguments: str, limit: int = 900) -> None:
    """Run a script in that many processes, which a time-out ends, and raise with what a failed one wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    processes = []
    try:
        for rank in range(world):
            environment = {**shared, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(script), *arguments],
                    env={**os.environ, **{key: str(value) for key, value in environment.items()}},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [process.communicate(timeout=limit)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
