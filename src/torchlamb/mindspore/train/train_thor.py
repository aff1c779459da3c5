"""What scripts call whatever their optimizer is."""

from __future__ import annotations

from typing import Any

__all__ = ["ConvertModelUtils", "ConvertNetUtils"]


class ConvertModelUtils:
    """Returns models as they are: THOR, for which the original converts them, is not here."""

    @staticmethod
    def convert_to_thor_model(model: Any, *_: Any, **__: Any) -> Any:
        """Return the model."""
        return model


class ConvertNetUtils:
    """Leaves networks as they are."""

    @staticmethod
    def convert_to_thor_net(net: Any) -> Any:
        """Return the network."""
        return net
