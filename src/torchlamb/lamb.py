"""The optimizer: constructor, state and `step()`. Read this first.

It decides what happens (which parameters, which options, whether a step is taken) and leaves the arithmetic to a backend, the
rule to `torchlamb.rule`. It must not know how any backend computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, ParamsT, StateDict, _use_grad_for_differentiable

from torchlamb.backends import Work, prepare, resolve
from torchlamb.bucket import COLUMNS, Bucket, is_small, make_local_, new_columns, sort_into_buckets, sums_without_grad
from torchlamb.gate import Gate, own_grad, why_not
from torchlamb.guard import check_devices, guard, is_guarded
from torchlamb.last_step import LastStep
from torchlamb.loading import read
from torchlamb.options import (
    can_step,
    check,
    check_alike,
    check_grads,
    check_params,
    lr_of,
    normalise,
    store_plain_,
    warn_of_misspelt,
)
from torchlamb.plain import plain
from torchlamb.rule import Scalars
from torchlamb.sharding.layout import told_of
from torchlamb.sharding.norm_group import NormGroup
from torchlamb.sharding.refused import (
    check_partitioned,
    dims_of,
    only_makes_state,
    why_fragments,
    why_untold,
    zero_redundancy_group,
)
from torchlamb.sharding.sums import NO_PLAN, Plan, Rows
from torchlamb.state import Storage, check_state

if TYPE_CHECKING:
    from torchlamb.sharding.layout import ProcessGroup


class Lamb(Optimizer):
    r"""Implements LAMB: layer-wise adaptive moments for batch training.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda w_{t-1} \\
        w_t &= w_{t-1} - \eta \frac{\phi(\|w_{t-1}\|)}{\|u_t\|} u_t

    for every parameter tensor :math:`w` on its own. The ratio of norms is exactly 1 where either norm is 0; :math:`\phi` is the
    identity unless `phi_bounds` is given. Words, order and meaning are those of :class:`torch.optim.AdamW` where it has them.

    Args:
        params: iterable of parameters, of (name, parameter) pairs, or of dicts that define parameter groups. Any floating-point
            or complex dtype, any shape and strides.
        lr: learning rate, the length of a step relative to the parameter's norm; a finite number >= 0, or a tensor with one
            element. What schedulers write later may be negative; within rounding of 0 it is 0 (default: 1e-3)
        betas: decay rates of the first and second moment, both in [0, 1) (default: (0.9, 0.999))
        eps: added to the root of the second moment, >= 0 (default: 1e-6)
        weight_decay: factor of the parameter in its own update, before the ratio is taken, >= 0 (default: 0.0)
        bias_correction: divide the moments by 1 - beta^t (default: True)
        layer_adaptation: multiply the update by the ratio; False gives AdamW with the decay inside. Never depends on
            `weight_decay` (default: True)
        grad_averaging: weigh the gradient in the first moment with 1 - beta1; with 1 if False (default: True)
        phi_bounds: (low, high) between which the parameter's norm is clamped before the ratio is taken; the zero test comes
            before (default: None)
        trust_ratio_bounds: (low, high) between which the ratio is clamped (default: None)
        blocks: cut each parameter along dim 0 into that many equal blocks with a norm and ratio each, for fused QKV matrices or
            stacked experts; dim 0 must divide (default: 1)
        grad_centralization: subtract from gradients of 3 or more dims (convolutions) their mean over every dim but the first
            (default: False)
        max_grad_norm: clip the norm over the gradients of all groups to this, and skip steps as `skip_nonfinite` does; None for
            never (default: None)
        skip_nonfinite: skip a step whose gradients are not all finite, or whose sum of squares overflows float32: parameters,
            moments and step counts stay (default: False)
        master_weights: keep a float32 master of each bf16 and fp16 parameter in the state: norms, update and the next value are
            those of the master, and the parameter is the master rounded. Elements that were changed from outside count
            themselves, so that a stale master never overwrites them (default: False)
        stochastic_rounding: round bf16 parameters up or down at random, on average to what they should be; to nearest, changes
            of less than 0.2 to 0.4 % of an element are lost. Not together with `master_weights` (default: False)
        state_dtype: of the moments; None for float32 where parameters are bf16 or fp16 and the parameter's own otherwise.
            torch.bfloat16 halves them: `exp_avg` is rounded to nearest, `exp_avg_sq` stochastically. torch.float32 is the third
            that can be given (default: None)
        maximize: maximize the objective (default: False)
        foreach: True for torch's multi-tensor operations, False for one tensor after the other. None chooses by device, and on
            CPUs by size; `repr` says what is in use and why (default: None)
        fused: True for this library's own kernels, False for none of them; None takes them where they can be had: for float32,
            bf16 and fp16 parameters on CPUs, and on GPUs where Triton is installed (default: None)
        capturable: keep step counts on the device and read nothing back, for graph capture and `torch.compile`; the lr can then
            be a tensor on the parameters' device that is changed in place (default: False)
        differentiable: let autograd run through `step()` (default: False)

    `max_grad_norm`, `skip_nonfinite` and `differentiable` must be the same in all groups; everything else may differ.

    Parameters may be DTensors, sharded in any way: the result is that of whole tensors, and every process of their meshes must
    call `step()`.

    State per parameter: `step` (0-dim float32), `exp_avg` and `exp_avg_sq` (the parameter's shape); with `master_weights`,
    `master` (the parameter's shape, float32); where something is rounded stochastically, `seed` (0-dim int64). Seeds follow
    from the parameters' positions in the optimizer: the same run rounds the same way.

    Raises:
        TypeError: an argument of a wrong type, or an option that a parameter's dtype does not allow
        ValueError: an argument out of range, a parameter that `blocks` does not divide, groups that differ where they must not,
            options that exclude each other
        RuntimeError: an implementation was asked for that cannot be had
        NotImplementedError: a parameter whose shards cannot be stepped exactly

    Example:
        >>> import torch, torchlamb
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torchlamb.Lamb(model.parameters(), lr=2e-3, weight_decay=0.01)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    Source: You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, arXiv 1904.00962, algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        layer_adaptation: bool = True,
        grad_averaging: bool = True,
        phi_bounds: tuple[float, float] | None = None,
        trust_ratio_bounds: tuple[float, float] | None = None,
        blocks: int = 1,
        grad_centralization: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "layer_adaptation": layer_adaptation,
            "grad_averaging": grad_averaging,
            "phi_bounds": phi_bounds,
            "trust_ratio_bounds": trust_ratio_bounds,
            "blocks": blocks,
            "grad_centralization": grad_centralization,
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "state_dtype": state_dtype,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        self._forget()
        self._norm_group: NormGroup | None = None
        self._began: dict[int, int] = {}  # the dims of all parameters when they were added, by the number of the object
        self._was_told = False  # this is a copy, and how the parameters lay was told of those it was made of
        super().__init__(params, check(defaults))

    def _forget(self) -> None:
        """Forget what was derived from parameters and states."""
        self._last = LastStep()
        self._plan = NO_PLAN
        self._gate = Gate()

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: reevaluates the model and returns the loss (default: None)

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a sparse gradient, or a graph capture without `capturable`
            ValueError, TypeError, NotImplementedError: as the constructor does, for parameters and options that were changed in
                `param_groups`. Nothing has changed after any of these.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_step()
        work = self._resolve()
        if only_makes_state():
            return loss
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        verdict = guard(work, self._plan, self.param_groups, scale, found_inf, self._norm_group)
        work = [(backend, verdict.on(bucket)) for backend, bucket in work]
        sums = [bucket.new_sums() for _, bucket in work]
        over_processes: Rows = ()
        if not verdict.skipped:
            for (backend, bucket), rows in zip(work, sums, strict=True):
                (backend.accumulate if in_two_phases(bucket) else backend.step)(bucket, rows)
            over_processes = self._reduce_(work, sums)
            for (backend, bucket), rows in zip(work, sums, strict=True):
                if in_two_phases(bucket):
                    backend.apply(bucket, rows)
        self._last.note_([bucket for _, bucket in work], sums, verdict, over_processes)
        return loss

    def trust_ratios(self) -> dict[str | int, Tensor]:
        """Return the ratio |param| / |update| that each parameter's last step was multiplied by.

        Returns:
            By the parameter's name where each was given a name of its own, else by its position in the optimizer: a tensor on
            its device, 0-dim or, where `blocks` > 1, of shape (blocks,). NaN where the step was skipped. Parameters that had no
            gradient are left out. Nothing is read back from the device.

        Example:
            >>> import torch, torchlamb
            >>> model = torch.nn.Linear(4, 2, bias=False)
            >>> optimizer = torchlamb.Lamb(model.named_parameters(), lr=0.1)
            >>> model(torch.ones(8, 4)).sum().backward()
            >>> optimizer.step()
            >>> list(optimizer.trust_ratios())
            ['weight']
        """
        return self._by_name(self._last.ratios())

    def norms(self) -> dict[str | int, Tensor]:
        """Return the norms that each parameter's last step was scaled by: those of the parameter before it and of its update.

        Returns:
            By name or position, as `trust_ratios()`: a tensor (param_norm, update_norm) on the parameter's device, of shape
            (2,) or, where `blocks` > 1, (blocks, 2). NaN where the step was skipped. Nothing is read back from the device.

        Example:
            >>> import torch, torchlamb
            >>> model = torch.nn.Linear(1, 2, bias=False)
            >>> model.weight.data[:, 0] = torch.tensor([3.0, 4.0])
            >>> optimizer = torchlamb.Lamb(model.named_parameters(), lr=0.1)
            >>> model(torch.ones(8, 1)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.norms()["weight"]
            tensor([5.0000, 1.4142])
        """
        return self._by_name(self._last.norms())

    def _by_name(self, rows: dict[int, Tensor]) -> dict[str | int, Tensor]:
        if self._last.is_partial:
            raise NotImplementedError(
                "trust_ratios() and norms() tell of the last step, and DeepSpeed's last step was of one group or partition only"
            )
        names = self._names()
        return {names[index]: row for index, row in rows.items()}

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps have left all or some parameters as they were: 0-dim int64, on the device of the parameters.

        Those are, with `max_grad_norm` or `skip_nonfinite`, the steps that were skipped for a gradient that is not finite or a
        sum of squares that overflows float32, and the steps in which a parameter's own norm or that of its update was not
        finite; and, where a :class:`torch.amp.GradScaler` leaves it to this optimizer to skip (``fused=True``), those too. Not
        those for which the scaler does not call `step()` at all.

        It is counted on and not replaced, stands in each parameter's state as ``skipped``, and so in every state dict. Nothing
        is read back from the device.

        Example:
            >>> import torch, torchlamb
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer = torchlamb.Lamb(model.named_parameters(), skip_nonfinite=True)
            >>> model(torch.full((8, 4), torch.nan)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.skipped_steps.item(), optimizer.nonfinite_parameters()
            (1, ['weight'])
        """
        shared = self._shared_count()
        return torch.zeros((), dtype=torch.int64, device=self._first_device()) if shared is None else shared

    def nonfinite_parameters(self) -> list[str | int]:
        """Return because of which parameters the last step of `skipped_steps` left them as they were.

        Their gradient was not finite, or has the sum of squares that overflowed; or, where the step was taken but for them,
        their own norm or that of their update was not finite. On every process the same, wherever the shard is. Unlike
        `skipped_steps` it is not saved, and it reads from the device.

        Returns:
            Names, where each parameter was given a name of its own, else positions in the optimizer. Empty where no step was
            skipped since this object was made or loaded, and where only the scaler saw what was not finite.
        """
        names = self._names()
        return [names[index] for index in self._last.nonfinite()]

    @property
    def norm_group(self) -> ProcessGroup | None:
        """Processes that hold *different* parameters, over which the norm that steps are guarded by is one; None for none.

        To be set where parameters differ between processes and nothing in them tells: stages of a pipeline, experts, partitions
        by hand, parameters that `fully_shard` was told to ignore. Then `max_grad_norm`, `skip_nonfinite` and a scaler's
        `found_inf` mean the gradients of all of them: one more all-reduce of two numbers in each step, in which every process
        takes part, with gradients or without. A ZeroRedundancyOptimizer's own group is found by itself.

        Of the processes that hold the same parameter, one may be in the group: of a pipeline with data parallelism, the mesh's
        dim of stages. Where more are, each has to count its share of it. That is known of DTensors and of what
        `torchlamb.shard` was told; of all others say it with `set_norm_group`. It is not saved, pickled or copied.
        """
        return None if self._norm_group is None else self._norm_group.process_group

    @norm_group.setter
    def norm_group(self, process_group: ProcessGroup | None) -> None:
        self.set_norm_group(process_group)

    def set_norm_group(self, process_group: ProcessGroup | None, held_by: Mapping[Tensor, int] | None = None) -> None:
        """Set `norm_group`, and say which parameters several of its processes hold.

        Args:
            process_group: as `norm_group`
            held_by: by parameter, how many processes of the group hold it, with the same gradient once gradients are
                synchronised: embeddings that two stages tie, or all that is no expert (default: none)

        Raises:
            TypeError: it is no process group that this process is in; a key is no tensor, or a number is no int
            ValueError: a number is not between 1 and the size of the group. That a parameter is not this optimizer's is said by
                the next step

        Example:
            >>> import torch, torchlamb
            >>> model = torch.nn.Linear(4, 2)
            >>> optimizer = torchlamb.Lamb(model.parameters(), max_grad_norm=1.0)
            >>> optimizer.set_norm_group(None)  # or pp_mesh.get_group(), held_by={embedding.weight: 2}
        """
        counts = {} if held_by is None else dict(held_by)
        numbers = {id(param): count for param, count in counts.items()}
        group = None if process_group is None else NormGroup(process_group, numbers)
        for param, count in counts.items():
            if not isinstance(param, Tensor) or isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"held_by must give an int for each parameter, got {type(param).__name__}: {count!r}")
            if process_group is None or not 1 <= count <= process_group.size():
                size = "there is no group" if process_group is None else f"the group has {process_group.size()} processes"
                raise ValueError(f"held_by must be between 1 and the size of the group, got {count}, and {size}")
        self._norm_group = group

    def _names(self) -> Sequence[Any]:
        """Return all parameters' names, or their positions where not each has a name of its own."""
        names = [name for group in self.param_groups for name in group.get("param_names", [])]
        count = sum(len(group["params"]) for group in self.param_groups)
        return names if len(set(names)) == count else range(count)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in torch; options it leaves out are those of the constructor.

        Raises:
            TypeError, ValueError, RuntimeError, NotImplementedError: as the constructor does; nothing is added then.
        """
        if isinstance(param_group, dict) and not isinstance(param_group.get("params"), (set, NoneType)):
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            options = self._checked_options(param_group)
            check_alike([*self.param_groups, options], self.defaults)
            check_params({**options, "params": params}, len(self.param_groups))
            tensors = [p for p in map(_param_of, params) if isinstance(p, Tensor)]
            prepare({p.device for p in tensors})
            for device, dtype, refused in {(p.device, p.dtype.to_real(), why_not(p)) for p in tensors if _can_be_asked(p)}:
                resolve(options, device, [dtype], small=False, refused=refused)
            warn_of_misspelt(param_group, self.param_groups)
            param_group.update(options, params=params)
        super().add_param_group(param_group)
        self._began.update(dims_of(self.param_groups[-1]["params"]))

    def state_dict(self) -> StateDict:
        """Return torch's state dict, with all that groups hold as plain values: schedulers may write numbers of NumPy."""

        def first_hook(_: Optimizer, state_dict: StateDict) -> None:
            state_dict["param_groups"] = [normalise(plain(group)) for group in state_dict["param_groups"]]

        hook = self.register_state_dict_post_hook(first_hook, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict()` returned, keeping the precision of the moments.

        torch casts all state to the parameter's dtype, which rounds float32 moments of bf16 parameters away. Hooks run as in
        torch; a post hook already sees the moments in their own precision.

        Where both sides have names, each once in its group and the same ones (but for what wrappers put around them, as
        ``module.`` and ``_orig_mod.``), state goes to the parameter of that name; else to that of the same position. The names
        of this optimizer stay.

        Options are taken from the dict, as in torch, but for how this optimizer steps (`foreach`, `fused`, `differentiable`)
        and stores things: where its `master_weights`, `stochastic_rounding` or `state_dtype` are not at their defaults, it
        keeps them, and moments are cast to what it stores. A master that the dict does not have is made of the parameter at the
        next step; one that this optimizer does not keep is dropped. Keys of groups and states that are not Lamb's are kept as
        they are.

        What a Lamb has saved is taken whatever its options say: those that cannot be stepped with are refused by the next step.

        The dicts of Adam, AdamW and RAdam are taken, too: their moments have the same meaning.

        Raises:
            TypeError: it is no state dict
            ValueError: groups, their sizes or the shapes of state tensors differ, something is missing, or it is another
                optimizer's; as with all of these, nothing has changed then

        Warns:
            UserWarning: names differ, so that positions tell; or the dict is of Adam, AdamW or RAdam, whose lr means something
                else
        """
        if not isinstance(state_dict, dict):  # before hooks see it
            read(state_dict, self.param_groups, self.state)
        loaded: list[dict[Any, dict[str, Any]]] = []

        def last_pre_hook(_: Optimizer, state_dict: StateDict) -> StateDict:
            state_dict, states = read(state_dict, self.param_groups, self.state)
            loaded.append(states)
            return state_dict

        handles = [
            self.register_load_state_dict_pre_hook(last_pre_hook),
            self.register_load_state_dict_post_hook(lambda _: self.state.update(loaded[-1]), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _checked_options(self, group: dict[str, Any], label: str = "{}", written: bool = False) -> dict[str, Any]:
        options = {**self.defaults, **{k: v for k, v in group.items() if k not in ("params", "param_names")}}
        return check(options, label, written)

    def __getstate__(self) -> dict[str, Any]:
        told = any(told_of(p) is not None for group in self.param_groups for p in group["params"])
        return {**super().__getstate__(), "_was_told": told or self._was_told}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        prepare({p.device for group in self.param_groups for p in group["params"]})
        self._forget()
        began = dims_of([p for group in self.param_groups for p in group["params"]])
        for name, value in {"_norm_group": None, "_began": began, "_was_told": False}.items():
            self.__dict__.setdefault(name, value)  # state dicts are loaded with this, too, and change none of them
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __repr__(self) -> str:
        lines = ["Backends"]
        for i, group in enumerate(self.param_groups):
            kinds = {(p.device, p.dtype.to_real(), is_small(p), why_not(p)) for p in group["params"] if _can_be_asked(p)}
            for device, dtype, small, refused in sorted(kinds, key=str):
                backend, why = resolve(group, device, [dtype], small, refused)
                line = f"    group {i}, {device}: {backend.__name__.rpartition('.')[2]} ({why})"
                if line != lines[-1]:
                    lines.append(line)
        return super().__repr__().removesuffix(")") + "\n" + "\n".join(lines) + "\n)"

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler then leaves grad_scale and found_inf on the optimizer and calls step() whatever it found. Only where fused
        # was asked for: Lightning refuses to clip gradients for optimizers that unscale by themselves.
        return all(group["fused"] for group in self.param_groups)

    def _resolve(self) -> Work:
        """Sort the parameters that have gradients into buckets, creating their state where it is missing."""
        filled = [new_columns() for _ in self.param_groups]
        for group, columns in zip(self.param_groups, filled, strict=True):
            self._init_group(group, *columns.values())
        if self._plan.is_sharded:
            make_local_(filled)
        work: Work = []
        start = 0
        for number, (group, columns) in enumerate(zip(self.param_groups, filled, strict=True)):
            for row, is_in_memory in self._gate.odd_grads[number].items():
                columns["grads"][row] = own_grad(columns["params"][row], columns["grads"][row], is_in_memory)
            indices = [start + i for i, p in enumerate(group["params"]) if p.grad is not None]
            start += len(group["params"])
            scalars = Scalars.from_group({**group, "lr": lr_of(group, self.defaults["lr"])})
            admissions = self._gate.admissions[number]
            for bucket in sort_into_buckets(scalars, columns, indices, self._plan.layouts, admissions, group["capturable"]):
                bucket.check()
                work.append((resolve(group, bucket.device, bucket.dtypes, bucket.is_small, bucket.why_eager)[0], bucket))
        return work

    def _init_group(self, group: dict[str, Any], *columns: list[Any]) -> bool:
        """Fill empty lists, in the order of `bucket.COLUMNS`.

        Dynamo runs a method of this name eagerly, and only if it does no more than that.
        """
        storage, record = Storage(group), self._last.record
        params, states = [], []
        first = self._first_position(group)
        for p, layout in zip(group["params"], self._plan.layouts[first : first + len(group["params"])], strict=True):
            position, first = first if layout.number is None else layout.number, first + 1
            if p.grad is None:
                continue
            state = self.state[p]
            storage.fill_(state, p, position)
            if record is not None:
                state["skipped"] = record.skipped
            params.append(p)
            states.append(state)
        found = storage.columns(params, states)
        for column, tensors in zip(COLUMNS, columns, strict=True):
            tensors += found[column.name]
        return False

    def _reduce_(self, work: Work, sums: Sequence[Tensor]) -> Rows:
        """Add the sums of sharded rows over processes, in place. Return those of all sharded parameters."""
        plan = self._plan
        if not plan.is_sharded:
            return ()
        tables = [(b.indices, rows) for (_, b), rows in zip(work, sums, strict=True) if b.process_groups]
        complete = sum(len(indices) for indices, _ in tables) == len(plan.indices)
        without_grad = {} if complete else sums_without_grad(plan, self.param_groups, self.state)
        return [(plan.indices, plan.add_sums_(tables, without_grad))]

    def _keep_record(self) -> None:
        """Bring the record of skipped steps up to date, where steps can be skipped."""
        can_skip = any(is_guarded(group) or group["fused"] for group in self.param_groups)
        if can_skip or getattr(self, "found_inf", None) is not None:
            self._last.keep_record(self.skipped_steps, sum(len(group["params"]) for group in self.param_groups))
        else:
            self._last.record = None

    def _shared_count(self) -> Tensor | None:
        states = (state for state in self.state.values() if isinstance(state, dict))  # a wrapper may keep something else there
        return next((state["skipped"] for state in states if "skipped" in state), None)

    def _first_position(self, group: dict[str, Any]) -> int:
        """Return the position in the optimizer of a group's first parameter."""
        return sum(len(other["params"]) for other in itertools.takewhile(lambda other: other is not group, self.param_groups))

    def _first_device(self) -> torch.device | None:
        devices = [p.device for group in self.param_groups for p in group["params"]]
        return next((device for device in devices if device.type != "meta"), devices[0] if devices else None)

    def _check_step(self) -> None:
        """Raise for what cannot be stepped in any group, before anything changes; bring the plan and the record up to date."""
        if is_capturing() and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError("step() is being captured in a graph with capturable=False; construct Lamb with capturable=True")
        checked = []
        for i, group in enumerate(self.param_groups):
            lr = group["lr"]  # of which a device's value is not read back
            unread = isinstance(lr, Tensor) and not lr.is_cpu and lr.numel() == 1
            label = f"param_groups[{i}]['{{}}']"
            checked.append(self._checked_options({**group, "lr": 0.0} if unread else group, label, written=True))
        check_alike(self.param_groups, self.defaults)
        guarded = is_guarded(self.param_groups[0])
        if guarded:
            check_devices(self.param_groups)
        self._last.is_partial = check_partitioned(self.param_groups, guarded)
        known = self._plan.fits(self.param_groups)
        params = [p for group in self.param_groups for p in group["params"]]
        reason = None if known else why_fragments(params, self._began) or why_untold(params, self._was_told)
        for i, group in enumerate(self.param_groups):
            if not known:
                check_params(group, i)
            self._gate.look(i, group, self.state, partial(self._check_group, i))
        if reason is not None:
            raise NotImplementedError(reason)
        for group, options in zip(self.param_groups, checked, strict=True):
            store_plain_(group, options)
        if not known:  # only now: what it was made for has been checked
            self._plan = Plan.of(self.param_groups)
        if guarded and self._norm_group is None:
            self.norm_group = zero_redundancy_group()
        if self._norm_group is not None:
            if self.defaults["differentiable"]:
                raise NotImplementedError("autograd would have to see sums over a norm group: differentiable=True has none")
            self._norm_group.share_out(self._plan)
        self._keep_record()

    def _check_group(self, i: int) -> None:
        group = self.param_groups[i]
        check_grads(group, i)
        check_state(group, self.state, i)


# What torch.compiler.assume_constant_result does, without importing Dynamo, which takes seconds: when a step is traced, this is
# not, but run.
Lamb._check_step._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _can_be_asked(param: Tensor) -> bool:
    """Return whether a parameter has a dtype that can be stepped, and a shape yet."""
    return can_step(param.dtype) and not is_lazy(param)


def _param_of(entry: Any) -> Any:
    return entry[1] if isinstance(entry, tuple) else entry  # a (name, parameter) pair


def in_two_phases(bucket: Bucket) -> bool:
    """Return whether sums of the bucket have to be added over processes before its parameters can move."""
    return bool(bucket.process_groups)


def is_capturing() -> bool:
    """Return whether what is launched now is recorded in a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
