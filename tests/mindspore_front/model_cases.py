"""Networks, data and models for the tests of `torchlamb.mindspore.Model`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlamb.mindspore import Callback, Model, nn

CLASSES = 3


def make_net(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, CLASSES))


def make_data(batches: int = 6, batch_size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Points labelled by the largest of their first three coordinates."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn((batches, batch_size, 4), generator=generator)
    return [(data, data[:, :CLASSES].argmax(dim=1)) for data in points]


class Autocast(torch.nn.Module):
    """A network that computes in low precision, as a user would write it."""

    def __init__(self, net: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            return self.net(x)


def make_model(seed: int = 0, dtype: torch.dtype | None = None, learning_rate: Any = 0.05, **keywords: Any) -> Model:
    net = make_net(seed) if dtype is None else Autocast(make_net(seed), dtype)
    further = keywords.pop("further", {})
    optimizer = nn.Lamb(nn.trainable_params(net), learning_rate, weight_decay=0.01, **further)
    return Model(net, nn.SoftmaxCrossEntropyWithLogits(sparse=True), optimizer, **keywords)


def params_of(model: Model) -> list[Tensor]:
    return [p.detach().clone() for p in model.network.parameters()]


def assert_same(first: Model, second: Model) -> None:
    assert all(torch.equal(p, q) for p, q in zip(params_of(first), params_of(second), strict=True))


def with_overflow(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The third of six batches is too large for the dtype's forward or backward pass."""
    data = make_data()
    data[2] = (torch.full((16, 4), 3e38 if dtype != torch.float16 else 3e5), data[2][1])
    return data


class WithLoss(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, data: Tensor, label: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(self.net(data), label)


def as_generator() -> Any:
    yield from make_data()


class Recorder(Callback):
    def __init__(self, stop_at: tuple[str, int] = ("", 0)) -> None:
        self.events, self.stop_at, self.losses = [], stop_at, []

    def _record(self, name: str, run_context: Any) -> None:
        state = run_context.original_args()
        self.events.append((name, state.cur_epoch_num, state.cur_step_num))
        if (name, state.cur_step_num) == self.stop_at:
            assert not run_context.get_stop_requested()
            run_context.request_stop()

    def begin(self, run_context: Any) -> None:
        self._record("begin", run_context)

    def epoch_begin(self, run_context: Any) -> None:
        self._record("epoch_begin", run_context)

    def step_begin(self, run_context: Any) -> None:
        self._record("step_begin", run_context)

    def step_end(self, run_context: Any) -> None:
        self.losses.append(run_context.original_args().net_outputs)
        self._record("step_end", run_context)

    def epoch_end(self, run_context: Any) -> None:
        self._record("epoch_end", run_context)

    def end(self, run_context: Any) -> None:
        self._record("end", run_context)


def share_of_zeros(outputs: Tensor, labels: Tensor) -> float:
    assert outputs.shape == (96, CLASSES)
    return (labels == 0).float().mean().item()
