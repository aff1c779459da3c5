"""Makes the golden numbers of other implementations: `python tests/golden/make.py optax timm`, with those installed.

MindSpore 2.10 wants numpy 1 and an environment of its own. The files are frozen: the tests need no such package. All is float64
but for MindSpore's schedules and bitsandbytes, which have float32 only. `import timm` needs a torchvision that fits the torch
at hand; its optimizer alone does not, so the two package modules above it are registered empty.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
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
CLAMPED = {"bias_correction": False, "phi_bounds": [0, 10]}
# Where "options" is None no options of ours compute this rule; the tests compute it from docs/variants.md.
TORCH_OPTIMIZER = {
    "defaults": ({}, CLAMPED),
    "decay": ({"weight_decay": 0.1}, {**CLAMPED, "weight_decay": 0.1}),
    "clamp_value": ({"clamp_value": 1.0}, {**CLAMPED, "phi_bounds": [0, 1]}),
    "adam": ({"adam": True}, {**CLAMPED, "layer_adaptation": False}),
    "debias": ({"debias": True}, {**CLAMPED, "lr_factor": "torch_optimizer"}),
}
PYTORCH_LAMB = {"defaults, no parameter of norm 0": ({"weight_decay": 0.1}, {**CLAMPED, "weight_decay": 0.1})}
COUPLED = {"weight_decay": 0.1, "weight_decouple": False}
FACTOR = {**CLAMPED, "lr_factor": "pytorch_optimizer"}
PYTORCH_OPTIMIZER = {
    "no decay, eps 0": ({"eps": 0.0}, {**FACTOR, "eps": 0.0}),
    "weight_decouple=False, eps 0": ({**COUPLED, "eps": 0.0}, {**FACTOR, "weight_decay": 0.1, "eps": 0.0}),
    "adam_debias, eps 0": ({"adam_debias": True, "eps": 0.0}, {**CLAMPED, "eps": 0.0}),
    "decay": ({"weight_decay": 0.1}, None),
}
KERAS = {"defaults": ({}, {"eps": 1e-7}), "decay": ({"weight_decay": 0.1}, None)}
BITSANDBYTES = {"defaults": ({}, None), "decay": ({"weight_decay": 0.1}, None)}
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


def inputs(zero=True):
    generator = np.random.default_rng(0)
    params = [generator.normal(size=shape) for shape in SHAPES]
    if zero:
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


def run_torch(make, zero=True, dtype="float64"):
    import torch

    params, grads = inputs(zero)
    params = [torch.nn.Parameter(torch.tensor(p, dtype=getattr(torch, dtype))) for p in params]
    optimizer = make(params)
    for grad in grads:
        for p, g in zip(params, grad, strict=True):
            p.grad = torch.tensor(g, dtype=p.dtype)
        optimizer.step()
    return [p.detach().numpy() for p in params]


def timm_lamb():
    if "timm" not in sys.modules:
        folder = Path(importlib.util.find_spec("timm").origin).parent
        for name, path in (("timm", folder), ("timm.optim", folder / "optim")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
    return importlib.import_module("timm.optim.lamb").Lamb


def run_timm(options):
    return run_torch(lambda params: timm_lamb()(params, lr=0.1, foreach=False, **options))


def run_of(module, name="Lamb", **kwargs):
    return lambda options: run_torch(lambda ps: getattr(importlib.import_module(module), name)(ps, lr=0.1, **options), **kwargs)


def run_keras(options):
    os.environ["KERAS_BACKEND"] = "jax"
    import jax

    jax.config.update("jax_enable_x64", True)
    import keras

    keras.config.set_floatx("float64")
    params, grads = inputs()
    variables = [keras.Variable(p) for p in params]
    optimizer = keras.optimizers.Lamb(0.1, **options)
    for grad in grads:
        optimizer.apply(grad, variables)
    return [np.asarray(v.value) for v in variables]


def make_results(package, cases, run, zero=True):
    params, grads = inputs(zero)
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
        "torch_optimizer": lambda: make_results("torch_optimizer", TORCH_OPTIMIZER, run_of("torch_optimizer")),
        "pytorch_optimizer": lambda: make_results("pytorch_optimizer", PYTORCH_OPTIMIZER, run_of("pytorch_optimizer")),
        "pytorch_lamb": lambda: make_results("pytorch_lamb", PYTORCH_LAMB, run_of("pytorch_lamb.lamb", zero=False), zero=False),
        "keras": lambda: make_results("keras", KERAS, run_keras),
        "bitsandbytes": lambda: make_results(
            "bitsandbytes", BITSANDBYTES, run_of("bitsandbytes.optim", "LAMB", dtype="float32")
        ),
        "mindspore": make_schedules,
    }
    if not sys.argv[1:] or set(sys.argv[1:]) - set(makers):
        sys.exit(f"make.py takes names of packages: {' '.join(makers)}")
    for package in sys.argv[1:]:
        makers[package]()


if __name__ == "__main__":
    main()
