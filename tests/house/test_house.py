"""The house itself: imports run one way, the documentation says what the code does, examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loading import HANGS, ROOT

import torchlamb
from torchlamb import mindspore

SOURCES = sorted((ROOT / "src" / "torchlamb").rglob("*.py"))
MODULES = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]

# A module may import those on the lines above its own. `backends` is the protocol, above its implementations.
ORDER = [
    ["torchlamb.rule", "torchlamb.files", "torchlamb.plain", "torchlamb.names", "torchlamb.foreign"],
    ["torchlamb.sharding", "torchlamb.sharding.place"],
    ["torchlamb.sharding.layout"],
    ["torchlamb.precision", "torchlamb.sharding.refused", "torchlamb.sharding.fsdp1", "torchlamb.sharding.tensor_parallel"],
    ["torchlamb.sharding.sums", "torchlamb.gate", "torchlamb.sharding.deepspeed"],
    ["torchlamb.sharding.norm_group", "torchlamb.shard"],
    ["torchlamb.options", "torchlamb.bucket"],
    ["torchlamb.backends.eager", "torchlamb.backends.fused", "torchlamb.backends.gpu_kernels"],
    ["torchlamb.backends.single", "torchlamb.backends.foreach"],
    ["torchlamb.backends.cpu", "torchlamb.backends.gpu"],
    ["torchlamb.backends"],
    ["torchlamb.guard"],
    ["torchlamb.state"],
    ["torchlamb.last_step", "torchlamb.loading"],
    ["torchlamb.lamb"],
    ["torchlamb.checkpoint.files", "torchlamb.checkpoint.together"],
    ["torchlamb.checkpoint.shards"],
    ["torchlamb.groups", "torchlamb.testing", "torchlamb.checkpoint", "torchlamb.telemetry"],
    ["torchlamb.recipes", "torchlamb.noise_scale"],
    ["torchlamb.convert.sources", "torchlamb.convert.mindspore"],
    ["torchlamb.convert.states"],
    ["torchlamb.convert"],
    ["torchlamb.convert.__main__"],
    ["torchlamb"],
    ["torchlamb.mindspore.checks", "torchlamb.mindspore.log", "torchlamb.mindspore.context"],
    ["torchlamb.mindspore.common.dtype", "torchlamb.mindspore.common.api", "torchlamb.mindspore.common.seed"],
    ["torchlamb.mindspore.common.tensor"],
    ["torchlamb.mindspore.common.initializer"],
    ["torchlamb.mindspore.common.parameter"],
    ["torchlamb.mindspore.common", "torchlamb.mindspore.metrics"],
    ["torchlamb.mindspore.dataset", "torchlamb.mindspore.communication.management"],
    ["torchlamb.mindspore.communication", "torchlamb.mindspore.parallel._utils"],
    ["torchlamb.mindspore.parallel", "torchlamb.mindspore.ops.functional", "torchlamb.mindspore.ops.gradients"],
    ["torchlamb.mindspore.ops.composite", "torchlamb.mindspore.ops.operations"],
    ["torchlamb.mindspore.ops"],
    ["torchlamb.mindspore.nn.cell", "torchlamb.mindspore.nn.learning_rate_schedule", "torchlamb.mindspore.nn.loss"],
    ["torchlamb.mindspore.nn.clip", "torchlamb.mindspore.nn.dynamic_lr", "torchlamb.mindspore.nn.metrics"],
    ["torchlamb.mindspore.nn.wrap.grad_reducer"],
    ["torchlamb.mindspore.nn.wrap.cell_wrapper"],
    ["torchlamb.mindspore.nn.wrap.loss_scale"],
    ["torchlamb.mindspore.nn.wrap", "torchlamb.mindspore.nn.optim.learning_rate", "torchlamb.mindspore.nn.optim.elsewhere"],
    ["torchlamb.mindspore.nn.optim.groups", "torchlamb.mindspore.nn.optim.optimizer"],
    ["torchlamb.mindspore.nn.optim.lamb"],
    ["torchlamb.mindspore.nn.optim"],
    ["torchlamb.mindspore.nn"],
    ["torchlamb.mindspore.train.serialization", "torchlamb.mindspore.train.loss_scale_manager"],
    ["torchlamb.mindspore.train.batches", "torchlamb.mindspore.train.step", "torchlamb.mindspore.train.callback.base"],
    ["torchlamb.mindspore.train.callback.monitors", "torchlamb.mindspore.train.callback.checkpoint"],
    ["torchlamb.mindspore.train.callback", "torchlamb.mindspore.train.metrics", "torchlamb.mindspore.train.train_thor"],
    ["torchlamb.mindspore.train.running"],
    ["torchlamb.mindspore.train.model", "torchlamb.mindspore.train.parallel_utils"],
    ["torchlamb.mindspore.train", "torchlamb.mindspore.amp"],
    ["torchlamb.mindspore"],
]
# What a module may need beside torch, inside the function that needs it. gpu_kernels is itself imported inside one.
EXTRAS = {
    "torchlamb.mindspore.train.running": {"tqdm"},
    "torchlamb.mindspore.train.callback.monitors": {"tqdm"},
    "torchlamb.telemetry": {"matplotlib"},
    "torchlamb.backends.gpu_kernels": {"triton"},
    "torchlamb.convert.__main__": {"mindspore", "numpy"},
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_imports_run_one_way():
    rank = {name: i for i, names in enumerate(ORDER) for name in names}
    assert set(rank) == set(MODULES)
    for name, path in zip(MODULES, SOURCES, strict=True):
        inside = {found for found in imports_of(path) if found in rank and found != "torchlamb"}
        # A package is imported with each of its modules.
        wrong = {found for found in inside - {name} if rank[found] >= rank[name] and not name.startswith(f"{found}.")}
        assert not wrong, f"{name} imports {wrong}"
        outside = {found.split(".")[0] for found in imports_of(path)} - set(sys.stdlib_module_names)
        extras = EXTRAS.get(name, set())
        assert outside - extras <= {"torch", "torchlamb", "__future__"}, f"{name} imports {outside}"
        if not name.startswith(("torchlamb.sharding", "torchlamb.checkpoint")):
            assert not any(found.startswith("torch.distributed") for found in imports_of(path)), name


def test_importing_does_nothing_else():
    code = """
import json, sys, torch
before = set(sys.modules)
import torch

import torchlamb
new = {name for name in set(sys.modules) - before if not name.startswith("torchlamb")}
print(json.dumps([sorted(new), torch.cuda.is_initialized()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS, check=True)
    new, cuda = json.loads(done.stdout)
    assert {name.split(".")[0] for name in new} <= set(sys.stdlib_module_names)
    assert not cuda


@pytest.mark.parametrize("module", [torchlamb, torchlamb.convert, mindspore, mindspore.nn], ids=lambda module: module.__name__)
def test_public_names(module):
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    public = {name for name in vars(module) if not name.startswith("_") and not inspect.ismodule(getattr(module, name))}
    assert public <= set(module.__all__)


def test_one_version_number():
    newest = re.search(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == torchlamb.__version__


PUBLIC = [
    torchlamb.Lamb,
    torchlamb.param_groups,
    torchlamb.checkpoint.save,
    torchlamb.checkpoint.load,
    torchlamb.convert.to_lamb,
    torchlamb.convert.to_adamw,
    torchlamb.convert.from_mindspore,
    torchlamb.convert.lr_factor,
    torchlamb.noise_scale.NoiseScale,
    torchlamb.recipes.Recipe,
    torchlamb.recipes.mlperf_bert,
    torchlamb.recipes.nvidia_bert,
    torchlamb.recipes.resnet_rsb,
    torchlamb.recipes.scale,
    torchlamb.telemetry.Telemetry,
    torchlamb.telemetry.read,
    torchlamb.telemetry.plot,
    torchlamb.testing.assert_matches_reference,
    torchlamb.testing.assert_relative_step,
    mindspore.Model,
    mindspore.FixedLossScaleManager,
    mindspore.DynamicLossScaleManager,
    mindspore.LossMonitor,
    mindspore.TimeMonitor,
    mindspore.CheckpointConfig,
    mindspore.ModelCheckpoint,
    mindspore.save_checkpoint,
    mindspore.load_checkpoint,
    mindspore.ops.GradOperation,
    mindspore.ops.value_and_grad,
    mindspore.nn.Lamb,
    mindspore.nn.SoftmaxCrossEntropyWithLogits,
    mindspore.nn.trainable_params,
    mindspore.nn.ClipByNorm,
    mindspore.nn.WithLossCell,
    mindspore.nn.WithEvalCell,
    mindspore.nn.TrainOneStepCell,
    mindspore.nn.TrainOneStepWithLossScaleCell,
    mindspore.nn.DynamicLossScaleUpdateCell,
    mindspore.nn.FixedLossScaleUpdateCell,
    mindspore.nn.Accuracy,
    mindspore.nn.TopKCategoricalAccuracy,
    mindspore.amp.StaticLossScaler,
    mindspore.amp.DynamicLossScaler,
    *[getattr(mindspore.nn, name) for name in mindspore.nn.dynamic_lr.__all__],
    *[getattr(mindspore.nn, name) for name in mindspore.nn.learning_rate_schedule.__all__ if name != "LearningRateSchedule"],
]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__qualname__)
def test_documented_arguments_equal_the_signature(function):
    signature = inspect.signature(function.__init__ if inspect.isclass(function) else inspect.unwrap(function))
    doc = inspect.getdoc(function)
    section = re.search(r"^Args:\n(.*?)\n\n", doc + "\n\n", re.M | re.S)[1]
    entries = dict(re.findall(r"^ {4}(\w+): (.*?)(?=\n {4}\w|\Z)", section, re.M | re.S))
    parameters = {name: p for name, p in signature.parameters.items() if name != "self"}
    assert list(entries) == list(parameters)
    for name, p in parameters.items():
        text = " ".join(entries[name].split())
        if p.default is p.empty:
            assert "(default:" not in text, name
        elif "not available" not in text:
            value = re.search(r"\(default: (.*)\)", text)[1]
            assert eval(value, {"torch": torch}) == p.default, name
    for word in ("Raises:", "Example:"):
        assert word in doc


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert results.failed == 0


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_examples_in_documents(path, tmp_path, monkeypatch):
    """All Python blocks of a page, run one after the other."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in python_blocks(path):
        exec(compile(block, str(path), "exec"), namespace)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(path: Path) -> set[str]:
    """Headings as links name them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_in_documents():
    for path in PAGES:
        for target in re.findall(r"\]\(([^):]+)\)", path.read_text()):
            file, _, anchor = target.partition("#")
            found = path.parent / file if file else path
            assert found.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(found), f"{path.name}: {target}"


def test_links_to_other_sites_are_whole():
    """There may be no network: what they lead to is not looked up."""
    for path in PAGES:
        for target in re.findall(r"\]\((\w+:[^)]*)\)", path.read_text()):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w./#%~-]*)?", target), f"{path.name}: {target}"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", path.read_text(), re.M | re.S)


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "diff")], ids=lambda path: path.name)
def test_the_new_side_of_diffs(path):
    """Each runs with a model and groups of its own, and with those packages that are installed."""
    model = torch.nn.Linear(4, 2)
    namespace = {"torch": torch, "torchlamb": torchlamb, "model": model, "net": model}
    namespace["decayed"], namespace["others"] = [model.weight], [model.bias]
    for block in blocks(path, "diff"):
        namespace["groups"] = namespace.get("groups") or [{"params": list(model.parameters())}]
        new = [line[1:] for line in block.splitlines() if not line.startswith("-")]
        if any("torchlamb.mindspore" in line for line in new):
            namespace["net"] = type("Net", (), {"trainable_params": lambda: mindspore.nn.trainable_params(model)})
        exec(compile("\n".join(new), str(path), "exec"), namespace)
        assert any("Lamb" in line or "groups" in line for line in new)


def test_commands_in_documents_exist():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    for path in PAGES:
        for line in "\n".join(blocks(path, "sh")).splitlines():
            command = re.sub(r"^(\w+=\S+ )+", "", line.split("#")[0].strip())
            if command.startswith("make "):
                assert {word for word in command.split()[1:] if "=" not in word} <= targets, f"{path.name}: {line}"
            for file in re.findall(r"(?:python|torchrun)\b.*?([\w/]+\.py)\b", command):
                assert (ROOT / file).exists(), f"{path.name}: {line}"
            for module in re.findall(r"python -m (torchlamb[\w.]*)", command):
                assert importlib.util.find_spec(f"{module}.__main__"), f"{path.name}: {line}"


def test_readme_names_the_commands_of_the_makefile():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "bert", "test", "test-all", "test-slow", "check", "bench", "docs", "dist", "clean"} <= targets
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make bert" in readme
    assert "make test" in readme
    run = (ROOT / ".ci" / "run").read_text()
    assert 'make "$part"' in run
    parts = re.search(r"^for part in (.*); do$", run, re.M)[1].split()
    assert parts == ["check", "test", "test-slow", "docs"]
    assert set(parts) <= targets
