"""Trust ratios, norms and skipped steps of a run, by layer: as rows in a file or scalars in TensorBoard, and as a picture.

Steps that are not recorded cost one comparison. This room reads an optimizer by its public methods only.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from torchlamb.files import write_whole
from torchlamb.lamb import Lamb

Row = dict[str, Any]
_QUANTITIES = ("trust_ratio", "param_norm", "update_norm")


class Writer(Protocol):
    """What is needed of :class:`torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Add one number."""


class Telemetry:
    """Records what an optimizer's steps did, every so many of them.

    A recorded step reads once from each device that has parameters; the steps between do not touch any. Where the model is
    sharded, ratios and norms are those of whole tensors on every process: let the first one record, and give the others
    ``to=None``.

    Args:
        optimizer: a :class:`torchlamb.Lamb`, best with named parameters
        to: a path, to which a line of JSON is added for each recorded step; or a `SummaryWriter` of TensorBoard; or None, for
            nothing
        every: how many steps there are from one that is recorded to the next, >= 1 (default: 100)
        start: how many steps were taken before, in a run that is resumed (default: 0)

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of range
        OSError: the file cannot be written

    Example:
        >>> import tempfile, torch, torchlamb
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torchlamb.Lamb(model.named_parameters())
        >>> path = tempfile.mkdtemp() + "/layers.jsonl"
        >>> telemetry = torchlamb.telemetry.Telemetry(optimizer, path, every=2)
        >>> for _ in range(4):
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     telemetry.step()
        >>> [row["step"] for row in torchlamb.telemetry.read(path)]
        [2, 4]
    """

    def __init__(self, optimizer: Lamb, to: str | os.PathLike[str] | Writer | None, every: int = 100, start: int = 0) -> None:
        if not isinstance(optimizer, Lamb):
            raise TypeError(f"optimizer must be a torchlamb.Lamb, got a {type(optimizer).__name__}")
        for name, value, least in (("every", every, 1), ("start", start, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int >= {least}, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
        self._path = Path(to) if isinstance(to, (str, os.PathLike)) else None
        self._writer = None if to is None or self._path is not None else to
        if self._writer is not None and not hasattr(self._writer, "add_scalar"):
            raise TypeError(f"to must be a path, an object with add_scalar, or None, got a {type(to).__name__}")
        if self._path is not None:
            with self._path.open("ab"):  # fails now rather than after hours
                pass
        self._optimizer, self._every, self._count = optimizer, every, start

    def step(self) -> None:
        """Note that the optimizer has taken a step, and record it if it is its turn. Call it after ``optimizer.step()``."""
        self._count += 1
        if self._count % self._every == 0 and (self._path is not None or self._writer is not None):
            self.record()

    def record(self) -> None:
        """Record the last step, whatever its number."""
        row = self._row()
        if self._path is not None:
            _append(self._path, row)
        elif self._writer is not None:
            self._writer.add_scalar("skipped_steps", row["skipped_steps"], self._count)  # type: ignore[union-attr]
            for name, numbers in row["layers"].items():
                for quantity in _QUANTITIES:
                    self._add(f"{quantity}/{name}", numbers[quantity])

    def _add(self, tag: str, value: float | list[float | None] | None) -> None:
        if isinstance(value, list):
            for i, one in enumerate(value):
                self._add(f"{tag}/{i}", one)
        elif value is not None:
            self._writer.add_scalar(tag, value, self._count)  # type: ignore[union-attr]

    def _row(self) -> Row:
        ratios, norms = self._optimizer.trust_ratios(), self._optimizer.norms()
        tensors = [self._optimizer.skipped_steps, *ratios.values(), *(part for n in norms.values() for part in n.unbind(-1))]
        skipped, *numbers = _read_back(tensors)
        layers: dict[str, Row] = {}
        for i, name in enumerate(ratios):
            param_norm, update_norm = numbers[len(ratios) + 2 * i : len(ratios) + 2 * i + 2]
            layers[str(name)] = dict(zip(_QUANTITIES, (numbers[i], param_norm, update_norm), strict=True))
        return {"step": self._count, "skipped_steps": int(skipped), "layers": layers}


def read(path: str | os.PathLike[str]) -> list[Row]:
    """Return the rows that `Telemetry` has written to a file.

    A run that was resumed writes some steps again; their later rows replace the earlier. A line that a crash has cut is passed
    over with a warning.

    Args:
        path: of the file

    Returns:
        Dicts with ``step``, ``skipped_steps`` (up to then) and ``layers``: by name ``trust_ratio``, ``param_norm`` and
        ``update_norm``, each a number, a list of them where `blocks` > 1, and None where the step was skipped.

    Raises:
        OSError: it cannot be read
        ValueError: it is no such file

    Example:
        >>> import tempfile, torch, torchlamb
        >>> parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> parameter.grad = torch.ones(2)
        >>> optimizer = torchlamb.Lamb([("w", parameter)])
        >>> path = tempfile.mkdtemp() + "/layers.jsonl"
        >>> telemetry = torchlamb.telemetry.Telemetry(optimizer, path, every=1)
        >>> optimizer.step()
        >>> telemetry.step()
        >>> torchlamb.telemetry.read(path)[0]["layers"]["w"]["param_norm"]
        5.0
    """
    rows: list[Row] = []
    cut: list[int] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            cut += [number] if line else []
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not {"skipped_steps", "layers"} <= row.keys():
            raise ValueError(f"line {number} of {path} is no row of Telemetry: {line[:60]!r}")
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    if cut and not rows:
        raise ValueError(f"{path} has no row of Telemetry; its first line is cut off, or it is another file")
    for number in cut:
        warnings.warn(f"line {number} of {path} is cut off; it is passed over", stacklevel=2)
    return rows


def plot(rows: Sequence[Row] | str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Draw the trust ratios as a heat map: layers from top to bottom, steps from left to right.

    White is the median of the run, red larger and blue smaller, on a logarithmic scale; grey is a step that was skipped, or a
    layer without a gradient.

    Args:
        rows: from `read`, or the path for it
        file: the picture to write: .png, .svg or .pdf

    Raises:
        ValueError: there is no row with a ratio
        ImportError: matplotlib is not installed
        OSError: it cannot be read or written; a picture that was there before stays

    Example:
        >>> import os, tempfile, torchlamb
        >>> layers = {"fc.weight": {"trust_ratio": 0.5}, "fc.bias": {"trust_ratio": 0.1}}
        >>> rows = [{"step": step, "skipped_steps": 0, "layers": layers} for step in (100, 200)]
        >>> file = tempfile.mkdtemp() + "/trust_ratios.png"
        >>> torchlamb.telemetry.plot(rows, file)
        >>> os.path.exists(file)
        True
    """
    try:
        from matplotlib.colors import TwoSlopeNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    rows = read(rows) if isinstance(rows, (str, os.PathLike)) else rows
    names = list(dict.fromkeys(name for row in rows for name in row["layers"]))
    table = torch.tensor([[_log_ratio(row["layers"].get(name)) for row in rows] for name in names]).reshape(
        len(names), len(rows)
    )
    seen = table[table.isfinite()]
    if not seen.numel():
        raise ValueError("rows have no trust ratio; record at least one step that was not skipped")
    middle = float(seen.median())
    reach = max(float((seen - middle).abs().max()), 0.1)
    shown = max(1, math.ceil(len(names) / 60))  # of so many layers one has its name written
    figure = Figure(figsize=(9, 1.6 + 0.16 * max(10, min(len(names), 90))), layout="constrained")
    axes = figure.add_subplot(facecolor="0.75")
    steps = [row["step"] for row in rows]
    norm = TwoSlopeNorm(middle, middle - reach, middle + reach)
    image = axes.imshow(table.numpy(), aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    axes.set_yticks(range(0, len(names), shown), [_short(name) for name in names[::shown]], fontsize=7)
    ticks = sorted({round(i * (len(steps) - 1) / 7) for i in range(8)})
    axes.set_xticks(ticks, [f"{steps[i]:,}" for i in ticks])
    skipped = rows[-1]["skipped_steps"]
    axes.set(
        xlabel="step", title=f"Trust ratio |param| / |update| by layer; {skipped} skipped step{'' if skipped == 1 else 's'}"
    )
    bar = figure.colorbar(image, ax=axes, format=FuncFormatter(lambda x, _: f"{10**x:.3g}"))
    bar.set_label("trust ratio; white: the median of the run")
    kind = Path(file).suffix.removeprefix(".") or "png"
    write_whole(Path(file), lambda opened: figure.savefig(opened, format=kind, dpi=120), replace=True)


def _read_back(tensors: Sequence[Tensor]) -> list[Any]:
    """Return tensors' numbers, with one transfer from each device; None for what is not finite."""
    places: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        places.setdefault(t.device, []).append(i)
    numbers: list[Any] = [None] * len(tensors)
    for indices in places.values():
        flat = iter(torch.cat([tensors[i].detach().to(torch.float32).reshape(-1) for i in indices]).tolist())
        for i in indices:
            one = [_rounded(next(flat)) for _ in range(tensors[i].numel())]
            numbers[i] = one if tensors[i].dim() else one[0]
    return numbers


def _rounded(x: float) -> float | None:
    return float(f"{x:.7g}") if math.isfinite(x) else None


def _append(path: Path, row: Row) -> None:
    """Add a line, and end a line that a crash has cut."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
        torn = end > 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")


def _log_ratio(numbers: Row | None) -> float:
    """Return the logarithm of a layer's ratio, or of the mean over those of its blocks that stepped."""
    ratio = None if numbers is None else numbers["trust_ratio"]
    if isinstance(ratio, list):
        stepped = [one for one in ratio if one is not None]
        ratio = sum(stepped) / len(stepped) if stepped else None
    return math.log10(ratio) if ratio else math.nan


def _short(name: str) -> str:
    return name if len(name) <= 44 else f"…{name[-43:]}"
