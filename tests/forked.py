"""Running what may crash: in a copy of this process, so that a crash is a failure of one test and says which signal it was."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from loading import HANGS


class Crashed(AssertionError):
    """The copy was ended by a signal."""


def forked(function: Callable[[], Any], limit: int = HANGS) -> Any:
    """Return what a function returns in a copy of this process; raise AssertionError with what it raised, or how it died.

    On one thread: those of OpenMP are not in the copy, and waiting for them would never end.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads: the copy uses none
        child = os.fork()
    if child == 0:
        _run(function, writing, limit)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        raise Crashed(f"{signal.Signals(-status).name}")
    value, raised = pickle.loads(said)
    if raised is not None:
        raise AssertionError(raised)
    return value


def _run(function: Callable[[], Any], writing: int, limit: int) -> None:
    try:
        signal.alarm(limit)
        torch.set_num_threads(1)
        try:
            said = pickle.dumps((function(), None))
        except BaseException:
            said = pickle.dumps((None, traceback.format_exc()))
        with os.fdopen(writing, "wb") as file:
            file.write(said)
    finally:
        os._exit(0)
