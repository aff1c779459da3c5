"""What the CPU's kernels refuse to touch."""

from __future__ import annotations

import pytest
import torch
from calling import BF16, F32, assert_same, in_child, parameter, stored
from cases import in_two_phases
from torch import nn

import torchlamb
from torchlamb.backends import cpu

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
        (freed, "parameter 1 of group 0 is larger than its storage"),
        (freed_moment, "exp_avg_sq of parameter 1 of group 0 is larger than its storage"),
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
