"""Saved runs of other optimizers, and how they go on with ours."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
import torch
from loading import TESTS
from torch import nn

import torchlamb
import torchlamb.mindspore
from torchlamb.convert import lr_factor, to_lamb

STATES = TESTS / "golden" / "states"


# The name of the file, and what the warning says of it.
RUNS = {
    "timm": None,
    "timm_adapts": None,
    "apex": None,
    "apex_mixed_precision": None,
    "deepspeed": r"lr_factor\('deepspeed', start=steps\)",
    "torch_optimizer": None,
    "torch_optimizer_debias": r"lr_factor\('torch_optimizer', start=steps\)",
    "pytorch_optimizer": r"\+ eps.*lr_factor\('pytorch_optimizer', start=steps\)",
    "adam": "tune it again",
    "adamw": "tune it again",
}


# In float64: 1e-13, but for a lr that is a float32 tensor, and for an eps in the ratio, which ours leaves out.
TOLERANCES = {"apex_mixed_precision": 2e-8, "pytorch_optimizer": 1e-7}


# Of a constructor, other than by default, so that what a state leaves unsaid would be seen; blocks cannot divide all of them.
OTHERWISE = {
    "bias_correction": False,
    "layer_adaptation": False,
    "grad_averaging": False,
    "phi_bounds": (0.5, 0.6),
    "trust_ratio_bounds": (0.5, 0.6),
    "grad_centralization": True,
    "max_grad_norm": 0.01,
    "maximize": True,
}


def saved(name):
    return torch.load(STATES / f"{name}.pt", weights_only=True)


def converted(run, note=None):
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        state_dict = to_lamb(run["state_dict"], run["source"], run["arguments"])
    assert len(notes) == (note is not None)
    if note is not None:
        assert notes[0].filename == __file__  # it points at who called
        assert re.search(note, str(notes[0].message))
    return state_dict


def go_on(run, state_dict, has_factor, dtype):
    """Return the parameters after the second half, with Lamb from the converted state.

    It is constructed with options that differ from the defaults: those that the rule depends on must come from the state.
    """
    params = [nn.Parameter(p.to(dtype)) for p in run["params"]]
    adam = run["source"].startswith("adam")  # whose states do not say whether to adapt
    options = {"layer_adaptation": False} if adam else OTHERWISE
    optimizer = torchlamb.Lamb([{"params": params[:2]}, {"params": params[2:]}], **options)
    optimizer.load_state_dict(state_dict)
    steps = int(optimizer.state[params[0]]["step"])
    factor = lr_factor(run["source"], optimizer.param_groups[0]["betas"], start=steps) if has_factor else lambda _: 1.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for grads in run["grads"]:
        for p, grad in zip(params, grads, strict=False):  # the last one has none
            p.grad = grad.to(dtype)
        optimizer.step()
        scheduler.step()
    return [p.detach() for p in params]


def largest_difference(run, results):
    """Return how far a parameter ends from where theirs did, relative to its norm."""
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(results, run["result"], strict=True))


def io_of(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return buffer


# MindSpore


def mindspore_arrays():
    with np.load(STATES / "mindspore.npz") as arrays:
        return dict(arrays)


def mindspore_net():
    net = nn.Sequential()
    net.fc, net.norm = nn.Linear(3, 4), nn.LayerNorm(4)
    return net
