"""Telling Lamb how parameters are sharded, where they do not know it themselves.

DTensors do: FSDP2, HSDP and torch's tensor parallelism need nothing of this. DeepSpeed's ZeRO and FSDP1
(`FullyShardedDataParallel`) hand optimizers flat vectors, in which several layers lie, or pieces of them; Megatron's tensor
parallelism hands over plain tensors that are parts of larger ones. Without being told, Lamb refuses to step those; once told,
it takes norms of whole layers and steps as if nothing were sharded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from torchlamb.sharding.deepspeed import tell_of_deepspeed
from torchlamb.sharding.fsdp1 import tell_of_fsdp1
from torchlamb.sharding.tensor_parallel import tell_of_tensor_parallel

if TYPE_CHECKING:
    from torchlamb.sharding.layout import ProcessGroup

__all__ = ["deepspeed", "fsdp1", "tensor_parallel"]


def fsdp1(model: nn.Module) -> None:
    """Tell where the layers of a model lie that FullyShardedDataParallel has wrapped.

    To be called on every process, after the model was wrapped and before the optimizer is made; where a trainer wraps the model
    and hands the optimizer its parameters later, before the first step. Works with `use_orig_params` or without, and with
    FULL_SHARD, SHARD_GRAD_OP, NO_SHARD and HYBRID_SHARD. Each flat parameter's slices are compared with the weights, for which
    one unit at a time is gathered. What was told is forgotten with the model.

    Without `use_orig_params`, an entry of `trust_ratios()` is one flat parameter's, with one ratio for each parameter in it.

    Args:
        model: the whole model, not a part of one

    Raises:
        ValueError: nothing in it is wrapped
        RuntimeError: a slice does not hold the weights it should, on any process
        NotImplementedError: this torch keeps flat parameters in another way

    Example:
        >>> import torch, torchlamb
        >>> model = torch.nn.Linear(4, 2)  # FullyShardedDataParallel(model, ...)
        >>> torchlamb.shard.fsdp1(model)
        Traceback (most recent call last):
            ...
        ValueError: model must be wrapped in FullyShardedDataParallel, got Linear with no such module
    """
    tell_of_fsdp1(model)


def deepspeed(engine: Any) -> None:
    """Tell where layers lie in the partitions of a DeepSpeed engine, at ZeRO stages 1, 2 and 3.

    To be called on every process right after ``deepspeed.initialize``, which is given the Lamb and
    ``"zero_allow_untested_optimizer": true``; with offload also ``"zero_force_ds_cpu_optimizer": false``. Each slice is
    compared with the model's weights. Tested with DeepSpeed 0.19.8; below stage 1 nothing is cut, and nothing told.

    DeepSpeed steps one group at a time. `max_grad_norm` and `skip_nonfinite` are refused for that: its own `gradient_clipping`
    clips by the norm over all. `trust_ratios()` and `norms()` are refused, too.

    Args:
        engine: what ``deepspeed.initialize`` returns first

    Raises:
        TypeError: it is none
        RuntimeError: a partition does not hold the weights it should, on any process
        NotImplementedError: another version of DeepSpeed or a way to partition that is not known, partitions on NVMe, tensor
            parallelism beneath ZeRO, or options that need all gradients at once

    Example:
        >>> # engine, *_ = deepspeed.initialize(model=model, optimizer=torchlamb.Lamb(model.parameters()), config=config)
        >>> # torchlamb.shard.deepspeed(engine)
    """
    tell_of_deepspeed(engine)


def tensor_parallel(model: nn.Module | Optimizer, process_group: ProcessGroup, params: Iterable[Tensor] | None = None) -> None:
    """Tell which plain tensors of a model are parts of larger ones, whose other parts are on the other processes of a group.

    Megatron marks those with `tensor_model_parallel`; all other parameters are the same on these processes. DTensors, as
    torch's own tensor parallelism makes them, need none of this.

    Args:
        model: whose parameters they are; or the Lamb, where a mixed-precision wrapper has put float32 copies of them into it
        process_group: the tensor parallel one
        params: the parts (default: the parameters with a true attribute `tensor_model_parallel`)

    Raises:
        ValueError: a tensor is no parameter of the model, or of the optimizer

    Example:
        >>> # torchlamb.shard.tensor_parallel(model, parallel_state.get_tensor_model_parallel_group())
    """
    tell_of_tensor_parallel(model, process_group, params)
