"""Datasets as `Model` reads them: any iterable of batches, moved to the network's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn

from torchlamb.mindspore.common.tensor import wrap
from torchlamb.mindspore.nn.cell import Cell
from torchlamb.options import fail


def check_dataset(name: str, dataset: Any) -> None:
    """Raise TypeError if it is neither an iterable of batches nor a function."""
    if isinstance(dataset, (Tensor, str)) or not (isinstance(dataset, Iterable) or callable(dataset)):
        raise fail(TypeError, name, "an iterable of batches (data, label), or a function that returns one", type(dataset))


def check_can_repeat(name: str, dataset: Any, epochs: int) -> None:
    """Raise ValueError if it is a generator that more than one epoch would ask."""
    if epochs > 1 and isinstance(dataset, GeneratorType):
        raise ValueError(
            f"{name} is a generator, which is exhausted after one of {epochs} epochs; give a list, a DataLoader, or "
            "the function that makes the generator, without calling it"
        )


def length(dataset: Any) -> int | None:
    """Return the number of batches, None where it is not known."""
    if hasattr(dataset, "get_dataset_size"):
        return int(dataset.get_dataset_size())
    try:
        return len(dataset)
    except TypeError:  # a DataLoader has __len__ even where its dataset has none
        return None


def batches(name: str, dataset: Any, network: nn.Module, pairs: bool) -> Iterator[Any]:
    """Yield the batches of one epoch, on the network's device; a Cell gets tensors with MindSpore's words.

    Raises:
        TypeError: another dataset
        ValueError: a batch that is no pair, where `pairs` are needed; or no batch at all
    """
    check_dataset(name, dataset)
    device = device_of(network)
    empty = True
    for batch in dataset if isinstance(dataset, Iterable) else dataset():
        if pairs and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(f"{name} must give batches (data, label), got {type(batch).__name__}")
        empty = False
        moved = to_device(batch, device)
        yield wrap(moved) if isinstance(network, Cell) else moved
    if empty:
        raise ValueError(
            f"{name} gave no batches: it is empty, or an iterator that is exhausted; an iterator can be read once, so give "
            "a list, a DataLoader, or a function that returns a new iterator"
        )


def endless(name: str, dataset: Any, network: nn.Module, pairs: bool) -> Iterator[Any]:
    """Yield batches from epoch to epoch."""
    while True:
        yield from batches(name, dataset, network, pairs)


def device_of(network: nn.Module) -> torch.device | None:
    """Return the device of a network's first parameter."""
    return next((p.device for p in network.parameters()), None)


def to_device(batch: Any, device: torch.device | None) -> Any:
    """Return a batch, whatever holds its tensors, on a device; arrays become tensors."""
    if isinstance(batch, Tensor):
        return batch.to(device) if device is not None else batch
    if isinstance(batch, (tuple, list)):
        moved = (to_device(x, device) for x in batch)
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    if isinstance(batch, dict):
        return {key: to_device(x, device) for key, x in batch.items()}
    if hasattr(batch, "__array_interface__"):
        return torch.as_tensor(batch, device=device)
    return batch
