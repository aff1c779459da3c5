"""Gradients as values: of a cell or function, with respect to its inputs, to parameters, or to both.

Parameters that the outputs do not use get gradients of zeros, as in MindSpore. A training cell calls its network first and asks
for the gradients of the same call then: what the network returned within the cell is remembered, so that it runs once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from torchlamb.mindspore.common.tensor import plain, wrap
from torchlamb.options import fail, flag

__all__ = ["GradOperation", "grad", "remember_forwards", "value_and_grad"]


class GradOperation:
    """Makes a function that returns gradients of another one, or of a cell.

    Args:
        get_all: with respect to all inputs, not only the first (default: False)
        get_by_list: with respect to the parameters that are given beside the function (default: False)
        sens_param: the last argument of the new function multiplies the outputs, in their shape or as one number (default:
            False)

    Raises:
        TypeError: an argument that is no bool

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn, ops
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> gradients = ops.GradOperation(get_by_list=True)(net, nn.trainable_params(net))(torch.tensor([[1.0, 2.0]]))
        >>> [gradient.tolist() for gradient in gradients]
        [[[1.0, 2.0]]]

    Source: `mindspore.ops.GradOperation`.
    """

    def __init__(self, get_all: bool = False, get_by_list: bool = False, sens_param: bool = False) -> None:
        self.get_all = flag("get_all", get_all)
        self.get_by_list = flag("get_by_list", get_by_list)
        self.sens_param = flag("sens_param", sens_param)

    def __call__(self, fn: Callable[..., Any], weights: Any = None) -> Callable[..., Any]:
        """Return a function of the arguments of `fn` that returns the gradients."""
        if self.get_by_list and weights is None:
            weights = [p for p in fn.parameters() if p.requires_grad] if isinstance(fn, nn.Module) else ()

        def gradients(*given: Any, **keywords: Any) -> Any:
            inputs, sens = (given[:-1], given[-1]) if self.sens_param else (given, None)
            positions = range(len(inputs)) if self.get_all else () if self.get_by_list else (0,)
            _, of_inputs, of_weights = _differentiate(fn, inputs, keywords, positions, _listed(weights), sens)
            if self.get_by_list:
                return (of_inputs, of_weights) if self.get_all else of_weights
            return of_inputs if self.get_all else of_inputs[0]

        return gradients


def value_and_grad(
    fn: Callable[..., Any], grad_position: Any = 0, weights: Any = None, has_aux: bool = False, return_ids: bool = False
) -> Callable[..., Any]:
    """Return a function that returns what `fn` returns, and its gradients.

    Args:
        fn: a cell or function of tensors; its output is differentiated, of several with `has_aux` the first, else their sum
        grad_position: the position of the input, or a tuple of positions of inputs, with respect to which; None for no input
            (default: 0)
        weights: parameters with respect to which: a tuple or list, or one; None for none (default: None)
        has_aux: what `fn` returns after the first output is passed on only (default: False)
        return_ids: only False (default: False)

    Returns:
        A function that returns (outputs, gradients). The gradients are those of the inputs, a tensor or a tuple as
        `grad_position`, or those of the weights, or a tuple of both.

    Raises:
        ValueError: neither inputs nor weights are given; or `return_ids`

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn, ops
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> step = ops.value_and_grad(lambda x: net(x).sum(), None, nn.trainable_params(net))
        >>> loss, gradients = step(torch.tensor([[1.0, 2.0]]))
        >>> gradients[0].asnumpy()
        array([[1., 2.]], dtype=float32)

    Source: `mindspore.value_and_grad`.
    """
    if grad_position is None and weights is None:
        raise ValueError("grad_position or weights must be given, got None for both")
    if return_ids:
        raise ValueError("return_ids must be False, got True; the order of gradients is that of grad_position and weights")
    positions = () if grad_position is None else (grad_position,) if isinstance(grad_position, int) else tuple(grad_position)
    alone = _is_one(weights)

    def differentiate(*inputs: Any, **keywords: Any) -> Any:
        outputs, of_inputs, of_weights = _differentiate(fn, inputs, keywords, positions, _listed(weights), None, has_aux)
        for_inputs = of_inputs[0] if isinstance(grad_position, int) else of_inputs
        for_weights = of_weights[0] if alone else of_weights
        gradients = for_inputs if weights is None else for_weights if grad_position is None else (for_inputs, for_weights)
        return wrap(_detached(outputs)), gradients

    return differentiate


def grad(
    fn: Callable[..., Any], grad_position: Any = 0, weights: Any = None, has_aux: bool = False, return_ids: bool = False
) -> Callable[..., Any]:
    """Return a function that returns the gradients of `fn`, and with `has_aux` its further outputs after them.

    The arguments are those of `value_and_grad`.

    Raises:
        ValueError: as `value_and_grad` does
    """
    differentiate = value_and_grad(fn, grad_position, weights, has_aux, return_ids)

    def gradients(*inputs: Any, **keywords: Any) -> Any:
        outputs, found = differentiate(*inputs, **keywords)
        return (found, outputs[1:]) if has_aux else found

    return gradients


def _differentiate(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    keywords: dict[str, Any],
    positions: Sequence[int],
    weights: Sequence[torch.Tensor],
    sens: Any,
    has_aux: bool = False,
) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """Return outputs and the gradients with respect to inputs at positions and to weights."""
    arguments, leaves = list(inputs), []
    for i in positions:
        if not 0 <= i < len(arguments):
            raise ValueError(f"grad_position {i} must be that of one of {len(arguments)} inputs")
        leaf = plain(arguments[i]).detach()
        leaves.append(leaf.requires_grad_() if leaf.is_floating_point() else leaf)
        arguments[i] = wrap(leaf)
    with torch.enable_grad():
        remembered = None if positions else _recall(fn, inputs, keywords)
        outputs = fn(*arguments, **keywords) if remembered is None else remembered[0]
    heads = _heads(outputs, has_aux)
    targets = [*leaves, *weights]
    found = iter(_gradients(heads, [t for t in targets if t.requires_grad], sens))
    every = tuple(wrap(next(found) if t.requires_grad else torch.zeros_like(t)) for t in targets)
    return outputs, every[: len(positions)], every[len(positions) :]


def _gradients(heads: list[torch.Tensor], targets: list[torch.Tensor], sens: Any) -> Sequence[torch.Tensor]:
    factors = (
        list(sens) if isinstance(sens, (tuple, list)) and not hasattr(type(sens), "__torch_function__") else [sens] * len(heads)
    )
    pairs = [(head, _factor(head, factor)) for head, factor in zip(heads, factors, strict=True) if head.requires_grad]
    if not pairs or not targets:
        return [torch.zeros_like(t) for t in targets]
    ends, starts = zip(*pairs, strict=True)
    return torch.autograd.grad(ends, targets, starts, allow_unused=True, materialize_grads=True)


def _factor(head: torch.Tensor, sens: Any) -> torch.Tensor:
    if sens is None:
        return torch.ones_like(head)
    factor = torch.as_tensor(plain(sens), device=head.device).detach().to(head.dtype)
    return factor.reshape(()).expand_as(head) if factor.numel() == 1 else factor


def _heads(outputs: Any, has_aux: bool) -> list[torch.Tensor]:
    several = isinstance(outputs, (tuple, list))
    heads = [plain(x) for x in (outputs[:1] if has_aux else outputs)] if several else [plain(outputs)]
    heads = [x for x in heads if isinstance(x, torch.Tensor)]
    if not heads:
        raise fail(TypeError, "what fn returns", "a tensor, or a tuple that begins with one", type(outputs))
    return heads


def _detached(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_detached, value))
    return plain(value).detach() if isinstance(plain(value), torch.Tensor) else value


def _is_one(weights: Any) -> bool:
    return isinstance(weights, torch.Tensor) or hasattr(type(weights), "__torch_function__")


def _listed(weights: Any) -> list[torch.Tensor]:
    return [] if weights is None else [plain(weights)] if _is_one(weights) else [plain(w) for w in weights]


# What a cell that has a GradOperation has called: (module, inputs, keywords, outputs), for each such cell that runs.
_running: list[tuple[weakref.ref[nn.Module], list[tuple[Any, Any, Any, Any]], list[Any]]] = []


def remember_forwards(cell: nn.Module) -> None:
    """Let a cell remember, while it runs, what the modules that it consists of have returned."""
    cell.register_forward_pre_hook(_begin)
    cell.register_forward_hook(_end, always_call=True)


def _begin(cell: nn.Module, _: Any) -> None:
    calls: list[tuple[Any, Any, Any, Any]] = []

    def record(module: nn.Module, inputs: Any, keywords: Any, outputs: Any) -> None:
        calls.append((module, inputs, keywords, outputs))

    handles = [child.register_forward_hook(record, with_kwargs=True) for child in cell.children()]
    _running.append((weakref.ref(cell), calls, handles))


def _end(cell: nn.Module, _: Any, __: Any) -> None:
    while _running:
        owner, _calls, handles = _running.pop()
        for handle in handles:
            handle.remove()
        if owner() is cell:
            break


def _recall(fn: Any, inputs: Sequence[Any], keywords: dict[str, Any]) -> tuple[Any] | None:
    """Return, in a tuple, what the cell that runs has got from the same call; once, as its graph is used up then."""
    if not _running:
        return None
    calls = _running[-1][1]
    for i, (module, given, given_keywords, outputs) in enumerate(calls):
        same = len(given) == len(inputs) and all(_same(x, y) for x, y in zip(given, inputs, strict=True))
        same = same and given_keywords.keys() == keywords.keys()
        if module is fn and same and all(_same(given_keywords[name], value) for name, value in keywords.items()):
            del calls[i]
            return (outputs,)
    return None


def _same(x: Any, y: Any) -> bool:
    return x is y or (not isinstance(x, torch.Tensor) and not isinstance(y, torch.Tensor) and type(x) is type(y) and x == y)
