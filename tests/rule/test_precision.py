"""What is stored in low precision and how it is rounded: each against a reference that rounds at the same places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from cases import (
    DEFAULTS,
    FORMS,
    GPU_KERNELS,
    LAYOUT_FORMS,
    LAYOUTS,
    OPTIONS,
    PLAIN_FORMS,
    SEED,
    make_params,
    name_of,
    set_grads,
    to_numpy,
    use,
)
from reference import Reference
from rounding_reference import nearest, random_bits, seed_of, stochastic
from storing import BF16, FP16, FP32, FP64, LOW, STORAGE
from torch import nn

import torchlamb

# Parameter and gradient, each with what they can be stored as.
COMBINATIONS = [
    pytest.param(param, grad, options, id=f"{str(param)[6:]}-{str(grad)[6:]}-{name}")
    for param, grad in [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32), (FP32, BF16), (FP64, FP64)]
    for name, options in STORAGE.items()
    if not (param is FP64 and GPU_KERNELS)
    if not (param is FP16 and "stochastic_rounding" in options)
    if not (param in (FP32, FP64) and name in ("masters", "stochastic", "masters-bf16-state"))  # nothing of theirs is rounded
]
GROUP = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.05}
STEPS = 8


def set_grads_in(params: dict[str, nn.Parameter], step: int, dtype: torch.dtype) -> None:
    """Give the parameters gradients of that dtype, be it another than their own."""
    for p in params.values():
        p.grad = None
        p.grad_dtype = p.dtype
    set_grads(params, step)
    for p in params.values():
        grad, p.grad = p.grad, None
        p.grad_dtype = dtype
        p.grad = None if grad is None else grad.to(dtype)


class Rounded:
    """The reference's `store`: what is stored in 16 bits is checked to be rounded rightly, and gone on from."""

    def __init__(self, params: dict[str, nn.Parameter], optimizer: torchlamb.Lamb, options: dict[str, Any]) -> None:
        self.seeds = [seed_of(i) for i in range(len(params))]
        self.params, self.optimizer, self.options = list(params.items()), optimizer, options
        values = {**DEFAULTS, **options, "lr": float(options["lr"])}
        self.reference = Reference([to_numpy(p) for p in params.values()], [values] * len(params), self)

    def __call__(self, name: str, i: int, t: int, a: np.ndarray) -> np.ndarray:
        label, p = self.params[i]
        state = self.optimizer.state[p]
        stored = p.detach() if name == "param" else state[name]
        if name == "param" and "master" in state:
            assert torch.equal(p, state["master"].to(p.dtype)), label
            return a
        if stored.dtype not in LOW:
            # Of float64, moments are float32 where that is asked for.
            return (
                a if name == "param" or stored.dtype is p.dtype or p.dtype in LOW else a.astype(np.float32).astype(np.float64)
            )
        got = to_numpy(stored)
        error = (
            tolerances.of_last_step(self.reference, i, "float32")
            if name == "param"
            else tolerances.of_moment(self.reference, name, i, "float32")
        )
        tolerances.assert_rounded(got, a, error, lambda a: self._rounded(name, i, t, a), f"{name} of {label}")
        return got

    def _rounded(self, name: str, i: int, t: int, a: np.ndarray) -> np.ndarray:
        bits = random_bits(self.seeds[i], a.shape, t)
        if name == "param":
            if self.options.get("stochastic_rounding"):
                return stochastic(a, bits >> np.uint64(16))
            return nearest(a, name_of(self.params[i][1].dtype))
        return nearest(a, "bfloat16") if name == "exp_avg" else stochastic(a, bits & np.uint64(0xFFFF))


def check_arithmetic(reference: Reference, optimizer: torchlamb.Lamb, params: dict[str, nn.Parameter]) -> None:
    """Check what is not rounded to 16 bits: parameters or their masters, moments, and ratios."""
    ratios = optimizer.trust_ratios()
    for i, (name, p) in enumerate(params.items()):
        state = optimizer.state.get(p, {})
        if not state:
            continue
        stored = state.get("master", p)
        precise = "float64" if p.dtype is FP64 and optimizer.param_groups[0]["state_dtype"] is not FP32 else "float32"
        for got, wanted in zip(ratios[name].reshape(-1).tolist(), reference.ratios[i], strict=True):
            tolerances.assert_ratio(got, wanted, precise, name)
        if stored.dtype not in LOW:
            error = np.abs(to_numpy(stored) - reference.params[i])
            tolerances.largest_share(error, tolerances.of_param(reference, i, precise), name)
        for key, moments in (("exp_avg", reference.exp_avgs), ("exp_avg_sq", reference.exp_avg_sqs)):
            error = np.abs(to_numpy(state[key]) - moments[i])
            tolerance = 0.0 if state[key].dtype is BF16 else tolerances.of_moment(reference, key, i, name_of(state[key].dtype))
            tolerances.largest_share(error, np.broadcast_to(tolerance, error.shape), f"{key} of {name}")


def run(case, param_dtype, grad_dtype, layout, options) -> None:
    torch.manual_seed(SEED)
    params = make_params(layout, param_dtype, options)
    optimizer = torchlamb.Lamb(params.items(), **options, **case.options)
    rounded = Rounded(params, optimizer, {**DEFAULTS, **options})
    for step in range(STEPS):
        set_grads_in(params, step, grad_dtype)
        optimizer.step()
        assert rounded.reference.step([None if p.grad is None else to_numpy(p.grad) for p in params.values()])
    check_arithmetic(rounded.reference, optimizer, params)
    for name, p in params.items():
        assert p.dtype is param_dtype
        assert p.grad is None or p.grad.dtype is grad_dtype, name


@pytest.mark.seeded
@pytest.mark.parametrize(("param_dtype", "grad_dtype", "storage"), COMBINATIONS)
@pytest.mark.parametrize("case", FORMS)
def test_combinations(case, param_dtype, grad_dtype, storage, monkeypatch):
    use(monkeypatch, case)
    run(case, param_dtype, grad_dtype, "contiguous", {**GROUP, **storage})


@pytest.mark.seeded
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", PLAIN_FORMS)
def test_options_in_16_bits(case, options, dtype, monkeypatch):
    use(monkeypatch, case)
    run(case, dtype, dtype, "contiguous", {"lr": 1e-3, **options})


LAYOUT_STORAGE = {"bfloat16-masters-bf16-state": BF16, "bfloat16-stochastic-bf16-state": BF16, "float16-nothing": FP16}


@pytest.mark.seeded
@pytest.mark.parametrize("storage", LAYOUT_STORAGE)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "complex"])
@pytest.mark.parametrize("case", LAYOUT_FORMS)
@pytest.mark.usefixtures("small_pieces")
def test_layouts_in_16_bits(case, storage, layout, monkeypatch):
    use(monkeypatch, case)
    dtype, options = LAYOUT_STORAGE[storage], STORAGE[storage.partition("-")[2]]
    run(case, dtype, dtype, layout, {**GROUP, "blocks": 2, "max_grad_norm": 1.0, "phi_bounds": (0.1, 4.0), **options})
