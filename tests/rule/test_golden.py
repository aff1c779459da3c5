"""Frozen results of other people's LAMBs, made by golden/make.py: with these options ours is theirs.

What no options of ours reproduce is computed here as docs/variants.md describes it, so that the page is held to the peer.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from loading import ROOT, TESTS

import torchlamb

ALL = [
    (golden, case)
    for golden in (json.loads(path.read_text()) for path in sorted((TESTS / "golden").glob("*.json")))
    for case in golden["cases"]
]


def cases(reproduced):
    return [
        pytest.param(golden, case, id=f"{golden['made_with']}: {case['name']}")
        for golden, case in ALL
        if (case["options"] is not None) is reproduced
    ]


def test_the_files_are_there():
    assert len(cases(reproduced=True)) == 20
    assert len(cases(reproduced=False)) == 4


def test_the_versions_are_those_of_the_page():
    page = (ROOT / "docs" / "variants.md").read_text()
    for golden, _ in ALL:
        assert re.search(rf"{golden['made_with'].replace(' ', '.*')}", page, re.IGNORECASE), golden["made_with"]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("golden", "case"), cases(reproduced=True))
def test_golden(golden, case, foreach):
    params = [torch.nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in golden["params"]]
    options = dict(case["options"])
    factor = torchlamb.convert.lr_factor(options.pop("lr_factor")) if "lr_factor" in options else lambda _: 1.0
    optimizer = torchlamb.Lamb(params, lr=golden["lr"], foreach=foreach, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for grads in golden["grads"]:
        for p, grad in zip(params, grads, strict=True):
            p.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        scheduler.step()
    for p, wanted in zip(params, case["result"], strict=True):
        torch.testing.assert_close(p.detach(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-13)


BETA1, BETA2 = 0.9, 0.999


def pytorch_optimizer(w, m, v, t, lr, decay):
    w = w * (1 - lr * decay)
    u = m / (np.sqrt(v) + 1e-6)
    norm = min(np.linalg.norm(w), 10.0)
    ratio = norm / (np.linalg.norm(u) + 1e-6) if norm > 0 else 1.0
    return w - lr / (1 - BETA1**t) * ratio * u


def keras(w, m, v, t, lr, decay):
    w = w * (1 - lr * decay)
    u = m / (1 - BETA1**t) / (np.sqrt(v / (1 - BETA2**t)) + 1e-7)
    norm = np.linalg.norm(w)
    return w - lr * (norm / np.linalg.norm(u) if norm > 0 else 1.0) * u


def bitsandbytes(w, m, v, t, lr, decay):
    correction = np.sqrt(1 - BETA2**t) / (1 - BETA1**t)
    u = m / (np.sqrt(v) + 1e-8 * np.sqrt(1 - BETA2**t))  # of which, on CPUs, it takes the norm
    return w * (1 - lr * decay) - lr * correction * min(1.0, np.linalg.norm(w) / np.linalg.norm(u)) * u


# The rule, and the error that is allowed: of float32 where the peer knows nothing else.
NOT_REPRODUCED = {
    "pytorch_optimizer": (pytorch_optimizer, 1e-12),
    "keras": (keras, 1e-12),
    "bitsandbytes": (bitsandbytes, 1e-6),
}


@pytest.mark.parametrize(("golden", "case"), cases(reproduced=False))
def test_what_is_not_reproduced_is_described(golden, case):
    rule, tolerance = NOT_REPRODUCED[golden["made_with"].split()[0]]
    decay = 0.1 if case["name"] == "decay" else 0.0
    for i, wanted in enumerate(case["result"]):
        w = np.array(golden["params"][i])
        m, v = np.zeros_like(w), np.zeros_like(w)
        for t, grads in enumerate(golden["grads"], start=1):
            g = np.array(grads[i])
            m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g**2
            w = rule(w, m, v, t, golden["lr"], decay)
        np.testing.assert_allclose(w, wanted, rtol=tolerance, atol=tolerance)
