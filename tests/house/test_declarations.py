"""What kernels repeat by hand of what Python declares: columns, sums, flags, dtypes and options, in their order."""

from __future__ import annotations

import ast
import re

from loading import ROOT

from torchlamb.backends import cpu, fused
from torchlamb.bucket import COLUMNS, Bucket
from torchlamb.rule import SUMS
from torchlamb.state import Storage

BACKENDS = ROOT / "src" / "torchlamb" / "backends"
ABI = re.sub(r"//.*", "", (BACKENDS / "csrc" / "abi.h").read_text())


def enum(name: str) -> dict[str, int]:
    body = re.search(rf"enum {name} : int32_t {{(.*?)}};", ABI, re.S)[1]
    return {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", body)}


def fields(name: str) -> list[str]:
    """The members of a struct, in order."""
    body = re.search(rf"struct {name} {{(.*?)}};", ABI, re.S)[1]
    return [re.search(r"(\w+)$", member.strip())[1] for line in body.split(";") for member in line.split(",") if member.strip()]


def gpu_constants() -> dict[str, int]:
    """Of gpu_kernels.py, which is not imported: there may be no Triton."""
    tree = ast.parse((BACKENDS / "gpu_kernels.py").read_text())
    assigned = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("tl.constexpr(")
    ]
    return {node.targets[0].id: ast.literal_eval(node.value.args[0]) for node in assigned}


def test_columns_of_the_cpu():
    assert fields("Rows") == [name for name, *_ in cpu._Rows._fields_]
    assert [name for name in fields("Rows") if name in Bucket.__dataclass_fields__] == [column.name for column in COLUMNS]
    untyped = [column.name.removesuffix("s") + "_dtype" for column in COLUMNS if column.dtype is None]
    assert fields("Rows")[-len(untyped) :] == untyped


def test_columns_of_the_gpu():
    constants = gpu_constants()
    others = {"CHUNK", "BLOCK", "SUMS", *map(str.upper, SUMS)}
    record = [name for name, _ in sorted(constants.items(), key=lambda item: item[1]) if name not in others]
    columns = [column.name.removesuffix("s").upper() for column in COLUMNS]
    assert record == ["SIZE", *columns, "COUNTS", "FIRST", "STARTS", "LENGTH", "STRIDE", "FIELDS"]
    assert [constants[name] for name in record] == list(range(len(record)))


def test_sums():
    wanted = {**{name.upper(): i for i, name in enumerate(SUMS)}, "SUMS": len(SUMS)}
    assert enum("Sum") == wanted
    assert {name: gpu_constants()[name] for name in wanted} == wanted


def test_flags_and_dtypes():
    names = {"STOCHASTIC_ROUNDING": "ROUND_PARAMS_STOCHASTICALLY"}
    flags = ("BIAS_CORRECTION", "GRAD_AVERAGING", "LAYER_ADAPTATION", "STOCHASTIC_ROUNDING", "GUARDED")
    assert enum("Flags") == {names.get(name, name): getattr(fused, name) for name in flags}
    assert enum("DType") == {str(dtype).removeprefix("torch.").upper(): i for i, dtype in enumerate(fused.DTYPES)}


def test_options_and_runs_of_the_cpu():
    assert fields("Options") == [name for name, *_ in cpu._Options._fields_]
    assert fields("Runs") == [name for name, *_ in cpu._Runs._fields_]


def test_a_step_takes_every_column_from_the_state():
    group = {"capturable": False, "fused": None, "max_grad_norm": None, "skip_nonfinite": False}
    group |= {"master_weights": False, "stochastic_rounding": False, "state_dtype": None}
    assert list(Storage(group).columns([], [])) == [column.name for column in COLUMNS]
