"""Cases of real models: FSDP2, HSDP, tensor and data parallelism, loss scaling, the front, the noise scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import Net, Twins, case, collectives, fsdp, like, mesh_of, step_with_random_grads, tensor_parallel, train, whole
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import Shard

import torchlamb
from torchlamb.mindspore import nn as front
from torchlamb.noise_scale import NoiseScale
from torchlamb.sharding.layout import local

FSDP: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed-precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "cpu-offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "other-dim": {
        "shard_placement_fn": lambda p: Shard(1) if p.dim() == 2 and p.shape[1] % dist.get_world_size() == 0 else Shard(0)
    },
}


@case(2, 3, 4, each=FSDP)
def fsdp2(world: int, options: dict[str, Any]) -> None:
    for further in ({"weight_decay": 0.1}, {"max_grad_norm": 0.1, "foreach": True}):
        model = fsdp(Net(), mesh_of(world), **options)
        twins = Twins([{"params": list(model.parameters())}], lr=0.05, **further)
        train(model, twins)
        twins.assert_same()


@case(4)
def hsdp(_: int) -> None:
    model = fsdp(Net(), mesh_of(2, 2))
    twins = Twins([{"params": list(model.parameters())}], lr=0.05, max_grad_norm=0.1)
    train(model, twins)
    twins.assert_same()


@case(2, 4, each={"plain": {}, "guard": {"max_grad_norm": 0.1}})
def tensor_parallelism(world: int, options: dict[str, Any]) -> None:
    """Column and row wise layers, an embedding, and a sequence parallel norm, whose gradients are still to be added."""
    model = tensor_parallel(Net(), mesh_of(world))
    twins = Twins([{"params": list(model.parameters())}], lr=0.05, weight_decay=0.1, **options)
    train(model, twins, same_data=True)
    assert any(placement.is_partial() for p in model.norm.parameters() for placement in p.grad.placements)
    twins.assert_same()


@case(4, each={"dim-0": None, "dim-1": lambda p: Shard(1) if p.dim() == 2 else Shard(0)})
def fsdp2_over_tensor_parallelism(_: int, placement_fn: Any) -> None:
    mesh = mesh_of(2, 2)
    model = fsdp(tensor_parallel(Net(), mesh["tp"]), mesh["dp"], shard_placement_fn=placement_fn)
    if placement_fn is None:
        assert any("Strided" in type(placement).__name__ for p in model.parameters() for placement in p.placements)
    twins = Twins([{"params": list(model.parameters())}], lr=0.05, weight_decay=0.1, max_grad_norm=0.1)
    for step in range(5):
        generator = torch.Generator().manual_seed(100 * step + mesh["dp"].get_local_rank())
        tokens, labels = torch.randint(0, 10, (4, 4), generator=generator), torch.randint(0, 3, (4, 4), generator=generator)
        model.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
        twins.step()
    twins.assert_same()


@case(4)
def blocks_under_fsdp2_over_tensor_parallelism(_: int) -> None:
    mesh = mesh_of(2, 2)
    model = fsdp(tensor_parallel(Net(), mesh["tp"]), mesh["dp"])
    twins = Twins([{"params": [model.up.weight, model.up.bias], "blocks": 3}, {"params": [model.down.weight]}], lr=0.05)
    for step in range(5):
        step_with_random_grads(twins, step)
    twins.assert_same()


@case(2)
def data_parallelism(_: int) -> None:
    model = nn.parallel.DistributedDataParallel(Net(), gradient_as_bucket_view=True)
    twins = Twins([{"params": list(model.parameters())}], lr=0.05, max_grad_norm=0.1)
    with collectives(0):
        pass
    train(model, twins)
    twins.assert_same(0.0)


SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "fused-guard": {"fused": True, "max_grad_norm": 0.1},
    "fused-capturable": {"fused": True, "capturable": True},
}


@case(2, each=SCALED, slow=lambda key: key not in ("default", "fused"))
def an_overflow_of_one_process_under_fsdp2(world: int, options: dict[str, Any]) -> None:
    """The shard of one process has one inf: both leave every bit, halve the scale, and train as if that step had not been."""
    assert_overflows_of_either_process_change_nothing(lambda: fsdp(Net(), mesh_of(world)), options)


@case(2, each=SCALED, slow=lambda key: key not in ("default", "fused"))
def an_overflow_of_one_process_under_data_parallelism(_: int, options: dict[str, Any]) -> None:
    """The loss of one process overflows, and averaging carries it into the gradients of both."""
    assert_overflows_of_either_process_change_nothing(lambda: nn.parallel.DistributedDataParallel(Net()), options)


def assert_overflows_of_either_process_change_nothing(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    """The reference has no scaler: multiplying float32 by powers of two is exact, so that all comparisons are bitwise."""
    model, reference = make(), make()
    optimizer, plain = (torchlamb.Lamb(m.parameters(), lr=0.05, weight_decay=0.1, **options) for m in (model, reference))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(5):
        if step in (2, 3):  # by then there are moments
            before = whole_values(model, optimizer)
            step_scaled(model, optimizer, scaler, step, overflowing=step - 2)
            assert all(torch.equal(value, before[name]) for name, value in whole_values(model, optimizer).items())
        assert scaler.get_scale() == 2.0 ** (16 - min(max(step - 1, 0), 2))
        before = whole_values(model, optimizer)
        step_scaled(model, optimizer, scaler, step)
        step_scaled(reference, plain, disabled, step)
        got, wanted = whole_values(model, optimizer), whole_values(reference, plain)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in got.items())
        assert step == 0 or not any(torch.equal(value, before[name]) for name, value in got.items())
    assert optimizer.skipped_steps.item() == (2 if options.get("fused") else 0)


def step_scaled(
    model: nn.Module, optimizer: torchlamb.Lamb, scaler: torch.amp.GradScaler, step: int, overflowing: int | None = None
) -> None:
    """Train on data of each process's own, with one inf in what the process `overflowing` has of the gradients."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    tokens = torch.randint(0, 10, (4, 4), generator=generator)
    labels = torch.randint(0, 3, (4, 4), generator=generator)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    own = overflowing == dist.get_rank()
    ddp = isinstance(model, nn.parallel.DistributedDataParallel)
    scaler.scale(loss * (torch.inf if own and ddp else 1.0)).backward()
    if own and not ddp:
        local(model.up.weight.grad)[-1, -1] = torch.inf
    scaler.step(optimizer)
    scaler.update()


def whole_values(model: nn.Module, optimizer: torchlamb.Lamb) -> dict[str, Tensor]:
    """Parameters, moments and step counts; not the count of skipped steps."""
    values = {name: whole(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        values |= {f"{key} of {name}": whole(value) for key, value in optimizer.state.get(p, {}).items() if key != "skipped"}
    return values


@case(2, 4)
def the_mindspore_front(world: int) -> None:
    model = fsdp(Net(), mesh_of(world))
    named = front.trainable_params(model)
    twins = Twins(
        [{"params": [x.parameter for x in named[:2]], "weight_decay": 0.1}, {"params": [x.parameter for x in named[2:]]}],
        make=lambda groups, **options: front.Lamb(groups, front.PolynomialDecayLR(0.1, 0.01, 4, 0.5), **options),
    )
    train(model, twins)
    twins.assert_same()
    grads = [like(torch.ones(x.parameter.shape), x.parameter) for x in twins.optimizer.parameters]
    assert twins.optimizer(grads) == (True,) * len(grads)


@case(2, 4)
def the_noise_scale_is_that_of_whole_gradients(world: int) -> None:
    """Under FSDP2 beside plain parameters, and with gradients that differ between processes until the end of a step."""
    torch.manual_seed(0)
    whole, sharded = Net(), Net()
    sharded.load_state_dict(whole.state_dict())
    fsdp(sharded, mesh_of(world))
    plain = nn.Parameter(torch.zeros(3))
    scales = [NoiseScale([*model.parameters(), plain]) for model in (whole, sharded)]
    for i, samples in enumerate((4, 16)):
        plain.grad = torch.full((3,), 0.5 + i)
        for p, shard in zip(whole.parameters(), sharded.parameters(), strict=True):
            p.grad = torch.randn(p.shape)
            shard.grad = like(p.grad, shard)
        with collectives(1):
            scales[1].micro_batch(samples, of=16) if i == 0 else scales[1].step(samples)
        scales[0].micro_batch(samples, of=16) if i == 0 else scales[0].step(samples)
    wanted = scales[0].state_dict()["averages"]
    assert scales[1].state_dict()["averages"] == pytest.approx(wanted, rel=1e-6)
    own = NoiseScale([plain], process_group=dist.group.WORLD)
    plain.grad = torch.full((3,), 1.0 + dist.get_rank())
    own.micro_batch(1, of=1)
    plain.grad = torch.full((3,), 0.5)
    own.step(2)
    small = 3 * sum((1.0 + rank) ** 2 for rank in range(world)) / world
    assert own.noise == pytest.approx((small - 0.75) / 0.5, rel=1e-6)
