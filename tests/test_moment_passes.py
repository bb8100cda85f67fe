"""Fewer nodes around statistics that follow the stream: what is absorbed and joined computes the same, and what looks alike is left."""

from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.exporters.compile import PlacedWeights
from edgeadapt.exporters.emit import INLINE_BYTES, to_onnx
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.lowering.shapes import cut as cut_out
from edgeadapt.exporters.lowering.shapes import split_with_sizes
from edgeadapt.exporters.passes.moments import absorb_moments
from edgeadapt.exporters.passes.simplify import drop_unread
from edgeadapt.exporters.passes.vectors import FEW, compute_joined, join_products
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


@pytest.mark.parametrize("cut", ["Split", "Slice", "no"])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
def test_what_is_made_of_many_vectors_and_joined_is_made_of_them_joined(op: str, cut: str) -> None:
    """Of vectors and those that another was cut into, or others, in whatever order the operator leaves free; to the bit."""
    graph, sizes = Graph("g"), [2, 3, 4, 5]
    if cut == "no":
        others = [graph.input(f"w{index}", (size,)) for index, size in enumerate(sizes)]
    else:
        whole = graph.op("Exp", [graph.input("w", (sum(sizes),))], (sum(sizes),))
        others = list(split_with_sizes(graph, whole, sizes)) if cut == "Split" else _cuts(graph, whole, sizes)
    made = []
    for index, (size, other) in enumerate(zip(sizes, others, strict=True)):
        pair = [graph.op("Neg", [graph.input(f"v{index}", (size,))], (size,)), other]
        made.append(graph.op(op, pair if op == "Sub" or index % 2 else pair[::-1], (size,)))
    graph.output("y", graph.op("Concat", made, (sum(sizes),), axis=0))
    feeds = feeds_of(graph)
    (before,) = run(graph, feeds)
    assert compute_joined(graph)
    drop_unread(graph)
    (after,) = run(graph, feeds)
    assert after.tobytes() == before.tobytes()
    assert ops(graph).count(op) == 1
    assert ops(graph).count("Concat") == (2 if cut == "no" else 1)
    assert cut not in ops(graph)


def test_many_vectors_times_one_number_are_joined_first() -> None:
    graph = Graph("g")
    factor = graph.input("factor", ())
    made = [graph.op("Mul", [graph.op("Exp", [graph.input(f"v{index}", (3,))], (3,)), factor][:: 1 - 2 * (index % 2)], (3,)) for index in range(FEW)]
    graph.output("y", graph.op("Concat", made, (3 * FEW,), axis=0))
    feeds = feeds_of(graph)
    (before,) = run(graph, feeds)
    assert compute_joined(graph)
    drop_unread(graph)
    assert ops(graph).count("Mul") == 1
    assert run(graph, feeds)[0].tobytes() == before.tobytes()


@pytest.mark.parametrize("wrong", ["few", "read", "operators", "repeated", "numbers", "order"])
def test_what_cannot_be_computed_joined_is_left(wrong: str) -> None:
    """Too few; one that something else reads; other operators; one vector twice; a number for each; or pieces of a vector in another order."""
    graph, count = Graph("g"), FEW - (wrong == "few")
    whole = graph.op("Exp", [graph.input("w", (3 * FEW,))], (3 * FEW,))
    pieces = _cuts(graph, whole, [3] * FEW)[:: -1 if wrong == "order" else 1]
    made = []
    for index in range(count):
        other = graph.input(f"factor{index}", ()) if wrong == "numbers" else pieces[index]
        made.append(graph.op("Mul" if index or wrong != "operators" else "Add", [graph.input(f"v{index}", (3,)), other], (3,)))
    if wrong == "repeated":
        made[1] = made[0]
    graph.output("y", graph.op("Concat", made, (3 * count,), axis=0))
    if wrong == "read":
        graph.output("z", graph.op("Neg", [made[0]], (3,)))
    feeds = feeds_of(graph)
    before = [item.tobytes() for item in run(graph, feeds)]
    changed = compute_joined(graph)
    assert [item.tobytes() for item in run(graph, feeds)] == before
    if wrong == "order":
        assert ops(graph).count("Concat") == 2  # the pieces are joined in their order
    else:
        assert not changed


def _cuts(graph: Graph, whole: Value, sizes: list[int]) -> list[Value]:
    ends = np.cumsum([0, *sizes])
    return [cut_out(graph, whole, 0, int(begin), int(end)) for begin, end in zip(ends[:-1], ends[1:], strict=True)]
