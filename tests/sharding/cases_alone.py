"""Cases of the optimizer alone: sharded parameters step as whole ones do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from sharded import (
    BF16,
    OPTIONS,
    STORAGE,
    Net,
    Twins,
    assert_close,
    case,
    from_full,
    fsdp,
    layouts,
    like,
    mesh_of,
    random_params,
    step_with_random_grads,
    tensor_parallel,
    whole,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import torchlamb
from torchlamb.sharding.layout import local

# The optimizer alone


@case(2, 3, 4, each=OPTIONS)
def random_numbers(world: int, options: dict[str, Any]) -> None:
    twins = Twins([{"params": random_params(layouts(world))}], lr=0.05, **options)
    for step in range(5):
        step_with_random_grads(twins, step)
    twins.assert_same()


@case(2, 3, 4, each={"bfloat16": torch.bfloat16, "float64": torch.float64, "complex64": torch.complex64})
def other_dtypes(world: int, dtype: torch.dtype) -> None:
    twins = Twins([{"params": random_params(layouts(world), dtype)}], lr=0.05, weight_decay=0.1)
    for step in range(5):
        step_with_random_grads(twins, step)
    # bfloat16: an ulp, where a sum falls on the other side of a rounding border.
    twins.assert_same({torch.float64: 1e-14, torch.bfloat16: 2e-3}.get(dtype, 1e-6))


BACKENDS = {f"{name}-{f}": {**s, "foreach": f} for name, s in STORAGE.items() for f in (None, False, True)}


@case(2, 3, 4, each=BACKENDS, slow=lambda key: not key.endswith("None"))
def low_precision(world: int, options: dict[str, Any]) -> None:
    twins = Twins([{"params": random_params(layouts(world), BF16)}], lr=0.05, weight_decay=0.1, **options)
    for step in range(5):
        step_with_random_grads(twins, step)
    for p in twins.params:
        for name, value in twins.optimizer.state[p].items():
            assert isinstance(value, DTensor) == (isinstance(p, DTensor) and name not in ("step", "seed")), name
    # Norms are added in another order, which may send a number to the other side of a rounding border.
    twins.assert_same(4e-3)


def assert_bitwise_same(twins: Twins) -> None:
    for i, (p, twin) in enumerate(zip(twins.params, twins.twins, strict=True)):
        assert torch.equal(whole(p), twin.detach()), f"parameter {i}"
        for name, value in twins.optimizer.state[p].items():
            assert torch.equal(whole(value), twins.twin.state[twin][name]), f"{name} of parameter {i}"


@case(2, 3, 4, each=BACKENDS, slow=lambda key: not key.startswith("stochastic-bf16-state"))
def rounding_is_that_of_whole_tensors(world: int, options: dict[str, Any]) -> None:
    """Without norms all arithmetic is by element, and what is left to differ is how it is rounded: nothing may."""
    flat = mesh_of(world)
    convolutions = [((3, 4, 2, 2), flat, [Shard(dim)]) for dim in range(3)]
    blocks = [((9, 4), flat, [Shard(0)]), ((6, 5), flat, [Shard(1)]), ((6, 2), None, None)]
    groups = [
        {"params": random_params([*layouts(world), *convolutions], BF16)},
        {"params": random_params(blocks, BF16), "blocks": 3},
    ]
    twins = Twins(groups, lr=0.05, weight_decay=0.1, layer_adaptation=False, **options)
    for step in range(5):
        step_with_random_grads(twins, step)
    assert_bitwise_same(twins)


@case(4, each={"dim-0": None, "dim-1": lambda p: Shard(1) if p.dim() == 2 else Shard(0)})
def rounding_under_fsdp2_over_tensor_parallelism(_: int, placement_fn: Any) -> None:
    mesh = mesh_of(2, 2)
    model = fsdp(tensor_parallel(Net().to(BF16), mesh["tp"]), mesh["dp"], shard_placement_fn=placement_fn)
    if placement_fn is None:
        assert any("Strided" in type(placement).__name__ for p in model.parameters() for placement in p.placements)
    groups = [{"params": list(model.parameters())}]
    twins = Twins(groups, lr=0.05, layer_adaptation=False, **STORAGE["stochastic-bf16-state"])
    for step in range(5):
        step_with_random_grads(twins, step)
    assert_bitwise_same(twins)


@case(
    2,
    3,
    4,
    each={
        "single": {"foreach": False},
        "foreach": {"foreach": True},
        "guard": {"max_grad_norm": 2.0**20},
        "stochastic": {"stochastic_rounding": True},
    },
)
def representable_numbers(world: int, options: dict[str, Any]) -> None:
    """Integers, gradients that are powers of two: all sums are exact, so the order of adding cannot matter."""
    generator = torch.Generator().manual_seed(0)
    params = random_params(layouts(world), BF16 if "stochastic_rounding" in options else torch.float32)
    for p in params:
        with torch.no_grad():
            p.copy_(like(torch.randint(-4, 5, p.shape, generator=generator).to(p.dtype), p))
    twins = Twins([{"params": params}], lr=0.5, betas=(0.5, 0.5), eps=0.0, weight_decay=0.5, **options)
    for p in params:
        signs = torch.randint(0, 2, p.shape, generator=generator) * 2.0 - 1
        p.grad = like((signs * 2.0 ** torch.randint(-3, 4, p.shape, generator=generator)).to(p.dtype), p)
    twins.step()
    for i, (p, twin) in enumerate(zip(params, twins.twins, strict=True)):
        assert torch.equal(whole(p), twin.detach()), f"parameter {i}"
    for key, ratio in twins.optimizer.trust_ratios().items():
        assert torch.equal(ratio, twins.twin.trust_ratios()[key]), f"ratio of {key}"


@case(2, 3, 4, each={"plain": {}, "foreach": {"foreach": True}, "guard": {"max_grad_norm": 0.25}})
def blocks_that_shards_cut_through(world: int, options: dict[str, Any]) -> None:
    flat = mesh_of(world)
    kinds: list[tuple[tuple[int, ...], DeviceMesh | None, Any]] = [
        ((9, 4), flat, [Shard(0)]),
        ((3, 4), flat, [Shard(0)]),
        ((6, 5), flat, [Shard(1)]),
        ((12,), flat, [Shard(0)]),
        ((6, 2), None, None),
    ]
    if world == 4:
        kinds += [((15, 2), mesh_of(2, 2), [Shard(0), Shard(0)]), ((6, 6), mesh_of(2, 2), [Shard(1), Shard(0)])]
    twins = Twins(
        [{"params": random_params(kinds), "blocks": 3}, {"params": random_params(layouts(world))}], lr=0.05, **options
    )
    for step in range(5):
        step_with_random_grads(twins, step)
    twins.assert_same()


@case(2, 4)
def several_groups(world: int) -> None:
    params = random_params(layouts(world))
    groups = [{"params": params[:4], "lr": 0.1}, {"params": params[4:], "weight_decay": 0.1, "layer_adaptation": True}]
    twins = Twins(groups, lr=0.05)
    for step in range(5):
        step_with_random_grads(twins, step)
    twins.assert_same()


@case(2, 3, 4)
def centralized_gradients(world: int) -> None:
    kinds = [
        ((6, 3, 2, 2), mesh_of(world), [Shard(0)]),
        ((5, 2, 3), mesh_of(world), [Replicate()]),
        ((4, 6), mesh_of(world), [Shard(1)]),
    ]
    twins = Twins([{"params": random_params(kinds)}], lr=0.05, grad_centralization=True)
    for step in range(3):
        step_with_random_grads(twins, step)
    twins.assert_same()


@case(2, 3, 4, each={"plain": {}, "foreach": {"foreach": True}})
def gradients_on_some_processes_only(world: int, options: dict[str, Any]) -> None:
    """A process without a gradient gives its part of the parameter's norm, no update, and keeps its shard, moments and step."""
    mesh, rank = mesh_of(world), dist.get_rank()
    params = random_params([((8, 3), mesh, [Shard(0)]), ((6, 2), mesh, [Shard(0)]), ((4, 4), mesh, [Shard(1)])])
    fulls = [whole(p) for p in params]
    optimizer = torchlamb.Lamb(params, lr=0.1, weight_decay=0.1, **options)
    masks = [from_full(torch.ones_like(full), mesh, p.placements) for full, p in zip(fulls, params, strict=True)]
    without = {0: {world - 1}, 1: set(range(world)), 2: {0}}  # by parameter: processes that have no gradient
    moments = [(torch.zeros_like(full), torch.zeros_like(full)) for full in fulls]
    for step in range(1, 4):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator)
            p.grad = None if rank in without[i] else like(grad, p)
            have = whole(
                DTensor.from_local(
                    masks[i].to_local() * (rank not in without[i]), mesh, p.placements, shape=p.shape, stride=p.stride()
                )
            )
            m, v = moments[i]
            m = torch.where(have > 0, 0.9 * m + 0.1 * grad, m)
            v = torch.where(have > 0, 0.999 * v + 0.001 * grad**2, v)
            update = have * (m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + 0.1 * fulls[i])
            norm = update.norm()
            ratio = fulls[i].norm() / norm if norm > 0 else 1.0
            fulls[i] = fulls[i] - 0.1 * ratio * update
            moments[i] = (m, v)
        optimizer.step()
    for i, (p, full) in enumerate(zip(params, fulls, strict=True)):
        assert_close(whole(p), full, f"parameter {i}", 2e-6)
        assert (len(optimizer.state[p]) == 0) == (rank in without[i])


@case(2)
def the_norm_of_shards_without_a_gradient_is_that_of_their_masters(world: int) -> None:
    mesh, rank = mesh_of(world), dist.get_rank()
    (param,) = random_params([((8, 6), mesh, [Shard(0)])], BF16)
    optimizer = torchlamb.Lamb([param], lr=0.1, master_weights=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        param_norm = whole(optimizer.state[param]["master"]).norm() if step else whole(param).float().norm()
        grad = like(torch.randn(param.shape, generator=generator).to(BF16), param)
        param.grad = grad if step == 0 or rank == 1 else None
        optimizer.step()
    if rank == 1:
        state, s = optimizer.state[param], (0.9, 0.999)
        m, v = local(state["exp_avg"]) / (1 - s[0] ** 2), local(state["exp_avg_sq"]) / (1 - s[1] ** 2)
        wanted = param_norm / (m / (v.sqrt() + 1e-6)).norm()
        assert_close(optimizer.trust_ratios()[0], wanted, "ratio")
