"""The CPU's kernels: the same bits however they run, eager arithmetic's numbers, and what they refuse to touch."""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import functools
import importlib.resources
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import in_two_phases
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import HANGS, ROOT
from torch import nn

import torchlamb
from torchlamb import rule
from torchlamb.backends import cpu

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CSRC = ROOT / "src" / "torchlamb" / "backends" / "csrc"

cpu.library.load()


def set_isa(isa: str) -> str:
    """Have the loaded kernels use an instruction set, and return the one that the machine made of it."""
    path = importlib.resources.files("torchlamb.backends").joinpath("libtorchlamb_cpu.so")
    function = ctypes.CDLL(str(path)).torchlamb_set_isa  # loading it again gives the same library
    function.restype = ctypes.c_char_p
    return function(isa.encode()).decode()


ISAS = [isa for isa in cpu.ISAS if cpu.library.isa and set_isa(isa) == isa]
each_isa = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture(autouse=True)
def settings_restored(request):
    if not cpu.library.isa and "no_library" not in request.fixturenames:
        pytest.skip(f"no kernels, {cpu.library.why_not}")
    threads = torch.get_num_threads()
    if ISAS:
        set_isa(cpu.library.isa)
    yield
    torch.set_num_threads(threads)
    if ISAS:
        set_isa(cpu.library.isa)


@pytest.fixture
def no_library(monkeypatch):
    """A library that is not there, as where no compiler was."""
    library = cpu._Library()
    library.why_not, library.is_loaded = "they were left at home", True
    monkeypatch.setattr(cpu, "library", library)
    return library


def parameter(*shape, dtype=F32):
    p = nn.Parameter(torch.randn(shape).to(dtype))
    p.grad = torch.randn(shape).to(dtype)
    return p


def stored(params, optimizer):
    """Copies of all that a step writes, but for the count of skipped ones."""
    tensors = {(i, "param"): p.detach() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        tensors |= {(i, name): t for name, t in optimizer.state.get(p, {}).items() if name != "skipped"}
    return {key: t.clone() for key, t in tensors.items()}


def assert_same(got, wanted, what=""):
    assert got.keys() == wanted.keys()
    for key, t in wanted.items():
        assert got[key].dtype == t.dtype
        assert torch.equal(got[key], t), f"{key} {what}"


def make_optimizer(seed=0, size=40_001):
    """One whose steps are shared by threads."""
    torch.manual_seed(seed)
    params = [parameter(size), parameter(7, 5), parameter(3)]
    return params, torchlamb.Lamb(params, lr=0.02, weight_decay=0.1, fused=True)


def in_child(function, seconds=HANGS):
    """Call it in a forked process, and return its exit status: 0 where it returned true, 1 where not or where it raised."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            faulthandler.disable()
            code = 0 if function() else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "still running"


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


# Eager arithmetic


def laid_out(values, layout):
    """The same values in another layout of memory."""
    shape, dims = values.shape, values.dim()
    if layout == "offset":
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(shape)
    if dims == 0 or layout == "contiguous":
        return values.clone()
    if layout == "strided":
        return torch.empty((*shape[:-1], 2 * shape[-1]), dtype=values.dtype)[..., ::2].copy_(values)
    order = list(range(dims))[::-1] if layout == "transposed" else [0, *range(2, dims), 1][:dims]  # or channels last
    return values.permute(order).contiguous().permute([order.index(dim) for dim in range(dims)])


LAYOUTS = st.sampled_from(["contiguous", "transposed", "channels-last", "strided", "offset"])
TENSORS = st.fixed_dictionaries(
    {
        "shape": st.lists(st.integers(0, 9), max_size=2).map(tuple) | st.tuples(st.integers(1, 4), *[st.integers(0, 70)] * 2),
        "dtype": st.sampled_from([F32, BF16, F16]),
        "float32_grad": st.booleans(),
        "layout": LAYOUTS,
        "grad_layout": LAYOUTS,
        "scale": st.sampled_from([0.0, 0.01, 1.0, 30.0]),
        "has_grad": st.sampled_from([True, True, True, False]),
    }
)
BOUNDS = st.sampled_from([None, (0.0, 1.0), (0.5, 20.0)])
OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.001, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "phi_bounds": BOUNDS,
        "trust_ratio_bounds": BOUNDS,
        "bias_correction": st.booleans(),
        "grad_averaging": st.booleans(),
        "layer_adaptation": st.sampled_from([True, True, False]),
        "maximize": st.booleans(),
        "max_grad_norm": st.sampled_from([None, 0.5, 1e6]),
        "master_weights": st.booleans(),
    }
)


def grouped(params, blocks):
    cut = [p for p in params if p.dim() and p.shape[0] % blocks == 0]
    groups = [{"params": cut, "blocks": blocks}, {"params": [p for p in params if all(p is not q for q in cut)]}]
    return [group for group in groups if group["params"]]


def assert_close(got, wanted, old):
    """In float32 to some millionths of the path, in 16 bits to one unit in the last place."""
    info = torch.finfo(wanted.dtype)
    got, wanted, old = (t.detach().double().numpy() for t in (got, wanted, old))
    _, exponent = np.frexp(np.maximum(np.abs(got), np.abs(wanted)))
    ulp = info.eps * np.maximum(np.ldexp(1.0, exponent - 1), info.smallest_normal)
    # What is small beside the numbers that it is the difference of has the rounding of those.
    path, largest = np.max(np.abs(wanted - old), initial=0), np.max(np.abs(old), initial=0)
    assert np.all(np.abs(got - wanted) <= 1.001 * ulp + 3e-6 * path + 2.0**-24 * largest)


@settings(max_examples=60)
@given(st.lists(TENSORS, min_size=1, max_size=5), OPTIONS, st.sampled_from([1, 1, 2, 3]), st.integers(0, 2**30))
def test_kernels_do_what_eager_arithmetic_does(tensors, options, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    values = [(torch.randn(t["shape"], generator=generator) * t["scale"]).to(t["dtype"]) for t in tensors]
    ours = [nn.Parameter(laid_out(v, t["layout"])) for v, t in zip(values, tensors, strict=True)]
    eager = [nn.Parameter(v.clone()) for v in values]
    fused = torchlamb.Lamb(grouped(ours, blocks), fused=True, **options)
    single = torchlamb.Lamb(grouped(eager, blocks), foreach=False, **options)
    largest = [0.0] * len(tensors)  # of the gradients so far, whose sum, the first moment, can cancel
    for _ in range(3):
        for i, (p, q, t) in enumerate(zip(ours, eager, tensors, strict=True)):
            p.grad = q.grad = None
            p.grad_dtype = q.grad_dtype = F32 if t["float32_grad"] else t["dtype"]
            if t["has_grad"]:
                grad = torch.randn(p.shape, generator=generator).to(p.grad_dtype)
                p.grad, q.grad = laid_out(grad, t["grad_layout"]), grad
                largest[i] = max(largest[i], grad.abs().max().item() if grad.numel() else 0.0)
        before = [q.detach().clone() for q in eager]
        fused.step()
        single.step()
        for i, (p, q, old, t) in enumerate(zip(ours, eager, before, tensors, strict=True)):
            assert (p in fused.state) == (q in single.state) == t["has_grad"]
            assert_close(p.detach(), q.detach(), old)
            if not t["has_grad"]:
                assert torch.equal(p, old)
                continue
            for name, exact in single.state[q].items():
                close = fused.state[p][name]
                if name == "master":
                    assert_close(close, exact, old)
                else:
                    terms = exact.abs().amax().item() if exact.numel() else 0.0
                    terms = max(terms, largest[i]) if name == "exp_avg" else terms
                    torch.testing.assert_close(close, exact, rtol=1e-6, atol=2e-6 * terms)
                exact.copy_(close)  # both go on from here: a rounding that differs counts once
            q.data.copy_(p)
    for key, ratio in single.trust_ratios().items():
        few = eager[key].numel() // ratio.numel() < 4  # so that all of an update can cancel, and its norm with it
        torch.testing.assert_close(fused.trust_ratios()[key], ratio, rtol=1e-3 if few else 3e-6, atol=0)


def walled(values, dtype):
    """The values with a wall of other numbers before and behind them, and the whole."""
    whole = torch.full((values.numel() + 64,), 77.0, dtype=dtype)
    inside = whole[32 : 32 + values.numel()]
    return inside.copy_(values), whole


@each_isa
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_every_size_is_stepped_to_its_end_and_no_further(dtype, isa):
    set_isa(isa)
    torch.manual_seed(0)
    sizes = [*range(100), 511, 512, 513, 1023, 32_767, 32_768, 32_799]
    values = [torch.randn(size).to(dtype) for size in sizes]
    ours, wholes = zip(*(walled(v, dtype) for v in values), strict=True)
    params, eager = [nn.Parameter(t) for t in ours], [nn.Parameter(v.clone()) for v in values]
    wholes = list(wholes)
    fused = torchlamb.Lamb(params, lr=0.02, weight_decay=0.1, fused=True)
    single = torchlamb.Lamb(eager, lr=0.02, weight_decay=0.1, foreach=False)
    for step in range(2):
        for p, q in zip(params, eager, strict=True):
            q.grad = torch.randn(q.shape).to(dtype)
            p.grad = walled(q.grad, dtype)[0]
        fused.step()
        single.step()
        for state in fused.state.values() if step == 0 else ():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name], whole = walled(state[name], F32)
                wholes.append(whole)
    for p, q, v in zip(params, eager, values, strict=True):
        assert_close(p, q, v)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(fused.state[p][name], single.state[q][name], rtol=1e-6, atol=1e-7)
    for whole in wholes:
        assert (whole[:32] == 77).all()
        assert (whole[-32:] == 77).all()
    ratios, exact = (torch.stack([*optimizer.trust_ratios().values()]) for optimizer in (fused, single))
    torch.testing.assert_close(ratios, exact, rtol=2e-6 if dtype is F32 else 1e-2, atol=0)


# Norms and ratios


def exact_update(old, state, decay):
    """In float64, after a first step with the default betas and eps."""
    m, v = (state[name].double().numpy() for name in ("exp_avg", "exp_avg_sq"))
    return m / (1 - 0.9) / (np.sqrt(v / (1 - 0.999)) + 1e-6) + decay * old.double().numpy()


@each_isa
def test_ratio_of_a_tensor_of_very_uneven_sizes(isa):
    set_isa(isa)
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3_000_001).mul_(0.01))
    p.data[torch.randperm(p.numel())[:100]] = 1000.0
    old, p.grad = p.detach().clone(), torch.randn(p.shape)
    optimizer = torchlamb.Lamb([p], lr=0.1, weight_decay=0.1, fused=True)
    optimizer.step()
    update = exact_update(old, optimizer.state[p], 0.1)
    wanted = np.sqrt(np.square(old.double().numpy()).sum()) / np.sqrt(np.square(update).sum())
    assert optimizer.trust_ratios()[0].item() == pytest.approx(wanted, rel=1e-6)


@each_isa
def test_gradient_norm_of_very_uneven_sizes(isa):
    """Seen through the clipped first moment."""
    set_isa(isa)
    torch.manual_seed(0)
    p = nn.Parameter(torch.ones(3_000_001))
    p.grad = torch.randn(p.shape).mul_(0.01)
    p.grad[::30_011] = 1000.0
    optimizer = torchlamb.Lamb([p], lr=0.0, betas=(0.0, 0.0), max_grad_norm=1.0, fused=True)
    optimizer.step()
    norm = np.sqrt(np.square(p.grad.double().numpy()).sum())
    assert optimizer.state[p]["exp_avg"][0].item() * norm == pytest.approx(1000.0, rel=1e-6)


@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"phi_bounds": (0.5, 3.0)},
        {"trust_ratio_bounds": (0.1, 1.0), "weight_decay": 0.1},
        {"phi_bounds": (0.5, 3.0), "trust_ratio_bounds": (0.1, 1.0)},
        {"phi_bounds": (2.0, 2.0)},
        {"state_dtype": BF16},
        {"layer_adaptation": False, "phi_bounds": (0.5, 3.0), "weight_decay": 0.1},
    ],
    ids=str,
)
def test_movement_is_lr_times_the_rules_ratio_times_the_update(options, phases, monkeypatch):
    if phases == 2:
        in_two_phases(monkeypatch)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(33, 7) * 10.0**size) for size in range(-4, 4)]
    zero, still = nn.Parameter(torch.zeros(9)), nn.Parameter(torch.randn(9))
    params += [zero, still]
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape) * 10.0 ** (i % 3) if p is not still else torch.zeros(9)
    before = [p.detach().clone() for p in params]
    optimizer = torchlamb.Lamb(params, lr=0.1, fused=True, **options)
    optimizer.step()
    ((indices, scalars, sq_norms, *_),) = optimizer._last.buckets
    assert indices == list(range(len(params)))
    updates = [exact_update(old, optimizer.state[p], scalars.weight_decay) for p, old in zip(params, before, strict=True)]
    exact = [[old.double().square().sum().item(), np.square(u).sum()] for old, u in zip(before, updates, strict=True)]
    torch.testing.assert_close(sq_norms.double(), torch.tensor(exact, dtype=F64), rtol=2e-6, atol=0)
    ratios = rule.trust_ratio(sq_norms, scalars)
    assert ratios[8] == 1
    if not options.get("weight_decay"):
        assert ratios[9] == 1
        assert torch.equal(still, before[9])
    for p, old, ratio, u in zip(params, before, ratios, updates, strict=True):
        move = 0.1 * ratio.double().item() * u
        error = np.abs(p.detach().double().numpy() - (old.double().numpy() - move))
        assert np.all(error <= 1e-6 * np.abs(move) + 2.0**-24 * np.abs(p.detach().double().numpy()) + 1e-12)


# What cannot be stepped is refused, and nothing has changed


def resized(p, _):
    p.grad = None
    p.data = torch.ones(5, 8, dtype=p.dtype)
    p.grad = torch.ones_like(p)


def moment_on_meta(_, state):
    state["exp_avg"] = torch.zeros(4, 3, device="meta")


def moment_of_another_shape(_, state):
    state["exp_avg"] = torch.zeros(3)


def master_of_another_shape(_, state):
    state["master"] = torch.zeros(2, 3)


def freed(p, _):
    p.untyped_storage().resize_(0)


def freed_moment(_, state):
    state["exp_avg_sq"].untyped_storage().resize_(0)


def step_on_meta(_, state):
    state["step"] = torch.zeros((), device="meta")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (resized, r"parameter 1 of group 0 has shape \(5, 8\).*exp_avg \(4, 3\).*needs a new optimizer"),
        (moment_on_meta, "meta"),
        (moment_of_another_shape, r"shape \(4, 3\).*exp_avg \(3,\)"),
        (master_of_another_shape, r"shape \(4, 3\).*master \(2, 3\)"),
        (freed, "parameter 1 is larger than its storage"),
        (freed_moment, "parameter 1 is larger than its storage"),
        (step_on_meta, "meta"),
    ],
)
@pytest.mark.parametrize("phases", [1, 2])
def test_garbage_is_refused(spoil, message, phases, monkeypatch):
    if phases == 2:
        in_two_phases(monkeypatch)
    params = [parameter(6, dtype=BF16), parameter(4, 3, dtype=BF16), parameter(2, 2, dtype=BF16)]
    optimizer = torchlamb.Lamb(params, lr=0.1, master_weights=True, fused=True)
    optimizer.step()
    others = [params[0], params[2]]
    spoil(params[1], optimizer.state[params[1]])
    before = stored(others, optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same(stored(others, optimizer), before)


def test_garbage_in_a_later_bucket_is_refused_before_the_first_steps():
    params = [parameter(6), parameter(4, 3, dtype=BF16)]
    optimizer = torchlamb.Lamb(params, lr=0.1, fused=True)
    optimizer.step()
    moment_of_another_shape(params[1], optimizer.state[params[1]])
    before = stored(params[:1], optimizer)
    with pytest.raises(RuntimeError, match="shape"):
        optimizer.step()
    assert_same(stored(params[:1], optimizer), before)


def test_lazily_negated_gradients_are_negated():
    p = nn.Parameter(torch.ones(5))
    p.grad = torch._neg_view(torch.ones(5))  # as the imaginary part of a lazily conjugated tensor is
    torchlamb.Lamb([p], lr=0.1, fused=True).step()
    torch.testing.assert_close(p.detach(), torch.full((5,), 1.1))


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": False}], ids=str)
def test_lazily_conjugated_gradients_are_stepped_with(options):
    p = nn.Parameter(torch.ones(5, dtype=torch.complex64))
    p.conj().backward(torch.full((5,), 1 + 1j))
    assert p.grad.is_conj()
    torchlamb.Lamb([p], lr=0.1, **options).step()


@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("blocks", [1, 2])
def test_autograd_notices_that_parameters_changed(phases, blocks, monkeypatch):
    """A step between forward and backward is an error, as with every operation in place."""
    if phases == 2:
        in_two_phases(monkeypatch)
    p = parameter(4, 3)
    loss = p.square().sum()
    torchlamb.Lamb([p], fused=True, blocks=blocks).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_empty_tensors_have_no_memory():
    p = nn.Parameter(torch.ones(4)[4:])
    p.untyped_storage().resize_(0)
    p.grad = torch.ones(0)
    optimizer = torchlamb.Lamb([p], fused=True)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 1.0


def freed_unaligned(p, _):
    p.data = torch.ones(13, dtype=p.dtype)[1:].view(4, 3)
    p.untyped_storage().resize_(0)


def shrunk(p, _):
    p.untyped_storage().resize_(4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("spoil", [freed_unaligned, shrunk])
def test_what_would_write_outside_of_tensors_is_refused(spoil):
    """In a process of its own, which may not survive it."""
    params = [parameter(4, 3, dtype=BF16)]
    optimizer = torchlamb.Lamb(params, lr=0.1, master_weights=True, fused=True)
    optimizer.step()

    def child():
        spoil(params[0], optimizer.state[params[0]])
        try:
            optimizer.step()
        except RuntimeError:
            return True
        return False

    assert in_child(child) == 0


def test_masters_and_counts_of_another_dtype_are_brought_back():
    p = parameter(4, 3, dtype=BF16)
    optimizer = torchlamb.Lamb([p], lr=0.1, master_weights=True, fused=True)
    optimizer.step()
    optimizer.state[p]["master"] = optimizer.state[p]["master"].bfloat16()
    optimizer.state[p]["step"] = torch.tensor(1, dtype=torch.int16)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 2.0
    assert all(optimizer.state[p][name].dtype == F32 for name in ("step", "master"))


def test_unknown_instructions_are_refused_each_time(monkeypatch):
    monkeypatch.setenv("TORCHLAMB_CPU_ISA", "sse9")
    library = cpu._Library()
    for _ in range(2):
        with pytest.raises(ValueError, match="TORCHLAMB_CPU_ISA"):
            library.load()


# Processes and threads


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from Python 3.12 on, of a fork beside threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_child_steps():
    torch.set_num_threads(2)
    params, optimizer = make_optimizer()
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twins = twin.param_groups[0]["params"]
    for p, q in zip(params, twins, strict=True):
        q.grad = p.grad.clone()
    twin.step()
    twin.step()
    wanted = [q.detach().numpy() for q in twins]
    torch.equal(params[0], params[0])

    def child():
        optimizer.step()
        optimizer.step()
        return all(np.array_equal(p.detach().numpy(), w) for p, w in zip(params, wanted, strict=True))

    assert in_child(child) == 0
    optimizer.step()  # and the parent goes on with its threads
    optimizer.step()
    assert all(np.array_equal(p.detach().numpy(), w) for p, w in zip(params, wanted, strict=True))


def test_steps_within_a_parallel_region():
    """Each of torch's threads steps an optimizer of its own."""
    torch.set_num_threads(2)
    pairs = [make_optimizer(seed) for seed in range(4)]
    wanted = []
    for seed in range(4):
        params, optimizer = make_optimizer(seed)
        optimizer.step()
        wanted.append(stored(params, optimizer))
    failures = []

    def steps(begin, end, _):
        try:
            for i in range(begin, end):
                pairs[i][1].step()
        except Exception as error:  # ctypes would drop it
            failures.append(error)

    body_type = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    number = ctypes.c_int64
    parallel_for = ctypes.CFUNCTYPE(ctypes.c_int32, number, number, number, body_type, ctypes.c_void_p)(
        cpu.library.parallel_for
    )
    assert parallel_for(0, 4, 1, body_type(steps), None) == 0
    assert failures == []
    for (params, optimizer), result in zip(pairs, wanted, strict=True):
        assert_same(stored(params, optimizer), result)


def test_optimizers_on_threads_of_their_own():
    torch.set_num_threads(2)
    wanted = []
    for seed in range(4):
        params, optimizer = make_optimizer(seed)
        for _ in range(20):
            optimizer.step()
        wanted.append(stored(params, optimizer))
    pairs = [make_optimizer(seed) for seed in range(4)]
    threads = [threading.Thread(target=lambda o=o: [o.step() for _ in range(20)]) for _, o in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (params, optimizer), result in zip(pairs, wanted, strict=True):
        assert_same(stored(params, optimizer), result)


# Which backend


@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.complex64], ids=str)
def test_fused_is_honoured(dtype):
    p = parameter(3, 2, dtype=dtype)
    optimizer = torchlamb.Lamb([p], fused=True)
    assert f"cpu (fused=True: was asked for, with {cpu.library.isa} instructions)" in repr(optimizer)
    optimizer.step()
    assert [backend for backend, _ in optimizer._resolve()[0]] == [cpu]


def test_kernels_are_the_default_and_can_be_refused():
    params = [parameter(3), parameter(2, dtype=BF16)]
    assert {backend for backend, _ in torchlamb.Lamb(params)._resolve()[0]} == {cpu}
    for options in ({"fused": False}, {"foreach": True}, {"foreach": False}):
        assert cpu not in {backend for backend, _ in torchlamb.Lamb(params, **options)._resolve()[0]}


@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_what_has_no_kernels_is_refused_where_it_is_given(dtype):
    remedy = "fused=True: no kernels, they have no float64; leave fused=None"
    with pytest.raises(RuntimeError, match=remedy):
        torchlamb.Lamb([parameter(3), parameter(3, dtype=dtype)], fused=True)
    optimizer = torchlamb.Lamb([parameter(3)], fused=True)
    with pytest.raises(RuntimeError, match=remedy):
        optimizer.add_param_group({"params": [parameter(3, dtype=dtype)]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [parameter(3, dtype=dtype)], "fused": None})
    optimizer.step()


def test_gradients_without_kernels_are_refused_before_anything_changes():
    params = [parameter(3), parameter(3)]
    optimizer = torchlamb.Lamb(params, fused=True)
    optimizer.step()
    params[1].grad = None
    params[1].grad_dtype = F64
    params[1].grad = torch.ones(3, dtype=F64)
    before = stored(params, optimizer)
    with pytest.raises(RuntimeError, match="fused=True: no kernels, they have no float64"):
        optimizer.step()
    assert_same(stored(params, optimizer), before)


def test_fused_excludes_what_contradicts_it():
    with pytest.raises(RuntimeError, match="foreach=True and fused=True exclude each other"):
        torchlamb.Lamb([parameter(3)], foreach=True, fused=True)
    with pytest.raises(RuntimeError, match="fused=True cannot be differentiated"):
        torchlamb.Lamb([parameter(3).clone()], fused=True, differentiable=True)


def test_without_a_library_fused_is_refused(no_library):
    with pytest.raises(RuntimeError, match=f"fused=True: no kernels, {no_library.why_not}; leave fused=None"):
        torchlamb.Lamb([parameter(3)], fused=True)


def test_without_a_library_the_others_step(no_library):
    torch.manual_seed(0)
    p = parameter(3)
    twin = copy.deepcopy(p)
    twin.grad = p.grad.clone()
    optimizer = torchlamb.Lamb([p])
    assert f"foreach (no kernels, {no_library.why_not};" in repr(optimizer)
    optimizer.step()
    torchlamb.Lamb([twin], foreach=True).step()
    assert torch.equal(p, twin)


def fresh_library():
    library = cpu._Library()
    library.load()
    return library


def test_lowest_instructions_are_had_when_asked_for(monkeypatch):
    monkeypatch.setenv("TORCHLAMB_CPU_ISA", "baseline")
    assert fresh_library().isa == "baseline"


def test_unknown_instructions_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHLAMB_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="must be one of baseline, avx2, avx512, got 'sse9'"):
        fresh_library()


def test_kernels_of_another_version_are_refused(monkeypatch):
    monkeypatch.setattr(cpu, "ABI", cpu.ABI + 1)
    library = fresh_library()
    assert library.isa == ""
    assert "another version" in library.why_not


def test_library_that_is_missing_or_broken_is_told(monkeypatch, tmp_path, no_library):  # noqa: ARG001
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    library = fresh_library()
    if "does not share its threads" in library.why_not:
        pytest.skip(library.why_not)
    assert (library.isa, "not built" in library.why_not) == ("", True)
    (tmp_path / "libtorchlamb_cpu.so").write_text("no library")
    library = fresh_library()
    assert (library.isa, "cannot be loaded" in library.why_not) == ("", True)


# Compiled


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
@pytest.mark.parametrize(("dtype", "options"), [(F32, {"blocks": 2}), (BF16, {"master_weights": True})], ids=["f32", "masters"])
def test_compiled_step_calls_the_kernels(dtype, options, capturable):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    torch._dynamo.reset()
    graphs = []

    def compiler(graph, _):
        graphs.append(str(graph.graph))
        return make_boxed_func(graph.forward)

    torch.manual_seed(0)
    params = [parameter(40, 3, dtype=dtype), parameter(6, dtype=dtype)]
    twins = copy.deepcopy(params)
    lamb, eager = (
        torchlamb.Lamb(ps, lr=torch.tensor(0.02), capturable=capturable, fused=True, **options) for ps in (params, twins)
    )
    compiled = torch.compile(lamb.step, backend=aot_autograd(fw_compiler=compiler))
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        compiled()
        eager.step()
    assert any("torchlamb.lamb_" in graph for graph in graphs)
    assert_same(stored(params, lamb), stored(twins, eager))


def test_op_is_what_it_declares():
    p, *moments = (torch.rand(2, 5) for _ in range(3))
    numbers = [0.9, 0.999, 1e-6, 0.1, 0.0, float("inf"), 0.0, float("inf")]
    lists = [[p], [torch.rand(2, 5)], [moments[0]], [moments[1]], [], [torch.ones(())], [], []]
    scalars = [torch.tensor(0.1, dtype=F64), torch.tensor(1.0), None]
    arguments = (3, *lists, [], torch.zeros(1, 2), *scalars, numbers, 7)
    torch.library.opcheck(torch.ops.torchlamb.lamb_.default, arguments)


# Loss scaling


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("guard", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_scaled_gradients_are_unscaled_and_skipped(dtype, guard):
    torch.manual_seed(0)
    params = [parameter(40, dtype=dtype), parameter(3, 3, dtype=dtype)]
    twins = copy.deepcopy(params)
    scaled, plain = (torchlamb.Lamb(ps, lr=0.1, fused=True, **guard) for ps in (params, twins))
    assert scaled._step_supports_amp_scaling
    for overflow in (True, False, True, False):
        for p, q in zip(params, twins, strict=True):
            q.grad = torch.randn(q.shape).to(dtype)
            p.grad = q.grad * 64
        if overflow:
            params[0].grad[3] = torch.inf
        before = stored(params, scaled)
        scaled.grad_scale, scaled.found_inf = torch.tensor([64.0]), torch.tensor([float(overflow)])
        scaled.step()
        if not overflow:
            plain.step()
            assert_same(stored(params, scaled), stored(twins, plain))
        else:
            after = stored(params, scaled)
            assert_same({key: after[key] for key in before}, before)
            assert all(state["step"].item() == len(before.keys() & {(0, "step")}) for state in scaled.state.values())


# Memory


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path):
    """No access outside a tensor and no undefined behaviour: what `make sanitize` runs."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if shutil.which("cmake") is None or compiler is None:
        pytest.skip("no cmake or no g++")
    found = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, timeout=HANGS, check=False
    )
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip(f"{compiler} has no libasan.so")
    options = ["-DTORCHLAMB_SANITIZE=ON", f"-DCMAKE_CXX_COMPILER={compiler}"]
    build = tmp_path / "sanitized"
    subprocess.run(["cmake", "-S", CSRC, "-B", build, *options], timeout=HANGS, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], timeout=HANGS, check=True, capture_output=True)
    script = Path(__file__).with_name("sanitized_kernels.py")
    environment = {**os.environ, "LD_PRELOAD": str(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, script, build / "libtorchlamb_cpu.so"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "baseline: " in done.stdout
