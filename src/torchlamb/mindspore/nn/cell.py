"""Networks and the names of their parameters. A Cell is a torch module; nothing here changes one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from torchlamb.groups import is_normalisation
from torchlamb.mindspore.common.parameter import NamedParameter
from torchlamb.mindspore.common.tensor import Tensor, plain, set_data
from torchlamb.mindspore.ops.gradients import GradOperation, remember_forwards

__all__ = ["Cell", "NamedParameter", "named_tensors", "trainable_params"]

# Of a normalisation layer, in MindSpore, where its running statistics are parameters that are not trained.
_NAMES = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
_STATISTICS = ("running_mean", "running_var")


def trainable_params(module: nn.Module, recurse: bool = True) -> list[NamedParameter]:
    """Return the parameters of a module that require a gradient, with names.

    Names are those of `named_parameters`, but for normalisation layers, whose weight and bias are called gamma and beta, as in
    MindSpore: optimizers leave those out of weight decay by that name. A `Cell` that was made with ``auto_prefix=False`` adds
    nothing to the names in its parts.

    Args:
        module: any torch module; it is not changed
        recurse: include the parameters of submodules; any value is read as true or false (default: True)

    Returns:
        In the order of `named_parameters`, tied parameters once, under their first name.

    Raises:
        TypeError: `module` is no torch module

    Example:
        >>> import torch
        >>> from torchlamb.mindspore.nn import trainable_params
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
        >>> [x.name for x in trainable_params(model)]
        ['0.weight', '0.bias', '1.gamma', '1.beta']
    """
    entries = named_tensors(module, recurse, statistics=False)
    return [entry for entry in entries if entry.parameter.requires_grad]


def named_tensors(module: nn.Module, recurse: bool = True, statistics: bool = True) -> list[NamedParameter]:
    """Return all parameters of a module with names, and the running statistics of its normalisation layers.

    Raises:
        TypeError: `module` is no torch module
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    found: dict[int, NamedParameter] = {}
    for prefix, child in _named_modules(module, recurse):
        renamed = _NAMES if is_normalisation(child) else {}
        own: list[tuple[str, Any]] = list(child.named_parameters(recurse=False))
        own += [(name, child._buffers[name]) for name in _STATISTICS if statistics and child._buffers.get(name) is not None]
        for name, parameter in own:
            given = getattr(parameter, "_name", None)  # of one that was made by hand
            entry = NamedParameter(f"{prefix}{given or renamed.get(name, name)}", parameter)
            entry.is_convolution = isinstance(child, _ConvNd)
            found.setdefault(id(parameter), entry)
    return list(found.values())


def _named_modules(module: nn.Module, recurse: bool) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and those in it once each, with the prefixes of their parameters' names."""
    seen: set[int] = set()

    def walk(prefix: str, renaming: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        renaming += module._renamed if isinstance(module, Cell) else ""
        yield f"{renaming}{prefix}", module
        for name, child in module.named_children() if recurse else ():
            is_shown = not isinstance(module, Cell) or module._auto_prefix
            yield from walk(f"{prefix}{name}." if is_shown else prefix, renaming, child)

    return walk("", "", module)


class Cell(nn.Module):
    """A torch module that may be written with `construct` instead of `forward`.

    A value that is assigned to a parameter is written into it. A `Tensor` that is assigned moves with the cell to its device.

    Args:
        auto_prefix: put the names of attributes before those of the parameters in them (default: True)
        flags: accepted, does nothing (default: None)

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> class Net(nn.Cell):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = torch.nn.Linear(4, 2)
        ...     def construct(self, x):
        ...         return self.fc(x)
        >>> net = Net()
        >>> net(torch.ones(3, 4)).shape
        torch.Size([3, 2])
        >>> [x.name for x in net.trainable_params()]
        ['fc.weight', 'fc.bias']

    Source: `mindspore.nn.Cell`.
    """

    _auto_prefix = True
    _renamed = ""

    def __init__(self, auto_prefix: bool = True, flags: Any = None) -> None:  # noqa: ARG002
        super().__init__()
        self._auto_prefix = bool(auto_prefix)

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        own = {name: method for name, method in vars(cls).items() if name in ("construct", "forward")}
        if len(own) == 1:
            (method,) = own.values()
            setattr(cls, "construct", method)  # noqa: B010
            setattr(cls, "forward", method)  # noqa: B010

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, NamedParameter):
            value = plain(value)
        own = self.__dict__.get("_parameters", {}).get(name)
        if own is not None and isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            set_data(own, value)
        elif type(value) is Tensor and "_buffers" in self.__dict__ and not hasattr(self, name):
            self.register_buffer(name, value, persistent=False)
        else:
            if isinstance(value, GradOperation) and not any(isinstance(v, GradOperation) for v in vars(self).values()):
                remember_forwards(self)
            super().__setattr__(name, value)

    def construct(self, *inputs: Any, **keywords: Any) -> Any:
        """Compute the outputs; another name for `forward`.

        Raises:
            NotImplementedError: the subclass defines neither
        """
        raise NotImplementedError(f"{type(self).__name__} must define construct or forward")

    forward = construct

    @property
    def cls_name(self) -> str:
        """The name of the class."""
        return type(self).__name__

    def trainable_params(self, recurse: bool = True) -> list[NamedParameter]:
        """Return the parameters that require a gradient, as the function `trainable_params` does."""
        return trainable_params(self, recurse)

    def untrainable_params(self, recurse: bool = True) -> list[NamedParameter]:
        """Return the parameters that require none, and the running statistics of normalisation layers."""
        return [entry for entry in named_tensors(self, recurse) if not entry.parameter.requires_grad]

    def get_parameters(self, expand: bool = True) -> Iterator[NamedParameter]:
        """Yield all parameters with names, and the running statistics of normalisation layers."""
        yield from named_tensors(self, expand)

    def parameters_and_names(self, name_prefix: str = "", expand: bool = True) -> Iterator[tuple[str, NamedParameter]]:
        """Yield the names of what `get_parameters` yields, and that."""
        for entry in named_tensors(self, expand):
            yield f"{name_prefix}.{entry.name}" if name_prefix else entry.name, entry

    def parameters_dict(self, recurse: bool = True) -> dict[str, NamedParameter]:
        """Return what `get_parameters` yields by name."""
        return {entry.name: entry for entry in named_tensors(self, recurse)}

    def update_parameters_name(self, prefix: str = "", recurse: bool = True) -> None:  # noqa: ARG002
        """Put a prefix before the names of all parameters."""
        self._renamed = prefix + self._renamed

    def cells(self) -> Iterator[nn.Module]:
        """Yield the modules that this one consists of."""
        return self.children()

    def cells_and_names(self, name_prefix: str = "") -> Any:
        """Yield all modules in this one with their names, and itself."""
        return self.named_modules(prefix=name_prefix)

    def name_cells(self) -> dict[str, nn.Module]:
        """Return the modules that this one consists of, by name."""
        return dict(self.named_children())

    def insert_child_to_cell(self, child_name: str, child_cell: nn.Module) -> None:
        """Add a module under a name."""
        self.add_module(child_name, child_cell)

    def insert_param_to_cell(self, param_name: str, param: Any, check_name_contain_dot: bool = True) -> None:  # noqa: ARG002
        """Add a parameter under a name."""
        self.register_parameter(param_name, plain(param))

    def set_train(self, mode: bool = True) -> Cell:
        """Put the cell and all modules in it in training or evaluation mode, and return it."""
        return self.train(bool(mode))

    def set_grad(self, requires_grad: bool = True) -> Cell:  # noqa: ARG002
        """Return itself; gradients are there whenever they are asked for."""
        return self

    def accept(self, *_: Any, **__: Any) -> Cell:
        """Return itself: what MindSpore's compiler is told by other names means nothing here."""
        return self

    add_flags = add_flags_recursive = set_comm_fusion = set_inputs = set_jit_config = set_broadcast_flag = accept
    to_float = recompute = init_parameters_data = check_names = set_boost = set_parallel_input_with_inputs = accept
