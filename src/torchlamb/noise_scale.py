"""How large a batch is worth it: the gradient noise scale, measured while training.

It reads gradients and changes nothing. Norms of sharded gradients are added over their processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchlamb import rule
from torchlamb.precision import pieces
from torchlamb.sharding.sums import local_grads, mean_over, total_over_shards


class NoiseScale:
    r"""Estimates the simple noise scale tr(S) / \|G\|^2 from gradients over batches of two sizes.

    G is the gradient over all data and S the covariance of the gradient of one sample. A batch much smaller than this number
    has gradients that are mostly noise, and steps as far with twice the samples take half as many steps; beyond it, larger
    batches save few steps. For a gradient over b samples, the expectation of its squared norm is \|G\|^2 + tr(S) / b; so from
    squared norms at b and B, both terms have estimators without bias:

    .. math::
        \|G\|^2 &\approx (B |g_B|^2 - b |g_b|^2) / (B - b) \\
        \mathrm{tr}(S) &\approx (|g_b|^2 - |g_B|^2) / (1/b - 1/B)

    Each is averaged over steps, and the ratio is taken of the averages: that of single steps would be biased, and is often
    negative.

    Feed it while micro-batches accumulate: :meth:`micro_batch` after the first `backward` of a step, and :meth:`step` before
    `optimizer.step()`. Each costs one pass over the gradients, and no memory; nothing is read back from the device. Or give
    :meth:`update` squared norms of your own.

    Args:
        params: whose gradients are measured: the model's parameters. Of sharded ones the norms are those of whole gradients.
        decay: of the running averages, in [0, 1): each step's weight is 1 - decay (default: 0.95)
        process_group: of the processes whose gradients differ when :meth:`micro_batch` is called, as under DDP's `no_sync`:
            their squared norms are averaged, and all of them must call it (default: None)

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of range, or no parameters

    Example:
        >>> import torch, torchlamb
        >>> model = torch.nn.Linear(4, 1)
        >>> noise_scale = torchlamb.noise_scale.NoiseScale(model.parameters())
        >>> inputs = torch.randn(64, 4)
        >>> for i, micro_batch in enumerate(inputs.split(16)):
        ...     (model(micro_batch).square().sum() / 64).backward()
        ...     if i == 0:
        ...         noise_scale.micro_batch(samples=16, of=64)
        >>> noise_scale.step(samples=64)
        >>> noise_scale.count
        1

    Source: McCandlish et al., An Empirical Model of Large-Batch Training, arXiv 1812.06162, section 2.2 and appendix A.1.
    """

    def __init__(self, params: Iterable[Tensor], decay: float = 0.95, process_group: Any = None) -> None:
        if isinstance(params, (Tensor, nn.Module)):
            raise TypeError(f"params must be an iterable of parameters, got a {type(params).__name__}; give model.parameters()")
        self._params = list(params)
        if not self._params:
            raise ValueError("params is empty; give those of the model")
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise TypeError(f"decay must be a number in [0, 1), got {decay!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be a number in [0, 1), got {decay!r}")
        self._decay, self._process_group = decay, process_group
        self._small: tuple[Tensor, int] | None = None  # squared norm and samples of this step's micro-batch
        self._averages = torch.zeros(4, dtype=torch.float64)  # updates, their weight, noise, signal; on the gradients' device

    def micro_batch(self, samples: int, of: int) -> None:
        """Measure a step's first micro-batch: call this once, when its gradients are there and no others.

        Args:
            samples: how many they are of: on this process, and where gradients are reduced already, on all
            of: what the sum of the samples' gradients was divided by: the batch size, where each micro-batch's mean loss is
                divided by the number of them

        Raises:
            TypeError, ValueError: an argument is no whole number >= 1
            RuntimeError: no parameter has a gradient, or this step's micro-batch was measured before
        """
        _check_samples("samples", samples)
        _check_samples("of", of)
        if self._small is not None:
            raise RuntimeError("micro_batch() was called twice in a step; call it after the first backward only")
        sq_norm = self._sq_norm() * (of / samples) ** 2
        self._small = (sq_norm if self._process_group is None else mean_over(sq_norm, self._process_group)), samples

    def step(self, samples: int) -> None:
        """Measure the gradients of the whole batch, averaged over its samples, and update the averages.

        Args:
            samples: the batch size, over all processes

        Raises:
            TypeError, ValueError: it is no whole number larger than the micro-batch
            RuntimeError: :meth:`micro_batch` was not called, or no parameter has a gradient
        """
        if self._small is None:
            raise RuntimeError("step() was called without micro_batch(); call that after the first backward of the step")
        sq_norm, small = self._small
        self.update(sq_norm, small, self._sq_norm(), samples)
        self._small = None

    def update(self, small_sq_norm: Tensor | float, small: int, large_sq_norm: Tensor | float, large: int) -> None:
        """Update the averages with squared norms of mean gradients over batches of two sizes.

        What is not finite is passed over.

        Args:
            small_sq_norm: 0-dim, over `small` samples; best the mean of several such norms
            small: samples, >= 1
            large_sq_norm: 0-dim, over `large` samples
            large: samples, more than `small`

        Raises:
            TypeError, ValueError: a number of samples is out of range
        """
        _check_samples("small", small)
        _check_samples("large", large)
        if large <= small:
            raise ValueError(f"large must be more samples than small, got {large} and {small}; accumulate micro-batches")
        squares = [torch.as_tensor(s, dtype=torch.float64) for s in (small_sq_norm, large_sq_norm)]
        noise = (squares[0] - squares[1]) / (1 / small - 1 / large)
        signal = (large * squares[1] - small * squares[0]) / (large - small)
        old = self._averages = self._averages.to(noise.device)
        one = torch.ones_like(noise)
        new = torch.stack([old[0] + 1, *(old[1:] + (1 - self._decay) * (torch.stack([one, noise, signal]) - old[1:]))])
        self._averages = torch.where(torch.isfinite(new).all(), new, old)

    @property
    def count(self) -> int:
        """How many updates the averages have. Reads from the device, as the next three do."""
        return int(self._averages[0])

    @property
    def noise(self) -> float:
        """The average of tr(S), the variance of one sample's gradient; NaN before the first update."""
        return self._average(2)

    @property
    def signal(self) -> float:
        r"""The average of \|G\|^2; NaN before the first update. Estimates scatter around it, below 0 too."""
        return self._average(3)

    @property
    def value(self) -> float:
        """The noise scale in samples; NaN while `noise` and `signal` are not both above 0, as it may be after few updates."""
        noise, signal = self.noise, self.signal
        return noise / signal if noise > 0 and signal > 0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, as plain numbers."""
        return {"averages": self._averages.tolist()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict()` returned.

        Raises:
            ValueError: it is of something else; nothing has changed then
        """
        averages = state_dict.get("averages")
        if not isinstance(averages, list) or len(averages) != 4:
            raise ValueError(f"state_dict must be what state_dict() returned, got keys {sorted(state_dict)}")
        self._averages = torch.tensor(averages, dtype=torch.float64, device=self._averages.device)
        self._small = None

    def _average(self, index: int) -> float:
        _, weight, *_ = averages = self._averages.tolist()
        return float(averages[index] / weight) if weight > 0 else math.nan

    def _sq_norm(self) -> Tensor:
        """Return the squared norm over all gradients, in float64: the estimates are differences of such."""
        with_grad = [p for p in self._params if p.grad is not None]
        if not with_grad:
            raise RuntimeError("no parameter has a gradient; call backward() first, and zero_grad() only after the step")
        grads = iter(local_grads(with_grad, [p.grad for p in with_grad if p.grad is not None]))
        device = with_grad[0].device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return total_over_shards([(p, zero if p.grad is None else _squares(next(grads)).to(device)) for p in self._params])


def _squares(grad: Tensor) -> Tensor:
    grad = torch.view_as_real(grad) if grad.is_complex() else grad
    return rule.sum_of_squares([piece.float() if piece.dtype.itemsize < 4 else piece for (piece,) in pieces(grad)]).double()


def _check_samples(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
