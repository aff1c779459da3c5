"""What runs beside a training."""

from torchlamb.mindspore.train.callback import base, checkpoint, monitors
from torchlamb.mindspore.train.callback.base import Callback, CallbackParams, RunContext
from torchlamb.mindspore.train.callback.checkpoint import CheckpointConfig, ModelCheckpoint
from torchlamb.mindspore.train.callback.monitors import LossMonitor, TimeMonitor

__all__ = [
    "Callback",
    "CallbackParams",
    "CheckpointConfig",
    "LossMonitor",
    "ModelCheckpoint",
    "RunContext",
    "TimeMonitor",
    "base",
    "checkpoint",
    "monitors",
]
