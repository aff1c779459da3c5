"""Where layers lie in DeepSpeed's flat partitions, and whether they do."""

from __future__ import annotations

import importlib
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlamb.sharding.layout import Layout, on_any, same, tell
from torchlamb.sharding.place import Place
from torchlamb.sharding.refused import NO_GUARD

# It has no public names for where things lie; these are of that version.
TESTED = "0.19.8"

# Of one partition: the flat tensor, the process group it is cut over, the parameters, where each lies in it, and what the model
# has of each there.
Partition = tuple[Tensor, Any, Sequence[Any], Sequence[tuple[int, int]], Sequence[Tensor]]


def tell_of_deepspeed(engine: Any) -> None:
    """Tell how the partitions of an engine lie, as `torchlamb.shard.deepspeed` says."""
    wrapper = getattr(engine, "optimizer", None)
    if wrapper is None or not hasattr(engine, "basic_optimizer"):
        raise TypeError(f"engine must be what deepspeed.initialize returns first, got {type(engine).__name__}")
    version = getattr(importlib.import_module("deepspeed"), "__version__", "of an unknown version")
    kind = f"{type(wrapper).__module__}.{type(wrapper).__name__}"
    if wrapper is engine.basic_optimizer or kind == _UNFUSED:
        return  # parameters are whole
    partitions, flats = _KINDS.get(kind, (None, ""))
    if partitions is None:
        name = type(wrapper).__name__
        raise NotImplementedError(f"{name} cuts parameters in a way that is not known; use ZeRO stage 1, 2 or 3 as they are")
    groups = engine.basic_optimizer.param_groups
    if any(group.get("max_grad_norm") is not None or group.get("skip_nonfinite") for group in groups):
        raise NotImplementedError(NO_GUARD)
    if _tensor_parallel_size(engine) > 1:
        raise NotImplementedError("with tensor parallelism beneath ZeRO, norms would have to be added over two process groups")
    layouts: dict[Tensor, Layout] = {}
    wrong: list[str] = []
    try:
        for number, (flat, group, params, parts, weights) in enumerate(partitions(wrapper)):
            layouts[flat] = _layout(number, flat, group, parts)
            for param, (start, length), weight in zip(params, parts, weights, strict=True):
                here = flat.detach().flatten()[start : start + length]
                if not same(here.to(weight.device, weight.dtype), weight):
                    shape = tuple(getattr(param, "ds_shape", param.shape))
                    wrong.append(engine.param_names.get(param, f"one of shape {shape}"))
    except AttributeError as error:
        raise NotImplementedError(
            f"DeepSpeed {version} keeps its partitions in another way ({error}); it was tested with {TESTED}"
        ) from error
    for layout in layouts.values():
        wrong = on_any(wrong, layout.groups, layout.device_type)
    if wrong:
        raise RuntimeError(
            f"partitions do not hold the weights where DeepSpeed {version} says: {', '.join(wrong)}; call "
            f"torchlamb.shard.deepspeed(engine) between steps; it was tested with {TESTED}"
        )
    tell(wrapper, operator.attrgetter(flats), layouts)


def _tensor_parallel_size(engine: Any) -> int:
    """Return over how many processes parameters are cut before ZeRO cuts them; stages of a pipeline do not count."""
    if engine.mpu is None:
        return int(getattr(engine, "mp_world_size", 1))
    return int(importlib.import_module("deepspeed.utils.bwc").bwc_tensor_model_parallel_world_size(engine.mpu))


def _layout(number: int, flat: Tensor, group: Any, parts: Sequence[tuple[int, int]]) -> Layout:
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    return Layout(
        parts=tuple(parts),
        groups=(group,) if size > 1 else (),
        place=Place((size * flat.numel(),), (rank * flat.numel(),)),
        device_type=torch.device(accelerator.device_name()).type,
        ranks=frozenset() if group is None else frozenset(torch.distributed.get_process_group_ranks(group)),
        number=number,
    )


def _within(start: int, length: int, first: int, size: int) -> tuple[int, int]:
    """Return where a parameter that begins at `start` lies in a partition that has `size` elements from `first` on."""
    begin, end = max(start, first), min(start + length, first + size)
    return (begin - first, end - begin) if end > begin else (0, 0)


def _stages_1_and_2(zero: Any) -> Iterator[Partition]:
    columns = zip(
        zero.single_partition_of_fp32_groups,
        zero.real_dp_process_group,
        zero.round_robin_bit16_groups,  # in the order in which they lie, which round_robin_gradients changes
        zero.round_robin_bit16_offsets,
        strict=True,
    )
    for flat, group, params, starts in columns:
        yield _of_whole_weights(flat, group, params, starts)


def _bf16(zero: Any) -> Iterator[Partition]:
    for flat, group, params in zip(zero.fp32_groups_flat_partition, zero.real_dp_process_group, zero.bf16_groups, strict=True):
        yield _of_whole_weights(flat, group, params, _one_after_the_other(params))


def _one_after_the_other(params: Sequence[Tensor]) -> list[int]:
    """Return where each parameter begins, without padding between them."""
    return list(itertools.accumulate((p.numel() for p in params[:-1]), initial=0))


def _of_whole_weights(flat: Tensor, group: Any, params: Sequence[Tensor], starts: Sequence[int]) -> Partition:
    """Return a partition of parameters that each process has whole: they lie one after the other, from these starts on."""
    size, first = flat.numel(), flat.numel() * group.rank()
    parts = [_within(start, p.numel(), first, size) for p, start in zip(params, starts, strict=True)]
    weights = [
        p.detach().flatten().narrow(0, max(first - start, 0) if length else 0, length)
        for p, start, (_, length) in zip(params, starts, parts, strict=True)
    ]
    return flat, group, params, parts, weights


def _stage_3(zero: Any) -> Iterator[Partition]:
    if zero.swap_optimizer or zero.params_in_nvme_and_cpu:
        raise NotImplementedError("partitions on NVMe are not known to be in memory for a step; offload to the CPU instead")
    groups = zero.sub_group_process_groups
    for flat, group, params in zip(zero.fp32_partitioned_groups_flat, groups, zero.fp16_groups, strict=True):
        parts, weights = [], []
        for p in params:
            _, start, _ = zero.grad_position[zero.get_param_id(p)]
            size = p.ds_tensor.ds_numel  # of each process's part, of which the last ones may be padding
            length = max(0, min(size, p.ds_numel - group.rank() * size))
            parts.append((int(start), int(length)))
            weights.append(p.ds_tensor.detach().flatten()[:length])
        yield flat, group, params, parts, weights


def _flat_groups(wrapper: Any) -> Iterator[Partition]:
    """Yield whole groups in one tensor each, as they are without ZeRO."""
    for flat, params in zip(wrapper.fp32_groups_flat, wrapper.fp16_groups, strict=True):
        parts = [(start, p.numel()) for start, p in zip(_one_after_the_other(params), params, strict=True)]
        yield flat, None, params, parts, [p.detach() for p in params]


# By the class that wraps the optimizer, and where it has the flat tensors; of a subclass it is not known what it does.
_KINDS: dict[str, tuple[Callable[[Any], Iterator[Partition]], str]] = {
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (_stages_1_and_2, "single_partition_of_fp32_groups"),
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (_stage_3, "fp32_partitioned_groups_flat"),
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": (_bf16, "fp32_groups_flat_partition"),
    "deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer": (_flat_groups, "fp32_groups_flat"),
}
_UNFUSED = "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer"  # steps each parameter by itself
