"""Cases of torchlamb.checkpoint."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sharded import TIMEOUT, Net, assert_states, case, fsdp, like, make_on, mesh_of, raises, step_on, whole_state
from torch import nn

import torchlamb
from torchlamb import checkpoint

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
from sharded import Net
import torchlamb
from torchlamb import checkpoint
model = Net()
optimizer = torchlamb.Lamb(torchlamb.param_groups(model, weight_decay=0.1), max_grad_norm=1.0)
assert checkpoint.load(sys.argv[2], model, optimizer) == {"step": 3}
state = {n: p.detach() for n, p in model.named_parameters()}
state |= {f"{n}.{k}": v for n, p in model.named_parameters() for k, v in optimizer.state[p].items()}
torch.save(state, sys.argv[3])
"""


@case(2, slow=lambda _: True)
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
