"""The noise scale of a problem where it is known: estimators have no bias at any batch size. Shards are in sharded_cases.py."""

from __future__ import annotations

import io
import math

import pytest
import torch
from cases import SEED
from torch import nn

from torchlamb.noise_scale import NoiseScale

DIMS, SIGMA, MEAN = 64, 2.0, 0.25
NOISE, SIGNAL = DIMS * SIGMA**2, DIMS * MEAN**2  # tr(S) and |G|^2: the scale is 64


def linear() -> nn.Parameter:
    """With the loss x . w, a sample's gradient is the sample itself: normal, of known mean and variance."""
    return nn.Parameter(torch.zeros(DIMS, dtype=torch.float64))


def samples(count: int, generator: torch.Generator) -> torch.Tensor:
    return MEAN + SIGMA * torch.randn(count, DIMS, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("small", "large"), [(1, 2), (4, 64), (16, 48)])
def test_expected_norms_give_the_exact_scale(small, large):
    scale = NoiseScale([linear()], decay=0.5)
    for _ in range(3):
        scale.update(SIGNAL + NOISE / small, small, SIGNAL + NOISE / large, large)
    assert (scale.noise, scale.signal, scale.value) == pytest.approx((NOISE, SIGNAL, NOISE / SIGNAL), rel=1e-12)
    assert scale.count == 3


@pytest.mark.seeded
@pytest.mark.parametrize(("small", "large"), [(2, 16), (8, 32)])
def test_estimates_from_gradients_have_no_bias(small, large):
    generator = torch.Generator().manual_seed(SEED)
    noises, signals = [], []
    for _ in range(400):
        param = linear()
        scale = NoiseScale([param], decay=0.0)
        for i, part in enumerate(samples(large, generator).split(small)):
            ((part @ param).sum() / large).backward()
            if i == 0:
                scale.micro_batch(samples=small, of=large)
        scale.step(samples=large)
        noises.append(scale.noise)
        signals.append(scale.signal)
    for estimates, exact in ((torch.tensor(noises), NOISE), (torch.tensor(signals), SIGNAL)):
        error = estimates.std() / math.sqrt(len(estimates))
        assert abs(estimates.mean() - exact) < 5 * error
        assert error < 0.1 * exact  # or the line above would say little


def test_running_averages_approach_the_scale():
    generator, param = torch.Generator().manual_seed(0), linear()
    scale = NoiseScale([param], decay=0.99)
    for _ in range(1000):
        batch = samples(32, generator)
        scale.update(batch[:8].mean(dim=0).square().sum(), 8, batch.mean(dim=0).square().sum(), 32)
    assert scale.value == pytest.approx(NOISE / SIGNAL, rel=0.1)


def test_averages_weigh_the_first_updates_alike():
    """Without the correction of their weight, they would be drawn towards 0."""
    scale = NoiseScale([linear()], decay=0.9)
    norms = [(5.0, 3.0), (7.0, 2.0)]
    for small, large in norms:
        scale.update(small, 1, large, 4)
    noises = [(small - large) / 0.75 for small, large in norms]
    assert scale.noise == pytest.approx((0.9 * noises[0] + noises[1]) / 1.9, rel=1e-12)


def test_what_is_not_finite_is_passed_over():
    scale = NoiseScale([linear()], decay=0.5)
    scale.update(8.0, 1, 5.0, 4)
    before = scale.state_dict()
    for wrong in (math.nan, math.inf):
        scale.update(wrong, 1, 5.0, 4)
        scale.update(8.0, 1, wrong, 4)
    assert scale.state_dict() == before


def test_nan_before_it_is_known():
    scale = NoiseScale([linear()])
    assert math.isnan(scale.value)
    assert math.isnan(scale.noise)
    scale.update(10.0, 1, 1.0, 4)  # the signal's estimate is -2
    assert scale.signal == pytest.approx(-2 / (1 - 0.95) * (1 - 0.95), rel=1e-12)
    assert math.isnan(scale.value)
    scale = NoiseScale([linear()])
    scale.update(1.0, 1, 2.0, 4)
    assert scale.noise < 0 < scale.signal
    assert math.isnan(scale.value)


def test_state_survives():
    scale, other = NoiseScale([linear()]), NoiseScale([linear()])
    scale.update(8.0, 1, 5.0, 4)
    saved = io.BytesIO()
    torch.save(scale.state_dict(), saved)
    saved.seek(0)
    other.load_state_dict(torch.load(saved, weights_only=True))
    for one in (scale, other):
        one.update(9.0, 1, 4.0, 4)
    assert other.state_dict() == scale.state_dict()
    with pytest.raises(ValueError, match=r"state_dict must be what state_dict\(\) returned, got keys \['step'\]"):
        other.load_state_dict({"step": 1})
    assert other.state_dict() == scale.state_dict()


def test_gradients_and_random_numbers_are_left_alone():
    model = nn.Linear(8, 2)
    scale = NoiseScale(model.parameters())
    model(torch.ones(4, 8)).sum().backward()
    grads, state = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    scale.micro_batch(samples=4, of=8)
    model(torch.ones(4, 8)).sum().backward()
    scale.step(samples=8)
    assert all(torch.equal(p.grad, 2 * before) for p, before in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_low_precision_complex_and_missing_gradients():
    params = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.bfloat16, torch.complex64, torch.float32)]
    params[0].grad = torch.full((3,), 300.0, dtype=torch.bfloat16)
    params[1].grad = torch.full((3,), 3 + 4j, dtype=torch.complex64)
    scale = NoiseScale(params, decay=0.0)
    scale.micro_batch(samples=1, of=1)
    scale.step(samples=2)
    square = 3 * 300.0**2 + 3 * 25.0
    assert (scale.signal, scale.noise) == pytest.approx((square, 0.0), rel=1e-6, abs=1e-6)


def test_misuse_is_refused():
    param = linear()
    with pytest.raises(TypeError, match=r"params must be an iterable of parameters, got a Linear; give model.parameters\(\)"):
        NoiseScale(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="params is empty"):
        NoiseScale([])
    with pytest.raises(ValueError, match=r"decay must be a number in \[0, 1\), got 1"):
        NoiseScale([param], decay=1)
    with pytest.raises(TypeError, match=r"decay must be a number in \[0, 1\), got None"):
        NoiseScale([param], decay=None)
    scale = NoiseScale([param])
    with pytest.raises(RuntimeError, match=r"step\(\) was called without micro_batch\(\)"):
        scale.step(4)
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        scale.micro_batch(1, of=4)
    param.grad = torch.ones(DIMS, dtype=torch.float64)
    with pytest.raises(ValueError, match="of must be a whole number >= 1, got 0"):
        scale.micro_batch(1, of=0)
    scale.micro_batch(2, of=4)
    with pytest.raises(RuntimeError, match=r"micro_batch\(\) was called twice in a step"):
        scale.micro_batch(2, of=4)
    with pytest.raises(ValueError, match="large must be more samples than small, got 2 and 2"):
        scale.step(2)
    with pytest.raises(TypeError, match=r"small must be a whole number >= 1, got 1\.0"):
        scale.update(1.0, 1.0, 1.0, 2)
    assert scale.count == 0
