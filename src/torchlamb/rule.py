"""The LAMB rule, written once.

For one tensor ``w`` with gradient ``g`` at its own step ``t = 1, 2, ...`` (arXiv 1904.00962, algorithm 2):

    m      <- beta1 m + (1 - beta1) g
    v      <- beta2 v + (1 - beta2) g^2
    u       = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
    ratio   = phi(|w|) / |u|, and exactly 1 where |w| or |u| is 0
    w      <- w - lr ratio u

This room holds pure functions of tensors and numbers. It must not know of parameter groups, devices, sharding or optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# What is added up of every row, over the whole logical tensor, before its ratio is known: the columns of what is called `sums`,
# (..., SUMS). Squares, never norms that are squared again.
SUMS = ("param_sq", "update_sq")
PARAM_SQ, UPDATE_SQ = range(len(SUMS))


@dataclass(frozen=True)
class Scalars:
    """The numbers that one group of parameters steps with, as `torchlamb.Lamb` documents them."""

    lr: float | Tensor  # a tensor has one element and stays on its device
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    bias_correction: bool
    layer_adaptation: bool
    grad_averaging: bool
    grad_centralization: bool
    maximize: bool
    stochastic_rounding: bool
    phi_bounds: tuple[float, float] | None
    trust_ratio_bounds: tuple[float, float] | None

    @classmethod
    def from_group(cls, group: dict[str, Any]) -> Scalars:
        """Read them from a `param_groups` entry."""
        lr = group["lr"]
        return cls(
            lr=lr.reshape(()) if isinstance(lr, Tensor) else lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            bias_correction=group["bias_correction"],
            layer_adaptation=group["layer_adaptation"],
            grad_averaging=group["grad_averaging"],
            grad_centralization=group["grad_centralization"],
            maximize=group["maximize"],
            stochastic_rounding=group["stochastic_rounding"],
            phi_bounds=group["phi_bounds"],
            trust_ratio_bounds=group["trust_ratio_bounds"],
        )

    def on(self, device: torch.device) -> Scalars:
        """Return them with a tensor lr where a bucket of that device can use it. One on the CPU serves every device."""
        lr = self.lr
        if not isinstance(lr, Tensor) or lr.is_cpu or lr.device == device:
            return self
        return replace(self, lr=lr.to(device))


def advance_(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: Scalars) -> None:
    """Bring the first and second moment to the next step, in place. All tensors have one shape and dtype."""
    if s.grad_averaging:
        # m + (1 - beta1)(g - m), with 1 - beta1 from float64: `1 - 0.999` in float32 is off by 5e-5.
        exp_avg.lerp_(grad, 1 - s.beta1)
    else:
        exp_avg.mul_(s.beta1).add_(grad)
    exp_avg_sq.mul_(s.beta2).addcmul_(grad, grad, value=1 - s.beta2)


def bias_factors(step: float | Tensor, s: Scalars) -> tuple[float | Tensor, float | Tensor]:
    """Return ``(eps', k)`` with ``m_hat / (sqrt(v_hat) + eps) = k m / (sqrt(v) + eps')``.

    Folding both bias corrections into two numbers per parameter saves two passes over the moments. `step` is a number, or a
    tensor of them that stays on its device; the factors have its shape and dtype.
    """
    if not s.bias_correction:
        return s.eps, 1.0
    correction1, correction2 = _bias_correction(s.beta1, step), _bias_correction(s.beta2, step)
    root = correction2**0.5
    return s.eps * root, root / correction1


def update(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: Sequence[float | Tensor], s: Scalars) -> Tensor:
    """Return u: the bias-corrected Adam direction plus the decay. `factors` are those of `bias_factors`."""
    eps, k = factors
    direction = exp_avg / (root(exp_avg_sq) + eps)
    if s.bias_correction:
        direction.mul_(k)
    return direction.add_(param, alpha=s.weight_decay) if s.weight_decay else direction


def sum_of_squares(pieces: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares over all pieces of a tensor, 0-dim and in their dtype."""
    return total([piece.square().sum() for piece in pieces])


def total(parts: Sequence[Tensor]) -> Tensor:
    """Add the sums of a tensor's pieces, each 0-dim, pairwise as `torch.sum` has added each of them.

    That is right to 1e-7. `torch.linalg.vector_norm` on 31 M float32 elements of a CPU is off by 1.7e-3.
    """
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum()


def trust_ratio(sums: Tensor, s: Scalars) -> Tensor:
    """Return the ratio of each row.

    Args:
        sums: (..., SUMS), of which those of the parameter's and of its update's squares are read
        s: where `layer_adaptation`, `phi_bounds` and `trust_ratio_bounds` stand

    Returns:
        (...) the factor of ``lr * update``
    """
    sq_norms = _sq_norms(sums)
    if not s.layer_adaptation:
        return torch.ones_like(sq_norms[..., 0])
    undefined = (sq_norms == 0).any(dim=-1)
    # Where a norm is 0 its square root is taken of 1 instead: `where` alone would still pass 0/0 and an infinite gradient on.
    param_norm, update_norm = torch.where(undefined.unsqueeze(-1), 1.0, sq_norms).sqrt().unbind(dim=-1)
    phi = param_norm if s.phi_bounds is None else param_norm.clamp(*s.phi_bounds)
    ratio = phi / update_norm
    if s.trust_ratio_bounds is not None:
        ratio = ratio.clamp(*s.trust_ratio_bounds)
    return torch.where(undefined, 1.0, ratio)


def norms(sums: Tensor) -> Tensor:
    """Return (..., 2) the norms of each row's parameter and of its update, from `sums` (..., SUMS)."""
    return _sq_norms(sums).sqrt()


def leaves(sums: Tensor) -> Tensor:
    """Return (...) whether a guarded step leaves the parameter as it is: a norm of `sums` (..., SUMS) is not finite."""
    return ~torch.isfinite(_sq_norms(sums)).all(dim=-1)


def _sq_norms(sums: Tensor) -> Tensor:
    return sums[..., PARAM_SQ : UPDATE_SQ + 1]


def clip_coefficient(grad_sq_norm: Tensor, max_grad_norm: float) -> Tensor:
    """Return ``min(1, max_grad_norm / |all gradients|)`` from the squared norm; no epsilon is added."""
    return max_grad_norm / root(grad_sq_norm).clamp(min=max_grad_norm)


def centralize(grad: Tensor, dims: int) -> Tensor:
    """Return `grad` less its mean over every dim but the first (arXiv 2004.01461), for convolution weights.

    `dims` is the tensor's number of dims, not counting the last one of a complex tensor viewed as real pairs.
    """
    return grad - grad.mean(dim=tuple(range(1, dims)), keepdim=True)


def root(x: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0 instead of infinity, so that `differentiable` gives finite gradients."""
    if not torch.is_grad_enabled():
        return x.sqrt()
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def _bias_correction(beta: float, step: float | Tensor) -> Any:
    # 1 - beta^t as -expm1(t log beta): `1 - beta**t` in float32 is off by 2e-5 (beta .999) to 2e-4 (.9999).
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -torch.expm1(step * log_beta) if isinstance(step, Tensor) else -math.expm1(step * log_beta)
