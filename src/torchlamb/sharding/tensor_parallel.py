"""Plain tensors that are parts of larger ones, one on each process of a group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torchlamb.sharding.layout import Layout, tell
from torchlamb.sharding.place import Place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def tell_of_tensor_parallel(model: nn.Module, group: ProcessGroup, params: Iterable[Tensor] | None) -> None:
    """Tell which parameters are parts, as `torchlamb.shard.tensor_parallel` says."""
    known = {id(p) for p in model.parameters()}
    if params is None:
        params = [p for p in model.parameters() if getattr(p, "tensor_model_parallel", False) is True]
    params = list(params)
    for i, p in enumerate(params):
        if id(p) not in known:
            raise ValueError(f"params must be parameters of the model, and number {i}, of shape {tuple(p.shape)}, is not")
    ranks = frozenset(torch.distributed.get_process_group_ranks(group))
    groups = (group,) if group.size() > 1 else ()
    tell(model, {p: Layout((), groups, _place(p, group), p.device.type, ranks) for p in params})


def _place(param: Tensor, group: ProcessGroup) -> Place | None:
    """Return where the part lies in the whole, as far as Megatron's marks say it."""
    dim, stride = getattr(param, "partition_dim", -1), getattr(param, "partition_stride", 1)
    if not 0 <= dim < param.dim() or stride != 1:
        return None
    shape, starts = list(param.shape), [0] * param.dim()
    shape[dim] *= group.size()
    starts[dim] = group.rank() * param.shape[dim]
    return Place(tuple(shape), tuple(starts))
