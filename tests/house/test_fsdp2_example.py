"""The FSDP2 example: sharded, stopped and resumed, it ends where the unsharded run does, and it refuses wrong flags."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loading import HANGS, ROOT, load_script, run_script

from torchlamb import checkpoint

SCRIPT = ROOT / "examples" / "fsdp2.py"
TOLERANCE = 1e-5
SMALL = ["--steps", 6, "--batch-size", 61]  # no share of 2, 3 or 4 processes is like the others

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups are ended as POSIX does it")


def run(*flags: object, processes: int, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_script(SCRIPT, *flags, processes=processes, cwd=cwd, limit=HANGS)


def finished(*flags: object, processes: int, cwd: Path) -> list[str]:
    done = run(*flags, processes=processes, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


def assert_same_as_unsharded(lines: list[str]) -> None:
    accuracies = re.fullmatch(r"Test accuracy: sharded (\S+)%, unsharded (\S+)%", lines[-2])
    difference = re.fullmatch(r"Largest relative difference of a parameter tensor: (\S+)", lines[-1])
    assert accuracies is not None
    assert difference is not None
    assert 0.0 <= float(difference[1]) <= TOLERANCE
    assert accuracies[1] == accuracies[2]


@pytest.fixture(scope="module")
def example():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the checkpoint of a run that 2 processes stopped half way."""
    folder = tmp_path_factory.mktemp("stopped")
    lines = finished(*SMALL, "--stop-at", 3, processes=2, cwd=folder)
    assert lines == [
        "Processes: 2 (cpu), steps 0 to 3, images in a step: 61",
        f"Saved after 3 of 6 steps: {Path('out/fsdp2')}",
    ]
    return folder


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    lines = finished(*SMALL, "--out", "made/here", processes=2, cwd=tmp_path)
    assert lines[:2] == [
        "Processes: 2 (cpu), steps 0 to 6, images in a step: 61",
        f"Saved after 3 of 6 steps: {Path('made/here')}",
    ]
    assert len(lines) == 4  # process 0 speaks alone
    assert_same_as_unsharded(lines)
    assert [path.name[:20] for path in (tmp_path / "made" / "here").iterdir()] == ["checkpoint-00000001-"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 1, 3])
def test_resumes_on_another_number_of_processes(processes, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    lines = finished(*SMALL, "--resume", processes=processes, cwd=tmp_path)
    assert lines[0] == f"Processes: {processes or 1} (cpu), steps 3 to 6, images in a step: 61"
    assert len(lines) == 3
    assert_same_as_unsharded(lines)


@pytest.mark.slow
def test_the_commands_of_its_docstring(tmp_path, example):
    commands = [line.split() for line in example.__doc__.splitlines() if line.startswith("    torchrun")]
    assert [command[:2] for command in commands] == [["torchrun", "--nproc-per-node"]] * 2
    for command in commands:
        lines = finished(*command[4:], processes=int(command[2]), cwd=tmp_path)
    assert_same_as_unsharded(lines)
    assert float(re.search(r"unsharded (\S+)%", lines[-2])[1]) > 90.0


@pytest.mark.slow
def test_goes_on_from_the_newest_checkpoint_of_a_killed_run(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "out" / "fsdp2"
    (out / ".saving-checkpoint-00000002").mkdir()
    (out / ".saving-checkpoint-00000002" / "__7_0.distcp").write_text("of an eighth process")
    finished(*SMALL, "--resume", "--stop-at", 5, processes=0, cwd=tmp_path)
    assert sorted(path.name[:20] for path in out.iterdir()) == ["checkpoint-00000001-", "checkpoint-00000002-"]
    assert checkpoint.more_of(checkpoint.newest(out)) == {"step": 5, "steps": 6, "batch_size": 61}
    assert_same_as_unsharded(finished(*SMALL, "--resume", processes=0, cwd=tmp_path))


REFUSED_TOGETHER = [
    (["--resume"], "error: argument --resume: no checkpoint in "),
    (["--batch-size", 1], "error: argument --batch-size: got '1'; give a whole number from 2 to 1437"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "message"), REFUSED_TOGETHER, ids=["no-checkpoint", "fewer-images-than-processes"])
def test_all_processes_stop_at_a_wrong_flag(flags, message, tmp_path):
    done = run(*flags, processes=2, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count(message) == 1
    assert str(SCRIPT) + '", line' not in done.stderr  # torchrun shows where it failed itself, not where the example did
    codes = set(re.findall(r"exitcode +: (\S+)", done.stderr))
    assert "2" in codes
    assert codes <= {"2", "-15"}  # torchrun terminates the ones that it finds still about to exit
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_torchrun_a_wrong_flag_exits_with_2(tmp_path):
    done = run("--resume", processes=0, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: argument --resume: no checkpoint in " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


WRONG = [
    (["--steps", "0"], "--steps", "'0'", "at least 1"),
    (["--steps", "1.5"], "--steps", "'1.5'", "at least 1"),
    (["--batch-size", "3"], "--batch-size", "'3'", "from 4 to 1437"),
    (["--batch-size", "1438"], "--batch-size", "'1438'", "from 4 to 1437"),
    (["--stop-at", "0"], "--stop-at", "'0'", "at least 1"),
    (["--stop-at", "60"], "--stop-at", "60", "above 0 and below 60"),
    (["--steps", "10", "--stop-at", "11"], "--stop-at", "11", "above 0 and below 10"),
    (["--resume", "--stop-at", "30"], "--stop-at", "30", "above 30 and below 60"),
    (["--resume", "--steps", "50"], "--resume", "--steps 50", "saved with --steps 60 --batch-size 256"),
    (["--resume", "--batch-size", "64"], "--resume", "--batch-size 64", "saved with --steps 60 --batch-size 256"),
    (["--resume", "--out", "elsewhere"], "--resume", "no checkpoint in elsewhere", "--stop-at"),
    (["--out", "taken"], "--out", "'taken'", "name another"),
    (["--out", "taken/below"], "--out", "'taken/below'", "name another"),
]


@pytest.mark.parametrize(("flags", "name", "value", "remedy"), WRONG, ids=[" ".join(flags) for flags, *_ in WRONG])
def test_refuses_wrong_flags(example, flags, name, value, remedy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    save_progress(step=30)
    with pytest.raises(SystemExit) as refusal:
        example.parse_args(flags, processes=4)
    assert refusal.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {name}: " in message
    assert value in message
    assert remedy in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "taken"]


def save_progress(step: int) -> Path:
    model = torch.nn.Linear(1, 1)
    return checkpoint.save("out/fsdp2", model, torch.optim.SGD(model.parameters()), step=step, steps=60, batch_size=256)


def test_refuses_an_unwritable_folder(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda *_: False)  # the superuser may write anywhere
    with pytest.raises(SystemExit):
        example.parse_args(["--out", str(tmp_path / "new")])
    assert "argument --out: " in capsys.readouterr().err


def test_resumes_from_the_newest_that_is_good(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    older, newer = save_progress(step=30), save_progress(step=40)
    settings = example.parse_args(["--resume"])
    assert (settings.checkpoint, settings.first) == (newer, 40)
    newer.write_bytes(b"damaged")
    settings = example.parse_args(["--resume"])
    assert (settings.checkpoint, settings.first) == (older, 30)


def test_names_the_extra_that_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match=r"sklearn.*pip install '\.\[demo\]'"):
        load_script(SCRIPT)


@pytest.mark.parametrize("size", [4, 61, 256, 719, 1437])
def test_an_epoch_holds_no_image_twice(example, size):
    pieces = 1437 // size
    batches = [example.batch_of(step, size) for step in range(pieces + 1)]
    assert {len(batch) for batch in batches} == {size}
    assert len(torch.cat(batches[:pieces]).unique()) == pieces * size
    assert not torch.equal(batches[0], batches[-1])  # of the second epoch
    assert torch.equal(batches[0], example.batch_of(0, size))
