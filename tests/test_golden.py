"""Frozen results of other people's LAMBs, made by golden/make.py: with these options ours is theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import torchlamb

GOLDEN = [
    pytest.param(golden, case, id=f"{golden['made_with']}: {case['name']}")
    for golden in (json.loads(path.read_text()) for path in sorted(Path(__file__).parent.glob("golden/*.json")))
    for case in golden["cases"]
]


def test_the_files_are_there():
    assert len(GOLDEN) == 10


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("golden", "case"), GOLDEN)
def test_golden(golden, case, foreach):
    params = [torch.nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in golden["params"]]
    optimizer = torchlamb.Lamb(params, lr=golden["lr"], foreach=foreach, **case["options"])
    for grads in golden["grads"]:
        for p, grad in zip(params, grads, strict=True):
            p.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
    for p, wanted in zip(params, case["result"], strict=True):
        torch.testing.assert_close(p.detach(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-13)
