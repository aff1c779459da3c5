"""When the CPU's kernels are taken, and what is said where they cannot be."""

from __future__ import annotations

import copy
import importlib.resources

import pytest
import torch
from calling import BF16, F16, F32, F64, assert_same, parameter, stored

import torchlamb
from torchlamb.backends import cpu

# Which backend


def taken(optimizer):
    """The backends of the buckets of a step."""
    optimizer._check_step()
    return [backend for backend, _ in optimizer._resolve()]


@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.complex64], ids=str)
def test_fused_is_honoured(dtype):
    p = parameter(3, 2, dtype=dtype)
    optimizer = torchlamb.Lamb([p], fused=True)
    assert f"cpu (fused=True: was asked for, with {cpu.library.isa} instructions)" in repr(optimizer)
    optimizer.step()
    assert taken(optimizer) == [cpu]


def test_kernels_are_the_default_and_can_be_refused():
    params = [parameter(3), parameter(2, dtype=BF16)]
    assert set(taken(torchlamb.Lamb(params))) == {cpu}
    for options in ({"fused": False}, {"foreach": True}, {"foreach": False}):
        assert cpu not in taken(torchlamb.Lamb(params, **options))


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
