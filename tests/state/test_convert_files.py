"""State dicts of other optimizers in files, and the command that converts them."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from foreign import STATES, go_on, largest_difference, mindspore_arrays, saved
from loading import HANGS
from torch import nn

import torchlamb
import torchlamb.mindspore
from torchlamb.convert.__main__ import convert_file
from torchlamb.files import write_whole

# Files


def run_command(*arguments):
    command = [sys.executable, "-m", "torchlamb.convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=False)


def test_the_command(tmp_path):
    run = saved("deepspeed")
    torch.save({"optimizer": run["state_dict"], "epoch": 3}, tmp_path / "old.pt")
    done = run_command(tmp_path / "old.pt", tmp_path / "new.pt", "--from", "deepspeed", "--key", "optimizer")
    assert (done.returncode, done.stdout) == (0, "")
    assert "lr_factor('deepspeed', start=steps)" in done.stderr
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    assert new["epoch"] == 3
    assert largest_difference(run, go_on(run, new["optimizer"], True, torch.float64)) <= 1e-13
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.pt", "old.pt"]
    done = run_command(tmp_path / "old.pt", tmp_path / "new.pt", "--from", "deepspeed", "--key", "optimizer")
    assert done.returncode == 1
    assert "new.pt exists; remove it" in done.stderr


def convert_saved(content, path, *, key=None, source="deepspeed", arguments=None):
    """Save it, convert the file, and return what the new one holds."""
    new = path.with_name("new.pt")
    torch.save(content, path)
    convert_file(path, new, source, key, arguments or {})
    new_content = torch.load(new, weights_only=True)
    new.unlink()
    return new_content


@pytest.mark.parametrize("key", [None, "optimizer", "engines.1.optimizer"])
def test_masters_in_files(key, tmp_path):
    """DeepSpeed keeps them beside the optimizer's state dict; an optimizer that goes on without them would lose digits."""
    run = saved("deepspeed")
    fp32_groups = [[p.float() + 1 for p in run["params"][:2]], [p.float() + 1 for p in run["params"][2:]]]
    content = {"optimizer_state_dict": run["state_dict"], "fp32_groups": fp32_groups}
    for name in reversed(key.split(".") if key else ()):
        content = [0, content] if name.isdigit() else {name: content, "epoch": 3}
    new = convert_saved(content, tmp_path / "old.pt", key=key)
    for name in key.split(".") if key else ():
        assert name.isdigit() or new["epoch"] == 3
        new = new[int(name) if name.isdigit() else name]
    assert torch.equal(new["state"][1]["master"], fp32_groups[0][1])
    assert all(group["master_weights"] for group in new["param_groups"])
    inside = "optimizer_state_dict" if key is None else f"{key}.optimizer_state_dict"
    with pytest.raises(ValueError, match="lies beside fp32_groups, the masters: leave --key out, or its last part"):
        convert_saved(content, tmp_path / "old.pt", key=inside)


def test_a_checkpoint_of_lightning(tmp_path):
    """Its suffix is MindSpore's, and its state dicts are in a list."""
    run, path = saved("adamw"), tmp_path / "last.ckpt"
    content = {"optimizer_states": [run["state_dict"]], "epoch": 3}
    with pytest.raises(ValueError, match=r"state dict in optimizer_states.0: give --key optimizer_states.0$"):
        convert_saved(content, path, source="adamw")
    with pytest.raises(ValueError, match=r"no entry 'optimizer_states.1'"):
        convert_saved(content, path, source="adamw", key="optimizer_states.1")
    new = convert_saved(content, path, source="adamw", key="optimizer_states.0")
    assert new["epoch"] == 3
    assert largest_difference(run, go_on(run, new["optimizer_states"][0], False, torch.float64)) <= 1e-13


@pytest.mark.parametrize(("name", "source"), [("timm.pt", "timm"), ("mindspore.npz", "mindspore")])
def test_damaged_files_are_refused_or_harmless(name, source, tmp_path):
    """An error is one that says what is wrong with the file, wherever the damage is."""
    whole, generator = (STATES / name).read_bytes(), torch.Generator().manual_seed(0)
    old, new = tmp_path / name, tmp_path / "new.pt"
    refused = []
    for _ in range(100):
        damaged, at = bytearray(whole), torch.randint(len(whole), (20,), generator=generator).tolist()
        for i in at:
            damaged[i] ^= 0xFF
        old.write_bytes(damaged[: max(at)] if at[0] % 2 else damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                convert_file(old, new, source, "state_dict" if source == "timm" else None, {})
            new.unlink()
        except (ValueError, OSError) as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert all(name in message for message in refused)
    assert not new.exists()


def test_files_of_all_kinds(tmp_path):
    new = iter(tmp_path / f"new{i}.pt" for i in range(9))
    torch.save(saved("apex")["state_dict"], tmp_path / "apex.pt")
    path = next(new)
    convert_file(tmp_path / "apex.pt", path, "apex", None, {"use_nvlamb": True})
    converted = torch.load(path, weights_only=True)
    assert all(group["layer_adaptation"] for group in converted["param_groups"])
    optimizer = torchlamb.Lamb([nn.Parameter(torch.ones(2))])
    torch.save(optimizer.state_dict(), tmp_path / "lamb.pt")
    path = next(new)
    convert_file(tmp_path / "lamb.pt", path, "torchlamb", None, {})
    torch.optim.AdamW([nn.Parameter(torch.ones(2))]).load_state_dict(torch.load(path, weights_only=True))
    path = next(new)
    convert_file(STATES / "mindspore.npz", path, "mindspore", None, {})
    assert torch.load(path, weights_only=True)["global_step"] == 7


def test_a_ckpt_is_read_by_mindspore(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mindspore", None)
    with pytest.raises(ImportError, match=r"read by mindspore, which is not installed.*numpy.savez"):
        convert_file(STATES / "mindspore.ckpt", tmp_path / "new.pt", "mindspore", None, {})
    fake = types.ModuleType("mindspore")
    parameters = {name: types.SimpleNamespace(asnumpy=lambda a=a: a) for name, a in mindspore_arrays().items()}
    fake.load_checkpoint = lambda path: parameters if path.endswith("mindspore.ckpt") else None
    monkeypatch.setitem(sys.modules, "mindspore", fake)
    convert_file(STATES / "mindspore.ckpt", tmp_path / "new.pt", "mindspore", None, {})
    assert torch.load(tmp_path / "new.pt", weights_only=True)["global_step"] == 7


@pytest.mark.parametrize(
    ("name", "source", "key", "message"),
    [
        ("missing.pt", "timm", None, "missing.pt"),
        ("empty.pt", "timm", None, "is empty"),
        ("truncated.pt", "timm", None, "is truncated, or no file of torch.save"),
        ("text.pt", "timm", None, "more in it than tensors and plain values, or is no file"),
        ("bomb.pt", "timm", None, "more in it than tensors and plain values"),
        ("wrapped.pt", "timm", None, "state dict in optim: give --key optim"),
        ("wrapped.pt", "timm", "optimizer", "no entry 'optimizer': it has"),
        ("timm.pt", "apex", None, "unlike one of apex.optimizers.FusedLAMB.*'timm'"),
        ("truncated.npz", "mindspore", None, "is truncated, or no file of numpy.savez"),
    ],
)
def test_files_that_are_refused(name, source, key, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(saved("timm")["state_dict"], "timm.pt")
    whole = Path("timm.pt").read_bytes()
    Path("empty.pt").touch()
    Path("truncated.pt").write_bytes(whole[: len(whole) // 2])
    Path("text.pt").write_text("lr: 0.1\n")
    Path("truncated.npz").write_bytes((STATES / "mindspore.npz").read_bytes()[:1000])
    torch.save({"optim": saved("timm")["state_dict"], "model": {}}, "wrapped.pt")
    torch.save({"state": Bomb(), "param_groups": []}, "bomb.pt")
    before = sorted(Path().iterdir())
    with pytest.raises((ValueError, OSError), match=message):
        convert_file(Path(name), Path("new.pt"), source, key, {})
    assert sorted(Path().iterdir()) == before


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    torch.save(saved("timm")["state_dict"], tmp_path / "timm.pt")

    def no_space(_):
        raise OSError(28, "No space left on device")

    for what in ("os.fsync", "torchlamb.files.sync"):  # of the file, and of the directory
        with monkeypatch.context() as patch:
            patch.setattr(what, no_space)
            with pytest.raises(OSError, match="No space left"):
                convert_file(tmp_path / "timm.pt", tmp_path / "new.pt", "timm", None, {})
        assert [path.name for path in tmp_path.iterdir()] == ["timm.pt"]


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    torch.save(saved("timm")["state_dict"], tmp_path / "timm.pt")
    convert_file(tmp_path / "timm.pt", tmp_path / "new.pt", "timm", None, {})
    before = (tmp_path / "new.pt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.pt", "timm.pt"]
    with pytest.raises(FileExistsError, match=r"new\.pt exists; remove it"):  # one that came while it was written
        write_whole(tmp_path / "new.pt", lambda file: file.write(b"other"), replace=False)
    assert (tmp_path / "new.pt").read_bytes() == before


@pytest.mark.parametrize(
    "argument",
    ["use_nvlamb", *(pytest.param(bad, marks=pytest.mark.slow) for bad in ("use_nvlamb=open('x')", "use_nvlamb=[1]"))],
)
def test_arguments_of_the_command(argument, tmp_path):
    torch.save(saved("apex")["state_dict"], tmp_path / "old.pt")
    done = run_command(tmp_path / "old.pt", tmp_path / "new.pt", "--from", "apex", "--argument", argument)
    assert done.returncode == 1
    assert "--argument" in done.stderr
    assert "Traceback" not in done.stderr
