"""The CPU's kernels on threads, in forked processes, compiled, under a scaler and under sanitizers."""

from __future__ import annotations

import copy
import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from calling import BF16, CSRC, F16, F32, F64, assert_same, in_child, make_optimizer, parameter, stored
from loading import HANGS

import torchlamb
from torchlamb.backends import cpu

# Processes and threads


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from Python 3.12 on, of a fork beside threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_child_steps():
    torch.set_num_threads(2)
    params, optimizer = make_optimizer()
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twins = twin.param_groups[0]["params"]
    for p, q in zip(params, twins, strict=True):
        q.grad = p.grad.clone()
    twin.step()
    twin.step()
    wanted = [q.detach().numpy() for q in twins]
    torch.equal(params[0], params[0])

    def child():
        optimizer.step()
        optimizer.step()
        return all(np.array_equal(p.detach().numpy(), w) for p, w in zip(params, wanted, strict=True))

    assert in_child(child) == 0
    optimizer.step()  # and the parent goes on with its threads
    optimizer.step()
    assert all(np.array_equal(p.detach().numpy(), w) for p, w in zip(params, wanted, strict=True))


def test_steps_within_a_parallel_region():
    """Each of torch's threads steps an optimizer of its own."""
    torch.set_num_threads(2)
    pairs = [make_optimizer(seed) for seed in range(4)]
    wanted = []
    for seed in range(4):
        params, optimizer = make_optimizer(seed)
        optimizer.step()
        wanted.append(stored(params, optimizer))
    failures = []

    def steps(begin, end, _):
        try:
            for i in range(begin, end):
                pairs[i][1].step()
        except Exception as error:  # ctypes would drop it
            failures.append(error)

    body_type = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    number = ctypes.c_int64
    parallel_for = ctypes.CFUNCTYPE(ctypes.c_int32, number, number, number, body_type, ctypes.c_void_p)(
        cpu.library.parallel_for
    )
    assert parallel_for(0, 4, 1, body_type(steps), None) == 0
    assert failures == []
    for (params, optimizer), result in zip(pairs, wanted, strict=True):
        assert_same(stored(params, optimizer), result)


def test_optimizers_on_threads_of_their_own():
    torch.set_num_threads(2)
    wanted = []
    for seed in range(4):
        params, optimizer = make_optimizer(seed)
        for _ in range(20):
            optimizer.step()
        wanted.append(stored(params, optimizer))
    pairs = [make_optimizer(seed) for seed in range(4)]
    threads = [threading.Thread(target=lambda o=o: [o.step() for _ in range(20)]) for _, o in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (params, optimizer), result in zip(pairs, wanted, strict=True):
        assert_same(stored(params, optimizer), result)


# Compiled


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
@pytest.mark.parametrize(("dtype", "options"), [(F32, {"blocks": 2}), (BF16, {"master_weights": True})], ids=["f32", "masters"])
def test_compiled_step_calls_the_kernels(dtype, options, capturable):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    torch._dynamo.reset()
    graphs = []

    def compiler(graph, _):
        graphs.append(str(graph.graph))
        return make_boxed_func(graph.forward)

    torch.manual_seed(0)
    params = [parameter(40, 3, dtype=dtype), parameter(6, dtype=dtype)]
    twins = copy.deepcopy(params)
    lamb, eager = (
        torchlamb.Lamb(ps, lr=torch.tensor(0.02), capturable=capturable, fused=True, **options) for ps in (params, twins)
    )
    compiled = torch.compile(lamb.step, backend=aot_autograd(fw_compiler=compiler))
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        compiled()
        eager.step()
    assert any("torchlamb.lamb_" in graph for graph in graphs)
    assert_same(stored(params, lamb), stored(twins, eager))


def test_op_is_what_it_declares():
    p, *moments = (torch.rand(2, 5) for _ in range(3))
    numbers = [0.9, 0.999, 1e-6, 0.1, 0.0, float("inf"), 0.0, float("inf")]
    lists = [[p], [torch.rand(2, 5)], [moments[0]], [moments[1]], [], [torch.ones(())], [], []]
    scalars = [torch.tensor(0.1, dtype=F64), torch.tensor(1.0), None]
    arguments = (3, *lists, [], torch.zeros(1, 2), *scalars, numbers, 7)
    torch.library.opcheck(torch.ops.torchlamb.lamb_.default, arguments)


# Loss scaling


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("guard", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_scaled_gradients_are_unscaled_and_skipped(dtype, guard):
    torch.manual_seed(0)
    params = [parameter(40, dtype=dtype), parameter(3, 3, dtype=dtype)]
    twins = copy.deepcopy(params)
    scaled, plain = (torchlamb.Lamb(ps, lr=0.1, fused=True, **guard) for ps in (params, twins))
    assert scaled._step_supports_amp_scaling
    for overflow in (True, False, True, False):
        for p, q in zip(params, twins, strict=True):
            q.grad = torch.randn(q.shape).to(dtype)
            p.grad = q.grad * 64
        if overflow:
            params[0].grad[3] = torch.inf
        before = stored(params, scaled)
        scaled.grad_scale, scaled.found_inf = torch.tensor([64.0]), torch.tensor([float(overflow)])
        scaled.step()
        if not overflow:
            plain.step()
            assert_same(stored(params, scaled), stored(twins, plain))
        else:
            after = stored(params, scaled)
            assert_same({key: after[key] for key in before}, before)
            assert all(state["step"].item() == len(before.keys() & {(0, "step")}) for state in scaled.state.values())


# Memory


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path):
    """No access outside a tensor and no undefined behaviour: what `make sanitize` runs."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if shutil.which("cmake") is None or compiler is None:
        pytest.skip("no cmake or no g++")
    found = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, timeout=HANGS, check=False
    )
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip(f"{compiler} has no libasan.so")
    options = ["-DTORCHLAMB_SANITIZE=ON", f"-DCMAKE_CXX_COMPILER={compiler}"]
    build = tmp_path / "sanitized"
    subprocess.run(["cmake", "-S", CSRC, "-B", build, *options], timeout=HANGS, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], timeout=HANGS, check=True, capture_output=True)
    script = Path(__file__).with_name("sanitized_kernels.py")
    environment = {**os.environ, "LD_PRELOAD": str(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, script, build / "libtorchlamb_cpu.so"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "baseline: " in done.stdout
