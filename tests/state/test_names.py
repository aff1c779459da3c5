"""Names tell which parameter is which when a state dict or a checkpoint is loaded; else positions do, and it is said."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import torchlamb
from torchlamb import checkpoint
from torchlamb.names import bare


class Net(nn.Module):
    """Layers of one shape, registered in any order."""

    def __init__(self, *order: str) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(3, 3))

    def forward(self, x):
        for name in ("first", "second", "third"):
            x = getattr(self, name)(x).tanh()
        return x


def make(*order: str, kind=torchlamb.Lamb, wrap=lambda model: model, split: bool = False):
    torch.manual_seed(0)
    model = Net(*order)
    pairs = list(wrap(model).named_parameters())
    groups = [{"params": pairs[:2]}, {"params": pairs[2:]}] if split else pairs
    return model, kind(groups, lr=0.01)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


class Wrapped(nn.Module):
    """As DistributedDataParallel and DataParallel are."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Compiled(nn.Module):
    """As torch.compile returns."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


ORDER, OTHER = ("first", "second", "third"), ("third", "first", "second")
WRAPS = {
    "none": lambda m: m,
    "DDP": Wrapped,
    "compile": Compiled,
    "DDP of compile": lambda m: Wrapped(Compiled(m)),
    "compile of DDP, twice": lambda m: Compiled(Wrapped(Compiled(Wrapped(m)))),
}


@pytest.mark.parametrize("kind", [torchlamb.Lamb, torch.optim.AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("how", ["load_state_dict", "checkpoint"])
def test_layers_in_another_order_keep_their_own_moments(how, wrap, kind, tmp_path):
    if kind is torch.optim.AdamW and how == "load_state_dict":
        pytest.skip("which goes by position")
    model, optimizer = make(*ORDER, wrap=WRAPS[wrap], kind=kind)
    other, resumed = make(*OTHER, kind=kind)
    train(model, optimizer, range(3))
    if how == "checkpoint":
        checkpoint.save(tmp_path, model, optimizer)
        checkpoint.load(tmp_path, other, resumed)
    else:
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.load_state_dict(model.state_dict())
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    for name in mine:
        for key, value in optimizer.state[mine[name]].items():
            assert torch.equal(value, resumed.state[theirs[name]][key]), (name, key)
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert resumed.param_groups[0]["param_names"] == list(theirs)


def test_a_wrapped_model_is_loaded_where_it_is_not_wrapped(tmp_path):
    for saved_as, loaded_as in (("compile", "none"), ("none", "DDP of compile"), ("DDP", "compile")):
        model, optimizer = make(*ORDER, wrap=WRAPS[saved_as])
        train(model, optimizer, range(2))
        folder = tmp_path / saved_as
        checkpoint.save(folder, WRAPS[saved_as](model), optimizer)
        other, resumed = make(*OTHER, wrap=WRAPS[loaded_as])
        checkpoint.load(folder, WRAPS[loaded_as](other), resumed)
        assert torch.equal(model.second.weight, other.second.weight)
        assert torch.equal(optimizer.state[model.second.weight]["exp_avg"], resumed.state[other.second.weight]["exp_avg"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint.load(folder, WRAPS[loaded_as](other), resumed)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("how", ["load_state_dict", "checkpoint"])
def test_after_a_rename_positions_tell_and_the_new_names_stay(how, split, tmp_path):
    model, optimizer = make(*ORDER, split=split)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    pairs = [(name.replace("second", "middle"), p) for name, p in model.named_parameters()]
    groups = [{"params": pairs[:2]}, {"params": pairs[2:]}] if split else pairs
    renamed = torchlamb.Lamb(groups, lr=0.01)
    words = (
        r"parameter 0 of group 1 is 'middle.weight' here and 'second.weight'" if split else r"parameter 2 of group 0 is 'midd"
    )
    checkpoint.save(tmp_path, model, optimizer)
    with pytest.warns(UserWarning, match=words) as notes:
        checkpoint.load(tmp_path, model, renamed) if how == "checkpoint" else renamed.load_state_dict(saved)
    assert len(notes) == 1
    assert notes[0].filename == __file__
    assert [name for group in renamed.param_groups for name in group["param_names"]] == [name for name, _ in pairs]
    for i, p in enumerate(model.parameters()):
        assert torch.equal(renamed.state[p]["exp_avg"], saved["state"][i]["exp_avg"])
    train(model, renamed, range(1))
    assert "middle.weight" in renamed.trust_ratios()


def test_without_names_on_a_side_positions_tell():
    """As in torch, and without a word: there is no other way."""
    model, optimizer = make(*ORDER)
    train(model, optimizer, range(2))
    nameless = torchlamb.Lamb(model.parameters())
    nameless.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert nameless.param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]  # as in torch
    saved = copy.deepcopy(torchlamb.Lamb(model.parameters()).state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


def test_names_that_are_not_unique_do_not_tell():
    params = [nn.Parameter(torch.full((2,), float(i))) for i in range(3)]
    for p in params:
        p.grad = torch.ones(2) * (1 + p.detach()[0])
    names = ["weight", "weight", "bias"]
    optimizer = torchlamb.Lamb(list(zip(names, params, strict=True)))
    optimizer.step()
    same = torchlamb.Lamb(list(zip(names, params, strict=True)))
    same.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # the same names in the same order: nothing to say
    other = torchlamb.Lamb(list(zip(["weight", "bias", "weight"], params, strict=True)))
    with pytest.warns(UserWarning, match="parameter 1 of group 0 is 'bias' here and 'weight'"):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for loaded in (same, other):
        assert all(torch.equal(loaded.state[p]["exp_avg"], optimizer.state[p]["exp_avg"]) for p in params)


def test_a_parameter_appended_to_a_named_group():
    """It has no name; what was saved is loaded, and saved again."""
    model, optimizer = make(*ORDER)
    late = nn.Parameter(torch.ones(2))
    optimizer.param_groups[0]["params"].append(late)
    late.grad = torch.ones(2)
    train_step = lambda: (model(torch.ones(2, 3)).sum().backward(), optimizer.step())  # noqa: E731
    train_step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][6]["step"] == 1
    optimizer.load_state_dict(saved)
    assert optimizer.state[late]["step"].item() == 1
    train_step()
    other, resumed = make(*OTHER)
    resumed.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))
    with pytest.warns(UserWarning, match="parameter 0 of group 0 is 'third.weight' here and 'first.weight'"):
        resumed.load_state_dict(saved)
    nameless = torchlamb.Lamb([*other.parameters(), nn.Parameter(torch.ones(2))])
    nameless.load_state_dict(saved)
    assert "param_names" not in nameless.param_groups[0]  # there are not enough


def test_another_shape_under_the_same_name_is_refused():
    model, optimizer = make(*ORDER)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    model.second = nn.Linear(5, 3)
    other = torchlamb.Lamb(reversed(list(model.named_parameters())))
    with pytest.raises(ValueError, match=r"exp_avg of parameter 'second.weight' \(group 0\) has shape \(3, 3\).*\(3, 5\)"):
        other.load_state_dict(saved)
    assert not other.state


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("module.fc.weight", "fc.weight"),
        ("module._orig_mod.module.fc.weight", "fc.weight"),
        ("_orig_mod.fc.weight", "fc.weight"),
        ("layers.0._orig_mod.fc.weight", "layers.0.fc.weight"),
        ("_fsdp_wrapped_module.fc._checkpoint_wrapped_module.weight", "fc.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("modules.weight", "modules.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("module", "module"),
    ],
)
def test_what_wrappers_put_around_names(name, wanted):
    assert bare(name) == wanted
