"""Training, evaluation and prediction with MindSpore's words. It knows any torch module and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchlamb.mindspore.callback import Callback, RunContext, TrainState
from torchlamb.mindspore.checks import check_count
from torchlamb.mindspore.loss_scale import LossScaleManager
from torchlamb.mindspore.metrics import read_metrics, start_metrics
from torchlamb.options import fail


class Model:
    """A network together with what trains and evaluates it.

    A dataset is any iterable of batches (data, label), such as a `torch.utils.data.DataLoader` or a list, or a function without
    arguments that returns an iterator, which is called once for each epoch. Batches are moved to the network's device.

    Args:
        network: any torch module
        loss_fn: a callable of (outputs, labels); a loss per sample is averaged. Without one, the network is called with the
            whole batch and returns the loss itself (default: None)
        optimizer: any torch optimizer on the network's parameters; needed to train (default: None)
        metrics: "accuracy", "loss", or a callable of all outputs and all labels: one, an iterable, or a dict from names; needed
            to evaluate. The accuracy takes class indices or one-hot rows as labels (default: None)
        loss_scale_manager: scales the loss in training; None for no scaling (default: None)

    Raises:
        TypeError: an argument of another type
        ValueError: a metric of another name

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import Model, nn
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Linear(4, 2)
        >>> loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True)
        >>> optimizer = nn.Lamb(nn.trainable_params(net), learning_rate=0.1)
        >>> model = Model(net, loss_fn=loss, optimizer=optimizer, metrics={"accuracy"})
        >>> dataset = [(torch.ones(8, 4), torch.zeros(8, dtype=torch.int64))] * 20
        >>> model.train(1, dataset)
        >>> model.eval(dataset)
        {'accuracy': 1.0}

    Source: `mindspore.train.Model`.
    """

    def __init__(
        self,
        network: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        optimizer: Optimizer | None = None,
        metrics: Any = None,
        loss_scale_manager: LossScaleManager | None = None,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise fail(TypeError, "network", "a torch.nn.Module", network)
        if loss_fn is not None and not callable(loss_fn):
            raise fail(TypeError, "loss_fn", "a callable of (outputs, labels)", loss_fn)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise fail(TypeError, "optimizer", "a torch.optim.Optimizer", optimizer)
        if loss_scale_manager is not None and not isinstance(loss_scale_manager, LossScaleManager):
            raise fail(
                TypeError, "loss_scale_manager", "a FixedLossScaleManager or DynamicLossScaleManager", loss_scale_manager
            )
        self.network = network
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.loss_scale_manager = loss_scale_manager
        self._metrics = read_metrics(metrics)

    def train(self, epoch: int, train_dataset: Any, callbacks: Any = None) -> None:
        """Train, with a progress bar that shows the loss.

        Args:
            epoch: how many times to go through the dataset, >= 1
            train_dataset: a dataset as above
            callbacks: a `Callback` or a list of them (default: None)

        Raises:
            TypeError: an argument of another type
            ValueError: no optimizer; a dataset without batches, or an iterator that is used up; a batch that is no pair
            ModuleNotFoundError: tqdm is missing; ``pip install 'torchlamb[mindspore]'``
        """
        optimizer = self.optimizer
        if optimizer is None:
            raise ValueError("optimizer must be given to Model in order to train, got None")
        check_count("epoch", epoch)
        _check_dataset("train_dataset", train_dataset)
        if epoch > 1 and isinstance(train_dataset, GeneratorType):
            raise ValueError(
                f"train_dataset is a generator, which is exhausted after one of {epoch} epochs; give a list, a DataLoader, or "
                "the function that makes the generator, without calling it"
            )
        listeners = _read_callbacks(callbacks)
        progress_bar = _import_progress_bar()
        batch_num = _length(train_dataset)
        state = TrainState(self.network, self.loss_fn, optimizer, train_dataset, epoch, batch_num)
        context = RunContext(state)
        with _mode(self.network, training=True):
            _call(listeners, "begin", context)
            for state.cur_epoch_num in range(1, epoch + 1):
                _call(listeners, "epoch_begin", context)
                with progress_bar(total=batch_num, desc=f"epoch {state.cur_epoch_num}/{epoch}", unit="step") as bar:
                    self._train_epoch(optimizer, listeners, context, bar)
                _call(listeners, "epoch_end", context)
                if context.get_stop_requested():
                    break
            _call(listeners, "end", context)

    def eval(self, valid_dataset: Any) -> dict[str, Any]:
        """Return each metric's value over the dataset, by name.

        Raises:
            TypeError: a dataset of another type
            ValueError: no metrics; "loss" without a loss_fn; a dataset without batches; a batch that is no pair
        """
        if not self._metrics:
            raise ValueError("metrics must be given to Model in order to evaluate, such as metrics={'accuracy'}")
        needs_loss = "loss" in self._metrics.values()
        if needs_loss and self.loss_fn is None:
            raise ValueError("loss_fn must be given to Model for the metric 'loss', got None")
        counters = start_metrics(self._metrics)
        with _mode(self.network, training=False), torch.no_grad():
            for data, label in self._batches("valid_dataset", valid_dataset, pairs=True):
                outputs = self.network(data)
                loss = self.loss_fn(outputs, label) if needs_loss and self.loss_fn is not None else None
                for counter in counters.values():
                    counter.update(outputs, label, loss)
        return {name: counter.result() for name, counter in counters.items()}

    def predict(self, *inputs: Any) -> Any:
        """Return the network's outputs for one batch of inputs, without gradients and in evaluation mode."""
        with _mode(self.network, training=False), torch.no_grad():
            return self.network(*_to(inputs, self._device()))

    def _train_epoch(self, optimizer: Optimizer, listeners: list[Callback], context: RunContext, bar: Any) -> None:
        state = context.original_args()
        for batch in self._batches("train_dataset", state.train_dataset, pairs=self.loss_fn is not None):
            state.cur_step_num += 1
            _call(listeners, "step_begin", context)
            state.net_outputs = self._train_step(optimizer, batch)
            if bar.update():  # it was drawn: reading the loss waits for the device, so not at every step
                bar.set_postfix(loss=f"{state.net_outputs.item():.4g}")
            _call(listeners, "step_end", context)
            if context.get_stop_requested():
                break
        assert state.net_outputs is not None  # an epoch has a batch
        bar.set_postfix(loss=f"{state.net_outputs.item():.4g}")

    def _train_step(self, optimizer: Optimizer, batch: Any) -> Tensor:
        if self.loss_fn is not None:
            loss = self.loss_fn(self.network(batch[0]), batch[1])
        else:
            loss = self.network(*batch) if isinstance(batch, (tuple, list)) else self.network(batch)
        if not isinstance(loss, Tensor):
            raise fail(TypeError, "the loss", "a tensor; give Model a loss_fn, or a network that returns its loss", loss)
        loss = _mean(loss)
        optimizer.zero_grad()
        if self.loss_scale_manager is not None:
            self.loss_scale_manager.train_step(loss, optimizer)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return loss.detach()

    def _batches(self, name: str, dataset: Any, pairs: bool) -> Iterator[Any]:
        """Yield the batches of one epoch, on the network's device."""
        _check_dataset(name, dataset)
        device = self._device()
        empty = True
        for batch in dataset if isinstance(dataset, Iterable) else dataset():
            if pairs and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise ValueError(f"{name} must give batches (data, label), got {type(batch).__name__}")
            empty = False
            yield _to(batch, device)
        if empty:
            raise ValueError(
                f"{name} gave no batches: it is empty, or an iterator that is exhausted; an iterator can be read once, so give "
                "a list, a DataLoader, or a function that returns a new iterator"
            )

    def _device(self) -> torch.device | None:
        return next((p.device for p in self.network.parameters()), None)


def _check_dataset(name: str, dataset: Any) -> None:
    if isinstance(dataset, (Tensor, str)) or not (isinstance(dataset, Iterable) or callable(dataset)):
        raise fail(TypeError, name, "an iterable of batches (data, label), or a function that returns one", type(dataset))


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:  # a DataLoader has __len__ even where its dataset has none
        return None


def _read_callbacks(callbacks: Any) -> list[Callback]:
    listed = [] if callbacks is None else [callbacks] if isinstance(callbacks, Callback) else callbacks
    if not isinstance(listed, Iterable):
        raise fail(TypeError, "callbacks", "a Callback or a list of them", callbacks)
    listeners = list(listed)
    for listener in listeners:
        if not isinstance(listener, Callback):
            raise fail(TypeError, "callbacks", "a Callback or a list of them", listener)
        for name in dir(listener):
            if name.startswith("on_"):
                raise TypeError(
                    f"callbacks: {type(listener).__name__}.{name} would never be called; the names are begin, epoch_begin, "
                    "step_begin, step_end, epoch_end and end"
                )
    return listeners


def _call(listeners: list[Callback], name: str, context: RunContext) -> None:
    for listener in listeners:
        getattr(listener, name)(context)


def _import_progress_bar() -> Any:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Model.train shows a progress bar with tqdm: pip install 'torchlamb[mindspore]'") from error
    return tqdm


def _mean(loss: Tensor) -> Tensor:
    return loss.mean() if loss.dim() else loss


def _to(batch: Any, device: torch.device | None) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device) if device is not None else batch
    if isinstance(batch, (tuple, list)):
        return (
            type(batch)(*(_to(x, device) for x in batch))
            if hasattr(batch, "_fields")
            else type(batch)(_to(x, device) for x in batch)
        )
    if isinstance(batch, dict):
        return {key: _to(x, device) for key, x in batch.items()}
    return batch


@contextmanager
def _mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Put the network in training or evaluation mode, and every module back into its own afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
