"""Names that scripts import beside `Lamb`, so that their import lines run. None of these optimizers is here."""

from __future__ import annotations

from typing import Any

_REMEDIES = {
    "SGD": "torch.optim.SGD",
    "Momentum": "torch.optim.SGD with momentum",
    "Adam": "torch.optim.Adam",
    "AdamWeightDecay": "torch.optim.AdamW",
    "RMSProp": "torch.optim.RMSprop",
    "Adagrad": "torch.optim.Adagrad",
    "LARS": "nn.Lamb",
    "THOR": "nn.Lamb",
}


def _make(name: str, remedy: str) -> type:
    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise NotImplementedError(f"nn.{name} is not here; give Model {remedy}")

    return type(name, (), {"__init__": refuse, "__doc__": f"Not here; {remedy} is.", "__module__": __name__})


SGD, Momentum, Adam, AdamWeightDecay, RMSProp, Adagrad, LARS, THOR = (_make(*pair) for pair in _REMEDIES.items())
thor = THOR
