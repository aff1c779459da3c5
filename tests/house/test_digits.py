"""The digits example: it runs, writes what it promises, compares fairly, and refuses wrong flags."""

from __future__ import annotations

import csv
import functools
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loading import HANGS, ROOT, end, load_script, run_script, start_script

SCRIPT = ROOT / "examples" / "digits.py"
SIZES = [256, 1437]


@pytest.fixture(scope="module")
def digits():
    return load_script(SCRIPT)


def start(*flags: object, cwd: Path) -> subprocess.Popen[str]:
    return start_script(SCRIPT, *flags, processes=0, cwd=cwd)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, str]]:
    """Folder and standard output of a small run, by number of workers."""

    @functools.cache
    def run(workers: int) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(f"workers{workers}")
        flags = ["--epochs", 1, "--seeds", 1, "--batch-sizes", *SIZES, "--out", "made/here", "--workers", workers]
        done = run_script(SCRIPT, *flags, processes=0, cwd=folder, limit=HANGS)
        assert done.returncode == 0, done.stderr
        return folder / "made" / "here", done.stdout

    return run


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "runs.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_writes_a_plot_and_rows(digits, finished):
    folder, _ = finished(2)
    assert sorted(path.name for path in folder.iterdir()) == ["accuracy.png", "runs.csv"]
    plot = (folder / "accuracy.png").read_bytes()
    assert plot.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(plot) > 10_000
    rows = rows_of(folder)
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    tested = [(row["optimizer"], int(row["batch_size"]), int(row["steps"])) for row in rows if row["measured_on"] == "test"]
    assert sorted(tested) == sorted((name, size, {256: 6, 1437: 1}[size]) for name in digits.OPTIMIZERS for size in SIZES)


def test_tunes_at_the_smallest_batch_only(digits, finished):
    rows = [row for row in rows_of(finished(2)[0]) if row["measured_on"] == "validation"]
    assert {row["batch_size"] for row in rows} == {"16"}
    for name, recipe in digits.OPTIMIZERS.items():
        assert sorted({float(row["lr"]) for row in rows if row["optimizer"] == name}) == recipe.grid


def test_prints_the_table(digits, finished):
    folder, stdout = finished(2)
    lines = stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("batch  steps"))
    assert lines[header - 1].split() == list(digits.OPTIMIZERS)
    for line, size in zip(lines[header + 1 :], SIZES, strict=False):
        cells = line.replace("+-", " ").split()
        tested = [row for row in rows_of(folder) if row["measured_on"] == "test" and row["batch_size"] == str(size)]
        assert cells[:2] == [str(size), tested[0]["steps"]]
        for row, lr, accuracy in zip(tested, cells[2::3], cells[3::3], strict=True):
            assert float(lr) == pytest.approx(float(row["lr"]), rel=5e-3)
            assert float(accuracy) == pytest.approx(100 * float(row["accuracy"]), abs=5e-3)
    assert f"Plot: {Path('made/here/accuracy.png')}" in lines
    assert f"Rows: {Path('made/here/runs.csv')}" in lines
    assert "tuned at batch size 16 only" in lines[-1]


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(finished):
    (one, stdout_of_one), (two, stdout_of_two) = finished(1), finished(2)
    assert (one / "runs.csv").read_bytes() == (two / "runs.csv").read_bytes()
    assert stdout_of_one == stdout_of_two


WRONG = [
    (["--epochs", "0"], "'0'", "at least 1"),
    (["--epochs", "1.5"], "'1.5'", "at least 1"),
    (["--seeds", "0"], "'0'", "at least 1"),
    (["--workers", "-1"], "'-1'", "at least 1"),
    (["--batch-sizes", "0"], "'0'", "from 1 to 1437"),
    (["--batch-sizes", "16", "1438"], "'1438'", "from 1 to 1437"),
    (["--batch-sizes", "64", "16", "64"], "64", "every size once"),
    (["--out", "taken"], "'taken'", "name a folder"),
    (["--out", "taken/below"], "'taken/below'", "name a folder"),
]


@pytest.mark.parametrize(("flags", "value", "remedy"), WRONG, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_refuses_wrong_flags(digits, flags, value, remedy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    with pytest.raises(SystemExit) as refusal:
        digits.parse_args(flags)
    assert refusal.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {flags[0]}: " in message
    assert value in message
    assert remedy in message
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_refuses_an_unwritable_folder(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda *_: False)  # the superuser may write anywhere
    with pytest.raises(SystemExit):
        digits.parse_args(["--out", str(tmp_path / "new")])
    assert "argument --out: " in capsys.readouterr().err


@pytest.mark.slow
def test_stops_before_training_at_a_wrong_flag(tmp_path):
    process = start("--epochs", 0, "--out", "new", cwd=tmp_path)
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 2
    assert stdout == ""
    assert "argument --epochs: got '0'" in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["sklearn", "tqdm", "matplotlib"])
def test_names_the_extra_that_is_missing(missing, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"{missing}.*pip install '\.\[demo\]'"):
        load_script(SCRIPT)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_an_interrupt_leaves_nothing_behind(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells leave it ignored in what they run beside them
    try:
        process = start("--workers", 2, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        seen = ""
        while "Lamb" not in seen:  # the bar says what is running
            assert process.poll() is None
            seen += process.stderr.read(1)
        time.sleep(3)  # into the first runs
        process.send_signal(signal.SIGINT)
        # The workers hold the pipes too: reading to the end succeeds only once they are gone.
        _, stderr = process.communicate(timeout=HANGS)
    finally:
        end(process)
    assert process.returncode == 130
    assert stderr.endswith("interrupted\n")
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "size", "steps"),
    [(1437, 1437, 1), (1437, 718, 2), (1437, 256, 6), (1437, 16, 90), (1437, 1, 1437), (1150, 16, 72)],
)
def test_batches_hold_every_image_once(digits, images, size, steps):
    cut = digits.batches(images, size, torch.Generator().manual_seed(0))
    assert len(cut) == steps == digits.batches_per_epoch(images, size)
    assert torch.equal(torch.cat(cut).sort().values, torch.arange(images))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


def test_the_seed_fixes_the_order(digits):
    first, again, other = (torch.cat(digits.batches(99, 16, torch.Generator().manual_seed(seed))) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_parts_do_not_overlap(digits):
    labels = torch.arange(1797) % 10
    parts = {name: set(indices.tolist()) for name, indices in digits.split(labels).items()}
    assert {name: len(part) for name, part in parts.items()} == {"train": 1437, "test": 360, "fit": 1150, "validation": 287}
    assert parts["train"] | parts["test"] == set(range(1797))
    assert parts["fit"] | parts["validation"] == parts["train"]
    assert torch.bincount(labels[digits.split(labels)["test"]]).tolist() == [36] * 10
    assert torch.equal(digits.split(labels)["test"], digits.split(labels)["test"])
    assert [len(digits.load_parts()[name][1]) for name in parts] == [1437, 360, 1150, 287]


def test_learning_rates_are_carried_by_rule(digits):
    settings = digits.Settings(epochs=1, seeds=1, batch_sizes=[16, 64, 1437], out=Path(), workers=1)
    jobs = digits.final_jobs(settings, {"Lamb": 0.01, "AdamW": 0.002, "SGD": 0.1})
    lrs = {(job.optimizer, job.batch_size): job.lr for job in jobs}
    assert lrs == pytest.approx(
        {
            ("Lamb", 16): 0.01,
            ("AdamW", 16): 0.002,
            ("SGD", 16): 0.1,
            ("Lamb", 64): 0.02,
            ("AdamW", 64): 0.004,
            ("SGD", 64): 0.4,
            ("Lamb", 1437): 0.0947694,
            ("AdamW", 1437): 0.0189539,
            ("SGD", 1437): 8.98125,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("steps", [1, 2, 30, 2700])
def test_the_schedule_rises_to_one_and_falls(digits, steps):
    factors = [digits.warmup_then_decay(steps)(step) for step in range(steps)]
    peak = factors.index(1.0)
    assert peak + 1 == max(1, round(0.1 * steps))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert min(factors) > 0


@pytest.mark.parametrize(("best", "at_edge"), [(0, True), (3, False), (6, True)])
def test_says_when_the_best_rate_is_at_the_edge(digits, best, at_edge):
    settings = digits.Settings(epochs=1, seeds=1, batch_sizes=[16], out=Path(), workers=1)
    results = {}
    for job in digits.tuning_jobs(settings):
        i = digits.OPTIMIZERS[job.optimizer].grid.index(job.lr)
        results[job] = digits.Result(accuracy=0.5, loss=1.0 + abs(i - best) if i != 5 else math.nan)
    tuned, report = digits.choose_lrs(results)
    assert tuned == {name: recipe.grid[best] for name, recipe in digits.OPTIMIZERS.items()}
    assert report.count("edge of the grid") == (len(digits.OPTIMIZERS) if at_edge else 0)


def test_decay_is_the_same_for_all_optimizers(digits):
    for recipe in digits.OPTIMIZERS.values():
        groups = digits.torchlamb.param_groups(digits.build_model(), digits.WEIGHT_DECAY)
        decays = {name: g["weight_decay"] for g in recipe.make(groups, 0.1).param_groups for name in g["param_names"]}
        assert {name for name, decay in decays.items() if decay} == {"0.weight", "3.weight", "7.weight"}
        assert set(decays.values()) == {0.0, digits.WEIGHT_DECAY}
