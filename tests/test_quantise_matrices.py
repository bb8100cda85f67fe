"""Large linear layers are stored in 8 bits and computed in float32, a piece of the weight at a time."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeadapt.bundle import Bundle
from edgeadapt.exporters import selfcheck
from edgeadapt.exporters.capture import Captured, capture
from edgeadapt.exporters.compile import Compiled, PlacedWeights, compile_program
from edgeadapt.exporters.export import export
from edgeadapt.exporters.ir import Graph
from edgeadapt.exporters.lowering import quantised as rules
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.programs import Model, build
from edgeadapt.exporters.quantise.calibrate import bound_to, quantised
from edgeadapt.exporters.quantise.layout import layout
from edgeadapt.exporters.quantise.matrices import LARGE, error_of, matrices, stored_linear
from edgeadapt.exporters.quantise.ranges import weight_codes
from edgeadapt.memory import Plan
from tests.zoo.calibrate import calibrate
from tests.zoo.data import gratings

WIDE, CLASSES = 96, 1000


class Wide(nn.Module):
    """Few and cheap convolutions before a classifier that is nearly all of the model; a small one that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv, self.conv_norm = nn.Conv2d(16, WIDE, 3, padding=1, stride=2), nn.BatchNorm2d(WIDE)
        self.small, self.head = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.conv_norm(self.conv(x)).relu()
        return self.head(self.small(x.mean((2, 3))).relu())  # type: ignore[no-any-return]


@cache
def captured() -> Captured:
    return capture(calibrate(Wide(), (3, 8, 8), 0), (3, 8, 8), 6)


def compiled(role: str, codes: bool = True, floating: frozenset[str] = frozenset(), kind: str = "ecotta") -> Compiled:
    method = METHODS[kind](captured(), Setup(CLASSES, 1))
    values = {**method.backbone.source_statistics(), **method.own_statistics()}
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, 8, 8, generator=random), torch.randint(CLASSES, (6,), generator=random)
    model = Model(method, method.parameters(), values, method.statistics, method.optimiser)
    if codes:
        model = bound_to(model, quantised(model, layout(captured(), method.entries, floating), [x]))
    return compile_program(build(model, role, 6, x, y), PlacedWeights())[0]


def large(item: Compiled) -> list[NDArray[Any]]:
    """The large constants that a graph reads."""
    read = {name for node in item.graph.nodes for name in node.inputs}
    return [array for name, array in item.graph.constants.items() if name in read and array.size >= WIDE * 200]


def test_only_large_weights_are_stored_and_those_that_are_to_stay_are_not() -> None:
    (node,) = matrices(captured())
    assert layout(captured()).stored == {node.name: "head.weight"}
    assert layout(captured(), (), frozenset([node.name])).stored == {}
    assert WIDE * CLASSES >= LARGE > WIDE * WIDE


class Gated(Wide):
    """Its classifier's bias depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_norm(self.conv(self.norm(self.stem(x)).relu())).relu().mean((2, 3))
        return torch.nn.functional.linear(x, self.head.weight, self.gate(x).mean(0))


def test_a_bias_that_is_not_the_models_keeps_its_gradient() -> None:
    found = capture(calibrate(Gated(), (3, 8, 8), 0), (3, 8, 8), 6)
    assert [found.owner[node.args[1].name] for node in matrices(found)] == ["gate.weight"]  # type: ignore[union-attr]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32), (32,)])
def test_the_operator_and_its_gradient_are_those_of_the_rounded_weight(shape: tuple[int, ...], bias: bool) -> None:
    random = torch.Generator().manual_seed(0)
    weight, shift = torch.randn(20, 32, generator=random), torch.randn(20, generator=random) if bias else None
    x = torch.randn(*shape, generator=random).requires_grad_()
    codes, scale = weight_codes(weight)
    real = codes.float() * scale[:, None]
    assert float((real - weight).abs().max()) < 0.02 * float(weight.abs().max())
    got, want = stored_linear(x, codes, scale, shift), torch.nn.functional.linear(x, real, shift)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    given = torch.randn(got.shape, generator=random)
    (ours,), (theirs,) = torch.autograd.grad(got, x, given), torch.autograd.grad(want, x, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32), (1, 32), (32,)])
def test_what_a_stored_weight_gets_wrong_is_measured_of_rows_and_of_a_single_one(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(20, 32, generator=random), torch.randn(*shape, generator=random)
    codes, scale = weight_codes(weight)
    error = error_of(x, codes, scale, None, torch.nn.functional.linear(x, weight))
    assert 1e-6 < error < 1e-3
    coarse = torch.round(codes / 32).to(torch.int8)
    assert error_of(x, coarse, 32 * scale, None, torch.nn.functional.linear(x, weight)) > 1e-3


@pytest.mark.parametrize("role", ["predict", "adapt"])
def test_graphs_hold_codes_alone_and_compute_what_the_programs_do(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "ROWS", WIDE * 300)  # four pieces, not of one size
    item = compiled(role)
    found = selfcheck.check([item])[0]
    assert found.logits < selfcheck.CODE
    assert {array.dtype for array in large(item)} == {np.dtype(np.int8)}
    real = [value for node in item.graph.nodes for value in (item.graph.values[out] for out in node.outputs) if value.dtype == np.float32]
    assert max(value.nbytes for value in real if value.shape[-1:] == (WIDE,)) == 4 * WIDE * 250
    readers = item.graph.readers()
    pieces = [node.outputs[0] for node in item.graph.nodes if node.op == "DequantizeLinear" and item.graph.values[node.inputs[0]].dtype == np.int8]
    assert len(pieces) == (8 if role == "adapt" else 4)
    assert all(len(readers[name]) == 1 for name in pieces)  # none lives from the forward pass to the backward one
    floating = frozenset(node.name for node in matrices(captured()))
    plain = compiled(role, True, floating)
    assert {array.dtype for array in large(plain)} == {np.dtype(np.float32)}
    assert Plan(item.graph).peak < Plan(plain.graph).peak + 2 * 4 * WIDE * 250


def test_gradients_in_float32_make_a_piece_of_a_convolutions_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled("adapt", kind="tent")
    monkeypatch.setattr(rules, "ROWS", 5000)
    item = compiled("adapt", kind="tent")
    found = selfcheck.check([item])[0]
    assert found.updates is not None
    assert found.updates < selfcheck.UPDATES

    def made(graph: Graph) -> list[int]:
        """Numbers of the weights that transposed convolutions read."""
        return [int(np.prod(graph.values[node.inputs[1]].shape)) for node in graph.nodes if node.op == "ConvTranspose"]

    assert made(whole.graph) == [WIDE * 16 * 9]
    assert len(made(item.graph)) == 3
    assert max(made(item.graph)) <= 5000
    assert sum(made(item.graph)) == WIDE * 16 * 9


def test_an_export_stores_them_and_says_so(tmp_path: Path) -> None:
    net = calibrate(Wide(), (3, 8, 8), 0)
    x, y = gratings(120, 8)
    path, plain = tmp_path / "wide.edgeadapt", tmp_path / "plain.edgeadapt"
    report = export(net, path, shape=(3, 8, 8), data=(x, y), mean=0.5, std=0.25, method="norm", batches=(4,), quantize="int8", allow_drop=True)
    export(net, plain, shape=(3, 8, 8), data=(x, y), mean=0.5, std=0.25, method="norm", batches=(4,))
    manifest = Bundle.open(path).manifest
    assert manifest.quantisation is not None
    (row,) = [row for row in manifest.quantisation.layers if row.layer == "head"]
    assert row.choice == "int8"
    assert row.decibels > 35
    assert "head" in report.table()
    assert path.stat().st_size < plain.stat().st_size - 2.5 * WIDE * CLASSES


def test_a_weight_that_8_bits_do_not_hold_stays() -> None:
    """One input that counts for nothing by its weight and for everything by its value."""
    net = calibrate(Wide(), (3, 8, 8), 0)
    with torch.no_grad():
        net.head.weight[:, 0] = 3000.0 * torch.sign(torch.randn(CLASSES, generator=torch.Generator().manual_seed(0)))
        net.small.weight[0], net.small.bias[0] = 0.0, 1e-4
    x, y = gratings(120, 8)
    report = export(net, None, shape=(3, 8, 8), data=(x, y), mean=0.5, std=0.25, method="norm", batches=(4,), quantize="int8", allow_drop=True)
    rows = {row["layer"]: row for row in report.manifest["quantisation"]["layers"]}
    assert rows["head"]["choice"] == "float"
    assert rows["head"]["why"] == "its error"


