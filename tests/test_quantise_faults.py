"""Models that 8 bits once went wrong on: turned views, pools, constants, ReLU6, dead channels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeadapt.bundle import InputSpec
from edgeadapt.errors import ExportError
from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.compile import lowered
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.export import export
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.options import Options
from edgeadapt.exporters.programs import Model, build
from edgeadapt.exporters.quantise import choose
from edgeadapt.exporters.quantise.calibrate import Judged, bound_to, errors_of, quantised
from edgeadapt.exporters.quantise.choose import Quantising, stand_in
from edgeadapt.exporters.quantise.kept import SMALL, Kept, range_of
from edgeadapt.exporters.quantise.layout import layout
from edgeadapt.exporters.quantise.operators import from_codes
from edgeadapt.exporters.quantise.ranges import Grid
from tests.zoo import named
from tests.zoo.calibrate import calibrate

SHAPE = (3, 8, 8)


def samples(labels: bool = True) -> Samples:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (96, 8, 8, 3), np.uint8)
    return Samples(x, random.integers(0, 4, 96) if labels else None, InputSpec(SHAPE))


class Turned(nn.Module):
    """A convolution whose output is normalised with its channels last, as ConvNeXt's are; as many rows as channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.norm, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.bn(self.stem(x)).relu())
        return self.head(self.norm(y.permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("view", ["turned", "chunk", "same"])
def test_a_view_of_a_tensor_on_a_grid_lies_on_another(view: str) -> None:
    value = torch.randn(16, 32, 32, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 10, 32).reshape(1, -1, 1, 1)
    kept, grid = Kept(16), Grid(torch.linspace(0.01, 0.1, 32), torch.full((32,), 128, dtype=torch.uint8))
    kept.lies_on(value, grid)
    seen = {"turned": value.permute(0, 3, 2, 1), "chunk": value.chunk(2, 1)[1], "same": value.detach()}[view]
    assert seen.numel() >= SMALL
    codes, scale, zero = kept._pack(seen)
    assert torch.equal(scale, grid.scale if view == "same" else range_of(seen).scale)
    if view != "same":
        assert (from_codes(codes, scale, zero) - seen).abs().max() <= 0.51 * scale.max()


def test_a_model_with_turned_views_is_exported() -> None:
    options = {"method": "tent", "quantize": "int8", "batches": (64,), "allow_drop": True, "threads": 1, "warmup_batch": 16}
    report = export(Turned(), None, shape=SHAPE, data=samples(), **options)
    assert [row["choice"] for row in report.manifest["quantisation"]["layers"]].count("int8") >= 1


class Pooled(nn.Module):
    """With a pool behind the first block, as torchvision's ResNets."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), activation(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), activation()),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def step(model: nn.Module, name: str) -> Model:
    captured = capture(model.eval(), SHAPE, 8)
    captured = captured.quantised(stand_in(captured, (), frozenset(), True))
    method = METHODS[name](captured, Setup(4))
    return Model(method, method.parameters(), method.backbone.source_statistics(), "source", "sgd", small=True)


def test_a_pool_belongs_to_the_forward_pass() -> None:
    graph = lowered(build(step(Pooled(), "side"), "adapt", 8, torch.randn(8, *SHAPE)))
    logits, needed = {out: node for node in graph.nodes for out in node.outputs}, ["logits"]
    seen: set[str] = set()
    while needed:
        node = logits.get(needed.pop())
        if node is not None and node.outputs[0] not in seen:
            seen.add(node.outputs[0])
            assert not graph.late(node), node
            needed += node.inputs
    assert any(node.op == "MaxPool" and graph.values[node.outputs[0]].dtype == np.uint8 for node in graph.nodes)


def test_relu6_is_the_end_of_a_grid() -> None:
    captured = capture(Pooled(nn.ReLU6).eval(), SHAPE, 8)
    method = METHODS["source"](captured, Setup(4))
    frozen = Model(method, {}, method.backbone.source_statistics(), "source", "sgd")
    found = quantised(frozen, layout(captured), [torch.randn(8, *SHAPE)])  # measured: the grid's end is 6, but for float32's rounding
    graph = lowered(build(bound_to(frozen, found), "source", 8, torch.randn(8, *SHAPE)))
    assert [node.op for node in graph.nodes].count("QLinearConv") == 3
    assert not any(node.op == "Clip" for node in graph.nodes[:-4])


class Constant(nn.Module):
    """Features of a fixed grid are added to those of the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("grid", torch.randn(1, 2, 8, 8))
        self.place, self.conv, self.head = nn.Conv2d(2, 8, 1), nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.conv(x) + self.place(self.grid)).relu().mean((2, 3)))


def test_what_does_not_depend_on_the_input_is_left() -> None:
    found = layout(capture(Constant().eval(), SHAPE, 2))
    assert [layer.module for layer in found.layers.values()] == ["conv"]
    export(Constant(), None, shape=SHAPE, data=samples(), method="source", quantize="int8", allow_drop=True, threads=1)


def test_a_dead_channel_is_no_error() -> None:
    model = Pooled().eval()
    with torch.no_grad():
        model.body[4].weight[2] = 0.0  # type: ignore[index, union-attr, operator]
    captured = capture(model, SHAPE, 8)
    method = METHODS["source"](captured, Setup(4))
    frozen = Model(method, {}, method.backbone.source_statistics(), "source", "sgd")
    looks, places = [torch.randn(8, *SHAPE)], layout(captured)
    errors = errors_of(frozen, places, quantised(frozen, places, looks), looks[0])
    assert max(errors.values()) < 1e-3


def test_what_was_not_tried_has_no_decibels() -> None:
    assert Judged("a", "b", 1, math.inf, "float", "its form").decibels == 0.0
    assert Judged("a", "b", 1, 1e-3, "int8").decibels == pytest.approx(30)


@pytest.mark.parametrize("labels", [True, False])
def test_eight_bits_may_not_cost_more_than_is_allowed(monkeypatch: pytest.MonkeyPatch, labels: bool) -> None:
    data = samples(labels)
    monkeypatch.setattr(choose, "ROUNDS", 0)
    monkeypatch.setattr(choose, "LIMIT", math.inf)
    model, limit = Pooled().eval(), Options(method="source", max_drop=5.0)
    found = Quantising(data, limit, lambda batch: capture(model, SHAPE, batch), lambda *_: None)
    found._check(0.9, 0.86, 50)
    found._check(None, None, 0)
    with pytest.raises(ExportError, match=r"8 bits cost 6\.0 points of clean accuracy \(90\.0 % before, 84\.0 % after") as caught:
        found._check(0.9, 0.84, 50)
    assert "--allow-drop" in str(caught.value.hint)
    Quantising(data, Options(method="source", allow_drop=True), lambda batch: capture(model, SHAPE, batch), lambda *_: None)._check(0.9, 0.1, 50)


def test_any_layer_can_go_back_to_float32() -> None:
    """What a sum of branches is read by decides where it is rounded: its range may not be known yet."""
    net = calibrate(named.resnet_cifar(8), SHAPE, 0)
    data = samples(True)
    choosing = Quantising(data, Options(method="source", allow_drop=True), lambda batch: capture(net, SHAPE, batch), lambda *_: None)
    captured = capture(net, SHAPE, choosing.batch)
    method = METHODS["source"](captured, Setup(4))
    model, rows = Model(method, {}, method.backbone.source_statistics(), "source", "sgd"), np.arange(8)
    places = layout(captured)
    found = quantised(model, places, choosing.looks)
    grids = dict(found.tensors)
    for node in places.layers:
        assert 0.0 <= choosing._accuracy(model, found, {node}, rows, np.zeros(8)) <= 1.0
    assert found.tensors.keys() == grids.keys()
