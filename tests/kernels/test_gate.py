"""What may be handed to kernels, which take addresses: everything else steps eagerly, and right, or is refused beforehand."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from cases import DEFAULTS
from forked import forked
from loading import HANGS
from reference import Reference
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves, tree_map_only

import torchlamb

BACKENDS = [{}, {"foreach": True}, {"foreach": False}, {"fused": False}]


class Wrapper(torch.Tensor):
    """As torchao's and FSDP's: a tensor without memory of its own, whose operations are those of the one inside."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self, **_):
        return f"Wrapper({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrapped = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        out = func(*unwrapped[0], **unwrapped[1])
        wrapped = {id(a.inner): a for a in tree_leaves((args, kwargs)) if isinstance(a, cls)}
        return tree_map_only(torch.Tensor, lambda t: wrapped.get(id(t)) if id(t) in wrapped else cls(t), out)


with warnings.catch_warnings():  # what torch imports at first, once and not in every copy of the process
    warnings.simplefilter("ignore")
    torch._foreach_add_([Wrapper(torch.ones(1))], 1)
    torchlamb.Lamb([nn.Parameter(torch.ones(1))])

SUBCLASSES = {
    "TwoTensor": (lambda t: TwoTensor(t, t.clone()), lambda p: p.data.a),
    "Wrapper": (Wrapper, lambda p: p.data.inner),
}


def reference_of(values, grads, steps=1, **options):
    reference = Reference([v.detach().numpy() for v in values], [{**DEFAULTS, **options} for _ in values])
    for _ in range(steps):
        reference.step([g.detach().numpy() for g in grads])
    return [torch.from_numpy(w) for w in reference.params]


def assert_close(got, wanted):
    for p, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(p.detach().to(w.dtype), w, rtol=1e-5, atol=1e-6)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", BACKENDS, ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "beside a plain one"])
@pytest.mark.parametrize("name", SUBCLASSES)
def test_wrapper_subclasses_step_eagerly(name, mixed, options):
    """In one list with a plain tensor, operations of a TwoTensor would be done to that twice."""
    wrap, inside = SUBCLASSES[name]

    def run():
        values, grads = [randn(4, 3), randn(5, seed=1)], [randn(4, 3, seed=2), randn(5, seed=3)]
        params = [nn.Parameter(wrap(v.clone())) for v in values]
        plain = [nn.Parameter(values[0].clone())] if mixed else []
        optimizer = torchlamb.Lamb([*params, *plain], lr=0.1, weight_decay=0.1, **options)
        for _ in range(3):
            for p, grad in zip(params, grads, strict=True):
                p.grad = wrap(grad.clone())
            for p in plain:
                p.grad = grads[0].clone()
            optimizer.step()
        wanted = reference_of([*values, values[0]], [*grads, grads[0]], 3, lr=0.1, weight_decay=0.1)
        assert_close([*map(inside, params), *plain], wanted[: 2 + mixed])
        return repr(optimizer)

    said = forked(run)
    if options in ({}, {"fused": False}):
        assert name in said or options  # with the reason


@pytest.mark.parametrize("name", SUBCLASSES)
def test_fused_raises_for_what_kernels_cannot_step(name):
    wrap, inside = SUBCLASSES[name]

    def run():
        p = nn.Parameter(wrap(randn(4)))
        before = inside(p).clone()
        try:
            optimizer = torchlamb.Lamb([p], fused=True)
            p.grad = wrap(randn(4, seed=1))
            optimizer.step()
        except (RuntimeError, TypeError) as error:
            assert torch.equal(inside(p), before)
            return str(error)
        return None

    said = forked(run)
    assert said is not None
    assert "fused" in said


@pytest.mark.parametrize("options", [*BACKENDS, {"max_grad_norm": 1.0}, {"capturable": True}], ids=str)
def test_a_step_on_fake_tensors(options):
    """As memory is estimated: no numbers, but all state."""

    def run():
        with FakeTensorMode():
            model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
            optimizer = torchlamb.Lamb(model.parameters(), **options)
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.ones(8, 4)).sum().backward()
                optimizer.step()
            assert repr(optimizer)
            return [sorted(optimizer.state[p]) for p in model.parameters()]

    for keys in forked(run):
        assert {"step", "exp_avg", "exp_avg_sq"} <= set(keys)


def test_a_fake_copy_of_a_real_model():
    """And the real one, which was stepped before, keeps its numbers."""

    def run():
        model = nn.Linear(4, 3)
        optimizer = torchlamb.Lamb(model.parameters())
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        before = model.weight.detach().clone()
        mode = FakeTensorMode()
        values = [mode.from_tensor(p.detach()) for p in model.parameters()]
        with mode:
            params = [nn.Parameter(value) for value in values]
            fake = torchlamb.Lamb(params)
            for p in params:
                p.grad = torch.empty_like(p)
            fake.step()
        return torch.equal(model.weight, before)

    assert forked(run)


@pytest.mark.parametrize("options", BACKENDS, ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_a_parameter_that_was_appended_and_grown(named, options):
    """Without its state: kernels would write behind it."""

    def run():
        first, late = nn.Parameter(randn(3)), nn.Parameter(randn(4, seed=1))
        optimizer = torchlamb.Lamb([("first", first)] if named else [first], **options)
        optimizer.param_groups[0]["params"].append(late)
        first.grad, late.grad = torch.ones(3), torch.ones(4)
        optimizer.step()
        late.data = randn(100_000, seed=2)
        late.grad = torch.ones(100_000)
        before = [p.detach().clone() for p in (first, late)]
        try:
            optimizer.step()
        except RuntimeError as error:
            assert torch.equal(first, before[0])
            assert torch.equal(late, before[1])
            return str(error)
        return None

    said = forked(run)
    assert said is not None
    assert "(100000,)" in said
    assert "(4,)" in said


def test_a_state_dict_with_a_parameter_that_has_no_name():
    first, late = nn.Parameter(randn(3)), nn.Parameter(randn(4, seed=1))
    optimizer = torchlamb.Lamb([("first", first)])
    optimizer.param_groups[0]["params"].append(late)
    first.grad, late.grad = torch.ones(3), torch.ones(4)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["exp_avg"] = torch.ones(5)
    optimizer.state[late]["exp_avg"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 1 .*\(5,\).*\(4,\)"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("options", [*BACKENDS, {"weight_decay": 0.1, "max_grad_norm": 1.0}], ids=str)
def test_a_conjugate_parameter(options):
    """`nn.Parameter(q.mH)`: moves as its numbers say, or is refused with nothing changed."""

    def run():
        q = randn(3, 4, dtype=torch.complex64)
        value, grad = q.mH.resolve_conj().clone(), randn(4, 3, seed=1, dtype=torch.complex64)
        p = nn.Parameter(q.mH)
        assert p.is_conj()
        return outcome(p, value, grad, options)

    assert_moved_or_refused(forked(run))


@pytest.mark.parametrize("options", [*BACKENDS, {"weight_decay": 0.1, "max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("how", ["imag", "dense"])
def test_a_negated_parameter(how, options):
    """The imaginary part of a conjugate, which has a lazy minus sign: it descends, or is refused with nothing changed."""

    def run():
        z = randn(3, 4, dtype=torch.complex64)
        odd = z.conj().imag if how == "imag" else torch._neg_view(randn(3, 4))
        value = odd.resolve_neg().clone()
        assert odd.is_neg()
        return outcome(nn.Parameter(odd), value, randn(3, 4, seed=1), options)

    assert_moved_or_refused(forked(run))


def outcome(p, value, grad, options):
    try:
        optimizer = torchlamb.Lamb([p], lr=0.1, **options)
        for _ in range(2):
            p.grad = grad.clone()
            optimizer.step()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return str(error), torch.equal(p.detach(), value), None
    wanted = reference_of([value], [grad], 2, lr=0.1, **options)[0]
    wanted = torch.view_as_complex(wanted) if value.is_complex() else wanted
    return None, None, float((p.detach().to(wanted.dtype) - wanted).abs().max())


def assert_moved_or_refused(result):
    said, unchanged, error = result
    if said is not None:
        assert unchanged
        assert "resolve_" in said or "clone" in said  # the remedy
    else:
        assert error < 1e-5


@pytest.mark.parametrize("options", BACKENDS, ids=str)
@pytest.mark.parametrize("kind", ["as_strided", "expanded"])
def test_a_parameter_whose_own_elements_share_memory(kind, options):
    def run():
        base = randn(4)
        p = nn.Parameter(base.as_strided((3, 2), (1, 1)) if kind == "as_strided" else base[:1].expand(5))
        before = p.detach().clone()
        optimizer = torchlamb.Lamb([p], **options)
        p.grad = torch.ones(p.shape)
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error), torch.equal(p, before), not optimizer.state
        return None

    said = forked(run)
    assert said is not None
    assert said[1]
    assert said[2]


REPEATED = """
import hashlib, json, warnings
import torch
from torch import nn
import torchlamb
warnings.simplefilter("ignore")
torch.set_num_threads(2)
found = {}
for kind, options in [("same", {}), ("overlapping", {}), ("overlapping", {"foreach": True})]:
    seen = found[f"{kind}, {options}"] = []
    for _ in range(8):
        flat = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
        if kind == "same":
            params = [nn.Parameter(flat.clone())] * 4
        else:
            params = [nn.Parameter(flat[:100_000]), nn.Parameter(flat[50_000:150_000]), nn.Parameter(flat[200_000:])]
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i + 1))
        try:
            optimizer = torchlamb.Lamb(params, lr=0.1, **options)
            for _ in range(2):
                optimizer.step()
        except (RuntimeError, ValueError) as error:
            assert all(torch.equal(p, q) for p, q in zip(params, before))
            seen.append(f"refused: {error}")
        else:
            seen.append(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in params)).hexdigest())
print(json.dumps(found))
"""


def test_parameters_that_share_memory():
    """One parameter twice, or two whose memory overlaps: the same result each time on two threads, or refused."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", REPEATED]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANGS, env=environment, cwd=Path(__file__).parent, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 3
    assert all(len(seen) == 8 and len(set(seen)) == 1 for seen in found.values()), found


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_parameters_that_overlap_step_one_after_the_other(options):
    """The second begins from what the first has written, as in two optimizers that are called in turn."""
    together, apart = randn(150), randn(150)
    params, others = ([nn.Parameter(flat[:100]), nn.Parameter(flat[50:])] for flat in (together, apart))
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        p.grad, q.grad = randn(100, seed=i + 1), randn(100, seed=i + 1)
    optimizer = torchlamb.Lamb(params, lr=0.1, weight_decay=0.1, **options)
    in_turn = [torchlamb.Lamb([q], lr=0.1, weight_decay=0.1, **options) for q in others]
    for _ in range(3):
        optimizer.step()
        for one in in_turn:
            one.step()
    assert torch.equal(together, apart)


def test_parameters_that_lie_next_to_each_other_do_not_overlap():
    """As flat buffers are cut, and rows in between each other: all of it is stepped."""
    flat = randn(12)
    values = [flat[:5].clone(), flat[5:].clone()]
    params = [nn.Parameter(flat[:5]), nn.Parameter(flat[5:])]
    grads = [randn(5, seed=1), randn(7, seed=2)]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    torchlamb.Lamb(params, lr=0.1).step()
    assert_close(params, reference_of(values, grads, lr=0.1))
    grid = randn(6, 4)
    values = [grid[:, :2].clone(), grid[:, 2:].clone()]
    params = [nn.Parameter(grid[:, :2]), nn.Parameter(grid[:, 2:])]
    grads = [randn(6, 2, seed=1), randn(6, 2, seed=2)]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    torchlamb.Lamb(params, lr=0.1).step()
    assert_close(params, reference_of(values, grads, lr=0.1))


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_a_gradient_in_memory_that_the_step_writes(options):
    """It counts as it was before the step: a small parameter's is a part of a large one, which is stepped first."""
    value, grad = randn(20_000), randn(20_000, seed=1)
    large, small = nn.Parameter(value.clone()), nn.Parameter(randn(100, seed=2))
    wanted = reference_of([value, small.clone()], [grad, value[:100]], lr=0.1, **options)
    large.grad, small.grad = grad, large.detach()[:100]
    torchlamb.Lamb([large, small], lr=0.1, **options).step()
    assert_close([large, small], wanted)


class Logged(torch.Tensor):
    """Has memory, and operations of its own."""

    called: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_a_gradient_of_a_subclass_is_read_as_a_plain_tensor(options):
    """Its own operations would decide what is written to a plain parameter and its moments."""
    value, grad = randn(4, 3), randn(4, 3, seed=1)
    p = nn.Parameter(value.clone())
    p.grad = grad.clone().as_subclass(Logged)
    Logged.called.clear()
    torchlamb.Lamb([p], lr=0.1, **options).step()
    assert_close([p], reference_of([value], [grad], lr=0.1, **options))
    assert not [name for name in Logged.called if name.endswith("_") and not name.startswith("__")]  # in place


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_named_parameters_of_a_subclass_that_adds_nothing_keep_the_kernels(options):
    class Named(nn.Parameter):
        """As the MindSpore front's."""

    value, grad = randn(4, 3), randn(4, 3, seed=1)
    p, q = Named(value.clone()), nn.Parameter(value.clone())
    p.grad, q.grad = grad.clone(), grad.clone()
    first, second = torchlamb.Lamb([p], **options), torchlamb.Lamb([q], **options)
    first.step()
    second.step()
    assert torch.equal(p, q)
    assert repr(first) == repr(second)


@pytest.mark.parametrize("options", BACKENDS, ids=str)
@pytest.mark.parametrize("what", ["param", "grad", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("size", ["freed", "short"])
def test_memory_that_was_freed_between_steps(what, size, options):
    """As FSDP frees what it gathered: refused with nothing changed, and stepped again once the memory is back."""

    def run():
        p, other = nn.Parameter(randn(1000)), nn.Parameter(randn(10, seed=1))
        optimizer = torchlamb.Lamb([other, p], **options)
        p.grad, other.grad = randn(1000, seed=2), randn(10, seed=3)
        for _ in range(2):  # the second is remembered with all of the state
            optimizer.step()
        tensor = {"param": p, "grad": p.grad, **optimizer.state[p]}[what]
        kept, before = tensor.detach().clone(), other.detach().clone()
        tensor.untyped_storage().resize_(0 if size == "freed" else 100)
        try:
            optimizer.step()
        except RuntimeError as error:
            said = str(error)
        else:
            said = None
        unchanged = torch.equal(other, before) and optimizer.state[other]["step"].item() == 2
        tensor.untyped_storage().resize_(4000)
        with torch.no_grad():
            tensor.copy_(kept)
        optimizer.step()
        return said, unchanged

    said, unchanged = forked(run)
    assert said is not None
    assert unchanged


@pytest.mark.parametrize("options", BACKENDS, ids=str)
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch._mkldnn], ids=str)
def test_parameters_of_other_layouts(layout, options):
    """They have no memory that a kernel could walk."""

    def run():
        warnings.simplefilter("ignore")  # that sparse layouts are in beta
        dense = randn(4, 3)
        p = nn.Parameter(dense.to_mkldnn() if layout is torch._mkldnn else dense.to_sparse(layout=layout))
        before = p.detach().to_dense().clone()
        try:
            optimizer = torchlamb.Lamb([p], **options)
            p.grad = torch.ones_like(p)
            optimizer.step()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            return str(error), torch.equal(p.detach().to_dense(), before)
        return None

    said = forked(run)
    assert said is not None
    assert said[1]


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_a_guard_over_parameters_without_values(options):
    """There is no norm over them; without a guard each is stepped for itself."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="meta"))]
    for p in params:
        p.grad = torch.ones_like(p)
    guarded = torchlamb.Lamb(params, max_grad_norm=1.0, **options)
    with pytest.raises(RuntimeError, match="meta device"):
        guarded.step()
    assert not guarded.state
    assert torch.equal(params[0], torch.ones(3))
    torchlamb.Lamb(params, **options).step()
    assert not torch.equal(params[0], torch.ones(3))


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_a_gradient_in_memory_that_another_row_writes(options):
    """It is read as it was before the step."""
    values, grad = [randn(1000), randn(500, seed=1)], randn(1000, seed=2)
    params = [nn.Parameter(v.clone()) for v in values]
    params[0].grad, params[1].grad = grad, params[0].detach()[200:700]
    torchlamb.Lamb(params, lr=0.1, **options).step()
    assert_close(params, reference_of(values, [grad, values[0][200:700]], lr=0.1))


class Tagged(torch.Tensor):
    """A subclass with memory as any, and words of its own."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["subclass", "another parameter's memory"])
def test_a_compiled_step_reads_odd_gradients_anew(kind):
    """What is copied of them is copied in the graph, not when that is made."""

    def run(compiles):
        p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.full((2, 2), 2.0))
        optimizer = torchlamb.Lamb([q, p], lr=0.1)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiles else optimizer.step
        for i in range(4):
            q.grad = torch.full((2, 2), 1.0 - i)
            p.grad = q.data if kind != "subclass" else torch.full((2, 2), 1.0 - 3 * i).as_subclass(Tagged)
            step()
        return p.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-6, atol=1e-7)
    torch.compiler.reset()


def test_gradients_that_are_zero_without_memory():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch._efficientzerotensor((3,))
    torchlamb.Lamb([p], weight_decay=0.1, lr=0.1).step()
    assert_close([p], [torch.full((3,), 0.9)])


@pytest.mark.parametrize("options", BACKENDS, ids=str)
def test_a_subclass_whose_halves_differ_has_a_ratio_for_each(options):
    def run():
        values, grad = [randn(4, 3), randn(4, 3, seed=1)], randn(4, 3, seed=2)
        p = nn.Parameter(TwoTensor(*(v.clone() for v in values)))
        optimizer = torchlamb.Lamb([p], lr=0.1, weight_decay=0.1, **options)
        p.grad = TwoTensor(grad.clone(), grad.clone())
        optimizer.step()
        assert_close([p.data.a, p.data.b], reference_of(values, [grad, grad], lr=0.1, weight_decay=0.1))

    forked(run)


def test_groups_that_were_written_by_hand():
    """Appended to `param_groups`, or empty and filled later."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = torchlamb.Lamb([{"params": [params[0]]}, {"params": []}])
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [params[1]]})
    optimizer.param_groups[1]["params"].append(params[2])
    optimizer.step()
    assert all(not torch.equal(p, torch.ones(3)) for p in params)


@pytest.mark.parametrize("betas", [(torch.tensor(0.9), torch.tensor(0.99)), torch.tensor([0.9, 0.99], dtype=torch.float64)])
def test_betas_that_are_tensors(betas):
    optimizer = torchlamb.Lamb([nn.Parameter(torch.ones(3))], betas=betas)
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.9, 0.99))
    assert all(type(beta) is float for beta in optimizer.param_groups[0]["betas"])
