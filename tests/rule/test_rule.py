"""Every backend, dtype, layout and option against the float64 reference, over 20 steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    BACKEND_PARAMS,
    BACKENDS_AND_SEEDS,
    DEFAULTS,
    DTYPES,
    INTERPRETED,
    LAYOUT_BACKENDS_AND_SEEDS,
    LAYOUTS,
    OPTIONS,
    ROUNDING,
    SHARE_OF_PATH,
    BackendCase,
    make_params,
    set_grads,
    to_numpy,
    use,
)
from reference import Reference
from torch import Tensor

import torchlamb

STEPS = 10 if INTERPRETED else 20  # from step 8 on, gradients have another layout
LOW_PRECISION = (torch.bfloat16, torch.float16)  # compared after each rounding of the parameter, in units in the last place
LAYOUT_OPTIONS = [{"weight_decay": 0.1, "grad_centralization": True, "max_grad_norm": 5.0}, OPTIONS["everything"]]
LAYOUT_DTYPES = [
    pytest.param(*dtype.values, layout, id=f"{dtype.id}-{layout}")
    for dtype in DTYPES
    for layout in LAYOUTS
    if layout != "complex" or dtype.values[0] not in LOW_PRECISION  # torch has no or hardly any such tensors
]


def params_in(dtype: torch.dtype) -> Callable[[str, int, int, np.ndarray], np.ndarray]:
    return lambda name, _i, _t, a: torch.from_numpy(a).to(dtype).double().numpy() if name == "param" else a


def real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def run(
    case: BackendCase, dtype: torch.dtype, layout: str, options: dict[str, Any], seed: int
) -> tuple[Reference, list[Tensor]]:
    torch.manual_seed(seed)
    params = make_params(layout, dtype, options)
    reference_options = {**DEFAULTS, **options, "lr": float(options.get("lr", DEFAULTS["lr"]))}
    reference = Reference(
        [to_numpy(p) for p in params.values()],
        [reference_options] * len(params),
        **({"store": params_in(dtype)} if dtype in LOW_PRECISION else {}),
    )
    optimizer = torchlamb.Lamb(params.items(), **{**options, **case.options})
    for step in range(STEPS):
        set_grads(params, step)
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in params.items()}
        assert reference.step([None if g is None else to_numpy(g) for g in grads.values()])
        optimizer.step()
        for name, p in params.items():
            assert (p.grad is None) == (grads[name] is None)
            assert p.grad is None or torch.equal(p.grad, grads[name]), f"the gradient of {name} was written"
    check_ratios(optimizer, dict(zip(params, reference.ratios, strict=True)), dtype)
    return reference, list(params.values())


def check_ratios(optimizer: torchlamb.Lamb, expected: dict[str, list[tuple[float, float]]], dtype: torch.dtype) -> None:
    ratios = optimizer.trust_ratios()
    assert set(ratios) == {name for name, values in expected.items() if values}
    for name, ratio in ratios.items():
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        for got, (wanted, cancellation) in zip(ratio.reshape(-1).tolist(), expected[name], strict=True):
            # Where gradients cancel in the first moment, or it and the decay, the update has their errors at a smaller size.
            assert got == pytest.approx(wanted, rel=tolerance * max(1.0, cancellation)), name


def check(reference: Reference, params: list[Tensor], dtype: torch.dtype) -> float:
    """Assert the tolerances of docs/design.md and return the largest error as a share of them."""
    if dtype in LOW_PRECISION:
        return check_ulps(reference, params, dtype)
    shares = [0.0]
    for w, path, walked, p in zip(reference.params, reference.paths, reference.walked, params, strict=True):
        error = np.abs(to_numpy(real(p)) - w)
        tolerance = SHARE_OF_PATH[dtype] * path + ROUNDING[dtype] * walked
        assert np.all(error <= tolerance), (
            f"{p.shape}: {np.max(error / np.where(tolerance > 0, tolerance, 1e-300))} x tolerance"
        )
        shares += [float(np.max(error / np.where(tolerance > 0, tolerance, 1), initial=0))]
    return max(shares)


def check_ulps(reference: Reference, params: list[Tensor], dtype: torch.dtype) -> float:
    """At most one ulp off, on 99.9 % of the elements; on a few hundred elements, that is all but one.

    A value that falls on the other side of a rounding border stays one ulp off, of the size it had then: so the ulp is that of
    the largest size the element has had.
    """
    count = wrong = 0
    for w, largest, p in zip(reference.params, reference.largest, params, strict=True):
        _, exponent = np.frexp(largest)
        info = torch.finfo(dtype)
        ulp = info.eps * np.maximum(np.ldexp(1.0, exponent - 1), info.smallest_normal)
        error = np.abs(to_numpy(real(p)) - w)
        wrong += int(np.sum(~(error <= 1.001 * ulp)))
        count += error.size
    allowed = max(1, count // 1000)
    assert wrong <= allowed, f"{wrong} of {count} elements are more than one ulp off"
    return wrong / allowed


@pytest.mark.parametrize(("case", "seed"), BACKENDS_AND_SEEDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(case, dtype, options, seed, monkeypatch, record_share):
    use(monkeypatch, case)
    reference, params = run(case, dtype, "contiguous", options, seed)
    record_share(case.name, str(dtype), check(reference, params, dtype))


@pytest.mark.parametrize(("case", "seed"), LAYOUT_BACKENDS_AND_SEEDS)
@pytest.mark.parametrize(("dtype", "layout"), LAYOUT_DTYPES)
@pytest.mark.parametrize("options", LAYOUT_OPTIONS, ids=["some", "everything"])
@pytest.mark.usefixtures("small_pieces")
def test_layouts(case, dtype, layout, options, seed, monkeypatch, record_share):
    use(monkeypatch, case)
    reference, params = run(case, dtype, layout, options, seed)
    record_share(case.name, str(dtype), check(reference, params, dtype))


@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_without_momentum_the_first_moment_is_the_gradient(case, monkeypatch):
    """Also where the gradient is much smaller than the one before."""
    use(monkeypatch, case)
    param = torch.nn.Parameter(torch.linspace(1, 2, 100))
    optimizer = torchlamb.Lamb([param], betas=(0.0, 0.9), **case.options)
    for scale in (1.0, 1e-4):
        param.grad = torch.linspace(0.1, 0.7, 100) * scale
        optimizer.step()
    assert torch.equal(optimizer.state[param]["exp_avg"], param.grad)
