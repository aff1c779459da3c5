"""Values to begin with."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from torchlamb.mindspore.common.tensor import plain, wrap
from torchlamb.options import fail

__all__ = [
    "Constant",
    "HeNormal",
    "HeUniform",
    "Initializer",
    "Normal",
    "One",
    "TruncatedNormal",
    "Uniform",
    "XavierUniform",
    "Zero",
    "initializer",
]


class Initializer:
    """Fills a tensor. Subclasses define `fill`, which returns the tensor."""

    def fill(self, tensor: torch.Tensor) -> torch.Tensor:
        """Write values into a tensor and return it.

        Raises:
            NotImplementedError: the subclass does not define it
        """
        raise NotImplementedError(f"{type(self).__name__} must define fill(tensor)")


class Constant(Initializer):
    """One number everywhere."""

    def __init__(self, value: float) -> None:
        self.value = value

    def fill(self, tensor: torch.Tensor) -> torch.Tensor:
        """Write the number everywhere."""
        return tensor.fill_(self.value)


class Zero(Constant):
    """0 everywhere."""

    def __init__(self) -> None:
        super().__init__(0)


class One(Constant):
    """1 everywhere."""

    def __init__(self) -> None:
        super().__init__(1)


class _Random(Initializer):
    def __init__(self, fill: Callable[[torch.Tensor], Any]) -> None:
        self._fill = fill

    def fill(self, tensor: torch.Tensor) -> torch.Tensor:
        """Write random values of torch's generator."""
        with torch.no_grad():
            self._fill(tensor)
        return tensor


class Normal(_Random):
    """Normally distributed values of a deviation and a mean."""

    def __init__(self, sigma: float = 0.01, mean: float = 0.0) -> None:
        super().__init__(lambda tensor: tensor.normal_(mean, sigma))


class TruncatedNormal(_Random):
    """Normally distributed values of mean 0, cut off at -2 and 2."""

    def __init__(self, sigma: float = 0.01, mean: float = 0.0, a: float = -2.0, b: float = 2.0) -> None:
        super().__init__(lambda tensor: torch.nn.init.trunc_normal_(tensor, mean, sigma, a * sigma, b * sigma))


class Uniform(_Random):
    """Values between -scale and scale."""

    def __init__(self, scale: float = 0.07) -> None:
        super().__init__(lambda tensor: tensor.uniform_(-scale, scale))


class XavierUniform(_Random):
    """As torch's `xavier_uniform_`."""

    def __init__(self, gain: float = 1) -> None:
        super().__init__(lambda tensor: torch.nn.init.xavier_uniform_(tensor, gain))


class HeNormal(_Random):
    """As torch's `kaiming_normal_`."""

    def __init__(self, negative_slope: float = 0, mode: Any = "fan_in", nonlinearity: Any = "leaky_relu") -> None:
        super().__init__(lambda tensor: torch.nn.init.kaiming_normal_(tensor, negative_slope, mode, nonlinearity))


class HeUniform(_Random):
    """As torch's `kaiming_uniform_`."""

    def __init__(self, negative_slope: float = 0, mode: Any = "fan_in", nonlinearity: Any = "leaky_relu") -> None:
        super().__init__(lambda tensor: torch.nn.init.kaiming_uniform_(tensor, negative_slope, mode, nonlinearity))


_BY_NAME: dict[str, Callable[[], Initializer]] = {
    "zeros": Zero,
    "zero": Zero,
    "ones": One,
    "one": One,
    "normal": Normal,
    "truncatednormal": TruncatedNormal,
    "uniform": Uniform,
    "xavier_uniform": XavierUniform,
    "he_normal": HeNormal,
    "he_uniform": HeUniform,
}


def initializer(init: Any, shape: Any = None, dtype: Any = torch.float32) -> Any:
    """Return a new tensor with the values of an initializer.

    Args:
        init: an `Initializer`, its name such as "zeros" or "normal", a number, or a tensor of the shape
        shape: a sequence of ints, or one int; of a tensor, None for its own
        dtype: of the result

    Raises:
        TypeError: `init` of another type
        ValueError: another name, or a tensor of another shape
    """
    if isinstance(plain(init), torch.Tensor):
        values = plain(init).detach().clone().to(dtype)
        if shape is not None and tuple(values.shape) != _sizes(shape):
            raise fail(ValueError, "init", f"a tensor of shape {_sizes(shape)}", tuple(values.shape))
        return wrap(values)
    if isinstance(init, str):
        if init.lower() not in _BY_NAME:
            raise fail(ValueError, "init", f"one of {', '.join(map(repr, _BY_NAME))}", init)
        init = _BY_NAME[init.lower()]()
    elif isinstance(init, Real):
        init = Constant(float(init))
    if not hasattr(init, "fill"):
        raise fail(TypeError, "init", "an Initializer, its name, a number or a tensor", init)
    return wrap(init.fill(torch.empty(_sizes(shape), dtype=dtype)))


def _sizes(shape: Any) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)
