"""What a backend is, and which one a bucket gets.

A backend is a module that does the arithmetic of `torchlamb.rule` on a `Bucket`. Policy (clipping, skipping, which parameters
step) stays above it: a backend only reads `bucket.grad_factor` and `bucket.skip`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torchlamb.backends import cpu, foreach, gpu, single
from torchlamb.bucket import SMALL, Bucket
from torchlamb.gate import NEGATIVE


class Backend(Protocol):
    """The functions of a backend module. `sums` is (rows, SUMS), as in `torchlamb.rule`."""

    __name__: str

    def grad_sq_norms(self, bucket: Bucket, out: Tensor) -> None:
        """Write the sum of squares of each row's gradient, before `grad_factor`, to `out` (rows,)."""

    def accumulate(self, bucket: Bucket, sums: Tensor) -> None:
        """Count the step, update the moments in place and write the sums."""

    def apply(self, bucket: Bucket, sums: Tensor) -> None:
        """Recompute the update from the stored moments and take ``lr * ratio * update`` from the parameters."""

    def step(self, bucket: Bucket, sums: Tensor) -> None:
        """Do `accumulate` and `apply` at once, for a bucket whose sums need no reduction between the two.

        That is where a backend can keep what it has in cache.
        """


Work = list[tuple[Backend, Bucket]]  # what one step() has to do


def prepare(devices: Iterable[torch.device]) -> None:
    """Load what backends need on these devices, before the first step and outside anything that is compiled."""
    cpu.library.load()
    for device in devices:
        kernels_of(device, [])


def kernels_of(device: torch.device, dtypes: Sequence[torch.dtype]) -> tuple[Backend, str | None]:
    """Return the device's own kernels, and why they cannot be had for these dtypes, if they cannot."""
    if device.type == "cpu":
        return cpu, cpu.why_not(dtypes)
    return gpu, gpu.why_not(device, dtypes)


def counts_on_device(group: Mapping[str, Any], device: torch.device) -> bool:
    """Return whether the group's steps on that device are counted by kernels, which are not the host's."""
    if device.type == "cpu" or group["fused"] is False or group["foreach"] is not None or group["differentiable"]:
        return False
    return kernels_of(device, [])[1] is None


def resolve(
    group: dict[str, Any], device: torch.device, dtypes: Sequence[torch.dtype], small: bool, refused: str | None = None
) -> tuple[Backend, str]:
    """Return the backend for a group's small or large parameters on a device, and why it was chosen.

    Args:
        group: with the options foreach, fused and differentiable
        device: of the parameters
        dtypes: of the real parameters, and of their gradients and moments where there are any yet
        small: whether none has more than `SMALL` elements
        refused: why kernels cannot have the tensors for what they are

    Raises:
        RuntimeError: fused=True or foreach=True cannot be honoured
    """
    if group["differentiable"]:
        return single, "differentiable=True: autograd has to see every operation"
    if group["foreach"] is not None:
        if group["foreach"] and refused == NEGATIVE:
            raise RuntimeError(f"foreach=True: torch has no such operations on a parameter if {refused}, or leave foreach=None")
        return foreach if group["foreach"] else single, f"foreach={group['foreach']} was asked for"
    kernels, why_not = kernels_of(device, dtypes)
    why_not = why_not or refused
    if group["fused"] is not False and why_not is None:
        asked = "was asked for" if group["fused"] else "kernels for this device"
        how = f", with {cpu.library.isa} instructions" if kernels is cpu else ", in Triton"
        return kernels, f"fused={group['fused']}: {asked}{how}"
    if group["fused"]:
        raise RuntimeError(f"fused=True: no kernels, {why_not}; leave fused=None, or set foreach=True")
    if refused is not None:
        return single, f"no kernels, {refused}; one tensor after the other, as torch's own optimizers do then"
    instead = "fused=False was asked for" if group["fused"] is False else f"no kernels, {why_not}"
    if device.type == "cpu" and small:
        return foreach, f"{instead}; on a CPU, tensors of up to {SMALL:,} elements were measured faster many in one call"
    if device.type == "cpu":
        return single, f"{instead}; on a CPU, tensors of over {SMALL:,} elements were measured faster in cache-sized pieces"
    return foreach, f"{instead}; many tensors in one call, not measured on {device.type}"
