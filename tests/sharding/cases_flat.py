"""Cases of parameters that do not know themselves how they lie: FSDP1's flat ones, Megatron's parts, fragments."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from sharded import BF16, case, collectives, mesh_of, raises
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DeviceMesh, DTensor, Shard

import torchlamb
from torchlamb.sharding.layout import layout_of, told_of

# FSDP1 flattens no 0-dim parameters.
SHAPES = [[(12, 5), (12,), (7, 3)], [(1, 6), (3, 4, 2)], [(9, 4), (13,), (1,)]]
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")


Make = Callable[[tuple[int, ...]], Tensor]


class Unit(nn.Module):
    """Parameters whose gradients are what it is given."""

    def __init__(self, shapes: list[tuple[int, ...]], make: Make) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(make(shape)) for shape in shapes])

    def forward(self, grads: list[Tensor]) -> Tensor:
        return torch.stack([(p * g).sum() for p, g in zip(self.weights, grads, strict=True)]).sum()


class Units(nn.Module):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.units = nn.ModuleList([Unit(shapes, make) for shapes in SHAPES])

    def forward(self, grads: list[Tensor]) -> Tensor:
        rest = iter(grads)
        return torch.stack([unit(list(itertools.islice(rest, len(unit.weights)))) for unit in self.units]).sum()


def random_numbers(seed: int = 0) -> Make:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def integers() -> Make:
    generator = torch.Generator().manual_seed(0)
    return lambda shape: torch.randint(-4, 5, shape, generator=generator).float()


def powers_of_two(seed: int) -> Make:
    generator = torch.Generator().manual_seed(seed)

    def make(shape: tuple[int, ...]) -> Tensor:
        signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
        return signs * 2.0 ** torch.randint(-3, 4, shape, generator=generator)

    return make


def gradients(params: Iterable[Tensor], make: Make) -> list[Tensor]:
    return [make(tuple(p.shape)) for p in params]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Decayed and not; under FSDP1 without original parameters there is one group only."""
    named = list(model.named_parameters())
    if any(p.dim() == 1 and "_flat_param" in name for name, p in named):
        return [{"params": named, "weight_decay": 0.1}]
    return [{"params": named[0::2], "weight_decay": 0.1}, {"params": named[1::2], "weight_decay": 0.1, "lr": 0.03}]


def wrapped(model: nn.Module, strategy: str, original: bool, **options: Any) -> FullyShardedDataParallel:
    world = dist.get_world_size()
    if strategy.startswith("HYBRID"):
        options["device_mesh"] = mesh_of(2, world // 2)
    return FullyShardedDataParallel(
        model,
        sharding_strategy=ShardingStrategy[strategy],
        auto_wrap_policy=ModuleWrapPolicy([Unit]),
        use_orig_params=original,
        device_id=torch.device("cpu"),
        **options,
    )


def whole_weights(model: FullyShardedDataParallel) -> list[Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return [p.detach().clone() for p in model.parameters()]


def assert_weights(model: FullyShardedDataParallel, twin: nn.Module, tolerance: float) -> None:
    for i, (p, q) in enumerate(zip(whole_weights(model), twin.parameters(), strict=True)):
        error = (p.double().flatten() - q.detach().double().flatten()).norm() / q.detach().double().norm()
        assert error <= tolerance, f"parameter {i}: off by {error:.3g}"


FSDP1: dict[str, tuple[str, bool, dict[str, Any]]] = {
    f"{strategy}-{'original' if original else 'flat'}-{name}": (strategy, original, options)
    for strategy, original, (name, options) in [
        *itertools.product((*STRATEGIES, "HYBRID_SHARD"), (True, False), [("plain", {}), ("clipped", {"max_grad_norm": 0.5})]),
        *itertools.product(
            ("FULL_SHARD",),
            (True, False),
            [("foreach", {"foreach": True}), ("skip", {"skip_nonfinite": True}), ("bf16-state", {"state_dtype": BF16})],
        ),
    ]
}
QUICK = ("FULL_SHARD-original-clipped", "FULL_SHARD-flat-clipped", "NO_SHARD-flat-plain")


@case(2, 3, 4, each=FSDP1, slow=lambda key: key not in QUICK)
def fsdp1(world: int, how: tuple[str, bool, dict[str, Any]]) -> None:
    strategy, original, options = how
    if strategy == "HYBRID_SHARD" and world != 4:
        return
    model, twin = wrapped(Units(random_numbers()), strategy, original), Units(random_numbers())
    torchlamb.shard.fsdp1(model)
    optimizer = torchlamb.Lamb(groups_of(model), lr=0.05, **options)
    wanted = torchlamb.Lamb(
        groups_of(twin) if original else [{"params": list(twin.named_parameters()), "weight_decay": 0.1}], lr=0.05, **options
    )
    for step in range(6):
        given = [gradients(twin.parameters(), random_numbers(1000 * step + rank + 1)) for rank in range(world)]
        if "skip_nonfinite" in options and step == 2:
            given[-1][3].fill_(torch.nan)
        for p in model.parameters():
            p.grad = None
        model(given[dist.get_rank()]).backward()
        for p, *parts in zip(twin.parameters(), *given, strict=True):
            p.grad = torch.stack(parts).mean(dim=0)
        bad = bool(given[-1][3].isnan().any())
        guarded = "max_grad_norm" in options or "skip_nonfinite" in options
        with collectives(0 if strategy == "NO_SHARD" else guarded + (not bad)):
            optimizer.step()
        wanted.step()
    # Rounded at random, second moments that are those of flat parameters draw other numbers: up to 2^-8 of them, in each step.
    assert_weights(model, twin, 1e-6 if original or "state_dtype" not in options else 6 * 0.05 * 2**-8)
    assert wanted.skipped_steps.item() == optimizer.skipped_steps.item() == ("skip_nonfinite" in options)
    ratios, twins = optimizer.trust_ratios(), wanted.trust_ratios()
    if original:
        ratios = {str(name).replace("_fsdp_wrapped_module.", ""): ratio for name, ratio in ratios.items()}
        here = {name.replace("_fsdp_wrapped_module.", "") for name, p in model.named_parameters() if p.numel()}
        assert here == ratios.keys()  # FSDP1 leaves no gradient where there are no elements
        twins = {name: twins[name] for name in ratios}
    found = torch.cat([ratio.reshape(-1) for ratio in ratios.values()])  # a flat parameter's entry has one of each in it
    torch.testing.assert_close(
        found, torch.stack(list(twins.values())), rtol=1e-2 if "state_dtype" in options else 1e-5, atol=0
    )


@case(2, 3, 4, each={f"{s}-{o}": (s, o) for s in STRATEGIES for o in (True, False)}, slow=lambda key: "FULL_SHARD" not in key)
def fsdp1_with_representable_numbers(_: int, how: tuple[str, bool]) -> None:
    model, twin = wrapped(Units(integers()), *how), Units(integers())
    torchlamb.shard.fsdp1(model)
    options: dict[str, Any] = {"lr": 0.5, "betas": (0.5, 0.5), "eps": 0.0, "weight_decay": 0.5}
    optimizer, wanted = torchlamb.Lamb(model.parameters(), **options), torchlamb.Lamb(twin.parameters(), **options)
    given = gradients(twin.parameters(), powers_of_two(1))
    model(given).backward()
    for p, grad in zip(twin.parameters(), given, strict=True):
        p.grad = grad
    optimizer.step()
    wanted.step()
    for p, q in zip(whole_weights(model), twin.parameters(), strict=True):
        assert torch.equal(p.flatten(), q.detach().flatten())


@case(2, each={"original": True, "flat": False})
def fsdp1_checkpoints_resume(_: int, original: bool) -> None:
    """Sharded ones: of original parameters, torch 2.13's full ones have the second moments for the first, AdamW's too."""

    def make() -> tuple[FullyShardedDataParallel, torchlamb.Lamb]:
        model = wrapped(Units(random_numbers()), "FULL_SHARD", original)
        FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
        torchlamb.shard.fsdp1(model)
        return model, torchlamb.Lamb(groups_of(model), lr=0.05, max_grad_norm=1.0)

    def train(model: FullyShardedDataParallel, optimizer: torchlamb.Lamb, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            flat = [torch.randn(s, generator=torch.Generator().manual_seed(step)) for shapes in SHAPES for s in shapes]
            model(flat).backward()
            optimizer.step()

    model, optimizer = make()
    train(model, optimizer, range(3))
    weights, saved = model.state_dict(), FullyShardedDataParallel.optim_state_dict(model, optimizer)
    train(model, optimizer, range(3, 6))
    again, other = make()
    again.load_state_dict(weights)
    other.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(again, other, saved))
    train(again, other, range(3, 6))
    for p, q in zip(whole_weights(model), whole_weights(again), strict=True):
        assert torch.equal(p, q)


@case(2, each={"original": True, "flat": False})
def fsdp1_may_come_after_the_optimizer(_: int, original: bool) -> None:
    """As trainers do it: they wrap the model that the optimizer was made for, and replace its parameters."""
    model, twin = Units(random_numbers()), Units(random_numbers())
    optimizer, wanted = (torchlamb.Lamb(m.parameters(), lr=0.05, weight_decay=0.1) for m in (model, twin))
    sharded = wrapped(model, "FULL_SHARD", original)
    optimizer.param_groups[0]["params"] = list(sharded.parameters())
    for step in range(5):
        given = gradients(twin.parameters(), random_numbers(step + 1))
        sharded.zero_grad()
        sharded(given).backward()
        if step == 0:
            with raises(NotImplementedError, r"torchlamb.shard.fsdp1\(model\)", list(sharded.parameters())):
                optimizer.step()
            torchlamb.shard.fsdp1(sharded)
        for p, grad in zip(twin.parameters(), given, strict=True):
            p.grad = grad
        optimizer.step()
        wanted.step()
    assert_weights(sharded, twin, 1e-6)


@case(2, each={"original": True, "flat": False})
def fsdp1_is_refused_until_told(_: int, original: bool) -> None:
    model = wrapped(Units(random_numbers()), "FULL_SHARD", original)
    with raises(NotImplementedError, "torchlamb.shard.fsdp1", []):
        torchlamb.Lamb(model.parameters())
    flat = FullyShardedDataParallel.fsdp_modules(model)[1]._handle.flat_param
    flat._shard_param_infos = (flat._shard_param_infos[0]._replace(offset_in_shard=1), *flat._shard_param_infos[1:])
    here = flat._shard_param_infos[0].in_shard
    with raises(RuntimeError, "units.0.weights.0" if here else "another process", []):
        torchlamb.shard.fsdp1(model)
    with raises(NotImplementedError, "torchlamb.shard.fsdp1", []):
        torchlamb.Lamb(model.parameters())
    with raises(ValueError, "no such module", []):
        torchlamb.shard.fsdp1(Units(random_numbers()))


@case(2, each={"original": True, "flat": False})
def what_flat_parts_cannot_do_is_refused_by_name(_: int, original: bool) -> None:
    model = wrapped(Units(random_numbers()), "FULL_SHARD", original)
    torchlamb.shard.fsdp1(model)
    for option, value in (("blocks", 2), ("grad_centralization", True)):
        with raises(NotImplementedError, f"{option}={value}", []):
            torchlamb.Lamb(model.parameters(), **{option: value})
    with raises(NotImplementedError, "differentiable", []):
        torchlamb.Lamb(model.parameters(), differentiable=True)
    if original:  # where nothing is sharded, parameters keep their shapes
        whole, twin = wrapped(Units(random_numbers()), "NO_SHARD", True), Units(random_numbers())
        torchlamb.shard.fsdp1(whole)
        blocks = [[p for p in m.parameters() if p.shape[0] == 12] for m in (whole, twin)]
        optimizer, wanted = (torchlamb.Lamb(params, lr=0.05, blocks=3) for params in blocks)
        for params in blocks:
            for i, p in enumerate(params):
                p.grad = random_numbers(i)(tuple(p.shape))
        optimizer.step()
        wanted.step()
        assert all(torch.equal(p, q) for p, q in zip(*blocks, strict=True))
        torchlamb.Lamb(whole.parameters(), differentiable=True)


@case(2, each={"original": True, "flat": False})
def places_of_flat_parts_are_those_of_the_whole(_: int, original: bool) -> None:
    """What stochastic rounding draws its bits by: indices in the whole parameter, or in the whole flat one."""
    model = wrapped(Units(random_numbers()), "FULL_SHARD", original)
    torchlamb.shard.fsdp1(model)
    found = []
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle = module._handle
        if handle is None:
            continue
        with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=False):
            whole = nn.functional.pad(handle.flat_param.detach().flatten(), (0, 2))  # shards of even length have padding
            wholes = [getattr(owner, name).detach().flatten().clone() for name, owner, _ in handle.flat_param._param_infos]
        for param, values in zip(handle.flat_param._params, wholes, strict=True) if original else [(handle.flat_param, whole)]:
            place = layout_of(param, 1, keyed=True).place
            indices = place.runs(param).indices(0, param.numel(), param.device)
            found.append((values[indices], param.detach().flatten()))
    for got, wanted in found:
        assert torch.equal(got, wanted)


@case(2)
def what_was_told_is_kept_beside_parameters(_: int) -> None:
    model = wrapped(Units(random_numbers()), "FULL_SHARD", True)
    params = list(model.parameters())
    before = [set(vars(p)) for p in params]
    torchlamb.shard.fsdp1(model)
    assert [set(vars(p)) for p in params] == before
    assert not any(weakref.getweakrefs(p) for p in params)
    optimizer = torchlamb.Lamb(params)
    assert not any(weakref.getweakrefs(p) for p in params)
    torch.utils.swap_tensors(params[0], nn.Parameter(params[0].detach().clone()))
    assert optimizer.param_groups[0]["params"][0] is params[0]
    other = wrapped(Units(random_numbers()), "FULL_SHARD", True)  # of which nothing was told
    with raises(NotImplementedError, "torchlamb.shard.fsdp1", []):
        torchlamb.Lamb(other.parameters())


def megatron_part(whole: Tensor, dim: int | None, world: int) -> nn.Parameter:
    """One process's part along a dim, marked as Megatron marks it, or all of it."""
    part = whole if dim is None else whole.chunk(world, dim)[dist.get_rank()].clone()
    param = nn.Parameter(part)
    param.tensor_model_parallel, param.partition_dim, param.partition_stride = dim is not None, -1 if dim is None else dim, 1
    return param


@case(2, 4, each={"plain": {}, "clipped": {"max_grad_norm": 0.5}, "stochastic": {"stochastic_rounding": True}})
def plain_tensor_parallelism(world: int, options: dict[str, Any]) -> None:
    dtype = BF16 if "stochastic_rounding" in options else torch.float32
    wholes = [random_numbers(i)(shape).to(dtype) for i, shape in enumerate([(8, 5), (8,), (5, 8), (5,)])]
    dims = [0, 0, 1, None]
    model = nn.ParameterList([megatron_part(w, d, world) for w, d in zip(wholes, dims, strict=True)])
    twin = nn.ParameterList([nn.Parameter(w.clone()) for w in wholes])
    with raises(NotImplementedError, r"torchlamb.shard.tensor_parallel\(model, process_group\)", list(model)):
        torchlamb.Lamb(model.parameters())
    torchlamb.shard.tensor_parallel(model, dist.group.WORLD)
    optimizer, wanted = (torchlamb.Lamb(m.parameters(), lr=0.05, weight_decay=0.1, **options) for m in (model, twin))
    for step in range(5):
        for i, (p, q, dim) in enumerate(zip(model, twin, dims, strict=True)):
            q.grad = random_numbers(100 * step + i)(tuple(q.shape)).to(dtype)
            p.grad = q.grad if dim is None else q.grad.chunk(world, dim)[dist.get_rank()].clone()
        optimizer.step()
        wanted.step()
    for p, q, dim in zip(model, twin, dims, strict=True):
        part = q if dim is None else q.chunk(world, dim)[dist.get_rank()]
        error = (p.double() - part.double()).norm() / part.double().norm()
        assert error <= (1e-6 if dtype is torch.float32 else 1e-4), error


@case(2)
def what_was_told_is_of_what_is_held(world: int) -> None:
    """A number of a parameter that is gone may be another's; a list that was made for the call may be gone; a call adds."""
    for _ in range(10):
        model = nn.ParameterList([nn.Parameter(torch.ones(4, 4))])
        torchlamb.shard.tensor_parallel(model, dist.group.WORLD, list(model))
        model[0] = nn.Parameter(torch.ones(4, 4))
        if dist.get_rank() == 1:  # the others' numbers are those of other tensors
            _ = [torch.ones(4, 4) for _ in range(3)]
        params = [nn.Parameter(torch.ones(4, 4)) for _ in range(8)]
        assert all(told_of(p) is None for p in [*model, *params])
    first, second = (nn.ParameterList([megatron_part(torch.ones(4, 2), 0, world)]) for _ in range(2))
    torchlamb.shard.tensor_parallel(nn.ModuleList([first, second]), dist.group.WORLD, [first[0]])
    torchlamb.shard.tensor_parallel(nn.ModuleList([first, second]), dist.group.WORLD, [second[0]])
    assert all(told_of(p) is not None for p in (*first, *second))


@case(2)
def copies_in_the_optimizer_are_told_by_it(world: int) -> None:
    """Mixed precision wrappers put float32 copies, marked as the parameters are, into the optimizer."""
    model = nn.ParameterList([megatron_part(torch.randn(4, 2).bfloat16(), 0, world)])
    torchlamb.shard.tensor_parallel(model, dist.group.WORLD)
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.1)
    copy_of = nn.Parameter(model[0].detach().float())
    copy_of.tensor_model_parallel, copy_of.grad = True, torch.ones_like(copy_of)
    optimizer.param_groups[0]["params"] = [copy_of]
    with raises(NotImplementedError, "optimizer for the model", [copy_of]):
        optimizer.step()
    torchlamb.shard.tensor_parallel(optimizer, dist.group.WORLD)
    optimizer.step()
    assert told_of(copy_of).groups


@case(2)
def copies_of_what_was_told_are_refused(_: int) -> None:
    model = wrapped(Units(random_numbers()), "FULL_SHARD", False)
    torchlamb.shard.fsdp1(model)
    optimizer = torchlamb.Lamb(model.parameters(), lr=0.1)
    again = copy.deepcopy(optimizer)
    params = [p for group in again.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.ones_like(p)
    with raises(NotImplementedError, "copy|fsdp1", params):
        again.step()


@case(2)
def parts_are_of_the_model_and_of_one_kind(world: int) -> None:
    model = nn.ParameterList([megatron_part(torch.ones(4, 2), 0, world)])
    with raises(ValueError, "number 0", []):
        torchlamb.shard.tensor_parallel(model, dist.group.WORLD, [torch.ones(2)])
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    torchlamb.shard.tensor_parallel(model, alone)  # Megatron marks parameters of a group of one, too
    torchlamb.Lamb(model.parameters())
    with raises(TypeError, "deepspeed.initialize", []):
        torchlamb.shard.deepspeed(model)


@case(2)
def fragments_of_matrices_are_refused(_: int) -> None:
    """As Megatron's distributed optimizer leaves them: other ones on each process."""
    for made_of in (lambda p: nn.Parameter(p.detach().flatten()[:3].clone()), lambda p: p.detach().flatten()[:3].float()):
        model = nn.Linear(4, 3)
        optimizer = torchlamb.Lamb(model.parameters(), lr=0.1)
        fragments = [made_of(p) for p in model.parameters()]
        for fragment in fragments:
            fragment.grad = torch.ones(3)
        optimizer.param_groups[0]["params"] = fragments
        with raises(NotImplementedError, "fragments", fragments):
            optimizer.step()


@case(2)
def vectors_that_are_no_fragments_are_stepped(_: int) -> None:
    model, norm = nn.Linear(4, 3), nn.LayerNorm(3)
    optimizer = torchlamb.Lamb([{"params": model.parameters()}, {"params": norm.parameters()}], lr=0.1)
    for p in [*model.parameters(), *norm.parameters()]:
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["params"] = [model.bias]  # filtered down to its one bias
    optimizer.param_groups.reverse()
    before = [p.detach().clone() for p in (model.bias, norm.weight, model.weight)]
    optimizer.step()
    now = (model.bias, norm.weight, model.weight)
    assert [torch.equal(p, old) for p, old in zip(now, before, strict=True)] == [False, False, True]


@case(3, 4)
def a_mesh_without_this_process(world: int) -> None:
    mesh = DeviceMesh("cpu", list(range(world - 1)))
    is_in = dist.get_rank() < world - 1
    plain = nn.Parameter(torch.ones(3))
    local = torch.ones(4, 2) if is_in else torch.empty(0)
    kind: dict[str, Any] = {"run_check": False, "shape": (4 * (world - 1), 2), "stride": (2, 1)}
    param = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], **kind))
    optimizer = torchlamb.Lamb([plain, param], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        plain.grad = torch.ones(3)
        param.grad = DTensor.from_local(torch.ones_like(local), mesh, [Shard(0)], **kind)
        optimizer.step()
    alone = nn.Parameter(torch.ones(3))
    wanted = torchlamb.Lamb([alone], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        alone.grad = torch.ones(3)
        wanted.step()
    assert torch.equal(plain, alone)
    assert not is_in or not torch.equal(param._local_tensor, torch.ones(4, 2))
