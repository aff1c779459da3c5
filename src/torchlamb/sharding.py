"""What this version does with sharded parameters: it refuses them, because a wrong norm would train silently wrong.

LAMB's ratio needs norms over whole tensors. A shard's own norms are not those, so stepping shards one by one computes another
rule without any sign of it. No other file imports torch.distributed, and this one only looks whether somebody else has.
"""

from __future__ import annotations

import sys

from torch import Tensor


def why_refused(param: Tensor) -> str | None:
    """Return what is said of a parameter that can be recognised as a shard of a larger tensor, None of any other."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is not None and isinstance(param, dtensor.DTensor):
        return "is a DTensor, and this version steps whole tensors only: give Lamb the parameters of an unsharded model"
    if hasattr(param, "_fsdp_flattened"):
        return (
            "is a flat parameter of FullyShardedDataParallel, in which the layers that LAMB adapts are no longer "
            "recognisable: give Lamb the parameters of an unsharded model"
        )
    return None
