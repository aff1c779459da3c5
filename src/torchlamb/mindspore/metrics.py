"""Metrics of an evaluation, over the whole dataset whatever its batches are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from torchlamb.options import fail

_WANTED = "'accuracy' (or 'acc'), 'loss' or a callable of (outputs, labels)"


class _Accuracy:
    """The share of samples whose largest output is that of the label: a class index, or the largest of a one-hot row."""

    def __init__(self) -> None:
        self.right, self.samples = 0.0, 0

    def update(self, outputs: Tensor, labels: Tensor, loss: Tensor | None) -> None:  # noqa: ARG002
        one_hot = labels.shape == outputs.shape and outputs.dim() > 1 and outputs.shape[-1] > 1
        if not one_hot and (outputs.dim() < 2 or labels.shape != outputs.shape[:-1]):
            shapes = f"{tuple(outputs.shape)} and labels of {tuple(labels.shape)}"
            raise ValueError(f"accuracy takes outputs (N, C) and labels (N,) or one-hot (N, C), got outputs of shape {shapes}")
        indices = labels.float().argmax(dim=-1) if one_hot else labels
        hits = outputs.argmax(dim=-1) == indices
        self.right += hits.sum().item()
        self.samples += hits.numel()

    def result(self) -> float:
        return self.right / self.samples


class _Loss:
    """The mean loss of a sample; a loss of a whole batch counts as that of each of its samples."""

    def __init__(self) -> None:
        self.total, self.samples = 0.0, 0

    def update(self, outputs: Tensor, labels: Tensor, loss: Tensor | None) -> None:  # noqa: ARG002
        assert loss is not None
        samples = loss.numel() if loss.dim() else len(labels)
        self.total += loss.mean().item() * samples
        self.samples += samples

    def result(self) -> float:
        return self.total / self.samples


class _Called:
    """A function of all outputs and all labels, which are kept on the CPU until the end."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        self.function = function
        self.batches: list[tuple[Tensor, Tensor]] = []

    def update(self, outputs: Tensor, labels: Tensor, loss: Tensor | None) -> None:  # noqa: ARG002
        self.batches.append((outputs.cpu(), labels.cpu()))

    def result(self) -> Any:
        outputs, labels = zip(*self.batches, strict=True)
        return self.function(torch.cat(outputs), torch.cat(labels))


class Metric(Protocol):
    """What counts over the batches of one evaluation."""

    def update(self, outputs: Tensor, labels: Tensor, loss: Tensor | None) -> None:
        """Take one batch; `loss` is what the loss_fn returned for it, where a metric is "loss"."""

    def result(self) -> Any:
        """Return the value over all batches."""


_KNOWN: dict[str, Callable[[], Metric]] = {"accuracy": _Accuracy, "acc": _Accuracy, "loss": _Loss}


def read_metrics(metrics: Any) -> dict[str, Any]:
    """Return metrics by name.

    Args:
        metrics: None, one metric, an iterable of them, or a mapping from names to them; a metric is "accuracy", "loss", or a
            callable of all outputs and all labels

    Raises:
        TypeError: an element of another type
        ValueError: another name
    """
    if metrics is None:
        return {}
    if isinstance(metrics, str) or callable(metrics):
        metrics = [metrics]
    if not isinstance(metrics, Iterable):
        raise fail(TypeError, "metrics", f"a list or dict of metrics, {_WANTED}", metrics)
    if not isinstance(metrics, Mapping):
        listed = [(m if isinstance(m, str) else getattr(m, "__name__", type(m).__name__), m) for m in metrics]
        metrics = dict(listed)
        if len(metrics) < len(listed):
            raise ValueError("metrics has two of one name; give a dict from names to metrics")
    for name, metric in metrics.items():
        if not isinstance(metric, str) and not callable(metric):
            raise fail(TypeError, f"metrics[{name!r}]", _WANTED, metric)
        if isinstance(metric, str) and metric not in _KNOWN:
            raise fail(ValueError, f"metrics[{name!r}]", _WANTED, metric)
    return dict(metrics)


def start_metrics(metrics: dict[str, Any]) -> dict[str, Metric]:
    """Return new counters, by name, for one evaluation."""
    return {name: _KNOWN[metric]() if isinstance(metric, str) else _Called(metric) for name, metric in metrics.items()}
