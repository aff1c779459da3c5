"""Which parameters step together, in which pieces their memory is walked, and how what is stored is read and written.

A `Bucket` holds the tensors of one group that share a device and their dtypes, ready for arithmetic: complex tensors as real
pairs, parameters with `blocks=n` as n rows. Backends see buckets and nothing above them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchlamb import rounding, rule
from torchlamb.rounding import Place
from torchlamb.rule import Scalars
from torchlamb.sharding import Cuts, Groups, Plan, local

# Elements in a piece, for each thread that shares it: half a MiB of float32. Measured: docs/log.md.
PIECE_PER_THREAD = 2**17

# Elements of a CPU's tensor up to which calling torch costs more than the arithmetic. Measured: docs/log.md.
SMALL = 2**14


@dataclass
class Bucket:
    """Rows that step together: row i is one parameter, or one of its blocks."""

    scalars: Scalars
    indices: list[int] = field(default_factory=list)  # position of the row's parameter in the optimizer
    params: list[Tensor] = field(default_factory=list)  # each a view of the parameter's own memory
    grads: list[Tensor] = field(default_factory=list)  # never written
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)  # 0-dim float32
    masters: list[Tensor] = field(
        default_factory=list
    )  # float32, of all rows or none: what low-precision params are rounded from
    seeds: list[Tensor] = field(default_factory=list)  # 0-dim int64, of all rows or none: of what is rounded stochastically
    places: list[Place] = field(default_factory=list)  # where the rows with a seed lie in the whole tensors
    updates: list[Tensor] = field(default_factory=list)  # what `accumulate` may keep for `apply`: of all rows, or none
    is_small: bool = False  # none of the rows' parameters has more than SMALL elements
    is_complex: bool = False  # the tensors' last dim holds real and imaginary parts
    process_groups: Groups = ()  # over which the sums of squares of all rows are added; none where nothing is sharded
    on_device: bool = False  # step counts stay tensors: nothing may be read back by the host
    grad_factor: float | Tensor = 1.0  # sign, clip coefficient and loss scale in one; 0-dim where a tensor
    skip: Tensor | None = None  # 0-dim bool: keep every old value
    is_guarded: bool = False  # keep the parameters whose norms are not finite

    def __len__(self) -> int:
        return len(self.params)

    @property
    def device(self) -> torch.device:
        """The device that all rows share."""
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float64 for float64 parameters, float32 for all others."""
        return torch.promote_types(self.params[0].dtype, torch.float32)

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Those of parameters, gradients and moments, which each have one for all rows."""
        return [column[0].dtype for column in (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs)]

    def check(self) -> None:
        """Raise if a step count is out of reach, or a tensor has no memory on a CPU, which kernels would not notice.

        Raises:
            RuntimeError: with the parameter's position in the optimizer
        """
        if self.steps[0].device not in (self.device, torch.device("cpu")):  # one device for all of them
            raise RuntimeError(f"the step of parameter {self.indices[0]} is on {self.steps[0].device}, and it on {self.device}")
        if self.device.type == "cpu":
            for column in (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.masters):
                for index, t in zip(self.indices, column, strict=False):
                    size = t.numel()  # an empty shard may begin behind the end of what it is a shard of
                    if size and t.untyped_storage().nbytes() < (t.storage_offset() + size) * t.itemsize:
                        raise RuntimeError(
                            f"a tensor of parameter {index} is larger than its storage, which was freed or resized; restore it "
                            "before step()"
                        )

    def new_sq_norms(self) -> Tensor:
        """Return zeros of shape (rows, 2): sums of squares of the parameters and of their updates."""
        return torch.zeros(len(self), 2, dtype=self.dtype, device=self.device)

    def count_step_(self) -> None:
        """Count this step, unless it is skipped."""
        # The blocks of a parameter share its count.
        steps = [step for row, step in enumerate(self.steps) if row == 0 or step is not self.steps[row - 1]]
        if self.skip is not None:
            # As a list: given one tensor to add to all, torch reads it back.
            torch._foreach_add_(steps, [(~self.skip).to(steps[0].dtype)] * len(steps))
        elif steps[0].is_cpu and not torch.compiler.is_compiling():
            torch._foreach_add_(
                steps, torch.ones((), device="cpu")
            )  # torch would make a tensor of the number once for each step count
        else:
            torch._foreach_add_(steps, 1)

    def centralize_grads(self) -> None:
        """Replace the gradients by centralized ones, if that is asked for."""
        if self.scalars.grad_centralization:
            self.grads = [self._centralized(g) for g in self.grads]

    def bias_factors(self) -> list[tuple[float | Tensor, float | Tensor]]:
        """Return the factors of `rule.bias_factors` for each row: host numbers, or 0-dim tensors if `on_device`."""
        s = self.scalars
        if not s.bias_correction:
            return [(s.eps, 1.0)] * len(self)
        if self.on_device:
            eps, k = rule.bias_factors(torch.stack(self.steps).to(self.device, self.dtype), s)
            assert isinstance(eps, Tensor)
            assert isinstance(k, Tensor)
            return list(zip(eps.unbind(), k.unbind(), strict=True))
        by_step: dict[float, tuple[float | Tensor, float | Tensor]] = {}
        steps = [step.item() for step in self.steps]
        return [by_step.get(t) or by_step.setdefault(t, rule.bias_factors(t, s)) for t in steps]

    def scaled_grad(self, grad: Tensor) -> Tensor:
        """Return a gradient, or a piece of one, as the rule takes it: in the bucket's dtype, times `grad_factor`."""
        grad = cast(grad, self.dtype)
        return grad if isinstance(self.grad_factor, float) and self.grad_factor == 1.0 else grad * self.grad_factor

    def pieces(self, row: int) -> Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
        """Cut a row's param, grad, exp_avg, exp_avg_sq and master, if it has one, as the function `pieces` does."""
        row_of = (self.params[row], self.grads[row], self.exp_avgs[row], self.exp_avg_sqs[row])
        if not self.masters:
            return [(p, g, m, v, None) for p, g, m, v in pieces(*row_of)]
        return [(p, g, m, v, master) for p, g, m, v, master in pieces(*row_of, self.masters[row])]

    def weights(self) -> list[Tensor]:
        """Return the parameters as arithmetic takes them: see the function `weight`."""
        if not self.masters:
            return [cast(p, self.dtype) for p in self.params]
        return [weight(p, m, self.dtype) for p, m in zip(self.params, self.masters, strict=True)]

    def to_param(self, new: Tensor, row: int, number: int = 0) -> Tensor:
        """Return new values of a row, or of its piece of that number, in the dtype and with the rounding of the parameter."""
        dtype = self.params[row].dtype
        if dtype != torch.bfloat16 or self.masters or not self.scalars.stochastic_rounding:
            return cast(new, dtype)
        return rounding.to_bfloat16(new, rounding.param_bits(self._random_bits(new, row, number)))

    def to_exp_avg_sq(self, new: Tensor, row: int, number: int = 0) -> Tensor:
        """Return new second moments of a row, or of its piece of that number, as they are stored."""
        dtype = self.exp_avg_sqs[row].dtype
        if dtype != torch.bfloat16:
            return cast(new, dtype)
        # To nearest, a moment that changes by a thousandth of itself would never change: half a unit of bfloat16 is more.
        return rounding.to_bfloat16(new, rounding.exp_avg_sq_bits(self._random_bits(new, row, number)))

    def _random_bits(self, piece: Tensor, row: int, number: int) -> Tensor:
        param, seed, step = self.params[row], self.seeds[row], self.steps[row]
        on_host = seed.is_cpu and not self.on_device
        keys = rounding.keys(int(seed), int(step)) if on_host else rounding.keys(seed, step.to(torch.int64))
        runs = self.places[row].runs(param)
        if piece.shape != param.shape:
            first = number * piece_size()
            return rounding.random_bits(runs.indices(first, first + piece.numel(), piece.device), keys)
        order = rounding.memory_order(param)
        indices = runs.indices(0, param.numel(), piece.device).view([param.shape[dim] for dim in order])
        return rounding.random_bits(indices.permute([order.index(dim) for dim in range(param.dim())]), keys)

    def _centralized(self, grad: Tensor) -> Tensor:
        dims, grad = grad.dim() - self.is_complex, cast(grad, self.dtype)
        return rule.centralize(grad, dims) if dims >= 3 else grad

    def left(self, sq_norms: Tensor) -> Sequence[bool | Tensor]:
        """Return, for each row, whether its parameter stays as it is: a bool where the host may know, else a 0-dim tensor.

        It stays where the whole step is skipped and, under a guard, where one of its norms is not finite.
        """
        if not self.is_guarded:
            return [False if self.skip is None else self.skip] * len(self)
        left = rule.leaves(sq_norms)
        return left.tolist() if self.skip is None else (left | self.skip).unbind()

    def batches(self, elements: int) -> Iterator[tuple[slice, Bucket]]:
        """Cut into buckets of at most that many elements, or of one row where a single row is larger."""
        start, size = 0, 0
        for row, param in enumerate(self.params):
            if row > start and size + param.numel() > elements:
                yield slice(start, row), self._rows(slice(start, row))
                start, size = row, 0
            size += param.numel()
        yield slice(start, len(self)), self._rows(slice(start, len(self)))

    def _rows(self, rows: slice) -> Bucket:
        return replace(
            self,
            indices=self.indices[rows],
            params=self.params[rows],
            grads=self.grads[rows],
            exp_avgs=self.exp_avgs[rows],
            exp_avg_sqs=self.exp_avg_sqs[rows],
            steps=self.steps[rows],
            masters=self.masters[rows],
            seeds=self.seeds[rows],
            places=self.places[rows],
        )


def sort_into_buckets(
    scalars: Scalars,
    columns: Sequence[Sequence[Any]],  # params, grads, exp_avgs, exp_avg_sqs, steps, masters, seeds; None or local shards
    indices: Sequence[int],  # positions of the parameters in the optimizer
    blocks: int,
    plan: Plan | None,  # how the parameters are sharded; None where nothing is
) -> list[Bucket]:
    """Return the parameters of one group in buckets of one device, size class, set of dtypes and of process groups."""
    buckets: dict[tuple[object, ...], Bucket] = {}
    for index, param, grad, exp_avg, exp_avg_sq, step, master, seed in zip(indices, *columns, strict=True):
        groups = plan.groups_of(index) if plan is not None else ()
        device = param.device
        small = param.numel() <= SMALL and device.type == "cpu"
        key = (
            *(small, device, step.device, groups, master is None, seed is None),
            *(param.dtype, grad.dtype, exp_avg.dtype, exp_avg_sq.dtype),
        )
        bucket = buckets.get(key)
        if bucket is None:
            sign = -1.0 if scalars.maximize else 1.0
            bucket = buckets[key] = Bucket(
                scalars.on(device),
                is_small=small,
                is_complex=param.is_complex(),
                process_groups=groups,
                grad_factor=sign,
            )
        place = None
        if seed is not None:
            place = Place.of_whole(param) if plan is None else plan.place_of(index, param)
        if blocks == 1 and not bucket.is_complex:
            bucket.params.append(param)
            bucket.grads.append(grad)
            bucket.exp_avgs.append(exp_avg)
            bucket.exp_avg_sqs.append(exp_avg_sq)
            bucket.steps.append(step)
            bucket.indices.append(index)
            if master is not None:
                bucket.masters.append(master)
            if place is not None:
                bucket.seeds.append(seed)
                bucket.places.append(place)
            continue
        cuts = plan.cuts_of(index) if plan is not None else None
        bucket.params += cut(param, blocks, cuts)
        bucket.grads += cut(grad, blocks, cuts)
        bucket.exp_avgs += cut(exp_avg, blocks, cuts)
        bucket.exp_avg_sqs += cut(exp_avg_sq, blocks, cuts)
        bucket.steps += [step] * blocks
        bucket.indices += [index] * blocks
        if master is not None:
            bucket.masters += cut(master, blocks, cuts)
        if place is not None:
            bucket.seeds += [seed] * blocks
            bucket.places += [place.narrow(*part) for part in _parts(param, blocks, cuts)]
    return list(buckets.values())


def squares_without_grad(
    plan: Plan, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Tensor]]
) -> dict[int, Tensor]:
    """Return, by position, the sums of squares (blocks,) over the local shards of sharded parameters that have no gradient.

    Frozen parameters are left out: no process has a gradient of them.
    """
    sums: dict[int, Tensor] = {}
    params = [(p, group["blocks"], group["master_weights"]) for group in groups for p in group["params"]]
    for index, (p, blocks, masters) in enumerate(params):
        if p.grad is None and p.requires_grad and plan.groups_of(index):
            dtype = torch.promote_types(p.dtype, torch.float32).to_real()
            shard, master = local(p.detach()), state[p].get("master") if masters and p in state else None
            shards = cut(shard if master is None else weight(shard, local(master), dtype), blocks, plan.cuts_of(index))
            sums[index] = torch.stack([rule.sum_of_squares([cast(x, dtype) for (x,) in pieces(shard)]) for shard in shards])
    return sums


def weight(param: Tensor, master: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a parameter as arithmetic takes it: its master in float32, if it has one, else itself in that dtype.

    Elements that are no longer what their master was rounded to have been changed from outside, and count themselves.
    """
    if master is None:
        return cast(param, dtype)
    return torch.where(param == master.to(param.dtype), master, param.to(master.dtype))


def select(left: bool | Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Return the old value where it is left, else the new one. Never multiplied by 0: 0 x NaN is NaN."""
    if isinstance(left, Tensor):
        return torch.where(left, old, new)
    return old if left else new


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, ten times cheaper where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def piece_size() -> int:
    """Return how many elements a CPU's threads work through at a time: all where autograd or a compiler watches."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return sys.maxsize
    return PIECE_PER_THREAD * torch.get_num_threads()


def pieces(*tensors: Tensor) -> Sequence[tuple[Tensor, ...]]:
    """Cut tensors of one shape into matching pieces that fit in a CPU's cache; each piece views its tensor's memory.

    What makes eager arithmetic slow on a CPU is temporaries as large as the tensors, which fall out of the cache and fault in
    fresh pages. Elsewhere, in small tensors and in layouts that do not match, the one piece is the whole tensor.
    """
    first = tensors[0]
    if not first.is_cpu or first.numel() <= piece_size():
        return [tensors]
    order = rounding.memory_order(first)
    in_order = [t.permute(order) for t in tensors]
    if not all(t.is_contiguous() for t in in_order):
        return [tensors]
    return list(zip(*(torch.split(t.view(-1), piece_size()) for t in in_order), strict=True))


def is_small(param: Tensor) -> bool:
    """Return whether a CPU steps the parameter faster together with others than alone."""
    return param.is_cpu and param.numel() <= SMALL


def cut(tensor: Tensor, blocks: int, cuts: Cuts | None) -> list[Tensor]:
    """Return the blocks of a local tensor, complex numbers as real pairs. Without `cuts` they are equal parts."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if blocks == 1:
        return [real]
    # `narrow` and not `chunk`: autograd forbids writing to one of several views of a single call.
    return [real.narrow(0, start, length) for start, length in _parts(tensor, blocks, cuts)]


def _parts(tensor: Tensor, blocks: int, cuts: Cuts | None) -> Cuts:
    size = tensor.shape[0] // blocks
    return cuts or [(i * size, size) for i in range(blocks)]
