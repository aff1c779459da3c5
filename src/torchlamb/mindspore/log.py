"""MindSpore's logger: Python's, under the name "mindspore"."""

from __future__ import annotations

import logging

__all__ = ["critical", "debug", "error", "get_level", "info", "warning"]

_logger = logging.getLogger("mindspore")
debug, info, warning, error, critical = _logger.debug, _logger.info, _logger.warning, _logger.error, _logger.critical


def get_level() -> str:
    """Return the level as MindSpore counts: "0" for debug to "3" for error."""
    return str(max(0, min(4, _logger.getEffectiveLevel() // 10 - 1)))
