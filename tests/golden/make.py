"""Makes the golden numbers of other implementations: `python tests/golden/make.py`, with optax and timm installed.

The files are frozen: the tests need neither package. Everything is computed in float64. `import timm` needs a torchvision that
fits the torch at hand; its optimizer alone does not, so the two package modules above it are registered empty.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SHAPES = [(4, 3), (5,), (2, 2, 3)]
STEPS = 5

# name: options of the peer, options of ours
OPTAX = {
    "defaults": ({}, {}),
    "decay": ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "betas": ({"b1": 0.8, "b2": 0.95, "eps": 1e-3}, {"betas": [0.8, 0.95], "eps": 1e-3}),
}
ADAPT = {"weight_decay": 0.01, "max_grad_norm": None, "always_adapt": True}
TIMM = {
    "always_adapt": (ADAPT, {"weight_decay": 0.01}),
    "no decay": ({**ADAPT, "weight_decay": 0.0}, {}),
    "its defaults": ({}, {"weight_decay": 0.01, "max_grad_norm": 1.0}),
    "without decay it does not adapt": (
        {"weight_decay": 0.0, "max_grad_norm": None},
        {"layer_adaptation": False},
    ),
    "trust_clip": ({**ADAPT, "trust_clip": True}, {"weight_decay": 0.01, "trust_ratio_bounds": [0, 1]}),
    "no grad_averaging": ({**ADAPT, "grad_averaging": False}, {"weight_decay": 0.01, "grad_averaging": False}),
    "no bias_correction": ({**ADAPT, "bias_correction": False}, {"weight_decay": 0.01, "bias_correction": False}),
}


def inputs():
    generator = np.random.default_rng(0)
    params = [generator.normal(size=shape) for shape in SHAPES]
    params[1] *= 0  # a parameter of norm 0
    return params, [[generator.normal(size=shape) for shape in SHAPES] for _ in range(STEPS)]


def run_optax(options):
    import jax

    jax.config.update("jax_enable_x64", True)
    import optax

    params, grads = inputs()
    transform = optax.lamb(0.1, **options)
    state = transform.init(params)
    for grad in grads:
        updates, state = transform.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


def run_timm(options):
    import torch

    if "timm" not in sys.modules:
        folder = Path(importlib.util.find_spec("timm").origin).parent
        for name, path in (("timm", folder), ("timm.optim", folder / "optim")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
    params, grads = inputs()
    params = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    optimizer = importlib.import_module("timm.optim.lamb").Lamb(params, lr=0.1, foreach=False, **options)
    for grad in grads:
        for p, g in zip(params, grad, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    return [p.detach().numpy() for p in params]


def main():
    params, grads = inputs()
    for package, cases, run in (("optax", OPTAX, run_optax), ("timm", TIMM, run_timm)):
        golden = {
            "made_with": f"{package} {importlib.metadata.version(package)}",
            "lr": 0.1,
            "params": [p.tolist() for p in params],
            "grads": [[g.tolist() for g in step] for step in grads],
            "cases": [
                {"name": name, "options": ours, "result": [np.asarray(p).tolist() for p in run(theirs)]}
                for name, (theirs, ours) in cases.items()
            ],
        }
        (HERE / f"{package}.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
