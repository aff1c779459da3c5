"""torch.amp.GradScaler end to end on the CPU: the digits network trains on through an overflow as if it had never been.

What two processes decide where only one of them overflows is in `sharded_cases.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import GPU_KERNELS
from loading import ROOT, load_script
from torch import Tensor

import torchlamb
from torchlamb.backends import cpu

if GPU_KERNELS:
    pytest.skip("trains on the CPU, with the CPU's backends", allow_module_level=True)

SCRIPT = ROOT / "examples" / "digits.py"
BF16, FP16 = torch.bfloat16, torch.float16
BATCH_SIZE, LR, STEPS, OVERFLOW_AT = 359, 0.03, 30, 12
# 2^13 grows to 2^14, is halved at the overflow, and grows twice; without the overflow no gradient leaves the range of fp16.
SCALE, GROWTH_INTERVAL, LAST_SCALE = 2.0**13, 8, 2.0**15
# What the loss of one step is multiplied by, so that its scaled gradients leave the dtype's range.
BLOW_UP = {BF16: 2.0**120, FP16: 2.0**24}
MAX_NORM = 0.1  # of gradients, clipped from outside
ACCURACY = 0.9  # 0.94 to 0.96 were measured

BACKENDS: dict[str, dict[str, Any]] = {
    "default": {},
    "fused": {"fused": True},
    "fused-capturable": {"fused": True, "capturable": True},
    "foreach": {"foreach": True},
    "single": {"foreach": False},
    "capturable": {"capturable": True},
}
GUARDS: dict[str, dict[str, Any]] = {"": {}, "-clip": {"max_grad_norm": 1.0}, "-skip": {"skip_nonfinite": True}}
each_backend = pytest.mark.parametrize("options", list(BACKENDS.values()), ids=list(BACKENDS))


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> None:
    if request.getfixturevalue("options").get("fused"):
        cpu.library.load()
        if not cpu.library.isa:
            pytest.skip(f"no kernels, {cpu.library.why_not}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The network is too small to share: on a busy machine, threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Training:
    """The digits network and its optimizer under autocast, with a scaler or, for a scale of None, without."""

    def __init__(self, digits: ModuleType, dtype: torch.dtype, options: dict[str, Any], scale: float | None) -> None:
        torch.manual_seed(0)
        self.digits, self.dtype, self.model = digits, dtype, digits.build_model()
        groups = torchlamb.param_groups(self.model, digits.WEIGHT_DECAY, adapt_excluded=False)
        self.optimizer = torchlamb.Lamb(groups, lr=LR, **options)
        self.scaler = make_scaler(scale)

    def backward(self, batch: Tensor, factor: float = 1.0) -> None:
        images, labels = self.digits.load_parts()["train"]
        self.optimizer.zero_grad()
        with torch.autocast("cpu", self.dtype):
            scores = self.model(images[batch])
        assert scores.dtype == self.dtype
        loss = self.digits.LOSS(scores.float(), labels[batch])
        self.scaler.scale(loss * factor).backward()

    def finish(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def step(self, batch: Tensor, factor: float = 1.0) -> None:
        self.backward(batch, factor)
        self.finish()

    def skips_itself(self) -> bool:
        return self.optimizer._step_supports_amp_scaling

    def grads_are_finite(self) -> bool:
        return all(bool(p.grad.isfinite().all()) for p in self.model.parameters())

    def values(self) -> dict[str, Tensor]:
        """Copies of parameters, moments and step counts; not the count of skipped steps, which is to change."""
        values = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            state = self.optimizer.state.get(p, {})  # without making one
            values |= {f"{key} of {name}": state[key].clone() for key in state if key != "skipped"}
        return values

    def accuracy(self) -> float:
        images, labels = self.digits.load_parts()["test"]
        with torch.no_grad():
            return (self.model(images).argmax(dim=1) == labels).double().mean().item()


def make_scaler(scale: float | None) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=GROWTH_INTERVAL, enabled=scale is not None)


def batches(digits: ModuleType, count: int) -> Iterator[Tensor]:
    order, images = torch.Generator().manual_seed(0), len(digits.load_parts()["train"][0])
    epochs = (digits.batches(images, BATCH_SIZE, order) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), count)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert torch.equal(value, wanted[name]), name


def _dtypes_and_options() -> Iterator[Any]:
    for dtype, (guard, further), (name, options) in itertools.product([BF16, FP16], GUARDS.items(), BACKENDS.items()):
        # fp16 takes longest, and what is beyond the plain backends combines what those have; guards have shorter tests below.
        slow = bool(guard) or name not in ("default", "fused") or (dtype is FP16 and name != "default")
        marks = [pytest.mark.slow] if slow else []
        yield pytest.param(dtype, {**options, **further}, id=f"{str(dtype).removeprefix('torch.')}-{name}{guard}", marks=marks)


@pytest.mark.parametrize(("dtype", "options"), list(_dtypes_and_options()))
def test_an_overflow_changes_nothing_but_the_scale(digits, dtype, options):
    """At the overflow every bit stays and the scale is halved; what follows is, bit for bit, the training without that step.

    Scales are powers of two. In bf16, which has float32's range, multiplying by them is exact: the reference has no scaler at
    all. In fp16 the scale decides what underflows: the reference takes over the halved scale, but never saw the overflow.
    """
    training, reference = (Training(digits, dtype, options, scale) for scale in (SCALE, SCALE if dtype is FP16 else None))
    for step, batch in enumerate(batches(digits, STEPS)):
        if step == OVERFLOW_AT:
            before, scale = training.values(), training.scaler.get_scale()
            training.step(batch, BLOW_UP[dtype])
            assert not training.grads_are_finite()
            assert_same(training.values(), before)
            assert (scale, training.scaler.get_scale()) == (2 * SCALE, SCALE)
            if dtype is FP16:
                reference.scaler = make_scaler(SCALE)
        training.step(batch)
        reference.step(batch)
        assert training.grads_are_finite()
    assert_same(training.values(), reference.values())
    assert training.scaler.get_scale() == LAST_SCALE
    assert training.optimizer.skipped_steps.item() == int(training.skips_itself())
    assert reference.optimizer.skipped_steps.item() == 0
    assert all(state["step"].item() == STEPS for state in training.optimizer.state.values())
    assert training.accuracy() > ACCURACY


@each_backend
def test_a_scale_that_is_too_large_at_first_is_found(digits, options):
    """The very first steps overflow fp16, so that no moments are there to stay: training begins at the scale that fits.

    From there on it is, bit for bit, the training that began with that scale.
    """
    training = Training(digits, FP16, options, 2.0**26)
    before = training.values()
    first, *others = batches(digits, 4)
    skipped = -1
    while skipped < 0 or not training.grads_are_finite():
        assert all(torch.equal(p, before[name]) for name, p in training.model.named_parameters())
        assert all(not state["step"].any() for state in training.optimizer.state.values())
        scale, skipped = training.scaler.get_scale(), skipped + 1
        training.step(first)
    assert scale == 2.0 ** (26 - skipped)
    assert skipped > 0
    reference = Training(digits, FP16, options, scale)
    reference.step(first)
    assert_same(training.values(), reference.values())
    for batch in others:
        training.step(batch)
        reference.step(batch)
    assert_same(training.values(), reference.values())
    assert training.optimizer.skipped_steps.item() == (skipped if training.skips_itself() else 0)


@each_backend
def test_unscaled_gradients_are_clipped_before_the_step(digits, options):
    """`unscale_`, `clip_grad_norm_`, `step`: as without a scaler, and a single inf that is found while unscaling is enough."""
    training, reference = (Training(digits, BF16, options, scale) for scale in (SCALE, None))
    for step, batch in enumerate(batches(digits, 6)):
        if step == 3:
            before = training.values()
            training.backward(batch)
            list(training.model.parameters())[-1].grad[-1] = torch.inf
            clip_and_step(training)
            assert_same(training.values(), before)
            assert training.scaler.get_scale() == SCALE / 2
        for run in (training, reference):
            run.backward(batch)
            assert clip_and_step(run) > 2 * MAX_NORM
    assert_same(training.values(), reference.values())
    assert training.optimizer.skipped_steps.item() == int(training.skips_itself())


def clip_and_step(training: Training) -> float:
    """Return the norm before clipping."""
    training.scaler.unscale_(training.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(training.model.parameters(), MAX_NORM)
    training.finish()
    return norm.item()
