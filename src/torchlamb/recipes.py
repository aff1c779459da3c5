"""Batch size -> learning rate, betas, decay and schedule: published settings with their sources, and the rule between them.

No number here is from memory: each is in a source that is named beside it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from torchlamb.groups import param_groups
from torchlamb.lamb import Lamb

_RULE = "lr by the square root of the batch size, warm-up share linearly (arXiv 1904.00962)"


@dataclass(frozen=True)
class Recipe:
    r"""Settings that a model was trained with at one batch size, and how to train with them.

    The lr rises in a straight line over the warm-up, and falls from there: by (1 - t / `total_steps`)^`decay_power`, with t
    counted from the first step of *training*, as in the published schedules for BERT. So it is not at its peak where a warm-up
    of a share s ends, but at (1 - s)^`decay_power` of it. With ``decay_power=None`` it is half a cosine from the end of the
    warm-up on.

    `warmup_start` is at which step of its warm-up a run begins. The published ones are negative, and count the other way: with
    a start of -76, step 0 is where a warm-up stands that has begun 76 steps earlier. Of 287 warm-up steps 211 are left, and
    the first step has an lr of 77/287 of the peak instead of 1/287. Where there are no warm-up steps, the start means nothing.

    Args:
        batch_size: samples in a step, over all processes, >= 1
        lr: the peak of the learning rate, > 0
        source: where the numbers are from
        betas: as of :class:`Lamb` (default: (0.9, 0.999))
        eps: as of :class:`Lamb` (default: 1e-6)
        weight_decay: of what decays: no bias and no normalisation layer (default: 0.01)
        warmup_steps: steps of the warm-up, those before step 0 included, >= 0; or None (default: None)
        warmup_share: the same as a share of all steps, from 0 to 1, instead of `warmup_steps` (default: None)
        warmup_start: the step of the warm-up, negated, at which the run begins, <= 0 (default: 0)
        decay_power: of the polynomial, > 0; None for half a cosine (default: 1.0)
        total_steps: of the published run; None where it gives none (default: None)
        max_grad_norm: as of :class:`Lamb`; None where the source gives none (default: None)
        note: what was done to the source's numbers (default: "")

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of range, or a warm-up in steps and as a share

    Example:
        >>> import torch, torchlamb
        >>> recipe = torchlamb.recipes.Recipe(batch_size=256, lr=1e-3, source="tuned here", warmup_share=0.1)
        >>> [round(recipe.lr_factor(step, total_steps=20), 2) for step in (0, 1, 2, 19)]
        [0.5, 0.95, 0.9, 0.05]
    """

    batch_size: int
    lr: float
    source: str
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    warmup_steps: int | None = None
    warmup_share: float | None = None
    warmup_start: int = 0
    decay_power: float | None = 1.0
    total_steps: int | None = None
    max_grad_norm: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        _check_whole("batch_size", self.batch_size, low=1)
        _check_number("lr", self.lr, low=0.0, above=True)
        if self.warmup_steps is not None:
            _check_whole("warmup_steps", self.warmup_steps, low=0)
        if self.warmup_share is not None:
            _check_number("warmup_share", self.warmup_share, low=0.0, high=1.0)
        if self.warmup_steps is not None and self.warmup_share is not None:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_share={self.warmup_share} say the same thing; give one of them"
            )
        _check_whole("warmup_start", self.warmup_start, low=None, high=0)
        if self.decay_power is not None:
            _check_number("decay_power", self.decay_power, low=0.0, above=True)
        if self.total_steps is not None:
            _check_whole("total_steps", self.total_steps, low=1)
            self._warmup_steps(self.total_steps)  # which must not be more than those

    def lr_factor(self, step: int, total_steps: int | None = None) -> float:
        """Return what `lr` is multiplied by at a step.

        Args:
            step: how many were taken before it, >= 0
            total_steps: of the run; None for those of the recipe (default: None)

        Raises:
            TypeError, ValueError: it is out of range, or the recipe has no `total_steps` and none are given
        """
        _check_whole("step", step, low=0)
        total = self._total_steps(total_steps)
        warmup = self._warmup_steps(total)
        if step + 1 - self.warmup_start < warmup:
            return (step + 1 - self.warmup_start) / warmup
        if self.decay_power is not None:
            return float(max(0.0, 1 - step / total) ** self.decay_power)
        first = max(0, math.ceil(warmup) - 1 + self.warmup_start)  # at the peak
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - first) / max(1, total - first))))

    def build(
        self,
        model: nn.Module,
        total_steps: int | None = None,
        *,
        adapt_excluded: bool = False,
        no_decay: Iterable[str] | None = None,
        **options: Any,
    ) -> tuple[Lamb, LambdaLR]:
        """Make the optimizer and its scheduler. Call ``scheduler.step()`` after each ``optimizer.step()``.

        Args:
            model: as of :func:`torchlamb.param_groups`; shard it before
            total_steps: of the run; None for those of the recipe (default: None)
            adapt_excluded: as of :func:`torchlamb.param_groups`. False, as the sources have it: biases and normalisation
                layers train with plain Adam (default: False)
            no_decay: as of :func:`torchlamb.param_groups` (default: None)
            options: more for :class:`Lamb`, such as `fused` or `master_weights`

        Raises:
            TypeError, ValueError: an argument is wrong, or the recipe has no `total_steps` and none are given, or options
                repeat what the recipe has

        Example:
            >>> import torch, torchlamb
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer, scheduler = torchlamb.recipes.mlperf_bert(4096).build(model)
            >>> optimizer.defaults["lr"], optimizer.defaults["betas"]
            (0.0024, (0.66, 0.998))
            >>> [group["weight_decay"] for group in optimizer.param_groups]
            [0.01, 0.0]
        """
        total = self._total_steps(total_steps)
        own: dict[str, Any] = {
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
        }
        twice = sorted(own.keys() & options)
        if twice:
            raise ValueError(f"{twice[0]} is the recipe's; use dataclasses.replace(recipe, {twice[0]}=...)")
        factor = functools.partial(self.lr_factor, total_steps=total)
        factor(0)  # raises before anything is made
        groups = param_groups(model, self.weight_decay, adapt_excluded, no_decay)
        optimizer = Lamb(groups, **own, **options)
        return optimizer, LambdaLR(optimizer, factor)

    def _total_steps(self, given: int | None) -> int:
        if given is not None:
            _check_whole("total_steps", given, low=1)
        total = self.total_steps if given is None else given
        if total is None:
            raise ValueError(f"total_steps is None, and the recipe ({self.source}) has none; give those of your run")
        return total

    def _warmup_steps(self, total: int) -> float:
        steps = self.warmup_steps or 0 if self.warmup_share is None else self.warmup_share * total
        if steps + self.warmup_start > total:
            raise ValueError(
                f"total_steps={total} end within the warm-up of {steps:g} steps; take more steps, or a recipe for a smaller "
                "batch size"
            )
        return steps


def scale(recipe: Recipe, batch_size: int) -> Recipe:
    """Carry a recipe to another batch size, by the rule of the paper.

    The lr grows with the square root of the batch size, the warm-up's share of training linearly with it. All runs see the same
    number of samples: `total_steps` falls as the batch grows, and so a warm-up of that many *steps* stays as it is. Betas and
    decay stay; published settings for large batches have lower betas (:func:`mlperf_bert`), for which there is no rule.

    Args:
        recipe: for another batch size
        batch_size: samples in a step, over all processes, >= 1

    Raises:
        TypeError, ValueError: `batch_size` is no whole number >= 1, or so large that the warm-up would be longer than training

    Example:
        >>> import torchlamb
        >>> tuned = torchlamb.recipes.Recipe(256, lr=1e-3, source="tuned here", warmup_share=0.01, total_steps=8000)
        >>> large = torchlamb.recipes.scale(tuned, 4096)
        >>> large.lr, large.warmup_share, large.total_steps
        (0.004, 0.16, 500)

    Source: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, arXiv 1904.00962.
    """
    _check_whole("batch_size", batch_size, low=1)
    factor = batch_size / recipe.batch_size
    total = None if recipe.total_steps is None else max(1, round(recipe.total_steps / factor))
    share = recipe.warmup_share
    if share is None and recipe.total_steps is not None:
        share = (recipe.warmup_steps or 0) / recipe.total_steps
    if share is not None and share * factor > 1:
        raise ValueError(
            f"batch_size={batch_size} would need a warm-up of {share * factor:.3g} of training, from {share:.3g} at batch size "
            f"{recipe.batch_size}; the rule carries this recipe to batch size {int(recipe.batch_size / share)} at most"
        )
    note = f"scaled from batch size {recipe.batch_size}: {_RULE}"
    return replace(
        recipe,
        batch_size=batch_size,
        lr=recipe.lr * math.sqrt(factor),
        warmup_share=None if recipe.warmup_share is None else recipe.warmup_share * factor,
        total_steps=total,
        note="; ".join(part for part in (recipe.note, note) if part),
    )


# batch size: lr, beta1, beta2, weight decay, warm-up steps, their start, train steps
_MLPERF_BERT = {
    256: (3.5e-4, 0.9, 0.999, 0.01, 0, 0, 13700),
    448: (4.25e-4, 0.9, 0.999, 0.01, 0, 0, 6700),
    1536: (2e-3, 0.66, 0.996, 0.01, 0, 0, 2254),
    3072: (2e-3, 0.66, 0.998, 0.01, 100, 0, 1141),
    4096: (2.4e-3, 0.66, 0.998, 0.01, 0, 0, 855),
    4608: (3.5e-3, 0.62, 0.9, 0.01, 0, 0, 700),
    6144: (2.9293e-3, 0.7206, 0.78921, 0.001, 0, -700, 700),
    6912: (2.9293e-3, 0.7206, 0.78921, 0.001, 0, -700, 700),
    8192: (2.88293e-3, 0.88, 0.88, 0.0166629, 287, -76, 600),
    8704: (2.97166e-3, 0.88, 0.88, 0.0166629, 287, -76, 600),
    12288: (3.1e-3, 0.8, 0.925, 0.0166629, 300, -100, 500),
    13056: (3.19541e-3, 0.8, 0.925, 0.0166629, 300, -100, 500),
    16384: (3.3e-3, 0.75, 0.9, 0.0166629, 290, -100, 600),
}
_MLPERF_SOURCE = "mlcommons/logging, mlperf_logging/rcp_checker/training_5.0.0/rcps_bert.json"


def mlperf_bert(batch_size: int) -> Recipe:
    """Return the settings of MLPerf's reference convergence point for BERT at a batch size.

    They are for going on from a given checkpoint to a masked-LM accuracy of 0.720, with eps 1e-6 and a polynomial decay, whose
    power the source does not give: it is 1 here. It names no clipping either. Published are 256, 448, 1536, 3072, 4096, 4608,
    6144, 6912, 8192, 8704, 12288, 13056 and 16384; for others, the nearest (by ratio) is carried by :func:`scale`, and `note`
    says so.

    Args:
        batch_size: samples in a step, over all processes, >= 1

    Raises:
        TypeError, ValueError: `batch_size` is no whole number >= 1, or larger than the rule can carry the nearest point

    Example:
        >>> import torchlamb
        >>> recipe = torchlamb.recipes.mlperf_bert(8192)
        >>> recipe.lr, recipe.betas, recipe.warmup_steps, recipe.warmup_start
        (0.00288293, (0.88, 0.88), 287, -76)
        >>> print(torchlamb.recipes.mlperf_bert(512).note)
        scaled from batch size 448: lr by the square root of the batch size, warm-up share linearly (arXiv 1904.00962)

    Source: mlcommons/logging, `mlperf_logging/rcp_checker/training_5.0.0/rcps_bert.json`.
    """
    _check_whole("batch_size", batch_size, low=1)
    nearest = min(_MLPERF_BERT, key=lambda published: abs(math.log(batch_size / published)))
    lr, beta1, beta2, weight_decay, warmup, start, steps = _MLPERF_BERT[nearest]
    recipe = Recipe(
        batch_size=nearest,
        lr=lr,
        source=_MLPERF_SOURCE,
        betas=(beta1, beta2),
        weight_decay=weight_decay,
        warmup_steps=warmup,
        warmup_start=start,
        total_steps=steps,
    )
    return recipe if nearest == batch_size else scale(recipe, batch_size)


def nvidia_bert(phase: int) -> Recipe:
    """Return the settings of one phase of NVIDIA's pre-training of BERT-large in PyTorch.

    Phase 1 has sequences of 128 tokens, phase 2 begins with its weights and has sequences of 512. Weights decay by .01, biases
    and LayerNorm do not; the polynomial's power is .5. SQuAD F1 after both: 90.68 +- .16 over 10 seeds. Betas and eps are the
    defaults of :class:`Recipe`; the source names neither them nor a clipping norm.

    Args:
        phase: 1 or 2

    Raises:
        ValueError: it is neither

    Example:
        >>> import torchlamb
        >>> recipe = torchlamb.recipes.nvidia_bert(phase=1)
        >>> recipe.batch_size, recipe.lr, recipe.warmup_share, recipe.total_steps
        (65536, 0.006, 0.2843, 7038)

    Source: NVIDIA/DeepLearningExamples, `PyTorch/LanguageModeling/BERT/scripts/run_pretraining.sh`.
    """
    source = "NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT/scripts/run_pretraining.sh"
    if phase == 1:
        return Recipe(65536, 6e-3, source, warmup_share=0.2843, decay_power=0.5, total_steps=7038)
    if phase == 2:
        return Recipe(32768, 4e-3, source, warmup_share=0.128, decay_power=0.5, total_steps=1563)
    raise ValueError(f"phase must be 1 or 2, got {phase!r}")


def resnet_rsb(procedure: str, epochs: int) -> Recipe:
    """Return the settings of "ResNet strikes back" for ImageNet: batch size 2048, a cosine, and 5 epochs of warm-up.

    Args:
        procedure: "A2" with lr 5e-3, or "A3" with lr 8e-3
        epochs: of your run, >= 5, of which the first 5 are the warm-up; give `total_steps` to :meth:`Recipe.build`

    Raises:
        TypeError, ValueError: an argument is neither of these, or out of range

    Example:
        >>> import torchlamb
        >>> recipe = torchlamb.recipes.resnet_rsb("A2", epochs=100)
        >>> recipe.lr, recipe.weight_decay, recipe.warmup_share
        (0.005, 0.02, 0.05)

    Source: Wightman et al., ResNet strikes back, arXiv 2110.00476; mmpretrain,
    `configs/_base_/schedules/imagenet_bs2048_rsb.py`.
    """
    lrs = {"A2": 5e-3, "A3": 8e-3}
    if procedure not in lrs:
        raise ValueError(f"procedure must be 'A2' or 'A3', got {procedure!r}")
    _check_whole("epochs", epochs, low=5)
    source = "arXiv 2110.00476; mmpretrain, configs/_base_/schedules/imagenet_bs2048_rsb.py"
    return Recipe(2048, lrs[procedure], source, weight_decay=0.02, warmup_share=5 / epochs, decay_power=None)


def _check_whole(name: str, value: Any, low: int | None, high: int | None = None) -> None:
    bounds = f">= {low}" if high is None else f"<= {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int {bounds}, got {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name} must be an int {bounds}, got {value!r}")


def _check_number(name: str, value: Any, low: float, high: float = math.inf, above: bool = False) -> None:
    bounds = f"{'above' if above else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number {bounds}, got {value!r}")
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        raise ValueError(f"{name} must be a number {bounds}, got {value!r}")
