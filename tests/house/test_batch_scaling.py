"""The scaling study: which runs it takes follows from the results there are, and every contestant trains."""

from __future__ import annotations

import math

import pytest
from loading import ROOT, load_script

SCRIPT = ROOT / "benchmarks" / "batch_scaling.py"


@pytest.fixture
def study():
    return load_script(SCRIPT)


def loss_at(job, best_lr: float) -> float:
    return 2 + abs(math.log2(job.lr / best_lr)) + 0.01 * job.seed


def take_all(study, best: dict[int, float]) -> dict:
    """Take every run that the study asks for, each with a loss that says how far its learning rate is from the best one."""
    results: dict = {}
    while jobs := study.wanted(results):
        assert not set(jobs) & set(results)
        for job in jobs[:3]:
            loss = loss_at(job, best[job.batch_size])
            results[job] = study.Result(loss, loss, 1.0)
    return results


def test_grids_reach_the_best_learning_rate_and_carry_it(study):
    best = {32: 2.0**-9, 128: 2.0**-5, 512: 2.0**-6, 2048: 2.0**-5, 8192: 2.0**-5}
    results = take_all(study, best)
    for name, contestant in study.CONTESTANTS.items():
        tuned, missing = study.best_lr(results, name, 32)
        assert (tuned, missing) == (2.0**-9, [])
        for size in study.BATCH_SIZES[1:]:
            carried = tuned * (size / 32) ** contestant.lr_power
            assert study.choose(results, name, size) == (carried, best[size])
            lrs = sorted(job.lr for job in results if (job.optimizer, job.batch_size, job.seed) == (name, size, 0))
            assert carried in lrs
            assert lrs[0] < best[size] < lrs[-1]  # so that it is known to be the best


def test_seeds_at_the_ends(study):
    results = take_all(study, dict.fromkeys(study.BATCH_SIZES, 2.0**-6))
    for name in study.CONTESTANTS:
        for size in (32, 8192):
            for lr in study.choose(results, name, size):
                assert len(study.losses_at(results, name, size, lr)) == 3
        assert len(study.losses_at(results, name, 512, study.choose(results, name, 512)[0])) == 1


def test_diverged_runs_are_never_the_best(study):
    results = {study.Job("SGD", 32, 2.0**i, 0): study.Result(math.inf if i > -4 else 2.0 + i, 0, 0) for i in range(-5, 0)}
    assert study.best_lr(results, "SGD", 32)[1] == [study.Job("SGD", 32, 2.0**-6, 0)]  # -5 is the best, and at the edge


@pytest.mark.parametrize("optimizer", ["Lamb", "AdamW", "SGD"])
def test_every_contestant_trains(study, optimizer, monkeypatch):
    monkeypatch.setattr(study, "SAMPLES", 32 * 60)
    monkeypatch.setattr(study, "HELD_OUT", {"validation": 256, "test": 256})
    result = study.train(study.Job(optimizer, 32, 2.0**-5, seed=0))
    assert result.test_loss < 4.0  # of 128 characters: 4.85 for one that knows nothing


def test_cells_of_runs_that_diverged(study):
    results = {study.Job("SGD", 32, 2.0, seed): study.Result(math.inf, math.inf, 1.0) for seed in range(3)}
    assert study.format_cell(results, "SGD", 32, 2.0) == "2 | diverged"
    assert study.format_cell(results, "SGD", 32, 1.0) == "1 | not measured"


def test_rows_survive(study, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "rows.csv")
    monkeypatch.setattr(study, "setting", lambda: {"task": "a task", "corpus": "a text"})
    jobs = {
        study.Job("Lamb", 32, 2.0**-7, 1): study.Result(1.5, 1.25, 3.0),
        study.Job("SGD", 512, 2.0, 0): study.Result(math.inf, math.inf, 1.0),
    }
    for job, result in jobs.items():
        study.append_row(job, result)
    assert study.read_rows() == jobs
    monkeypatch.setattr(study, "setting", lambda: {"task": "a task", "corpus": "another text"})
    assert study.read_rows() == {}
