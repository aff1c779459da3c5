"""`torchlamb.param_groups`: what decays and what does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchlamb


class ScaleNorm(nn.Module):
    """Not torch's, known by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(4))


class NormalisedLinear(nn.Module):
    """Has "norm" in its name and a matrix: no normalisation layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(4, 4))


def names(groups, weight_decay) -> list[str]:
    return [name for group in groups if group["weight_decay"] == weight_decay for name, _ in group["params"]]


def test_decided_by_module_type():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 4, 3),
            "batch": nn.BatchNorm2d(4),
            "instance": nn.InstanceNorm1d(4, affine=True),
            "group": nn.GroupNorm(2, 4),
            "layer": nn.LayerNorm((2, 4)),
            "rms": nn.RMSNorm(4),
            "scale": ScaleNorm(),
            "normalised": NormalisedLinear(),
            "attention": nn.MultiheadAttention(4, 2),
            "embedding": nn.Embedding(3, 4),
            "gru": nn.GRU(4, 4),
        }
    )
    groups = torchlamb.param_groups(model, 0.1)
    assert names(groups, 0.1) == [
        "conv.weight",
        "normalised.matrix",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "embedding.weight",
        "gru.weight_ih_l0",
        "gru.weight_hh_l0",
    ]
    everything = [name for name, _ in model.named_parameters()]
    assert sorted(names(groups, 0.1) + names(groups, 0.0)) == sorted(everything)
    assert all("layer_adaptation" not in group for group in groups)


def test_decided_by_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    groups = torchlamb.param_groups(model, 0.1, no_decay=[r"^1\.", "0.weight"])
    assert names(groups, 0.1) == ["0.bias"]
    with pytest.raises(ValueError, match="'typo' matches no parameter"):
        torchlamb.param_groups(model, 0.1, no_decay=["bias", "typo"])
    with pytest.raises(TypeError, match=r"write \['bias'\]"):
        torchlamb.param_groups(model, 0.1, no_decay="bias")


def test_adapt_excluded():
    decayed, excluded = torchlamb.param_groups(nn.Linear(2, 2), 0.1, adapt_excluded=False)
    assert "layer_adaptation" not in decayed
    assert excluded["layer_adaptation"] is False
    optimizer = torchlamb.Lamb([decayed, excluded])
    assert [group["layer_adaptation"] for group in optimizer.param_groups] == [True, False]


def test_tied_weights_once_and_frozen_ones_too():
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4, bias=False))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    (group,) = torchlamb.param_groups(model, 0.1)
    assert [name for name, _ in group["params"]] == ["0.weight"]
    torchlamb.Lamb([group])


def test_what_is_no_module_or_no_pattern():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got generator"):
        torchlamb.param_groups(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(ValueError, match=r"no_decay pattern '\(' is no regular expression"):
        torchlamb.param_groups(nn.Linear(2, 2), 0.1, no_decay=["("])


def test_a_model_without_parameters():
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        torchlamb.param_groups(nn.ReLU(), 0.1)


def test_groups_serve_torch_optimizers_too():
    model = nn.Linear(2, 2)
    torch.optim.AdamW(torchlamb.param_groups(model, 0.1))
