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
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIBRARY = Path("src/torchlamb/backends/libtorchlamb_cpu.so")

# What has to kill a fault: arguments of pytest. The quickest stand first.
RULE = ("tests/rule/test_rule.py",)
PRECISION = tuple(f"tests/rule/test_{name}.py" for name in ("rounding", "storage", "precision"))
GUARD = ("tests/rule/test_guard.py",)
STORAGE = ("tests/rule/test_storage.py",)
BITS = ("tests/kernels/test_bits.py", "-k", "every_number or masters")
KERNELS = (*RULE, "-k", "float32 and default")  # which are taken where nothing else is asked for
GPU = ("tests/gpu/test_gpu_kernels.py",)  # in Triton's interpreter, as are all tests of a fault in the GPU's kernels
GATE = ("tests/kernels/test_gate.py", "tests/kernels/test_refused.py", "-k")
SHARDING = ("tests/sharding", "-k", "2-")  # of the worlds
SHARDING_4 = ("tests/sharding", "-k", "4-")  # whose meshes have two dimensions
LOADING = ("tests/state/test_loading.py", "tests/state/test_names.py", *STORAGE)
VALUES = ("tests/state/test_values.py",)
CONVERT = ("tests/state/test_convert.py",)
CHECKPOINT = ("tests/state/test_checkpoint.py",)
SCALER = ("tests/front/test_torch.py", "-k", "scale")
# They lie flat, or in a folder of their own.
MINDSPORE = ("tests/mindspore_front",)


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
    Fault("rule.py", "torch.isfinite(_sq_norms(sums)).all(dim=-1)", "torch.isfinite(_sq_norms(sums)).any(dim=-1)", GUARD),
    # Backends of torch's operations
    Fault("backends/single.py", "param.addcmul_(update, size, value=-1)", "param.addcmul_(update, size, value=1)", RULE),
    Fault("backends/single.py", "if stays is True:", "if stays is not False:", GUARD),
    Fault("backends/single.py", "m.copy_(select(stays, m, next_m))", "m.copy_(next_m)", GUARD),
    Fault("backends/single.py", "reversed(updates[row])", "reversed(updates[0])", RULE),
    Fault("backends/single.py", "update_sq.append(update.square().sum())", "update_sq.append(update.abs().sum())", RULE),
    Fault("backends/foreach.py", "torch._foreach_lerp_(exp_avgs, grads, 1 - s.beta1)", "torch._foreach_lerp_(exp_avgs, grads, 0.1)", RULE),
    Fault("backends/foreach.py", "torch._foreach_add_(denominators, eps)", "torch._foreach_add_(denominators, s.eps)", RULE),
    Fault("backends/foreach.py", "torch._foreach_add_(updates, params, alpha=s.weight_decay)", "pass", RULE),
    Fault("backends/foreach.py", "_store_(batch.masters, new, stays)", "_store_(batch.masters, params, stays)", PRECISION),
    Fault("backends/foreach.py", "list(map(select, stays, old, new))", "list(new)", GUARD),
    Fault("backends/eager.py", "if row == 0 or step is not bucket.steps[row - 1]]", "]", RULE),
    Fault("backends/eager.py", "(leaves | bucket.skip).unbind()", "leaves.unbind()", GUARD),
    # Buckets, and what is rounded
    Fault("bucket.py", "grad_factor=-1.0 if scalars.maximize else 1.0", "grad_factor=1.0", RULE),
    Fault("bucket.py", "return rule.centralize(grad, dims) if dims >= 3 else grad", "return rule.centralize(grad, dims) if dims >= 2 else grad", RULE),
    Fault("bucket.py", "[t] * layout.rows if t is None or column.is_number", "[t] * layout.rows if t is None else [t.clone()] * layout.rows if column.is_number", RULE),
    Fault("precision.py", "first = number * piece_size()", "first = 0", PRECISION),
    Fault("precision.py", "return torch.where(left, old, new)", "return torch.where(left, new, old)", GUARD),
    Fault("precision.py", "torch.where(param == master.to(param.dtype), master,", "torch.where(param == param, master,", PRECISION),
    Fault("precision.py", "return bits >> 16", "return bits & 0xFFFF", PRECISION),
    Fault("sharding/place.py", "first = self.starts[0]", "first = 0", PRECISION),
    Fault("precision.py", "_mix((indices & _MASK) ^ first) ^ (indices >> 32)", "_mix((indices & _MASK) ^ first)", PRECISION),
    # The CPU's kernels
    Fault("backends/csrc/kernels.cpp", "exp_avg_sq = beta2 * exp_avg_sq + grad_sq_weight * (grad * grad);", "exp_avg_sq = beta2 * exp_avg_sq + grad_weight * (grad * grad);", KERNELS),
    Fault("backends/csrc/kernels.cpp", "decay(s.weight_decay), averages", "decay(0.5f * s.weight_decay), averages", KERNELS),
    Fault("backends/csrc/kernels.cpp", "squares.add_rest(grad + i, n - i);", "", KERNELS),
    Fault("backends/csrc/kernels.cpp", "start += runs.starts[element / runs.length];", "", SHARDING),
    Fault("backends/csrc/kernels.cpp", "tile.bits, 16, n);", "tile.bits, 0, n);", (*PRECISION, "-k", "default-bfloat16")),
    Fault("backends/csrc/kernels.cpp", "weight[i] == tile.rounded[i] ? master[i] : weight[i];", "master[i];", STORAGE),
    Fault("backends/csrc/entry.cpp", "if (row == 0 || rows.steps[row] != rows.steps[row - 1])", "if (true)", KERNELS),
    Fault("backends/csrc/entry.cpp", "eps *= root, k = root", "k = root", KERNELS),
    Fault("backends/csrc/entry.cpp", "param_sq == 0.0f || update_sq == 0.0f", "param_sq == 0.0f", KERNELS),
    Fault("backends/csrc/entry.cpp", "std::isfinite(param_sq) && std::isfinite(update_sq)", "std::isfinite(param_sq)", (*GUARD, "-k", "default")),
    Fault("backends/csrc/entry.cpp", "skip(o.skip != nullptr && *o.skip)", "skip(false)", (*GUARD, "-k", "default")),
    Fault("backends/csrc/convert.h", "(raw + 0x7FFF + ((raw >> 16) & 1)) >> 16;", "(raw + 0x8000) >> 16;", BITS),
    Fault("backends/csrc/convert.h", "return uint16_t(sign | 0x7C00);", "return uint16_t(sign | 0x7BFF);", BITS),
    # The GPU's kernels
    Fault("backends/gpu_kernels.py", "m = numbers.beta1 * m + g", "m = numbers.beta1 * m + numbers.grad_weight * g", (*RULE, "-k", "everything")),
    Fault("backends/gpu_kernels.py", "v = numbers.beta2 * v + numbers.grad_sq_weight * (g * g)", "v = numbers.beta2 * v + (g * g)", (*RULE, "-k", "everything")),
    Fault("backends/gpu_kernels.py", "precise, w)", "w, w)", (*PRECISION, "-k", "masters and gpu")),
    Fault("backends/gpu_kernels.py", "_random_bits(table, record, chunk, lanes, t) >> 16", "_random_bits(table, record, chunk, lanes, t) & 0xFFFF", (*PRECISION, "-k", "gpu-bfloat16")),
    Fault("backends/gpu_kernels.py", "slot = partials + SUMS * (first + slots)", "slot = partials + SUMS * slots", GPU),
    Fault("backends/gpu_kernels.py", "chunk = chunks - 1 - chunk", "chunk = chunks - chunk", GPU),
    # The guard
    Fault("guard.py", "1.0 / grad_scale.reshape(())", "grad_scale.reshape(())", (*GUARD, *SCALER)),
    Fault("guard.py", "here = here * factor.to(here.device) ** 2", "here = here * factor.to(here.device)", (*GUARD, *SCALER)),
    Fault("guard.py", "torch.isfinite(sq_norm.float())", "torch.isfinite(sq_norm)", GUARD),
    Fault("guard.py", "is_guarded=self.guarded, host", "host", GUARD),
    Fault("guard.py", "grad_factor=factor, skip=skip, is_guarded", "grad_factor=factor, is_guarded", GUARD),
    Fault("guard.py", "and (skip is None or self.skipped)", "", GUARD),
    Fault("last_step.py", "record.skipped.add_(left)", "record.skipped.add_(1)", GUARD),
    Fault("last_step.py", "return torch.where(nonfinite.any(), nonfinite, large & verdict.overflows.to(device))", "return nonfinite", GUARD),
    Fault("last_step.py", "left = rule.leaves(sums) if guarded else None", "left = None", GUARD),
    # What kernels may be handed
    Fault("gate.py", "turns.get(row, 0)) for row, found", "0) for row, found", (*GATE, "one_after")),
    Fault("gate.py", "if kind not in _PLAIN and not _adds_nothing(kind):", "if False:", (*GATE, "subclass")),
    Fault("gate.py", "if tensor.is_neg():", "if False:", (*GATE, "negated and dense")),
    Fault("gate.py", "if _is_too_short(t):", "if False:", (*GATE, "freed")),
    Fault("gate.py", "* grad.itemsize and _is_too_short(grad):", "* grad.itemsize and False:", (*GATE, "freed")),
    Fault("gate.py", "if _overlaps_itself(t)", "if False", (*GATE, "own_elements")),
    Fault("gate.py", "for column in columns), *map(_addresses, columns)]", "for column in columns)]", (*GATE, "freed")),
    Fault("gate.py", "for span in known.spans[:count] if span.row != row or span.start != start", "for span in ()", (*GATE, "writes")),
    Fault("gate.py", "if not is_plain or grad._is_zerotensor():", "if grad._is_zerotensor():", (*GATE, "gradient")),
    Fault("backends/fused.py", "columns[column.name][row].copy_(handed[column.name][row])", "pass", (*RULE, "-k", "layouts and float32 and default")),
    Fault("backends/fused.py", "torch.autograd.graph.increment_version(handed[\"params\"])", "pass", (*GATE, "autograd")),
    # Sharding
    Fault("sharding/layout.py", "not p.is_replicate() and mesh.size(i) > 1", "mesh.size(i) > 1", SHARDING_4),
    Fault("sharding/layout.py", "min(max(b * size - first, 0), rows)", "min(max(b * size, 0), rows)", SHARDING),
    Fault("sharding/sums.py", "part / group.size() if reduce_op == \"avg\" else part", "part", SHARDING),
    Fault("sharding/sums.py", "sums.copy_(table[place])", "pass", SHARDING),
    Fault("sharding/sums.py", "places[-1] + 1 if again else", "places[-1] if again else", SHARDING),
    Fault("sharding/sums.py", "is_dtensor(param) or bool(layout.groups)", "is_dtensor(param)", SHARDING),
    Fault("sharding/layout.py", " or param.device_mesh.get_coordinate() is None", "", ("tests/sharding", "-k", "mesh_without")),
    Fault("sharding/layout.py", "        return known\n    groups", "        pass\n    groups", SHARDING),
    Fault("sharding/fsdp1.py", "itertools.accumulate(sizes, initial=0)", "itertools.accumulate(sizes)", SHARDING),
    Fault("sharding/fsdp1.py", "first = group.rank() * size if is_cut else 0", "first = group.rank()", ("tests/sharding", "-k", "places_of")),
    Fault("sharding/layout.py", "return wrong or (", "return wrong and (", SHARDING),
    Fault("sharding/tensor_parallel.py", "starts[dim] = group.rank() * param.shape[dim]", "starts[dim] = 0", SHARDING),
    Fault("sharding/norm_group.py", "len(layout.ranks & ranks) or 1", "1", SHARDING),
    Fault("sharding/norm_group.py", "self.held_by.get(identity.number,", "{}.get(0,", SHARDING),
    Fault("sharding/norm_group.py", "torch.distributed.all_reduce(packed, group=self.process_group)", "pass", SHARDING),
    Fault("guard.py", "several = plan.is_sharded or norm_group is not None", "several = plan.is_sharded", SHARDING),
    Fault("last_step.py", "large & verdict.overflows.to(device)", "large", SHARDING),
    Fault("sharding/refused.py", "began.get(id(p)) != 1 and", "True and", SHARDING),
    Fault("sharding/refused.py", "getattr(caller, \"process_group\", None)", "None", SHARDING),
    Fault("lamb.py", "without_grad = {} if complete else sums_without_grad(plan, self.param_groups, self.state)", "without_grad = {}", SHARDING),
    Fault("lamb.py", "return bool(bucket.process_groups)", "return False", SHARDING),
    # Options, state, checkpoints, other optimizers' states
    Fault("options.py", "return 0.0 if abs(lr) <= _ROUNDING * abs(scale) else lr", "return lr", ("tests/front/test_rates.py",)),
    Fault("options.py", "return torch.where(lr.abs() <= _ROUNDING * abs(began), 0.0, lr)", "return lr", ("tests/front/test_rates.py",)),
    Fault("plain.py", "entries = [plain(entry) for entry in value]", "entries = list(value)", VALUES),
    Fault("state.py", "return torch.float32 if param.dtype in _LOW else param.dtype", "return param.dtype", LOADING),
    Fault("state.py", "precision.seed_of(position)", "precision.seed_of(0)", (*LOADING, *PRECISION)),
    Fault("names.py", "keys = [keys[place] for place in order]", "pass", LOADING),
    Fault("names.py", "_BETWEEN.sub(\"\", str(name))", "str(name)", LOADING),
    Fault("loading.py", "copy = key == \"master\" or not taken.add(value)", "copy = not taken.add(value)", LOADING),
    Fault("loading.py", "copy = key == \"master\" or not taken.add(value)", "copy = key == \"master\"", LOADING),
    Fault("loading.py", ".to(device, NUMBERS[key], copy=True)", ".to(device, NUMBERS[key])", LOADING),
    Fault("foreign.py", "if key in STATE_KEYS:", "if False:", LOADING),
    Fault("checkpoint/files.py", "os.fsync(opened.fileno())", "pass", CHECKPOINT),
    Fault("checkpoint/files.py", "tuple(saved[name] or ()) != tuple(value.shape):", "False:", CHECKPOINT),
    Fault("convert/states.py", "options[\"master_weights\"] = True", "pass", CONVERT),
    Fault("convert/sources.py", "1 - beta2 ** (step + start + 1)", "1 - beta2 ** (step + start)", CONVERT),
    Fault("convert/sources.py", "adapts or float(group[\"weight_decay\"]) != 0.0", "True", CONVERT),
    # MindSpore's words, telemetry, recipes
    Fault("mindspore/nn/learning_rate_schedule.py", "self.learning_rate / (1 + self.decay_rate *", "self.learning_rate * (1 - self.decay_rate *", MINDSPORE),
    Fault("mindspore/nn/optim/optimizer.py", "rate[min(self._global_step, len(rate) - 1)]", "rate[min(self._global_step + 1, len(rate) - 1)]", MINDSPORE),
    Fault("mindspore/train/loss_scale_manager.py", "backoff_factor=1 / factor", "backoff_factor=0.5 / factor", MINDSPORE),
    Fault("telemetry.py", "numbers[len(ratios) + 2 * i : len(ratios) + 2 * i + 2]", "numbers[len(ratios) + i : len(ratios) + i + 2]", ("tests/front/test_telemetry.py",)),
    Fault("recipes.py", "lr=recipe.lr * math.sqrt(factor)", "lr=recipe.lr * factor", ("tests/front/test_recipes.py",)),
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


def first_failure(tests: Sequence[str], tree: Path, interpreted: bool) -> str | None:
    """Return the first test that fails in the tree, or None."""
    variables = {"PYTHONPATH": os.pathsep.join([str(tree / "site"), str(tree / "src")]), "OMP_NUM_THREADS": "1"}
    if interpreted:
        variables["TRITON_INTERPRET"] = "1"
    options = ("-q", "-x", "--no-header", "-p", "no:cacheprovider", "-m", "not slow")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=tree,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    if done.returncode < 0:  # the process itself did not survive, and says where
        place = re.search(r'"\S*?/(tests/\S+)", line \d+ in (test_\w+)', done.stdout + done.stderr)
        return "::".join(place.groups()) if place is not None else "?"
    found = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - |$)", done.stdout, re.M)
    if done.returncode != 1 and found is None:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1] if found is not None else "?"


def main() -> int:
    wanted = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
    faults = [fault for fault in FAULTS if wanted.search(f"{fault.file}: {fault.old} -> {fault.new}")]
    lost = [fault for fault in faults if anchored(fault) is None]
    for fault in lost:
        print(f"{fault.file} has not exactly once: {fault.old}")
    if lost:
        return 2
    killers: dict[bool, list[str]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        copy_tree(tree)
        is_sound = True  # the library
        for fault in faults:
            path, began = tree / "src" / "torchlamb" / fault.file, time.monotonic()
            whole, interpreted = path.read_text(), fault.file.startswith("backends/gpu")
            path.write_text(anchored(fault) or whole)
            try:
                if "csrc" in fault.file or not is_sound:
                    build(tree)
                is_sound = "csrc" not in fault.file
                killer = first_failure(fault.tests, tree, interpreted)
            finally:
                path.write_text(whole)
            killers[interpreted] += [] if killer is None else [killer]
            told = "**survived**" if killer is None else killer.removeprefix("tests/")
            seconds = f"{time.monotonic() - began:4.0f} s"
            print(f"| {fault.file} | `{fault.old}` | `{fault.new}` | {told} | {seconds} |", flush=True)
        if not is_sound:
            build(tree)
        # What also fails without a fault kills nothing.
        broken = [first_failure(sorted(set(names)), tree, interpreted) for interpreted, names in killers.items() if names]
    killed = sum(map(len, killers.values()))
    print(f"{killed} of {len(faults)} killed")
    for test in filter(None, broken):
        print(f"{test} fails without a fault, too")
    return int(killed < len(faults) or any(broken))


if __name__ == "__main__":
    sys.exit(main())
