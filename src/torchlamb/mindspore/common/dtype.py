"""MindSpore's names of dtypes, which are torch's dtypes."""

from __future__ import annotations

from typing import Any

import torch

__all__ = [
    "bfloat16",
    "bool_",
    "complex64",
    "complex128",
    "dtype_to_nptype",
    "float16",
    "float32",
    "float64",
    "float_",
    "int8",
    "int16",
    "int32",
    "int64",
    "int_",
    "pytype_to_dtype",
    "uint8",
]

bool_ = torch.bool
int8, int16, int32, int64 = torch.int8, torch.int16, torch.int32, torch.int64
uint8 = torch.uint8
float16, float32, float64, bfloat16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
complex64, complex128 = torch.complex64, torch.complex128
int_, float_ = torch.int64, torch.float32

_OF_PYTHON = {bool: torch.bool, int: torch.int64, float: torch.float32}


def pytype_to_dtype(obj: Any) -> torch.dtype:
    """Return the dtype that a Python type or a NumPy dtype has.

    Raises:
        TypeError: it has none
    """
    if isinstance(obj, torch.dtype):
        return obj
    found = _OF_PYTHON.get(obj) if isinstance(obj, type) else None
    found = found or getattr(torch, str(getattr(obj, "__name__", obj)).removesuffix("_"), None)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"obj must be bool, int, float or a NumPy dtype that torch has, got {obj!r}")
    return found


def dtype_to_nptype(type_: torch.dtype) -> Any:
    """Return the NumPy type of a dtype; NumPy has none for bfloat16, which becomes float32."""
    return torch.empty(0, dtype=torch.float32 if type_ == torch.bfloat16 else type_).numpy().dtype.type
