"""Options as they come from configurations and schedulers: other sequences, NumPy's numbers, misspelt names."""

from __future__ import annotations

import collections
import copy
import enum
import io
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import torchlamb
from torchlamb import checkpoint
from torchlamb.plain import plain


class ListConfig(Sequence):
    """As omegaconf's: a sequence that is neither list nor tuple."""

    def __init__(self, content):
        self.content = content

    def __getitem__(self, index):
        return self.content[index]

    def __len__(self):
        return len(self.content)


class Level(enum.IntEnum):
    LOW = 1


PLAIN = (bool, int, float, str, type(None), torch.dtype, list, tuple, dict)


def is_plain(value) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(is_plain(k) and is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    return type(value) in PLAIN


def step(optimizer, count: int = 1):
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


BETAS = {
    "list": [0.5, 0.75], "ListConfig": ListConfig([0.5, 0.75]), "array": np.array([0.5, 0.75]),
    "float32 array": np.array([0.5, 0.75], dtype=np.float32), "numpy numbers": (np.float64(0.5), np.float32(0.75)),
    "ints": ListConfig([0, 0]), "deque": collections.deque([0.5, 0.75]), "0-dim arrays": (np.array(0.5), np.array([0.75])[0]),
}  # fmt: skip


@pytest.mark.parametrize("where", ["constructor", "group", "written", "loaded"])
@pytest.mark.parametrize("kind", BETAS)
def test_betas_as_any_sequence_of_two_numbers(kind, where):
    given = BETAS[kind]
    wanted = (0.0, 0.0) if kind == "ints" else (0.5, 0.75)
    p, q = nn.Parameter(torch.arange(1.0, 5.0)), nn.Parameter(torch.arange(1.0, 5.0))
    if where == "constructor":
        optimizer = torchlamb.Lamb([p], betas=given, phi_bounds=ListConfig([0, np.float64(10)]))
        assert optimizer.param_groups[0]["phi_bounds"] == (0.0, 10.0)
    elif where == "group":
        optimizer = torchlamb.Lamb([{"params": [p], "betas": given}])
    else:
        optimizer = torchlamb.Lamb([p])
        if where == "written":
            optimizer.param_groups[0]["betas"] = given
        else:
            saved = optimizer.state_dict()
            saved["param_groups"][0]["betas"] = given
            optimizer.load_state_dict(saved)
    step(optimizer, 2)
    reference = torchlamb.Lamb([q], betas=wanted)
    step(reference, 2)
    assert torch.equal(p, q)
    betas = optimizer.param_groups[0]["betas"]
    assert betas == wanted
    assert type(betas) is tuple
    assert {type(beta) for beta in betas} == {float}


@pytest.mark.parametrize(
    "betas", [(0.9,), (0.9, 0.9, 0.9), "09", 0.9, {0.9: 1, 0.99: 2}, {0.9, 0.99}, np.ones((2, 1)), np.array(0.9), (0.9, "a")]
)
def test_what_is_no_sequence_of_two_numbers(betas):
    with pytest.raises((TypeError, ValueError), match=r"betas.* must be (two floats|a float) in \[0, 1\)"):
        torchlamb.Lamb([nn.Parameter(torch.ones(2))], betas=betas)


NUMPY = {
    "lr": np.float32(0.25), "eps": np.float64(1e-6), "weight_decay": np.int64(0), "bias_correction": np.True_,
    "blocks": np.int32(2), "max_grad_norm": np.float16(1.0), "maximize": np.False_, "foreach": np.True_,
    "trust_ratio_bounds": np.array([0, 10]),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMPY)
def test_numpys_numbers_are_stored_as_plain_ones(name):
    """At construction, in groups, and where a scheduler writes them."""
    value = NUMPY[name]
    optimizers = [
        torchlamb.Lamb([nn.Parameter(torch.ones(4))], **{name: value}),
        torchlamb.Lamb([{"params": [nn.Parameter(torch.ones(4))], name: value}]),
        torchlamb.Lamb([nn.Parameter(torch.ones(4))]),
    ]
    optimizers[2].param_groups[0][name] = value
    assert is_plain(optimizers[2].state_dict()["param_groups"])
    for optimizer in optimizers:
        step(optimizer)
        group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        assert is_plain(group)
        assert np.array_equal(group[name], value)
        assert through_a_file(optimizer.state_dict())


class NumpyLR(lr_scheduler.LRScheduler):
    """A scheduler of somebody's own, which computes with NumPy."""

    def get_lr(self):
        return [base * np.cos(np.float64(self.last_epoch) / 100) for base in self.base_lrs]


@pytest.mark.parametrize("kind", [torchlamb.Lamb, torch.optim.AdamW])
def test_a_scheduler_that_writes_numpys_numbers_can_be_saved(kind, tmp_path):
    p = nn.Linear(2, 2)
    optimizer = kind(p.parameters(), lr=0.1)
    scheduler = NumpyLR(optimizer)
    optimizer.param_groups[0]["base"] = np.float32(0.5)
    for _ in range(3):
        step(optimizer)
        scheduler.step()
    assert type(optimizer.param_groups[0]["lr"]) is np.float64
    checkpoint.save(tmp_path, p, optimizer, scheduler=scheduler.state_dict(), best=np.float32(0.5), name=np.str_("run"))
    other = kind(p.parameters(), lr=0.5)
    more = checkpoint.load(tmp_path, p, other)
    assert type(other.param_groups[0]["lr"]) is float
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert more["best"] == 0.5
    assert is_plain(more)
    resumed = NumpyLR(other)
    resumed.load_state_dict(more["scheduler"])
    assert resumed.last_epoch == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"metrics": {"losses": [1.0, {"worst": object()}]}}, r"more\['metrics'\]\['losses'\]\[1\]\['worst'\] is a object"),
        ({"state": np.random.default_rng(0)}, r"more\['state'\] is a Generator"),
        ({"function": [1, lambda: 3]}, r"more\['function'\]\[1\] is a function"),
        ({"array": np.ones(3)}, r"more\['array'\] is a ndarray"),
        ({"keys": {object(): 1}}, r"a key of more\['keys'\] is a object"),
    ],
)
def test_what_cannot_be_saved_is_named(more, words, tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=words):
        checkpoint.save(tmp_path, model, torchlamb.Lamb(model.parameters()), **more)
    assert not list(tmp_path.iterdir())
    optimizer = torchlamb.Lamb(model.parameters())
    optimizer.param_groups[0]["owner"] = object()
    with pytest.raises(TypeError, match=r"optimizer\['param_groups'\]\[0\]\['owner'\] is a object"):
        checkpoint.save(tmp_path, model, optimizer)


def test_plain_values():
    kept = [1, 2.5, "a", None, True, (1, [2]), {"a": {1: (2,)}}, torch.ones(2), torch.float32, collections.OrderedDict(a=1)]
    for value in kept:
        assert plain(value) is value
    assert plain({"a": [np.float32(0.5), (np.int64(3),)]}) == {"a": [0.5, (3,)]}
    assert is_plain(plain({np.str_("a"): ListConfig([Level.LOW, np.bool_(True)])}))
    changed = plain(collections.OrderedDict(a=np.float64(1)))
    assert type(changed) is collections.OrderedDict
    assert type(changed["a"]) is float
    counter = plain(collections.Counter({np.int64(3): 2}))
    assert counter == {3: 2}
    assert is_plain(dict(counter))


# Misspelt options


@pytest.mark.parametrize(
    ("key", "likely"),
    [
        ("weight_decy", "weight_decay"), ("weigth_decay", "weight_decay"), ("weightdecay", "weight_decay"), ("LR", "lr"),
        ("beta", "betas"), ("max_gradnorm", "max_grad_norm"), ("learning_rate", "lr"), ("layer_adaption", "layer_adaptation"),
        ("masterweights", "master_weights"), ("fuse", "fused"), ("maximise", "maximize"), ("Block", "blocks"),
        ("wd", "weight_decay"),
        ("weight-decay", "weight_decay"), ("grad_centralisation", "grad_centralization"),
    ],
)  # fmt: skip
def test_a_misspelt_option_is_told_once(key, likely):
    groups = [{"params": [nn.Parameter(torch.ones(2))], key: 0.5} for _ in range(2)]
    with pytest.warns(UserWarning, match=f"'{key}' of a parameter group is no option.*did you mean '{likely}'") as notes:
        optimizer = torchlamb.Lamb(groups)
    assert len(notes) == 1
    assert notes[0].filename == __file__
    assert optimizer.param_groups[0][key] == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer, 2)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], key: 1.0})
    with pytest.warns(UserWarning, match="did you mean") as notes:
        torchlamb.Lamb([nn.Parameter(torch.ones(2))]).add_param_group({"params": [nn.Parameter(torch.ones(2))], key: 1.0})
    assert notes[0].filename == __file__


def test_keys_that_are_no_options_are_legal():
    """Of schedulers, of timm's and others' layer decay, of users."""
    keys = [
        "initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "lr_scale", "lr_mult", "lr_decay",
        "max_momentum", "base_momentum",
        "momentum", "name", "names", "group_name", "no_decay", "decay", "initial_weight_decay", "weight_decay_end", "layer",
        "layer_id", "index", "rank", "step", "max_weight_decay", "use_weight_decay", "apply_weight_decay", "params_id", "tag",
        "betas2", "warmup", "is_bias", "foreach_", "max_norm", "algorithm", "use_muon", "capture", "alpha", "mode",
    ]  # fmt: skip
    allowed = {"betas2", "foreach_"}  # of these one may be in doubt
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = {"params": [nn.Parameter(torch.ones(2))], **{key: 1 for key in keys if key not in allowed}, 7: "a number"}
        optimizer = torchlamb.Lamb([group])
        step(optimizer)
    assert all(optimizer.param_groups[0][key] == 1 for key in keys if key not in allowed)
