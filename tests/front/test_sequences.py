"""No call that raised has changed anything: arguments, groups and sequences of calls, drawn at random."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch
from cases import DEFAULTS
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor

import torchlamb

EXPECTED = (TypeError, ValueError, RuntimeError, KeyError, NotImplementedError)
SHAPES = [(4,), (2, 3), (), (0,), (4, 2, 3)]
DTYPES = [torch.float32, torch.bfloat16]
SEEDS = st.integers(0, 2**30)
INDICES = st.integers(0, 99)  # of whatever there is at the time, modulo its number

# Of every argument but `params`: values that can be taken, some of which exclude each other, and values that never can.
GOOD: dict[str, list[Any]] = {
    "lr": [0.0, 1e-3, 0.5, torch.tensor(0.01)],
    "betas": [(0.0, 0.0), (0.9, 0.999), [0.5, 0.9]],
    "eps": [1e-8, 1e-2, 1],
    "weight_decay": [0, 0.01],
    "bias_correction": [True, False],
    "layer_adaptation": [True, False],
    "grad_averaging": [True, False],
    "phi_bounds": [None, (0, 10), (0.1, 1.0)],
    "trust_ratio_bounds": [None, (0.0, 10.0), (1, 1)],
    "blocks": [1, 2],
    "grad_centralization": [True, False],
    "max_grad_norm": [None, 0.5],
    "skip_nonfinite": [True, False],
    "master_weights": [True, False],
    "stochastic_rounding": [True, False],
    "state_dtype": [None, torch.float32, torch.bfloat16],
    "maximize": [True, False],
    "foreach": [None, True, False],
    "fused": [None, True, False],
    "capturable": [True, False],
    "differentiable": [True, False],
}
BAD: dict[str, list[Any]] = {
    "lr": [-1, -1e-20, math.nan, math.inf, "1", None, True, torch.ones(2)],
    "betas": [(1.5, 0.9), (0.9,), 0.9, (0.9, None), (math.nan, 0.9)],
    "eps": [-1.0, math.nan, "0", None],
    "weight_decay": [-0.1, math.inf, None],
    "bias_correction": [1, None],
    "layer_adaptation": [0, "yes"],
    "grad_averaging": [None, 1.0],
    "phi_bounds": [(2, 1), (0, 0), 1.0, (0, math.nan)],
    "trust_ratio_bounds": [(-1, 1), (0, 1, 2), "01"],
    "blocks": [0, 1.0, True, None],
    "grad_centralization": [1],
    "max_grad_norm": [0.0, -1, math.inf, "1", True],
    "skip_nonfinite": [None, 1],
    "master_weights": [1, "float32"],
    "stochastic_rounding": [None],
    "state_dtype": [torch.float16, torch.int8, "bf16"],
    "maximize": [1],
    "foreach": [1, "no"],
    "fused": ["yes", 0],
    "capturable": [None],
    "differentiable": [1],
}
# What a constructor refuses and torch steps with once a scheduler has written it.
STEPPED = {"lr": BAD["lr"][:2], "weight_decay": BAD["weight_decay"][:1]}
STORAGE = ("master_weights", "stochastic_rounding", "state_dtype")
GUARD = ("max_grad_norm", "skip_nonfinite")
# What can be written into a group without making it contradict itself, another group or a shape.
FREE = [name for name in GOOD if name not in (*GUARD, *STORAGE, "blocks", "foreach", "fused", "differentiable")]
MODES: list[dict[str, Any]] = [
    {"master_weights": True, "stochastic_rounding": False},
    {"master_weights": False, "stochastic_rounding": True},
    {"master_weights": False, "stochastic_rounding": False},
    {"state_dtype": torch.bfloat16},
    {"state_dtype": torch.float32},
    {"fused": True, "foreach": None},
    {"fused": None, "foreach": True},
    {"fused": False, "foreach": None},
]
OTHER_DTYPES = [*DTYPES, torch.float16, torch.float64]
PAIRS_OF_BAD = [(name, value) for name, values in BAD.items() for value in values]


def bits(value: Any) -> Any:
    """Return what two values have in common if they are exactly the same: of tensors the bytes, so that NaN is itself."""
    if not isinstance(value, Tensor):
        return type(value).__name__, repr(value)
    dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
    return value.dtype, value.layout, tuple(value.shape), bytes(dense.reshape(-1).view(torch.uint8).tolist())


def bits_in(value: Any) -> Any:
    """As `bits`, of all that is in dictionaries and lists."""
    if isinstance(value, dict):
        return {key: bits_in(entry) for key, entry in value.items()}
    return [bits_in(entry) for entry in value] if isinstance(value, list) else bits(value)


def params_of(optimizer: torchlamb.Lamb) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def contents(optimizer: torchlamb.Lamb) -> dict[str, Any]:
    """Return what a copy of the optimizer must have as well, by position."""
    params = params_of(optimizer)
    return {
        "params": [bits(p) for p in params],
        "grads": [bits(p.grad) for p in params],
        "state": [bits_in(optimizer.state[p]) if p in optimizer.state else None for p in params],
        "groups": [{k: len(v) if k == "params" else bits_in(v) for k, v in g.items()} for g in optimizer.param_groups],
        "defaults": bits_in(optimizer.defaults),
        "skipped_steps": bits(optimizer.skipped_steps),
    }


def snapshot(optimizer: torchlamb.Lamb) -> dict[str, Any]:
    """Return all that can be seen of an optimizer and its parameters."""
    hooks = [name for name in vars(optimizer) if name.endswith("_hooks")]
    return contents(optimizer) | {
        "membership": [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        "gradients": [id(p.grad) for p in params_of(optimizer)],
        "with state": {id(p) for p in optimizer.state},
        "hooks": {name: len(getattr(optimizer, name)) for name in hooks},
        "trust_ratios": bits_in(optimizer.trust_ratios()),
        "nonfinite": optimizer.nonfinite_parameters(),
    }


def unchanged_if_raises(optimizer: torchlamb.Lamb, call: Callable[[], Any]) -> Exception | None:
    """Return what the call raised, after asserting that nothing has changed then."""
    before = snapshot(optimizer)
    try:
        call()
    except EXPECTED as error:
        raised = error
    else:
        return None
    after = snapshot(optimizer)
    for what, value in before.items():
        assert after[what] == value, f"{what} changed by a call that raised {raised!r}"
    return raised


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(dtype)


def parameter(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.nn.Parameter:
    return torch.nn.Parameter(random(shape, dtype, seed))


def give_grads(optimizer: torchlamb.Lamb, seed: int, missing: int = 0) -> None:
    """Give every parameter a finite gradient, but for those whose bit is set in `missing`."""
    for i, p in enumerate(params_of(optimizer)):
        p.grad = None if missing >> i & 1 else random(p.shape, p.dtype, seed + i)


class Sequences(RuleBasedStateMachine):
    """One optimizer and all that may be done with it, or done wrong."""

    optimizer: torchlamb.Lamb

    def check_raises(self, call: Callable[[], Any], undo: Callable[[], Any] = lambda: None) -> None:
        """Assert that a call raises and changes nothing, and that a step can be taken once its cause is undone."""
        error = unchanged_if_raises(self.optimizer, call)
        assert error is not None, "a call that is wrong did not raise"
        event(f"{type(error).__name__}: {str(error)[:30]}")
        undo()
        self.step_finite(7)

    def check_step_or_undo(self, undo: Callable[[], Any]) -> None:
        """Assert that a step is taken, or refused with nothing changed, and then can be taken once its cause is undone."""
        if unchanged_if_raises(self.optimizer, self.optimizer.step) is not None:
            undo()
            self.step_finite(7)

    def step_finite(self, seed: int, missing: int = 0) -> None:
        give_grads(self.optimizer, seed, missing)
        self.optimizer.step()

    def param(self, index: int) -> Tensor:
        params = params_of(self.optimizer)
        return params[index % len(params)]

    def group(self, index: int) -> dict[str, Any]:
        return self.optimizer.param_groups[index % len(self.optimizer.param_groups)]

    def is_guarded(self) -> bool:
        return any(self.optimizer.param_groups[0][name] for name in GUARD)

    @initialize(
        kinds=st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)), min_size=1, max_size=4),
        mode=st.sampled_from([{}, *MODES]),
        guard=st.sampled_from([{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}]),
        named=st.booleans(),
        split=st.booleans(),
        seed=SEEDS,
    )
    def construct(self, kinds, mode, guard, named, split, seed):
        params: list[Any] = [parameter(*kind, seed + i) for i, kind in enumerate(kinds)]
        if named:
            params = [(f"p{i}", p) for i, p in enumerate(params)]
        self.named, self.saved = named, []
        groups = [params[:1], params[1:]] if split and len(params) > 1 else [params]
        self.optimizer = torchlamb.Lamb([{"params": group} for group in groups], lr=0.1, **mode, **guard)

    @rule(seed=SEEDS, missing=st.integers(0, 31))
    def step(self, seed, missing):
        self.step_finite(seed, missing)

    @rule(index=INDICES, value=st.sampled_from([math.nan, math.inf, -math.inf]), seed=SEEDS)
    def step_nonfinite(self, index, value, seed):
        """Under a guard it leaves parameters, moments and counts, and is counted; without one it may not raise."""
        give_grads(self.optimizer, seed)
        grad = self.param(index).grad
        grad.fill_(value)
        before = contents(self.optimizer)
        self.optimizer.step()
        if not self.is_guarded() or not grad.numel():
            return
        after = contents(self.optimizer)
        assert after["params"] == before["params"]
        for old, new in zip(before["state"], after["state"], strict=True):
            kept = {} if old is None else {k: old[k] for k in ("step", "exp_avg", "exp_avg_sq") if k in old}
            assert kept.items() <= new.items()
        assert after["skipped_steps"] != before["skipped_steps"]

    @rule()
    def drop_grads(self):
        self.optimizer.zero_grad()
        self.optimizer.step()

    @rule(index=INDICES)
    def step_sparse(self, index):
        param = self.param(index)
        give_grads(self.optimizer, 1)
        param.grad = param.grad.to_sparse()
        self.check_raises(self.optimizer.step)

    @rule()
    def closure_raises(self):
        def closure() -> None:
            raise ValueError("of the closure")

        give_grads(self.optimizer, 2)
        self.check_raises(lambda: self.optimizer.step(closure))

    # Groups

    def new_group(self, entry: Any, options: dict[str, Any]) -> dict[str, Any]:
        guard = {name: self.optimizer.param_groups[0][name] for name in GUARD}  # may have been written since the constructor
        return {"params": [("new", entry) if self.named else entry], **guard, **options}

    @precondition(lambda self: len(self.optimizer.param_groups) < 4)
    @rule(
        shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES), name=st.sampled_from(FREE), i=INDICES,
        mode=st.sampled_from([{}, *MODES]),
    )  # fmt: skip
    def add_group(self, shape, dtype, name, i, mode):
        """A good group is added, unless it contradicts the constructor's options."""
        options = {name: GOOD[name][i % len(GOOD[name])], **mode}
        merged = {**self.optimizer.defaults, **options}
        contradicts = all(merged[k] for k in STORAGE[:2]) or all(merged[k] for k in ("fused", "foreach"))
        group = self.new_group(parameter(shape, dtype, i), options)
        error = unchanged_if_raises(self.optimizer, lambda: self.optimizer.add_param_group(group))
        assert (error is not None) == contradicts, error
        self.step_finite(i)

    @rule(option=st.sampled_from(PAIRS_OF_BAD))
    def add_group_of_bad_option(self, option):
        group = self.new_group(parameter((4,), torch.float32), dict([option]))
        self.check_raises(lambda: self.optimizer.add_param_group(group))

    @rule(kind=st.sampled_from(["member", "non-leaf", "set", "none", "object", "names", "no dict"]), index=INDICES)
    def add_group_of_bad_params(self, kind, index):
        new = parameter((4,), torch.float32)
        group: Any = self.new_group({"member": self.param(index), "non-leaf": new * 2, "object": 3}.get(kind, new), {})
        if kind in ("set", "none"):
            group["params"] = {new} if kind == "set" else None
        elif kind == "names":
            group["params"] = [new if self.named else ("new", new)]
        elif kind == "no dict":
            group = [new]
        self.check_raises(lambda: self.optimizer.add_param_group(group))

    @rule(kind=st.sampled_from(["blocks", "rounding", "guard", "differentiable", "fused", "float16"]))
    def add_group_of_contradictions(self, kind):
        options = {
            "blocks": {"blocks": 3},
            "rounding": {"master_weights": True, "stochastic_rounding": True},
            "guard": {"skip_nonfinite": not self.optimizer.param_groups[0]["skip_nonfinite"]},
            "differentiable": {"differentiable": True},
            "fused": {"fused": True, "foreach": True},
            "float16": {"stochastic_rounding": True, "master_weights": False},
        }[kind]
        dtype = torch.float16 if kind == "float16" else torch.float32
        group = self.new_group(parameter((4,), dtype), options)
        self.check_raises(lambda: self.optimizer.add_param_group(group))

    # Options written into groups

    @rule(index=INDICES, name=st.sampled_from(FREE), i=INDICES)
    def write_option(self, index, name, i):
        self.group(index)[name] = GOOD[name][i % len(GOOD[name])]
        self.step_finite(i)

    @rule(index=INDICES, mode=st.sampled_from(MODES))
    def write_mode(self, index, mode):
        """Another way to store or compute is taken up, or refused for a dtype that an earlier rule gave a parameter."""
        group = self.group(index)
        old = {name: group[name] for name in mode}
        group.update(mode)
        give_grads(self.optimizer, 3)
        self.check_step_or_undo(lambda: group.update(old))

    @rule(name=st.sampled_from(GUARD), i=INDICES)
    def write_guard(self, name, i):
        for group in self.optimizer.param_groups:
            group[name] = GOOD[name][i % len(GOOD[name])]
        self.step_finite(i)

    @rule(index=INDICES, option=st.sampled_from(PAIRS_OF_BAD), seed=SEEDS)
    def write_bad_option(self, index, option, seed):
        group, (name, value) = self.group(index), option
        old = group[name]
        give_grads(self.optimizer, seed)
        group[name] = value
        if any(value is stepped for stepped in STEPPED.get(name, [])):
            self.optimizer.step()
            group[name] = old
        else:
            self.check_raises(self.optimizer.step, lambda: group.update({name: old}))

    @rule(index=INDICES)
    def write_blocks_that_do_not_divide(self, index):
        group = self.group(index)
        give_grads(self.optimizer, 4)
        group["blocks"] = 7
        divides = all(p.dim() and p.shape[0] == 0 for p in group["params"])
        error = unchanged_if_raises(self.optimizer, self.optimizer.step)
        assert (error is None) == divides
        group["blocks"] = 1
        self.step_finite(4)

    # Parameters changed from outside

    @rule(index=INDICES, dtype=st.sampled_from(OTHER_DTYPES), keep_grad=st.booleans())
    def change_dtype(self, index, dtype, keep_grad):
        """A step is taken, with the gradient of the old dtype too, or refused where an option does not allow the dtype."""
        param, old = self.param(index), self.param(index).dtype
        give_grads(self.optimizer, 5)
        if not keep_grad:
            param.grad = None
        param.data = param.data.to(dtype)
        if not keep_grad:
            param.grad = random(param.shape, dtype, 5)

        def undo() -> None:
            param.grad = None
            param.data = param.data.to(old)

        self.check_step_or_undo(undo)

    @rule(index=INDICES, carry=st.booleans())
    def swap(self, index, carry):
        """As accelerate does, with its state or without."""
        old = self.param(index)
        new = torch.nn.Parameter(old.detach().clone())
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        state = self.optimizer.state.pop(old, None)
        if carry and state is not None:
            self.optimizer.state[new] = state
        self.step_finite(6)

    @rule(index=INDICES, seed=SEEDS)
    def resize(self, index, seed):
        """State of another shape cannot be stepped with."""
        param, old = self.param(index), self.param(index).data
        self.step_finite(seed)
        for other in params_of(self.optimizer):
            if other is not param:
                self.optimizer.state.pop(other)
        self.optimizer.zero_grad()
        param.data = random((*param.shape, 2), param.dtype, seed)
        give_grads(self.optimizer, seed)

        def undo() -> None:
            param.grad = None
            param.data = old

        self.check_raises(self.optimizer.step, undo)

    # Copies and state dicts

    @rule(pickled=st.booleans())
    def copy(self, pickled):
        """A copy of parameters and optimizer has the same contents, and the run goes on with it."""
        self.optimizer.zero_grad()  # torch copies no gradients of parameters
        before = contents(self.optimizer)
        together = (params_of(self.optimizer), self.optimizer)
        params, self.optimizer = pickle.loads(pickle.dumps(together)) if pickled else copy.deepcopy(together)
        assert contents(self.optimizer) == before
        assert all(p is q for p, q in zip(params, params_of(self.optimizer), strict=True))

    def layout(self) -> list[list[Any]]:
        return [[(tuple(p.shape), p.dtype) for p in group["params"]] for group in self.optimizer.param_groups]

    @rule()
    def save(self):
        self.saved.append((self.layout(), copy.deepcopy(self.optimizer.state_dict())))

    @precondition(lambda self: self.saved)
    @rule(index=INDICES)
    def load(self, index):
        """An older dict is taken where groups and dtypes are as they were, and refused where shapes are not."""
        layout, saved = self.saved[index % len(self.saved)]
        given = bits_in(saved)
        error = unchanged_if_raises(self.optimizer, lambda: self.optimizer.load_state_dict(copy.deepcopy(saved)))
        assert bits_in(saved) == given
        groups = [[shape for shape, _ in group] for group in layout]
        if layout == self.layout():
            assert error is None, error
        elif groups != [[shape for shape, _ in group] for group in self.layout()]:
            assert error is not None or not saved["state"]
        self.step_finite(8)

    @rule(option=st.sampled_from(PAIRS_OF_BAD), index=INDICES)
    def load_bad_option(self, option, index):
        """It is loaded, as all that this optimizer may have saved; the next step refuses it."""
        name, value = option
        bad = self.optimizer.state_dict()
        group = bad["param_groups"][index % len(bad["param_groups"])]
        own = self.group(index)
        keeps = name in STORAGE and (own[name] or any(own[k] for k in STORAGE[:2]))
        old, group[name] = own[name], value
        self.check_loads(bad, lambda: self.group(index).update({name: old}))
        if keeps or name in ("foreach", "fused", "differentiable"):
            assert bits(self.group(index)[name]) == bits(old)

    @rule(kind=st.sampled_from(["entry", "no lr", "rounding", "guard", "further keys"]), index=INDICES)
    def load_odd_groups(self, kind, index):
        """What a user or a wrapper may have written is loaded."""
        odd: Any = self.optimizer.state_dict()
        group = odd["param_groups"][index % len(odd["param_groups"])]
        kept = [{name: own[name] for name in (*STORAGE, *GUARD)} for own in self.optimizer.param_groups]
        if kind == "entry":
            odd["state"][99] = {"step": torch.ones(())}
            odd["state"]["wrapper"] = 3
        elif kind == "no lr":
            del group["lr"]
        elif kind == "rounding":
            group.update(master_weights=True, stochastic_rounding=True)
        elif kind == "guard":
            group.update(max_grad_norm=0.25)
        else:
            group.update(initial_lr=0.5, note="a")
            for state in odd["state"].values():
                state["momentum_buffer"] = torch.ones(())
        self.check_loads(odd, lambda: [own.update(k) for own, k in zip(self.optimizer.param_groups, kept, strict=True)])
        for key in (99, "wrapper"):
            self.optimizer.state.pop(key, None)

    @rule(kind=st.sampled_from(["groups", "size", "no dict", "no state", "no groups"]), index=INDICES)
    def load_bad_groups(self, kind, index):
        bad: Any = self.optimizer.state_dict()
        groups = bad["param_groups"]
        if kind == "groups":
            groups.append({**copy.deepcopy(groups[0]), "params": [99]})
        elif kind == "size":
            groups[index % len(groups)]["params"].append(99)
        elif kind == "no dict":
            bad = list(bad)
        else:
            del bad["state" if kind == "no state" else "param_groups"]
        self.check_load_raises(bad)

    @rule(
        key=st.sampled_from(["exp_avg", "exp_avg_sq", "step"]),
        kind=st.sampled_from(["missing", "shape", "kind", "complex"]),
        index=INDICES,
    )
    def load_bad_state(self, key, kind, index):
        """One entry of a parameter's state is missing, or of another shape or kind."""
        if not any("exp_avg" in state for state in self.optimizer.state.values()):
            self.step_finite(9)
        bad = copy.deepcopy(self.optimizer.state_dict())
        full = [state for state in bad["state"].values() if "exp_avg" in state]
        state = full[index % len(full)]
        if kind == "missing":
            del state[key]
        elif kind == "shape":
            state[key] = torch.zeros((*state[key].shape, 2))
        elif kind == "kind":
            state[key] = None
        elif key == "step":
            return
        else:
            state[key] = torch.zeros(state[key].shape, dtype=torch.complex64)
        self.check_load_raises(bad)

    def check_loads(self, odd: Any, undo: Callable[[], Any]) -> None:
        """Assert that a dict is loaded, and that the next step is taken, or refused with nothing changed."""
        given = bits_in(odd)
        self.optimizer.load_state_dict(odd)
        assert bits_in(odd) == given, "the caller's dict was changed"
        give_grads(self.optimizer, 9)
        self.check_step_or_undo(undo)
        undo()

    def check_load_raises(self, bad: Any) -> None:
        given = []

        def load() -> None:
            given.append(bits_in(bad))
            try:
                self.optimizer.load_state_dict(bad)
            finally:
                given.append(bits_in(bad))

        self.check_raises(load)
        assert given[0] == given[1], "the caller's dict was changed"


Sequences.TestCase.settings = settings(max_examples=50, stateful_step_count=15)
TestSequences = Sequences.TestCase


def test_every_argument_is_drawn():
    assert list(GOOD) == list(BAD) == list(DEFAULTS)


def options_of(values: dict[str, list[Any]], most: int) -> st.SearchStrategy[dict[str, Any]]:
    pairs = st.sampled_from([(name, value) for name, choices in values.items() for value in choices])
    return st.lists(pairs, max_size=most).map(dict)


# Most of what is drawn is good: of one bad value in each, nothing would ever be constructed.
DRAWN = st.tuples(options_of(GOOD, 3), st.just({}) | st.just({}) | options_of(BAD, 1))


@settings(max_examples=60)
@given(
    arguments=DRAWN,
    groups=st.lists(st.tuples(DRAWN, st.sampled_from(SHAPES), st.sampled_from(DTYPES)), min_size=1, max_size=3),
    seed=SEEDS,
)
def test_construction(arguments, groups, seed):
    """It succeeds and steps keep parameters finite, or it raises, naming an argument, and leaves all it was given as it was."""
    good, bad = arguments
    options = {**good, **bad}
    params = [parameter(shape, dtype, seed + i) for i, (_, shape, dtype) in enumerate(groups)]
    dicts = [{"params": [p], **group[0], **group[1]} for p, (group, _, _) in zip(params, groups, strict=True)]
    originals = [{name: value for name, value in group.items() if name != "params"} for group in dicts]
    before = bits_in(params)
    try:
        optimizer = torchlamb.Lamb(dicts, **options)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        said = str(error)
    else:
        said = None
    if said is not None:
        names = {name for given in (options, *originals) for name in given}
        assert any(name in said for name in names), f"{said} names none of {names}"
        assert bits_in(params) == before
        check_kept(dicts, originals, any(group[1] for group, _, _ in groups) or bool(bad))
        return
    assert not bad
    assert not any(group[1] for group, _, _ in groups), "a bad value was taken"
    if optimizer.defaults["differentiable"]:
        return  # which no step can be with parameters that are leaves
    for step in range(2):
        give_grads(optimizer, seed + 10 * step)
        optimizer.step()
    assert all(p.isfinite().all() for p in params)


def check_kept(dicts: list[dict[str, Any]], originals: list[dict[str, Any]], is_bad: bool) -> None:
    """Assert that a caller's groups still have the values they were given, the same or as plain values (1 as 1.0)."""
    event(f"refused for {'a bad value' if is_bad else 'a contradiction'}")
    for group, original in zip(dicts, originals, strict=True):
        for name, value in original.items():
            kept = group[name]
            assert kept is value or kept == (tuple(value) if isinstance(value, list) else value), name
