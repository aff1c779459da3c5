"""What the processes of `test_deepspeed.py` run: DeepSpeed's ZeRO on CPUs, beside one process that has everything.

Gradients are what a case says: the model's loss is the sum of its parameters times what it is given. So the optimizer alone is
compared, and what DeepSpeed has done to gradients is done to those of the twin.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sharded
import torch
import torch.distributed as dist
import worlds
from cases_flat import Units, gradients, integers, powers_of_two, random_numbers
from sharded import BF16, Case, raises
from torch import Tensor, nn

import torchlamb
from torchlamb.sharding.sums import Plan

CASES: dict[str, tuple[Case, tuple[int, ...]]] = {}
case = functools.partial(sharded.case, into=CASES)
STEPS = 5
SHAPES = [torch.empty_like(p) for p in Units(random_numbers()).parameters()]  # stage 3 leaves parameters empty
TOP = ("gradient_accumulation_steps", "gradient_clipping", "data_types")
UNIVERSAL = Path(os.environ.get("TORCHLAMB_UNIVERSAL", tempfile.gettempdir()))  # where one world leaves what another takes up


def begin(rank: int, world: int) -> None:
    import deepspeed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def config(stage: int, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """DeepSpeed's configuration; options are those of ZeRO, but for those that it has at the top."""
    top = {
        name: options.pop(name)
        for name in ("gradient_accumulation_steps", "gradient_clipping", "data_types")
        if name in options
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype is BF16},
        "zero_optimization": {"stage": stage, **options},
        **top,
    }


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, vectors, and one that holds one vector only: what a flat partition looks like."""
    params = list(model.named_parameters())
    *vectors, last = [(name, p) for name, p in params if p.dim() == 1]
    return [
        {"params": [last], "weight_decay": 0.0},
        {"params": [(name, p) for name, p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.02, "lr": 0.03},
    ]


def start(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], tell: bool = True) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if tell:
        torchlamb.shard.deepspeed(engine)
    return engine


@contextmanager
def whole(engine: Any) -> Iterator[list[nn.Parameter]]:
    import deepspeed

    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=engine.zero_optimization_stage() == 3):
        yield params


def weights(engine: Any, masters: bool = False) -> list[Tensor]:
    """Whole parameters, or what they are rounded from."""
    from deepspeed.utils import safe_get_full_fp32_param

    if masters:
        return [safe_get_full_fp32_param(p).detach().clone() for p in engine.module.parameters()]
    with whole(engine) as params:
        return [p.detach().clone() for p in params]


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for i, (p, q) in enumerate(zip(got, wanted, strict=True)):
        error = (p.double() - q.double()).norm() / q.double().norm()
        assert error <= tolerance, f"parameter {i}: off by {error:.3g}"


SYSTEMS: dict[str, dict[str, Any]] = {
    **{f"{stage}": {"stage": stage} for stage in (0, 1, 2, 3)},
    **{f"{stage}-accumulated": {"stage": stage, "gradient_accumulation_steps": 2} for stage in (1, 2, 3)},
    **{f"{stage}-clipped": {"stage": stage, "gradient_clipping": 0.5} for stage in (1, 2, 3)},
    **{f"{stage}-offload": {"stage": stage, "offload_optimizer": {"device": "cpu"}} for stage in (1, 2, 3)},
    **{f"{stage}-round-robin": {"stage": stage, "round_robin_gradients": True} for stage in (1, 2)},
    "3-sub-groups": {"stage": 3, "sub_group_size": 40},
    "3-persistent": {"stage": 3, "stage3_param_persistence_threshold": 20},
    "3-params-offload": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
}


@case(2, 3, 4, each=SYSTEMS)
def zero(world: int, options: dict[str, Any]) -> None:
    settings = config(**options)
    rounds, clip = settings.get("gradient_accumulation_steps", 1), settings["gradient_clipping"]
    model, twin = Units(random_numbers()), Units(random_numbers())
    engine = start(model, torchlamb.Lamb(groups_of(model), lr=0.05), settings)
    wanted = torchlamb.Lamb(groups_of(twin), lr=0.05)
    for step in range(STEPS):
        given = [
            [gradients(SHAPES, random_numbers(1000 * step + 10 * k + rank + 1)) for rank in range(world)] for k in range(rounds)
        ]
        for each in given:
            engine.backward(engine(each[dist.get_rank()]))
            engine.step()
        for p, *parts in zip(twin.parameters(), *itertools.chain(*given), strict=True):
            p.grad = torch.stack(parts).mean(dim=0)
        if clip:  # as DeepSpeed does it
            norm = torch.stack([p.grad.square().sum() for p in twin.parameters()]).sum().sqrt()
            for p in twin.parameters():
                p.grad /= torch.clamp((norm + 1e-6) / clip, min=1.0)
        wanted.step()
    assert_close(weights(engine), [p.detach() for p in twin.parameters()], 1e-6)


BF16_SYSTEMS: dict[str, dict[str, Any]] = {
    **{f"{stage}": {"stage": stage} for stage in (0, 1, 2, 3)},
    "1-float32-gradients": {"stage": 1, "data_types": {"grad_accum_dtype": "fp32"}},
    "2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


@case(2, 4, each=BF16_SYSTEMS)
def zero_with_bf16(world: int, options: dict[str, Any]) -> None:  # noqa: ARG001
    """Weights in bf16, rounded from float32 ones; the same gradients on all processes, so that their mean is exact."""
    model, twin = Units(random_numbers()).bfloat16(), Units(random_numbers()).bfloat16().float()
    engine = start(model, torchlamb.Lamb(groups_of(model), lr=0.05), config(dtype=BF16, **options))
    wanted = torchlamb.Lamb(groups_of(twin), lr=0.05)
    for step in range(STEPS):
        given = [grad.bfloat16() for grad in gradients(SHAPES, random_numbers(step + 1))]
        engine.backward(engine(given))
        engine.step()
        for p, grad in zip(twin.parameters(), given, strict=True):
            p.grad = grad.float()
        wanted.step()
    masters = [p.detach() for p in twin.parameters()]
    if options["stage"]:
        assert_close(weights(engine, masters=True), masters, 1e-6)
    assert_close(weights(engine), [p.bfloat16() for p in masters], 2.0**-9)


@case(2, 3, 4, each={str(stage): stage for stage in (1, 2, 3)})
def representable_numbers(world: int, stage: int) -> None:  # noqa: ARG001
    """Integers and powers of two: all sums are exact, so nothing may differ."""
    options: dict[str, Any] = {"lr": 0.5, "betas": (0.5, 0.5), "eps": 0.0, "weight_decay": 0.5}
    model, twin = Units(integers()), Units(integers())
    engine = start(model, torchlamb.Lamb(model.parameters(), **options), config(stage))
    wanted = torchlamb.Lamb(twin.parameters(), **options)
    given = gradients(twin.parameters(), powers_of_two(1))
    engine.backward(engine(given))
    engine.step()
    for p, grad in zip(twin.parameters(), given, strict=True):
        p.grad = grad
    wanted.step()
    assert all(torch.equal(p, q) for p, q in zip(weights(engine), twin.parameters(), strict=True))


def steps_of(engine: Any, steps: range) -> None:
    for step in steps:
        engine.backward(engine(gradients(SHAPES, random_numbers(step + 1))))
        engine.step()


@case(2, each={str(stage): stage for stage in (1, 2, 3)})
def checkpoints_resume(world: int, stage: int) -> None:  # noqa: ARG001
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)

    def make() -> Any:
        model = Units(random_numbers())
        return start(model, torchlamb.Lamb(groups_of(model), lr=0.05), config(stage))

    engine = make()
    steps_of(engine, range(3))
    engine.save_checkpoint(folder[0])
    steps_of(engine, range(3, 6))
    again = make()
    again.load_checkpoint(folder[0])
    steps_of(again, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(weights(engine), weights(again), strict=True))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(str(folder[0]))


@case(2, each={str(stage): stage for stage in (1, 2)})
def a_checkpoint_is_left_for_another_world(world: int, stage: int) -> None:  # noqa: ARG001
    model = Units(random_numbers())
    engine = start(model, torchlamb.Lamb(model.parameters(), lr=0.05, weight_decay=0.1), config(stage))
    steps_of(engine, range(3))
    engine.save_checkpoint(str(UNIVERSAL / f"of{stage}"), tag="last")
    steps_of(engine, range(3, 6))
    if dist.get_rank() == 0:
        torch.save(weights(engine), UNIVERSAL / f"wanted{stage}.pt")


@case(4, each={str(stage): stage for stage in (1, 2)})
def a_universal_checkpoint_is_gone_on_with(world: int, stage: int) -> None:  # noqa: ARG001
    """All in one group: DeepSpeed 0.19.8 fails to load one of which a process holds nothing."""
    settings = {**config(stage), "checkpoint": {"load_universal": True}}
    model = Units(random_numbers(1))
    engine = start(model, torchlamb.Lamb(model.parameters(), lr=0.05, weight_decay=0.1), settings)
    engine.load_checkpoint(str(UNIVERSAL / f"of{stage}"), tag="universal")
    steps_of(engine, range(3, 6))
    assert_close(weights(engine), torch.load(UNIVERSAL / f"wanted{stage}.pt"), 1e-6)


@case(2, each={str(stage): stage for stage in (1, 2, 3)})
def partitions_are_refused_until_told(world: int, stage: int) -> None:  # noqa: ARG001
    model = Units(random_numbers())
    optimizer = torchlamb.Lamb(groups_of(model), lr=0.05)
    engine = start(model, optimizer, config(stage), tell=False)
    before = weights(engine)
    engine.backward(engine(gradients(SHAPES, random_numbers(1))))
    with raises(NotImplementedError, r"torchlamb.shard.deepspeed\(engine\)", []):
        engine.step()
    assert all(torch.equal(p, q) for p, q in zip(weights(engine), before, strict=True))


@case(2, each={str(stage): stage for stage in (1, 2, 3)})
def a_guard_is_refused(world: int, stage: int) -> None:  # noqa: ARG001
    for options in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        model = Units(random_numbers())
        optimizer = torchlamb.Lamb(groups_of(model), **options)
        with raises(NotImplementedError, "gradient_clipping", []):
            start(model, optimizer, config(stage))
    model = Units(random_numbers())
    optimizer = torchlamb.Lamb(groups_of(model))
    engine = start(model, optimizer, config(stage))
    for group in optimizer.param_groups:
        group["max_grad_norm"] = 1.0
    engine.backward(engine(gradients(SHAPES, random_numbers(1))))
    with raises(NotImplementedError, "gradient_clipping", []):
        engine.step()


@case(2, each={str(stage): stage for stage in (1, 2, 3)})
def what_does_not_hold_the_weights_is_refused(world: int, stage: int) -> None:  # noqa: ARG001
    model = Units(random_numbers())
    engine = start(model, torchlamb.Lamb(groups_of(model)), config(stage), tell=False)
    wrapper = engine.optimizer
    flats = wrapper.fp32_partitioned_groups_flat if stage == 3 else wrapper.single_partition_of_fp32_groups
    if dist.get_rank() == 1:
        with torch.no_grad():
            flats[1][0] += 1.0
    with raises(RuntimeError, "units" if dist.get_rank() == 1 else "another process", []):
        torchlamb.shard.deepspeed(engine)


@case(2)
def what_is_told_of_the_last_step_is_refused(world: int) -> None:  # noqa: ARG001
    model = Units(random_numbers())
    optimizer = torchlamb.Lamb(groups_of(model))
    engine = start(model, optimizer, config(2))
    steps_of(engine, range(1))
    for told in (optimizer.trust_ratios, optimizer.norms):
        with raises(NotImplementedError, "DeepSpeed", []):
            told()
    for options in ({"blocks": 2}, {"grad_centralization": True}):
        model = Units(random_numbers())
        engine = start(model, torchlamb.Lamb([p for p in model.parameters() if p.shape[0] == 12], **options), config(2))
        engine.backward(engine(gradients(SHAPES, random_numbers(1))))
        with raises(NotImplementedError, next(iter(options)), []):
            engine.step()


@case(2, each={str(stage): stage for stage in (2, 3)})
def partitions_draw_random_bits_of_their_own(world: int, stage: int) -> None:  # noqa: ARG001
    model = Units(random_numbers())
    optimizer = torchlamb.Lamb(groups_of(model), state_dtype=BF16)
    engine = start(model, optimizer, config(stage))
    steps_of(engine, range(1))
    seeds = [state["seed"].item() for state in optimizer.state.values()]
    assert len(set(seeds)) == len(seeds) == 3


@case(2, each={str(stage): stage for stage in (1, 2, 3)})
def one_sum_for_each_group(world: int, stage: int) -> None:  # noqa: ARG001
    model = Units(random_numbers())
    engine = start(model, torchlamb.Lamb(groups_of(model)), config(stage))
    counted, add = [], Plan._all_reduced

    def counting(self: Plan, tensor: Tensor, group: Any) -> Tensor:
        counted.append(tuple(tensor.shape))
        return add(self, tensor, group)

    Plan._all_reduced = counting
    try:
        steps_of(engine, range(2))
    finally:
        Plan._all_reduced = add
    assert len(counted) == 2 * 3, counted  # DeepSpeed steps the three groups one after the other


if __name__ == "__main__":
    import deepspeed  # once, before there are several processes; not where tests are collected  # noqa: F401

    worlds.main(CASES, begin)
