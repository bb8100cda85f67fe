"""Fewer nodes around statistics that follow the stream: what is absorbed and joined computes the same, and what looks alike is left."""

from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.exporters.compile import PlacedWeights
from edgeadapt.exporters.emit import INLINE_BYTES, to_onnx
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.passes.moments import FEW, absorb_moments, join_products
from edgeadapt.exporters.passes.simplify import drop_unread
from tests.test_code_passes import feeds_of, ops, run

SHAPE = (2, 5, 6, 6)
VECTOR = SHAPE[1:2]
EPSILON = 1e-3


def normalised(graph: Graph, affine: bool = True, wrong: str = "") -> Value:
    """x normalised with a mean and a variance that the caller gives, as the exporter lowers it."""
    x, mean, variance = graph.input("x", SHAPE), graph.input("mean", VECTOR), graph.input("variance", VECTOR)
    zeros, ones = graph.constant(np.zeros(VECTOR, np.float32)), graph.constant(np.ones(VECTOR, np.float32))
    more = graph.input("epsilon", ()) if wrong == "an epsilon that varies" else graph.constant(EPSILON, np.float32)
    raised = graph.op("Add", [variance, more], VECTOR)
    deviation = raised if wrong == "no root" else graph.op("Sqrt", [raised], VECTOR)
    weight = graph.input("weight", VECTOR) if affine else ones
    scale = graph.op("Div", [weight, deviation], VECTOR)
    of_mean = graph.op("Mul", [mean, deviation if wrong == "another factor" else scale], VECTOR)
    shift = graph.op("Sub", [graph.input("bias", VECTOR), of_mean], VECTOR) if affine else graph.op("Neg", [of_mean], VECTOR)
    y = graph.op("BatchNormalization", [x, scale, shift, ones if wrong == "a mean" else zeros, ones], SHAPE, epsilon=0.0)
    graph.output("y", y)
    return scale


def fed(graph: Graph) -> dict[str, np.ndarray]:
    feeds = feeds_of(graph)
    return {**feeds, "variance": np.abs(feeds["variance"]) + np.float32(0.1)}


@pytest.mark.parametrize("affine", [True, False])
def test_a_normalisation_is_one_node(affine: bool) -> None:
    graph = Graph("g")
    normalised(graph, affine)
    feeds = fed(graph)
    (before,) = run(graph, feeds)
    assert absorb_moments(graph)
    drop_unread(graph)
    assert ops(graph) == ["BatchNormalization"]
    assert graph.nodes[0].attributes["epsilon"] == pytest.approx(EPSILON)
    (after,) = run(graph, feeds)
    assert np.abs(after - before).max() <= 1e-6 * np.abs(before).max()
    assert not absorb_moments(graph)


def test_what_others_read_of_a_scale_stays() -> None:
    graph = Graph("g")
    scale = normalised(graph)
    graph.output("scale", graph.op("Neg", [scale], VECTOR))
    assert absorb_moments(graph)
    drop_unread(graph)
    assert sorted(ops(graph)) == ["Add", "BatchNormalization", "Div", "Neg", "Sqrt"]


def test_an_epsilon_of_zero_is_absorbed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "EPSILON", 0.0)
    graph = Graph("g")
    normalised(graph)
    raised = graph.op("Neg", [graph.input("raw", VECTOR)], VECTOR)  # a weight that is made, as of stored whole numbers
    for node in graph.nodes:
        node.inputs = [raised.name if name == "weight" else name for name in node.inputs]
    graph.nodes.insert(0, graph.nodes.pop())
    assert absorb_moments(graph)
    assert not absorb_moments(graph)


@pytest.mark.parametrize("wrong", ["an epsilon that varies", "no root", "another factor", "a mean"])
def test_what_only_looks_like_a_normalisation_is_left(wrong: str) -> None:
    graph = Graph("g")
    normalised(graph, wrong=wrong)
    assert not absorb_moments(graph)


@pytest.mark.parametrize("count", [FEW - 1, FEW + 2])
def test_products_of_one_number_are_joined(count: int) -> None:
    graph = Graph("g")
    factor = graph.op("Neg", [graph.input("factor", ())], ())
    for index in range(count):
        given = [graph.input(f"v{index}", (index + 2,)), factor]
        graph.output(f"y{index}", graph.op("Exp", [graph.op("Mul", given[:: 1 - 2 * (index % 2)], (index + 2,))], (index + 2,)))
    feeds = feeds_of(graph)
    before = run(graph, feeds)
    assert join_products(graph) == (count >= FEW)
    assert ops(graph).count("Mul") == (1 if count >= FEW else count)
    assert [item.tobytes() for item in run(graph, feeds)] == [item.tobytes() for item in before]


def test_so_many_that_their_sizes_are_no_small_constant() -> None:
    """A model with 65 normalisations has 130 vectors to decay, and onnxruntime wants to know into what it is to split while it reads the graph."""
    graph, count = Graph("g"), 130
    factor = graph.input("factor", ())
    for index in range(count):
        graph.output(f"y{index}", graph.op("Exp", [graph.op("Mul", [graph.input(f"v{index}", (index + 2,)), factor], (index + 2,))], (index + 2,)))
    assert join_products(graph)
    feeds = feeds_of(graph)
    model = to_onnx(graph, PlacedWeights())
    assert "Split" in ops(graph)
    split = next(node for node in graph.nodes if node.op == "Split")
    assert graph.constants[split.inputs[1]].nbytes > INLINE_BYTES
    found = open_session(model, graph.constants, threads=1).run(None, dict(feeds))
    assert [np.asarray(item).tobytes() for item in found] == [item.tobytes() for item in run(graph, feeds)]


def test_products_of_what_the_graph_makes_are_not_joined() -> None:
    graph = Graph("g")
    factor = graph.input("factor", ())
    for index in range(FEW + 1):
        made = graph.op("Exp", [graph.input(f"v{index}", (3,))], (3,))
        graph.output(f"y{index}", graph.op("Neg", [graph.op("Mul", [made, factor], (3,))], (3,)))
    assert not join_products(graph)
