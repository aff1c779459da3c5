"""When the GPU's kernels are taken, how their work is laid out, and what compilers for GPUs make of them. No GPU is needed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types

import pytest
import torch
from loading import HANGS, ROOT, load_script

from torchlamb import Lamb
from torchlamb.backends import foreach, gpu, resolve

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
F32 = torch.float32


def group(**options):
    return Lamb([torch.zeros(2, requires_grad=True)], **options).param_groups[0]


# Which backend


@needs_triton
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_kernels_are_taken_where_they_can_be_had(device):
    device = torch.device(device)
    assert resolve(group(), device, [F32, torch.bfloat16], small=False) == (
        gpu,
        "fused=None: kernels for this device, in Triton",
    )
    backend, why = resolve(group(fused=False), device, [F32], small=False)
    assert backend is foreach
    assert "fused=False was asked for" in why
    backend, why = resolve(group(), device, [torch.float64], small=False)
    assert backend is foreach
    assert "they have no float64" in why
    asked = {**group(), "fused": True}
    assert resolve(asked, device, [F32], small=False) == (gpu, "fused=True: was asked for, in Triton")
    with pytest.raises(RuntimeError, match=r"fused=True: no kernels, they have no float64; leave fused=None, or set foreach"):
        resolve(asked, device, [torch.float64], small=False)


def test_other_devices_have_none():
    backend, why = resolve(group(), torch.device("mps"), [F32], small=False)
    assert backend is foreach
    assert "there are none for mps" in why


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "torchlamb.backends.gpu_kernels", raising=False)
    monkeypatch.setattr(gpu, "kernels", gpu._Kernels())
    backend, why = resolve(group(), torch.device("cuda"), [F32], small=False)
    assert backend is foreach
    assert "Triton cannot be imported" in why
    with pytest.raises(RuntimeError, match=r"pip install 'torchlamb\[gpu\]'"):
        resolve({**group(), "fused": True}, torch.device("cuda"), [F32], small=False)


@needs_triton
def test_gpus_that_triton_does_not_serve(monkeypatch):
    monkeypatch.setattr(gpu, "kernels", gpu._Kernels())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    backend, why = resolve(group(), torch.device("cuda"), [F32], small=False)
    assert backend is foreach
    assert "compute capability 8.0 or newer" in why
    monkeypatch.setattr(gpu, "kernels", gpu._Kernels())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    assert resolve(group(), torch.device("cuda"), [F32], small=False)[0] is gpu


@needs_triton
def test_without_what_launches_kernels(monkeypatch):
    """Triton builds that with a C compiler, at its first launch; here there is no GPU for which it could be."""
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(gpu, "kernels", gpu._Kernels())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    backend, why = resolve(group(), torch.device("cuda"), [F32], small=False)
    assert backend is foreach
    assert "Triton cannot launch any (" in why


def test_triton_is_not_imported_for_a_cpu():
    code = """
import sys, torch
before = set(sys.modules)
import torchlamb
assert not any(name.startswith("triton") for name in set(sys.modules) - before)
p = torch.ones(3, requires_grad=True)
optimizer = torchlamb.Lamb([p])
p.grad = torch.ones(3)
optimizer.step()
assert "torchlamb.backends.gpu_kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANGS)


def test_steps_are_counted_where_the_kernels_are(monkeypatch):
    """With steps on the host, every step of a GPU would wait for it."""
    from torchlamb import state

    monkeypatch.setattr(state, "counts_on_device", lambda group, device: device.type == "meta" and group["fused"] is not False)
    for options, device in (({}, "meta"), ({"fused": False}, "cpu"), ({"foreach": True, "capturable": True}, "meta")):
        p = torch.zeros(3, device="meta", requires_grad=True)
        kept: dict[str, torch.Tensor] = {}
        state.Storage({**group(), **options}).fill_(kept, p, 0)
        assert kept["step"].device.type == device
        kept["step"] = torch.zeros(())
        state.Storage({**group(), **options}).fill_(kept, p, 0)
        assert kept["step"].device.type == device


# The order of the one launch


@pytest.mark.parametrize("window", [1, 10, 50, 10**9])
def test_rows_are_applied_after_they_are_accumulated(window, monkeypatch):
    monkeypatch.setattr(gpu, "WINDOW", window)
    sizes = [3, 0, 25, 1, 40, 0, 9]
    chunks = gpu._Chunks(sizes, [True, True, False, True, True, True, True], 8)
    order, segments, tickets = gpu._order(chunks)
    firsts, kinds = order[: segments + 1], list(zip(order[segments + 1 :: 2], order[segments + 2 :: 2], strict=True))
    assert tickets == firsts[-1] == 2 * sum(-(-size // 8) for size in sizes)
    assert sorted(kinds) == [(row, kind) for row in range(len(sizes)) for kind in (0, 1)]
    for row in range(len(sizes)):
        first, second = kinds.index((row, 0)), kinds.index((row, 1))
        assert first < second
        assert [firsts[i + 1] - firsts[i] for i in (first, second)] == [-(-sizes[row] // 8)] * 2


def test_full_chunks_are_those_of_aligned_rows():
    chunks = gpu._Chunks([16, 17, 7, 16], [True, True, True, False], 8)
    assert chunks.full_firsts == [0, 2, 4, 4, 4]
    assert chunks.rest_firsts == [0, 0, 1, 2, 4]


# A stand-in for a GPU that is captured


def test_what_a_graph_reads_again_stays(monkeypatch):
    """A capture takes pinned memory from a reserve, which no later step writes to, and allocates none."""
    real = torch.empty
    allocated = []

    def empty(*args, pin_memory=False, **kwargs):
        allocated.append(pin_memory)
        return real(*args, **kwargs)

    capturing = types.SimpleNamespace(on=False)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing.on)
    pinned = gpu._Pinned()
    capturing.on = True
    with pytest.raises(RuntimeError, match="take a step outside of one before"):
        pinned.take(5)
    capturing.on = False
    pinned.take(5)
    assert allocated == [False, True, True]  # nothing, the reserve, and what was asked for
    capturing.on = True
    allocated.clear()
    taken = [pinned.take(5).fill_(i) for i in range(4)]
    assert not allocated
    capturing.on = False
    for count in (5, 5000, 5):
        pinned.take(count).fill_(-1)
    assert [t.tolist() for t in taken] == [[i] * 5 for i in range(4)]
    assert [t.data_ptr() for t in taken] == [t.data_ptr() for t in pinned.captured]


# Compiled for GPUs


def assert_all_are_wide(kernel, kinds, accesses):
    """Assert that what a thread reads and writes of a block, 8 elements, takes as many accesses as it has times 128 bits."""
    param, grad, *moments = (dtype.primitive_bitwidth // 16 for dtype in kinds[:4])  # accesses of each
    masters = 2 * kinds.masters
    loads, stores = {
        "grad_sq_norms": (grad, 0),
        "accumulate": (param + grad + sum(moments) + masters, sum(moments)),
        "apply": (param + sum(moments) + masters, param + masters),
    }[kernel]
    wide = {access: count for access, count in accesses.items() if "128" in access or access.endswith("x4")}
    for expected, kind in ((loads, ("LDG", "buffer_load")), (stores, ("STG", "buffer_store"))):
        found = sum(count for access, count in wide.items() if access.startswith(kind))
        assert found in (expected, 2 * expected), (kernel, kind, accesses)  # the two blocks of a chunk, in a loop or not


@pytest.fixture(scope="module")
def offline():
    return load_script(ROOT / "benchmarks" / "gpu_offline.py")


KINDS = (
    *("float32", "float32, guarded", "float32, bf16 state"),
    *("bf16", "bf16, masters", "bf16, stochastic", "bf16, stochastic, bf16 state"),
)


@needs_triton
@pytest.mark.parametrize(
    "target", [pytest.param(sm, marks=pytest.mark.slow) for sm in ("sm_80", "sm_100")] + ["sm_90", "gfx942"]
)
@pytest.mark.parametrize(
    "kinds", [pytest.param(kinds, marks=pytest.mark.slow) if kinds != "float32" else kinds for kinds in KINDS]
)
def test_what_compilers_make_of_the_kernels(kinds, target, offline):
    """No spills, no more registers than there should be, and accesses of 128 bits to full chunks."""
    from torchlamb.backends import gpu_kernels

    assert set(KINDS) | {"fp16, masters"} == set(offline.KINDS)
    seen = set()
    for name, kernel, constants in offline.variants(offline.KINDS[kinds]):
        machine = offline.compiled(kernel, constants, offline.TARGETS[target])
        seen.add(kernel.__name__)
        assert machine.spills == 0, name
        assert machine.registers <= gpu_kernels.REGISTERS, name
        if "full" in name:
            # What is left: a chunk's sums, and the two that `apply` takes its ratio from.
            assert offline.narrow(machine) <= {"grad_sq_norms": 1}.get(kernel.__name__, 2), (name, machine.accesses)
            assert_all_are_wide(kernel.__name__, offline.KINDS[kinds], machine.accesses)
    assert seen == {"grad_sq_norms", "accumulate", "add_partials", "apply", "step"}


def test_without_a_gpu_nothing_is_measured():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    script = ROOT / "benchmarks" / "gpu_check.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 2
    assert "torch finds no CUDA device here" in done.stderr
