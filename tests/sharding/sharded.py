"""What the cases of sharded parameters share: their list, parameters in all layouts, whole twins, and networks.

Each case is a function of the world size that raises if it fails. Sharded parameters are compared with a twin: the same numbers
in whole tensors, stepped by the same optimizer with the whole gradients. That the twin follows the rule is shown elsewhere,
against the float64 reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import torchlamb

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
    *worlds: int,
    each: dict[str, Any] | None = None,
    slow: Callable[[str], bool] = lambda _: False,
    into: dict[str, tuple[Case, tuple[int, ...]]] = CASES,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a case for these world sizes, once for each entry of `each`, whose value it is then given too."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__
        if each is None:
            into[name] = (function, worlds)
            if slow(name):
                SLOW.add(name)
        for key, value in (each or {}).items():
            into[f"{name}[{key}]"] = (lambda world, value=value: function(world, value), worlds)
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


# What the step communicates


@contextmanager
def collectives(expected: int) -> Iterator[None]:
    with CommDebugMode() as mode:
        yield
    assert mode.get_total_counts() == expected, f"{mode.get_total_counts()} collectives: {mode.get_comm_counts()}"


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


def fsdp(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "out": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


# What is refused


@contextmanager
def raises(kind: type[Exception], words: str, params: list[Tensor]) -> Iterator[None]:
    before = [whole(p) for p in params]
    with pytest.raises(kind, match=words):
        yield
    assert all(torch.equal(whole(p), old) for p, old in zip(params, before, strict=True))


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
