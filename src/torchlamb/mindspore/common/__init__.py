"""What MindSpore's `common` has of tensors, parameters and seeds."""

from torchlamb.mindspore.common import api, dtype, initializer, parameter, seed, tensor
from torchlamb.mindspore.common.api import jit, jit_class, ms_class, ms_function, mutable
from torchlamb.mindspore.common.dtype import (
    bfloat16,
    bool_,
    complex64,
    complex128,
    dtype_to_nptype,
    float16,
    float32,
    float64,
    float_,
    int8,
    int16,
    int32,
    int64,
    int_,
    pytype_to_dtype,
    uint8,
)
from torchlamb.mindspore.common.parameter import NamedParameter, Parameter, ParameterTuple
from torchlamb.mindspore.common.seed import get_seed, set_seed
from torchlamb.mindspore.common.tensor import Tensor

__all__ = [
    "NamedParameter",
    "Parameter",
    "ParameterTuple",
    "Tensor",
    "api",
    "bfloat16",
    "bool_",
    "complex64",
    "complex128",
    "dtype",
    "dtype_to_nptype",
    "float16",
    "float32",
    "float64",
    "float_",
    "get_seed",
    "initializer",
    "int8",
    "int16",
    "int32",
    "int64",
    "int_",
    "jit",
    "jit_class",
    "ms_class",
    "ms_function",
    "mutable",
    "parameter",
    "pytype_to_dtype",
    "seed",
    "set_seed",
    "tensor",
    "uint8",
]
