"""What holds for every input: the invariant, and what scaling does not change."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st

import torchlamb
from torchlamb.testing import assert_relative_step

SHAPES = st.lists(st.integers(1, 7), max_size=4).map(tuple)
OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-4, 0.9),  # at 1 a single element can land on 0, which leaves nothing to check
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
        "eps": st.sampled_from([1e-8, 1e-6, 1e-2]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
        "bias_correction": st.booleans(),
        "grad_averaging": st.booleans(),
        "max_grad_norm": st.sampled_from([None, 0.5]),
    }
)
CASES = st.sampled_from([case.options for case in BACKENDS])
EXAMPLES = settings(max_examples=60)


def random(shape, seed: int, scale: float = 1.0, dtype=torch.float64) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@EXAMPLES
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**30),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    options=OPTIONS,
    backend=CASES,
)
def test_invariant(shapes, dtype, seed, scale, options, backend):
    params = [torch.nn.Parameter(random(shape, seed + i, scale, dtype)) for i, shape in enumerate(shapes)]
    optimizer = torchlamb.Lamb(params, **options, **backend)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = random(p.shape, seed + 100 * step + i + 7, 1 / scale, dtype)
        assert_relative_step(optimizer)


@EXAMPLES
@given(shape=SHAPES, seed=st.integers(0, 2**30), factor=st.sampled_from([1e-6, 0.5, 3.0, 1e6]), backend=CASES)
def test_scaling_gradients_changes_nothing_without_eps(shape, seed, factor, backend):
    results = []
    for scale in (1.0, factor):
        p = torch.nn.Parameter(random(shape, seed))
        optimizer = torchlamb.Lamb([p], lr=0.1, eps=0.0, weight_decay=0.1, **backend)
        for step in range(3):
            p.grad = random(shape, seed + step + 1, scale)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@EXAMPLES
@given(shape=SHAPES, seed=st.integers(0, 2**30), factor=st.sampled_from([1e-3, 0.5, 8.0, 1e4]), backend=CASES)
def test_scaling_the_parameter_scales_the_step_without_decay(shape, seed, factor, backend):
    moves = []
    for scale in (1.0, factor):
        p = torch.nn.Parameter(random(shape, seed, scale))
        before = p.detach().clone()
        optimizer = torchlamb.Lamb([p], lr=0.1, **backend)
        p.grad = random(shape, seed + 1)
        optimizer.step()
        moves.append((p.detach() - before) / scale)
    torch.testing.assert_close(*moves, rtol=1e-9, atol=1e-11)


def test_the_helper_rejects_what_is_not_lamb():
    """AdamW moves by another length, and so does a step half as long."""
    for make in (torch.optim.AdamW, lambda params, lr: torchlamb.Lamb(params, lr=lr, layer_adaptation=False)):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = make([p], lr=0.1)
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.param_groups[0].pop("layer_adaptation", None)
        if isinstance(optimizer, torchlamb.Lamb):
            optimizer.param_groups[0]["layer_adaptation"] = True
            optimizer.register_step_pre_hook(lambda o, *_: o.param_groups[0].update(lr=0.05))
            optimizer.register_step_post_hook(lambda o, *_: o.param_groups[0].update(lr=0.1))
        p.data.mul_(2)
        with pytest.raises(AssertionError, match="parameter 0 of group 0 moved by"):
            assert_relative_step(optimizer)


def test_the_helper_rejects_a_step_that_does_nothing():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = torchlamb.Lamb([p], lr=0.1)
    optimizer.step = lambda _: None
    with pytest.raises(AssertionError, match="moved by 0, not by"):
        assert_relative_step(optimizer)


def test_the_helper_leaves_out_what_is_not_adapted():
    params = [torch.nn.Parameter(torch.full((4,), 2.0)) for _ in range(6)]
    with pytest.raises(AssertionError, match="nothing to check"):
        assert_relative_step(torchlamb.Lamb(params))
    for p in params[:5]:
        p.grad = torch.ones(4)
    params[4].data.zero_()
    adapted = torch.nn.Parameter(torch.ones(2))
    adapted.grad = torch.ones(2)
    groups = [
        {"params": [params[0]], "layer_adaptation": False},
        {"params": [params[1]], "phi_bounds": (0.0, 0.1)},
        {"params": [params[2]], "trust_ratio_bounds": (0.0, 0.1)},
        {"params": [params[3]], "blocks": 2},
        {"params": [*params[4:], adapted]},
    ]
    assert_relative_step(torchlamb.Lamb(groups, lr=0.1))
