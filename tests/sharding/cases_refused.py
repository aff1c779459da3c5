"""Cases of what is refused, and of parameters and options that change."""

from __future__ import annotations

import copy
from typing import Any

import torch
from sharded import Net, Twins, case, fsdp, layouts, like, mesh_of, raises, random_params, step_with_random_grads, train, whole
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import torchlamb


@case(2)
def what_cannot_be_exact_is_refused(world: int) -> None:
    mesh = mesh_of(world)
    params = random_params([((8, 3), mesh, [Shard(0)]), ((4, 3, 2, 2), mesh, [Shard(1)])])
    partial = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Partial()], run_check=False))
    with raises(NotImplementedError, "still to be added", params):
        torchlamb.Lamb([*params, partial])
    with raises(NotImplementedError, "shard it on dim 0", params):
        torchlamb.Lamb(params, grad_centralization=True)
    with raises(NotImplementedError, "differentiable", params):
        torchlamb.Lamb(params, differentiable=True)
    optimizer = torchlamb.Lamb(params)
    with raises(RuntimeError, "only sums and averages", params):
        params[0].grad = DTensor.from_local(torch.ones(8, 3), mesh, [Partial("max")], run_check=False)
        optimizer.step()


@case(2, 3)
def zero_redundancy_optimizer(_: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of a deprecation when it is imported

    model, twin = Net(), Net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torchlamb.Lamb, lr=0.05, weight_decay=0.1)
    wanted = torchlamb.Lamb(twin.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step()
        wanted.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@case(2)
def parameters_may_be_replaced_by_shards(world: int) -> None:
    """As accelerate does it: the optimizer is made first, the model sharded later."""
    model = Net()
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.05)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state.clear()
    model.zero_grad()
    fsdp(model, mesh_of(world))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    twins = Twins([{"params": list(model.parameters())}], lr=0.05)
    twins.optimizer = optimizer
    train(model, twins)
    twins.assert_same()


@case(2)
def sharded_parameters_may_be_replaced_by_others(world: int) -> None:
    kinds: list[Any] = [((6, 4), mesh_of(world), [Shard(0)]), ((8, 3), mesh_of(world), [Replicate()]), ((4, 4), None, None)]
    optimizer = torchlamb.Lamb(random_params(kinds), lr=0.05)
    for kinds_now in (kinds, [kinds[1], kinds[0], kinds[2]], [*kinds[1:], kinds[0], kinds[0]], kinds):
        params = random_params(kinds_now)
        optimizer.param_groups[0]["params"] = params
        optimizer.state.clear()
        twins = Twins([{"params": params}], lr=0.05)
        twins.optimizer = optimizer
        for step in range(2):
            step_with_random_grads(twins, step)
        twins.assert_same()


@case(2)
def options_may_be_changed(world: int) -> None:
    params = random_params([((6, 4), mesh_of(world), [Shard(0)]), ((4, 3, 2, 2), mesh_of(world), [Shard(1)])])
    twins = Twins([{"params": params}], lr=0.05)
    for step, blocks in enumerate((1, 2, 1)):
        for optimizer in (twins.optimizer, twins.twin):
            optimizer.param_groups[0]["blocks"] = blocks
        step_with_random_grads(twins, step)
    twins.assert_same()
    for option, value, kind in (("blocks", 5, ValueError), ("grad_centralization", True, NotImplementedError)):
        with raises(kind, option, params):
            twins.optimizer.param_groups[0][option] = value
            twins.optimizer.step()
        twins.optimizer.param_groups[0][option] = {"blocks": 1}.get(option, False)


@case(2)
def copies_are_sharded_too(world: int) -> None:
    params = random_params(layouts(world))
    optimizer = torchlamb.Lamb(params, lr=0.1)
    for p in params:
        p.grad = like(torch.ones(p.shape), p)
    optimizer.step()
    again = copy.deepcopy(optimizer)
    copied = again.param_groups[0]["params"]
    for p, q in zip(params, copied, strict=True):
        q.grad = like(torch.ones(p.shape), p)
    optimizer.step()
    again.step()
    assert all(torch.equal(whole(p), whole(q)) for p, q in zip(params, copied, strict=True))
