"""The loss of the document's example."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchlamb.options import fail, flag


class SoftmaxCrossEntropyWithLogits(nn.Module):
    r"""Cross entropy between the softmax of logits and labels.

    .. math::
        \ell_i = -\sum_c y_{ic} \log \frac{e^{x_{ic}}}{\sum_k e^{x_{ik}}}

    Args:
        sparse: labels are class indices (N,) instead of one-hot rows (N, C) (default: False)
        reduction: 'none' for one loss per sample (N,), 'mean' or 'sum' over them (default: 'none')

    Raises:
        TypeError: `sparse` is no bool
        ValueError: another `reduction`

    Example:
        >>> import torch
        >>> from torchlamb.mindspore import nn
        >>> loss = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")
        >>> loss(torch.zeros(3, 10), torch.tensor([1, 2, 3]))
        tensor(2.3026)

    Source: `mindspore.nn.SoftmaxCrossEntropyWithLogits`.
    """

    def __init__(self, sparse: bool = False, reduction: str = "none") -> None:
        super().__init__()
        if reduction not in ("none", "mean", "sum"):
            raise fail(ValueError, "reduction", "'none', 'mean' or 'sum'", reduction)
        self.sparse = flag("sparse", sparse)
        self.reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits (N, C) and labels (N, C), or (N,) of an integer dtype if `sparse`.

        Raises:
            TypeError: class indices of another dtype
            ValueError: shapes that do not fit
        """
        if logits.dim() != 2:
            raise ValueError(f"logits must have shape (N, C), got {tuple(logits.shape)}")
        wanted = logits.shape[:1] if self.sparse else logits.shape
        if labels.shape != wanted:
            hint = "are labels class indices? then set sparse=True" if not self.sparse else "sparse=False takes one-hot labels"
            raise ValueError(f"labels must have shape {tuple(wanted)}, got {tuple(labels.shape)}; {hint}")
        # In float32 at least: a sum of float16 losses overflows.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self.sparse:
            return cross_entropy(logits, labels.to(logits.dtype), reduction=self.reduction)
        if labels.is_floating_point() or labels.is_complex():
            raise fail(TypeError, "labels", "of an integer dtype with sparse=True", labels.dtype)
        # torch would pass over labels of -100 in silence; no label is this one.
        return cross_entropy(logits, labels.long(), reduction=self.reduction, ignore_index=-(2**63))
