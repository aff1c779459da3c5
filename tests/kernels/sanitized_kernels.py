"""Step on kernels built with sanitizers: python sanitized_kernels.py LIBRARY [SECONDS], with libasan in LD_PRELOAD.

Every combination of dtypes and options, and then for so many seconds what `odd_tensors.py` draws.

A read or write outside a tensor, or undefined behaviour, ends the process with a message; exit
status 0 means that there was none.
"""

from __future__ import annotations

import ctypes
import itertools
import sys

import torch
from torch import nn

import torchlamb
from torchlamb import lamb
from torchlamb.backends import cpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STORAGE = [{}, {"master_weights": True}, {"state_dtype": BF16}, {"master_weights": True, "state_dtype": BF16}]
STOCHASTIC = [{"stochastic_rounding": True}, {"stochastic_rounding": True, "state_dtype": BF16}]
COMBINATIONS = [
    *((F32, grad, options) for grad in (F32, BF16) for options in ({}, {"state_dtype": BF16})),
    *((param, grad, options) for param in (BF16, F16) for grad in (param, F32) for options in STORAGE),
    *((BF16, BF16, options) for options in STOCHASTIC),
]
OPTIONS = [
    {"weight_decay": 0.1, "max_grad_norm": 0.5},
    {"grad_averaging": False, "bias_correction": False, "phi_bounds": (0.1, 4.0), "trust_ratio_bounds": (0.1, 2.0)},
    {"layer_adaptation": False, "maximize": True, "skip_nonfinite": True},
]
SIZES = (*range(71), 1000, 33_000, 70_001)


def tensors(blocks: int) -> list[torch.Tensor]:
    """Each of the sizes once in memory of its own and once an element further, and some layouts."""
    flat = [torch.randn(blocks * size) for size in SIZES]
    # Of the right length at their end too, so that what is read behind it is not the tensor's.
    unaligned = [torch.randn(blocks * size + 1)[1:] for size in SIZES]
    laid_out = [
        torch.randn(7, 6).t(),
        torch.randn(6, 10)[:, ::2],
        torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last),
    ]
    return [*flat, *unaligned, *laid_out, *([torch.randn(())] if blocks == 1 else [])]


def step_with(param: torch.dtype, grad: torch.dtype, options: dict[str, object], blocks: int) -> None:
    """Take two steps, the second in two phases."""
    params = [nn.Parameter(like(t, param)) for t in tensors(blocks)]
    for p in params:
        p.grad_dtype = grad
        p.grad = torch.randn_like(p, dtype=grad)
    optimizer = torchlamb.Lamb(params, lr=0.02, fused=True, blocks=blocks, **options)
    optimizer.step()
    in_two_phases, lamb.in_two_phases = lamb.in_two_phases, lambda _: True
    try:
        optimizer.step()
    finally:
        lamb.in_two_phases = in_two_phases
    assert all(p.isfinite().all() for p in params)


def like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return it in another dtype, as far from its storage's start as before."""
    if tensor.storage_offset() == 0:
        return tensor.to(dtype)
    return torch.cat([torch.zeros(1, dtype=dtype), tensor.to(dtype)])[1:]


def main(path: str, seconds: float = 0.0) -> None:
    """Put the library's functions in the place of those that are installed, and step."""
    cpu.library.load()
    if not cpu.library.isa:
        sys.exit(f"nothing to replace: {cpu.library.why_not}")
    sanitized = ctypes.CDLL(path)
    sanitized.torchlamb_set_isa.restype = ctypes.c_char_p
    if sanitized.torchlamb_abi() != cpu.ABI:
        sys.exit(f"{path} has another ABI than torchlamb")
    cpu.library.functions = [getattr(sanitized, name) for name in cpu._FUNCTIONS]
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for isa in cpu.ISAS:
        if sanitized.torchlamb_set_isa(isa.encode()).decode() != isa:
            continue
        options = itertools.cycle(OPTIONS)
        for (param, grad, storage), blocks in itertools.product(COMBINATIONS, (1, 2)):
            step_with(param, grad, {**storage, **next(options)}, blocks)
        sys.stdout.write(f"{isa}: {2 * len(COMBINATIONS)} combinations\n")
    if seconds:
        import odd_tensors  # with Hypothesis, which the rest does without

        sys.stdout.write(f"{odd_tensors.search(seconds, 0, apart=False)} odd examples\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
