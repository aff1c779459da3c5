"""LAMB for PyTorch: one tuned learning rate, carried from small batches to large ones.

`Lamb` is the optimizer, `param_groups` sorts a model's parameters for it, `testing` holds what can be asserted of any LAMB,
`checkpoint` saves and loads runs, `convert` takes over those of other optimizers, `telemetry` records what steps did to layers.
`recipes` has settings that others converge with, and a rule between batch sizes; `noise_scale` measures how large to make them.
`shard` tells how parameters lie under DeepSpeed, FSDP1 and Megatron.
"""

from importlib.metadata import version as _version

from torchlamb import checkpoint, convert, noise_scale, recipes, shard, telemetry, testing
from torchlamb.groups import param_groups
from torchlamb.lamb import Lamb

__all__ = [
    "Lamb",
    "__version__",
    "checkpoint",
    "convert",
    "noise_scale",
    "param_groups",
    "recipes",
    "shard",
    "telemetry",
    "testing",
]
__version__ = _version("torchlamb")
