"""Tensors with MindSpore's words: what is made by `Tensor(...)`, and what the front hands to a user's own code.

A `Tensor` is a torch tensor with some methods more; results of torch's functions of one are such again. Whatever leaves the
front for the optimizer, a file or a pickle is made `plain` first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.overrides

from torchlamb.mindspore.common.dtype import pytype_to_dtype

__all__ = ["Tensor", "plain", "wrap"]

# Gradients and base tensors are handed out as they are, as torch does.
_AS_THEY_ARE = torch.overrides.get_default_nowrap_functions()


def wrap(value: Any) -> Any:
    """Return plain torch tensors, alone or in tuples, lists and dicts, as `Tensor`; anything else as it is."""
    if type(value) is torch.Tensor:
        return value.as_subclass(Tensor)
    return _mapped(wrap, value)


def plain(value: Any) -> Any:
    """Return front tensors and parameters, alone or in tuples, lists and dicts, as torch's; anything else as it is."""
    if isinstance(value, Words):
        return value if isinstance(value, torch.nn.Parameter) else value.as_subclass(torch.Tensor)
    if hasattr(type(value), "__torch_function__") and isinstance(value, tuple):
        return value.parameter  # type: ignore[attr-defined]  # of a NamedParameter, which this module must not know
    return _mapped(plain, value)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value if hasattr(type(value), "__torch_function__") else type(value)(*map(function, value))
    if isinstance(value, (tuple, list)):  # and torch's own kinds of tuple, whose constructor takes an iterable too
        return type(value)(function(x) for x in value)
    if type(value) is dict:
        return {key: function(x) for key, x in value.items()}
    return value


class Words(torch.Tensor):
    """What MindSpore's tensors and parameters can beside what torch's can."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch function, and return tensors with these words."""
        args, kwargs = _without_names(args), _without_names(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return result if func in _AS_THEY_ARE else wrap(result)

    def asnumpy(self) -> Any:
        """Return the values as a NumPy array on the CPU; of bfloat16, which NumPy does not know, as float32."""
        values = plain(self).detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()

    def astype(self, dtype: Any, copy: bool = True) -> Any:  # noqa: ARG002
        """Return the values in another dtype."""
        return self.to(pytype_to_dtype(dtype))

    def expand_dims(self, axis: int) -> Any:
        """Return it with one more dim of size 1."""
        return self.unsqueeze(axis)

    def value(self) -> Any:
        """Return the values as they are now."""
        return wrap(plain(self).detach().clone())

    def copy(self) -> Any:
        """Return a copy."""
        return self.clone()

    def set_data(self, data: Any, slice_shape: bool = False) -> Any:
        """Take over the values of a tensor of the same shape, or with `slice_shape` of any.

        Raises:
            ValueError: another shape
        """
        return set_data(self, data, slice_shape)

    assign_value = set_data

    def init_data(self, *_: Any, **__: Any) -> Any:
        """Return itself; values are there from the start."""
        return self

    # In place torch refuses to add a float to an int tensor, and to change what is trained.
    def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]
        return self + other

    def __isub__(self, other: Any) -> Any:  # type: ignore[misc]
        return self - other

    def __imul__(self, other: Any) -> Any:  # type: ignore[misc]
        return self * other

    def __itruediv__(self, other: Any) -> Any:  # type: ignore[misc]
        return self / other

    def __deepcopy__(self, memo: Any) -> Any:
        copied = plain(self).detach().clone().as_subclass(type(self)).requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain_tensor = self.detach().as_subclass(torch.Tensor)  # files hold no class of this front
        return plain_tensor.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class _TensorType(type(torch.Tensor)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: object) -> bool:
        if cls is Tensor:  # parameters, and any torch tensor, as those that a DataLoader yields
            return hasattr(type(instance), "__torch_function__")
        return super().__instancecheck__(instance)  # type: ignore[no-any-return]


class Tensor(Words, metaclass=_TensorType):
    """A torch tensor with MindSpore's words `asnumpy`, `astype`, `expand_dims`, `value`, `set_data` and `copy`.

    All other methods and attributes are torch's, `size` among them. Any torch tensor is an instance of this class for
    `isinstance`.

    Args:
        input_data: a number, a list or tuple of them, an array, a tensor or a parameter, which is copied (default: None)
        dtype: of the result; None for that of the data, float32 for Python floats (default: None)
        shape: of a tensor that `init` fills (default: None)
        init: an object of `common.initializer`, if there is no data (default: None)

    Raises:
        TypeError, ValueError: as `torch.tensor` does

    Example:
        >>> import torchlamb.mindspore as mindspore
        >>> mindspore.Tensor([1, 2], mindspore.float32).asnumpy()
        array([1., 2.], dtype=float32)

    Source: `mindspore.Tensor`.
    """

    def __new__(cls, input_data: Any = None, dtype: Any = None, shape: Any = None, init: Any = None) -> Any:
        """Return a new tensor."""
        if init is not None:
            return init.fill(torch.empty(tuple(shape), dtype=dtype or torch.float32)).as_subclass(cls)
        data = plain(input_data)
        if isinstance(data, torch.Tensor):
            made = data.detach().clone().to(dtype)
        else:
            made = torch.tensor(data, dtype=None if dtype is None else dtype)
        return made.as_subclass(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def set_data(tensor: Any, data: Any, slice_shape: bool = False) -> Any:
    """Write the values of `data` into a torch tensor, in its own dtype, and return the tensor.

    Raises:
        ValueError: `data` has another shape, and is no single number
    """
    values = plain(data)
    values = values.detach() if isinstance(values, torch.Tensor) else torch.as_tensor(values)
    if values.shape != tensor.shape and not (values.numel() == tensor.numel() == 1) and not slice_shape:
        raise ValueError(f"data must have shape {tuple(tensor.shape)}, got {tuple(values.shape)}; give values of that shape")
    own = plain(tensor)
    with torch.no_grad():
        if slice_shape and values.shape != tensor.shape:
            own.data = values.to(own)
        else:
            own.copy_(values.reshape(own.shape))
    return tensor


def _without_names(value: Any) -> Any:
    """Return arguments with the tensors of NamedParameters, which torch functions take for tuples."""
    if isinstance(value, tuple) and hasattr(type(value), "__torch_function__"):
        return value.parameter  # type: ignore[attr-defined]
    if type(value) in (tuple, list):
        return type(value)(map(_without_names, value))
    if type(value) is dict:
        return {key: _without_names(x) for key, x in value.items()}
    return value
