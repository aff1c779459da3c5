"""Metrics of an evaluation: objects that count over its batches, their names, and functions of all outputs and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchlamb.mindspore.checks import check_count
from torchlamb.mindspore.common.tensor import plain, wrap
from torchlamb.options import fail


class Metric:
    """What counts over the batches of an evaluation. Subclasses define `clear`, `update` and `eval`.

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> class Largest(nn.Metric):
        ...     def clear(self):
        ...         self.value = float("-inf")
        ...     def update(self, *inputs):
        ...         self.value = max(self.value, float(self._convert_data(inputs[0]).max()))
        ...     def eval(self):
        ...         return self.value
        >>> Largest()(torch.tensor([1.0, 3.0]), torch.zeros(2))
        3.0

    Source: `mindspore.train.Metric`.
    """

    _indexes: list[int] | None = None

    def clear(self) -> None:
        """Begin anew."""
        raise NotImplementedError(f"{type(self).__name__} must define clear()")

    def update(self, *inputs: Any) -> None:
        """Take one batch: outputs and labels, or what an `eval_network` returns."""
        raise NotImplementedError(f"{type(self).__name__} must define update(*inputs)")

    def eval(self) -> Any:
        """Return the value over all batches."""
        raise NotImplementedError(f"{type(self).__name__} must define eval()")

    def __call__(self, *inputs: Any) -> Any:
        """Return the value of one batch alone."""
        self.clear()
        self.update(*inputs)
        return self.eval()

    @property
    def indexes(self) -> list[int] | None:
        """Which of the inputs are taken, in which order; None for all as they come."""
        return self._indexes

    def set_indexes(self, indexes: list[int]) -> Metric:
        """Choose which of the inputs of `update` are taken, in which order, and return the metric.

        Raises:
            ValueError: no list of ints
        """
        if not isinstance(indexes, list) or not all(isinstance(i, int) for i in indexes):
            raise fail(ValueError, "indexes", "a list of ints", indexes)
        self._indexes = indexes
        return self

    def _convert_data(self, data: Any) -> Any:
        """Return a tensor, list or array as a NumPy array."""
        return wrap(torch.as_tensor(plain(data))).asnumpy()

    def _taken(self, count: int, inputs: tuple[Any, ...]) -> list[Tensor]:
        picked = inputs if self._indexes is None else [inputs[i] for i in self._indexes]
        if len(picked) != count:
            raise ValueError(f"{type(self).__name__} takes {count} inputs, got {len(picked)}; set_indexes() chooses among more")
        return [torch.as_tensor(plain(x)).detach() for x in picked]


class _Mean(Metric):
    """A sum of which each batch adds a part, over what was counted."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.total, self.count = 0.0, 0

    def eval(self) -> float:
        """Return the mean.

        Raises:
            RuntimeError: there was no batch
        """
        if not self.count:
            raise RuntimeError(f"{type(self).__name__} has no value before update()")
        return self.total / self.count

    def _add(self, parts: Tensor) -> None:
        self.total += parts.sum().item()
        self.count += parts.numel()


class Accuracy(_Mean):
    """The share of samples whose largest output is that of the label.

    Args:
        eval_type: 'classification', for outputs (N, C), or (N, C, ...), and labels that are class indices (N,) or (N, ...) or
            one-hot rows (N, C); or 'multilabel', for outputs and labels of 0 and 1, of which a row counts if all of it is right
            (default: 'classification')

    Raises:
        TypeError: another `eval_type`

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> nn.Accuracy()(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        0.5

    Source: `mindspore.train.Accuracy`.
    """

    def __init__(self, eval_type: str = "classification") -> None:
        if eval_type not in ("classification", "multilabel"):
            raise fail(TypeError, "eval_type", "'classification' or 'multilabel'", eval_type)
        self.eval_type = eval_type
        super().__init__()

    def update(self, *inputs: Any) -> None:
        """Take outputs and labels.

        Raises:
            ValueError: shapes that do not fit
        """
        outputs, labels = self._taken(2, inputs)
        if self.eval_type == "multilabel":
            if labels.shape != outputs.shape or outputs.dim() < 2:
                raise ValueError(f"accuracy takes outputs and labels (N, C), got {_shapes(outputs, labels)}")
            self._add((outputs == labels).movedim(1, -1).all(dim=-1))
            return
        one_hot = labels.shape == outputs.shape and outputs.dim() > 1 and outputs.shape[-1] > 1
        classes = 1 if outputs.dim() > 1 and labels.shape == outputs.shape[:1] + outputs.shape[2:] else -1
        if not one_hot and (outputs.dim() < 2 or (classes == -1 and labels.shape != outputs.shape[:-1])):
            raise ValueError(f"accuracy takes outputs (N, C) and labels (N,) or one-hot (N, C), got {_shapes(outputs, labels)}")
        indices = labels.float().argmax(dim=-1) if one_hot else labels
        self._add((outputs.argmax(dim=-1 if one_hot else classes) == indices).double())


class TopKCategoricalAccuracy(_Mean):
    """The share of samples whose label is among the k largest outputs.

    Args:
        k: how many, an int >= 1

    Raises:
        TypeError, ValueError: it is none

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> nn.TopKCategoricalAccuracy(2)(torch.tensor([[0.1, 0.5, 0.4], [0.8, 0.2, 0.0]]), torch.tensor([2, 2]))
        0.5

    Source: `mindspore.train.TopKCategoricalAccuracy`.
    """

    def __init__(self, k: int) -> None:
        self.k = check_count("k", k)
        super().__init__()

    def update(self, *inputs: Any) -> None:
        """Take outputs (N, C) and labels, class indices (N,) or one-hot rows (N, C).

        Raises:
            ValueError: shapes that do not fit
        """
        outputs, labels = self._taken(2, inputs)
        if labels.shape == outputs.shape and outputs.dim() == 2:
            labels = labels.float().argmax(dim=1)
        if outputs.dim() != 2 or labels.shape != outputs.shape[:1]:
            raise ValueError(f"the accuracy takes outputs (N, C) and labels (N,) or (N, C), got {_shapes(outputs, labels)}")
        largest = torch.argsort(outputs, dim=1, descending=True, stable=True)[:, : self.k]
        self._add((largest == labels.unsqueeze(1)).any(dim=1).double())


class Top1CategoricalAccuracy(TopKCategoricalAccuracy):
    """The share of samples whose largest output is that of the label."""

    def __init__(self) -> None:
        super().__init__(1)


class Top5CategoricalAccuracy(TopKCategoricalAccuracy):
    """The share of samples whose label is among the 5 largest outputs."""

    def __init__(self) -> None:
        super().__init__(5)


class Loss(_Mean):
    """The mean over batches of the mean loss in them; a small last batch counts as much as others, as in the original."""

    def update(self, *inputs: Any) -> None:
        """Take the loss, of a batch or of each sample."""
        (loss,) = self._taken(1, inputs)
        self._add(loss.double().mean().reshape(1))


class MAE(_Mean):
    """The mean absolute error, over samples, of the sum over their elements."""

    def update(self, *inputs: Any) -> None:
        """Take outputs and labels of one shape."""
        self._add_errors(torch.abs, inputs)

    def _add_errors(self, function: Callable[[Tensor], Tensor], inputs: tuple[Any, ...]) -> None:
        outputs, labels = self._taken(2, inputs)
        if outputs.shape != labels.shape:
            raise ValueError(f"the error takes outputs and labels of one shape, got {_shapes(outputs, labels)}")
        self.total += function(outputs.double() - labels).sum().item()
        self.count += len(outputs)


class MSE(MAE):
    """The mean squared error, over samples, of the sum over their elements."""

    def update(self, *inputs: Any) -> None:
        """Take outputs and labels of one shape."""
        self._add_errors(torch.square, inputs)


def _shapes(outputs: Tensor, labels: Tensor) -> str:
    return f"outputs of shape {tuple(outputs.shape)} and labels of {tuple(labels.shape)}"


class _SampleLoss(_Mean):
    """The metric "loss": the mean loss of a sample; a loss of a whole batch counts as that of each of its samples."""

    def update(self, *inputs: Any) -> None:
        loss, samples = inputs
        self.total += loss.mean().item() * samples
        self.count += samples


class _Called:
    """A function of all outputs and all labels, which are kept on the CPU until the end."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        self.function = function
        self.batches: list[tuple[Tensor, Tensor]] = []

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.batches.append((outputs.cpu(), labels.cpu()))

    def eval(self) -> Any:
        outputs, labels = zip(*self.batches, strict=True)
        return self.function(torch.cat(outputs), torch.cat(labels))


_KNOWN: dict[str, Callable[[], Any]] = {
    "accuracy": Accuracy,
    "acc": Accuracy,
    "loss": _SampleLoss,
    "mae": MAE,
    "mse": MSE,
    "top_1_accuracy": Top1CategoricalAccuracy,
    "top_5_accuracy": Top5CategoricalAccuracy,
}
_WANTED = f"{', '.join(map(repr, _KNOWN))}, a Metric or a callable of (outputs, labels)"


class Counters:
    """The metrics of one evaluation, by name."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self._counters: dict[str, Any] = {}
        for name, metric in metrics.items():
            if is_metric(metric):
                metric.clear()
            self._counters[name] = (
                _KNOWN[metric]() if isinstance(metric, str) else metric if is_metric(metric) else _Called(metric)
            )

    def update(self, outputs: Any, labels: Any, loss: Any) -> None:
        """Take one batch; `loss` is needed only by those metrics that are of it."""
        for counter in self._counters.values():
            if isinstance(counter, _SampleLoss):
                counter.update(loss, loss.numel() if loss.dim() else len(labels))
            elif isinstance(counter, Loss):
                counter.update(loss)
            else:
                counter.update(outputs, labels)

    def update_all(self, outputs: tuple[Any, ...]) -> None:
        """Take all that an `eval_network` returned for one batch."""
        for counter in self._counters.values():
            counter.update(*outputs)

    def results(self) -> dict[str, Any]:
        """Return the values by name."""
        return {name: counter.eval() for name, counter in self._counters.items()}


def is_metric(metric: Any) -> bool:
    """Return whether it counts over batches, as a `Metric` does."""
    return not isinstance(metric, type) and all(callable(getattr(metric, name, None)) for name in ("clear", "update", "eval"))


def needs_loss(metrics: Mapping[str, Any]) -> bool:
    """Return whether a metric is of the loss."""
    return any(metric == "loss" or isinstance(metric, Loss) for metric in metrics.values())


def read_metrics(metrics: Any) -> dict[str, Any]:
    """Return metrics by name.

    Args:
        metrics: None, one metric, an iterable of them, or a mapping from names to them; a metric is one of the names that are
            known, a `Metric`, or a callable of all outputs and all labels

    Raises:
        TypeError: an element of another type
        ValueError: another name
    """
    if metrics is None:
        return {}
    if isinstance(metrics, str) or callable(metrics) or is_metric(metrics):
        metrics = [metrics]
    if not isinstance(metrics, Iterable):
        raise fail(TypeError, "metrics", f"a list or dict of metrics, {_WANTED}", metrics)
    if not isinstance(metrics, Mapping):
        listed = [(m if isinstance(m, str) else getattr(m, "__name__", type(m).__name__), m) for m in metrics]
        metrics = dict(listed)
        if len(metrics) < len(listed):
            raise ValueError("metrics has two of one name; give a dict from names to metrics")
    for name, metric in metrics.items():
        if not isinstance(metric, str) and not callable(metric) and not is_metric(metric):
            raise fail(TypeError, f"metrics[{name!r}]", _WANTED, metric)
        if isinstance(metric, str) and metric not in _KNOWN:
            raise fail(ValueError, f"metrics[{name!r}]", _WANTED, metric)
    return dict(metrics)
