"""What two processes run, by the name of the case: `torchrun --nproc-per-node 2 tests/ecosystem/two_processes.py ddp`."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent.parent))

from ecosystem.common import LAMB, assert_same, make_batches, make_model, train

import torchlamb

RANK = int(os.environ["RANK"])


def halves(batches):
    return [(x[RANK::2], y[RANK::2]) for x, y in batches]


def ddp() -> None:
    dist.init_process_group("gloo")
    model = make_model()
    wanted = train(model, make_batches())
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torchlamb.Lamb(parallel.parameters(), **LAMB)
    for x, y in halves(make_batches()):
        optimizer.zero_grad()
        cross_entropy(parallel(x), y).backward()
        optimizer.step()
    assert_same(model, wanted, 1e-5)  # the mean of two halves is rounded otherwise than that of the whole


def zero() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo")
    model = make_model()
    wanted = train(model, make_batches())
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(parallel.parameters(), torchlamb.Lamb, **LAMB)
    for x, y in halves(make_batches()):
        optimizer.zero_grad()
        cross_entropy(parallel(x), y).backward()
        optimizer.step()
    assert_same(model, wanted, 1e-5)


def accelerate_fsdp2() -> None:
    """Accelerate shards the model, and puts the shards into the groups of the optimizer that was made before.

    Its state takes the plugin on accelerators only; once told of it, the code that prepares is the same on CPUs.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10, cpu_ram_efficient_loading=False
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    assert accelerator.is_fsdp2
    model = make_model()
    wanted = train(model, make_batches())
    optimizer = torchlamb.Lamb(model.parameters(), **LAMB)
    model, optimizer = accelerator.prepare(model, optimizer)
    groups = optimizer.param_groups
    assert all(isinstance(p, DTensor) for group in groups for p in group["params"])
    for x, y in halves(make_batches()):
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
    whole = make_model()
    for p, sharded in zip(whole.parameters(), model.parameters(), strict=True):
        p.data = sharded.full_tensor()
    assert_same(whole, wanted, 1e-5)


def accelerate_fsdp1() -> None:
    """Accelerate wraps the model; Lamb is told, and made then."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import FullyShardedDataParallel

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1, auto_wrap_policy="size_based_wrap", min_num_params=10, use_orig_params=True
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    accelerator.state.device = torch.device("cpu")  # without a number, which FSDP1 compares
    model = make_model()
    wanted = train(model, make_batches())
    model = accelerator.prepare(model)
    assert isinstance(model, FullyShardedDataParallel)
    torchlamb.shard.fsdp1(model)
    optimizer = accelerator.prepare(torchlamb.Lamb(model.parameters(), **LAMB))
    for x, y in halves(make_batches()):
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
    whole = make_model()
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for p, gathered in zip(whole.parameters(), model.parameters(), strict=True):
            p.data = gathered.detach().clone()
    assert_same(whole, wanted, 1e-5)


def accelerate_deepspeed() -> None:
    """Accelerate makes the engine."""
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
    from accelerate import Accelerator, DeepSpeedPlugin

    settings = {
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2},
    }
    dist.init_process_group("gloo")
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    model = make_model()
    wanted = train(model, make_batches())
    model, optimizer = accelerator.prepare(model, torchlamb.Lamb(model.parameters(), **LAMB))
    torchlamb.shard.deepspeed(model)
    for x, y in halves(make_batches()):
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model.module, wanted, 1e-5)


CASES = {
    "ddp": ddp,
    "zero": zero,
    "accelerate_fsdp1": accelerate_fsdp1,
    "accelerate_fsdp2": accelerate_fsdp2,
    "accelerate_deepspeed": accelerate_deepspeed,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    CASES[sys.argv[1]]()
    dist.barrier()
    time.sleep(0.2)  # gloo aborts where one process leaves while another is still talking
    dist.destroy_process_group()
