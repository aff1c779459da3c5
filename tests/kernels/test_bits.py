"""The CPU's kernels give the same bits however they run, and take numbers of 16 bits as torch does."""

from __future__ import annotations

import functools

import pytest
import torch
from calling import BF16, F16, F32, ISAS, assert_same, each_isa, parameter, set_isa, stored
from cases import in_two_phases
from torch import nn

import torchlamb

# The same bits


ALIKE = {
    "float32": (F32, F32, {}),
    "bfloat16": (BF16, BF16, {}),
    "float16": (F16, F16, {}),
    "masters-bf16-state": (BF16, BF16, {"master_weights": True, "state_dtype": BF16}),
    "stochastic-bf16-state": (BF16, BF16, {"stochastic_rounding": True, "state_dtype": BF16}),
    "bfloat16-grads": (F32, BF16, {}),
    "blocks": (F32, F32, {"blocks": 2}),
    "clipped": (F32, F32, {"max_grad_norm": 0.5, "phi_bounds": (0.1, 50.0)}),
}


def several_steps(tensors, grads, options):
    params = []
    for t in tensors:
        memory = torch.zeros(t.numel() + 1, dtype=t.dtype)[t.storage_offset() :]  # unaligned ones stay so
        params.append(nn.Parameter(memory[: t.numel()].view(t.shape).copy_(t) if t.is_contiguous() else t.clone()))
    optimizer = torchlamb.Lamb(params, lr=0.02, weight_decay=0.05, fused=True, **options)
    for grads_of_step in grads:
        for p, grad in zip(params, grads_of_step, strict=True):
            p.grad_dtype = grad.dtype
            p.grad = grad
        optimizer.step()
        for p in params:
            p.grad = None
    return stored(params, optimizer)


@pytest.mark.parametrize("name", ALIKE)
def test_threads_isas_and_phases_give_the_same_bits(name, monkeypatch):
    param_dtype, grad_dtype, options = ALIKE[name]
    torch.manual_seed(0)
    tensors = [torch.randn(2, 49_999), torch.randn(2, 3), torch.randn(4, 1, 17), torch.randn(37, 62).t(), torch.randn(0, 3)]
    tensors += [] if "blocks" in options else [torch.randn(()), torch.randn(33)]
    tensors = [t.to(param_dtype) for t in tensors]
    tensors.append(torch.randn(2 * 37 + 1).to(param_dtype)[1:].view(2, 37))
    grads = [[(torch.randn(t.shape) * 10.0 ** (i % 4 - 2)).to(grad_dtype) for i, t in enumerate(tensors)] for _ in range(3)]
    wanted = None
    for phases in (1, 2):
        if phases == 2:
            in_two_phases(monkeypatch)
        for isa in ISAS:
            assert set_isa(isa) == isa
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                got = several_steps(tensors, grads, options)
                wanted = wanted or got
                assert_same(got, wanted, f"with {isa}, {threads} threads, {phases} phases")
    assert all(t.isfinite().all() for t in wanted.values())


# Numbers of 16 bits


def all_patterns(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def rounding_borders(dtype):
    """Of float32: halfway between all neighbours, what lies next to that, special values, and any finite numbers."""
    positive = torch.arange(0, 2**15).to(torch.int16).view(dtype).float()
    positive = positive[positive.isfinite()]
    above = positive[1:]
    halves = positive[:-1] / 2 + above / 2  # exact but for the smallest of bfloat16, where half a unit is below float32
    largest = torch.tensor([torch.finfo(F32).max, torch.finfo(dtype).max, torch.finfo(F32).tiny, torch.inf])
    overflow = positive[-1] + (positive[-1] - positive[-2]) / 2
    halves = torch.cat([halves, largest, overflow.reshape(1)])
    infinity = torch.tensor(torch.inf)
    near = torch.cat([halves, torch.nextafter(halves, infinity), torch.nextafter(halves, -infinity)])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32).view(F32)
    scaled = torch.randn(100_000, generator=generator) * 10.0 ** torch.randint(-9, 6, (100_000,), generator=generator)
    return torch.cat([near, -near, drawn[drawn.isfinite()], scaled])


def each_16_bits(test):
    """For both dtypes, in vectors and one by one, with every instruction set."""
    marks = (pytest.mark.parametrize("dtype", [BF16, F16]), pytest.mark.parametrize("columns", [0, 7]), each_isa)
    return functools.reduce(lambda marked, mark: mark(marked), marks, test)


def in_rows(values, columns):
    """All in one row, or in rows so short that they are walked one element after the other."""
    return values if columns == 0 else values[: len(values) // columns * columns].view(-1, columns)


@each_16_bits
def test_every_number_of_16_bits_survives(dtype, columns, isa):
    set_isa(isa)
    old = in_rows(all_patterns(dtype), columns)
    p = nn.Parameter(old.clone())
    p.grad = torch.ones_like(p)  # a positive update: less 0 times that, -0 stays -0
    blocks = len(p) if columns else 1
    optimizer = torchlamb.Lamb([p], lr=0.0, layer_adaptation=False, fused=True, blocks=blocks)
    optimizer.step()
    new, number = p.detach(), ~old.isnan()
    assert torch.equal(new[number].view(torch.int16), old[number].view(torch.int16))
    assert new[~number].isnan().all()


@each_16_bits
def test_every_number_of_16_bits_is_read_as_torch_reads_it(dtype, columns, isa):
    """As a gradient, which is the whole first moment where beta1 is 0."""
    set_isa(isa)
    grad = in_rows(all_patterns(dtype), columns)
    p = nn.Parameter(torch.ones(grad.shape))
    p.grad_dtype = dtype
    p.grad = grad.clone()
    blocks = len(p) if columns else 1
    optimizer = torchlamb.Lamb([p], lr=0.0, betas=(0.0, 0.9), grad_averaging=False, fused=True, blocks=blocks)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"].nan_to_num(nan=1.5), grad.float().nan_to_num(nan=1.5))


@each_16_bits
def test_masters_are_rounded_as_torch_rounds(dtype, columns, isa):
    """A master that does not round to the parameter is stale and replaced: one that stays was rounded as torch does."""
    set_isa(isa)
    values = rounding_borders(dtype)
    values = in_rows(values if columns == 0 else values[::17], columns)
    p = nn.Parameter(values.to(dtype))
    p.grad = torch.ones_like(p)
    blocks = len(p) if columns else 1
    optimizer = torchlamb.Lamb(
        [p], lr=0.0, layer_adaptation=False, master_weights=True, fused=True, blocks=blocks, betas=(0.0, 0.0)
    )
    optimizer.step()
    p.data.copy_(values)
    optimizer.state[p]["master"] = values.clone()
    optimizer.step()
    assert torch.equal(optimizer.state[p]["master"].view(torch.int32), values.view(torch.int32))
    assert torch.equal(p.detach().view(torch.int16), values.to(dtype).view(torch.int16))


@each_isa
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_nan_stays_in_its_own_tensor(dtype, isa):
    set_isa(isa)
    broken, whole = parameter(40, dtype=dtype), parameter(40, dtype=dtype)
    broken.data[3] = torch.nan
    torchlamb.Lamb([broken, whole], fused=True, weight_decay=0.1).step()
    assert broken.isnan().all()
    assert whole.isfinite().all()
