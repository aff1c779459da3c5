"""The BERT example: it learns, resumes to the same losses, saves when it is told to leave, and refuses what cannot work."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loading import HANGS, ROOT, end, run_script, start_script

from torchlamb import checkpoint

SCRIPT = ROOT / "examples" / "bert" / "pretrain.py"
STEPS = 12
SMALL = [
    *("--corpus", "text", "--vocab-size", 300, "--seq-len", 16, "--batch-size", 32, "--micro-batch-size", 8),
    *("--samples", 32 * STEPS, "--log-every", 2, "--save-every", 4, "--cache", "cache", "--noise-scale"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3 * HANGS),
    pytest.mark.skipif(sys.platform == "win32", reason="process groups are ended as POSIX does it"),
]


def run(*flags: object, cwd: Path, processes: int = 0) -> subprocess.CompletedProcess[str]:
    return run_script(SCRIPT, *SMALL, *flags, processes=processes, cwd=cwd, limit=HANGS)


def finished(*flags: object, cwd: Path, processes: int = 0) -> str:
    done = run(*flags, cwd=cwd, processes=processes)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def losses(out: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(out)}


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def is_under_way(out: Path) -> bool:
    """Whether a run has written six steps of metrics, and so its first checkpoint."""
    return (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= 3


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a text, its tokens in the cache, and in `whole` a run of all steps."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "text").mkdir()
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    for source in sources:
        shutil.copy(source, folder / "text" / source.name)
    finished("--out", "whole", "--trust-ratios", cwd=folder)
    return folder


def test_a_run_leaves_metrics_checkpoints_and_plots(home):
    out = home / "whole"
    assert [row["step"] for row in rows(out)] == list(range(2, STEPS + 1, 2))
    assert {"loss", "lr", "tokens_per_second", "optimizer_share", "noise_scale", "samples", "phase"} <= rows(out)[0].keys()
    assert rows(out)[-1]["samples"] == 32 * STEPS
    assert rows(out)[-1]["loss"] < rows(out)[0]["loss"]
    assert all(0 < row["optimizer_share"] < 1 for row in rows(out))
    assert len(list((out / "checkpoints").iterdir())) == 2
    for picture in ("loss.png", "trust_ratios.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert len((out / "trust_ratios.jsonl").read_text().splitlines()) == STEPS // 2


def test_a_stopped_run_goes_on_with_the_same_losses(home):
    stdout = finished("--out", "stopped", "--stop-at", 5, cwd=home)  # within a line of metrics
    assert f"Saved after 5 of {STEPS} steps" in stdout
    finished("--out", "stopped", "--resume", cwd=home)
    assert losses(home / "stopped") == losses(home / "whole")


def test_a_killed_run_goes_on_with_the_same_losses(home):
    longer = ["--samples", 32 * 200]
    finished(*longer, "--out", "longer", cwd=home)
    process = start_script(SCRIPT, *SMALL, *longer, "--out", "killed", processes=0, cwd=home)
    try:
        wait_for(lambda: is_under_way(home / "killed"), process)
        process.kill()  # nobody can save now
        process.communicate(timeout=HANGS)
    finally:
        end(process)
    assert checkpoint.more_of(checkpoint.newest(home / "killed" / "checkpoints"))["progress"]["step"] < 200
    with (home / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 199, "lo')  # a line that the crash has cut
    finished(*longer, "--out", "killed", "--resume", cwd=home)
    assert losses(home / "killed") == losses(home / "longer")


@pytest.mark.parametrize("processes", [0, 2])
def test_sigterm_saves_and_leaves(home, processes):
    out = home / f"ended{processes}"
    never = ["--samples", 32 * 100_000, "--save-every", 100_000]  # but for the signal, nothing is saved
    shard = "ddp" if processes else "none"
    process = start_script(SCRIPT, *SMALL, *never, "--shard", shard, "--out", out, processes=processes, cwd=home)
    try:
        wait_for(lambda: is_under_way(out), process)
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=HANGS)
    finally:
        end(process)
    step = checkpoint.more_of(checkpoint.newest(out / "checkpoints"))["progress"]["step"]
    assert f"Saved after {step} of 100000 steps; go on with --resume" in stdout
    assert step >= max(losses(out))
    assert process.returncode == (128 + signal.SIGTERM if processes == 0 else 1)  # torchrun's own


def wait_for(condition, process: subprocess.Popen) -> None:
    until = time.monotonic() + HANGS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("shard", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does_and_resume_exactly(home, shard):
    finished("--out", shard, "--shard", shard, "--stop-at", 7, cwd=home, processes=2)
    shutil.copytree(home / shard, home / f"{shard}-on-one")
    finished("--out", shard, "--shard", shard, "--resume", cwd=home, processes=2)
    finished("--out", f"{shard}-whole", "--shard", shard, cwd=home, processes=2)
    assert losses(home / shard) == losses(home / f"{shard}-whole")
    assert losses(home / shard) == pytest.approx(losses(home / "whole"), rel=1e-4)
    finished("--out", f"{shard}-on-one", "--resume", cwd=home)  # what two have saved, one goes on with
    assert losses(home / f"{shard}-on-one") == pytest.approx(losses(home / shard), rel=1e-4)
    scales = [rows(home / name)[-1]["noise_scale"] for name in (shard, f"{shard}-whole")]
    assert scales[0] == scales[1]


def test_two_phases_resume_at_their_border_and_within(home):
    flags = ["--phase2-samples", 32 * 4, "--phase2-seq-len", 24, "--samples", 32 * 4]
    finished(*flags, "--out", "phases", cwd=home)
    assert [row["phase"] for row in rows(home / "phases")] == [1, 1, 2, 2]
    lrs = [row["lr"] for row in rows(home / "phases")]
    assert lrs[2] > lrs[1]  # a schedule of its own
    for stop in (4, 6):
        finished(*flags, "--out", f"phases{stop}", "--stop-at", stop, cwd=home)
        finished(*flags, "--out", f"phases{stop}", "--resume", cwd=home)
        assert losses(home / f"phases{stop}") == losses(home / "phases")


@pytest.mark.parametrize("flags", [["--optimizer", "adamw"], ["--precision", "bf16"], ["--dropout", "0.1"]], ids=" ".join)
def test_other_settings_resume_exactly(home, flags):
    name = "".join(flags).strip("-")
    finished(*flags, "--out", name, cwd=home)
    finished(*flags, "--out", f"{name}-stopped", "--stop-at", 6, cwd=home)
    finished(*flags, "--out", f"{name}-stopped", "--resume", cwd=home)
    assert losses(home / f"{name}-stopped") == losses(home / name)
    assert losses(home / name) != losses(home / "whole")


REFUSED = {
    "no corpus": (["--corpus", "nowhere"], "--corpus nowhere is no file and no folder"),
    "empty corpus": (["--corpus", "empty"], "--corpus empty has no text"),
    "short corpus": (["--corpus", "short"], "too few for two sequences of --seq-len 16"),
    "hub": (["--corpus", "hf:no/such"], "--corpus hf:no/such "),
    "indivisible": (["--micro-batch-size", 7], "--micro-batch-size 7 does not divide the 32 sequences of a process"),
    "one micro-batch": (["--micro-batch-size", 32], "--noise-scale compares a micro-batch with the batch"),
    "samples": (["--samples", 31], "--samples 31 is less than one batch of 32"),
    "batch": (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
    "not resumable": (["--resume"], "--resume: refused has no checkpoint"),
    "file": (["--out", "short"], "--out short cannot be a folder"),
    "too large": (["--batch-size", 8192, "--samples", 8192], "--batch-size 8192 with --recipe own"),
    "unknown": (["--optimizer", "sgd"], "sgd"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(home, name):
    flags, message = REFUSED[name]
    (home / "empty").write_text("\n")
    (home / "short").write_text("a few words")
    done = run("--out", "refused", *flags, cwd=home)
    assert done.returncode == 2
    assert message in " ".join((done.stderr + done.stdout).split())
    assert "Traceback" not in done.stderr
    assert not (home / "refused").exists()


CHANGED = {
    "--model": ("small", "--model tiny, and now it is small"),
    "--vocab-size": (200, "another corpus or tokenizer"),
    "--corpus": ("text/decoder.py", "another corpus or tokenizer"),
    "--seq-len": (24, "--seq-len 16, and now it is 24"),
    "--optimizer": ("adamw", "--optimizer lamb, and now it is adamw"),
}


@pytest.mark.parametrize("flag", CHANGED)
def test_another_run_is_not_gone_on_with(home, flag):
    value, message = CHANGED[flag]
    before = {path: path.stat().st_mtime_ns for path in (home / "whole").rglob("*")}
    done = run("--out", "whole", "--resume", flag, value, cwd=home)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert {path: path.stat().st_mtime_ns for path in (home / "whole").rglob("*")} == before


def test_a_run_is_not_overwritten(home):
    done = run("--out", "whole", cwd=home)
    assert done.returncode == 2
    assert "--out whole holds a run already; give --resume" in done.stderr


def test_wrong_numbers_of_processes(home):
    for flags, message in ((["--shard", "none"], "--shard none is for one process"), (["--batch-size", 33], "does not divide")):
        done = run("--out", "refused", "--shard", "ddp", *flags, cwd=home, processes=2)
        assert done.returncode != 0
        assert message in done.stderr
        assert not (home / "refused").exists()


def test_a_full_disk_leaves_the_last_checkpoint(home):
    finished("--out", "full", "--stop-at", 4, cwd=home)
    code = f"""
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv = {[str(SCRIPT), *map(str, SMALL), "--out", "full", "--resume"]!r}
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 1
    assert "could not be written to" in done.stderr
    assert "go on with --resume" in done.stderr
    finished("--out", "full", "--resume", cwd=home)
    assert losses(home / "full") == losses(home / "whole")
