"""Random bits, and the rounding that they decide: the same however the work is cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases import (
    LONG_BACKEND_PARAMS,
    make_params,
    set_grads,
    use,
)
from rounding_reference import bits_at, random_bits, seed_of
from storing import BF16, STORAGE
from torch import Tensor, nn

import torchlamb
from torchlamb import precision
from torchlamb.sharding.place import Place

# The generator


def test_random_bits_are_the_documented_ones():
    for position, step in itertools.product((0, 1, 200), (1, 2, 10**6)):
        seed = precision.seed_of(position)
        assert 0 <= seed < 2**63
        wanted = random_bits(seed, (1000,), step)
        for as_number in (lambda x: x, torch.tensor):
            got = precision.random_bits(torch.arange(1000), precision.keys(as_number(seed), as_number(step)))
            assert np.array_equal(got.numpy().astype(np.uint64), wanted)
    assert all(precision.seed_of(position) == seed_of(position) for position in (0, 1, 1000))
    far = np.array([5, 5 + 2**32, 7 + 2**40, 2**45 - 1], dtype=np.uint64)
    got = precision.random_bits(torch.from_numpy(far.astype(np.int64)), precision.keys(precision.seed_of(0), 1))
    assert np.array_equal(got.numpy().astype(np.uint64), bits_at(far, precision.seed_of(0), 1))


def test_random_bits_are_spread_evenly_and_do_not_depend_on_each_other():
    """Every statistic here is normal with the deviation it is divided by; 5 of them would come up once in two million."""
    n = 200_000
    streams = [
        random_bits(precision.seed_of(position), (n,), step).astype(np.int64) for position in (0, 1) for step in (1, 2, 3)
    ]
    halves = [half for bits in streams for half in (bits >> 16, bits & 0xFFFF)]
    for half in halves:
        assert abs(half.mean() - (2**16 - 1) / 2) < 5 * 2**16 / (12 * n) ** 0.5
        counts = np.bincount(half >> 8, minlength=256)
        assert abs(((counts - n / 256) ** 2).sum() / (n / 256) - 255) < 5 * (2 * 255) ** 0.5
        for lag in (1, 2, 64, 1024):
            assert abs(np.corrcoef(half[lag:], half[:-lag])[0, 1]) < 5 / n**0.5
    for a, b in itertools.combinations(halves, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / n**0.5
    for bit in range(32):
        assert abs(((streams[0] >> bit) & 1).mean() - 0.5) < 5 * 0.5 / n**0.5, bit


@pytest.mark.parametrize("share", [0.0, 0.125, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_has_the_right_mean_and_variance(share, sign):
    n = 200_000
    unit = 2.0**-7  # between 1 and 2
    x = torch.full((n,), sign * (1.25 + share * unit))
    bits = precision.random_bits(torch.arange(n), precision.keys(precision.seed_of(7), 3))
    up = (precision.to_bfloat16(x, precision.param_bits(bits)).double() - sign * 1.25) / (sign * unit)
    assert set(up.unique().tolist()) <= {0.0, 1.0}
    cut_off = (x[0].double().item() - sign * 1.25) / (sign * unit)
    variance = cut_off * (1 - cut_off)
    assert abs(up.mean().item() - cut_off) <= 5 * (variance / n) ** 0.5
    assert abs(up.var(correction=0).item() - variance) <= 5 * (variance / n) ** 0.5
    assert share > 0 or up.sum() == 0


def test_what_is_not_finite_stays():
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.3e38])
    payload = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    for bits in (0, 1, 2**16 - 1):
        assert precision.to_bfloat16(payload, torch.full((3,), bits)).isnan().all()
        got = precision.to_bfloat16(special, torch.full((6,), bits))
        assert torch.equal(got[:2], special[:2].bfloat16())
        assert got[2].isnan()
        assert torch.equal(got[3:5].view(torch.int16), special[3:5].bfloat16().view(torch.int16))
    assert torch.equal(precision.to_bfloat16(-special.nan_to_num(), torch.tensor(5)), -special.nan_to_num().bfloat16())


@pytest.mark.parametrize("case", LONG_BACKEND_PARAMS)
def test_small_steps_are_lost_to_nearest_and_kept_on_average(case, monkeypatch):
    """Steps of a tenth of what rounding to nearest can see."""
    use(monkeypatch, case)
    lr, n, steps = 2.0**-8 / 20, 4000, 320
    ends = {}
    for name in ("nothing", "stochastic", "masters"):
        p = nn.Parameter(torch.full((n,), 1.5, dtype=BF16))
        options = {"lr": lr, "layer_adaptation": False, "eps": 0.0, "betas": (0.5, 0.5)}
        optimizer = torchlamb.Lamb([p], **options, **STORAGE[name], **case.options)
        p.grad = torch.ones_like(p)
        for _ in range(steps):
            optimizer.step()
        ends[name] = p.detach().double()
    wanted = 1.5 - steps * lr
    assert torch.all(ends["nothing"] == 1.5)
    # Each step adds a variance of at most (share cut off) x unit^2, with units of 2^-7 above 1.
    deviation = (steps * lr * 2.0**-7) ** 0.5
    assert abs(ends["stochastic"].mean().item() - wanted) < 5 * deviation / n**0.5
    assert 0.2 * deviation < ends["stochastic"].std().item() < 1.2 * deviation
    assert torch.all((ends["masters"] - wanted).abs() <= 2.0**-8)


def brute_force(place: Place, tensor: Tensor) -> Tensor:
    grids = []
    for start, size in zip(place.starts, tensor.shape, strict=True):
        grids.append(torch.arange(start, start + size) if isinstance(start, int) else start)
    whole = torch.arange(int(np.prod(place.shape, dtype=np.int64))).view(place.shape)
    for dim, grid in enumerate(grids):
        whole = whole.index_select(dim, grid)
    return whole


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
@pytest.mark.parametrize(
    "starts",
    [(0, 0, 0), (2, 0, 0), (0, 1, 0), (1, 0, 3), (torch.tensor([0, 1, 4]), 0, 0), (0, torch.tensor([0, 3, 4]), 2)],
    ids=str,
)
def test_places_give_the_index_in_the_whole_tensor(starts, order):
    place = Place((6, 7, 8), starts)
    sizes = [3, 3, 5]
    memory = [sizes[dim] for dim in order]
    tensor = torch.empty(memory).permute([order.index(dim) for dim in range(3)])
    assert list(tensor.shape) == sizes
    runs = place.runs(tensor)
    got = torch.cat([runs.indices(first, min(first + 7, 45), tensor.device) for first in range(0, 45, 7)])
    assert torch.equal(got.view(memory).permute([order.index(dim) for dim in range(3)]), brute_force(place, tensor))
    assert torch.equal(
        place.narrow(1, 2).runs(tensor[1:]).indices(0, 30, tensor.device).sort().values,
        brute_force(place, tensor)[1:].flatten().sort().values,
    )


def test_whole_tensors_are_one_run():
    runs = Place.of_whole(torch.empty(4, 5, 6)).runs(torch.empty(4, 5, 6))
    assert (runs.first, runs.starts, runs.length, runs.stride) == (0, None, 120, 1)
    assert Place.of_whole(torch.empty(())).runs(torch.empty(())).indices(0, 1, torch.device("cpu")).tolist() == [0]
    assert Place.of_whole(torch.empty(3, 0)).runs(torch.empty(3, 0)).indices(0, 0, torch.device("cpu")).tolist() == []


KEYED = [STORAGE["stochastic-bf16-state"], STORAGE["masters-bf16-state"], STORAGE["stochastic"]]


@pytest.mark.parametrize("storage", KEYED, ids=str)
@pytest.mark.parametrize("foreach", [False, True])
def test_bits_do_not_depend_on_threads_and_pieces(storage, foreach, monkeypatch):
    """Without norms, all arithmetic is by element: however the work is cut, the result has to be the same."""
    ends = []
    threads = torch.get_num_threads()
    for pieces in (7, 16, 2**20):
        monkeypatch.setattr("torchlamb.precision.PIECE_PER_THREAD", pieces)
        monkeypatch.setattr("torchlamb.backends.foreach.BATCH", pieces)
        torch.set_num_threads(1 if pieces == 7 else threads)
        torch.manual_seed(0)
        params = make_params("transposed", BF16, {})
        optimizer = torchlamb.Lamb(params.items(), lr=0.01, layer_adaptation=False, foreach=foreach, **storage)
        for step in range(6):
            set_grads(params, step)
            optimizer.step()
        ends.append([p.detach().clone() for p in params.values()])
    torch.set_num_threads(threads)
    for others in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], others, strict=True))
