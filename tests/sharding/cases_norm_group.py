"""Cases of processes that hold different parameters: one norm, one verdict, one scale for all of them (`Lamb.norm_group`)."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
import torch.distributed as dist
from sharded import Net, case, collectives, from_full, mesh_of, raises, whole
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Shard

import torchlamb
from torchlamb.sharding.norm_group import NormGroup

SHAPES = [(6, 4), (4,), (3, 5), (2, 2), (7,)]
GUARDS: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.5},
    "clipped-foreach": {"max_grad_norm": 0.5, "foreach": True},
    "clipped-capturable": {"max_grad_norm": 0.5, "capturable": True},
    "skip": {"skip_nonfinite": True},
}
QUICK = ("clipped", "skip")


def numbers(shape: tuple[int, ...], *seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash(seed) % 2**31))


class Stage:
    """Parameters of which each process has its own, beside an optimizer over all of them on one process."""

    def __init__(self, mine: list[int], all_of_them: list[nn.Parameter], **options: Any) -> None:
        self.mine, self.twins = mine, all_of_them
        self.params = {i: nn.Parameter(all_of_them[i].detach().clone()) for i in mine}
        self.optimizer = torchlamb.Lamb(self.params.values(), lr=0.05, weight_decay=0.1, **options)
        self.wanted = torchlamb.Lamb(all_of_them, lr=0.05, weight_decay=0.1, **options)

    def step(self, grads: dict[int, Tensor]) -> None:
        for i, twin in enumerate(self.twins):
            twin.grad = grads.get(i)
            if i in self.params:
                self.params[i].grad = None if twin.grad is None else twin.grad.clone()
        self.optimizer.step()
        self.wanted.step()

    def assert_same(self, tolerance: float = 1e-6) -> None:
        for i, p in self.params.items():
            error = (p - self.twins[i]).norm() / self.twins[i].norm()
            assert error <= tolerance, f"parameter {i}: off by {error:.3g}"


def all_params(world: int) -> list[nn.Parameter]:
    return [nn.Parameter(numbers(shape, 0, rank, i)) for rank in range(world) for i, shape in enumerate(SHAPES)]


def stage_of(number: int) -> list[int]:
    return [number * len(SHAPES) + i for i in range(len(SHAPES))]


def own() -> list[int]:
    return stage_of(dist.get_rank())


@case(2, 3, 4, each=GUARDS, slow=lambda key: key not in QUICK)
def stages_of_a_pipeline(world: int, options: dict[str, Any]) -> None:
    stage = Stage(own(), all_params(world), **options)
    stage.optimizer.norm_group = dist.group.WORLD
    for step in range(6):
        grads = {i: 10.0 ** (i % 3 - 1) * numbers(tuple(p.shape), step, i) for i, p in enumerate(stage.twins)}
        if step == 2:
            grads[len(SHAPES) + 1][0] = torch.inf  # of the second process only
        if step == 4:  # one process has no gradients, and takes part
            grads = {i: grad for i, grad in grads.items() if i >= len(SHAPES)}
        stage.step(grads)
        if step == 2:
            said = stage.optimizer.nonfinite_parameters()
            assert said == ([1] if dist.get_rank() == 1 else []), said
    stage.assert_same()
    assert stage.optimizer.skipped_steps.item() == stage.wanted.skipped_steps.item() == 1


@case(2, 3)
def without_the_group_each_process_clips_by_its_own_norm(world: int) -> None:
    stage = Stage(own(), all_params(world), max_grad_norm=0.5)
    for step in range(4):  # large ones of the second process, every other time
        large = {1: 100.0} if step % 2 else {}
        stage.step({i: large.get(i // len(SHAPES), 1.0) * numbers(tuple(p.shape), step, i) for i, p in enumerate(stage.twins)})
    off = max(float((p - stage.twins[i]).norm()) for i, p in stage.params.items())
    assert off > 1e-4, "the cases here could not fail"


@case(2)
def tied_embeddings_count_once(world: int) -> None:
    twins = all_params(world)
    last = [len(twins), len(twins) + 1]
    twins += [nn.Parameter(numbers((5, 3), 9)), nn.Parameter(numbers((4,), 8))]
    stage = Stage([*own(), *last], twins, max_grad_norm=0.5)
    stage.optimizer.set_norm_group(dist.group.WORLD, held_by={stage.params[i]: world for i in last})
    for step in range(5):
        stage.step({i: numbers(tuple(p.shape), step, i) for i, p in enumerate(twins)})
    stage.assert_same()


@case(2, 4)
def a_pipeline_of_sharded_stages(world: int) -> None:
    """Two stages, each over half of the processes: the group of one process of each stage."""
    rank, half = dist.get_rank(), world // 2
    stages = [dist.new_group(list(range(i * half, (i + 1) * half))) for i in range(2)]
    pipelines = [dist.new_group([i, half + i]) for i in range(half)]
    assert len(stages) == 2
    mesh = torch.distributed.device_mesh.DeviceMesh.from_group(stages[rank // half], "cpu")
    for everything in (False, True):  # shards count once, too, where all of them are in the group
        twins = all_params(2)
        params = {i: nn.Parameter(from_full(twins[i].detach().clone(), mesh, [Shard(0)])) for i in stage_of(rank // half)}
        optimizer = torchlamb.Lamb(params.values(), lr=0.05, weight_decay=0.1, max_grad_norm=0.5)
        optimizer.norm_group = dist.group.WORLD if everything else pipelines[rank % half]
        wanted = torchlamb.Lamb(twins, lr=0.05, weight_decay=0.1, max_grad_norm=0.5)
        for step in range(5):
            for i, twin in enumerate(twins):
                twin.grad = numbers(tuple(twin.shape), step, i)
                if i in params:
                    params[i].grad = from_full(twin.grad, mesh, [Shard(0)])
            with collectives((2 if half > 1 else 0) + 1):
                optimizer.step()
            wanted.step()
        for i, p in params.items():
            assert (whole(p) - twins[i]).norm() <= 1e-6 * twins[i].norm(), i


@case(2, 4)
def ignored_parameters_of_fsdp2(world: int) -> None:
    """Experts that each process has its own of, beside shards: those count once, though all processes know their sum."""
    model, twin = Net(), Net()
    ignored = set(list(model.parameters())[-2:])
    places = [i for i, p in enumerate(model.parameters()) if p in ignored]
    fully_shard(model, mesh=mesh_of(world), ignored_params=ignored)
    params = list(model.parameters())
    optimizer = torchlamb.Lamb(params, lr=0.05, max_grad_norm=0.5)
    optimizer.norm_group = dist.group.WORLD
    shared = [p for i, p in enumerate(twin.parameters()) if i not in places]
    experts = [[nn.Parameter(p.detach().clone()) for i, p in enumerate(twin.parameters()) if i in places] for _ in range(world)]
    wanted = torchlamb.Lamb([*shared, *(p for ps in experts for p in ps)], lr=0.05, max_grad_norm=0.5)
    for step in range(5):
        for i, p in enumerate(shared):
            p.grad = numbers(tuple(p.shape), step, i)
        for rank, ps in enumerate(experts):
            for i, p in enumerate(ps):
                p.grad = numbers(tuple(p.shape), step, 100 + rank, i)
        rest, mine = iter(shared), iter(experts[dist.get_rank()])
        for i, p in enumerate(params):
            q = next(mine if i in places else rest)
            p.grad = q.grad.clone() if i in places else from_full(q.grad, p.device_mesh, p.placements)
        optimizer.step()
        wanted.step()
    rest, mine = iter(shared), iter(experts[dist.get_rank()])
    for i, p in enumerate(params):
        q = next(mine if i in places else rest)
        assert (whole(p) - q).norm() <= 1e-6 * q.norm(), i


@case(2, 4)
def experts_beside_what_all_have(world: int) -> None:
    """Plain tensors: nothing tells that all but the experts are the same everywhere, so somebody says it."""
    twins = all_params(world)
    first = len(twins)
    twins += [nn.Parameter(numbers((5, 3), 9)), nn.Parameter(numbers((4,), 8))]
    stage = Stage([*own(), first, first + 1], twins, skip_nonfinite=True, max_grad_norm=0.25)
    stage.optimizer.set_norm_group(dist.group.WORLD, {stage.params[i]: world for i in (first, first + 1)})
    for step in range(5):
        stage.step({i: numbers(tuple(p.shape), step, i) for i, p in enumerate(twins)})
    stage.assert_same()


@case(2, 3)
def found_inf_of_one_stage_skips_all(world: int) -> None:
    stage = Stage(own(), all_params(world), fused=True)
    stage.optimizer.norm_group = dist.group.WORLD
    before = [p.detach().clone() for p in stage.params.values()]
    for p in stage.params.values():
        p.grad = torch.ones_like(p)
    stage.optimizer.grad_scale, stage.optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(dist.get_rank() == 1))
    with collectives(1):
        stage.optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(stage.params.values(), before, strict=True))


@case(4)
def replicas_of_flat_parameters_count_once(world: int) -> None:
    """HYBRID_SHARD beside an expert that each process has its own of."""
    model = nn.Linear(4, 4, bias=False)
    nn.init.ones_(model.weight)
    sharded = FullyShardedDataParallel(
        model, sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh_of(2, 2), device_id=torch.device("cpu")
    )
    torchlamb.shard.fsdp1(sharded)
    expert = nn.Parameter(torch.ones(3))
    optimizer = torchlamb.Lamb([*sharded.parameters(), expert], max_grad_norm=1.0)
    optimizer.norm_group = dist.group.WORLD
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    seen = []
    add = NormGroup.add

    def watched(self: NormGroup, sq_norm: torch.Tensor, found_inf: torch.Tensor | None) -> Any:
        seen.append(add(self, sq_norm, found_inf)[0].item())
        return torch.tensor(seen[-1]), found_inf

    NormGroup.add = watched
    try:
        optimizer.step()
    finally:
        NormGroup.add = add
    assert seen == [16.0 + 3.0 * world], seen


@case(2)
def scales_of_the_loss_may_differ(_: int) -> None:
    """Each stage's scaler backs off by what itself has found: norms are added once they are unscaled."""
    scale = [4.0, 2.0][dist.get_rank()]
    twins = [nn.Parameter(numbers((3, 2), rank)) for rank in range(2)]
    mine = nn.Parameter(twins[dist.get_rank()].detach().clone())
    optimizer, wanted = (torchlamb.Lamb(ps, lr=0.1, max_grad_norm=0.5, fused=True) for ps in ([mine], twins))
    optimizer.norm_group = dist.group.WORLD
    for step in range(3):
        for rank, twin in enumerate(twins):
            twin.grad = 10.0 ** (step * rank) * numbers((3, 2), step, rank)
        mine.grad = scale * twins[dist.get_rank()].grad
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.found_inf = torch.tensor(0.0) if dist.get_rank() else 0  # as scalers leave it where nothing has a gradient
        optimizer.step()
        wanted.step()
    assert (mine - twins[dist.get_rank()]).norm() <= 1e-6 * mine.norm()


@case(2, 3, each=GUARDS, slow=lambda key: key not in QUICK)
def zero_redundancy_optimizer_is_guarded(_: int, options: dict[str, Any]) -> None:
    """Its own group is found; nothing has to be set, and nothing of it gets into its groups."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, twin = Net(), Net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torchlamb.Lamb, lr=0.05, weight_decay=0.1, **options)
    wanted = torchlamb.Lamb(twin.parameters(), lr=0.05, weight_decay=0.1, **options)
    for step in range(6):
        for i, (p, q) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
            p.grad = numbers(tuple(p.shape), step, i)
            if step == 3 and i == 1:
                p.grad[0] = torch.nan
            q.grad = p.grad.clone()
        optimizer.step()
        wanted.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).norm() <= 1e-6 * q.norm()
    assert wanted.skipped_steps.item() == 1
    assert not any("norm_group" in group for group in optimizer.param_groups)


@case(2, slow=lambda _: True)
def a_compiled_step_has_one_norm(world: int) -> None:
    stage = Stage(own(), all_params(world), max_grad_norm=0.5, capturable=True)
    stage.optimizer.norm_group = dist.group.WORLD
    torch._dynamo.reset()
    step = torch.compile(stage.optimizer.step, backend="eager")
    stage.optimizer.step = step
    for i in range(3):
        stage.step({j: numbers(tuple(p.shape), i, j) for j, p in enumerate(stage.twins)})
    stage.assert_same()


@case(2)
def a_norm_group_is_no_option(world: int) -> None:
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = torchlamb.Lamb([p], max_grad_norm=1.0)
    optimizer.set_norm_group(dist.group.WORLD, held_by={p: world})
    assert optimizer.norm_group is dist.group.WORLD
    p.grad = torch.ones(3, 2)
    optimizer.step()
    assert "norm_group" not in str(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.norm_group is dist.group.WORLD
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.norm_group is None
    for bad, kind, words in [
        ({p: 0}, ValueError, "between 1 and the size"),
        ({p: world + 1}, ValueError, "between 1 and the size"),
        ({p: True}, TypeError, "an int for each parameter"),
        ({"weight": 2}, TypeError, "an int for each parameter"),
    ]:
        with raises(kind, words, [p]):
            optimizer.set_norm_group(dist.group.WORLD, held_by=bad)
    assert optimizer.norm_group is dist.group.WORLD
    for bad in (mesh_of(world), "world"):
        with raises(TypeError, "ProcessGroup", [p]):
            optimizer.norm_group = bad
    optimizer.set_norm_group(dist.group.WORLD, held_by={nn.Parameter(torch.ones(2)): 2})
    with raises(ValueError, "held_by names a parameter", [p]):
        optimizer.step()
    optimizer.norm_group = None
    assert optimizer.norm_group is None
