"""Plain tensors that are parts of larger ones, one on each process of a group."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from torchlamb.sharding.layout import Layout, tell
from torchlamb.sharding.place import Place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def tell_of_tensor_parallel(holder: nn.Module | Optimizer, group: ProcessGroup, params: Iterable[Tensor] | None) -> None:
    """Tell which parameters are parts, as `torchlamb.shard.tensor_parallel` says."""
    # What holds them directly: a list that was made for this call alone is gone after it.
    if isinstance(holder, Optimizer):
        owners: list[tuple[Any, Callable[[Any], Iterable[Tensor]]]] = [(holder, _stepped)]
    else:
        owners = [(module, _registered) for module in holder.modules()]
    held = {id(p): p for owner, tensors in owners for p in tensors(owner)}
    if params is None:
        params = [p for p in held.values() if getattr(p, "tensor_model_parallel", False) is True]
    params = list(params)
    for i, p in enumerate(params):
        if id(p) not in held:
            raise ValueError(f"params must be parameters of the model, and number {i}, of shape {tuple(p.shape)}, is not")
    ranks = frozenset(torch.distributed.get_process_group_ranks(group))
    groups = (group,) if group.size() > 1 else ()
    layouts = {id(p): Layout((), groups, _place(p, group), p.device.type, ranks) for p in params}
    for owner, tensors in owners:
        found = {p: layouts[id(p)] for p in tensors(owner) if id(p) in layouts}
        if found:
            tell(owner, tensors, found)


def _registered(module: nn.Module) -> Iterable[Tensor]:
    return module.parameters(recurse=False)


def _stepped(optimizer: Optimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _place(param: Tensor, group: ProcessGroup) -> Place | None:
    """Return where the part lies in the whole, as far as Megatron's marks say it."""
    dim, stride = getattr(param, "partition_dim", -1), getattr(param, "partition_stride", 1)
    if not 0 <= dim < param.dim() or stride != 1:
        return None
    shape, starts = list(param.shape), [0] * param.dim()
    shape[dim] *= group.size()
    starts[dim] = group.rank() * param.shape[dim]
    return Place(tuple(shape), tuple(starts))
