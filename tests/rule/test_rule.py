"""Every backend, layout and option against the float64 reference, over 20 steps in float64 and float32.

What is stored in 16 bits is compared where it is rounded, in test_precision.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from cases import BACKEND_PARAMS, DTYPES, FORMS, LAYOUT_FORMS, LAYOUTS, OPTIONS, BackendCase, name_of, to_numpy, use
from torch import Tensor
from walks import start, walk

import torchlamb

LAYOUT_OPTIONS = [{"weight_decay": 0.1, "grad_centralization": True, "max_grad_norm": 5.0}, OPTIONS["everything"]]


def real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def check(case: BackendCase, dtype: torch.dtype, layout: str, options: dict[str, Any]) -> float:
    """Walk with the reference, and return the largest error as a share of its tolerance."""
    grads, reference = walk(layout, dtype, options)
    params = start(layout, dtype, options)
    optimizer = torchlamb.Lamb(params.items(), **{**options, **case.options})
    for grads_of_step in grads:
        for name, p in params.items():
            grad = grads_of_step[name]
            p.grad = None if grad is None else grad.clone()
        optimizer.step()
        for name, p in params.items():
            grad = grads_of_step[name]
            assert (p.grad is None) == (grad is None)
            assert grad is None or torch.equal(p.grad, grad), f"the gradient of {name} was written"
    expected = dict(zip(params, reference.ratios, strict=True))
    ratios = optimizer.trust_ratios()
    assert set(ratios) == {name for name, values in expected.items() if values}
    for name, ratio in ratios.items():
        for got, wanted in zip(ratio.reshape(-1).tolist(), expected[name], strict=True):
            tolerances.assert_ratio(got, wanted, name_of(dtype), name)
    shares = []
    for i, (name, p) in enumerate(params.items()):
        error = np.abs(to_numpy(real(p)) - reference.params[i])
        shares.append(tolerances.largest_share(error, tolerances.of_param(reference, i, name_of(dtype)), name))
    return max(shares)


@pytest.mark.seeded
@pytest.mark.parametrize("case", FORMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(case, dtype, options, monkeypatch, record_share):
    use(monkeypatch, case)
    record_share(case.name, str(dtype), check(case, dtype, "contiguous", options))


@pytest.mark.seeded
@pytest.mark.parametrize("case", LAYOUT_FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", LAYOUT_OPTIONS, ids=["some", "everything"])
@pytest.mark.usefixtures("small_pieces")
def test_layouts(case, dtype, layout, options, monkeypatch, record_share):
    use(monkeypatch, case)
    record_share(case.name, str(dtype), check(case, dtype, layout, options))


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
