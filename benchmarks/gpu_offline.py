"""What can be known of the GPU's kernels without a GPU: registers, spills, width of accesses, bytes moved, launches.

Compiles them for GPUs of several makes, and runs them in Triton's interpreter, which counts what is loaded and stored. Prints
the tables of docs/benchmarks.md.

    python benchmarks/gpu_offline.py
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torchlamb.backends import gpu_kernels as k

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
F32, BF16, FP16 = tl.float32, tl.bfloat16, tl.float16
RULE = (True, True, True, True)  # bias correction, grad_averaging, layer_adaptation, decay
KINDS = {
    "float32": k.Kinds(F32, F32, F32, F32, False, False, *RULE),
    "float32, guarded": k.Kinds(F32, F32, F32, F32, False, False, *RULE, guarded=True),
    "float32, bf16 state": k.Kinds(F32, F32, BF16, BF16, False, False, *RULE),
    "bf16": k.Kinds(BF16, BF16, F32, F32, False, False, *RULE),
    "bf16, masters": k.Kinds(BF16, BF16, F32, F32, True, False, *RULE),
    "bf16, stochastic": k.Kinds(BF16, BF16, F32, F32, False, True, *RULE),
    "bf16, stochastic, bf16 state": k.Kinds(BF16, BF16, BF16, BF16, False, True, *RULE),
    "fp16, masters": k.Kinds(FP16, FP16, F32, F32, True, False, *RULE),
}
TYPES = {
    "table": "*i64", "rows": "i32", "numbers": k.Numbers(*["fp32"] * len(k.Numbers._fields)), "partials": "*fp32",
    "sums": "*fp32", "order": "*i64", "segments": "i32", "tickets": "i32", "counters": "*i32",
}  # fmt: skip


class Machine(NamedTuple):
    """What a compiled kernel is made of."""

    registers: int  # per thread
    spills: int  # bytes per thread
    accesses: collections.Counter[str]  # of global memory, by instruction


def variants(kinds: k.Kinds) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every kernel with its constants: what it is called, the kernel, the constants."""
    for full in (True, False):
        suffix = "full chunks" if full else "rest"
        yield f"grad_sq_norms, {suffix}", k.grad_sq_norms, {"kinds": kinds, "FULL": full}
        yield f"accumulate, {suffix}", k.accumulate, {"kinds": kinds, "skip": None, "FULL": full}
        yield f"apply, {suffix}", k.apply, {"kinds": kinds, "skip": None, "FULL": full}
    yield "add_partials", k.add_partials, {"skip": None, "COLUMNS": 2, "COUNT": True}
    yield "step (one launch)", k.step, {"kinds": kinds, "skip": None}


def compiled(kernel: Any, constants: dict[str, Any], target: GPUTarget) -> Machine:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    asm = triton.compile(source, target=target, options=k.launch_options(target.backend)).asm
    return _nvidia(asm["cubin"]) if target.backend == "cuda" else _amd(asm["amdgcn"])


def _nvidia(cubin: bytes) -> Machine:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True, timeout=60).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    local = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Machine(int(registers), int(stack) + local, collections.Counter(re.findall(r"\b(?:LDG|STG)\.[.A-Z0-9]*", code)))


def _amd(code: str) -> Machine:
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", code)}
    spills = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
    return Machine(
        numbers["vgpr_count"], spills, collections.Counter(re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", code))
    )


def narrow(machine: Machine) -> int:
    """Count accesses of less than 128 bits, but for loads of the table, which are scalar and no part of the tensors."""
    return sum(
        count
        for name, count in machine.accesses.items()
        if (name.startswith(("STG", "LDG")) and "128" not in name and not re.fullmatch(r"LDG\.E(\.64)?(\.CONSTANT)?", name))
        or (name.startswith(("buffer_", "global_store")) and "x4" not in name)
    )


# In the interpreter


def counted() -> dict[str, Any]:
    """Bytes moved per element of a parameter by each kernel, and launches of a step with 3 and with 300 tensors."""
    from triton.runtime import interpreter

    import torchlamb
    from torchlamb import backends
    from torchlamb.backends import fused, gpu

    gpu.kernels.load()
    backends.kernels_of = lambda _, dtypes: (gpu, fused.why_not(dtypes))
    bytes_of: collections.Counter[str] = collections.Counter()
    launches: list[str] = []
    builder = interpreter.interpreter_builder
    for function, mask_at in (("create_masked_load", 1), ("create_masked_store", 2)):
        real = getattr(builder, function)

        def counting(pointers: Any, *args: Any, _real: Any = real, _mask: int = mask_at - 1, **kwargs: Any) -> Any:
            lanes = int(args[_mask].data.sum())
            bytes_of[launches[-1]] += lanes * pointers.get_element_ty().primitive_bitwidth // 8
            return _real(pointers, *args, **kwargs)

        setattr(builder, function, counting)
    for name in ("grad_sq_norms", "accumulate", "add_partials", "apply", "step"):
        kernel = getattr(k, name)
        kernel.run = lambda *args, _real=kernel.run, _name=name, **kwargs: (launches.append(_name), _real(*args, **kwargs))[1]

    def step(count: int, dtype: torch.dtype, size: int, **options: Any) -> None:
        params = [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for _ in range(count)]
        optimizer = torchlamb.Lamb(params, fused=True, weight_decay=0.1, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        launches.clear()
        bytes_of.clear()
        optimizer.step()

    size = 8 * k.CHUNK.value
    moved = {}
    for name, dtype, options in (
        ("float32", torch.float32, {}),
        ("float32, bf16 state", torch.float32, {"state_dtype": torch.bfloat16}),
        ("bf16", torch.bfloat16, {}),
        ("bf16, masters", torch.bfloat16, {"master_weights": True}),
        ("bf16, stochastic, bf16 state", torch.bfloat16, {"stochastic_rounding": True, "state_dtype": torch.bfloat16}),
    ):
        step(1, dtype, size, max_grad_norm=1.0, **options)
        moved[name] = {kernel: count / size for kernel, count in bytes_of.items()}
    launched = {}
    for one_launch, guard, count in itertools.product((False, True), (None, 1.0), (3, 300)):
        gpu.ONE_LAUNCH = one_launch
        step(count, torch.float32, 1, max_grad_norm=guard)
        launched[f"{'one launch' if one_launch else 'two phases'}{', guard' if guard else ''}, {count} tensors"] = len(launches)
    return {"bytes": moved, "launches": launched}


def main() -> None:
    print(f"triton {triton.__version__}\n")
    print("| kernel | " + " | ".join(TARGETS) + " | accesses under 128 bits |\n|---|" + "---|" * (len(TARGETS) + 1))
    for name, kinds in KINDS.items():
        for variant, kernel, constants in variants(kinds):
            if variant == "add_partials" and name != "float32":
                continue
            machines = [compiled(kernel, constants, target) for target in TARGETS.values()]
            cells = " | ".join(f"{m.registers}" + (f" ({m.spills} spilled)" if m.spills else "") for m in machines)
            widths = ", ".join(str(narrow(m)) for m in machines)
            print(f"| {name}: {variant} | {cells} | {widths} |", flush=True)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, "--count"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    print()
    found = json.loads(done.stdout)
    for name, moved in found["bytes"].items():
        print(f"bytes per element, {name}: " + ", ".join(f"{kernel} {count:.2f}" for kernel, count in moved.items()))
    for name, count in found["launches"].items():
        print(f"launches, {name}: {count}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--count"]:
        print(json.dumps(counted()))
    else:
        main()
