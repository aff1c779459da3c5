"""Training: models, callbacks, loss scales and checkpoints."""

from torchlamb.mindspore.train import (
    callback,
    loss_scale_manager,
    metrics,
    model,
    parallel_utils,
    serialization,
    train_thor,
)
from torchlamb.mindspore.train.callback import (
    Callback,
    CheckpointConfig,
    LossMonitor,
    ModelCheckpoint,
    RunContext,
    TimeMonitor,
)
from torchlamb.mindspore.train.loss_scale_manager import DynamicLossScaleManager, FixedLossScaleManager, LossScaleManager
from torchlamb.mindspore.train.metrics import (
    MAE,
    MSE,
    Accuracy,
    Loss,
    Metric,
    Top1CategoricalAccuracy,
    Top5CategoricalAccuracy,
    TopKCategoricalAccuracy,
)
from torchlamb.mindspore.train.model import Model
from torchlamb.mindspore.train.serialization import load_checkpoint, load_param_into_net, save_checkpoint

__all__ = [
    "MAE",
    "MSE",
    "Accuracy",
    "Callback",
    "CheckpointConfig",
    "DynamicLossScaleManager",
    "FixedLossScaleManager",
    "Loss",
    "LossMonitor",
    "LossScaleManager",
    "Metric",
    "Model",
    "ModelCheckpoint",
    "RunContext",
    "TimeMonitor",
    "Top1CategoricalAccuracy",
    "Top5CategoricalAccuracy",
    "TopKCategoricalAccuracy",
    "callback",
    "load_checkpoint",
    "load_param_into_net",
    "loss_scale_manager",
    "metrics",
    "model",
    "parallel_utils",
    "save_checkpoint",
    "serialization",
    "train_thor",
]
