"""What is stored in low precision and how it is rounded: each against a reference that rounds at the same places."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from cases import (
    BACKEND_PARAMS,
    DEFAULTS,
    FORMS,
    GPU_KERNELS,
    LAYOUT_FORMS,
    LAYOUTS,
    LONG_BACKEND_PARAMS,
    OPTIONS,
    PLAIN_FORMS,
    SEED,
    make_params,
    name_of,
    set_grads,
    to_numpy,
    use,
)
from reference import Reference
from rounding_reference import bits_at, nearest, random_bits, seed_of, stochastic
from torch import Tensor, nn

import torchlamb
from torchlamb import precision
from torchlamb.sharding.place import Place

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LOW = (BF16, FP16)
STORAGE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "masters": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True},
    "bf16-state": {"state_dtype": BF16},
    "fp32-state": {"state_dtype": FP32},
    "masters-bf16-state": {"master_weights": True, "state_dtype": BF16},
    "stochastic-bf16-state": {"stochastic_rounding": True, "state_dtype": BF16},
}
# Parameter and gradient, each with what they can be stored as.
COMBINATIONS = [
    pytest.param(param, grad, options, id=f"{str(param)[6:]}-{str(grad)[6:]}-{name}")
    for param, grad in [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32), (FP32, BF16), (FP64, FP64)]
    for name, options in STORAGE.items()
    if not (param is FP64 and GPU_KERNELS)
    if not (param is FP16 and "stochastic_rounding" in options)
    if not (param in (FP32, FP64) and name in ("masters", "stochastic", "masters-bf16-state"))  # nothing of theirs is rounded
]
GROUP = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.05}
STEPS = 8


def set_grads_in(params: dict[str, nn.Parameter], step: int, dtype: torch.dtype) -> None:
    """Give the parameters gradients of that dtype, be it another than their own."""
    for p in params.values():
        p.grad = None
        p.grad_dtype = p.dtype
    set_grads(params, step)
    for p in params.values():
        grad, p.grad = p.grad, None
        p.grad_dtype = dtype
        p.grad = None if grad is None else grad.to(dtype)


class Rounded:
    """The reference's `store`: what is stored in 16 bits is checked to be rounded rightly, and gone on from."""

    def __init__(self, params: dict[str, nn.Parameter], optimizer: torchlamb.Lamb, options: dict[str, Any]) -> None:
        self.seeds = [seed_of(i) for i in range(len(params))]
        self.params, self.optimizer, self.options = list(params.items()), optimizer, options
        values = {**DEFAULTS, **options, "lr": float(options["lr"])}
        self.reference = Reference([to_numpy(p) for p in params.values()], [values] * len(params), self)

    def __call__(self, name: str, i: int, t: int, a: np.ndarray) -> np.ndarray:
        label, p = self.params[i]
        state = self.optimizer.state[p]
        stored = p.detach() if name == "param" else state[name]
        if name == "param" and "master" in state:
            assert torch.equal(p, state["master"].to(p.dtype)), label
            return a
        if stored.dtype not in LOW:
            # Of float64, moments are float32 where that is asked for.
            return (
                a if name == "param" or stored.dtype is p.dtype or p.dtype in LOW else a.astype(np.float32).astype(np.float64)
            )
        got = to_numpy(stored)
        error = (
            tolerances.of_last_step(self.reference, i, "float32")
            if name == "param"
            else tolerances.of_moment(self.reference, name, i, "float32")
        )
        tolerances.assert_rounded(got, a, error, lambda a: self._rounded(name, i, t, a), f"{name} of {label}")
        return got

    def _rounded(self, name: str, i: int, t: int, a: np.ndarray) -> np.ndarray:
        bits = random_bits(self.seeds[i], a.shape, t)
        if name == "param":
            if self.options.get("stochastic_rounding"):
                return stochastic(a, bits >> np.uint64(16))
            return nearest(a, name_of(self.params[i][1].dtype))
        return nearest(a, "bfloat16") if name == "exp_avg" else stochastic(a, bits & np.uint64(0xFFFF))


def check_arithmetic(reference: Reference, optimizer: torchlamb.Lamb, params: dict[str, nn.Parameter]) -> None:
    """Check what is not rounded to 16 bits: parameters or their masters, moments, and ratios."""
    ratios = optimizer.trust_ratios()
    for i, (name, p) in enumerate(params.items()):
        state = optimizer.state.get(p, {})
        if not state:
            continue
        stored = state.get("master", p)
        precise = "float64" if p.dtype is FP64 and optimizer.param_groups[0]["state_dtype"] is not FP32 else "float32"
        for got, wanted in zip(ratios[name].reshape(-1).tolist(), reference.ratios[i], strict=True):
            tolerances.assert_ratio(got, wanted, precise, name)
        if stored.dtype not in LOW:
            error = np.abs(to_numpy(stored) - reference.params[i])
            tolerances.largest_share(error, tolerances.of_param(reference, i, precise), name)
        for key, moments in (("exp_avg", reference.exp_avgs), ("exp_avg_sq", reference.exp_avg_sqs)):
            error = np.abs(to_numpy(state[key]) - moments[i])
            tolerance = 0.0 if state[key].dtype is BF16 else tolerances.of_moment(reference, key, i, name_of(state[key].dtype))
            tolerances.largest_share(error, np.broadcast_to(tolerance, error.shape), f"{key} of {name}")


def run(case, param_dtype, grad_dtype, layout, options) -> None:
    torch.manual_seed(SEED)
    params = make_params(layout, param_dtype, options)
    optimizer = torchlamb.Lamb(params.items(), **options, **case.options)
    rounded = Rounded(params, optimizer, {**DEFAULTS, **options})
    for step in range(STEPS):
        set_grads_in(params, step, grad_dtype)
        optimizer.step()
        assert rounded.reference.step([None if p.grad is None else to_numpy(p.grad) for p in params.values()])
    check_arithmetic(rounded.reference, optimizer, params)
    for name, p in params.items():
        assert p.dtype is param_dtype
        assert p.grad is None or p.grad.dtype is grad_dtype, name


@pytest.mark.seeded
@pytest.mark.parametrize(("param_dtype", "grad_dtype", "storage"), COMBINATIONS)
@pytest.mark.parametrize("case", FORMS)
def test_combinations(case, param_dtype, grad_dtype, storage, monkeypatch):
    use(monkeypatch, case)
    run(case, param_dtype, grad_dtype, "contiguous", {**GROUP, **storage})


@pytest.mark.seeded
@pytest.mark.parametrize("dtype", LOW, ids=name_of)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", PLAIN_FORMS)
def test_options_in_16_bits(case, options, dtype, monkeypatch):
    use(monkeypatch, case)
    run(case, dtype, dtype, "contiguous", {"lr": 1e-3, **options})


LAYOUT_STORAGE = {"bfloat16-masters-bf16-state": BF16, "bfloat16-stochastic-bf16-state": BF16, "float16-nothing": FP16}


@pytest.mark.seeded
@pytest.mark.parametrize("storage", LAYOUT_STORAGE)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "complex"])
@pytest.mark.parametrize("case", LAYOUT_FORMS)
@pytest.mark.usefixtures("small_pieces")
def test_layouts_in_16_bits(case, storage, layout, monkeypatch):
    use(monkeypatch, case)
    dtype, options = LAYOUT_STORAGE[storage], STORAGE[storage.partition("-")[2]]
    run(case, dtype, dtype, layout, {**GROUP, "blocks": 2, "max_grad_norm": 1.0, "phi_bounds": (0.1, 4.0), **options})


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
    """1,000 steps of a tenth of what rounding to nearest can see."""
    use(monkeypatch, case)
    lr, n = 2.0**-8 / 20, 4000
    ends = {}
    for name in ("nothing", "stochastic", "masters"):
        p = nn.Parameter(torch.full((n,), 1.5, dtype=BF16))
        options = {"lr": lr, "layer_adaptation": False, "eps": 0.0, "betas": (0.5, 0.5)}
        optimizer = torchlamb.Lamb([p], **options, **STORAGE[name], **case.options)
        p.grad = torch.ones_like(p)
        for _ in range(1000):
            optimizer.step()
        ends[name] = p.detach().double()
    wanted = 1.5 - 1000 * lr
    assert torch.all(ends["nothing"] == 1.5)
    # Each step adds a variance of at most (share cut off) x unit^2, with units of 2^-7 above 1.
    deviation = (1000 * lr * 2.0**-7) ** 0.5
    assert abs(ends["stochastic"].mean().item() - wanted) < 5 * deviation / n**0.5
    assert 0.2 * deviation < ends["stochastic"].std().item() < 1.2 * deviation
    assert torch.all((ends["masters"] - wanted).abs() <= 2.0**-9)


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


# Masters


def bf16_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2)).to(BF16)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        data = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(data.to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_what_was_changed_from_outside_counts(case, monkeypatch):
    use(monkeypatch, case)
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 5).to(BF16))
    optimizer = torchlamb.Lamb([p], lr=0.01, master_weights=True, **case.options)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    master = optimizer.state[p]["master"].clone()
    assert not torch.equal(master, p.float())
    with torch.no_grad():
        p[2] = 3.0
        p[4, 1] = -7.0
    changed = torch.zeros(6, 5, dtype=torch.bool)
    changed[2], changed[4, 1] = True, True
    start = torch.where(changed, p.float(), master)
    p.grad = torch.randn_like(p)
    optimizer.step()
    delta = optimizer.state[p]["master"] - start
    ratio = (delta.norm() / start.norm()).item()
    assert ratio == pytest.approx(0.01, rel=1e-5)  # lr x norm, of what was set and not of the stale master
    assert torch.equal(p, optimizer.state[p]["master"].to(BF16))


def test_a_loaded_model_is_not_overwritten():
    model = bf16_model()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.01, master_weights=True)
    train(model, optimizer, range(3))
    other = bf16_model(seed=1)
    model.load_state_dict(other.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(1))
    for p, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, wanted)
        assert torch.equal(optimizer.state[p]["master"], wanted.float())


@pytest.mark.parametrize("case", BACKEND_PARAMS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_elements_that_were_not_finite_can_be_set_anew(case, bad, monkeypatch):
    use(monkeypatch, case)
    p = nn.Parameter(torch.tensor([1.0, bad], dtype=BF16))
    optimizer = torchlamb.Lamb([p], lr=0.125, master_weights=True, layer_adaptation=False, eps=0.0, **case.options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert not p[1].isfinite()
    with torch.no_grad():
        p[1] = 2.0
    optimizer.step()
    assert optimizer.state[p]["master"].tolist() == pytest.approx([0.75, 1.875], rel=1e-6)


def test_only_what_is_rounded_has_a_seed_or_a_master():
    low, full = nn.Parameter(torch.ones(3, dtype=BF16)), nn.Parameter(torch.ones(3))
    for storage, key in ((STORAGE["stochastic"], "seed"), (STORAGE["masters"], "master")):
        optimizer = torchlamb.Lamb([low, full], **storage)
        low.grad, full.grad = torch.ones_like(low), torch.ones_like(full)
        optimizer.step()
        assert key in optimizer.state[low]
        assert key not in optimizer.state[full]
    optimizer.param_groups[0]["master_weights"] = False
    optimizer.step()
    assert "master" not in optimizer.state[low], "it would be saved and never used"


def test_a_seed_and_a_master_may_be_given_before_the_first_step():
    p, q = (nn.Parameter(torch.full((1000,), 1.0, dtype=BF16)) for _ in range(2))
    optimizer = torchlamb.Lamb([p, q], lr=1e-3, stochastic_rounding=True)
    optimizer.state[p]["seed"] = torch.tensor(5)
    optimizer.state[q]["seed"] = torch.tensor(5)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    assert torch.equal(p, q)
    p = nn.Parameter(torch.full((4,), 1.0, dtype=BF16))
    optimizer = torchlamb.Lamb([p], lr=0.0, master_weights=True)
    optimizer.state[p]["master"] = torch.full((4,), 1.001)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["master"], torch.full((4,), 1.001))


def test_masters_that_are_not_finite():
    p = nn.Parameter(torch.tensor([1.0, 6e4], dtype=FP16))
    optimizer = torchlamb.Lamb([p], lr=10.0, master_weights=True, layer_adaptation=False)
    p.grad = torch.tensor([1.0, -1e3], dtype=FP16)
    for _ in range(2000):
        optimizer.step()
    assert p[1].isinf(), "out of float16's range"
    assert optimizer.state[p]["master"].isfinite().all(), "and in the master's"


@pytest.mark.parametrize("storage", STORAGE.values(), ids=STORAGE)
@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_a_skipped_step_changes_nothing(case, storage, monkeypatch):
    use(monkeypatch, case)
    model = bf16_model()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.01, skip_nonfinite=True, **storage, **case.options)
    train(model, optimizer, range(2))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    next(model.parameters()).grad[0, 0] = torch.nan
    optimizer.step()
    after = model.state_dict(), optimizer.state_dict()["state"]
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    for i, state in before[1].items():
        assert all(torch.equal(value, after[1][i][key]) for key, value in state.items() if key != "skipped")


# Saving and loading


def through_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_state(a: torchlamb.Lamb, b: torchlamb.Lamb) -> None:
    for p, q in zip(*([p for group in o.param_groups for p in group["params"]] for o in (a, b)), strict=True):
        assert torch.equal(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            other = b.state[q][key]
            assert value.dtype == other.dtype, key
            assert torch.equal(value, other), key


DTYPES_AND_STORAGE = [
    pytest.param(dtype, storage, id=f"{name_of(dtype)}-{name}")
    for dtype in (BF16, FP16, FP32, FP64)
    for name, storage in STORAGE.items()
    if not (dtype is FP16 and "stochastic_rounding" in storage)
]


@pytest.mark.parametrize(("dtype", "storage"), DTYPES_AND_STORAGE)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"capturable": True, "max_grad_norm": 0.5}], ids=str)
@pytest.mark.parametrize("told", [True, False])
def test_resumed_bitwise(dtype, storage, options, told):
    model = bf16_model().to(dtype)
    optimizer = torchlamb.Lamb(model.parameters(), **options, **storage)
    train(model, optimizer, range(5))
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = bf16_model(seed=1).to(dtype)
    other.load_state_dict(saved["model"])
    resumed = torchlamb.Lamb(other.parameters(), **(storage if told else {}))  # what it is not told, it takes from the file
    resumed.load_state_dict(saved["optimizer"])
    assert_same_state(resumed, optimizer)
    train(model, optimizer, range(5, 10))
    train(other, resumed, range(5, 10))
    assert_same_state(resumed, optimizer)


@pytest.mark.parametrize("storage", STORAGE.values(), ids=STORAGE)
def test_expected_state(storage):
    model = bf16_model()
    optimizer = torchlamb.Lamb(model.parameters(), **storage)
    train(model, optimizer, range(1))
    moments = BF16 if storage.get("state_dtype") is BF16 else FP32
    wanted = {"step": FP32, "exp_avg": moments, "exp_avg_sq": moments}
    if "master_weights" in storage:
        wanted["master"] = FP32
    if "stochastic_rounding" in storage or moments is BF16:
        wanted["seed"] = torch.int64
    for i, p in enumerate(model.parameters()):
        assert {key: value.dtype for key, value in optimizer.state[p].items()} == wanted
        assert "seed" not in wanted or optimizer.state[p]["seed"].item() == precision.seed_of(i)


def test_from_float32_to_bf16_with_masters_and_back():
    """A float32 run, gone on in bf16 with its float32 weights as masters, then in float32 again."""
    model = bf16_model().float()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    low = bf16_model(seed=1)
    low.load_state_dict(saved["model"])  # rounds
    masters = torchlamb.Lamb(low.parameters(), master_weights=True, state_dtype=FP32)
    for i, p in enumerate(model.parameters()):
        saved["optimizer"]["state"][i]["master"] = p.detach()
    masters.load_state_dict(saved["optimizer"])
    assert masters.param_groups[0]["master_weights"], "how it stores things is not taken from the file"
    for p, q in zip(low.parameters(), model.parameters(), strict=True):
        assert torch.equal(masters.state[p]["master"], q)
        assert torch.equal(p, q.to(BF16))
        assert torch.equal(masters.state[p]["exp_avg_sq"], optimizer.state[q]["exp_avg_sq"])
    before = copy.deepcopy(model.state_dict())
    train(low, masters, range(3, 6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "masters are copies"

    back = through_file({"optimizer": masters.state_dict()})
    again = bf16_model(seed=2).float()
    names = [name for name, _ in low.named_parameters()]
    again.load_state_dict({name: back["optimizer"]["state"][i]["master"] for i, name in enumerate(names)})
    resumed = torchlamb.Lamb(again.parameters())
    resumed.load_state_dict(back["optimizer"])
    for p, q in zip(again.parameters(), low.parameters(), strict=True):
        assert torch.equal(p, masters.state[q]["master"])
        assert resumed.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(resumed.state[p]["exp_avg"], masters.state[q]["exp_avg"])
    train(again, resumed, range(6, 8))


def test_without_masters_in_the_file_they_are_made_of_the_parameters():
    model = bf16_model()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.01)
    train(model, optimizer, range(2))
    masters = torchlamb.Lamb(model.parameters(), lr=0.01, master_weights=True)
    masters.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [p.detach().clone() for p in model.parameters()]
    for group in masters.param_groups:
        group["lr"] = 0.0
    train(model, masters, range(1))
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(masters.state[p]["master"], old.float())


@pytest.mark.parametrize(
    ("own", "saved", "wanted"),
    [
        ({}, {"master_weights": True}, (True, False, None)),
        ({"master_weights": True}, {}, (True, False, None)),
        ({"master_weights": True}, {"stochastic_rounding": True}, (True, False, None)),
        ({"stochastic_rounding": True}, {"master_weights": True, "state_dtype": BF16}, (False, True, BF16)),
        ({"state_dtype": BF16}, {"master_weights": True}, (True, False, BF16)),
        ({"state_dtype": FP32}, {"state_dtype": BF16}, (False, False, FP32)),
    ],
    ids=str,
)
def test_loading_keeps_how_this_run_stores_things(own, saved, wanted):
    model = bf16_model()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.5, **saved)
    train(model, optimizer, range(2))
    other = bf16_model()
    resumed = torchlamb.Lamb(other.parameters(), **own)
    saved_dict = copy.deepcopy(optimizer.state_dict())
    untouched = copy.deepcopy(saved_dict)
    resumed.load_state_dict(saved_dict)
    assert saved_dict["param_groups"] == untouched["param_groups"], "the caller's dict was written"
    group = resumed.param_groups[0]
    assert tuple(group[name] for name in ("master_weights", "stochastic_rounding", "state_dtype")) == wanted
    assert group["lr"] == 0.5
    train(other, resumed, range(2))
    for p in other.parameters():
        assert ("master" in resumed.state[p]) == wanted[0]
        assert resumed.state[p]["exp_avg"].dtype == (wanted[2] or FP32)


def test_loading_checks_that_storage_fits_the_parameters():
    bf16, fp16 = (nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in LOW)
    saved = torchlamb.Lamb([bf16], stochastic_rounding=True).state_dict()
    optimizer = torchlamb.Lamb([fp16])
    with pytest.raises(TypeError, match="use master_weights"):
        optimizer.load_state_dict(saved)
    assert not optimizer.param_groups[0]["stochastic_rounding"]


def test_a_dict_without_our_options_leaves_those_of_the_group():
    model = bf16_model()
    adam = torch.optim.Adam(model.parameters())
    optimizer = torchlamb.Lamb([{"params": list(model.parameters()), "master_weights": False}], master_weights=True)
    optimizer.load_state_dict(adam.state_dict())
    assert not optimizer.param_groups[0]["master_weights"]


def test_options_may_be_changed_between_steps():
    model = bf16_model()
    optimizer = torchlamb.Lamb(model.parameters())
    train(model, optimizer, range(1))
    for change in ({"state_dtype": BF16}, {"master_weights": True}, {"state_dtype": None}, {"master_weights": False}):
        optimizer.param_groups[0].update(change)
        train(model, optimizer, range(1))
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].dtype == FP32
        assert p.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "storage",
    [
        *("masters", "stochastic-bf16-state"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("stochastic", "bf16-state", "masters-bf16-state")),
    ],
)
def test_compiled(storage):
    models = [bf16_model() for _ in range(2)]
    optimizers = [torchlamb.Lamb(m.parameters(), lr=torch.tensor(0.01), capturable=True, **STORAGE[storage]) for m in models]
    torch._dynamo.reset()
    compiled = torch.compile(optimizers[0].step, backend="aot_eager")
    for step in range(3):
        for model in models:
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(BF16)
        compiled()
        optimizers[1].step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q)
