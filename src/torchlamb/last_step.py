"""What is told of the last step: ratios and norms by parameter, and which steps left parameters as they were.

It is kept on the device; nothing is read back until somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchlamb import rule
from torchlamb.bucket import Bucket
from torchlamb.guard import Verdict
from torchlamb.rule import Scalars
from torchlamb.sharding.sums import Rows


@dataclass
class Record:
    """What is remembered of the steps that left parameters as they were, on the device."""

    skipped: Tensor  # 0-dim int64: how many they are. The state of each parameter has it.
    nonfinite: Tensor  # (params,) bool: because of which parameters the last of them did
    places: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # positions of parameters, as tensors

    def place(self, indices: Sequence[int]) -> Tensor:
        """Return positions as a tensor, made once: a graph must not copy them from the host while it is captured."""
        if torch.compiler.is_compiling():
            return torch.tensor(indices, dtype=torch.int64, device=self.skipped.device)
        key = tuple(indices)
        if key not in self.places:
            place = torch.tensor(indices, dtype=torch.int64, device=self.skipped.device)
            if len(self.places) == 64:  # none is let go: graphs may read it
                return place
            self.places[key] = place
        return self.places[key]


class LastStep:
    """An object of its own: what a compiled step assigns to an optimizer itself is lost."""

    # Of each bucket: indices, scalars, sums (rows, SUMS), skip and is_guarded.
    buckets: Sequence[tuple[list[int], Scalars, Tensor, Tensor | None, bool]] = ()
    record: Record | None = None  # where steps can be skipped
    is_partial: bool = False  # it was one of several calls that together are a step

    def note_(self, buckets: Sequence[Bucket], sums: Sequence[Tensor], verdict: Verdict, over_processes: Rows) -> None:
        """Remember a step, and count it if it left parameters as they were.

        Args:
            buckets: of the step
            sums: of each (rows, SUMS), zeros where the host knows that the step was skipped
            verdict: on it
            over_processes: the positions of all sharded parameters' rows and their sums, if there are any
        """
        self.buckets = [(b.indices, b.scalars, rows, b.skip, b.is_guarded) for b, rows in zip(buckets, sums, strict=True)]
        if self.record is None or not (verdict.grad_sq_norms or verdict.skip is not None):
            return
        own = [(b.indices, rows) for b, rows in zip(buckets, sums, strict=True) if not b.process_groups]
        matter = bool(verdict.grad_sq_norms) and not verdict.skipped
        _count_(self.record, verdict, [*own, *over_processes] if matter else ())

    def ratios(self) -> dict[int, Tensor]:
        """Return the ratio of each parameter, by position: 0-dim, or (parts,); NaN where the step was skipped."""
        return self._by_parameter(lambda scalars, sums: rule.trust_ratio(sums, scalars))

    def norms(self) -> dict[int, Tensor]:
        """Return the norms of each parameter and of its update, by position: (2,), or (parts, 2); NaN as in `ratios`."""
        return self._by_parameter(lambda _, sums: rule.norms(sums))

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

    def _by_parameter(self, rows_of: Callable[[Scalars, Tensor], Tensor]) -> dict[int, Tensor]:
        found: dict[int, list[Tensor]] = {}
        for indices, scalars, sums, skip, guarded in self.buckets:
            rows = rows_of(scalars, sums)
            left = rule.leaves(sums) if guarded else None
            for skipped in (left, skip):
                if skipped is not None:
                    rows = torch.where(skipped if rows.dim() == skipped.dim() else skipped.unsqueeze(-1), torch.nan, rows)
            for index, row in zip(indices, rows.unbind(), strict=True):
                found.setdefault(index, []).append(row)
        return {index: rows[0] if len(rows) == 1 else torch.stack(rows) for index, rows in sorted(found.items())}


def _count_(record: Record, verdict: Verdict, sums: Rows) -> None:
    """Count a step that left parameters as they were, and remember because of which.

    Args:
        record: changed in place
        verdict: on the step
        sums: (rows, SUMS), in the order of `verdict.grad_sq_norms`; none where those do not matter
    """
    device, skip = record.skipped.device, verdict.skip
    by_update = torch.cat([rule.leaves(rows).to(device) for _, rows in sums]) if sums else None
    if skip is None:
        if by_update is None or not bool(by_update.any()):
            return
        left, because = by_update.any(), by_update
    else:
        left = skip.to(device)
        because = _of_gradients(verdict, device)
        if by_update is not None:
            because = torch.where(left, because, by_update)
            left = left | by_update.any()
    indices = [index for rows, _ in verdict.grad_sq_norms for index in rows]
    counts = torch.zeros(record.nonfinite.shape, dtype=torch.int32, device=device)
    counts.index_add_(0, record.place(indices), because.to(torch.int32))
    record.nonfinite.copy_(torch.where(left, counts > 0, record.nonfinite))
    record.skipped.add_(left)


def _of_gradients(verdict: Verdict, device: torch.device) -> Tensor:
    """Return of which rows the gradient is to blame: it is not finite itself, or it is the largest of a total that is not."""
    rows = torch.cat([rows.to(device).float() for _, rows in verdict.grad_sq_norms]) if verdict.grad_sq_norms else None
    if rows is None or verdict.overflows is None or len(rows) == 0:
        return torch.zeros(0 if rows is None else len(rows), dtype=torch.bool, device=device)
    nonfinite = ~torch.isfinite(rows)
    large = rows >= rows.max().clamp(max=torch.finfo(torch.float32).max / len(rows))
    return torch.where(nonfinite.any(), nonfinite, large & verdict.overflows.to(device))
