"""Training, evaluation and prediction with MindSpore's words. It knows any torch module and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchlamb.mindspore.checks import check_count
from torchlamb.mindspore.common.tensor import wrap
from torchlamb.mindspore.metrics import Counters, Loss, needs_loss, read_metrics
from torchlamb.mindspore.nn.wrap.cell_wrapper import detached
from torchlamb.mindspore.train import batches
from torchlamb.mindspore.train.callback.base import CallbackParams, Listeners, RunContext, read_callbacks
from torchlamb.mindspore.train.callback.monitors import LossMonitor
from torchlamb.mindspore.train.loss_scale_manager import LossScaleManager
from torchlamb.mindspore.train.running import import_progress_bar, mode, shown_loss
from torchlamb.mindspore.train.serialization import optimizers_of
from torchlamb.mindspore.train.step import Step
from torchlamb.options import fail


class Model:
    """A network together with what trains and evaluates it.

    A dataset is any iterable of batches (data, label), such as a `torch.utils.data.DataLoader` or a list, or a function without
    arguments that returns an iterator, which is called once for each epoch. Batches are moved to the network's device.

    Args:
        network: any torch module; or a cell that has an optimizer and steps itself, such as `nn.TrainOneStepCell`, which is
            called with the whole batch and needs neither loss nor optimizer
        loss_fn: a callable of (outputs, labels); of a loss per sample the gradient of the sum is followed, and the mean shown.
            Without one, the network is called with the whole batch and returns the loss itself (default: None)
        optimizer: any torch optimizer on the network's parameters; needed to train a network that does not step itself.
            Parameters without a gradient get zeros (default: None)
        metrics: names ("accuracy", "loss", "mae", "mse", "top_1_accuracy", "top_5_accuracy"), `nn.Metric` objects, or callables
            of all outputs and all labels: one, an iterable, or a dict from names; needed to evaluate (default: None)
        eval_network: a network that is called with the whole batch to evaluate, and whose outputs metrics take; None for
            `network` and `loss_fn` (default: None)
        eval_indexes: where the loss, the outputs and the labels stand in what `eval_network` returns, a list of three ints;
            None to give metrics all of it (default: None)
        amp_level: accepted, does nothing; use `torch.autocast` in the network (default: "O0")
        boost_level: accepted, does nothing (default: "O0")
        loss_scale_manager: scales the loss in training; None for no scaling (default: None)
        ignored: `keep_batchnorm_fp32`, `boost_config_dict` and `acc_level`, which do nothing

    Raises:
        TypeError: an argument of another type
        ValueError: a metric of another name; a network that steps itself beside an optimizer or loss; wrong `eval_indexes`

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
        eval_network: nn.Module | None = None,
        eval_indexes: list[int] | None = None,
        amp_level: str = "O0",
        boost_level: str = "O0",
        *,
        loss_scale_manager: LossScaleManager | None = None,
        **ignored: Any,
    ) -> None:
        _check_network("network", network)
        if loss_fn is not None and not callable(loss_fn):
            raise fail(TypeError, "loss_fn", "a callable of (outputs, labels)", loss_fn)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise fail(TypeError, "optimizer", "a torch.optim.Optimizer", optimizer)
        if loss_scale_manager is not None and not isinstance(loss_scale_manager, LossScaleManager):
            raise fail(
                TypeError, "loss_scale_manager", "a FixedLossScaleManager or DynamicLossScaleManager", loss_scale_manager
            )
        if eval_network is not None:
            _check_network("eval_network", eval_network)
        if eval_indexes is not None and not (isinstance(eval_indexes, list) and len(eval_indexes) == 3):
            raise fail(ValueError, "eval_indexes", "a list of three ints, or None", eval_indexes)
        for name in ignored:
            if name not in ("keep_batchnorm_fp32", "boost_config_dict", "acc_level"):
                raise TypeError(f"Model takes no argument {name!r}")
        self.network, self.loss_fn, self.optimizer = network, loss_fn, optimizer
        self.loss_scale_manager = loss_scale_manager
        self.eval_network, self.eval_indexes = eval_network, eval_indexes
        self.amp_level, self.boost_level = amp_level, boost_level
        self._metrics = read_metrics(metrics)
        self._check_who_steps()

    @property
    def train_network(self) -> nn.Module:
        """What is called with a batch in training: the network that steps itself, or one with the loss and the optimizer."""
        if self.optimizer is None:
            return self.network
        return Step(self.network, self.loss_fn, self.optimizer, self.loss_scale_manager)

    @property
    def predict_network(self) -> nn.Module:
        """What `predict` calls."""
        return self.network

    def train(
        self,
        epoch: int,
        train_dataset: Any,
        callbacks: Any = None,
        dataset_sink_mode: bool = False,
        sink_size: int = -1,
        initial_epoch: int = 0,
    ) -> None:
        """Train, with a progress bar that shows the loss.

        Args:
            epoch: how many times to go through the dataset, >= 1; the last epoch, where `initial_epoch` is given
            train_dataset: a dataset as above
            callbacks: a `Callback` or a list of them (default: None)
            dataset_sink_mode: with `sink_size`, an epoch has that many steps, and the next one goes on in the dataset (default:
                False)
            sink_size: the steps of an epoch with `dataset_sink_mode`; -1 for the whole dataset (default: -1)
            initial_epoch: epochs that were trained before; the first is numbered after it (default: 0)

        Raises:
            TypeError: an argument of another type
            ValueError: no optimizer; a dataset without batches, or an iterator that is used up; a batch that is no pair; a
                number out of range
            ModuleNotFoundError: tqdm is missing; ``pip install 'torchlamb[mindspore]'``
        """
        self._fit(epoch, train_dataset, callbacks, dataset_sink_mode, sink_size, initial_epoch, lambda *_: None)

    def fit(
        self,
        epoch: int,
        train_dataset: Any,
        valid_dataset: Any = None,
        valid_frequency: Any = 1,
        callbacks: Any = None,
        dataset_sink_mode: bool = False,
        valid_dataset_sink_mode: bool = False,  # noqa: ARG002
        sink_size: int = -1,
        initial_epoch: int = 0,
    ) -> None:
        """Train as `train` does, and evaluate after epochs; callbacks find what `eval` returns as ``metrics``.

        Args:
            epoch: as in `train`
            train_dataset: as in `train`
            valid_dataset: the dataset to evaluate; None for none (default: None)
            valid_frequency: after how many epochs, an int >= 1; or a list of the epochs (default: 1)
            callbacks: as in `train` (default: None)
            dataset_sink_mode: as in `train` (default: False)
            valid_dataset_sink_mode: accepted, does nothing (default: False)
            sink_size: as in `train` (default: -1)
            initial_epoch: as in `train` (default: 0)

        Raises:
            TypeError, ValueError, ModuleNotFoundError: as `train` and `eval` do
        """
        if not isinstance(valid_frequency, list):
            check_count("valid_frequency", valid_frequency)
        if valid_dataset is not None:
            self._check_can_evaluate(valid_dataset)

        def evaluate(context: RunContext, listeners: Listeners) -> None:
            number = context.original_args().cur_epoch_num
            due = number in valid_frequency if isinstance(valid_frequency, list) else number % valid_frequency == 0
            if valid_dataset is not None and due:
                others = [x for x in listeners.callbacks if not isinstance(x, LossMonitor)]
                self._evaluate_within(context.original_args(), valid_dataset, Listeners(others))

        self._fit(epoch, train_dataset, callbacks, dataset_sink_mode, sink_size, initial_epoch, evaluate)

    def eval(self, valid_dataset: Any, callbacks: Any = None, dataset_sink_mode: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """Return each metric's value over the dataset, by name.

        Args:
            valid_dataset: a dataset as above
            callbacks: a `Callback` or a list of them (default: None)
            dataset_sink_mode: accepted, does nothing (default: False)

        Raises:
            TypeError: a dataset of another type
            ValueError: no metrics; a metric of the loss without a loss_fn; a dataset without batches; a batch that is no pair
        """
        self._check_can_evaluate(valid_dataset)
        state = self._state("eval", valid_dataset=valid_dataset, epoch_num=1, batch_num=batches.length(valid_dataset))
        with Listeners(read_callbacks(callbacks)) as listeners:
            return self._evaluate(RunContext(state), listeners)

    def predict(self, *predict_data: Any, **ignored: Any) -> Any:  # noqa: ARG002
        """Return the network's outputs for one batch of inputs, without gradients and in evaluation mode."""
        with mode(self.network, training=False), torch.no_grad():
            return wrap(self.network(*batches.to_device(predict_data, batches.device_of(self.network))))

    def _check_who_steps(self) -> None:
        """Raise ValueError if two would step, or one would do what no one is there for."""
        if optimizers_of(self.network):
            for name in ("optimizer", "loss_fn", "loss_scale_manager"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} must not be given beside a network that steps itself ({type(self.network).__name__} has an "
                        "optimizer); give Model that alone, or the network in it"
                    )
        elif self.loss_scale_manager is not None and self.optimizer is None:
            raise ValueError("optimizer must be given to Model with a loss_scale_manager, got None")

    def _check_can_evaluate(self, valid_dataset: Any) -> None:
        if not self._metrics:
            raise ValueError("metrics must be given to Model in order to evaluate, such as metrics={'accuracy'}")
        if (
            needs_loss(self._metrics)
            and self.loss_fn is None
            and self.eval_indexes is None
            and "loss" in self._metrics.values()
        ):
            raise ValueError("loss_fn must be given to Model for the metric 'loss', got None")
        batches.check_dataset("valid_dataset", valid_dataset)

    def _state(self, kind: str, **further: Any) -> CallbackParams:
        own = {"network": self.network, "loss_fn": self.loss_fn, "optimizer": self.optimizer, "eval_network": self.eval_network}
        counts = {"cur_epoch_num": 0, "cur_step_num": 0, "net_outputs": None, "dataset_sink_mode": False}
        return CallbackParams({"mode": kind, **own, **counts, **further})

    def _fit(
        self,
        epoch: int,
        dataset: Any,
        callbacks: Any,
        sinks: bool,
        sink_size: int,
        initial_epoch: int,
        evaluate: Callable[[RunContext, Listeners], None],
    ) -> None:
        if self.optimizer is None and not optimizers_of(self.network):
            raise ValueError("optimizer must be given to Model in order to train, got None")
        check_count("epoch", epoch)
        _check_numbers(epoch, sink_size, initial_epoch)
        batches.check_dataset("train_dataset", dataset)
        size = sink_size if sinks and sink_size > 0 else None  # of an epoch; None for that of the dataset
        if size is None:
            batches.check_can_repeat("train_dataset", dataset, epoch - initial_epoch)
        listed = read_callbacks(callbacks)
        progress_bar = import_progress_bar()
        network = self.train_network
        state = self._state("train", train_network=network, train_dataset=dataset, list_callback=listed)
        state.update(epoch_num=epoch - initial_epoch, batch_num=size or batches.length(dataset), dataset_sink_mode=bool(sinks))
        context = RunContext(state)
        stream = batches.endless("train_dataset", dataset, self.network, self.loss_fn is not None) if size else None
        with Listeners(listed) as listeners, mode(network, training=True):
            listeners.call("on_train_begin", context)
            for state.cur_epoch_num in range(initial_epoch + 1, epoch + 1):
                listeners.call("on_train_epoch_begin", context)
                with progress_bar(total=state.batch_num, desc=f"epoch {state.cur_epoch_num}/{epoch}", unit="step") as bar:
                    self._train_epoch(network, listeners, context, bar, stream, size)
                evaluate(context, listeners)
                listeners.call("on_train_epoch_end", context)
                state.pop("metrics", None)
                state.pop("eval_results", None)
                if context.get_stop_requested():
                    break
            listeners.call("on_train_end", context)

    def _train_epoch(
        self, network: nn.Module, listeners: Listeners, context: RunContext, bar: Any, stream: Any, size: int | None
    ) -> None:
        state = context.original_args()
        pairs = self.loss_fn is not None
        dataset = stream if stream is not None else batches.batches("train_dataset", state.train_dataset, self.network, pairs)
        for step, batch in enumerate(dataset, start=1):
            state.cur_step_num += 1
            state.train_dataset_element = batch
            listeners.call("on_train_step_begin", context)
            network.train()
            outputs = network(*batch) if isinstance(batch, (tuple, list)) else network(batch)
            state.net_outputs = detached(outputs)
            if bar.update():  # it was drawn: reading the loss waits for the device, so not at every step
                bar.set_postfix(loss=shown_loss(state.net_outputs))
            listeners.call("on_train_step_end", context)
            if context.get_stop_requested() or step == size:
                break
        bar.set_postfix(loss=shown_loss(state.net_outputs))

    def _evaluate_within(self, state: CallbackParams, valid_dataset: Any, listeners: Listeners) -> None:
        """Evaluate between epochs, and leave what training callbacks see as it was, with the results beside it."""
        kept = dict(state)
        state.update(mode="eval", valid_dataset=valid_dataset, batch_num=batches.length(valid_dataset), cur_step_num=0)
        found = self._evaluate(RunContext(state), listeners)
        results = {"metrics": found, "eval_results": state.eval_results}
        state.clear()
        state.update(kept, valid_dataset=valid_dataset, **results)

    def _evaluate(self, context: RunContext, listeners: Listeners) -> dict[str, Any]:
        state = context.original_args()
        counters, loss = Counters(self._metrics), Loss()
        network = self.network if self.eval_network is None else self.eval_network
        with mode(network, training=False), torch.no_grad():
            listeners.call("on_eval_begin", context)
            listeners.call("on_eval_epoch_begin", context)
            for batch in batches.batches("valid_dataset", state.valid_dataset, network, pairs=self.eval_network is None):
                state.cur_step_num += 1
                state.eval_dataset_element = batch
                listeners.call("on_eval_step_begin", context)
                state.net_outputs, of_loss = self._evaluate_batch(network, batch, counters)
                if of_loss is not None:
                    loss.update(of_loss)
                listeners.call("on_eval_step_end", context)
                if context.get_stop_requested():
                    break
            listeners.call("on_eval_epoch_end", context)
            state.metrics = counters.results()
            state.eval_results = {**state.metrics, **({"eval_loss": loss.eval()} if loss.count else {})}
            listeners.call("on_eval_end", context)
        return state.metrics  # type: ignore[no-any-return]

    def _evaluate_batch(self, network: nn.Module, batch: Any, counters: Counters) -> tuple[Any, Any]:
        """Give metrics what they take of one batch, and return all outputs, and the loss where there is one."""
        if self.eval_network is None:
            data, labels = batch
            outputs = network(data)
            loss = self.loss_fn(outputs, labels) if needs_loss(self._metrics) and self.loss_fn is not None else None
            counters.update(outputs, labels, loss)
            return wrap((loss, outputs, labels)), loss
        outputs = network(*batch) if isinstance(batch, (tuple, list)) else network(batch)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if self.eval_indexes is None:
            counters.update_all(wrap(outputs))
            return wrap(outputs), None
        if len(outputs) <= max(self.eval_indexes):
            raise ValueError(f"eval_indexes is {self.eval_indexes}, and eval_network returned {len(outputs)} values")
        loss, predicted, labels = (outputs[i] for i in self.eval_indexes)
        counters.update(predicted, labels, loss)
        return wrap(outputs), loss


def _check_network(name: str, network: Any) -> None:
    if not isinstance(network, nn.Module):
        raise fail(TypeError, name, "a torch.nn.Module", network)


def _check_numbers(epoch: int, sink_size: Any, initial_epoch: Any) -> None:
    if sink_size != -1:
        check_count("sink_size", sink_size)
    if isinstance(initial_epoch, bool) or not isinstance(initial_epoch, int):
        raise fail(TypeError, "initial_epoch", "an int >= 0", initial_epoch)
    if not 0 <= initial_epoch < epoch:
        raise fail(ValueError, "initial_epoch", f"an int >= 0 and less than epoch, {epoch}", initial_epoch)
