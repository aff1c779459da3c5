"""Ways to store parameters and moments, and a model in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LOW = (BF16, FP16)
STORAGE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "masters": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True},
    "bf16-state": {"state_dtype": BF16},
    "fp32-state": {"state_dtype": FP32},
    "masters-bf16-state": {"master_weights": True, "state_dtype": BF16},
    "stochastic-bf16-state": {"stochastic_rounding": True, "state_dtype": BF16},
}


def bf16_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2)).to(BF16)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        data = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(data.to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()
