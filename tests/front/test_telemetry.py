"""What is recorded is what was computed, and the steps between are not held up."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cases import BACKEND_PARAMS, use
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchlamb
from torchlamb.telemetry import Telemetry, plot, read


def make_run(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    return net, torchlamb.Lamb(net.named_parameters(), lr=0.01, weight_decay=0.1, **options)


def take_step(net, optimizer, scale=1.0):
    optimizer.zero_grad()
    (net(torch.ones(8, 4)).square().mean() * scale).backward()
    optimizer.step()


@pytest.mark.parametrize("case", BACKEND_PARAMS)
def test_norms(case, monkeypatch):
    """Held to the rule in float64, from the parameter before the step and the moments after it."""
    use(monkeypatch, case)
    net, optimizer = make_run(**case.options)
    for step in range(1, 4):
        before = {name: p.detach().double() for name, p in net.named_parameters()}
        take_step(net, optimizer)
        norms, ratios = optimizer.norms(), optimizer.trust_ratios()
        assert list(norms) == list(ratios) == list(before)
        for name, p in net.named_parameters():
            state = {key: optimizer.state[p][key].double() for key in ("exp_avg", "exp_avg_sq")}
            m, v = state["exp_avg"] / (1 - 0.9**step), state["exp_avg_sq"] / (1 - 0.999**step)
            update = m / (v.sqrt() + 1e-6) + 0.1 * before[name]
            wanted = torch.stack([before[name].norm(), update.norm()])
            torch.testing.assert_close(norms[name].double(), wanted, rtol=1e-5, atol=0)
            if wanted[0] > 0:
                torch.testing.assert_close(ratios[name].double(), wanted[0] / wanted[1], rtol=1e-5, atol=0)


def test_norms_of_blocks_and_of_skipped_steps():
    net = nn.Linear(4, 6, bias=False)
    optimizer = torchlamb.Lamb(net.named_parameters(), blocks=3, skip_nonfinite=True)
    before = net.weight.detach().clone()
    take_step(net, optimizer)
    norms = optimizer.norms()["weight"]
    assert norms.shape == (3, 2)
    torch.testing.assert_close(norms[:, 0], before.reshape(3, -1).norm(dim=1))
    take_step(net, optimizer, math.nan)
    assert optimizer.norms()["weight"].isnan().all()


def test_rows(tmp_path):
    net, optimizer = make_run()
    telemetry = Telemetry(optimizer, tmp_path / "run.jsonl", every=3)
    for step in range(1, 10):
        take_step(net, optimizer)
        telemetry.step()
        if step == 6:
            ratios, norms = optimizer.trust_ratios(), optimizer.norms()
    rows = read(tmp_path / "run.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 9]
    assert rows[1]["layers"].keys() == ratios.keys()
    for name, numbers in rows[1]["layers"].items():
        assert numbers["trust_ratio"] == pytest.approx(float(ratios[name]), rel=1e-6)
        assert [numbers["param_norm"], numbers["update_norm"]] == pytest.approx(norms[name].tolist(), rel=1e-6)


def test_skipped_steps_blocks_and_positions(tmp_path):
    net = nn.Linear(4, 6, bias=False)
    optimizer = torchlamb.Lamb(net.parameters(), blocks=2, skip_nonfinite=True)
    telemetry = Telemetry(optimizer, str(tmp_path / "run.jsonl"), every=1)
    for scale in (1.0, math.nan, 1.0):
        take_step(net, optimizer, scale)
        telemetry.step()
    rows = read(tmp_path / "run.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]
    assert rows[1]["layers"]["0"] == {"trust_ratio": [None] * 2, "param_norm": [None] * 2, "update_norm": [None] * 2}
    assert len(rows[2]["layers"]["0"]["trust_ratio"]) == 2
    text = (tmp_path / "run.jsonl").read_text()
    assert "NaN" not in text
    assert all(json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device: numbers that are read from it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 20])
def test_what_is_read_from_the_device(layers, tmp_path, monkeypatch):
    """Nothing between recorded steps, and one tensor for all layers at a recorded one."""
    lists, tolist = [], torch.Tensor.tolist
    params = [(f"p{i}", nn.Parameter(torch.ones(3))) for i in range(layers)]
    for _, p in params:
        p.grad = torch.ones(3)
    optimizer = torchlamb.Lamb(params, capturable=True, foreach=True)
    telemetry = Telemetry(optimizer, tmp_path / "run.jsonl", every=4)
    for _ in range(3):
        optimizer.step()
        with Reads() as reads:
            telemetry.step()
        assert reads.count == 0

    def counting(t):
        lists.append(t.numel())
        with torch._C.DisableTorchFunction():  # or the mode that sets a default device calls this again
            return tolist(t)

    monkeypatch.setattr(torch.Tensor, "tolist", counting)
    for _ in range(5):
        optimizer.step()
        telemetry.step()
    assert lists == [1 + 3 * layers] * 2


class FakeWriter:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, global_step):
        self.scalars[tag, global_step] = value


def test_writers():
    net, optimizer = make_run(skip_nonfinite=True)
    writer = FakeWriter()
    telemetry = Telemetry(optimizer, writer, every=2, start=10)
    for scale in (1.0, 1.0, 1.0, math.nan):
        take_step(net, optimizer, scale)
        telemetry.step()
        if scale == 1.0:
            ratio = float(optimizer.trust_ratios()["0.weight"])
            writer.scalars.setdefault(("seen", telemetry._count), ratio)
    assert writer.scalars["trust_ratio/0.weight", 12] == pytest.approx(writer.scalars["seen", 12], rel=1e-6)
    assert writer.scalars["skipped_steps", 14] == 1
    assert ("param_norm/0.weight", 14) not in writer.scalars  # that step was skipped
    assert len([tag for tag, step in writer.scalars if step == 12]) == 1 + 1 + 3 * 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    net, optimizer = make_run()
    with SummaryWriter(tmp_path) as writer:
        telemetry = Telemetry(optimizer, writer, every=1)
        take_step(net, optimizer)
        telemetry.step()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("trust_ratio/2.weight")
    assert (event.step, event.value) == (1, pytest.approx(float(optimizer.trust_ratios()["2.weight"]), rel=1e-6))


def test_nothing_where_there_is_nowhere_to_write(monkeypatch):
    net, optimizer = make_run()
    monkeypatch.setattr(torchlamb.Lamb, "trust_ratios", pytest.fail)
    telemetry = Telemetry(optimizer, None, every=1)
    take_step(net, optimizer)
    telemetry.step()


def test_a_resumed_run_and_a_crash(tmp_path):
    path = tmp_path / "run.jsonl"
    net, optimizer = make_run()
    for start in (0, 2):
        telemetry = Telemetry(optimizer, path, every=1, start=start)
        for _ in range(4):
            take_step(net, optimizer)
            telemetry.step()
        if start == 0:
            with path.open("ab") as file:
                file.write(b'{"step": 5, "skip')  # the crash
    assert len(path.read_text().splitlines()) == 9
    with pytest.warns(UserWarning, match="line 5 of .*run.jsonl is cut off"):
        rows = read(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    ratio = rows[-1]["layers"]["0.weight"]["trust_ratio"]
    assert ratio == pytest.approx(float(optimizer.trust_ratios()["0.weight"]), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"to": 3}, TypeError, "to must be a path, an object with add_scalar, or None, got a int"),
        ({"every": 0}, ValueError, "every must be an int >= 1, got 0"),
        ({"every": 1.5}, TypeError, "every must be an int >= 1, got 1.5"),
        ({"start": -1}, ValueError, "start must be an int >= 0, got -1"),
        ({"to": "no/such/folder/run.jsonl"}, OSError, "no/such/folder"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, TypeError, "must be a torchlamb.Lamb, got a SGD"),
    ],
)
def test_arguments(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Telemetry(**{"optimizer": make_run()[1], "to": None, **arguments})


def test_what_is_no_record(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is no row of Telemetry"):
        read(tmp_path / "other.jsonl")
    for text in ("lr: 0.1\nmomentum: 0.9\n", '{"step": null, "skipped_steps": 0, "layers": {}}\n', "\x89PNG\n"):
        (tmp_path / "other.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"other\.jsonl (has no row of|is no row of) Telemetry"):
            read(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="rows have no trust ratio"):
        plot([], tmp_path / "plot.png")
    with pytest.raises(FileNotFoundError):
        plot(tmp_path / "missing.jsonl", tmp_path / "plot.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.jsonl"]


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_pictures(kind, tmp_path):
    ratio = {"trust_ratio": 0.5}
    layers = {f"layer{i}": {"trust_ratio": 10.0 ** (i % 3)} for i in range(200)}
    rows = [{"step": 10 * i, "skipped_steps": 1, "layers": {**layers, "blocks": {"trust_ratio": [1.0, 2.0]}}} for i in range(5)]
    rows[3]["layers"] = {name: {"trust_ratio": None} for name in layers}
    plot(rows, tmp_path / f"plot.{kind}")
    assert (tmp_path / f"plot.{kind}").stat().st_size > 1000
    one = [{"step": 1, "skipped_steps": 0, "layers": {"only": ratio}}]
    plot(one, tmp_path / f"plot.{kind}")  # over the one that is there
    assert len(list(tmp_path.iterdir())) == 1


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path):
    (tmp_path / "plot.xyz").write_text("old")
    rows = [{"step": 1, "skipped_steps": 0, "layers": {"only": {"trust_ratio": 0.5}}}]
    with pytest.raises(ValueError, match="xyz"):
        plot(rows, tmp_path / "plot.xyz")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
