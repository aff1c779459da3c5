"""What surrounds a training: the progress bar, and the modes of modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchlamb.mindspore.train.callback.monitors import mean_loss


def shown_loss(outputs: Any) -> str:
    """Return the loss in what a step returned, as the progress bar shows it."""
    loss = mean_loss(outputs)
    return f"{loss.item():.4g}" if isinstance(loss, Tensor) else str(loss)


def import_progress_bar() -> Any:
    """Return tqdm.

    Raises:
        ModuleNotFoundError: it is missing; it says how to install it
    """
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Model.train shows a progress bar with tqdm: pip install 'torchlamb[mindspore]'") from error
    return tqdm


@contextmanager
def mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Put the network in training or evaluation mode, and every module back into its own afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.train(training)
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
