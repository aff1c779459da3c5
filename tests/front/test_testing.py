"""`torchlamb.testing` accepts what computes the rule, whoever wrote it, and says what is wrong with what does not."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from cases import BACKEND_PARAMS, use
from reference import Reference

import torchlamb
from torchlamb import testing
from torchlamb.testing import assert_matches_reference, assert_relative_step


class Eager(torch.optim.Optimizer):
    """A LAMB as people write it, and with `wrong` as people get it wrong."""

    def __init__(self, params, lr, betas, eps, weight_decay, wrong=()):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.wrong = wrong
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        self.count += 1
        for group in self.param_groups:
            clip = 1.0
            if "clip" in self.wrong:
                clip = max(1.0, math.hypot(*(float(p.grad.norm()) for p in group["params"] if p.grad is not None)))
            for p in group["params"]:
                if p.grad is not None:
                    self.step_one(p, p.grad / clip, group)

    def step_one(self, p, grad, group):
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        state = self.state[p]
        if not state:
            state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
        state["m"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1, correction2 = 1 - beta1**self.count, 1 - beta2**self.count
        if "sqrt(1 - beta2^t) / (1 - beta1^t) after the ratio" in self.wrong:
            lr, correction1, correction2 = lr * math.sqrt(correction2) / correction1, 1.0, 1.0
        if "1 / (1 - beta1^t) after the ratio" in self.wrong:
            lr, correction1, correction2 = lr / correction1, 1.0, 1.0
        if "no bias correction" in self.wrong:
            correction1 = correction2 = 1.0
        update = (state["m"] / correction1) / ((state["v"] / correction2).sqrt() + group["eps"])
        if "decay outside the ratio" in self.wrong:
            p.mul_(1 - group["lr"] * decay)
        else:
            update.add_(p, alpha=decay)
        p.sub_(lr * self.ratio(p, update, group) * update)

    def ratio(self, p, update, group):
        if "no adaptation where weight_decay is 0" in self.wrong and group["weight_decay"] == 0:
            return 1.0
        p_norm, u_norm = p.norm(), update.norm()
        if "|param| clamped to 10" in self.wrong:
            p_norm = p_norm.clamp(max=10)
        if p_norm == 0 or u_norm == 0:
            return 0.0 if "tensors of norm 0 that never move" in self.wrong else 1.0
        if "eps added to |update|" in self.wrong:
            u_norm = u_norm + group["eps"]
        ratio = p_norm / u_norm
        if "the ratio clamped to [0.01, 10]" in self.wrong:
            ratio = ratio.clamp(0.01, 10)
        return ratio.clamp(max=1) if "the ratio clamped to 1" in self.wrong else ratio


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@DTYPES
@pytest.mark.parametrize("seed", range(3))
def test_right_ones_are_accepted(dtype, seed):
    assert_matches_reference(Eager, dtype=dtype, seed=seed)


@DTYPES
@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_ours_is_accepted(case, dtype, monkeypatch):
    use(monkeypatch, case)
    if dtype is torch.float64 and case.options.get("fused"):
        pytest.skip("the kernels have no float64")
    assert_matches_reference(partial(torchlamb.Lamb, **case.options), dtype=dtype)


WRONG = [
    ["no bias correction"],
    ["sqrt(1 - beta2^t) / (1 - beta1^t) after the ratio"],
    ["1 / (1 - beta1^t) after the ratio"],
    ["no adaptation where weight_decay is 0"],
    ["decay outside the ratio"],
    ["|param| clamped to 10"],
    ["the ratio clamped to [0.01, 10]"],
    ["the ratio clamped to 1"],
    ["tensors of norm 0 that never move"],
    # Those of torch_optimizer, DeepSpeed, and pytorch_optimizer
    ["no bias correction", "|param| clamped to 10"],
    ["sqrt(1 - beta2^t) / (1 - beta1^t) after the ratio", "the ratio clamped to [0.01, 10]"],
    ["1 / (1 - beta1^t) after the ratio", "|param| clamped to 10", "eps added to |update|"],
]


@pytest.mark.parametrize("wrong", WRONG, ids=" and ".join)
def test_wrong_ones_are_told(wrong):
    with pytest.raises(AssertionError) as raised:
        assert_matches_reference(partial(Eager, wrong=wrong), dtype=torch.float64)
    assert str(raised.value).endswith(f"This is the rule with {' and '.join(wrong)}.")


def test_clipping_is_told():
    with pytest.raises(AssertionError, match="with gradients clipped to a norm of 1 over all of them"):
        assert_matches_reference(partial(Eager, wrong=["clip"]))


def test_what_is_not_known():
    with pytest.raises(AssertionError, match=r"'matrix' is off by 1 after step 1 .*no deviation that is known"):
        assert_matches_reference(lambda params, **_: torch.optim.SGD(params, lr=0.0))
    with pytest.raises(AssertionError, match="no deviation that is known"):
        assert_matches_reference(lambda params, lr, **_: torch.optim.Adagrad(params, lr))


def test_options_of_ours_are_told():
    with pytest.raises(AssertionError, match=r"the ratio clamped to 1\."):
        assert_matches_reference(partial(torchlamb.Lamb, trust_ratio_bounds=(0, 1)))
    with pytest.raises(AssertionError, match="clipped to a norm of 1"):
        assert_matches_reference(partial(torchlamb.Lamb, max_grad_norm=1.0))


@pytest.mark.parametrize(("arguments", "message"), [({"dtype": torch.bfloat16}, "got torch.bfloat16"), ({"steps": 0}, "got 0")])
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        assert_matches_reference(torchlamb.Lamb, **arguments)


def test_random_numbers_are_its_own():
    before = torch.get_rng_state()
    assert_matches_reference(torchlamb.Lamb)
    assert torch.equal(torch.get_rng_state(), before)


def test_its_rule_is_that_of_the_reference():
    """Two references, one in torch and one in NumPy, written apart."""
    for settings in testing._SETTINGS:
        start, grads = testing._tensors(torch.float64, 12, 7)
        options = {"max_grad_norm": None, "skip_nonfinite": False, "grad_centralization": False, "maximize": False}
        options |= {"grad_averaging": True, "bias_correction": True, "blocks": 1, "layer_adaptation": True}
        options |= {"phi_bounds": None, "trust_ratio_bounds": None, **settings}
        reference = Reference([p.numpy() for p in start.values()], [options] * len(start))
        for now, wanted in zip(grads, testing._reference(start, grads, settings, ()), strict=True):
            reference.step([now[name].numpy() if name in now else None for name in start])
            for p, ours in zip(reference.params, wanted.values(), strict=True):
                np.testing.assert_allclose(ours.numpy(), p, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "wrong",
    [wrong for wrong in WRONG[:-3] if wrong[0] not in ("tensors of norm 0 that never move", "no bias correction")],
    ids=" and ".join,
)
def test_relative_steps_of_wrong_ones(wrong):
    """The invariant tells all but no bias correction, which leaves the length of a step, and tensors of norm 0."""

    def params(scale):
        p = torch.nn.Parameter(torch.randn(9, 4, dtype=torch.float64) * scale)
        p.grad = torch.randn_like(p)
        return p

    torch.manual_seed(0)
    settings = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-6}
    decay = 0.1 if "decay outside the ratio" in wrong else 0.0
    assert_relative_step(Eager([params(1), params(1e3)], weight_decay=decay, **settings))
    with pytest.raises(AssertionError, match=r"moved by .*, not by lr \* \|param\|"):
        assert_relative_step(Eager([params(1), params(1e3)], weight_decay=decay, wrong=wrong, **settings))


def test_a_relative_step_that_says_nothing():
    """A gradient of 0 leaves nothing to divide by, and alone must not pass."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    with pytest.raises(AssertionError, match="nothing to check"):
        assert_relative_step(torchlamb.Lamb([p], lr=0.1))
