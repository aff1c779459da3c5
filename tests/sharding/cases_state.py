"""Cases of distributed state dicts."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import BF16, STORAGE, Net, assert_states, case, fsdp, make_on, mesh_of, step_on, whole, whole_state
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh

import torchlamb
from torchlamb.mindspore import nn as front

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
