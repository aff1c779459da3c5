"""The callback that writes checkpoints while training, and keeps the last few."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from torchlamb.mindspore.checks import check_count
from torchlamb.mindspore.train.callback.base import Callback, CallbackParams, RunContext
from torchlamb.mindspore.train.serialization import save_checkpoint
from torchlamb.options import fail

_INFO = ("epoch_num", "step_num")


class CheckpointConfig:
    """When `ModelCheckpoint` writes a file, and how many it keeps.

    Args:
        save_checkpoint_steps: write after so many steps, an int >= 0; 0 or None for not by steps (default: 1)
        save_checkpoint_seconds: write after so many seconds, an int >= 0, if not by steps (default: 0)
        keep_checkpoint_max: how many files stay, an int >= 0; 0 or None for one (default: 5)
        keep_checkpoint_per_n_minutes: keep one file of so many minutes, an int >= 0, if `keep_checkpoint_max` is 0 or None
            (default: 0)
        integrated_save: accepted, does nothing (default: True)
        async_save: accepted, does nothing (default: False)
        saved_network: the network to save; None for the one that is trained, with its optimizer (default: None)
        append_info: what else to save: "epoch_num", "step_num", or one dict of numbers and strings (default: None)
        ignored: further words of the original, which do nothing

    Raises:
        TypeError: an argument of another type
        ValueError: an argument out of range, or all four numbers are 0 or None

    Example:
        >>> from torchlamb.mindspore import CheckpointConfig
        >>> CheckpointConfig(save_checkpoint_steps=100, keep_checkpoint_max=3).keep_checkpoint_max
        3

    Source: `mindspore.train.CheckpointConfig`.
    """

    def __init__(
        self,
        save_checkpoint_steps: int | None = 1,
        save_checkpoint_seconds: int | None = 0,
        keep_checkpoint_max: int | None = 5,
        keep_checkpoint_per_n_minutes: int | None = 0,
        integrated_save: bool = True,
        async_save: Any = False,
        saved_network: nn.Module | None = None,
        append_info: list[Any] | None = None,
        **ignored: Any,  # noqa: ARG002
    ) -> None:
        numbers = {
            "save_checkpoint_steps": save_checkpoint_steps,
            "save_checkpoint_seconds": save_checkpoint_seconds,
            "keep_checkpoint_max": keep_checkpoint_max,
            "keep_checkpoint_per_n_minutes": keep_checkpoint_per_n_minutes,
        }
        for name, value in numbers.items():
            if value is not None and (value != 0 or isinstance(value, bool)):
                check_count(name, value)
        if not any(numbers.values()):
            raise ValueError(f"one of {', '.join(numbers)} must be greater than 0, got 0 or None for all")
        if saved_network is not None and not isinstance(saved_network, nn.Module):
            raise fail(TypeError, "saved_network", "a torch.nn.Module or None", saved_network)
        self.save_checkpoint_steps = save_checkpoint_steps or None
        self.save_checkpoint_seconds = None if save_checkpoint_steps else save_checkpoint_seconds or None
        self.keep_checkpoint_per_n_minutes = None if keep_checkpoint_max else keep_checkpoint_per_n_minutes or None
        self.keep_checkpoint_max = keep_checkpoint_max or (None if self.keep_checkpoint_per_n_minutes else 1)
        self.integrated_save, self.async_save = integrated_save, async_save
        self.saved_network = saved_network
        self.append_dict = _read_info(append_info)

    def get_checkpoint_policy(self) -> dict[str, Any]:
        """Return the four numbers and the network by name."""
        names = ("save_checkpoint_steps", "save_checkpoint_seconds", "keep_checkpoint_max", "keep_checkpoint_per_n_minutes")
        return {name: getattr(self, name) for name in (*names, "saved_network")}


class ModelCheckpoint(Callback):
    """Writes checkpoints ``<prefix>-<epoch>_<step of the epoch>.ckpt`` while training, and one at its end.

    A file has that name only when all of it is there, and the oldest is removed only then. Where files of the prefix are there
    already, the prefix gets a number, so that none of another run is replaced.

    Args:
        prefix: the beginning of file names, without "/"; or a function of the callback's parameters that returns the whole name
            without ".ckpt" (default: 'CKP')
        directory: the folder, which is made; a function that returns it; None for the current one (default: None)
        config: a `CheckpointConfig`; None for one with its defaults (default: None)

    Raises:
        TypeError: an argument of another type
        ValueError: a prefix with "/"

    Example:
        >>> import pathlib, tempfile, torch
        >>> from torchlamb.mindspore import CheckpointConfig, Model, ModelCheckpoint, nn
        >>> net, folder = torch.nn.Linear(1, 1), tempfile.mkdtemp()
        >>> model = Model(net, torch.nn.MSELoss(), nn.Lamb(nn.trainable_params(net), 0.1))
        >>> checkpoints = ModelCheckpoint("net", folder, CheckpointConfig(2, keep_checkpoint_max=2))
        >>> model.train(2, [(torch.ones(2, 1), torch.ones(2, 1))] * 4, callbacks=checkpoints)
        >>> sorted(file.name for file in pathlib.Path(folder).iterdir())
        ['net-2_2.ckpt', 'net-2_4.ckpt']

    Source: `mindspore.train.ModelCheckpoint`.
    """

    def __init__(
        self,
        prefix: str | Callable[[CallbackParams], str] = "CKP",
        directory: str | os.PathLike[str] | Callable[[CallbackParams], Any] | None = None,
        config: CheckpointConfig | None = None,
    ) -> None:
        if not callable(prefix):
            _check_prefix(prefix)
        if config is not None and not isinstance(config, CheckpointConfig):
            raise fail(TypeError, "config", "a CheckpointConfig or None", config)
        if directory is not None and not callable(directory) and not isinstance(directory, (str, os.PathLike)):
            raise fail(TypeError, "directory", "a path, a function that returns one, or None", directory)
        self._config = config or CheckpointConfig()
        self._prefix, self._directory = prefix, directory
        if not callable(directory) and not callable(prefix):
            self._prefix = _unused(Path(directory or "."), prefix)
        self._latest_ckpt_file_name = ""
        self._last_step = 0
        self._last_time = self._last_kept = time.time()

    @property
    def latest_ckpt_file_name(self) -> str:
        """The path of the file that was written last; "" before."""
        return self._latest_ckpt_file_name

    def begin(self, run_context: RunContext) -> None:  # noqa: ARG002
        """Count the steps of this training."""
        self._last_step = 0

    def step_end(self, run_context: RunContext) -> None:
        """Write a file if it is time."""
        state = run_context.original_args()
        steps, seconds = self._config.save_checkpoint_steps, self._config.save_checkpoint_seconds
        if steps is not None:
            due = state.cur_step_num >= self._last_step + steps
        else:
            due = seconds is not None and time.time() - self._last_time > seconds
        if due:
            self._save(state)

    def end(self, run_context: RunContext) -> None:
        """Write a file of the last step, unless there is one."""
        state = run_context.original_args()
        if state.cur_step_num != self._last_step:
            self._save(state)

    def on_eval_begin(self, run_context: RunContext) -> None:
        """Do nothing; what is evaluated is not saved."""

    def on_eval_step_end(self, run_context: RunContext) -> None:
        """Do nothing."""

    def on_eval_end(self, run_context: RunContext) -> None:
        """Do nothing."""

    def _save(self, state: CallbackParams) -> None:
        folder = Path((self._directory(state) if callable(self._directory) else self._directory) or ".")
        if callable(self._prefix):
            name = prefix = _check_prefix(self._prefix(state))
        else:
            step = (state.cur_step_num - 1) % state.batch_num + 1 if state.get("batch_num") else state.cur_step_num
            prefix = self._prefix
            name = f"{prefix}-{state.cur_epoch_num}_{step}"
        info = {"epoch_num": state.cur_epoch_num, "step_num": state.cur_step_num}
        more = {key: value + info[key] if key in _INFO else value for key, value in self._config.append_dict.items()}
        network = self._config.saved_network if self._config.saved_network is not None else state.train_network
        file = folder / f"{name}.ckpt"
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(network, file, append_dict=more)
        self._latest_ckpt_file_name, self._last_step, self._last_time = str(file), state.cur_step_num, time.time()
        self._remove_old(folder, prefix, file)

    def _remove_old(self, folder: Path, prefix: str, newest: Path) -> None:
        older = [file for file in folder.glob("*.ckpt") if re.fullmatch(rf"{re.escape(prefix)}-\d+_\d+\.ckpt", file.name)]
        older = sorted((file for file in older if file != newest), key=lambda file: file.stat().st_mtime_ns)
        kept, minutes = self._config.keep_checkpoint_max, self._config.keep_checkpoint_per_n_minutes
        if kept is not None:
            doomed = older[: max(0, len(older) + 1 - kept)]
        else:
            recent = [file for file in older if time.time() - file.stat().st_mtime < 60 * (minutes or 0)]
            doomed = recent[1:]
        for file in doomed:
            with contextlib.suppress(OSError):
                file.unlink()


def _unused(folder: Path, prefix: str) -> str:
    """Return a prefix that no file in a folder has: the next number is added to one that is used."""
    pattern = re.compile(rf"{re.escape(prefix)}(?:_(\d+))?-.*\.ckpt")
    matches = [pattern.fullmatch(entry.name) for entry in folder.iterdir()] if folder.is_dir() else []
    used = [int(match[1] or 0) for match in matches if match]
    return f"{prefix}_{max(used) + 1}" if used else prefix


def _check_prefix(prefix: Any) -> str:
    if not isinstance(prefix, str):
        raise fail(TypeError, "prefix", "a string without '/', or a function that returns one", prefix)
    if "/" in prefix:
        raise fail(ValueError, "prefix", "a string without '/'", prefix)
    return prefix


def _read_info(append_info: Any) -> dict[str, Any]:
    if append_info is None:
        return {}
    if not isinstance(append_info, list):
        raise fail(TypeError, "append_info", "a list of 'epoch_num', 'step_num' and at most one dict", append_info)
    info: dict[str, Any] = {}
    dicts = [entry for entry in append_info if isinstance(entry, dict)]
    for i, entry in enumerate(append_info):
        if not isinstance(entry, (str, dict)) or len(dicts) > 1:
            raise fail(TypeError, f"append_info[{i}]", "'epoch_num', 'step_num' or the only dict", entry)
        if isinstance(entry, str) and entry not in _INFO:
            raise fail(ValueError, f"append_info[{i}]", "'epoch_num', 'step_num' or a dict", entry)
        info.update({entry: 0} if isinstance(entry, str) else entry)
    return info
