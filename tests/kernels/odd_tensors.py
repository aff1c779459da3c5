"""Tensors as nobody expects them, drawn at random: every backend steps them right, or refuses before anything has changed.

`PYTHONPATH=tests python tests/kernels/odd_tensors.py SECONDS SEED [EXAMPLES]` draws for that long, each example in a copy of
the process, and prints the smallest that fails. This room knows what makes a tensor odd and what its numbers are; the rule is
`reference.py`'s.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases import DEFAULTS, interpret
from forked import forked
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from reference import Reference
from tolerances import largest_share, of_last_step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import torchlamb

EXPECTED = (TypeError, ValueError, RuntimeError, NotImplementedError)
SHAPES = [(4,), (3, 2), (), (0, 3), (4, 2, 3), (257,), (6, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]


class Derived(torch.Tensor):
    """A subclass that adds nothing."""


class DerivedParameter(nn.Parameter):
    """One of Parameter's, as the MindSpore front's."""


def _mapped(t: Tensor) -> Tensor:
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(t, file.name)
        return torch.load(file.name, mmap=True, weights_only=True)


def _short(t: Tensor) -> Tensor:
    """Its memory ends before it does."""
    t = t.clone()
    t.untyped_storage().resize_(max(t.untyped_storage().nbytes() // 2, 0))
    return t


def _freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def _expanded(t: Tensor) -> Tensor:
    return t.reshape(-1)[:1].clone().expand(t.shape) if t.numel() and t.dim() else t


def _windows(t: Tensor) -> Tensor:
    """Rows that overlap."""
    if t.dim() != 2 or t.numel() == 0:
        return t
    return t.reshape(-1)[: sum(t.shape)].clone().as_strided(t.shape, (1, 1))


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _strided(t: Tensor) -> Tensor:
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)[..., ::2] if t.dim() else t.clone()
    return wide.copy_(t)


def _behind(t: Tensor) -> Tensor:
    """One element further in its memory than aligned."""
    return torch.cat([torch.zeros(1, dtype=t.dtype), t.reshape(-1)])[1:].view(t.shape)


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() >= 2 else t


def _conj(t: Tensor) -> Tensor:
    return t.conj().resolve_conj().conj() if t.is_complex() else t


def _neg(t: Tensor) -> Tensor:
    return t if t.is_complex() else torch._neg_view(-t)


def _imaginary(t: Tensor) -> Tensor:
    return t if t.is_complex() or t.dtype is torch.bfloat16 else torch.complex(torch.zeros_like(t), -t).conj().imag


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "transposed": _transposed,
    "strided": _strided,
    "unaligned": _behind,
    "derived": lambda t: t.as_subclass(Derived),
    "two": lambda t: TwoTensor(t.clone(), t.clone()),
    "meta": lambda t: t.to("meta"),
    "conj": _conj,
    "neg": _neg,
    "imag": _imaginary,
    "expanded": _expanded,
    "windows": _windows,
    "short": _short,
    "freed": _freed,
    "shared": lambda t: t.clone().share_memory_(),
    "mapped": _mapped,
    "inference": _inference,
    "sparse": lambda t: t.to_sparse() if t.dim() else t,
    "numpy": lambda t: t if t.dtype is torch.bfloat16 else torch.from_numpy(t.numpy().copy()),
    "requires grad": lambda t: t.clone().requires_grad_(),
}
GRAD_KINDS = [kind for kind in KINDS if kind not in ("mapped", "inference")]
BACKENDS = [{}, {"fused": True}, {"fused": False}, {"foreach": True}, {"foreach": False}, {"capturable": True}]
OPTIONS = [{}, {"weight_decay": 0.1}, {"max_grad_norm": 1.0}, {"blocks": 1, "grad_centralization": True}, {"lr": -0.05}]


@dataclass
class Row:
    """One parameter: how it is made, and how it is odd."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    grad_kind: str
    is_derived: bool  # of a subclass of Parameter
    late: str  # what happens to it after the first step


ROWS = st.builds(
    Row,
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from(["plain", *KINDS]),
    st.sampled_from(["plain", "plain", *GRAD_KINDS]),
    st.booleans(),
    st.sampled_from(["", "", "", "freed", "short", "data", "grown", "moments freed", "moments shared", "to meta"]),
)
PAIRS = st.sampled_from(["", "", "", "twice", "same memory", "overlapping", "grads shared", "grad is the parameter"])


def values_of(t: Tensor) -> Tensor | None:
    """Return a tensor's numbers, in memory of their own, or None if it has none to be read."""
    t = t.detach()
    if isinstance(t, TwoTensor):
        return t.a.clone()
    if t.is_meta or t.layout != torch.strided:
        return None if t.is_meta else t.to_dense().clone()
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    if t.numel() and t.untyped_storage().nbytes() < last * t.itemsize:
        return None
    return t.as_subclass(Tensor).resolve_conj().resolve_neg().clone()


def make(row: Row, number: int) -> tuple[Tensor, Tensor]:
    """Return the parameter and a plain gradient."""
    generator = torch.Generator().manual_seed(number)
    value, grad = (
        torch.randn(row.shape, generator=generator, dtype=torch.promote_types(row.dtype, torch.float32)) for _ in "pg"
    )
    odd = KINDS[row.kind](value.to(row.dtype)).detach()
    kind = DerivedParameter if row.is_derived else nn.Parameter
    return kind(odd, requires_grad=not odd.is_inference()), grad.to(row.dtype)


def give_grad(p: Tensor, grad: Tensor, kind: str) -> None:
    """Set an odd gradient, or, where torch itself refuses that, one like the parameter."""
    try:
        p.grad = KINDS[kind](grad).detach()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):
            p.grad = torch.ones_like(p).detach()


def couple(params: list[Tensor], how: str) -> list[Tensor]:
    """Let the first parameter share memory with another."""
    p = params[0]
    if how == "twice":
        return [*params, p]
    if how in ("same memory", "overlapping") and type(p.data) is Tensor and p.is_contiguous() and p.dim():
        with contextlib.suppress(RuntimeError):  # where its memory is too short
            other = p.detach()[1:] if how == "overlapping" else p.detach()
            return [*params, nn.Parameter(other)]
    return params


def happen(optimizer: torchlamb.Lamb, p: Tensor, late: str) -> None:
    """Change a parameter or its moments between two steps, as users and wrappers do."""
    state = optimizer.state.get(p, {})
    can_resize = p.layout == torch.strided and not isinstance(p, TwoTensor) and not p.is_shared()  # of which torch dies
    can_resize = can_resize and p.untyped_storage().resizable()
    if late in ("freed", "short") and can_resize and values_of(p) is not None:
        p.untyped_storage().resize_(0 if late == "freed" else p.untyped_storage().nbytes() // 2)
    elif late == "data":
        p.data = p.detach().clone()
    elif late == "grown":
        with contextlib.suppress(RuntimeError):  # which torch refuses of subclasses
            p.data = torch.ones((*p.shape, 1000), dtype=p.dtype)
            p.grad = torch.ones_like(p.data)
    elif late == "to meta":
        with contextlib.suppress(RuntimeError):  # which torch itself refuses unless told otherwise
            p.data = p.data.to("meta")
    elif late == "moments freed" and "exp_avg" in state and not isinstance(state["exp_avg"], TwoTensor):
        state["exp_avg"].untyped_storage().resize_(0)
    elif late == "moments shared" and "exp_avg" in state:
        state["exp_avg_sq"] = state["exp_avg"]


def contents(optimizer: torchlamb.Lamb) -> list[Any]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [{k: values_of(v) for k, v in optimizer.state[p].items()} if p in optimizer.state else {} for p in params]
    return [[values_of(p) for p in params], [None if p.grad is None else values_of(p.grad) for p in params], states]


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, list):
        assert len(before) == len(after)
        for a, b in zip(before, after, strict=True):
            assert_same(a, b)
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), "state was made by a step that raised"
        for key, value in before.items():
            assert_same(value, after[key])
    elif before is not None and after is not None:
        assert torch.equal(before.nan_to_num(), after.nan_to_num()), "changed by a step that raised"


def shares_memory(params: list[Tensor]) -> bool:
    """Return whether a step would write to some memory twice: then it has to be refused, or be the same on every run."""
    if len(set(map(id, params))) < len(params):
        return True
    seen: set[int] = set()
    for p in params:
        if type(p.data) is not Tensor or p.layout != torch.strided or p.is_meta or not p.numel() or values_of(p) is None:
            continue
        offsets = torch.zeros(p.shape, dtype=torch.int64)
        for dim, (size, stride) in enumerate(zip(p.shape, p.stride(), strict=True)):
            offsets += (torch.arange(size) * stride).view(-1, *[1] * (p.dim() - 1 - dim))
        addresses = (p.data_ptr() + offsets * p.itemsize).flatten().tolist()
        if len(set(addresses)) < len(addresses) or seen & set(addresses):
            return True
        seen |= set(addresses)
    return False


def run(rows: list[Row], pair: str, backend: dict[str, Any], options: dict[str, Any], loads: bool) -> None:
    """Take three steps, each right or refused with nothing changed."""
    warnings.simplefilter("ignore")
    made = [make(row, i) for i, row in enumerate(rows)]
    params, grads, kinds = [p for p, _ in made], [g for _, g in made], [row.grad_kind for row in rows]
    params = couple(params, pair)
    options = dict(options)
    lr = options.pop("lr", 0.05)
    for p, grad, kind in zip(params, grads, kinds, strict=False):
        give_grad(p, grad, kind)
    for p in params[len(grads) :]:
        with contextlib.suppress(RuntimeError):
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
    if all(p.grad is None for p in params):
        return
    if pair == "grads shared" and len(params) > 1 and params[0].shape == params[1].shape and params[0].dtype == params[1].dtype:
        with contextlib.suppress(RuntimeError):  # which torch refuses where they differ in device
            params[1].grad = params[0].grad
    if pair == "grad is the parameter" and type(params[0].data) is Tensor:
        with contextlib.suppress(RuntimeError):
            params[0].grad = params[0].detach()
    try:
        optimizer = torchlamb.Lamb(params, **backend, **options)
    except EXPECTED:
        return
    optimizer.param_groups[0]["lr"] = lr
    assert repr(optimizer)
    for step in range(3):
        if step == 1:
            for p, row in zip(params, rows, strict=False):
                happen(optimizer, p, row.late)
        if step == 2 and loads:
            optimizer.load_state_dict(optimizer.state_dict())
        if not step_once(optimizer, params, {**DEFAULTS, **options, "lr": lr}):
            return


def step_once(optimizer: torchlamb.Lamb, params: list[Tensor], options: dict[str, Any]) -> bool:
    """Return whether the step was taken."""
    before = contents(optimizer)
    twice = shares_memory(params) or any(
        "exp_avg" in state and state["exp_avg"] is state["exp_avg_sq"] for state in optimizer.state.values()
    )
    try:
        optimizer.step()
    except EXPECTED:
        assert_same(before, contents(optimizer))
        return False
    has_numbers = all(value is not None for value in before[0]) and all(
        grad is not None for grad, p in zip(before[1], params, strict=True) if p.grad is not None
    )
    if not twice and has_numbers:
        check_numbers(before, contents(optimizer), options)
    return not twice


def check_numbers(before: list[Any], after: list[Any], options: dict[str, Any]) -> None:
    values, grads, states = before
    if any("exp_avg" in s and (s["exp_avg"] is None or s["exp_avg_sq"] is None) for s in states):
        raise AssertionError("stepped with moments that have no memory")
    reference = Reference([wide(v) for v in values], [options] * len(values))
    for i, state in enumerate(states):
        if "exp_avg" in state:
            reference.exp_avgs[i], reference.exp_avg_sqs[i] = real(state["exp_avg"]), real(state["exp_avg_sq"])
            reference.uncancelled[i], reference.uncancelled_sq[i] = np.abs(reference.exp_avgs[i]), reference.exp_avg_sqs[i]
            reference.step_counts[i] = int(state["step"])
    reference.step([None if g is None else wide(g) for g in grads])
    for i, (p, wanted) in enumerate(zip(after[0], reference.params, strict=True)):
        # With a guard, the norm over all gradients has the error of the coarsest.
        exact = p.dtype is torch.float64 and (options.get("max_grad_norm") is None or all(x.dtype is p.dtype for x in after[0]))
        tolerance = of_last_step(reference, i, "float64" if exact else "float32")
        if p.dtype is torch.bfloat16:  # which is what the result is rounded to
            tolerance = tolerance + 2.0**-8 * np.abs(wanted) + 2.0**-133
        largest_share(np.abs(real(p) - wanted), tolerance, f"parameter {i}")


def wide(t: Tensor) -> np.ndarray[Any, Any]:
    return t.to(torch.promote_types(t.dtype, torch.float64)).numpy().copy()


def real(t: Tensor) -> np.ndarray[Any, Any]:
    array = wide(t)
    return np.stack([array.real, array.imag], axis=-1) if np.iscomplexobj(array) else array


def run_fake(rows: list[Row], backend: dict[str, Any], options: dict[str, Any]) -> None:
    """On tensors without numbers, as memory is estimated: all state is there afterwards."""
    warnings.simplefilter("ignore")
    options = {name: value for name, value in options.items() if name != "lr"}
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(row.shape, dtype=row.dtype)) for row in rows]
        try:
            optimizer = torchlamb.Lamb(params, **backend, **options)
        except EXPECTED:
            return
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            try:
                optimizer.step()
            except EXPECTED:
                assert backend.get("fused"), "refused, and nobody asked for kernels"
                return
        assert all({"step", "exp_avg", "exp_avg_sq"} <= optimizer.state[p].keys() for p in params)


EXAMPLES = st.tuples(
    st.lists(ROWS, min_size=1, max_size=3), PAIRS, st.sampled_from(BACKENDS), st.sampled_from(OPTIONS), st.booleans(),
    st.sampled_from([False] * 9 + [True]),
)  # fmt: skip


def check(example: tuple[Any, ...]) -> None:
    """Run one example in this process."""
    rows, pair, backend, options, loads, fake = example
    if fake:
        run_fake(rows, backend, options)
    else:
        run(rows, pair, backend, options, loads)


def search(seconds: float, number: int, most: int = 10**6, apart: bool = True) -> int:
    """Draw examples for that long, or so many; raise the smallest that fails. Returns how many there were."""
    end, count = time.monotonic() + seconds, 0

    @seed(number)
    @settings(
        max_examples=most, deadline=None, database=None, print_blob=False, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if apart else [Phase.generate], report_multiple_bugs=False,
    )  # fmt: skip
    @given(EXAMPLES)
    def draw(example: tuple[Any, ...]) -> None:
        nonlocal count
        if time.monotonic() > end:
            raise _Done
        count += 1
        if apart:
            forked(lambda: check(example))
        else:
            check(example)

    with contextlib.suppress(_Done):
        draw()
    return count


class _Done(BaseException):
    """The time is over."""


def main() -> None:
    seconds, number = float(sys.argv[1]), int(sys.argv[2])
    if "--interpreted" in sys.argv:
        interpret()
    warnings.simplefilter("ignore")
    torch._foreach_add_([TwoTensor(torch.ones(1), torch.ones(1))], 1)  # what torch imports then is in every copy
    torch.set_num_threads(1)
    most = [int(flag) for flag in sys.argv[3:] if flag.isdigit()]
    count = search(seconds, number, *most)
    print(f"{count} examples, seed {number}")  # noqa: T201


if __name__ == "__main__":
    main()
