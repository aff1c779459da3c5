"""Everything that only a GPU can tell of the kernels, in one go: are they right, do they wait for the host, how fast are they.

    python benchmarks/gpu_check.py                 # rows are appended to benchmarks/results.csv
    python benchmarks/gpu_check.py --only checks   # or: timings

Prints one line for each check, and ends with 1 if one has failed. The one launch (`gpu.ONE_LAUNCH`) may be switched on for
good once this has passed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, Shapes
from step_time import OPTIONS, RESULTS, Make, append, import_alone, make_params, provenance, version

import torchlamb
from torchlamb.backends import gpu

ROOT = Path(__file__).parent.parent
ROUNDS = 15
ODD_SIZES: Shapes = [(1,), (2047,), (2048,), (2049,), (100_003,), (64, 2048), (3, 5, 7), (0,), (), (1_000_001,)]
BYTES = {"torchlamb": 40, "torchlamb one launch": 40, "AdamW fused": 28}  # per float32 parameter; see gpu_offline.py


@contextlib.contextmanager
def one_launch(on: bool) -> Iterator[None]:
    before, gpu.ONE_LAUNCH = gpu.ONE_LAUNCH, on
    try:
        yield
    finally:
        gpu.ONE_LAUNCH = before


def run(params: list[torch.nn.Parameter], steps: int, **options: Any) -> list[torch.Tensor]:
    """Step copies of the parameters with gradients that change, and return what is stored then."""
    params = copy.deepcopy(params)
    optimizer = torchlamb.Lamb(params, **OPTIONS, fused=True, **options)
    generator = torch.Generator(params[0].device).manual_seed(0)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, device=p.device)
        optimizer.step()
    return [*(p.detach() for p in params), *(value for p in params for _, value in sorted(optimizer.state[p].items()))]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Checks: each raises if it fails.


def the_case_table_holds(device: str) -> None:
    """Every kind of test that runs in the interpreter, on the device, at the same tolerances."""
    tests = ["gpu/test_gpu_kernels.py", "rule/test_rule.py"]
    tests += [f"rule/test_precision.py::test_{name}" for name in ("combinations", "layouts_in_16_bits")]
    tests += [f"rule/test_guard.py::test_{name}" for name in ("bad_gradient", "clipping_equals_clip_grad_norm")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
    command += ["-n", "4"] if importlib.util.find_spec("xdist") else []
    command += [f"tests/{name}" for name in tests]
    environment = {**os.environ, "TORCHLAMB_TEST_DEVICE": device}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=290)
    print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-2000:])
    assert done.returncode == 0, done.stdout[-6000:]


def two_runs_give_the_same_bits(device: str, steps: int = 20) -> None:
    params = make_params(ODD_SIZES, device)
    for form in (False, True):
        with one_launch(form):
            assert same(run(params, steps), run(params, steps)), f"one_launch={form}"


def one_launch_is_the_two_phases_under_load(device: str, steps: int = 3000) -> None:
    """Bitwise, after every 100 steps, while another stream keeps the multiprocessors and the cache busy."""
    params = make_params(ODD_SIZES, device)
    loaded = 0
    rounds = max(1, steps // 100)
    for turn in range(rounds):
        results = []
        for form in (False, True):
            done = keep_busy() if device == "cuda" else None
            with one_launch(form):
                results.append(run(params, min(steps, 100), max_grad_norm=1.0 if turn % 2 else None))
            loaded += form and done is not None and not done.query()
        assert same(*results), f"in turn {turn}"
    if device == "cuda":
        torch.cuda.synchronize()
        assert loaded >= rounds // 2, f"only {loaded} of {rounds} turns ended before the load did"


def keep_busy() -> torch.cuda.Event:
    """Start half a second or more of matrix products in a stream of their own, and return an event at their end."""
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        matrix = torch.randn(4096, 4096, device="cuda")
        for _ in range(400):
            matrix = (matrix @ matrix).clamp(-1, 1)
        done.record()
    return done


def nothing_waits_for_the_host(device: str) -> None:
    for options in ({}, {"capturable": True}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "capturable": True}):
        params = make_params(ODD_SIZES, device)
        optimizer = torchlamb.Lamb(params, **OPTIONS, fused=True, **options)
        for form in (False, True):
            with one_launch(form):
                optimizer.step()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    for _ in range(3):
                        optimizer.step()
                        optimizer.trust_ratios()
                finally:
                    torch.cuda.set_sync_debug_mode("default")


def a_graph_gives_what_steps_give(device: str) -> None:
    """Capture once, replay with other gradients and another learning rate; steps in between must not change what it reads."""
    for options in ({}, {"max_grad_norm": 1.0}, {"stochastic_rounding": True, "state_dtype": torch.bfloat16}):
        for form in (False, True):
            with one_launch(form):
                dtype = torch.bfloat16 if "stochastic_rounding" in options else torch.float32
                captured = make_params(ODD_SIZES, device, dtype)
                eager = copy.deepcopy(captured)
                lr = torch.tensor(1e-3, device=device)
                optimizers = [
                    torchlamb.Lamb(ps, **{**OPTIONS, "lr": lr}, fused=True, capturable=True, **options)
                    for ps in (captured, eager)
                ]
                for p, q in zip(captured, eager, strict=True):
                    q.grad = p.grad.clone()
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    optimizers[0].step()
                torch.cuda.current_stream().wait_stream(stream)
                optimizers[1].step()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizers[0].step()
                for replay in range(10):
                    lr.fill_(1e-3 / (replay + 1))
                    for p, q in zip(captured, eager, strict=True):
                        p.grad.copy_(torch.randn_like(p))
                        q.grad.copy_(p.grad)
                    run(make_params([(5,), (3000,)], device), 2)
                    graph.replay()
                    optimizers[1].step()
                for p, q in zip(captured, eager, strict=True):
                    assert torch.equal(p, q), (options, form, p.shape)
                    states = (optimizers[0].state[p], optimizers[1].state[q])
                    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def one_tensor_of_more_than_2_31_elements(device: str) -> None:
    """In bfloat16, of which only the ends are compared."""
    size = 2**31 + 1000
    p = torch.nn.Parameter(torch.full((size,), 2.0, device=device, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    p.grad[-1] = -1
    torchlamb.Lamb([p], lr=0.5, fused=True, state_dtype=torch.bfloat16).step()
    assert p[0].item() == p[2**31 - 1].item() == p[2**31 + 1].item() == 1.0
    assert p[-1].item() == 3.0


# With their limits in seconds. What could hang comes last.
CHECKS = {
    nothing_waits_for_the_host: 60,
    one_tensor_of_more_than_2_31_elements: 60,
    two_runs_give_the_same_bits: 60,
    a_graph_gives_what_steps_give: 60,
    one_launch_is_the_two_phases_under_load: 120,
    the_case_table_holds: 300,
}


def checked(check: Callable[[str], None], device: str) -> bool:
    start = time.perf_counter()
    try:
        check(device)
    except Exception:
        traceback.print_exc()
        print(f"FAILED  {check.__name__}", flush=True)
        return False
    print(f"passed  {check.__name__} in {time.perf_counter() - start:.0f} s", flush=True)
    return True


def passes(check: Callable[[str], None], limit: int) -> bool:
    """Run a check in a process of its own: one that hangs, or breaks the device's context, takes no other with it."""
    try:
        return not subprocess.run([sys.executable, __file__, "--check", check.__name__], timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"FAILED  {check.__name__}: not done in {limit} s", flush=True)
        return False


# Timings


def contestants() -> dict[str, Make]:
    found: dict[str, Make] = {
        "AdamW fused": lambda p: torch.optim.AdamW(p, **OPTIONS, fused=True),
        "torchlamb": lambda p: torchlamb.Lamb(p, **OPTIONS, fused=True),
        "torchlamb max_grad_norm": lambda p: torchlamb.Lamb(p, **OPTIONS, fused=True, max_grad_norm=1.0),
        "torchlamb one launch": lambda p: torchlamb.Lamb(p, **OPTIONS, fused=True),
        "torchlamb foreach": lambda p: torchlamb.Lamb(p, **OPTIONS, foreach=True),
        "AdamW foreach": lambda p: torch.optim.AdamW(p, **OPTIONS, foreach=True),
    }
    timm = import_alone("timm", "timm.optim", "timm.optim.lamb")
    if timm:
        paper = {**OPTIONS, "max_grad_norm": None, "always_adapt": True}
        found[f"timm {version('timm')} compiled"] = lambda p: compiled(timm.Lamb(p, **paper, foreach=True))
    if importlib.util.find_spec("apex"):
        from apex.optimizers import FusedLAMB

        found["apex FusedLAMB"] = lambda p: FusedLAMB(p, **OPTIONS, max_grad_norm=0.0, use_nvlamb=True)
    if importlib.util.find_spec("deepspeed"):
        from deepspeed.ops.lamb import FusedLamb

        found[f"deepspeed {version('deepspeed')} FusedLamb"] = lambda p: FusedLamb(p, **OPTIONS)
    return found


def compiled(optimizer: torch.optim.Optimizer) -> Any:
    class Compiled:
        step = staticmethod(torch.compile(optimizer.step))

    return Compiled()


def milliseconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the time that work takes on the device and on the host, of which the device's does not wait for the host's."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)  # cycles, some 25 ms: until then, all of the work is queued
    start.record()
    began = time.perf_counter()
    work()
    host = 1e3 * (time.perf_counter() - began)
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host


def copy_bandwidth() -> float:
    """GB/s of a copy on the device, read and written bytes together."""
    a, b = (torch.empty(2**28, device="cuda") for _ in range(2))
    a.copy_(b)
    return 2 * a.nbytes / 1e6 / statistics.median(milliseconds(lambda: a.copy_(b))[0] for _ in range(ROUNDS))


def timings(shapes: str, bandwidth: float) -> list[dict[str, str]]:
    """Time each contestant in turns with AdamW fused, on the same parameters and gradients, each with its own moments."""
    params = make_params(SHAPES[shapes], "cuda")
    parameters = sum(p.numel() for p in params)
    rows = []
    entered = contestants()
    for name, make in entered.items():
        try:
            times = turns({name: make, "AdamW fused": entered["AdamW fused"]}, params)
        except Exception as error:
            print(f"{shapes}: {name} not measured: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        device, host = zip(*times[name], strict=True)
        p20, p50, p80 = (statistics.quantiles(device, n=10)[i] for i in (1, 4, 7))
        ratio = p50 / statistics.median(t for t, _ in times["AdamW fused"])
        moved = BYTES.get(name)
        share = "" if moved is None else f", {moved * parameters / p50 / 1e6 / bandwidth:.0%} of copying at {moved} bytes"
        asked = statistics.median(host)
        print(f"{shapes}: {name}: {p50:.3f} ms, {ratio:.2f} of AdamW fused{share}; host {asked:.3f} ms", flush=True)
        rows.append(
            {
                **provenance("cuda"),
                "shapes": shapes,
                "dtype": "float32",
                "optimizer": name,
                "steps": str(len(device)),
                "p20_ms": f"{p20:.3f}",
                "p50_ms": f"{p50:.3f}",
                "p80_ms": f"{p80:.3f}",
                "ratio_to_adamw_fused": f"{ratio:.2f}",
                "least_gb_per_s": f"{28 * parameters / p50 / 1e6:.1f}",  # as in step_time.least_bytes
                "extra_peak_mib": "not measured",
                "error_to_reference": "not measured",
            }
        )
    return rows


def turns(makes: dict[str, Make], params: list[torch.nn.Parameter]) -> dict[str, list[tuple[float, float]]]:
    steppers = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in makes}
    for turn in range(-3, ROUNDS):  # the first ones make state, compile and wake the clocks
        for name, make in makes.items():
            with one_launch("one launch" in name):
                stepper = steppers.get(name) or steppers.setdefault(name, make(params))
                taken = milliseconds(stepper.step)
            if turn >= 0:
                times[name].append(taken)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["checks", "timings"])
    parser.add_argument("--dry", action="store_true", help=f"do not append to {RESULTS.name}")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        sys.exit(not checked(globals()[args.check], "cuda"))
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here, and nothing of this can be measured without one")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, torchlamb {torchlamb.__version__}")
    failed = [check for check, limit in CHECKS.items() if args.only != "timings" and not passes(check, limit)]
    if args.only != "checks":
        bandwidth = copy_bandwidth()
        print(f"copying: {bandwidth:.0f} GB/s")
        for shapes in ("bert-large", "llama-7b, 4 of 32 layers", "400-tiny"):
            rows = timings(shapes, bandwidth)
            if not args.dry:
                append(rows, RESULTS)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
