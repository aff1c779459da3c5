"""Cases of what a step communicates, and of the guard, which all processes have to decide alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from sharded import Twins, case, collectives, layouts, like, mesh_of, random_params, whole
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import torchlamb


@case(2, 3, 4)
def one_collective_for_each_process_group(world: int) -> None:
    flat = mesh_of(world)
    sharded = [((12, 5), flat, [Shard(0)]), ((7, 3), flat, [Shard(1)]), ((4,), flat, [Shard(0)]), ((4, 2), flat, [Replicate()])]
    plain: list[Any] = [((6, 4), None, None)]
    kinds: list[tuple[list[Any], int]] = [(sharded, 1), (sharded + plain, 1), (plain, 0), ([((4, 2), flat, [Replicate()])], 0)]
    if world == 4:
        square = mesh_of(2, 2)
        kinds += [
            ([((6, 5), square, [Replicate(), Shard(0)])], 1),
            ([((8, 6), square, [Shard(0), Shard(1)]), ((6, 4), square, [Shard(0), Replicate()])], 2),
            (layouts(4), 3),
        ]
    for layout, groups in kinds:
        for options, passes in [({}, 1), ({"foreach": True}, 1), ({"max_grad_norm": 1.0}, 2), ({"skip_nonfinite": True}, 2)]:
            params = random_params(layout)
            optimizer = torchlamb.Lamb(params, lr=0.1, **options)
            for step in range(3):
                for p in params:
                    p.grad = like(torch.ones(p.shape), p)
                if step == 2 and len(params) > 1:
                    params[0].grad = None
                with collectives(groups * passes):
                    optimizer.step()


@case(2)
def places_in_the_table_are_made_once(world: int) -> None:
    """As tensors where they do not follow each other: a list would be copied to the device in each step."""
    mesh = mesh_of(world)
    params = random_params([((6, 4), mesh, [Shard(0)]), ((4, 4), mesh, [Shard(0)]), ((8, 2), mesh, [Shard(0)])])
    groups = [{"params": [params[0], params[2]], "lr": 0.1}, {"params": [params[1]], "lr": 0.2}]
    optimizer = torchlamb.Lamb(groups, max_grad_norm=1.0)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = None if i == 2 and step == 1 else like(torch.ones(p.shape), p)
        optimizer.param_groups[0]["params"][1].grad = None if step == 1 else like(torch.ones(params[2].shape), params[2])
        optimizer.step()
        made = dict(optimizer._plan.selections)
        if step == 0:
            first = made
    params[1].grad = like(torch.ones(params[1].shape), params[1])
    optimizer.step()
    assert made.keys() >= first.keys()
    assert all(made[key] is first[key] for key in first)
    assert all(isinstance(value, slice | torch.Tensor) for value in made.values())


@case(2, 3, 4, each={"sum": "sum", "avg": "avg"})
def partial_gradients_are_added_in_one_collective(world: int, reduce_op: str) -> None:
    mesh, rank = mesh_of(world), dist.get_rank()
    params = random_params(
        [((6,), mesh, [Replicate()]), ((3, 4), mesh, [Replicate()]), ((8, 2), mesh, [Shard(0)]), ((5,), mesh, [Shard(0)])]
    )
    twins = Twins([{"params": params}], lr=0.05, weight_decay=0.1)
    for step in range(3):
        for i, p in enumerate(params):
            part = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + 10 * i + rank))
            # The third is sharded and its gradient a whole sum; the last one's is whole and only has to be cut.
            placement = Partial(reduce_op) if i < 3 else Replicate()
            part = part if i < 3 else torch.ones(p.shape)
            p.grad = DTensor.from_local(part, mesh, [placement], run_check=False)
        kept = [p.grad.to_local().clone() for p in params]
        with collectives(2):
            twins.optimizer.step()
        assert all(torch.equal(p.grad.to_local(), old) for p, old in zip(params, kept, strict=True))
        for p, twin in zip(params, twins.twins, strict=True):
            twin.grad = whole(p.grad)
        twins.twin.step()
    twins.assert_same()


@case(2)
def gradients_that_are_still_on_their_way_are_waited_for(world: int) -> None:
    mesh = mesh_of(world)
    params = random_params([((8, 3), mesh, [Shard(0)]), ((4,), mesh, [Replicate()])])
    twins = Twins([{"params": params}], lr=0.1)
    for p in params:
        part = torch.ones(p.to_local().shape) * (dist.get_rank() + 1)
        running = funcol.all_reduce(part, "sum", mesh.get_group())
        assert isinstance(running, funcol.AsyncCollectiveTensor)
        p.grad = DTensor(running, p._spec, requires_grad=False)
    twins.optimizer.step()
    for p, twin in zip(params, twins.twins, strict=True):
        twin.grad = torch.full(p.shape, 3.0)
    twins.twin.step()
    twins.assert_same()


# The guard


@case(2, 3, 4, each={"single": {}, "foreach": {"foreach": True}, "capturable": {"capturable": True}})
def one_bad_shard_skips_the_step_everywhere(world: int, options: dict[str, Any]) -> None:
    for bad in (torch.nan, torch.inf, 1e30):
        for guard in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
            params = random_params(layouts(world))
            optimizer = torchlamb.Lamb(params, lr=0.1, **guard, **options)
            for step in range(3):
                before = [whole(p) for p in params]
                for p in params:
                    p.grad = like(torch.ones(p.shape), p)
                if step == 1 and dist.get_rank() == world - 1:
                    params[0].grad.to_local()[0, 0] = bad
                optimizer.step()
                assert optimizer.skipped_steps.item() == min(step, 1)
                assert optimizer.nonfinite_parameters() == [0] * min(step, 1)
                for p, old in zip(params, before, strict=True):
                    assert (p.numel() == 0 or not torch.equal(whole(p), old)) == (step != 1 or p.numel() == 0)
            assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


@case(2, 3, 4, each={"single": {}, "foreach": {"foreach": True}, "capturable": {"capturable": True}})
def a_parameter_that_is_not_finite_stays_everywhere(world: int, options: dict[str, Any]) -> None:
    """Also on processes that have none of what is not finite, or no gradient of it."""
    params = random_params(layouts(world))
    optimizer = torchlamb.Lamb(params, lr=0.1, skip_nonfinite=True, **options)
    if dist.get_rank() == world - 1:
        params[0].detach().to_local()[0, 0] = torch.inf
    for step in range(1, 4):
        before = [whole(p) for p in params]
        for i, p in enumerate(params):
            p.grad = None if i == 0 and step == 3 and dist.get_rank() == 0 else like(torch.ones(p.shape), p)
        optimizer.step()
        for i, (p, old) in enumerate(zip(params, before, strict=True)):
            assert p.numel() == 0 or torch.equal(whole(p), old) == (i == 0)
        assert optimizer.skipped_steps.item() == step
        assert optimizer.nonfinite_parameters() == [0]


@case(2, 3, 4)
def found_inf_is_made_global(world: int) -> None:
    params = random_params(layouts(world))
    optimizer = torchlamb.Lamb(params, lr=0.1)
    before = [whole(p) for p in params]
    for p in params:
        p.grad = like(torch.ones(p.shape), p)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(dist.get_rank() == world - 1))
    optimizer.step()
    assert all(torch.equal(whole(p), old) for p, old in zip(params, before, strict=True))
    assert optimizer.skipped_steps.item() == 1
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert not torch.equal(whole(params[0]), before[0])


@case(2, 3, 4)
def a_process_without_gradients_takes_part(world: int) -> None:
    for options in ({}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "capturable": True}):
        params = random_params([((8, 3), mesh_of(world), [Shard(0)]), ((4, 4), None, None)])
        optimizer = torchlamb.Lamb(params, lr=0.1, **options)
        for value in (1.0, torch.inf, 1.0):
            for p in params:
                p.grad = None if dist.get_rank() == 0 else like(torch.full(p.shape, value), p)
            optimizer.step()
