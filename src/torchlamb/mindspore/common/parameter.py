"""Parameters with names. Those of a module stay torch's own: a `NamedParameter` stands for one and is used as one."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from torchlamb.mindspore.common.initializer import initializer
from torchlamb.mindspore.common.tensor import Words, plain, set_data, wrap
from torchlamb.options import fail

__all__ = ["NamedParameter", "Parameter", "ParameterTuple"]


class _Pair(NamedTuple):
    name: str
    parameter: torch.Tensor


class NamedParameter(_Pair):
    """A parameter and its name, which stands for the parameter in torch's functions and in arithmetic.

    torch's own `Tensor.name` cannot be set. As a pair it is unpacked, indexed, compared and counted as a tuple.

    Args:
        name: of the parameter
        parameter: any tensor

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> weight = nn.trainable_params(torch.nn.Linear(2, 3))[0]
        >>> weight.name, weight.shape, weight.requires_grad
        ('weight', torch.Size([3, 2]), True)
        >>> torch.equal(weight * 2, weight.parameter * 2)
        True
    """

    # Whether it is the weight of a convolution; None where its module is not known.
    is_convolution: bool | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch function with the parameter itself."""
        return Words.__torch_function__(func, types, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling ask for is the tuple's affair
            raise AttributeError(name)
        parameter = self.parameter
        value = functools.partial(vars(Words)[name], parameter) if name in vars(Words) else getattr(parameter, name)
        if callable(value):
            return lambda *args, **kwargs: wrap(value(*plain(args), **plain(kwargs)))
        return wrap(value)

    @property
    def requires_grad(self) -> bool:
        """Whether the parameter is trained."""
        return self.parameter.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.parameter.requires_grad_(value)

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.parameter.numel()

    def set_data(self, data: Any, slice_shape: bool = False) -> NamedParameter:
        """Take over the values of a tensor of the same shape.

        Raises:
            ValueError: another shape
        """
        set_data(self.parameter, data, slice_shape)
        return self

    def clone(self, init: Any = "same") -> Parameter:
        """Return a new parameter of the same name, shape and dtype, with the same values or those of an initializer."""
        return _cloned(self, init, self.name)


def _operator(name: str) -> Any:
    def apply(self: NamedParameter, *others: Any) -> Any:
        return wrap(getattr(operator, name)(self.parameter, *plain(others)))

    return apply


def _reflected(name: str) -> Any:
    def apply(self: NamedParameter, other: Any) -> Any:
        return wrap(getattr(operator, name)(plain(other), self.parameter))

    return apply


for _op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    setattr(NamedParameter, f"__{_op}__", _operator(_op))
    setattr(NamedParameter, f"__r{_op}__", _reflected(_op))
for _op in ("neg", "abs"):
    setattr(NamedParameter, f"__{_op}__", _operator(_op))


class _ParameterType(type(nn.Parameter)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: object) -> bool:
        if cls is Parameter:
            return isinstance(instance, (nn.Parameter, NamedParameter))
        return super().__instancecheck__(instance)  # type: ignore[no-any-return]


class Parameter(Words, nn.Parameter, metaclass=_ParameterType):
    """A parameter made by hand, with MindSpore's words. In a `Cell` it is registered as torch's parameters are.

    A value that is assigned to it as an attribute of a `Cell`, and ``+=``, ``-=``, ``*=``, ``/=`` of it, are written into it.

    Args:
        default_input: a number, a list, an array or a tensor, which is copied
        name: in a cell, behind those of the cells around it; None for that of its attribute (default: None)
        requires_grad: whether it is trained; integers never are (default: True)
        layerwise_parallel: accepted, does nothing (default: False)
        parallel_optimizer: accepted, does nothing (default: True)

    Raises:
        TypeError: `name` is no string

    Example:
        >>> from torchlamb.mindspore import Parameter, Tensor
        >>> count = Parameter(Tensor([0]), name="count", requires_grad=False)
        >>> count += 1
        >>> count.name, count.asnumpy()
        ('count', array([1]))

    Source: `mindspore.Parameter`.
    """

    _name: str | None = None

    def __new__(
        cls,
        default_input: Any,
        name: str | None = None,
        requires_grad: bool = True,
        layerwise_parallel: bool = False,  # noqa: ARG004
        parallel_optimizer: bool = True,  # noqa: ARG004
    ) -> Any:
        """Return a new parameter."""
        if name is not None and not isinstance(name, str):
            raise fail(TypeError, "name", "a string or None", name)
        data = plain(default_input)
        data = data.detach().clone() if isinstance(data, torch.Tensor) else torch.tensor(data)
        data = data.as_subclass(torch.Tensor)
        trained = requires_grad and (data.is_floating_point() or data.is_complex())
        made = torch.Tensor._make_subclass(cls, data, trained)
        made._name = name
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @property
    def name(self) -> Any:
        """The name that was given, which stands for that of its attribute in a cell; "Parameter" if none was."""
        return self._name or "Parameter"

    @name.setter
    def name(self, value: str) -> None:
        self._name = value

    def clone(self, init: Any = "same") -> Any:  # type: ignore[override]
        """Return a new parameter of the same name, shape and dtype, with the same values or those of an initializer."""
        return _cloned(self, init, self.name)

    def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]
        return self.set_data(plain(self).detach() + plain(other))

    def __isub__(self, other: Any) -> Any:  # type: ignore[misc]
        return self.set_data(plain(self).detach() - plain(other))

    def __imul__(self, other: Any) -> Any:  # type: ignore[misc]
        return self.set_data(plain(self).detach() * plain(other))

    def __itruediv__(self, other: Any) -> Any:  # type: ignore[misc]
        return self.set_data(plain(self).detach() / plain(other))

    def __deepcopy__(self, memo: Any) -> Any:
        copied = Parameter(self, self._name, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain_parameter = nn.Parameter(self.detach().as_subclass(torch.Tensor), self.requires_grad)
        return plain_parameter.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class ParameterTuple(tuple[Any, ...]):
    """A tuple of parameters.

    Args:
        iterable: of parameters: `NamedParameter`, `Parameter` or torch's

    Raises:
        TypeError: an element of another type

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import ParameterTuple, nn
        >>> weights = ParameterTuple(nn.trainable_params(torch.nn.Linear(2, 3)))
        >>> [x.name for x in weights.clone(prefix="ema")]
        ['ema.weight', 'ema.bias']

    Source: `mindspore.ParameterTuple`.
    """

    __slots__ = ()

    def __new__(cls, iterable: Iterable[Any]) -> ParameterTuple:
        """Return a tuple of what is checked."""
        entries = list(iterable)
        for i, entry in enumerate(entries):
            if not isinstance(entry, (NamedParameter, torch.Tensor)):
                raise fail(TypeError, f"iterable[{i}]", "a parameter", type(entry))
        return super().__new__(cls, entries)

    def clone(self, prefix: str, init: Any = "same") -> ParameterTuple:
        """Return new parameters, with the same values or those of an initializer, whose names begin with the prefix."""
        names = [getattr(entry, "name", None) or f"parameters[{i}]" for i, entry in enumerate(self)]
        return ParameterTuple(_cloned(entry, init, f"{prefix}.{name}") for entry, name in zip(self, names, strict=True))

    def __deepcopy__(self, memo: Any) -> ParameterTuple:
        return ParameterTuple(copy.deepcopy(entry, memo) for entry in self)

    def __reduce__(self) -> Any:
        return ParameterTuple, (list(self),)


def _cloned(entry: Any, init: Any, name: str) -> Parameter:
    source = plain(entry).detach()
    data = source.clone() if isinstance(init, str) and init == "same" else initializer(init, source.shape, source.dtype)
    return Parameter(plain(data).to(source.device), name, plain(entry).requires_grad)
