"""Where layers lie in the flat parameters of FullyShardedDataParallel, and whether they do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchlamb.sharding.layout import Layout, on_any, same, tell
from torchlamb.sharding.place import Place

# It has no public names for where things lie; these are of torch 2.13.
TESTED = "torch 2.13"


def tell_of_fsdp1(model: nn.Module) -> None:
    """Tell how the parameters of a model lie, as `torchlamb.shard.fsdp1` says."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel.fsdp_modules(model)
    if not wrapped:
        raise ValueError(f"model must be wrapped in FullyShardedDataParallel, got {type(model).__name__} with no such module")
    told: list[tuple[Any, dict[Tensor, Layout]]] = []
    wrong: list[str] = []
    names = {module: name.replace("_fsdp_wrapped_module.", "") for name, module in model.named_modules()}
    for module in wrapped:  # the outermost first, which makes itself the root if it has no parameters of its own, too
        handle = module._handle
        try:
            with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=False):
                misplaced = [] if handle is None else list(_misplaced(handle, names))
            if handle is None:
                continue
            told.append((module, dict(_layouts(handle, _replicas(module)))))
        except AttributeError as error:
            raise NotImplementedError(
                f"torch {torch.__version__} keeps FSDP1's flat parameters in another way ({error}); it was tested with {TESTED}"
            ) from error
        wrong += on_any(misplaced, (handle.process_group, _replicas(module)), handle.device)
    if wrong:
        raise RuntimeError(
            f"flat parameters do not hold the weights where FSDP1 says, on this or another process: {', '.join(wrong)}; it was "
            f"tested with {TESTED}"
        )
    for module, layouts in told:
        tell(module, nn.Module.parameters, layouts)


def _replicas(module: Any) -> Any:
    """Return the process group of those that hold the same shards, with HYBRID_SHARD; None where there is none."""
    return getattr(module, "_inter_node_pg", None)


def _layouts(handle: Any, replicas: Any) -> Iterator[tuple[Tensor, Layout]]:
    """Yield the tensors that optimizers are given of one flat parameter, and how they lie."""
    flat, group = handle.flat_param, handle.process_group
    is_cut = handle.uses_sharded_strategy and group.size() > 1
    ranks = [torch.distributed.get_process_group_ranks(group)]
    if replicas is not None:
        own, ranks = ranks[0], [[]] * replicas.size()
        torch.distributed.all_gather_object(ranks, own, group=replicas)
    common: dict[str, Any] = {
        "groups": (group,) if is_cut else (),
        "device_type": torch.device(handle.device).type,
        "ranks": frozenset(itertools.chain(*ranks)),
    }
    infos = flat._shard_param_infos
    if flat._params is not None:  # use_orig_params=True
        for param, info, shape in zip(flat._params, infos, flat._shapes, strict=True):
            start = info.intra_param_start_idx if info.in_shard else 0
            yield param, Layout(place=Place((shape.numel(),), (start,)) if is_cut else None, **common)
        return
    if is_cut:
        parts = [(info.offset_in_shard, info.numel_in_shard) if info.in_shard else (0, 0) for info in infos]
    else:
        parts = [(start, shape.numel()) for start, shape in zip(_starts(flat), flat._shapes, strict=True)]
    size = flat._sharded_size.numel() if is_cut else flat.numel()
    first = group.rank() * size if is_cut else 0
    place = Place((size * (group.size() if is_cut else 1),), (first,))
    yield flat, Layout(parts=tuple(parts), place=place, **common)


def _starts(flat: Any) -> list[int]:
    """Return where each parameter begins in the whole flat one, which has padding between them."""
    sizes = flat._numels_with_padding
    starts = itertools.accumulate(sizes, initial=0)
    return [start for start, is_padding in zip(starts, flat._is_padding_mask, strict=False) if not is_padding]


def _misplaced(handle: Any, names: Mapping[Any, str]) -> Iterator[str]:
    """Yield the names of parameters, which are gathered now, of which the local shard does not hold what it should.

    Args:
        handle: of one flat parameter
        names: of all modules
    """
    flat = handle.flat_param
    shard = flat._local_shard.detach().flatten()
    for (name, owner, _), info, shape in zip(flat._param_infos, flat._shard_param_infos, flat._shapes, strict=True):
        if getattr(getattr(owner, name), "tensor_model_parallel", False) is True:
            raise NotImplementedError(
                f"{names.get(owner, '')}.{name} is a part of a larger tensor before FSDP1 cuts it (tensor_model_parallel); its "
                "norm would have to be added over two process groups"
            )
        if not info.in_shard:
            continue
        weight = getattr(owner, name).detach()
        wanted = weight.flatten()[info.intra_param_start_idx : info.intra_param_end_idx + 1]
        here = shard[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]
        if weight.shape != shape or not same(wanted.to(here.device, here.dtype), here):
            yield f"{names.get(owner, '')}.{name}".lstrip(".")
