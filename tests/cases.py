"""The one case table: backends x dtypes x layouts x options, and the tensors they run on."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import torchlamb
from torchlamb import backends
from torchlamb.backends import fused, gpu

# Of the random numbers of all tests that are marked `seeded`: always the same, unless soak.py sets a fresh one.
SEED = int(os.environ.get("TORCHLAMB_TEST_SEED", "0"))

# The device of all tensors, and whether the CPU stands for a GPU: what Triton's interpreter is for. Either way the whole table
# is that of the GPU's kernels.
DEVICE = torch.device(os.environ.get("TORCHLAMB_TEST_DEVICE", "cpu"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU_KERNELS = INTERPRETED or DEVICE.type != "cpu"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Those that arithmetic is done in.
DTYPES = [pytest.param(dtype, id=name_of(dtype)) for dtype in (torch.float64, torch.float32)[GPU_KERNELS:]]


class BackendCase(NamedTuple):
    name: str
    options: dict[str, Any]
    two_phase: bool  # accumulate and apply, as sharded buckets step, instead of the backend's own step()
    one_launch: bool = False  # of the GPU's kernels


GPU_BACKENDS = [
    BackendCase("gpu", {"fused": True}, False),
    BackendCase("gpu-two-phase", {"fused": True}, True),
    BackendCase("gpu-capturable", {"fused": True, "capturable": True}, False),
    BackendCase("gpu-one-launch", {"fused": True}, False, one_launch=True),
]
CPU_BACKENDS = [
    # The CPU's kernels where they are built. They have no float64, which takes the next one.
    BackendCase("default", {}, False),
    BackendCase("default-two-phase", {}, True),
    BackendCase("default-capturable", {"capturable": True}, False),
    BackendCase("unfused", {"fused": False}, False),  # small tensors in one backend, large ones in the other
    BackendCase("single", {"foreach": False}, False),
    BackendCase("single-two-phase", {"foreach": False}, True),
    BackendCase("single-capturable", {"foreach": False, "capturable": True}, False),
    BackendCase("foreach", {"foreach": True}, False),
    BackendCase("foreach-two-phase", {"foreach": True}, True),
    BackendCase("foreach-capturable", {"foreach": True, "capturable": True}, False),
    BackendCase("foreach-capturable-two-phase", {"foreach": True, "capturable": True}, True),
]
BACKENDS = GPU_BACKENDS if GPU_KERNELS else CPU_BACKENDS
PLAIN = ("default", "single", "foreach", "gpu")
BACKEND_PARAMS = [pytest.param(case, id=case.name) for case in BACKENDS]
# For long tests, of which `make test` takes the plain forms.
LONG_BACKEND_PARAMS = [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name not in PLAIN else [])
    for case in BACKENDS
    if not INTERPRETED  # in which a thousand steps take minutes
]
# Forms that combine others, which `make test` leaves out.
_COMBINED = ("single-capturable", "foreach-capturable-two-phase")


def forms(*, left_out: tuple[str, ...] = _COMBINED) -> list[Any]:
    """The forms of the case table, of which `make test` leaves some out.

    The capturable form is to the GPU's kernels the same, and is left to other tests in the interpreter, which is slow.
    """
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name in left_out else [])
        for case in BACKENDS
        if not (INTERPRETED and case.name == "gpu-capturable")
    ]


FORMS = forms()
# What forms differ in has nothing to do with how numbers are stored: all of them take all ways to store.
PLAIN_FORMS = forms(left_out=tuple(case.name for case in BACKENDS if case.name not in PLAIN))
# Other layouts, which the capturable forms walk no otherwise.
LAYOUT_FORMS = forms(left_out=tuple(case.name for case in BACKENDS if case.options.get("capturable")))

DEFAULTS = {
    name: p.default
    for name, p in inspect.signature(torchlamb.Lamb.__init__).parameters.items()
    if name not in ("self", "params")
}

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.1},
    "lr-zero": {"lr": 0.0},
    "lr-tensor": {"lr": torch.tensor(0.03, dtype=torch.float64)},
    "betas-half": {"betas": (0.5, 0.5)},
    "betas-zero": {"betas": (0.0, 0.9)},
    "betas-long": {"betas": (0.99, 0.9999)},
    "eps-zero": {"eps": 0.0},
    "eps-large": {"eps": 1e-2},
    "decay": {"weight_decay": 0.1},
    "no-bias-correction": {"bias_correction": False, "weight_decay": 0.01},
    "no-layer-adaptation": {"layer_adaptation": False, "weight_decay": 0.01},
    "no-grad-averaging": {"grad_averaging": False},
    "phi-bounds": {"phi_bounds": (0.5, 3.0)},
    "trust-ratio-bounds": {"trust_ratio_bounds": (0.1, 1.0)},
    "grad-centralization": {"grad_centralization": True},
    "clip": {"max_grad_norm": 0.25},
    "clip-inactive": {"max_grad_norm": 1e9},
    "skip-nonfinite": {"skip_nonfinite": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "blocks": {"blocks": 2, "weight_decay": 0.1},
    "everything": {
        "lr": 0.02,
        "betas": (0.8, 0.95),
        "eps": 1e-4,
        "weight_decay": 0.05,
        "grad_averaging": False,
        "phi_bounds": (0.1, 4.0),
        "trust_ratio_bounds": (0.01, 2.0),
        "blocks": 2,
        "grad_centralization": True,
        "max_grad_norm": 1.0,
        "maximize": True,
    },
}


def dense(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[..., Tensor] = torch.randn) -> Tensor:
    return make(shape, dtype=torch.float64).to(dtype)


def unaligned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    numel = torch.Size(shape).numel()
    return dense((numel + 1,), dtype)[1:].view(shape)


def _layouts() -> dict[str, Callable[[torch.dtype], list[Tensor]]]:
    return {
        "contiguous": lambda d: [dense((6, 5), d), dense((4, 3, 3, 2), d)],
        "transposed": lambda d: [dense((5, 6), d).t(), dense((2, 4, 3), d).permute(1, 2, 0)],
        "channels-last": lambda d: [dense((4, 3, 5, 2), d).to(memory_format=torch.channels_last)],
        "strided": lambda d: [dense((6, 10), d)[:, ::2], dense((12,), d)[::3]],
        # With pieces of some 16 elements and batches of 40, as in `small_pieces`:
        "pieces": lambda d: [dense((8, 11), d), dense((11, 8), d).t(), dense((34, 2), d)[:, :1], dense((4, 16), d)],
        "complex": lambda d: [
            torch.complex(dense((4, 3), d), dense((4, 3), d)),
            torch.complex(dense((2, 2, 2), d), dense((2, 2, 2), d)),
        ],
    }


LAYOUTS = _layouts()


def make_params(layout: str, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, torch.nn.Parameter]:
    """The layout's tensors, and those every fixture holds: dead, empty, 0-dim, zero, still and unaligned ones."""
    tensors = {f"{layout}{i}": t for i, t in enumerate(LAYOUTS[layout](dtype))}
    tensors |= {
        "dead": dense((2,), dtype),
        "empty": dense((0, 3), dtype),
        "zero": dense((4, 2), dtype, torch.zeros),
        "unaligned": unaligned((2, 17), dtype),
        "late": dense((6,), dtype),  # its first gradient comes at step 4
    }
    if options.get("eps") != 0:  # without eps, gradients of 0 are 0/0
        tensors["still"] = dense((4,), dtype)
    if options.get("blocks", 1) == 1:  # blocks cut dim 0, which a 0-dim tensor does not have
        tensors["scalar"] = dense((), dtype)
    return {name: torch.nn.Parameter(t) for name, t in tensors.items()}


def set_grads(params: dict[str, torch.nn.Parameter], step: int) -> None:
    """Random gradients of very different sizes; from step 8 on, in another layout than the parameter's."""
    for i, (name, p) in enumerate(params.items()):
        if name == "dead" or (name == "late" and step < 4):
            continue
        scale = 0.0 if name == "still" else 10.0 ** (i % 4 - 2)
        grad = (torch.randn(p.shape, dtype=torch.promote_types(p.dtype, torch.float64)) * scale).to(p.dtype)
        like = torch.empty_like(p) if step < 8 else torch.empty(p.shape, dtype=p.dtype)
        p.grad = like.copy_(grad)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walk small tensors as large ones are walked."""
    monkeypatch.setattr("torchlamb.precision.PIECE_PER_THREAD", 16 // torch.get_num_threads() or 1)
    monkeypatch.setattr("torchlamb.backends.foreach.BATCH", 40)
    monkeypatch.setattr("torchlamb.bucket.SMALL", 20)


def interpret() -> None:
    """Step with the GPU's kernels on the CPU from now on, in this process."""
    from triton.runtime import interpreter

    # The language is patched once and stays so, instead of at each call of a function: twice as fast.
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)
    interpreter._LangPatchScope.restore = lambda _: None
    np.seterr(all="ignore")  # it computes in NumPy, which warns of 1 / 0
    gpu.kernels.load()
    backends.kernels_of = lambda _, dtypes: (gpu, fused.why_not(dtypes))


def use(monkeypatch: pytest.MonkeyPatch, case: BackendCase) -> None:
    """Step in the case's form."""
    if case.two_phase:
        in_two_phases(monkeypatch)
    monkeypatch.setattr(gpu, "ONE_LAUNCH", case.one_launch)


def in_two_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step everything as sharded parameters are stepped: accumulate, then apply."""
    monkeypatch.setattr("torchlamb.lamb.in_two_phases", lambda _: True)


def to_numpy(t: Tensor) -> np.ndarray:
    """A copy in float64, or complex128."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float64)).cpu().numpy().copy()
