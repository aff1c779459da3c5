"""torchlamb.checkpoint: whole or not there, checksummed, the last few kept, and nothing changed by what cannot be loaded."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import os
import pickle
import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import torchlamb
from torchlamb import checkpoint


def make(seed: int = 0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return model, torchlamb.Lamb(model.named_parameters(), lr=0.1, max_grad_norm=1.0, **options)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


def bits(model, optimizer):
    state = optimizer.state_dict()
    return copy.deepcopy((model.state_dict(), state["state"], state["param_groups"]))


def assert_same(a, b):
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(value, b[0][name]) for name, value in a[0].items())
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(value, b[1][i][key]) for i, state in a[1].items() for key, value in state.items())
    assert a[2] == b[2]


@pytest.fixture
def saved(tmp_path):
    """A folder with two checkpoints, after 2 and 4 steps, and what the run was then."""
    model, optimizer = make()
    runs = []
    for steps in (range(2), range(2, 4)):
        train(model, optimizer, steps)
        checkpoint.save(tmp_path, model, optimizer, step=steps.stop)
        runs.append(bits(model, optimizer))
    return tmp_path, runs


def test_a_run_goes_on_bitwise(tmp_path):
    model, optimizer = make()
    train(model, optimizer, range(3))
    more = {"step": 3, "rng": torch.get_rng_state(), "nested": {"a": [1, 2.5, "b", None, (True,)]}}
    where = checkpoint.save(tmp_path / "new" / "folder", model, optimizer, **more)
    other, resumed = make(seed=1)
    loaded = checkpoint.load(tmp_path / "new" / "folder", other, resumed)
    assert torch.equal(loaded.pop("rng"), more.pop("rng"))
    assert loaded == more == {k: v for k, v in checkpoint.more_of(where).items() if k != "rng"}
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(bits(model, optimizer), bits(other, resumed))


def test_files_are_what_torch_loads(saved):
    where = checkpoint.newest(saved[0])
    assert where.name == f"checkpoint-00000002-{hashlib.sha256(where.read_bytes()).hexdigest()[:16]}.pt"
    content = torch.load(where, weights_only=True)
    assert torch.equal(content["model"]["0.weight"], saved[1][1][0]["0.weight"])


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_other_optimizers(tmp_path, optimizer):
    model, _ = make()
    other, _ = make(seed=1)
    runs = [(m, optimizer(m.parameters(), lr=0.1)) for m in (model, other)]
    train(*runs[0], range(3))
    checkpoint.save(tmp_path, *runs[0])
    checkpoint.load(tmp_path, *runs[1])
    assert_same(bits(*runs[0]), bits(*runs[1]))


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_are_kept(tmp_path, keep):
    model, optimizer = make()
    places = [checkpoint.save(tmp_path, model, optimizer, keep=keep, number=i) for i in range(5)]
    assert sorted(tmp_path.iterdir()) == places[-keep:]
    assert checkpoint.load(tmp_path, model, optimizer) == {"number": 4}
    assert checkpoint.load(places[-keep], model, optimizer) == {"number": 5 - keep}


def test_what_dead_processes_have_left_is_removed(saved):
    folder, _ = saved
    (folder / ".saving-checkpoint-00000003").write_bytes(b"half")
    (folder / ".saving-checkpoint-00000004").mkdir()
    (folder / "notes.txt").write_text("mine")
    model, optimizer = make()
    assert checkpoint.load(folder, model, optimizer) == {"step": 4}
    where = checkpoint.save(folder, model, optimizer)
    assert {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")} == {"notes.txt"}
    assert where.name.startswith("checkpoint-00000003-")


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damage_at_any_byte_is_seen(saved, damage):
    """Every byte of a checkpoint of some kilobytes; the older one is found each time."""
    folder, _ = saved
    older, newer = sorted(folder.iterdir())
    good = newer.read_bytes()
    for at in range(len(good)):
        newer.write_bytes(good[:at] if damage == "truncate" else good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        assert checkpoint.newest(folder) == older, at
    newer.write_bytes(good)
    assert checkpoint.newest(folder) == newer


def test_a_damaged_one_is_named_and_the_next_older_one_loaded(saved):
    folder, runs = saved
    older, newer = sorted(folder.iterdir())
    newer.write_bytes(newer.read_bytes()[:-1])
    model, optimizer = make(seed=1)
    with pytest.warns(UserWarning, match=f"{newer.name} is damaged: .*next older"):
        assert checkpoint.load(folder, model, optimizer) == {"step": 2}
    assert_same(bits(model, optimizer), runs[0])
    before = bits(model, optimizer)
    with pytest.raises(RuntimeError, match=f"{newer.name} is damaged"):
        checkpoint.load(newer, model, optimizer)
    older.write_bytes(b"")
    with pytest.raises(RuntimeError, match=f"no checkpoint can be loaded: .*{newer.name}.*{older.name} is damaged"):
        checkpoint.load(folder, model, optimizer)
    assert checkpoint.newest(folder) is None
    assert_same(bits(model, optimizer), before)


def test_there_is_none(tmp_path):
    model, optimizer = make()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "checkpoint-00000001-0123456789abcdef.pt"):
        with pytest.raises(FileNotFoundError, match="has no checkpoint; give the folder"):
            checkpoint.load(path, model, optimizer)
        assert checkpoint.newest(path) is None
    (tmp_path / "mine.pt").write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"mine\.pt has no checksum in its name"):
        checkpoint.load(tmp_path / "mine.pt", model, optimizer)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_nothing_in_a_file_is_executed(saved, tmp_path, how):
    folder, _ = saved
    bomb = {"class": "Lamb", "model": Bomb(marker := tmp_path / "executed"), "optimizer": {}, "more": {}}
    file = folder / "file"
    if how == "torch.save":
        torch.save(bomb, file)
    else:
        file.write_bytes(pickle.dumps(bomb))
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    file.rename(folder / f"checkpoint-00000003-{checksum}.pt")
    model, optimizer = make()
    before = bits(model, optimizer)
    with pytest.raises(RuntimeError, match=f"checkpoint-00000003-{checksum}.pt is no checkpoint of save"):
        checkpoint.load(folder, model, optimizer)
    assert not marker.exists()
    assert_same(bits(model, optimizer), before)


def test_what_could_not_be_loaded_is_not_saved(saved):
    folder, _ = saved
    before = sorted(folder.iterdir())
    model, optimizer = make()
    for bad in (Bomb(folder / "executed"), lambda: None, Path("x")):
        with pytest.raises(TypeError, match="must be of tensors, numbers, strings, lists and dicts"):
            checkpoint.save(folder, model, optimizer, bad=bad)
        assert sorted(folder.iterdir()) == before
    for keep, kind in ((0, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(kind, match="keep must be an int >= 1"):
            checkpoint.save(folder, model, optimizer, keep=keep)


def other_models():
    def changed(change):
        model, _ = make()
        change(model)
        return model, torchlamb.Lamb(model.named_parameters())

    model, _ = make()
    return {
        "missing": (changed(lambda m: m.append(nn.Linear(2, 2))), "has no '3.weight', as the model has"),
        "unexpected": (changed(lambda m: m.pop(2)), "has '2.weight', which the model has not"),
        "shape": (changed(lambda m: m.__setitem__(2, nn.Linear(3, 5))), r"'2.weight' has shape \(2, 3\) in .*, and \(5, 3\)"),
        "optimizer": ((model, torchlamb.Lamb([model[0].weight])), "has 6 parameters, and this optimizer's 1"),
        "other optimizer": ((model, torch.optim.SGD(model.parameters(), lr=1.0)), "is of Lamb, and the optimizer is SGD"),
    }


@pytest.mark.parametrize("what", sorted(other_models()))
def test_another_model_or_optimizer_is_not_half_loaded(saved, what):
    (model, optimizer), words = other_models()[what]
    before = bits(model, optimizer)
    with pytest.raises(ValueError, match=words):
        checkpoint.load(saved[0], model, optimizer)
    assert_same(bits(model, optimizer), before)


def assert_old_ones_are_good(saved) -> None:
    folder, runs = saved
    model, optimizer = make(seed=1)
    assert checkpoint.load(folder, model, optimizer) == {"step": 4}
    assert_same(bits(model, optimizer), runs[1])
    assert not list(folder.glob(".saving-*"))


@pytest.fixture(params=[0, 1, 2000])
def full_disk(request):
    """The limit on the size of files stands for a disk that is full: write() fails after some bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    @contextlib.contextmanager
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (request.param, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    yield full
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_the_system_refuses_midway(saved, full_disk):
    model, optimizer = make()
    with pytest.raises(OSError, match=r"could not be written to.*checkpoints that were there stay good"), full_disk():
        checkpoint.save(saved[0], model, optimizer)
    assert_old_ones_are_good(saved)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_is_full_at_the_end(saved, call, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    model, optimizer = make()
    with monkeypatch.context() as patch:
        patch.setattr(os if call == "fsync" else Path, call, fail)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(saved[0], model, optimizer)
    assert_old_ones_are_good(saved)


def test_a_folder_that_must_not_be_written():
    """As a user who may only read it, in a child process where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, optimizer = make()
        train(model, optimizer, range(2))
        where = checkpoint.save(folder, model, optimizer, step=2)
        folder.chmod(0o555)
        where.chmod(0o444)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                checkpoint.save(folder, model, optimizer)
            except OSError as error:
                status = not isinstance(error.__cause__, PermissionError)
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        folder.chmod(0o755)
        assert [path.name for path in folder.iterdir()] == [where.name]
        assert checkpoint.load(folder, model, optimizer) == {"step": 2}
