"""Makes the golden numbers of other implementations: `python tests/golden/make.py optax timm mindspore`, with those installed.

MindSpore 2.10 wants numpy 1 and an environment of its own. The files are frozen: the tests need no such package. All but the
schedules of MindSpore, which it has in float32 only, are computed in float64. `import timm` needs a torchvision that
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
DECAY = {"learning_rate": 0.1, "decay_rate": 0.9, "decay_steps": 4}
POLYNOMIAL = {"learning_rate": 0.1, "end_learning_rate": 0.01, "decay_steps": 4}
SCHEDULES = [
    ("PolynomialDecayLR", {**POLYNOMIAL, "power": 0.5, "update_decay_steps": False}),
    ("PolynomialDecayLR", {**POLYNOMIAL, "power": 2.0, "update_decay_steps": True}),
    *[
        (name, {**DECAY, "is_stair": is_stair})
        for name in ("ExponentialDecayLR", "NaturalExpDecayLR", "InverseDecayLR")
        for is_stair in (False, True)
    ],
    ("CosineDecayLR", {"min_lr": 0.01, "max_lr": 0.1, "decay_steps": 4}),
    ("WarmUpLR", {"learning_rate": 0.1, "warmup_steps": 4}),
]


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


def make_results(package, cases, run):
    params, grads = inputs()
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


def make_schedules():
    import mindspore

    cases = []
    for name, arguments in SCHEDULES:
        schedule = getattr(mindspore.nn, name)(**arguments)
        values = [float(schedule(mindspore.Tensor(step, mindspore.int32)).asnumpy()) for step in range(13)]
        cases.append({"schedule": name, "arguments": arguments, "values": values})
    golden = {"made_with": f"mindspore {mindspore.__version__}", "cases": cases}
    (HERE / "mindspore" / "schedules.json").write_text(json.dumps(golden, indent=1) + "\n")


def main():
    makers = {
        "optax": lambda: make_results("optax", OPTAX, run_optax),
        "timm": lambda: make_results("timm", TIMM, run_timm),
        "mindspore": make_schedules,
    }
    if not sys.argv[1:] or set(sys.argv[1:]) - set(makers):
        sys.exit(f"make.py takes names of packages: {' '.join(makers)}")
    for package in sys.argv[1:]:
        makers[package]()


if __name__ == "__main__":
    main()
