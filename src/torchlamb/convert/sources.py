"""How each other optimizer lays out its state dict, and which options of Lamb compute its rule.

One function for each translates a group's options and says what they leave different; `SOURCES` holds them with how a state
dict of theirs looks. docs/variants.md says what each rule is. This room must not know how states are rewritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchlamb.foreign import adam_notes

Options = dict[str, Any]
# Options of Lamb, and the differences from the peer's rule that they leave.
Translated = tuple[Options, list[str]]


@dataclass(frozen=True)
class Source:
    """One optimizer's state dicts."""

    title: str
    group_keys: tuple[str, ...]  # by which its groups are told, beside the five that all have
    step_in: str  # "group" or "state"
    translate: Callable[[Mapping[str, Any], Mapping[str, Any]], Translated]  # a group and the arguments
    # Of its constructor, with their defaults: what its state dicts do not hold and its rule depends on.
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()  # further keys of its groups that mean nothing here
    absent: tuple[str, ...] = ()  # keys that its groups cannot have

    @property
    def consumed(self) -> set[str]:
        """Return the keys of a group that are translated or dropped; all others are a scheduler's, say, and stay."""
        return {*COMMON, *self.group_keys, *self.dropped, "step"}


# The rule of Lamb by default, said in full: what a dict does not say is left as the optimizer that loads it has it.
_PAPER: Options = {
    "bias_correction": True,
    "layer_adaptation": True,
    "grad_averaging": True,
    "phi_bounds": None,
    "trust_ratio_bounds": None,
    "blocks": 1,
    "grad_centralization": False,
    "max_grad_norm": None,
    "maximize": False,
}
_OF_GROUPS = "that of its groups"

# What every group of all of them has.
COMMON = ("params", "lr", "betas", "eps", "weight_decay")


def _adam(group: Mapping[str, Any], _: Mapping[str, Any]) -> Translated:
    # What is not about its moments is left to the optimizer that loads this.
    return {"bias_correction": True, "grad_averaging": True, "maximize": bool(group.get("maximize"))}, adam_notes(group)


def _clipped_lamb(group: Mapping[str, Any], arguments: Mapping[str, Any], adapts: bool) -> Options:
    """Return what timm's and Apex's rules share."""
    limit = arguments["max_grad_norm"]
    limit = group["max_grad_norm"] if limit is _OF_GROUPS else limit
    limit = None if limit is None or float(limit) == math.inf else float(limit)
    if limit is not None and not limit > 0:
        raise ValueError(f"max_grad_norm is {limit}, by which gradients would be divided; give the one that was used")
    return {
        **_PAPER,
        "bias_correction": bool(group["bias_correction"]),
        "grad_averaging": bool(group["grad_averaging"]),
        "max_grad_norm": limit,
        "layer_adaptation": adapts or float(group["weight_decay"]) != 0.0,
    }


def _apex(group: Mapping[str, Any], arguments: Mapping[str, Any]) -> Translated:
    notes = []
    if not arguments["adam_w_mode"]:
        notes.append("adam_w_mode=False adds the decay to the gradient, so that it is in the moments; here it is in the update")
    return _clipped_lamb(group, arguments, bool(arguments["use_nvlamb"])), notes


def _apex_mixed_precision(group: Mapping[str, Any], arguments: Mapping[str, Any]) -> Translated:
    options, notes = _apex(group, arguments)
    # Its state dicts hold no masters: where it resumes, too, they are made of the rounded parameters again.
    return {**options, "master_weights": True}, notes


def _timm(group: Mapping[str, Any], arguments: Mapping[str, Any]) -> Translated:
    notes = []
    if group.get("caution"):
        notes.append("caution=True masks the update where its sign is not the gradient's; here nothing is masked")
    if group.get("decoupled_decay") and group["weight_decay"]:
        notes.append("decoupled_decay=True decays outside the update; here the decay is inside, before the ratio")
    bounds = (0.0, 1.0) if group["trust_clip"] else None
    return {**_clipped_lamb(group, arguments, bool(group["always_adapt"])), "trust_ratio_bounds": bounds}, notes


def _deepspeed(group: Mapping[str, Any], arguments: Mapping[str, Any]) -> Translated:
    notes = []
    if group["bias_correction"]:
        notes.append(
            "it multiplies the lr by sqrt(1 - beta2^t) / (1 - beta1^t) after the ratio: lr_factor('deepspeed', start=steps)"
        )
    if group["max_grad_norm"]:
        notes.append("its max_grad_norm clips by norms that are handed to its step(); here nothing is clipped")
    if arguments["eps_inside_sqrt"]:
        notes.append("eps_inside_sqrt=True has sqrt(v + eps); here eps is added to the root")
    bounds = (float(group["min_coeff"]), float(group["max_coeff"]))
    return {**_PAPER, "bias_correction": False, "trust_ratio_bounds": bounds}, notes


def _torch_optimizer(_: Mapping[str, Any], arguments: Mapping[str, Any]) -> Translated:
    notes = []
    if arguments["debias"]:
        notes.append(
            "debias=True multiplies the lr by sqrt(1 - beta2^t) / (1 - beta1^t) after the ratio: "
            "lr_factor('torch_optimizer', start=steps)"
        )
    high = float(arguments["clamp_value"])
    adapts = not arguments["adam"] and high != 0.0  # a norm that is clamped to 0 gives a ratio of 1
    bounds = (0.0, high) if high != 0.0 else None
    return {**_PAPER, "bias_correction": False, "phi_bounds": bounds, "layer_adaptation": adapts}, notes


def _pytorch_optimizer(group: Mapping[str, Any], arguments: Mapping[str, Any]) -> Translated:
    notes = ["its ratio is |param| / (|update| + eps); here no eps is added"]
    if not group.get("adam_debias"):
        notes.append("it divides the lr by 1 - beta1^t after the ratio: lr_factor('pytorch_optimizer', start=steps)")
    if group["weight_decouple"] and group["weight_decay"]:
        notes.append("it decays the parameter outside the update and its ratio; here the decay is inside, before the ratio")
    notes += [f"{name}=True has no counterpart" for name in ("rectify", "adanorm") if group.get(name)]
    if arguments["pre_norm"]:
        notes.append("pre_norm=True adds eps to the norm that it clips by; here nothing is added")
    return {
        **_PAPER,
        "bias_correction": False,
        "grad_averaging": bool(group["grad_averaging"]),
        "phi_bounds": (0.0, 10.0),
        "layer_adaptation": not group["adam"],
        "max_grad_norm": float(group["max_grad_norm"]) or None if arguments["pre_norm"] else None,
        "maximize": bool(arguments["maximize"]),
    }, notes


_TORCH = ("foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay")
_APEX = ("bias_correction", "grad_averaging", "max_grad_norm")
_TIMM = ("trust_clip", "always_adapt")
_TIMM_LATER = ("caution", "decoupled_decay", "corrected_weight_decay", "max_lr_snapshot", "foreach")
_PYTORCH_OPTIMIZER = ("weight_decouple", "fixed_decay", "rectify", "adam", "grad_averaging", "max_grad_norm")
_CLIPS = {"max_grad_norm": _OF_GROUPS}  # the constructor's counts, and groups only repeat it unless they were given another
_NVLAMB = {"use_nvlamb": False, "adam_w_mode": True, **_CLIPS}

SOURCES: Mapping[str, Source] = {
    "adam": Source("torch.optim.Adam", ("amsgrad",), "state", _adam, dropped=_TORCH),
    "adamw": Source("torch.optim.AdamW", ("amsgrad",), "state", _adam, dropped=_TORCH),
    "radam": Source(
        "torch.optim.RAdam",
        ("decoupled_weight_decay",),
        "state",
        _adam,
        dropped=_TORCH,
        absent=("amsgrad", "momentum_decay"),
    ),
    "apex": Source("apex.optimizers.FusedLAMB", _APEX, "group", _apex, _NVLAMB),
    "apex_mixed_precision": Source("apex.optimizers.FusedMixedPrecisionLamb", _APEX, "group", _apex_mixed_precision, _NVLAMB),
    "timm": Source("timm.optim.Lamb", (*_APEX, *_TIMM), "group", _timm, _CLIPS, dropped=_TIMM_LATER),
    "deepspeed": Source(
        "deepspeed.ops.lamb.FusedLamb",
        ("bias_correction", "max_grad_norm", "max_coeff", "min_coeff"),
        "state",
        _deepspeed,
        {"eps_inside_sqrt": False},
    ),
    "torch_optimizer": Source(
        "torch_optimizer.Lamb",
        (),
        "state",
        _torch_optimizer,
        {"clamp_value": 10.0, "adam": False, "debias": False},
        absent=("foreach", "maximize", "bias_correction", "momentum_decay"),  # which torch's own have, and other LAMBs
    ),
    "pytorch_optimizer": Source(
        "pytorch_optimizer.Lamb",
        _PYTORCH_OPTIMIZER,
        "group",
        _pytorch_optimizer,
        {"pre_norm": False, "maximize": False},
        dropped=("foreach", "adam_debias", "adanorm", "adanorm_r", "maximize"),
    ),
}


def looks_like(group: Mapping[str, Any], step_in: str | None) -> list[str]:
    """Return the sources whose state dicts have such groups: those that name the most of its keys."""
    fits = [
        name
        for name, source in SOURCES.items()
        if {*COMMON, *source.group_keys} <= group.keys()
        and not group.keys() & set(source.absent)
        and step_in in (None, source.step_in)
    ]
    most = max((len(SOURCES[name].group_keys) for name in fits), default=0)
    return [name for name in fits if len(SOURCES[name].group_keys) == most]


def lr_factor(source: str, betas: tuple[float, float] = (0.9, 0.999), start: int = 0) -> Callable[[int], float]:
    r"""Return what a LAMB multiplies its lr by after the ratio, as a function of the 0-based step, for `LambdaLR`.

    .. math::
        \text{deepspeed, torch\_optimizer (debias)}: \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \qquad
        \text{pytorch\_optimizer}: \frac{1}{1 - \beta_1^t}

    with :math:`t` the step + `start` + 1.

    Args:
        source: "deepspeed", "torch_optimizer" or "pytorch_optimizer"
        betas: those of the optimizer (default: (0.9, 0.999))
        start: how many steps were taken before the scheduler is made, by a run that is converted (default: 0)

    Raises:
        ValueError: the rule of `source` has no such factor

    Example:
        >>> import torch, torchlamb
        >>> optimizer = torchlamb.Lamb([torch.nn.Parameter(torch.ones(2))], lr=1.0, bias_correction=False)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, torchlamb.convert.lr_factor("deepspeed"))
        >>> round(optimizer.param_groups[0]["lr"], 3)
        0.316

    Source: the implementations named; docs/variants.md has the rules.
    """
    beta1, beta2 = betas
    if source in ("deepspeed", "torch_optimizer"):
        return lambda step: math.sqrt(1 - beta2 ** (step + start + 1)) / (1 - beta1 ** (step + start + 1))
    if source == "pytorch_optimizer":
        return lambda step: 1 / (1 - beta1 ** (step + start + 1))
    raise ValueError(f"source must be 'deepspeed', 'torch_optimizer' or 'pytorch_optimizer', got {source!r}")
