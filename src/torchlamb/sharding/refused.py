"""What cannot be stepped exactly for how it is sharded, by what is known of it, and what to do instead.

What is known is what every process sees alike: the marks that those leave who shard, and who calls `step()`. Shapes tell
nothing, and nothing is sent to find out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from torchlamb.sharding.layout import is_dtensor, told_of

# The modules of DeepSpeed whose optimizers cut the parameters of a group into flat partitions.
NO_GUARD = (
    "max_grad_norm and skip_nonfinite need the norm over all gradients, and DeepSpeed steps one group at a time; set its own "
    "gradient_clipping instead (1.0 unless its configuration says otherwise)"
)
_PARTITIONING = ("deepspeed.runtime.zero.", "deepspeed.runtime.bf16_optimizer", "deepspeed.runtime.fp16.fused_optimizer")


# Parameters.


def why_refused(param: Tensor) -> str | None:
    """Return what is said of a parameter that cannot be stepped because of how it is sharded, None of any other."""
    if is_dtensor(param):
        if not _has_partial(param.placements):  # type: ignore[attr-defined]
            return None
        return f"has placements {param.placements}: a sum that is still to be added cannot be stepped; redistribute it first"  # type: ignore[attr-defined]
    if hasattr(param, "_fsdp_flattened") and told_of(param) is None:
        return (
            "is a part of a flat parameter of FullyShardedDataParallel; call torchlamb.shard.fsdp1(model) first, which tells "
            "where the layers lie in it, or shard with torch.distributed.fsdp.fully_shard"
        )
    if getattr(param, "tensor_model_parallel", False) is True and _are_several() and told_of(param) is None:
        return (
            "is marked as tensor_model_parallel, so other processes hold other parts of it; call torchlamb.shard."
            "tensor_parallel(model, process_group) with the tensor parallel group, which may be of one process (or with the "
            "optimizer for the model, where it holds copies), or shard with torch.distributed.tensor.parallel"
        )
    return None


def why_options_refused(param: Tensor, blocks: int, grad_centralization: bool) -> tuple[str, str] | None:
    """Return which option needs more than is known of how a parameter lies, and what is said of it."""
    if is_dtensor(param):
        if grad_centralization and param.dim() >= 3 and any(getattr(p, "dim", 0) != 0 for p in param.placements):  # type: ignore[attr-defined]
            return "grad_centralization", (
                "needs means over all dims but the first, which is not all that its placements shard; shard it on dim 0"
            )
        return None
    known = told_of(param)
    if known is None or known.is_whole:
        return None
    asked = "blocks" if blocks != 1 else "grad_centralization" if grad_centralization else None
    return None if asked is None else (asked, "needs the shapes of whole parameters, of which it holds flat parts")


@functools.cache  # placements are few, parameters many
def _has_partial(placements: tuple[Any, ...]) -> bool:
    return any(placement.is_partial() for placement in placements)


def _are_several() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def dims_of(params: Sequence[Tensor]) -> dict[int, int]:
    """Return the number of dims of parameters by the number of the object; lazy ones, which may get any, have none."""
    return {id(p): p.dim() for p in params if not is_lazy(p)}


def why_fragments(params: Sequence[Tensor], began: Mapping[int, int]) -> str | None:
    """Return what is said of parameters that are vectors now, all of them, and were matrices, or others in their place.

    So do partitions made by hand, and by Megatron's distributed optimizer: fragments of matrices, other ones on each process.

    Args:
        params: of all groups now
        began: the dims of all parameters that the optimizer was given, as from `dims_of`
    """
    if max(began.values(), default=0) < 2:
        return None
    if any(is_dtensor(p) or is_lazy(p) or p.dim() > 1 for p in params):
        return None
    if not any(p.dim() == 1 and began.get(id(p)) != 1 and told_of(p) is None for p in params):
        return None  # all but vectors were taken out
    return (
        "all parameters are vectors that are not those that Lamb was given beside matrices: fragments, in which the layers "
        "that LAMB adapts are no longer recognisable; use torch.distributed.fsdp.fully_shard, or with Megatron "
        "use_distributed_optimizer=False"
    )


def why_untold(params: Sequence[Tensor], was_told: bool) -> str | None:
    """Return what is said of copies of parameters of which was told how they lie, when nobody has told of these."""
    if not was_told or any(told_of(p) is not None for p in params):
        return None
    return (
        "this optimizer is a copy, and how its parameters lie was told of those that they were copied from only; tell it of "
        "these, too (torchlamb.shard)"
    )


# Gradients.


def why_grad_refused(param: Tensor, grad: Tensor) -> str | None:
    """Return what is said of a gradient that does not fit how its parameter is sharded."""
    param_is_dtensor, grad_is_dtensor = is_dtensor(param), is_dtensor(grad)
    if not (param_is_dtensor or grad_is_dtensor):
        return None
    if not grad_is_dtensor:
        return "is a DTensor and its gradient a plain tensor; make the gradient a DTensor too, with distribute_tensor"
    if not param_is_dtensor:
        return "is a plain tensor and its gradient a DTensor; take its full_tensor()"
    have, want = grad._spec, param._spec  # type: ignore[attr-defined]
    if have.mesh is want.mesh and have.placements == want.placements:
        return None
    if grad.device_mesh != param.device_mesh:  # type: ignore[attr-defined]
        return "lies on another device mesh than its gradient; redistribute the gradient"
    odd = [p for p in grad.placements if p.is_partial() and p.reduce_op not in ("sum", "avg")]  # type: ignore[attr-defined]
    return f"has a gradient with placement {odd[0]}; only sums and averages can be added" if odd else None


# Callers.


def zero_redundancy_group() -> Any:
    """Return the process group of the ZeroRedundancyOptimizer that is calling, None if none is.

    Its processes each see the gradients of some parameters only. It leaves no mark on the optimizer that it wraps, but its
    frame is on the call stack.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return None
    callers = (c for _, c in _callers(module.__name__) if isinstance(c, module.ZeroRedundancyOptimizer))
    caller = next(callers, None)
    return None if caller is None else getattr(caller, "process_group", None)


def check_partitioned(groups: Sequence[Mapping[str, Any]], guarded: bool) -> bool:
    """Return whether DeepSpeed is calling with flat partitions, of one group at a time.

    Args:
        groups: of the optimizer, as DeepSpeed has left them for this call
        guarded: whether the step depends on the norm over all gradients

    Raises:
        NotImplementedError: nobody has told where the parameters lie in them, or the guard needs those of all groups
    """
    if "deepspeed" not in sys.modules or not any(True for _ in _callers(*_PARTITIONING)):
        return False
    if any(told_of(p) is None for group in groups for p in group["params"]):
        raise NotImplementedError(
            "DeepSpeed has cut the parameters into flat partitions, in which the layers that LAMB adapts are not recognisable; "
            "call torchlamb.shard.deepspeed(engine) after deepspeed.initialize, which tells where they lie"
        )
    if guarded:
        raise NotImplementedError(NO_GUARD)
    return True


def only_makes_state() -> bool:
    """Return whether DeepSpeed calls `step()` for no more than that each parameter has its state: before training."""
    names = ("deepspeed.runtime.",)
    return "deepspeed" in sys.modules and any(name == "initialize_optimizer_states" for name, _ in _callers(*names))


# A step that is traced does not look for callers; see `Lamb._check_step`.
only_makes_state._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _callers(*modules: str) -> Iterator[tuple[str, Any]]:
    """Yield, from the nearest, the names of functions on the call stack that are of these modules, and their `self`."""
    frame = sys._getframe().f_back
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(modules):
            yield frame.f_code.co_name, frame.f_locals.get("self")
        frame = frame.f_back
