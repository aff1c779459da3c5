"""What state dicts of Adam and its relatives have that Lamb has not: how they are told, and what is said of them.

`load_state_dict` and `torchlamb.convert` ask here, so that they say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# By the key in a parameter's state: what it holds. States that have all that Lamb needs and one of these are another rule's.
STATE_KEYS = {
    "max_exp_avg_sq": "amsgrad's largest second moments",
    "exp_inf": "Adamax's infinity norms",
    "mu_product": "NAdam's product of momenta",
    "momentum_buffer": "the momentum of SGD or RMSprop",
    "square_avg": "the second moments of RMSprop or Adadelta",
    "exp_avg_sq_row": "Adafactor's factored second moments",
    "exp_avg_sq_col": "Adafactor's factored second moments",
    "exp_avg_diff": "Adan's moments of differences",
    "pre_grad": "Adan's last gradients",
    "neg_pre_grad": "Adan's last gradients",
    "p0": "Prodigy's first parameters",
}
_LR = "its lr is the length of each element's step; Lamb's is a share of each tensor's norm: tune it again"


def is_ours(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a state dict's groups are those of Lamb."""
    return any("layer_adaptation" in group for group in groups)


def is_adams(group: Mapping[str, Any]) -> bool:
    """Return whether a group is one of torch's Adam, AdamW or RAdam."""
    if "layer_adaptation" in group or "momentum_decay" in group:  # NAdam's
        return False
    return "amsgrad" in group or "decoupled_weight_decay" in group


def why_state_refused(entry: Mapping[str, Any], name: str) -> str | None:
    """Return what is said of a parameter's state that is another rule's, None of any other."""
    for key in entry:
        if key in STATE_KEYS:
            return (
                f"the state of {name} has {key!r}, {STATE_KEYS[key]}, which Lamb has no place for; to drop it, take it "
                "out of every state first, whether the rest is loaded as it is or through torchlamb.convert.to_lamb"
            )
    return None


def adam_notes(group: Mapping[str, Any]) -> list[str]:
    """Return what changes in a run that goes on from a group of Adam, AdamW or RAdam."""
    notes = [_LR]
    decoupled = group.get("decoupled_weight_decay", False)
    if group.get("amsgrad"):
        notes.append("amsgrad: the largest second moments (max_exp_avg_sq) are dropped")
    if "amsgrad" not in group:
        notes.append("RAdam's rectification, a warm-up of its own, is not in Lamb: warm the lr up if the run is young")
    if group["weight_decay"] and not decoupled:
        notes.append("Adam's decay is in its moments; from here on it is in the update")
    elif group["weight_decay"]:
        notes.append("AdamW's decay, lr * weight_decay * param, is outside the update; in Lamb it is inside, before the ratio")
    return notes
