"""The norm over all gradients where processes hold different parameters: stages of a pipeline, experts, partitions by hand.

Nothing of an optimizer's parameters tells which those are, so somebody says it (`Lamb.norm_group`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchlamb.sharding.sums import Plan, Rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class NormGroup:
    """Processes over which the guard's norm and what it has found are added up.

    Where several of them hold one parameter, each counts its share of it. That is known of parameters that are sharded over
    processes of this group, and of those in `held_by`.
    """

    def __init__(self, process_group: ProcessGroup, held_by: Mapping[int, int]) -> None:
        """Keep what is known, parameters by the number of the object.

        Raises:
            TypeError: it is no process group that this process is in
        """
        if not isinstance(process_group, torch.distributed.ProcessGroup):
            kind = type(process_group).__name__
            raise TypeError(
                f"norm_group must be None or a ProcessGroup with this process, got {kind}; take a mesh's get_group()"
            )
        self.process_group = process_group
        self.held_by = dict(held_by)
        self._device_types = [device.type for device in getattr(process_group, "_device_types", ())]  # that it adds on
        self._plan: Plan | None = None  # that the shares were made for
        self._shares: list[float] = []  # of each parameter, by position
        self._weights: dict[tuple[int, ...], Tensor | None] = {}  # of rows, by the positions of their parameters

    def share_out(self, plan: Plan) -> None:
        """Find the share of each parameter that this process counts."""
        if plan is self._plan:
            return
        if not self.held_by.keys() <= {identity.number for identity in plan.identities}:
            raise ValueError("held_by names a parameter that is not, or no longer, in param_groups; set the norm group anew")
        ranks = frozenset(torch.distributed.get_process_group_ranks(self.process_group))
        self._shares = [
            1.0 / self.held_by.get(identity.number, len(layout.ranks & ranks) or 1)
            for identity, layout in zip(plan.identities, plan.layouts, strict=True)
        ]
        self._plan, self._weights = plan, {}

    def own_share(self, indices: Sequence[int], rows: Tensor) -> Tensor:
        """Return sums (rows,) of gradients, each times the share of it that this process counts."""
        key = tuple(indices)
        if key not in self._weights:
            shares = [self._shares[index] for index in indices]
            even = all(share == 1.0 for share in shares)
            self._weights[key] = None if even else torch.tensor(shares, dtype=rows.dtype, device=rows.device)
        weights = self._weights[key]
        return rows if weights is None else rows * weights

    def add(self, sq_norm: Tensor, found_inf: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the squared norm (0-dim) and the scaler's flag over all processes: one all-reduce."""
        device = sq_norm.device
        if self._device_types and device.type not in self._device_types:  # CPU-offloaded parameters, or none with a gradient
            device = torch.device(self._device_types[0])
        # One dtype on every process, whatever their parameters have.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        flag = torch.zeros((), device=sq_norm.device) if found_inf is None else found_inf.reshape(())
        packed = torch.stack([sq_norm.to(device, dtype), flag.to(device, dtype)])
        torch.distributed.all_reduce(packed, group=self.process_group)
        total, flag = packed.to(sq_norm.device).unbind()
        return total, None if found_inf is None else flag


def sum_of(sums: Rows, group: NormGroup | None) -> Tensor:
    """Return the total (0-dim) of sums of gradients, of which there are some, that this process counts in its norm group."""
    counted = (rows if group is None else group.own_share(indices, rows) for indices, rows in sums)
    total = next(counted).sum()
    for rows in counted:
        total = total + rows.sum().to(total.device)
    return total
