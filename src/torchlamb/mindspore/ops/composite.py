"""Functions over many tensors: chosen by the types of arguments, mapped over tuples and lists, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any

import torch

from torchlamb.mindspore.common.parameter import NamedParameter
from torchlamb.mindspore.ops.functional import clip_by_global_norm, clip_by_norm, clip_by_value, ones_like, zeros_like
from torchlamb.mindspore.ops.gradients import GradOperation, grad, value_and_grad

__all__ = [
    "GradOperation",
    "HyperMap",
    "Map",
    "MultitypeFuncGraph",
    "add_flags",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "grad",
    "ones_like",
    "value_and_grad",
    "zeros_like",
]

_TYPES: dict[str, Callable[[Any], bool]] = {
    "Tensor": lambda x: isinstance(x, (torch.Tensor, NamedParameter)),
    "Bool": lambda x: isinstance(x, bool),
    "Number": lambda x: isinstance(x, Number),
    "Int": lambda x: isinstance(x, int) and not isinstance(x, bool),
    "Float": lambda x: isinstance(x, float),
    "String": lambda x: isinstance(x, str),
    "Tuple": lambda x: isinstance(x, tuple) and not isinstance(x, NamedParameter),
    "List": lambda x: isinstance(x, list),
    "Function": callable,
    "None": lambda x: x is None,
}


class MultitypeFuncGraph:
    """A function with bodies by the types of its arguments.

    Args:
        name: for messages
        read_value: accepted, does nothing (default: False)

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import ops
        >>> scale = ops.MultitypeFuncGraph("scale")
        >>> @scale.register("Number", "Tensor")
        ... def scale_tensor(factor, tensor):
        ...     return factor * tensor
        >>> ops.HyperMap()(ops.partial(scale, 2.0), (torch.ones(1), torch.zeros(1)))
        (tensor([2.]), tensor([0.]))

    Source: `mindspore.ops.MultitypeFuncGraph`.
    """

    def __init__(self, name: str, read_value: bool = False) -> None:  # noqa: ARG002
        self.name = name
        self.entries: list[tuple[tuple[str, ...], Callable[..., Any]]] = []

    def register(self, *type_names: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that registers the body for types: "Tensor", "Number", "Bool", "Tuple" and so on."""

        def add(body: Callable[..., Any]) -> Callable[..., Any]:
            self.entries.append((tuple(map(str, type_names)), body))
            return body

        return add

    def __call__(self, *inputs: Any) -> Any:
        """Call the first body that is registered for these types.

        Raises:
            TypeError: there is none
        """
        for names, body in self.entries:
            if len(names) == len(inputs) and all(_TYPES.get(n, _no)(x) for n, x in zip(names, inputs, strict=True)):
                return body(*inputs)
        given = ", ".join(type(x).__name__ for x in inputs)
        known = "; ".join(", ".join(names) for names, _ in self.entries)
        raise TypeError(f"{self.name} has no body for ({given}), only for ({known}); register one")


class HyperMap:
    """Calls a function for the elements of tuples and lists of one structure, and returns tuples of its results.

    Args:
        ops: the function; None to give it as the first argument of each call (default: None)
        reverse: begin with the last element (default: False)

    Source: `mindspore.ops.HyperMap`.
    """

    nested = True

    def __init__(self, ops: Callable[..., Any] | None = None, reverse: bool = False) -> None:
        self.ops, self.reverse = ops, reverse

    def __call__(self, *args: Any) -> Any:
        """Map the function over sequences.

        Raises:
            ValueError: they differ in length
        """
        function, sequences = (args[0], args[1:]) if self.ops is None else (self.ops, args)
        return self._map(function, sequences)

    def _map(self, function: Callable[..., Any], sequences: Sequence[Any]) -> Any:
        if not any(map(_is_sequence, sequences)):
            return function(*sequences)
        lengths = {len(s) for s in sequences if _is_sequence(s)}
        if len(lengths) > 1 or not all(map(_is_sequence, sequences)):
            sizes = [len(s) if _is_sequence(s) else type(s).__name__ for s in sequences]
            raise ValueError(f"the arguments must be sequences of one length, got {sizes}; bind others with partial()")
        rows = list(zip(*sequences, strict=True))
        each = [
            self._map(function, row) if self.nested else function(*row) for row in (reversed(rows) if self.reverse else rows)
        ]
        return tuple(reversed(each) if self.reverse else each)


class Map(HyperMap):
    """A `HyperMap` that does not go into sequences within sequences."""

    nested = False


def add_flags(fn: Any = None, **flags: Any) -> Any:  # noqa: ARG001
    """Return the function as it is, or a decorator that does; flags are for MindSpore's compiler."""
    return fn if fn is not None else lambda function: function


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and not isinstance(value, NamedParameter)


def _no(_: Any) -> bool:
    return False
