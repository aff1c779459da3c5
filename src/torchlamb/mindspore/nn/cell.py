"""Networks and their named parameters. A Cell is a torch module; nothing here changes one."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from torchlamb.groups import is_normalisation

_NAMES = {"weight": "gamma", "bias": "beta"}  # of a normalisation layer, in MindSpore


class NamedParameter(NamedTuple):
    """A parameter and its name. torch's own `Tensor.name` cannot be set."""

    name: str
    parameter: Tensor


def trainable_params(module: nn.Module, recurse: bool = True) -> list[NamedParameter]:
    """Return the parameters of a module that require a gradient, with names.

    Names are those of `named_parameters`, but for normalisation layers, whose weight and bias are called gamma and beta, as in
    MindSpore: optimizers leave those out of weight decay by that name.

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
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    found: dict[int, NamedParameter] = {}
    for prefix, child in module.named_modules() if recurse else [("", module)]:
        renamed = _NAMES if is_normalisation(child) else {}
        for name, parameter in child.named_parameters(recurse=False):
            full_name = f"{prefix}.{renamed.get(name, name)}".lstrip(".")
            found.setdefault(id(parameter), NamedParameter(full_name, parameter))
    return [entry for entry in found.values() if entry.parameter.requires_grad]


class Cell(nn.Module):
    """A torch module that may be written with `construct` instead of `forward`.

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
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        own = {name: method for name, method in vars(cls).items() if name in ("construct", "forward")}
        if len(own) == 1:
            (method,) = own.values()
            setattr(cls, "construct", method)  # noqa: B010
            setattr(cls, "forward", method)  # noqa: B010

    def construct(self, *inputs: Any, **keywords: Any) -> Any:
        """Compute the outputs; another name for `forward`.

        Raises:
            NotImplementedError: the subclass defines neither
        """
        raise NotImplementedError(f"{type(self).__name__} must define construct or forward")

    forward = construct

    def trainable_params(self, recurse: bool = True) -> list[NamedParameter]:
        """Return the parameters that require a gradient, as the function `trainable_params` does."""
        return trainable_params(self, recurse)
