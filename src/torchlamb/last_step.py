"""What is told of the last step: ratios and norms by parameter, and which steps left parameters as they were.

It is kept on the device; nothing is read back until somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.backends import Work
from torchlamb.bucket import Bucket
from torchlamb.guard import Record
from torchlamb.rule import Scalars


class LastStep:
    """An object of its own: what a compiled step assigns to an optimizer itself is lost."""

    # Of each bucket: indices, scalars, sq_norms (rows, 2), skip and is_guarded.
    buckets: Sequence[tuple[list[int], Scalars, Tensor, Tensor | None, bool]] = ()
    record: Record | None = None  # where steps can be skipped

    def begin(self, work: Work, sq_norms: Sequence[Tensor]) -> None:
        """Note what a step is about to fill."""
        buckets: Sequence[Bucket] = [bucket for _, bucket in work]
        self.buckets = [(b.indices, b.scalars, rows, b.skip, b.is_guarded) for b, rows in zip(buckets, sq_norms, strict=True)]

    def by_parameter(self, rows_of: Callable[[Scalars, Tensor], Tensor]) -> dict[int, Tensor]:
        """Return what follows from the sums of squares (rows, 2), by position: NaN where the step was skipped."""
        found: dict[int, list[Tensor]] = {}
        for indices, scalars, sq_norms, skip, guarded in self.buckets:
            rows = rows_of(scalars, sq_norms)
            left = rule.leaves(sq_norms) if guarded else None
            for skipped in (left, skip):
                if skipped is not None:
                    rows = torch.where(skipped if rows.dim() == skipped.dim() else skipped.unsqueeze(-1), torch.nan, rows)
            for index, row in zip(indices, rows.unbind(), strict=True):
                found.setdefault(index, []).append(row)
        return {index: rows[0] if len(rows) == 1 else torch.stack(rows) for index, rows in sorted(found.items())}

    def nonfinite(self) -> list[int]:
        """Return the positions of the parameters because of which the last step that was skipped was. Reads from the device."""
        return [] if self.record is None else self.record.nonfinite.nonzero().flatten().tolist()

    def keep_record(self, skipped: Tensor, count: int) -> None:
        """Go on with the record of skipped steps, or begin one.

        Args:
            skipped: 0-dim int64, how many steps were skipped: the tensor that the state has
            count: of parameters
        """
        old = self.record
        if old is not None and old.skipped is skipped and len(old.nonfinite) == count:
            return
        nonfinite = torch.zeros(count, dtype=torch.bool, device=skipped.device)
        if old is not None and len(old.nonfinite) < count:  # parameters were added, or else their positions have changed
            nonfinite[: len(old.nonfinite)] = old.nonfinite
        self.record = Record(skipped, nonfinite)
