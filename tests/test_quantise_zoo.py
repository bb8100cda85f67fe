"""The frozen model in 8 bits on models of every kind: each is exported, and every graph compared with torch, which the self-check does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import Backbone, Normaliser
from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.data import Samples, spec_for
from edgeadapt.exporters.export import ExportReport, export
from edgeadapt.exporters.methods import METHODS
from edgeadapt.exporters.options import Options
from edgeadapt.exporters.quantise import choose
from edgeadapt.progress import quiet
from tests.zoo import layers, named
from tests.zoo.calibrate import calibrate, noise


def exported(model: nn.Module, shape: tuple[int, ...], method: str, batch: int = 2, **choices: Any) -> ExportReport:
    """Without a file, after a look at some noise."""
    x = np.random.default_rng(0).standard_normal((12, *shape)).astype(np.float32)
    choices |= {"micro": "none"} if METHODS[method].trains else {}
    choices |= {"epochs": 0, "allow_drop": True, "parts": 2} if method == "ecotta" else {}
    data = Samples(x, None, spec_for(shape))
    return export(model, None, shape=shape, data=data, method=method, batches=(batch,), warmup_batch=4, quantize="int8", **choices)


def rows(report: ExportReport) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = report.manifest["quantisation"]["layers"]
    return found


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random networks on noise: nothing goes back to float32 for its error."""
    monkeypatch.setattr(choose, "LIMIT", 1e9)
    monkeypatch.setattr(choose, "DROP", 1.0)


class Squeezing(nn.Module):
    """Dense concatenation, depthwise with "same" padding, squeeze and excitation, h-swish, a shared convolution, a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False)
        self.norm, self.group = nn.BatchNorm2d(8), nn.GroupNorm(2, 16)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.weight = nn.Parameter(0.2 * torch.randn(8, 16, 1, 1))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.enter(x))
        y = nn.functional.relu6(self.norm(self.deep(x)))
        y = y * nn.functional.hardsigmoid(self.excite(nn.functional.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        z = nn.functional.gelu(self.group(torch.cat([x, y], 1)))
        z = self.shared(nn.functional.relu(self.shared(z))) + z
        z = nn.functional.silu(nn.functional.conv2d(z, self.weight))
        return self.head(z).mean((2, 3))


class Drawn(nn.Module):
    """The weights of one convolution are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.one(x))
        x = nn.functional.conv2d(x, self.two.weight / self.two.weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1), self.two.bias)
        return self.head(nn.functional.relu(x).mean((2, 3)))


def made(factory: Callable[[], nn.Module], shape: tuple[int, ...]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return calibrate(factory(), shape)


@pytest.mark.parametrize(("method", "batch"), [("ecotta", 1), ("side", 2)])
def test_blocks_of_every_kind(forced: None, method: str, batch: int) -> None:
    report = exported(made(Squeezing, (3, 12, 10)), (3, 12, 10), method, batch)
    (head,) = [row for row in rows(report) if row["layer"] == "head"]
    assert (head["choice"], head["why"]) == (("float", "side adapts what it reads") if method == "side" else ("int8", ""))
    choices = {row["layer"]: row["choice"] for row in rows(report) if row is not head}
    assert set(choices.values()) == {"int8"}
    assert {"enter", "deep", "squeeze", "excite", "shared"} <= set(choices)
    assert len(rows(report)) == 8  # the shared one is there twice


@pytest.mark.parametrize(("name", "count"), [("conv1d.same", 1), ("conv_transpose2d.strided", 1), ("conv2d.shared", 3)])
def test_layers_beside_convolutions_in_8_bits(forced: None, name: str, count: int) -> None:
    factory, shape = layers.LAYERS[name]
    found = rows(exported(factory(), shape, "source"))
    assert [row["choice"] for row in found].count("int8") == count


def test_statistics_that_move_may_be_the_methods_own_alone(forced: None) -> None:
    model = made(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)), (3, 8, 8))
    report = exported(model, (3, 8, 8), "ecotta")
    assert [row["choice"] for row in rows(report)] == ["int8", "int8"]


def test_weights_that_are_computed_stay_in_float32(forced: None) -> None:
    found = rows(exported(made(Drawn, (3, 8, 8)), (3, 8, 8), "source"))
    assert [(row["layer"], row["choice"]) for row in found] == [("one", "int8")]


def test_a_model_without_convolutions_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    with pytest.raises(ExportError, match="8 bits are for convolutions") as caught:
        exported(model, (6,), "norm")
    assert "leave quantize out" in str(caught.value)


def test_layers_that_are_all_too_far_off_stay_in_float32_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "LIMIT", 0.0)
    report = exported(named.sensor_net(length=32), (6, 32), "norm")
    assert {(row["choice"], row["why"]) for row in rows(report)} == {("float", "its error")}
    assert report.manifest["quantisation"]["accuracy"] == report.manifest["quantisation"]["float_accuracy"]


@pytest.mark.parametrize(("shape", "batch", "most"), [((3, 32, 32), 64, 512), ((3, 224, 224), 8, 128), ((3, 1024, 1024), 2, 64)])
def test_large_samples_are_looked_at_fewer_at_a_time(shape: tuple[int, ...], batch: int, most: int) -> None:
    data = Samples(np.broadcast_to(np.float32(0), (200, *shape)), None, spec_for(shape))
    found = choose.Quantising(data, Options.of({"method": "source", "quantize": "int8"}), lambda size: capture(nn.Identity(), shape, size), quiet)
    assert (found.batch, found.most) == (batch, most)


def test_a_pass_lets_go_of_what_nobody_reads_again() -> None:
    captured = capture(named.resnet_cifar(8), (3, 32, 32), 2)
    backbone = Backbone(captured)
    run = backbone.run(captured.tensors, Normaliser(backbone.source_statistics(), "source"))
    alive: list[int] = []
    execute = run.execute

    def counted(node: Any, values: dict[Any, Any]) -> None:
        execute(node, values)
        alive.append(sum(isinstance(value, Tensor) for key, value in values.items() if key not in run.known))

    run.execute = counted  # type: ignore[method-assign]
    x = noise((2, 3, 32, 32))
    with torch.no_grad():
        assert torch.allclose(run.whole(x), named.resnet_cifar(8)(x), atol=1e-5)
    assert max(alive) <= 4 < len(alive)
