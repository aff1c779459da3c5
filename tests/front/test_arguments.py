"""The constructor and parameter groups: what is accepted, what is refused and that a refusal changes nothing."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from cases import DEFAULTS
from torch._subclasses.fake_tensor import FakeTensorMode

import torchlamb
from torchlamb.backends import cpu
from torchlamb.rule import Scalars

# Frozen: adding a key later would break loading older distributed checkpoints.
GROUP_KEYS = {
    "params", "lr", "betas", "eps", "weight_decay", "bias_correction", "layer_adaptation", "grad_averaging", "phi_bounds",
    "trust_ratio_bounds", "blocks", "grad_centralization", "max_grad_norm", "skip_nonfinite", "master_weights",
    "stochastic_rounding", "state_dtype", "maximize", "foreach", "fused", "capturable", "differentiable",
}  # fmt: skip

INVALID = [
    ("lr", -1.0, ValueError), ("lr", math.nan, ValueError), ("lr", math.inf, ValueError), ("lr", "1e-3", TypeError),
    ("lr", None, TypeError), ("lr", True, TypeError), ("lr", torch.tensor(-1.0), ValueError),
    ("lr", torch.tensor(1 + 1j), TypeError), ("lr", torch.tensor(True), TypeError),
    ("betas", (0.9,), ValueError), ("betas", (0.9, 1.0), ValueError), ("betas", (-0.1, 0.9), ValueError),
    ("betas", (0.9, math.nan), ValueError), ("betas", 0.9, TypeError), ("betas", ("a", 0.9), TypeError),
    ("eps", -1e-8, ValueError), ("eps", math.nan, ValueError), ("eps", "0", TypeError),
    ("weight_decay", -0.1, ValueError), ("weight_decay", math.inf, ValueError), ("weight_decay", None, TypeError),
    ("bias_correction", 1, TypeError), ("layer_adaptation", None, TypeError), ("grad_averaging", "yes", TypeError),
    ("phi_bounds", (2, 1), ValueError), ("phi_bounds", (-1, 1), ValueError), ("phi_bounds", 1.0, TypeError),
    ("phi_bounds", (0, 0), ValueError), ("trust_ratio_bounds", (0, math.nan), ValueError),
    ("trust_ratio_bounds", (0, 1, 2), ValueError),
    ("blocks", 0, ValueError), ("blocks", 1.0, TypeError), ("blocks", True, TypeError),
    ("grad_centralization", 0, TypeError),
    ("max_grad_norm", 0.0, ValueError), ("max_grad_norm", math.inf, ValueError), ("max_grad_norm", "1", TypeError),
    ("skip_nonfinite", None, TypeError),
    ("master_weights", 1, TypeError), ("stochastic_rounding", None, TypeError),
    ("state_dtype", "bf16", TypeError), ("state_dtype", torch.float16, ValueError), ("state_dtype", torch.float64, ValueError),
    ("maximize", 1, TypeError), ("foreach", 1, TypeError), ("fused", "yes", TypeError),
    ("capturable", None, TypeError), ("differentiable", 1, TypeError),
]  # fmt: skip


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(shape))


@pytest.mark.parametrize(("name", "value", "error"), INVALID, ids=lambda v: str(v))
def test_invalid_argument(name, value, error):
    with pytest.raises(error, match=name):
        torchlamb.Lamb([parameter(2)], **{name: value})
    optimizer = torchlamb.Lamb([parameter(2)])
    before = repr(optimizer)
    with pytest.raises(error, match=name):
        optimizer.add_param_group({"params": [parameter(2)], name: value})
    assert repr(optimizer) == before
    assert not optimizer.state


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 2)])
def test_lr_tensor_with_several_elements(shape):
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        torchlamb.Lamb([parameter(2)], lr=torch.ones(shape))


def test_foreach_cannot_be_differentiable():
    with pytest.raises(RuntimeError, match="foreach=None"):
        torchlamb.Lamb([parameter(2)], foreach=True, differentiable=True)


@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 1.0), ("skip_nonfinite", True), ("differentiable", True)])
def test_options_that_must_be_the_same_in_all_groups(name, value):
    with pytest.raises(ValueError, match=f"{name} must be the same in all parameter groups"):
        torchlamb.Lamb([{"params": [parameter(1)]}, {"params": [parameter(1)], name: value}])
    if name != "differentiable":  # which torch reads from the constructor's argument
        torchlamb.Lamb([{"params": [parameter(1)], name: value}, {"params": [parameter(1)], name: value}])


@pytest.mark.parametrize("shape", [(3,), (3, 2), ()])
def test_blocks_that_do_not_divide(shape):
    with pytest.raises(ValueError, match=r"blocks=2 does not divide dim 0 of parameter 'odd'"):
        torchlamb.Lamb([("even", parameter(2)), ("odd", parameter(*shape))], blocks=2)


def test_groups_that_were_made_to_differ_later():
    params = [parameter(1), parameter(1)]
    for p in params:
        p.grad = torch.ones(1)
    optimizer = torchlamb.Lamb([{"params": [p]} for p in params])
    optimizer.param_groups[1]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match="max_grad_norm must be the same in all parameter groups"):
        optimizer.step()
    assert not optimizer.state


def test_blocks_of_a_parameter_swapped_in_later():
    optimizer = torchlamb.Lamb([parameter(2)], blocks=2)
    swapped = parameter(3)
    swapped.grad = torch.ones(3)
    optimizer.param_groups[0]["params"][0] = swapped
    with pytest.raises(ValueError, match="parameter 0 of group 0"):
        optimizer.step()
    assert torch.equal(swapped, torch.ones(3))
    assert not optimizer.state


def test_group_keys_are_frozen():
    optimizer = torchlamb.Lamb([parameter(2)])
    assert set(optimizer.param_groups[0]) == GROUP_KEYS
    assert set(optimizer.state_dict()["param_groups"][0]) == GROUP_KEYS
    assert set(torchlamb.Lamb([("a", parameter(2))]).param_groups[0]) == GROUP_KEYS | {"param_names"}


def test_options_are_plain_values():
    optimizer = torchlamb.Lamb(
        [parameter(2)], lr=np.float32(0.5), betas=[np.float64(0.5), 0.9], phi_bounds=[0, 2], weight_decay=1
    )
    plain = (bool, int, float, tuple, type(None), torch.dtype)
    group = optimizer.param_groups[0]
    assert all(type(value) in plain for name, value in group.items() if name != "params")
    assert group["lr"] == 0.5
    assert group["betas"] == (0.5, 0.9)
    assert group["phi_bounds"] == (0.0, 2.0)


def test_words_and_order_are_those_of_adamw():
    ours = list(inspect.signature(torchlamb.Lamb.__init__).parameters)
    adamw = list(inspect.signature(torch.optim.AdamW.__init__).parameters)
    assert [name for name in adamw if name != "amsgrad"][:6] == ours[:6]
    assert set(adamw) - set(ours) == {"amsgrad"}
    for name in ("lr", "betas", "maximize", "foreach", "fused", "capturable", "differentiable"):
        assert DEFAULTS[name] == inspect.signature(torch.optim.AdamW.__init__).parameters[name].default


def test_signatures_equal_those_of_torch():
    for name in ("step", "add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        ours = inspect.signature(getattr(torchlamb.Lamb, name)).parameters
        theirs = inspect.signature(getattr(torch.optim.AdamW, name)).parameters
        assert list(ours) == list(theirs), name
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()], name


@pytest.mark.parametrize("params", [[], None, 3, torch.ones(2), [object()], {parameter(1), parameter(2)}])
def test_what_is_no_list_of_parameters(params):
    if isinstance(params, set):
        params = [{"params": params}]
    with pytest.raises((TypeError, ValueError)):
        torchlamb.Lamb(params)


def test_a_parameter_in_two_groups():
    p = parameter(2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        torchlamb.Lamb([{"params": [p]}, {"params": [p]}])


def test_generators_are_accepted():
    model = torch.nn.Linear(2, 2)
    optimizer = torchlamb.Lamb({"params": (p for p in [q])} for q in model.parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]


def test_repr_says_what_is_in_use_and_why():
    assert "cpu: foreach (fused=False was asked for; " in repr(torchlamb.Lamb([parameter(2)], fused=False))
    both = repr(torchlamb.Lamb([parameter(2), parameter(2), parameter(2**14 + 1)], fused=False))
    assert both.count("cpu: foreach (fused=False") == both.count("cpu: single (fused=False") == 1
    double = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    why_not = "they have no float64" if cpu.library.isa else cpu.library.why_not
    assert f"cpu: foreach (no kernels, {why_not}; " in repr(torchlamb.Lamb([double]))
    assert "cpu: foreach (foreach=True was asked for)" in repr(torchlamb.Lamb([parameter(2)], foreach=True))
    assert "cpu: single (differentiable=True" in repr(torchlamb.Lamb([parameter(2)], differentiable=True))
    meta = torch.nn.Parameter(torch.ones(2, device="meta"))
    assert "meta: foreach" in repr(torchlamb.Lamb([meta]))


def test_a_group_of_one_tensor_is_checked_too():
    with pytest.raises(ValueError, match="does not divide"):
        torchlamb.Lamb([{"params": parameter(3)}], blocks=2)


def test_differentiable_is_set_in_the_constructor_only():
    with pytest.raises(ValueError, match="differentiable must be the same"):
        torchlamb.Lamb([{"params": [parameter(1)], "differentiable": True}])


def test_a_leaf_cannot_be_differentiated_through():
    p = parameter(2)
    p.grad = torch.ones(2)
    optimizer = torchlamb.Lamb([p], differentiable=True)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is a leaf"):
        optimizer.step()
    assert not optimizer.state


def test_a_tensor_lr_goes_where_its_bucket_is():
    """One on the CPU serves every device. Fake tensors stand in for devices that are not here."""
    group = torchlamb.Lamb([parameter(2)]).param_groups[0]
    with FakeTensorMode():
        for lr_device, wanted in [("cpu", "cpu"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:0")]:
            group["lr"] = torch.ones(1, device=lr_device)
            scalars = Scalars.from_group(group).on(torch.device("cuda:0"))
            assert scalars.lr.device == torch.device(wanted)
            assert scalars.lr.dim() == 0


def test_float8_parameters_with_a_gradient_are_refused():
    p = torch.nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))
    p.grad = torch.ones(2).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"parameter 'small' has dtype torch.float8_e4m3fn.*16 bits or more"):
        torchlamb.Lamb([("small", p)])


@pytest.mark.parametrize("guard", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}, {"capturable": True}], ids=str)
def test_where_the_step_count_lies(guard):
    """With the parameter wherever only the device may know it: meta tensors stand in for a device."""
    p = torch.nn.Parameter(torch.ones(2, device="meta"))
    p.grad = torch.ones(2, device="meta")
    optimizer = torchlamb.Lamb([p], **guard)
    optimizer.step()
    assert optimizer.state[p]["step"].device.type == ("meta" if guard else "cpu")
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.tensor(3.0)
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["step"].device.type == ("meta" if guard else "cpu")
    for capturable in (True, False):  # it never comes back to the host
        optimizer.param_groups[0]["capturable"] = capturable
        optimizer.step()
        assert optimizer.state[p]["step"].device.type == "meta"


def test_step_under_graph_capture_needs_capturable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    p = parameter(2)
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="capturable=True"):
        torchlamb.Lamb([p]).step()
    torchlamb.Lamb([p], capturable=True).step()


def test_what_is_stored_must_fit_the_parameters():
    half, bf16 = (torch.nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float16, torch.bfloat16))
    with pytest.raises(ValueError, match="exclude each other"):
        torchlamb.Lamb([bf16], master_weights=True, stochastic_rounding=True)
    with pytest.raises(TypeError, match=r"'scale' has dtype torch.float16; use master_weights"):
        torchlamb.Lamb([("scale", half)], stochastic_rounding=True)
    with pytest.raises(TypeError, match=r"state_dtype.*parameter 0 of group 0 has dtype torch.complex64"):
        torchlamb.Lamb([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], state_dtype=torch.bfloat16)
    for name, value in {"master_weights": True, "stochastic_rounding": True, "state_dtype": torch.float32}.items():
        with pytest.raises(ValueError, match=f"{name}=.*differentiable=True"):
            torchlamb.Lamb([bf16], differentiable=True, **{name: value})
    # A model may mix what is rounded with what is not.
    torchlamb.Lamb([bf16, parameter(2)], stochastic_rounding=True)
    torchlamb.Lamb([half, bf16, parameter(2)], master_weights=True, state_dtype=torch.bfloat16)
    # Checked again when it is changed later, before anything else changes.
    optimizer = torchlamb.Lamb([half])
    half.grad = torch.ones_like(half)
    optimizer.param_groups[0]["stochastic_rounding"] = True
    with pytest.raises(TypeError, match="use master_weights"):
        optimizer.step()
    assert torch.equal(half, torch.ones_like(half))
    assert not optimizer.state


def run_three_steps(poison: float | None = None, dtype: torch.dtype = torch.float32, **options):
    torch.manual_seed(0)
    p = torch.randn(4, 3, 2).to(dtype).requires_grad_()
    if options.get("differentiable"):
        p = p.clone()
    # Without decay the ratio cancels what grad_averaging=False changes: a factor of the whole update.
    optimizer = torchlamb.Lamb([p], **{"weight_decay": 0.01, **options})
    for step in range(3):
        p.grad = (torch.randn(4, 3, 2) + 1).to(dtype)
        if step == 2 and poison is not None:
            p.grad[0] = poison
        optimizer.step()
    return p, repr(optimizer).partition("Backends")[2]


def test_every_knob_turns_something():
    """Changing an argument changes the parameters, or else what the documentation says it changes."""
    values = {
        "lr": 0.1, "betas": (0.5, 0.5), "eps": 0.1, "weight_decay": 0.1, "bias_correction": False, "layer_adaptation": False,
        "grad_averaging": False, "phi_bounds": (0.0, 0.1), "trust_ratio_bounds": (0.0, 0.1), "blocks": 2,
        "grad_centralization": True, "max_grad_norm": 1e-3, "maximize": True,
    }  # fmt: skip
    base, base_backend = run_three_steps()
    for name, value in values.items():
        assert not torch.allclose(run_three_steps(**{name: value})[0], base, rtol=1e-5), name
    assert run_three_steps(foreach=True)[1] != base_backend
    assert base.grad_fn is None
    assert run_three_steps(differentiable=True)[0].grad_fn is not None
    assert run_three_steps(poison=math.nan)[0].isnan().any()
    assert run_three_steps(poison=math.nan, skip_nonfinite=True)[0].isfinite().all()
    assert reads_back(capturable=False)
    assert not reads_back(capturable=True)
    low = run_three_steps(dtype=torch.bfloat16, lr=0.05)[0]
    for storage in ({"master_weights": True}, {"stochastic_rounding": True}, {"state_dtype": torch.bfloat16}):
        assert not torch.equal(run_three_steps(dtype=torch.bfloat16, lr=0.05, **storage)[0], low), storage
    assert run_three_steps(fused=False)[1] != run_three_steps(fused=None)[1]
    turned = {*values, "foreach", "fused", "differentiable", "skip_nonfinite", "capturable"}
    turned |= {"master_weights", "stochastic_rounding", "state_dtype"}
    assert turned == DEFAULTS.keys()


def reads_back(**options) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        calls: list[str] = []
        for name in ("item", "tolist", "__bool__", "__float__", "numpy"):
            original = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda t, *a, o=original, n=name: calls.append(n) or o(t, *a))
        run_three_steps(max_grad_norm=1.0, **options)
        return bool(calls)
