"""What runs beside a training or an evaluation and can stop it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from torchlamb.options import fail


class CallbackParams(dict[str, Any]):
    """Where a training or evaluation stands: a dict whose entries are attributes too. Numbers count from 1.

    ``network``, ``train_network``, ``loss_fn``, ``optimizer``, ``train_dataset``, ``epoch_num`` (epochs in all), ``batch_num``
    (steps in an epoch; None where the dataset has no length), ``cur_epoch_num``, ``cur_step_num`` (over all epochs),
    ``net_outputs`` (what the step returned, without graphs: the loss; with a loss scale that drops steps a tuple of the loss,
    whether gradients overflowed, and the scale), ``mode`` ("train" or "eval"), ``dataset_sink_mode``, ``list_callback``; and in
    `Model.fit` after an evaluation ``metrics`` and ``eval_results``.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r} here; there are {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class RunContext:
    """What callbacks are given."""

    def __init__(self, original_args: CallbackParams) -> None:
        self._original_args = original_args
        self._stop = False

    def original_args(self) -> CallbackParams:
        """Return where the training stands."""
        return self._original_args

    def request_stop(self) -> None:
        """End the training after this step."""
        self._stop = True

    def get_stop_requested(self) -> bool:
        """Return whether a callback has asked to stop."""
        return self._stop


class Callback:
    """Base class of callbacks; each method does nothing until it is defined.

    There are two names for each moment: `step_end` is called by `on_train_step_end` and by `on_eval_step_end`, which are called
    in training and in evaluation, and so for the others. A callback is entered and exited as a context manager around both.

    Example:
        >>> from torchlamb.mindspore import Callback
        >>> class StopAtStep(Callback):
        ...     def __init__(self, step):
        ...         self.step = step
        ...     def on_train_step_end(self, run_context):
        ...         if run_context.original_args().cur_step_num == self.step:
        ...             run_context.request_stop()

    Source: `mindspore.train.Callback`.
    """

    def __enter__(self) -> Callback:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begin(self, run_context: RunContext) -> None:
        """Run before the first epoch."""

    def epoch_begin(self, run_context: RunContext) -> None:
        """Run before each epoch."""

    def step_begin(self, run_context: RunContext) -> None:
        """Run before each step."""

    def step_end(self, run_context: RunContext) -> None:
        """Run after each step."""

    def epoch_end(self, run_context: RunContext) -> None:
        """Run after each epoch, also after one that was stopped."""

    def end(self, run_context: RunContext) -> None:
        """Run after the last epoch, also after a stop, but not after an error."""

    def on_train_begin(self, run_context: RunContext) -> None:
        """Run before the first epoch of a training."""
        self.begin(run_context)

    def on_train_epoch_begin(self, run_context: RunContext) -> None:
        """Run before each epoch of a training."""
        self.epoch_begin(run_context)

    def on_train_step_begin(self, run_context: RunContext) -> None:
        """Run before each step of a training."""
        self.step_begin(run_context)

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Run after each step of a training."""
        self.step_end(run_context)

    def on_train_epoch_end(self, run_context: RunContext) -> None:
        """Run after each epoch of a training, also after one that was stopped."""
        self.epoch_end(run_context)

    def on_train_end(self, run_context: RunContext) -> None:
        """Run after the last epoch of a training, also after a stop, but not after an error."""
        self.end(run_context)

    def on_eval_begin(self, run_context: RunContext) -> None:
        """Run before an evaluation."""
        self.begin(run_context)

    def on_eval_epoch_begin(self, run_context: RunContext) -> None:
        """Run before the dataset of an evaluation."""
        self.epoch_begin(run_context)

    def on_eval_step_begin(self, run_context: RunContext) -> None:
        """Run before each batch of an evaluation."""
        self.step_begin(run_context)

    def on_eval_step_end(self, run_context: RunContext) -> None:
        """Run after each batch of an evaluation."""
        self.step_end(run_context)

    def on_eval_epoch_end(self, run_context: RunContext) -> None:
        """Run after the dataset of an evaluation."""
        self.epoch_end(run_context)

    def on_eval_end(self, run_context: RunContext) -> None:
        """Run after an evaluation."""
        self.end(run_context)


_OLD_NAMES = ("begin", "epoch_begin", "step_begin", "step_end", "epoch_end", "end")
_MOMENTS = {f"on_{mode}_{name}" for mode in ("train", "eval") for name in _OLD_NAMES}


def read_callbacks(callbacks: Any) -> list[Callback]:
    """Return callbacks as a list.

    Raises:
        TypeError: another type, or a method ``on_...`` that would never be called
    """
    listed = [] if callbacks is None else [callbacks] if isinstance(callbacks, Callback) else callbacks
    if not isinstance(listed, Iterable):
        raise fail(TypeError, "callbacks", "a Callback or a list of them", callbacks)
    listeners = list(listed)
    for listener in listeners:
        if not isinstance(listener, Callback):
            raise fail(TypeError, "callbacks", "a Callback or a list of them", listener)
        for name in dir(listener):
            if name.startswith(("on_train_", "on_eval_")) and name not in _MOMENTS:
                raise TypeError(
                    f"callbacks: {type(listener).__name__}.{name} would never be called; the names are "
                    f"{', '.join(sorted(_MOMENTS))}, and without on_train_ and on_eval_"
                )
    return listeners


class Listeners:
    """Callbacks that are entered together, and called one after the other."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = list(callbacks)
        self._entered: list[Callback] = []

    def __enter__(self) -> Listeners:
        for callback in list(self.callbacks):
            try:
                callback.__enter__()
            except BaseException as error:
                self.__exit__(type(error), error, error.__traceback__)
                raise
            self._entered.append(callback)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._entered:
            self._entered.pop().__exit__(kind, error, trace)

    def call(self, moment: str, context: RunContext) -> None:
        """Call a method of each."""
        for callback in self.callbacks:
            getattr(callback, moment)(context)
