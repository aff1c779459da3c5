"""The GPU's kernels, in Triton's interpreter or on a GPU: what the case table, which runs on them too, does not reach."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from cases import BACKEND_PARAMS, DEFAULTS, DEVICE, GPU_KERNELS, to_numpy, use
from loading import ROOT, load_script
from reference import Reference
from rounding_reference import bits_at, nearest, seed_of, stochastic
from torch import Tensor, nn

import torchlamb
from torchlamb import rule
from torchlamb.backends import gpu

if not GPU_KERNELS:
    pytest.skip("runs in Triton's interpreter or on a GPU: see the Makefile", allow_module_level=True)

import triton
import triton.language as tl

from torchlamb.backends import gpu_kernels as k

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CHUNK = k.CHUNK.value
BENCHMARKS = ROOT / "benchmarks"


def parameter(*shape: int, offset: int = 0, dtype: torch.dtype = F32) -> nn.Parameter:
    """Random numbers, `offset` elements behind an address that is aligned."""
    numbers = torch.empty(offset + math.prod(shape), dtype=dtype)[offset:].view(shape)
    return nn.Parameter(numbers.copy_(torch.randn(shape)))


def unaligned_grad(p: Tensor, offset: int) -> Tensor:
    return torch.empty(offset + p.numel(), dtype=p.dtype)[offset:].view(p.shape).copy_(torch.randn(p.shape))


SIZES = (1, 1023, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_full_chunks_and_the_rest(case, dtype, monkeypatch):
    """Sizes about those of chunks and blocks; parameters and gradients that are aligned, and that are not."""
    use(monkeypatch, case)
    torch.manual_seed(0)
    params = [parameter(size, offset=i % 3, dtype=dtype) for i, size in enumerate(SIZES)]
    params += [parameter(0), parameter(3 * CHUNK, dtype=dtype), parameter(dtype=dtype)]
    options = {"lr": 0.02, "weight_decay": 0.1, "max_grad_norm": 1.0, "master_weights": dtype == BF16}
    reference = Reference([to_numpy(p) for p in params], [{**DEFAULTS, **options}] * len(params))
    optimizer = torchlamb.Lamb(params, **options, **case.options)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = unaligned_grad(p, (i + step) % 2)
        assert reference.step([to_numpy(p.grad) for p in params])
        optimizer.step()
    for i, p in enumerate(params):
        stored = optimizer.state[p].get("master", p)
        error = np.abs(to_numpy(stored) - reference.params[i])
        tolerances.largest_share(error, tolerances.of_param(reference, i, "float32"), p.shape)
        assert torch.equal(p, stored.to(p.dtype))
    for (ratio,), got in zip(reference.ratios, optimizer.trust_ratios().values(), strict=True):
        assert got.item() == pytest.approx(ratio[0], rel=1e-6)


def run(params: list[nn.Parameter], **options: Any) -> list[Tensor]:
    optimizer = torchlamb.Lamb(params, lr=0.1, weight_decay=0.1, fused=True, **options)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, device=DEVICE).to(p.dtype)
        optimizer.step()
    state = [value for p in params for _, value in sorted(optimizer.state[p].items())]
    return [*(p.detach() for p in params), *state, *optimizer.trust_ratios().values()]


@pytest.mark.parametrize(
    "options", [{}, {"stochastic_rounding": True, "state_dtype": BF16, "max_grad_norm": 1.0}, {"blocks": 2}], ids=str
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_one_launch_and_two_phases_give_the_same_bits(dtype, options, monkeypatch):
    torch.manual_seed(0)
    params = [parameter(*shape, dtype=dtype) for shape in ((40, 70), (2,), (2 * CHUNK,), (6, 5), (CHUNK + 2,))]
    first, second, third = (copy.deepcopy(params) for _ in range(3))
    monkeypatch.setattr(gpu, "WINDOW", 3000)  # so that rows of several windows overlap
    wanted = run(first, **options)
    monkeypatch.setattr(gpu, "ONE_LAUNCH", True)
    assert all(torch.equal(a, b) for a, b in zip(run(second, **options), wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(third, **options), wanted, strict=True)), "two runs differ"


def test_alignment_changes_sums_but_no_element():
    """With the same ratio, here 1, whether memory is aligned changes nothing."""
    torch.manual_seed(0)
    params = [parameter(2 * CHUNK + 3)]
    unaligned = [parameter(2 * CHUNK + 3, offset=1)]
    unaligned[0].data.copy_(params[0].data)
    got, wanted = (run(ps, layer_adaptation=False) for ps in (unaligned, params))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("capturable", [False, True])
def test_lr_on_the_device_is_read_at_each_step(capturable):
    params, twins = ([nn.Parameter(torch.linspace(1, 2, 6))] for _ in range(2))
    lr = torch.tensor(0.5)
    tensor = torchlamb.Lamb(params, lr=lr, fused=True, capturable=capturable)
    number = torchlamb.Lamb(twins, lr=0.5, fused=True)
    for value in (0.5, 0.25, 0.125):
        lr.fill_(value)
        number.param_groups[0]["lr"] = value
        for ps, optimizer in ((params, tensor), (twins, number)):
            ps[0].grad = torch.ones(6)
            optimizer.step()
    assert torch.equal(params[0], twins[0])


# Launches


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels, one for each launch."""
    names: list[str] = []
    for name in ("grad_sq_norms", "accumulate", "add_partials", "apply", "step"):
        kernel = getattr(k, name)
        real = kernel.run
        monkeypatch.setattr(
            kernel, "run", lambda *args, _name=name, _real=real, **kwargs: (names.append(_name), _real(*args, **kwargs))[1]
        )
    return names


@pytest.mark.parametrize("count", [2, 40])
def test_launches_do_not_depend_on_the_number_of_tensors(count, launches, monkeypatch):
    params = [parameter(CHUNK + 1 if i == 0 else 3) for i in range(count)]  # full chunks, and others
    two_phases = ["accumulate", "accumulate", "add_partials", "apply", "apply"]
    for options, one_launch, wanted in (
        ({}, False, two_phases),
        ({"max_grad_norm": 1.0}, False, ["grad_sq_norms", "grad_sq_norms", "add_partials", *two_phases]),
        ({}, True, ["step"]),
    ):
        monkeypatch.setattr(gpu, "ONE_LAUNCH", one_launch)
        optimizer = torchlamb.Lamb(params, fused=True, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        launches.clear()
        optimizer.step()
        assert launches == wanted


def test_nothing_is_launched_for_what_there_is_not(launches):
    p = parameter(4)
    optimizer = torchlamb.Lamb([p, parameter(0)], fused=True)
    p.grad = torch.ones(4)
    optimizer.step()
    assert launches == ["accumulate", "add_partials", "apply"]  # no full chunk


@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_steps_of_empty_tensors_are_counted(case, monkeypatch):
    use(monkeypatch, case)
    p = parameter(0, 3)
    optimizer = torchlamb.Lamb([p], **case.options)
    for _ in range(2):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.state[p]["step"].item() == 2


def test_numbers_of_other_types_are_those_numbers():
    """Written to a group later, and not checked by the constructor."""
    params, twins = ([nn.Parameter(torch.linspace(1, 2, 6))] for _ in range(2))
    odd, plain = (torchlamb.Lamb(ps, lr=0.5, fused=True) for ps in (params, twins))
    odd.param_groups[0].update(eps=np.float32(0), weight_decay=1, phi_bounds=(0, 10**10))
    plain.param_groups[0].update(eps=0.0, weight_decay=1.0, phi_bounds=(0.0, 1e10))
    for ps, optimizer in ((params, odd), (twins, plain)):
        ps[0].grad = torch.ones(6)
        optimizer.step()
    assert torch.equal(params[0], twins[0])


# Tensors of over 2^31 elements, of which only the last chunk has memory


@pytest.mark.parametrize("full", [False, True])
def test_offsets_of_64_bits(full):
    far = 2**31 // CHUNK + 7  # chunks before the one that is worked on
    count = CHUNK if full else 100
    torch.manual_seed(0)
    tensors = [torch.randn(count) for _ in range(3)] + [torch.rand(count)]  # param, grad, exp_avg, exp_avg_sq
    p, g, m, v = (t.clone() for t in tensors)
    step, sums, partials = torch.tensor(3.0), torch.zeros(1, 2), torch.zeros(1, 2)
    addresses = [t.data_ptr() - 4 * far * CHUNK for t in tensors]
    record = [far * CHUNK + count, *addresses, 0, step.data_ptr(), 0, 1, 0, 0, 0, 0]
    # The first chunk of the launch is number `far` of its row, and has the first slot.
    firsts = [-far, 1, 0, 0] if full else [-far, 0, 0, 1]
    table = torch.tensor([*firsts, *record])
    f32 = tl.float32
    kinds = k.Kinds(f32, f32, f32, f32, False, False, True, True, True, True)
    numbers = k.Numbers(0.1, 1.0, 0.9, 0.99, 0.1, 0.01, math.log(0.9), math.log(0.99), 1e-6, 0.01, 0.0, 1e30, 0.0, 1e30)
    k.accumulate[(1,)](table, 1, kinds, numbers, None, partials, full)
    sums.copy_(partials)
    step += 1
    k.apply[(1,)](table, 1, kinds, numbers, None, sums, full)
    s = rule.Scalars.from_group({**DEFAULTS, "lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.01})
    rule.advance_(g, m, v, s)
    u = rule.update(p, m, v, rule.bias_factors(4.0, s), s)
    for got, wanted in zip((*tensors[2:], partials[0]), (m, v, torch.stack([p.square().sum(), u.square().sum()])), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(tensors[0], p - 0.1 * p.norm() / u.norm() * u, rtol=1e-5, atol=1e-6)


# The rule and rounding, each by itself


@triton.jit
def ratios(sq_norms, kinds: tl.constexpr, numbers, out):
    row = tl.program_id(0)
    param_sq, update_sq = tl.load(sq_norms + 2 * row), tl.load(sq_norms + 2 * row + 1)
    tl.store(out + row, k._trust_ratio(param_sq, update_sq, kinds, numbers))


@pytest.mark.parametrize("layer_adaptation", [False, True])
@pytest.mark.parametrize(
    ("phi_bounds", "trust_ratio_bounds"), [(None, None), ((0.5, 3.0), None), (None, (0.1, 1.0)), ((0.0, 1e-3), (0.0, 1e-4))]
)
def test_the_ratio_is_that_of_the_rule(phi_bounds, trust_ratio_bounds, layer_adaptation):
    values = [0.0, 1e-45, 1e-38, 1e-6, 0.3, 1.0, 7.0, 1e6, 3e38, math.inf, math.nan]
    sq_norms = torch.tensor([(a, b) for a in values for b in values])
    group = {"phi_bounds": phi_bounds, "trust_ratio_bounds": trust_ratio_bounds, "layer_adaptation": layer_adaptation}
    wanted = rule.trust_ratio(sq_norms, rule.Scalars.from_group({**DEFAULTS, **group}))
    out = torch.empty(len(sq_norms))
    bounds = (*(phi_bounds or (0.0, math.inf)), *(trust_ratio_bounds or (0.0, math.inf)))
    kinds = k.Kinds(*[tl.float32] * 4, False, False, True, True, layer_adaptation, True)
    ratios[(len(sq_norms),)](sq_norms, kinds, k.Numbers(*[0.0] * 10, *bounds), out)
    torch.testing.assert_close(out, wanted, rtol=3e-7, atol=0, equal_nan=True)


@triton.jit
def factors(steps, kinds: tl.constexpr, numbers, out):
    row = tl.program_id(0)
    eps, scale = k._bias_factors(tl.load(steps + row), kinds, numbers)
    tl.store(out + 2 * row, eps)
    tl.store(out + 2 * row + 1, scale)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.99, 0.9999), (0.8, 0.999999)])
def test_bias_corrections_are_those_of_the_rule(betas):
    steps = [1, 2, 3, 5, 9, 10, 11, 99, 100, 101, 999, 1001, 9999, 10**5, 10**6, 2**24]
    s = rule.Scalars.from_group({**DEFAULTS, "betas": betas, "eps": 0.5})
    kinds = k.Kinds(*[tl.float32] * 4, False, False, True, True, True, True)
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    numbers = k.Numbers(*[0.0] * 6, *logs, 0.5, *[0.0] * 5)
    out = torch.empty(len(steps), 2)
    factors[(len(steps),)](torch.tensor(steps, dtype=F32), kinds, numbers, out)
    wanted = np.array([rule.bias_factors(float(t), s) for t in steps])
    np.testing.assert_allclose(to_numpy(out), wanted, rtol=5e-7)


@triton.jit
def roundings(x, noise, near, random, TYPE: tl.constexpr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    values = tl.load(x + lanes)
    tl.store(near + lanes, k._nearest(values, TYPE))
    tl.store(random + lanes, k._stochastic(values, tl.load(noise + lanes).to(tl.uint32)))


def test_rounding_of_any_number():
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 2**32, 2**14, dtype=np.uint64).astype(np.uint32)
    edges = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0xFF7FFFFF, 2**31]
    raw[: len(edges)] = edges
    x = torch.from_numpy(raw.view(np.float32).copy()).to(DEVICE)
    noise = torch.from_numpy(generator.integers(0, 2**16, 2**14)).to(DEVICE, torch.int32)
    low, random = (torch.empty(2**14, dtype=BF16) for _ in range(2))
    roundings[(1,)](x, noise, low, random, tl.bfloat16, 2**14)
    assert torch.equal(low.view(torch.int16)[~x.isnan()], x.to(BF16).view(torch.int16)[~x.isnan()])
    assert torch.equal(low.isnan(), x.isnan())
    finite = x.isfinite().cpu().numpy()
    values = to_numpy(x)[finite].astype(np.float32)
    assert np.array_equal(to_numpy(low)[finite], nearest(values, "bfloat16"))
    wanted = stochastic(values, noise.cpu().numpy()[finite].astype(np.uint64))
    assert np.array_equal(to_numpy(random)[finite], wanted)
    assert torch.equal(random.isnan(), x.isnan())
    assert torch.equal(random.isinf()[~x.isfinite()], x.isinf()[~x.isfinite()])


@triton.jit
def bits(table, record, steps, out, N: tl.constexpr):
    lanes = tl.arange(0, N)
    random = k._random_bits(table, record, tl.program_id(0), lanes, tl.load(steps))
    tl.store(out + lanes, random.to(tl.int64))


@pytest.mark.parametrize("first", [0, 2**32 - 3, 2**40])
@pytest.mark.parametrize("runs", [None, (5, 3)])
def test_random_bits_are_those_of_the_index_in_the_whole_tensor(runs, first):
    seed, n = torch.tensor(seed_of(7)), 64
    starts = [100 * i for i in range(n)] if runs else []
    length, stride = runs or (n, 1)
    table = torch.tensor([0] * 20 + starts)
    record = torch.tensor([n, *[0] * 6, seed.data_ptr(), 1, first, 20 if runs else 0, length, stride])
    out = torch.empty(n, dtype=torch.int64)
    bits[(1,)](table, record, torch.tensor(3.0), out, n)
    elements = np.arange(n, dtype=np.uint64)
    index = first + stride * elements
    if runs:
        index = first + 100 * (elements // length) + stride * (elements % length)
    assert np.array_equal(out.cpu().numpy().astype(np.uint64), bits_at(index.astype(np.uint64), seed_of(7), 3))


# What is run on a GPU at once


def test_checks_for_a_gpu_pass_in_the_interpreter(capsys):
    """Those that need no streams and graphs; and one that fails is said to have failed."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        check = load_script(BENCHMARKS / "gpu_check.py")
    finally:
        sys.path.remove(str(BENCHMARKS))
    check.ODD_SIZES[:] = [(1,), (CHUNK + 1,), (3, 5), (0,), ()]
    assert check.checked(lambda device: check.two_runs_give_the_same_bits(device, 2), DEVICE.type)
    assert check.checked(lambda device: check.one_launch_is_the_two_phases_under_load(device, 2), DEVICE.type)
    assert not check.checked(lambda _: 1 / 0, DEVICE.type)
    assert "FAILED" in capsys.readouterr().out
