"""Recipes hold the published numbers, their schedules have the published shapes, and the rule carries them."""

from __future__ import annotations

import dataclasses
import io
import math
import re

import pytest
import torch
from loading import ROOT
from torch import nn

import torchlamb
from torchlamb import recipes
from torchlamb.recipes import Recipe

# mlcommons/logging, mlperf_logging/rcp_checker/training_5.0.0/rcps_bert.json:
# batch, lr, beta1, beta2, decay, warm-up (start), train steps
MLPERF = """
| 256 | 3.5e-4 | .9 | .999 | .01 | 0 | 13700 |
| 448 | 4.25e-4 | .9 | .999 | .01 | 0 | 6700 |
| 1536 | 2e-3 | .66 | .996 | .01 | 0 | 2254 |
| 3072 | 2e-3 | .66 | .998 | .01 | 100 | 1141 |
| 4096 | 2.4e-3 | .66 | .998 | .01 | 0 | 855 |
| 4608 | 3.5e-3 | .62 | .9 | .01 | 0 | 700 |
| 6144 / 6912 | 2.9293e-3 | .7206 | .78921 | .001 | 0 (-700) | 700 |
| 8192 | 2.88293e-3 | .88 | .88 | .0166629 | 287 (-76) | 600 |
| 8704 | 2.97166e-3 | .88 | .88 | .0166629 | 287 (-76) | 600 |
| 12288 | 3.1e-3 | .8 | .925 | .0166629 | 300 (-100) | 500 |
| 13056 | 3.19541e-3 | .8 | .925 | .0166629 | 300 (-100) | 500 |
| 16384 | 3.3e-3 | .75 | .9 | .0166629 | 290 (-100) | 600 |
"""
LARGE_BATCH = ROOT / "docs" / "large_batch.md"


def points() -> list[tuple[int, list[str]]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in MLPERF.strip().splitlines()]
    return [(int(batch), cells) for batches, *cells in rows for batch in batches.split("/")]


@pytest.mark.parametrize(("batch_size", "cells"), points(), ids=lambda value: value if isinstance(value, int) else "")
def test_mlperf(batch_size, cells):
    recipe = recipes.mlperf_bert(batch_size)
    lr, beta1, beta2, decay, warmup, steps = cells
    steps_and_start = re.fullmatch(r"(\d+)(?: \((-\d+)\))?", warmup)
    assert (recipe.batch_size, recipe.lr, recipe.betas) == (batch_size, float(lr), (float(beta1), float(beta2)))
    assert (recipe.weight_decay, recipe.total_steps, recipe.eps) == (float(decay), int(steps), 1e-6)
    assert (recipe.warmup_steps, recipe.warmup_start) == (int(steps_and_start[1]), int(steps_and_start[2] or 0))
    assert "rcps_bert.json" in recipe.source
    assert recipe.note == ""


def test_the_page_has_the_same_table():
    page = LARGE_BATCH.read_text()
    assert len(points()) == 13
    for line in MLPERF.strip().splitlines():
        assert line in page


def test_other_batch_sizes_are_scaled_from_the_nearest():
    recipe = recipes.mlperf_bert(2200)  # 3072 is nearer than 1536 by ratio, though not by difference
    assert recipe.lr == pytest.approx(2e-3 * math.sqrt(2200 / 3072), rel=1e-15)
    assert (recipe.betas, recipe.total_steps) == ((0.66, 0.998), round(1141 * 3072 / 2200))
    assert recipe.note.startswith("scaled from batch size 3072")


def test_nvidia():
    first, second = recipes.nvidia_bert(1), recipes.nvidia_bert(2)
    assert (first.batch_size, first.lr, first.warmup_share, first.total_steps) == (65536, 6e-3, 0.2843, 7038)
    assert (second.batch_size, second.lr, second.warmup_share, second.total_steps) == (32768, 4e-3, 0.128, 1563)
    for recipe in (first, second):
        assert (recipe.decay_power, recipe.weight_decay) == (0.5, 0.01)
        assert "run_pretraining.sh" in recipe.source
    with pytest.raises(ValueError, match="phase must be 1 or 2, got 3"):
        recipes.nvidia_bert(3)


def test_resnet():
    assert recipes.resnet_rsb("A2", 300).lr == 5e-3
    recipe = recipes.resnet_rsb("A3", 100)
    assert (recipe.batch_size, recipe.lr, recipe.weight_decay, recipe.warmup_share) == (2048, 8e-3, 0.02, 0.05)
    assert (recipe.decay_power, recipe.total_steps) == (None, None)
    assert "2110.00476" in recipe.source
    with pytest.raises(ValueError, match="procedure must be 'A2' or 'A3', got 'A1'"):
        recipes.resnet_rsb("A1", 600)
    with pytest.raises(ValueError, match="epochs must be an int >= 5, got 4"):
        recipes.resnet_rsb("A2", 4)


# Schedules.


def factors(recipe: Recipe, total: int | None = None) -> list[float]:
    return [recipe.lr_factor(step, total) for step in range(total or recipe.total_steps)]


def test_polynomial_without_warmup():
    recipe = Recipe(256, 1e-3, "test", decay_power=2.0, total_steps=4)
    assert factors(recipe) == [1.0, 0.75**2, 0.5**2, 0.25**2]
    assert recipe.lr_factor(4) == recipe.lr_factor(9) == 0.0


def test_the_decay_counts_from_the_first_step_of_training():
    """As in NVIDIA's schedule for BERT: where a warm-up of a share s ends, the lr is (1 - s)^power of its peak."""
    recipe = recipes.nvidia_bert(1)
    lrs = factors(recipe)
    warmup = 0.2843 * 7038
    rising = [lr for step, lr in enumerate(lrs) if step + 1 < warmup]
    assert rising == pytest.approx([(step + 1) / warmup for step in range(len(rising))], rel=1e-12)
    assert lrs[len(rising)] == pytest.approx((1 - len(rising) / 7038) ** 0.5, rel=1e-12)
    assert lrs[len(rising)] == pytest.approx((1 - 0.2843) ** 0.5, abs=1e-4)
    assert all(later < earlier for earlier, later in zip(lrs[len(rising) :], lrs[len(rising) + 1 :], strict=False))


def test_a_negative_start_cuts_the_warmup_short():
    recipe = recipes.mlperf_bert(8192)  # 287 steps, of which 76 were before the first
    lrs = factors(recipe)
    assert lrs[0] == pytest.approx(77 / 287, rel=1e-15)
    assert lrs[209] == pytest.approx(286 / 287, rel=1e-15)
    assert lrs[210] == pytest.approx(1 - 210 / 600, rel=1e-15)


def test_a_start_without_warmup_means_nothing():
    assert factors(recipes.mlperf_bert(6144)) == [1 - step / 700 for step in range(700)]


def test_cosine():
    lrs = factors(recipes.resnet_rsb("A2", 20), total=400)
    assert lrs[:100] == pytest.approx([(step + 1) / 100 for step in range(100)], rel=1e-12)
    expected = [0.5 * (1 + math.cos(math.pi * (step - 99) / 301)) for step in range(99, 400)]
    assert lrs[99:] == pytest.approx(expected, rel=1e-9)


# The rule.


@pytest.mark.parametrize("factor", [4, 16, 0.25])
def test_the_rule(factor):
    recipe = Recipe(1024, 2e-3, "test", warmup_share=0.02, total_steps=16000, weight_decay=0.03, betas=(0.8, 0.95))
    scaled = recipes.scale(recipe, int(1024 * factor))
    assert scaled.lr == pytest.approx(2e-3 * math.sqrt(factor), rel=1e-15)
    assert scaled.warmup_share == pytest.approx(0.02 * factor, rel=1e-15)
    assert scaled.total_steps == 16000 / factor
    assert (scaled.betas, scaled.weight_decay) == (recipe.betas, recipe.weight_decay)
    assert scaled.source == "test"
    assert "scaled from batch size 1024" in scaled.note


def test_a_warmup_in_steps_stays_one_of_as_many_steps():
    """Its share grows with the batch size, and the steps of training fall with it."""
    recipe = recipes.scale(recipes.mlperf_bert(3072), 6144)
    assert (recipe.warmup_steps, recipe.total_steps) == (100, round(1141 / 2))


def test_shares_over_one_are_refused():
    recipe = Recipe(256, 1e-3, "test", warmup_share=0.1, total_steps=1000)
    assert recipes.scale(recipe, 2560).warmup_share == 1.0
    with pytest.raises(ValueError, match=r"batch_size=2561 .* carries this recipe to batch size 2560 at most"):
        recipes.scale(recipe, 2561)
    with pytest.raises(ValueError, match=r"batch_size=65536 would need a warm-up of 1\.\d+ of training"):
        recipes.mlperf_bert(65536)


# Building.


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))


def test_build_groups_and_options():
    recipe = dataclasses.replace(recipes.mlperf_bert(8192), max_grad_norm=1.0)
    optimizer, _ = recipe.build(model(), fused=False)
    decayed, others = optimizer.param_groups
    assert [name for name, _ in zip(decayed["param_names"], decayed["params"], strict=True)] == ["0.weight", "2.weight"]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.0166629, 0.0)
    assert (decayed["layer_adaptation"], others["layer_adaptation"]) == (True, False)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["max_grad_norm"], group["fused"]) == ((0.88, 0.88), 1e-6, 1.0, False)
    adapted, _ = recipe.build(model(), adapt_excluded=True, no_decay=["bias"])
    assert [group["layer_adaptation"] for group in adapted.param_groups] == [True, True]
    assert "1.weight" in adapted.param_groups[0]["param_names"]


@pytest.mark.parametrize("recipe", [recipes.mlperf_bert(8192), recipes.resnet_rsb("A2", 10)], ids=["bert", "resnet"])
def test_built_schedulers_follow_the_recipe_and_resume(recipe):
    optimizer, scheduler = recipe.build(model(), total_steps=400)
    lrs = []
    for step in range(400):
        if step == 150:
            saved = io.BytesIO()
            torch.save([optimizer.state_dict(), scheduler.state_dict()], saved)
            optimizer, scheduler = recipe.build(model(), total_steps=400)
            saved.seek(0)
            states = torch.load(saved, weights_only=True)
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert lrs == pytest.approx([recipe.lr * recipe.lr_factor(step, 400) for step in range(400)], rel=1e-15)


def test_build_needs_total_steps():
    with pytest.raises(ValueError, match=r"total_steps is None, and the recipe \(arXiv 2110\.00476"):
        recipes.resnet_rsb("A2", 100).build(model())
    with pytest.raises(ValueError, match=r"total_steps=100 end within the warm-up of 300 steps"):
        recipes.mlperf_bert(12288).build(model(), total_steps=100)
    with pytest.raises(ValueError, match=r"lr is the recipe's; use dataclasses.replace\(recipe, lr=\.\.\.\)"):
        recipes.mlperf_bert(256).build(model(), lr=1.0)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an int >= 1, got 0"),
        ({"batch_size": 32.0}, TypeError, r"batch_size must be an int >= 1, got 32\.0"),
        ({"lr": 0.0}, ValueError, r"lr must be a number above 0, got 0\.0"),
        ({"lr": "1"}, TypeError, "lr must be a number above 0, got '1'"),
        ({"lr": math.nan}, ValueError, "lr must be a number above 0, got nan"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be an int >= 0, got -1"),
        ({"warmup_share": 1.5}, ValueError, r"warmup_share must be a number at least 0 and at most 1, got 1\.5"),
        ({"warmup_start": 3}, ValueError, "warmup_start must be an int <= 0, got 3"),
        ({"warmup_steps": 1, "warmup_share": 0.5}, ValueError, "give one of them"),
        ({"decay_power": 0}, ValueError, "decay_power must be a number above 0, got 0"),
        ({"total_steps": 0}, ValueError, "total_steps must be an int >= 1, got 0"),
        ({"total_steps": 5, "warmup_steps": 6}, ValueError, "total_steps=5 end within the warm-up of 6 steps"),
    ],
    ids=str,
)
def test_wrong_arguments(wrong, error, words):
    with pytest.raises(error, match=words):
        Recipe(**{"batch_size": 256, "lr": 1e-3, "source": "test", **wrong})


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.mlperf_bert(256).lr = 1.0


def test_a_built_optimizer_trains():
    torch.manual_seed(0)
    net = model()
    optimizer, scheduler = Recipe(64, 0.05, "test", warmup_steps=5).build(net, total_steps=50)
    inputs = torch.randn(64, 4)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), (inputs[:, 0] > 0).long())
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
    assert isinstance(optimizer, torchlamb.Lamb)
    assert losses[-1] < 0.5 * losses[0]
