"""What the processes of `test_sharding.py` run: every case of one world size, in one process group.

Each case is a function of the world size that raises if it fails. Sharded parameters are compared with a twin: the same numbers
in whole tensors, stepped by the same optimizer with the whole gradients. That the twin follows the rule is shown elsewhere,
against the float64 reference.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.checkpoint as dcp
from cases import INTERPRETED, interpret
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import torchlamb
from torchlamb import checkpoint
from torchlamb.mindspore import nn as front
from torchlamb.noise_scale import NoiseScale
from torchlamb.sharding.layout import local

Case = Callable[[int], None]
CASES: dict[str, tuple[Case, tuple[int, ...]]] = {}
SLOW: set[str] = set()  # those that `make test` leaves out
TIMEOUT = 300  # seconds a collective waits for the others

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "decay": {"weight_decay": 0.1},
    "foreach": {"foreach": True, "weight_decay": 0.1},
    "capturable": {"capturable": True},
    "bounds": {"phi_bounds": (0.5, 3.0), "trust_ratio_bounds": (0.1, 1.0)},
    "guard": {"max_grad_norm": 0.25},
    "guard-foreach": {"max_grad_norm": 0.25, "foreach": True},
    "guard-capturable": {"max_grad_norm": 0.25, "capturable": True},
}

BF16 = torch.bfloat16
STORAGE: dict[str, dict[str, Any]] = {
    "masters": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True},
    "bf16-state": {"state_dtype": BF16},
    "masters-bf16-state": {"master_weights": True, "state_dtype": BF16},
    "stochastic-bf16-state": {"stochastic_rounding": True, "state_dtype": BF16},
}


def case(
    *worlds: int, each: dict[str, Any] | None = None, slow: Callable[[str], bool] = lambda _: False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a case for these world sizes, once for each entry of `each`, whose value it is then given too."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__
        if each is None:
            CASES[name] = (function, worlds)
        for key, value in (each or {}).items():
            CASES[f"{name}[{key}]"] = (lambda world, value=value: function(world, value), worlds)
            if slow(key):
                SLOW.add(f"{name}[{key}]")
        return function

    return register


# Comparing with whole tensors


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def assert_close(got: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-6) -> None:
    wide = torch.promote_types(wanted.dtype, torch.float64)
    error = (got.to(wide) - wanted.to(wide)).norm() / (wanted.to(wide).norm() or 1.0)
    assert error <= tolerance, f"{what}: off by {error:.3g}"


class Twins:
    """Sharded parameters, and the same ones whole."""

    def __init__(
        self, groups: list[dict[str, Any]], make: Callable[..., torch.optim.Optimizer] = torchlamb.Lamb, **options: Any
    ):
        self.params = [p for group in groups for p in group["params"]]
        self.twins = [nn.Parameter(whole(p)) for p in self.params]
        twins = iter(self.twins)
        whole_groups = [{**group, "params": [next(twins) for _ in group["params"]]} for group in groups]
        self.optimizer, self.twin = make(groups, **options), make(whole_groups, **options)

    def step(self) -> None:
        """Step both with the gradients that the sharded parameters have."""
        for p, twin in zip(self.params, self.twins, strict=True):
            twin.grad = None if p.grad is None else whole(p.grad)
        self.optimizer.step()
        self.twin.step()

    def assert_same(self, tolerance: float = 1e-6) -> None:
        for i, (p, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            assert_close(whole(p), twin.detach(), f"parameter {i}", tolerance)
            assert (self.optimizer.state[p].keys()) == self.twin.state[twin].keys()
            for name, value in self.optimizer.state[p].items():
                assert_close(whole(value), self.twin.state[twin][name], f"{name} of parameter {i}", tolerance)
        ratios, wanted = self.optimizer.trust_ratios(), self.twin.trust_ratios()
        assert ratios.keys() == wanted.keys()
        for key, ratio in ratios.items():
            assert_close(ratio, wanted[key], f"ratio of {key}", tolerance)


def step_with_random_grads(twins: Twins, step: int, dead: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(twins.params):
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * 10.0 ** (i % 3 - 1)
        p.grad = None if i in dead else like(grad, p)
    twins.step()


def like(full: Tensor, param: Tensor) -> Tensor:
    """Distribute a tensor that every process has as a parameter is."""
    if not isinstance(param, DTensor):
        return full
    return from_full(full, param.device_mesh, param.placements)


def from_full(full: Tensor, mesh: DeviceMesh, placements: Any) -> DTensor:
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def random_params(
    mesh_and_placements: list[tuple[tuple[int, ...], DeviceMesh | None, Any]], dtype=torch.float32
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    fulls = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape, _, _ in mesh_and_placements]
    return [
        nn.Parameter(full if mesh is None else from_full(full, mesh, placements))
        for full, (_, mesh, placements) in zip(fulls, mesh_and_placements, strict=True)
    ]


MESHES: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(*shape: int) -> DeviceMesh:
    if shape not in MESHES:
        MESHES[shape] = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])
    return MESHES[shape]


def layouts(world: int) -> list[tuple[tuple[int, ...], DeviceMesh | None, Any]]:
    """Shards of every kind: even, uneven, empty, 0-dim, on another dim, replicated, plain, on two meshes."""
    flat = mesh_of(world)
    found: list[tuple[tuple[int, ...], DeviceMesh | None, Any]] = [
        ((12, 5), flat, [Shard(0)]),
        ((7, 3), flat, [Shard(0)]),
        ((1, 6), flat, [Shard(0)]),
        ((0, 4), flat, [Shard(0)]),
        ((3, 5), flat, [Shard(1)]),
        ((5,), flat, [Shard(0)]),
        ((4, 2), flat, [Replicate()]),
        ((), flat, [Replicate()]),
        ((6, 4), None, None),
    ]
    if world == 4:
        square = mesh_of(2, 2)
        found += [
            ((6, 5), square, [Replicate(), Shard(0)]),
            ((5, 6), square, [Shard(0), Replicate()]),
            ((8, 6), square, [Shard(0), Shard(1)]),
            ((9, 2), square, [Shard(0), Shard(0)]),
        ]
    return found


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


# What the step communicates


@contextmanager
def collectives(expected: int) -> Iterator[None]:
    with CommDebugMode() as mode:
        yield
    assert mode.get_total_counts() == expected, f"{mode.get_total_counts()} collectives: {mode.get_comm_counts()}"


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


# Real models


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.out = nn.Linear(8, 3)  # fewer rows than some worlds have processes

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.out(x)


def train(model: nn.Module, twins: Twins, steps: int = 5, same_data: bool = False) -> None:
    for step in range(steps):
        seed = step if same_data else 100 * step + dist.get_rank()
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 10, (4, 4), generator=generator)
        labels = torch.randint(0, 3, (4, 4), generator=generator)
        model.zero_grad()
        logits = model(tokens)
        logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()
        twins.step()


FSDP: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed-precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "cpu-offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "other-dim": {
        "shard_placement_fn": lambda p: Shard(1) if p.dim() == 2 and p.shape[1] % dist.get_world_size() == 0 else Shard(0)
    },
}


def fsdp(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


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


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "out": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


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


@case(2, each=SCALED)
def an_overflow_of_one_process_under_fsdp2(world: int, options: dict[str, Any]) -> None:
    """The shard of one process has one inf: both leave every bit, halve the scale, and train as if that step had not been."""
    assert_overflows_of_either_process_change_nothing(lambda: fsdp(Net(), mesh_of(world)), options)


@case(2, each=SCALED)
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


# What is refused


@contextmanager
def raises(kind: type[Exception], words: str, params: list[Tensor]) -> Iterator[None]:
    before = [whole(p) for p in params]
    with pytest.raises(kind, match=words):
        yield
    assert all(torch.equal(whole(p), old) for p, old in zip(params, before, strict=True))


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
    params = list(model.parameters())
    for guard in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        with raises(NotImplementedError, "clip_grad_norm_", params):
            ZeroRedundancyOptimizer(params, torchlamb.Lamb, **guard)
    for group in optimizer.param_groups:
        group["skip_nonfinite"] = True
    with raises(NotImplementedError, "clip_grad_norm_", params):
        optimizer.step()


@case(2, each={"flat": False, "original": True})
def fsdp1_is_refused(_: int, use_orig_params: bool) -> None:
    model = FullyShardedDataParallel(Net(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with raises(NotImplementedError, "fully_shard", []):
        torchlamb.Lamb(model.parameters())


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


# Distributed checkpoints


def make_on(processes: int, mesh: DeviceMesh, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, torchlamb.Lamb]:
    model = Net().to(dtype)
    if processes > 1:
        fsdp(model, mesh)
    groups = torchlamb.param_groups(model, weight_decay=0.1)
    return model, torchlamb.Lamb(groups, lr=0.05, **options)


def step_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = like(torch.randn(p.shape, generator=generator).to(p.dtype), p)
        optimizer.step()
    model.zero_grad()


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name: whole(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name}.{key}": whole(value) for key, value in optimizer.state[p].items()}
    return found


def assert_states(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert value.dtype == wanted[name].dtype, f"{name} is {value.dtype}"
        if tolerance == 0.0:
            assert torch.equal(value, wanted[name]), name
        assert_close(value, wanted[name], name, tolerance)


CHECKPOINTS = {
    "plain": (torch.float32, {}, {}),
    "flattened": (torch.float32, {"flatten_optimizer_state_dict": True}, {}),
    "bfloat16": (torch.bfloat16, {}, {}),
    "guard": (torch.float32, {"flatten_optimizer_state_dict": True}, {"max_grad_norm": 1.0, "foreach": True}),
    **{name: (BF16, {}, storage) for name, storage in STORAGE.items()},
    "float16-masters": (torch.float16, {}, STORAGE["masters"]),
    "float32-bf16-state": (torch.float32, {}, STORAGE["bf16-state"]),
    "masters-flattened": (BF16, {"flatten_optimizer_state_dict": True}, STORAGE["masters-bf16-state"]),
    "stochastic-flattened": (BF16, {"flatten_optimizer_state_dict": True}, STORAGE["stochastic-bf16-state"]),
}


@case(4, each=CHECKPOINTS, slow=lambda key: key not in ("flattened", "masters-bf16-state"))
def checkpoints_are_resumed_on_other_numbers_of_processes(
    _: int, kind: tuple[torch.dtype, dict[str, bool], dict[str, Any]]
) -> None:
    """Saved by 1 and by 2 processes after 3 steps, resumed by 1, 2, 3 and 4, which step 3 times more."""
    dtype, keywords, options = kind
    rank, state_options = dist.get_rank(), StateDictOptions(**keywords)
    meshes = {n: DeviceMesh("cpu", list(range(n))) for n in (1, 2, 3, 4)}
    folders = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folders)

    def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(model, options=state_options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=state_options),
        }

    uninterrupted: dict[int, dict[str, Tensor]] = {}
    for saving in (1, 2):
        path = f"{folders[0]}/{saving}"
        saved: dict[str, Tensor] = {}
        if rank < saving:
            model, optimizer = make_on(saving, meshes[saving], dtype, **options)
            step_on(model, optimizer, range(3))
            saved = whole_state(model, optimizer)
            dcp.save(state_of(model, optimizer), checkpoint_id=path, process_group=meshes[saving].get_group())
            step_on(model, optimizer, range(3, 6))
            uninterrupted[saving] = whole_state(model, optimizer)
        shared = [(saved, uninterrupted.get(saving))]
        dist.broadcast_object_list(shared)
        saved, wanted = shared[0]
        for resuming in (1, 2, 3, 4):
            if rank < resuming:
                model, optimizer = make_on(resuming, meshes[resuming], dtype, **options)
                state = state_of(model, optimizer)  # takes torch's hidden step
                dcp.load(state, checkpoint_id=path, process_group=meshes[resuming].get_group())
                set_model_state_dict(model, state["model"], options=state_options)
                set_optimizer_state_dict(model, optimizer, state["optimizer"], options=state_options)
                assert_states(whole_state(model, optimizer), saved, 0.0)
                step_on(model, optimizer, range(3, 6))
                exact = resuming == saving
                assert_states(whole_state(model, optimizer), wanted, 0.0 if exact else 1e-6 if dtype == torch.float32 else 4e-3)
            dist.barrier()


@case(2)
def whole_state_dicts_are_sharded_and_back(world: int) -> None:
    """Through full state dicts, without files: from whole parameters to shards and to whole ones again."""
    mesh, full = mesh_of(world), StateDictOptions(full_state_dict=True)

    def copied(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=full))  # loading shares tensors, as in torch

    whole_model, whole_optimizer = make_on(1, mesh, torch.float32)
    step_on(whole_model, whole_optimizer, range(3))
    model, optimizer = make_on(world, mesh, torch.float32)
    set_model_state_dict(model, copy.deepcopy(get_model_state_dict(whole_model, options=full)), options=full)
    set_optimizer_state_dict(model, optimizer, copied(whole_model, whole_optimizer), options=full)
    assert_states(whole_state(model, optimizer), whole_state(whole_model, whole_optimizer), 0.0)
    step_on(model, optimizer, range(3, 6))
    again, again_optimizer = make_on(1, mesh, torch.float32)
    set_model_state_dict(again, copy.deepcopy(get_model_state_dict(model, options=full)), options=full)
    set_optimizer_state_dict(again, again_optimizer, copied(model, optimizer), options=full)
    assert_states(whole_state(again, again_optimizer), whole_state(model, optimizer), 0.0)
    step_on(whole_model, whole_optimizer, range(3, 6))
    assert_states(whole_state(again, again_optimizer), whole_state(whole_model, whole_optimizer), 1e-6)


@case(2)
def a_float32_checkpoint_is_gone_on_with_in_bf16(world: int) -> None:
    """The file has no masters: they start from the loaded parameters, not from those of torch's hidden step."""
    mesh, folders = mesh_of(world), [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    model, optimizer = make_on(world, mesh, torch.float32)
    step_on(model, optimizer, range(3))
    dcp.save(
        {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)},
        checkpoint_id=folders[0],
    )
    low, masters = make_on(world, mesh, BF16, master_weights=True)
    state = {"model": get_model_state_dict(low), "optimizer": get_optimizer_state_dict(low, masters)}
    dcp.load(state, checkpoint_id=folders[0], planner=DefaultLoadPlanner(allow_partial_load=True))
    set_model_state_dict(low, state["model"])
    set_optimizer_state_dict(low, masters, state["optimizer"])
    for group in masters.param_groups:
        assert group["master_weights"]
        group["lr"] = 0.0
    step_on(low, masters, range(1))
    for p, q in zip(model.parameters(), low.parameters(), strict=True):
        assert torch.equal(whole(q), whole(p).to(BF16))
        assert torch.equal(whole(masters.state[q]["master"]), whole(p).to(BF16).float())


@case(2)
def the_hidden_step_of_a_checkpoint_moves_nothing(world: int) -> None:
    """With zero gradients and an lr of 0, also where the front's learning rate is dynamic; every parameter has a state then."""
    makes: list[Any] = [
        lambda model: torchlamb.Lamb(model.parameters(), weight_decay=0.1),
        lambda model: torchlamb.Lamb(model.parameters(), weight_decay=0.1, max_grad_norm=1.0),
        lambda model: torchlamb.Lamb(model.parameters(), lr=torch.tensor(0.1), capturable=True),
        lambda model: front.Lamb(front.trainable_params(model), front.ExponentialDecayLR(0.1, 0.9, 2), weight_decay=0.1),
    ]
    for make in makes:
        model = fsdp(Net(), mesh_of(world))
        optimizer = make(model)
        before = {name: whole(p) for name, p in model.named_parameters()}
        lrs = [float(group["lr"]) for group in optimizer.param_groups]
        state = get_optimizer_state_dict(model, optimizer)
        assert all(torch.equal(whole(p), before[name]) for name, p in model.named_parameters())
        assert all(whole(value).isfinite().all() for entry in state["state"].values() for value in entry.values())
        assert state["state"].keys() == before.keys()
        assert [float(group["lr"]) for group in optimizer.param_groups] == lrs


@case(2)
def the_front_resumes_its_learning_rate(world: int) -> None:
    def make() -> tuple[nn.Module, front.Lamb]:
        model = fsdp(Net(), mesh_of(world))
        return model, front.Lamb(front.trainable_params(model), [0.1, 0.2, 0.3, 0.4, 0.5])

    model, optimizer = make()
    step_on(model, optimizer, range(3))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))  # loading shares tensors, as in torch
    resumed, resumed_optimizer = make()
    set_model_state_dict(resumed, get_model_state_dict(model))
    set_optimizer_state_dict(resumed, resumed_optimizer, state)
    assert resumed_optimizer.global_step == 3
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        step_on(m, o, range(3, 5))
    assert_states(whole_state(resumed, resumed_optimizer), whole_state(model, optimizer), 0.0)


# torchlamb.checkpoint


def shared_folder() -> Path:
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    return Path(str(folders[0]))


def damaged(content: bytes) -> Iterator[bytes]:
    """Yield it with one byte flipped, or cut off, at many places."""
    for at in range(0, len(content), max(1, len(content) // 12)):
        yield content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]
        yield content[:at]


LOAD_ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from sharded_cases import Net, checkpoint, torchlamb
model = Net()
optimizer = torchlamb.Lamb(torchlamb.param_groups(model, weight_decay=0.1), max_grad_norm=1.0)
assert checkpoint.load(sys.argv[2], model, optimizer) == {"step": 3}
state = {n: p.detach() for n, p in model.named_parameters()}
state |= {f"{n}.{k}": v for n, p in model.named_parameters() for k, v in optimizer.state[p].items()}
torch.save(state, sys.argv[3])
"""


@case(2)
def runs_are_saved_in_folders_and_the_newest_good_one_is_loaded(world: int) -> None:
    """By the same processes, and by one alone; damage to any file of a folder is seen."""
    folder, mesh = shared_folder(), mesh_of(world)
    model, optimizer = make_on(world, mesh, torch.float32, max_grad_norm=1.0)
    step_on(model, optimizer, range(3))
    first, wanted = checkpoint.save(folder, model, optimizer, step=3), whole_state(model, optimizer)
    step_on(model, optimizer, range(3, 6))
    second, ended = checkpoint.save(folder, model, optimizer, step=6), whole_state(model, optimizer)
    assert checkpoint.newest(folder) == second
    assert checkpoint.more_of(second) == {"step": 6}
    dist.barrier()
    if dist.get_rank() == 0:
        for file in second.iterdir():
            content = file.read_bytes()
            for bad in damaged(content):
                file.write_bytes(bad)
                assert checkpoint.newest(folder) == first, file
            file.unlink()
            assert checkpoint.newest(folder) == first, file
            file.write_bytes(content)
        assert checkpoint.newest(folder) == second
        shard = next(second.glob("__1_*"))
        shard.write_bytes(shard.read_bytes()[:-1])
        alone = subprocess.run(
            [sys.executable, "-c", LOAD_ALONE, str(Path(__file__).parent), str(first), str(folder / "alone")],
            env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
            timeout=TIMEOUT,
            capture_output=True,
            text=True,
        )
        assert alone.returncode == 0, alone.stderr
        assert_states(torch.load(folder / "alone"), wanted, 0.0)
    dist.barrier()
    model, optimizer = make_on(world, mesh, torch.float32, max_grad_norm=1.0)
    with pytest.warns(UserWarning, match=f"{second.name} is damaged: the checksum of its __1_0.distcp"):
        assert checkpoint.load(folder, model, optimizer) == {"step": 3}
    assert_states(whole_state(model, optimizer), wanted, 0.0)
    step_on(model, optimizer, range(3, 6))
    assert_states(whole_state(model, optimizer), ended, 0.0)


@case(2)
def saving_does_not_step_and_loading_takes_what_there_is(world: int) -> None:
    """Before the first step, without state of some parameters, with gradients set, and with a guard that is switched on."""
    mesh = mesh_of(world)
    for steps, options in ((0, {"eps": 0.0}), (2, {}), (2, {"max_grad_norm": 1.0}), (2, {"optimizer": torch.optim.AdamW})):
        folder, kind = shared_folder(), options.pop("optimizer", torchlamb.Lamb)
        runs = []
        for _ in range(2):
            model = Net()
            fsdp(model, mesh)
            runs.append((model, kind(model.parameters(), lr=0.05, **options)))
        (model, optimizer), (other, resumed) = runs
        for step in range(steps):
            step_on_some(model, optimizer, step)
        before = whole_state(model, optimizer)
        checkpoint.save(folder, model, optimizer, step=steps)
        assert_states(whole_state(model, optimizer), before, 0.0)
        for p in other.parameters():
            p.grad = like(torch.ones(p.shape), p)
        for group in resumed.param_groups if kind is torchlamb.Lamb else ():
            group["skip_nonfinite"] = True
        assert checkpoint.load(folder, other, resumed) == {"step": steps}
        assert_states(whole_state(other, resumed), before, 0.0)
        for m, o in runs:
            step_on_some(m, o, 9)
        assert_states(whole_state(other, resumed), whole_state(model, optimizer), 0.0)


def step_on_some(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The norm never has a gradient."""
    generator = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        p.grad = None if "norm" in name else like(torch.randn(p.shape, generator=generator), p)
    optimizer.step()


@case(2)
def what_cannot_be_saved_or_loaded_raises_on_every_process(world: int) -> None:
    """A process whose disk is full, something that is no plain value, and another model: the last checkpoint stays good."""
    folder, mesh = shared_folder(), mesh_of(world)
    model, optimizer = make_on(world, mesh, torch.float32)
    step_on(model, optimizer, range(3))
    first, wanted = checkpoint.save(folder, model, optimizer, step=3), whole_state(model, optimizer)
    step_on(model, optimizer, range(3, 4))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match="could not be written to"):
            checkpoint.save(folder, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    with pytest.raises(TypeError, match="must be of tensors, numbers, strings"):
        checkpoint.save(folder, model, optimizer, bad=lambda: None)
    dist.barrier()
    assert [path.name for path in folder.iterdir()] == [first.name]
    other = Net()
    other.out = nn.Linear(8, 4)
    fsdp(other, mesh)
    with raises(ValueError, "'out.weight' has shape", list(other.parameters())):
        checkpoint.load(folder, other, torchlamb.Lamb(torchlamb.param_groups(other, weight_decay=0.1)))
    assert checkpoint.load(folder, model, optimizer) == {"step": 3}
    assert_states(whole_state(model, optimizer), wanted, 0.0)


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


def main() -> None:
    """Run all cases of this world and write what failed: {case: null or traceback}."""
    out = Path(sys.argv[1])
    wanted = sys.argv[2:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if INTERPRETED:
        interpret()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    results: dict[str, str | None] = {}
    for name, (function, worlds) in CASES.items():
        if world not in worlds or (wanted and name not in wanted):
            continue
        try:
            function(world)
            results[name] = None
        except (Exception, pytest.fail.Exception):
            results[name] = traceback.format_exc()
        (out / f"rank{rank}.json").write_text(json.dumps(results))
        dist.barrier()
    time.sleep(0.2)  # while gloo's threads let go of the last tensors: see examples/fsdp2.py
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
