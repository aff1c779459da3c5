"""Break the library in one line at a time and see the tests fail: `python tests/mutants.py [PATTERN]`, of part of a fault.

Each fault is made in a copy of the tree, whose package the tests then import; where it is in the C++ kernels, they
are built there. A fault that no test kills is a test that is missing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIBRARY = Path("src/torchlamb/backends/libtorchlamb_cpu.so")

# What has to kill a fault: arguments of pytest. The quickest stand first.
RULE = ("tests/rule/test_rule.py",)
PRECISION = tuple(f"tests/rule/test_{name}.py" for name in ("rounding", "storage", "precision"))
GUARD = ("tests/rule/test_guard.py",)
KERNELS = ("tests/kernels", *RULE, *PRECISION)
GPU = ("tests/gpu", *RULE, *PRECISION, *GUARD)  # in Triton's interpreter
SHARDING = ("tests/sharding",)
STATE = ("tests/front", "tests/state", *PRECISION)
CONVERT = ("tests/state", "-k", "convert or run or masters or command or state_dict or mindspore or lr_factor")
CHECKPOINT = ("tests/state", "-k", "checkpoint or save or load or damage or write or run or keep or newest")
FRONT = ("tests/front",)
MINDSPORE = ("tests/mindspore",)


class Fault(NamedTuple):
    file: str  # in src/torchlamb
    old: str  # stands there once
    new: str
    tests: tuple[str, ...]


FAULTS = [
    # The rule
    Fault("rule.py", "exp_avg.lerp_(grad, 1 - s.beta1)", "exp_avg.lerp_(grad, 1 - s.beta2)", RULE),
    Fault("rule.py", "exp_avg.mul_(s.beta1).add_(grad)", "exp_avg.mul_(s.beta1).add_(grad, alpha=1 - s.beta1)", RULE),
    Fault("rule.py", "addcmul_(grad, grad, value=1 - s.beta2)", "addcmul_(grad, grad, value=1 - s.beta2**2)", RULE),
    Fault("rule.py", "return s.eps * root, root / correction1", "return s.eps, root / correction1", RULE),
    Fault("rule.py", "undefined = (sq_norms == 0).any(dim=-1)", "undefined = (sq_norms == 0).all(dim=-1)", RULE),
    Fault("rule.py", "param_norm.clamp(*s.phi_bounds)", "param_norm.clamp(max=s.phi_bounds[1])", RULE),
    Fault("rule.py", "ratio = ratio.clamp(*s.trust_ratio_bounds)", "ratio = ratio.clamp(min=s.trust_ratio_bounds[0])", RULE),
    Fault("rule.py", "if not s.layer_adaptation:", "if not s.layer_adaptation or not s.weight_decay:", RULE),
    Fault("rule.py", "root(grad_sq_norm).clamp(min=max_grad_norm)", "(root(grad_sq_norm) + 1e-3).clamp(min=max_grad_norm)", RULE),
    Fault("rule.py", "tuple(range(1, dims))", "tuple(range(dims))", RULE),
    Fault("rule.py", "torch.isfinite(sq_norms).all(dim=-1)", "torch.isfinite(sq_norms).any(dim=-1)", GUARD),
    # Backends of torch's operations
    Fault("backends/single.py", "param.addcmul_(update, size, value=-1)", "param.addcmul_(update, size, value=1)", RULE),
    Fault("backends/single.py", "if left is True:", "if left is not False:", GUARD),
    Fault("backends/single.py", "m.copy_(select(left, m, next_m))", "m.copy_(next_m)", GUARD),
    Fault("backends/single.py", "reversed(updates[row])", "reversed(updates[0])", RULE),
    Fault("backends/single.py", "update_squares.append(update.square().sum())", "update_squares.append(update.abs().sum())", RULE),
    Fault("backends/foreach.py", "torch._foreach_lerp_(exp_avgs, grads, 1 - s.beta1)", "torch._foreach_lerp_(exp_avgs, grads, 0.1)", RULE),
    Fault("backends/foreach.py", "torch._foreach_add_(denominators, eps)", "torch._foreach_add_(denominators, s.eps)", RULE),
    Fault("backends/foreach.py", "torch._foreach_add_(updates, weights, alpha=s.weight_decay)", "pass", RULE),
    Fault("backends/foreach.py", "_store_(batch.masters, new, left)", "_store_(batch.masters, weights, left)", PRECISION),
    Fault("backends/foreach.py", "list(map(select, left, old, new))", "list(new)", GUARD),
    # Buckets, and what is rounded
    Fault("bucket.py", "sign = -1.0 if scalars.maximize else 1.0", "sign = 1.0", RULE),
    Fault("bucket.py", "return rule.centralize(grad, dims) if dims >= 3 else grad", "return rule.centralize(grad, dims) if dims >= 2 else grad", RULE),
    Fault("bucket.py", "bucket.steps += [step] * blocks", "bucket.steps += [step.clone()] * blocks", RULE),
    Fault("bucket.py", "first = number * piece_size()", "first = 0", PRECISION),
    Fault("bucket.py", "return torch.where(left, old, new)", "return torch.where(left, new, old)", GUARD),
    Fault("bucket.py", "torch.where(param == master.to(param.dtype), master,", "torch.where(param == param, master,", PRECISION),
    Fault("rounding.py", "return bits >> 16", "return bits & 0xFFFF", PRECISION),
    Fault("rounding.py", "first = self.starts[0]", "first = 0", PRECISION),
    Fault("rounding.py", "return _mix(_mix((indices & _MASK) ^ first) ^ (indices >> 32)", "return _mix(_mix((indices & _MASK) ^ first)", PRECISION),
    # The CPU's kernels
    Fault("backends/csrc/kernels.cpp", "exp_avg_sq = beta2 * exp_avg_sq + grad_sq_weight * (grad * grad);", "exp_avg_sq = beta2 * exp_avg_sq + grad_weight * (grad * grad);", KERNELS),
    Fault("backends/csrc/kernels.cpp", "decay(s.weight_decay), averages", "decay(0.5f * s.weight_decay), averages", KERNELS),
    Fault("backends/csrc/kernels.cpp", "squares.add_rest(grad + i, n - i);", "", KERNELS),
    Fault("backends/csrc/kernels.cpp", "start += runs.starts[element / runs.length];", "", ("tests/sharding",)),
    Fault("backends/csrc/kernels.cpp", "tile.bits, 16, n);", "tile.bits, 0, n);", KERNELS),
    Fault("backends/csrc/kernels.cpp", "weight[i] == tile.rounded[i] ? master[i] : weight[i];", "master[i];", KERNELS),
    Fault("backends/csrc/entry.cpp", "if (row == 0 || rows.steps[row] != rows.steps[row - 1])", "if (true)", KERNELS),
    Fault("backends/csrc/entry.cpp", "eps *= root, k = root", "k = root", KERNELS),
    Fault("backends/csrc/entry.cpp", "param_sq == 0.0f || update_sq == 0.0f", "param_sq == 0.0f", KERNELS),
    Fault("backends/csrc/entry.cpp", "std::isfinite(param_sq) && std::isfinite(update_sq)", "std::isfinite(param_sq)", (*KERNELS, *GUARD)),
    Fault("backends/csrc/entry.cpp", "skip(o.skip != nullptr && *o.skip)", "skip(false)", (*KERNELS, *GUARD)),
    Fault("backends/csrc/convert.h", "(raw + 0x7FFF + ((raw >> 16) & 1)) >> 16;", "(raw + 0x8000) >> 16;", KERNELS),
    Fault("backends/csrc/convert.h", "if (size >= 0x477FF000)", "if (size > 0x477FF000)", KERNELS),
    # The GPU's kernels
    Fault("backends/gpu_kernels.py", "m = numbers.beta1 * m + g", "m = numbers.beta1 * m + numbers.grad_weight * g", GPU),
    Fault("backends/gpu_kernels.py", "v = numbers.beta2 * v + numbers.grad_sq_weight * (g * g)", "v = numbers.beta2 * v + (g * g)", GPU),
    Fault("backends/gpu_kernels.py", "precise, w)", "w, w)", GPU),
    Fault("backends/gpu_kernels.py", "_random_bits(table, record, chunk, lanes, t) >> 16", "_random_bits(table, record, chunk, lanes, t) & 0xFFFF", GPU),
    Fault("backends/gpu_kernels.py", "slot = partials + 2 * (first + slots)", "slot = partials + 2 * slots", GPU),
    Fault("backends/gpu_kernels.py", "chunk = chunks - 1 - chunk", "chunk = chunks - chunk", GPU),
    # The guard
    Fault("guard.py", "1.0 / grad_scale.reshape(())", "grad_scale.reshape(())", (*FRONT, *GUARD)),
    Fault("guard.py", "sq_norm = sq_norm * factor.to(sq_norm.device) ** 2", "sq_norm = sq_norm * factor.to(sq_norm.device)", (*FRONT, *GUARD)),
    Fault("guard.py", "torch.isfinite(sq_norm.float())", "torch.isfinite(sq_norm)", GUARD),
    Fault("guard.py", "record.skipped.add_(left)", "record.skipped.add_(1)", GUARD),
    Fault("guard.py", "torch.where(nonfinite.any(), nonfinite, rows >= large)", "nonfinite", GUARD),
    # Sharding
    Fault("sharding.py", "not p.is_replicate() and mesh.size(i) > 1", "mesh.size(i) > 1", SHARDING),
    Fault("sharding.py", "part / group.size() if reduce_op == \"avg\" else part", "part", SHARDING),
    Fault("sharding.py", "sq_norms.copy_(table[place])", "pass", SHARDING),
    Fault("sharding.py", "places[-1] + 1 if again else", "places[-1] if again else", SHARDING),
    Fault("sharding.py", "min(max(b * size - first, 0), rows)", "min(max(b * size, 0), rows)", SHARDING),
    Fault("lamb.py", "{} if complete else squares_without_grad(plan, self.param_groups, self.state)", "{}", SHARDING),
    # State, checkpoints, other optimizers' states
    Fault("state.py", "return torch.float32 if param.dtype in _LOW else param.dtype", "return param.dtype", STATE),
    Fault("state.py", "rounding.seed_of(position)", "rounding.seed_of(0)", STATE),
    Fault("state.py", "value.to(param.device, dtype, copy=is_master)", "value.to(param.device, dtype)", STATE),
    Fault("checkpoint/files.py", "os.fsync(opened.fileno())", "pass", CHECKPOINT),
    Fault("checkpoint/files.py", "tuple(saved[name] or ()) != tuple(value.shape):", "False:", CHECKPOINT),
    Fault("convert/states.py", "options[\"master_weights\"] = True", "pass", CONVERT),
    Fault("convert/sources.py", "1 - beta2 ** (step + start + 1)", "1 - beta2 ** (step + start)", CONVERT),
    Fault("convert/sources.py", "adapts or float(group[\"weight_decay\"]) != 0.0", "True", CONVERT),
    # MindSpore's words, telemetry, recipes
    Fault("mindspore/nn/learning_rate_schedule.py", "self.learning_rate / (1 + self.decay_rate *", "self.learning_rate * (1 - self.decay_rate *", MINDSPORE),
    Fault("mindspore/nn/lamb.py", "rate[min(self.global_step, len(rate) - 1)]", "rate[min(self.global_step + 1, len(rate) - 1)]", MINDSPORE),
    Fault("mindspore/loss_scale.py", "backoff_factor=1 / factor", "backoff_factor=0.5 / factor", MINDSPORE),
    Fault("telemetry.py", "numbers[len(ratios) + 2 * i : len(ratios) + 2 * i + 2]", "numbers[len(ratios) + i : len(ratios) + i + 2]", FRONT),
    Fault("recipes.py", "lr=recipe.lr * math.sqrt(factor)", "lr=recipe.lr * factor", FRONT),
    Fault("last_step.py", "left = rule.leaves(sq_norms) if guarded else None", "left = None", GUARD),
]  # fmt: skip

# In a copy, the package is imported from it: without the finder that the editable installation put before all paths.
SITE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "_editable" not in type(finder).__module__]
"""


def anchored(fault: Fault) -> str | None:
    """Return the file's text with the fault in it, or None where the old text does not stand there once."""
    path = ROOT / "src" / "torchlamb" / fault.file
    text = path.read_text() if path.exists() else ""
    return text.replace(fault.old, fault.new) if text.count(fault.old) == 1 else None


def copy_tree(to: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    (to / "site").mkdir()
    (to / "site" / "sitecustomize.py").write_text(SITE)
    build(to)


def build(tree: Path) -> None:
    """Build the C++ kernels of a tree into it."""
    cmake = shutil.which("cmake")
    if cmake is None:
        sys.exit("cmake is not there, which builds the kernels: .venv/bin/pip install cmake ninja")
    csrc, made = tree / "src/torchlamb/backends/csrc", tree / "build/kernels"
    for command in ([cmake, "-S", csrc, "-B", made, "-DCMAKE_BUILD_TYPE=Release"], [cmake, "--build", made]):
        subprocess.run(command, check=True, capture_output=True)
    shutil.copy2(made / LIBRARY.name, tree / LIBRARY)


def killed_by(fault: Fault, tree: Path) -> str | None:
    """Return the first test that fails in the tree, or None."""
    variables = {"PYTHONPATH": os.pathsep.join([str(tree / "site"), str(tree / "src")]), "OMP_NUM_THREADS": "1"}
    if fault.file.startswith("backends/gpu"):
        variables["TRITON_INTERPRET"] = "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        *fault.tests,
    ]
    done = subprocess.run(command, cwd=tree, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - |$)", done.stdout, re.M)
    if done.returncode != 1 and found is None:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1].removeprefix("tests/") if found is not None else "?"


def main() -> int:
    wanted = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
    faults = [fault for fault in FAULTS if wanted.search(f"{fault.file}: {fault.old} -> {fault.new}")]
    lost = [fault for fault in faults if anchored(fault) is None]
    for fault in lost:
        print(f"{fault.file} has not exactly once: {fault.old}")
    if lost:
        return 2
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        copy_tree(tree)
        for fault in faults:
            path, began = tree / "src" / "torchlamb" / fault.file, time.monotonic()
            whole = path.read_text()
            path.write_text(anchored(fault) or whole)
            try:
                if "csrc" in fault.file:
                    build(tree)
                killer = killed_by(fault, tree)
            finally:
                path.write_text(whole)
            if "csrc" in fault.file:
                build(tree)
            survived += killer is None
            seconds = f"{time.monotonic() - began:4.0f} s"
            print(f"| {fault.file} | `{fault.old}` | `{fault.new}` | {killer or '**survived**'} | {seconds} |", flush=True)
    print(f"{len(faults) - survived} of {len(faults)} killed")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
