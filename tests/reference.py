"""The LAMB rule in float64 NumPy, from the paper (arXiv 1904.00962, algorithm 2) and the documented options.

It shares no code with the library and knows no torch: the tests compare with this, never with ourselves.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tolerances

Array = np.ndarray[Any, Any]
Store = Callable[[str, int, int, Array], Array]


class Reference:
    """Real and complex arrays, stepped one by one. `options` holds, per parameter, the keyword arguments of `Lamb`.

    `store(name, i, t, array)` returns what is stored of parameter i's "param", "exp_avg" or "exp_avg_sq" at its step t.
    """

    def __init__(self, params: list[Array], options: list[dict[str, Any]], store: Store = lambda *args: args[-1]) -> None:
        self.params = [_real(p) for p in params]
        self.options = options
        self.store = store
        self.step_counts = [0] * len(params)
        self.exp_avgs, self.exp_avg_sqs = ([np.zeros_like(p) for p in self.params] for _ in range(2))
        # What tolerances.py is about: moments and steps as if nothing cancelled in them, and sums of |w|.
        self.uncancelled, self.uncancelled_sq = ([np.zeros_like(p) for p in self.params] for _ in range(2))
        self.blurs = [np.zeros_like(p) for p in self.params]  # of the last step
        self.paths, self.walked = ([np.zeros_like(p) for p in self.params] for _ in range(2))  # of all steps
        self.ratios: list[list[tuple[float, float]]] = [[] for _ in params]  # per block: ratio, how much cancels in it

    def step(self, grads: list[Array | None]) -> bool:
        """Return whether the step was taken."""
        guard = self.options[0]
        grad_sq = sum(float(np.square(_real(g)).sum()) for g in grads if g is not None)
        clip = 1.0
        if guard["max_grad_norm"] is not None or guard["skip_nonfinite"]:
            if not grad_sq <= np.finfo(np.float32).max:
                return False
            if guard["max_grad_norm"] is not None and grad_sq > 0:
                clip = min(1.0, guard["max_grad_norm"] / grad_sq**0.5)
        for i, grad in enumerate(grads):
            if grad is not None:
                self._step_one(i, grad, clip)
        return True

    def _step_one(self, i: int, grad: Array, clip: float) -> None:
        o = self.options[i]
        g = _real(grad) * clip * (-1.0 if o["maximize"] else 1.0)
        size = np.abs(g)  # of its terms
        if o["grad_centralization"] and grad.ndim >= 3:
            rows = tuple(range(1, grad.ndim))
            size = size + size.mean(axis=rows, keepdims=True) if grad[:1].size > 1 else size
            g = g - g.mean(axis=rows, keepdims=True)
        (beta1, beta2), t, w = o["betas"], self.step_counts[i] + 1, self.params[i]
        beta3 = (1 - beta1) if o["grad_averaging"] else 1.0
        m = beta1 * self.exp_avgs[i] + beta3 * g
        v = beta2 * self.exp_avg_sqs[i] + (1 - beta2) * g**2
        self.uncancelled[i] = beta1 * self.uncancelled[i] + beta3 * size
        self.uncancelled_sq[i] = beta2 * self.uncancelled_sq[i] + (1 - beta2) * size**2
        m, v = self.store("exp_avg", i, t, m), self.store("exp_avg_sq", i, t, v)
        correction1, correction2 = (1 - beta1**t, 1 - beta2**t) if o["bias_correction"] else (1.0, 1.0)
        denom = np.sqrt(v / correction2) + o["eps"]
        u = m / correction1 / denom + o["weight_decay"] * w
        new, self.ratios[i] = w.copy(), []
        terms = tolerances.terms_of_update(self, i, v, correction1 * denom)
        for block in np.split(np.arange(len(w)), o["blocks"]) if o["blocks"] > 1 else [...]:
            ratio = _trust_ratio(np.sqrt(np.square(w[block]).sum()), np.sqrt(np.square(u[block]).sum()), o)
            new[block] = w[block] - o["lr"] * ratio * u[block]
            cancels = tolerances.cancellation(self, i, block, u, terms)
            self.blurs[i][block] = tolerances.blur(o["lr"] * ratio, u[block], terms[block], cancels)
            self.ratios[i].append((ratio, cancels))
        new = self.store("param", i, t, new)
        self.paths[i] = self.paths[i] + self.blurs[i]
        self.walked[i] = self.walked[i] + np.abs(w)
        self.params[i], self.exp_avgs[i], self.exp_avg_sqs[i], self.step_counts[i] = new, m, v, t


def _trust_ratio(param_norm: float, update_norm: float, o: dict[str, Any]) -> float:
    if param_norm == 0 or update_norm == 0 or not o["layer_adaptation"]:
        return 1.0
    ratio = np.clip(param_norm, *(o["phi_bounds"] or (0, np.inf))) / update_norm
    return float(np.clip(ratio, *(o["trust_ratio_bounds"] or (0, np.inf))))


def _real(a: Array) -> Array:
    a = np.array(a, dtype=np.complex128 if np.iscomplexobj(a) else np.float64)
    return np.stack([a.real, a.imag], axis=-1) if np.iscomplexobj(a) else a
