"""Fewer nodes around statistics that follow the stream: what is absorbed and joined computes the same, and what looks alike is left."""

from __future__ import annotations

import numpy as np
import pytest

from edgeadapt.exporters.compile import PlacedWeights
from edgeadapt.exporters.emit import INLINE_BYTES, to_onnx
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.ir import MANY, VECTOR_BYTES, Graph, Value
from edgeadapt.exporters.lowering.shapes import cut as cut_out
from edgeadapt.exporters.lowering.shapes import split_with_sizes
from edgeadapt.exporters.passes.moments import absorb_moments
from edgeadapt.exporters.passes.simplify import FOLD_BYTES, drop_unread, fold_constants
from edgeadapt.exporters.passes.vectors import compute_joined, join_products
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


@pytest.mark.parametrize("count", [MANY - 1, MANY + 2])
def test_products_of_one_number_are_joined(count: int) -> None:
    graph = Graph("g")
    factor = graph.op("Neg", [graph.input("factor", ())], ())
    for index in range(count):
        given = [graph.input(f"v{index}", (index + 2,)), factor]
        graph.output(f"y{index}", graph.op("Exp", [graph.op("Mul", given[:: 1 - 2 * (index % 2)], (index + 2,))], (index + 2,)))
    feeds = feeds_of(graph)
    before = run(graph, feeds)
    assert join_products(graph) == (count >= MANY)
    assert ops(graph).count("Mul") == (1 if count >= MANY else count)
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
    for index in range(MANY + 1):
        made = graph.op("Exp", [graph.input(f"v{index}", (3,))], (3,))
        graph.output(f"y{index}", graph.op("Neg", [graph.op("Mul", [made, factor], (3,))], (3,)))
    assert not join_products(graph)


@pytest.mark.parametrize("cut", ["Split", "Slice", "no"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
def test_what_is_made_of_many_vectors_and_joined_is_made_of_them_joined(op: str, first: bool, cut: str) -> None:
    """Of vectors and those that another was cut into, or others, in whatever order the operator leaves free; to the bit."""
    graph, sizes = Graph("g"), [2, 3, 4, 5]
    if cut == "no":
        others = [graph.input(f"w{index}", (size,)) for index, size in enumerate(sizes)]
    else:
        whole = graph.op("Exp", [graph.input("w", (sum(sizes),))], (sum(sizes),))
        others = list(split_with_sizes(graph, whole, sizes)) if cut == "Split" else _cuts(graph, whole, sizes)
        assert cut in ops(graph)
    made = []
    for index, (size, other) in enumerate(zip(sizes, others, strict=True)):
        pair = [graph.op("Neg", [graph.input(f"v{index}", (size,))], (size,)), other]
        turned = first if op == "Sub" else index % 2
        made.append(graph.op(op, pair[::-1] if turned else pair, (size,)))
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


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("first", [False, True])
def test_many_vectors_and_one_number_are_joined_first(op: str, first: bool) -> None:
    graph = Graph("g")
    factor = graph.input("factor", ())
    made = [graph.op(op, [graph.op("Exp", [graph.input(f"v{index}", (3,))], (3,)), factor][:: 1 - 2 * first], (3,)) for index in range(MANY)]
    graph.output("y", graph.op("Concat", made, (3 * MANY,), axis=0))
    feeds = feeds_of(graph)
    (before,) = run(graph, feeds)
    assert compute_joined(graph)
    drop_unread(graph)
    assert ops(graph).count(op) == 1
    assert run(graph, feeds)[0].tobytes() == before.tobytes()


@pytest.mark.parametrize("wrong", ["few", "large", "read", "given", "operators", "repeated", "numbers", "matrices"])
def test_what_cannot_be_computed_joined_is_left(wrong: str) -> None:
    """Too few, or too large; one that something else reads, or the caller; other operators; one vector twice; a number for each; matrices."""
    graph, count, size = Graph("g"), MANY - (wrong == "few"), VECTOR_BYTES // 4 + 1 if wrong == "large" else 3
    shape = (size, 2) if wrong == "matrices" else (size,)
    made = []
    for index in range(count):
        other = graph.input(f"factor{index}", () if wrong == "numbers" else shape)
        made.append(graph.op("Mul" if index or wrong != "operators" else "Add", [graph.input(f"v{index}", shape), other], shape))
    if wrong == "repeated":
        made[1] = made[0]
    graph.output("y", graph.op("Concat", made, (size * count, *shape[1:]), axis=0))
    if wrong == "read":
        graph.output("z", graph.op("Neg", [made[0]], shape))
    if wrong == "given":
        graph.output("z", made[0])
    before = [(node.op, list(node.inputs)) for node in graph.nodes]
    assert not compute_joined(graph)
    assert [(node.op, list(node.inputs)) for node in graph.nodes] == before


@pytest.mark.parametrize("cut", ["Split", "Slice"])
@pytest.mark.parametrize("wrong", ["order", "short", "strided", "another"])
def test_pieces_that_are_not_a_vector_are_joined_as_they_are(wrong: str, cut: str) -> None:
    """In another order; without the last; with gaps; or of two vectors."""
    graph, size = Graph("g"), 6
    whole, another = (graph.op("Exp", [graph.input(name, (size * (MANY + 1),))], (size * (MANY + 1),)) for name in ("w", "o"))

    def cuts(of: Value) -> list[Value]:
        return list(split_with_sizes(graph, of, [size] * (MANY + 1))) if cut == "Split" else _cuts(graph, of, [size] * (MANY + 1))

    pieces = cuts(whole)
    if wrong == "order":
        pieces = pieces[::-1]
    elif wrong == "short":
        pieces = pieces[:-1]
    elif wrong == "another":
        pieces[2] = cuts(another)[2]
    else:
        pieces = [cut_out(graph, whole, 0, size * index, size * (index + 1), 2) for index in range(MANY + 1)]
    made = [graph.op("Mul", [graph.input(f"v{index}", piece.shape), piece], piece.shape) for index, piece in enumerate(pieces)]
    graph.output("y", graph.op("Concat", made, (sum(piece.shape[0] for piece in pieces),), axis=0))
    feeds = feeds_of(graph)
    (before,) = run(graph, feeds)
    assert compute_joined(graph)
    drop_unread(graph)
    assert run(graph, feeds)[0].tobytes() == before.tobytes()
    assert ops(graph).count("Concat") == 2


@pytest.mark.parametrize("late", [False, True])
def test_what_is_joined_is_of_the_pass_that_its_parts_were_of(late: bool) -> None:
    graph = Graph("g")
    if late:
        graph.end_forward()
    made = [graph.op("Mul", [graph.input(f"v{index}", (3,)), graph.input(f"w{index}", (3,))], (3,)) for index in range(MANY)]
    joined = graph.op("Concat", made, (3 * MANY,), axis=0)
    if not late:
        graph.end_forward()
    graph.output("y", graph.op("Neg", [joined], (3 * MANY,)))
    assert compute_joined(graph)
    drop_unread(graph)
    assert [graph.late(node) for node in graph.nodes] == [late] * 3 + [True]


def test_large_vectors_are_cut_one_by_one() -> None:
    graph, size = Graph("g"), VECTOR_BYTES // 4 + 1
    for index, piece in enumerate(split_with_sizes(graph, graph.input("x", (size * MANY,)), [size] * MANY)):
        graph.output(f"y{index}", piece)
    assert "Split" not in ops(graph)


def test_constant_vectors_are_joined_whatever_their_size() -> None:
    """The parts need not be there beside them."""
    graph = Graph("g")
    parts = [graph.weight(f"weights.{index}", np.full(FOLD_BYTES // 8, index, np.float32)) for index in range(3)]
    joined = graph.op("Concat", parts, (3 * parts[0].shape[0],), axis=0)
    graph.output("y", graph.op("Add", [joined, graph.input("x", ())], joined.shape))
    assert fold_constants(graph)
    assert ops(graph) == ["Add"]
    assert graph.constants[joined.name].tolist() == [float(index) for index in range(3) for _ in range(parts[0].shape[0])]


def _cuts(graph: Graph, whole: Value, sizes: list[int]) -> list[Value]:
    ends = np.cumsum([0, *sizes])
    return [cut_out(graph, whole, 0, int(begin), int(end)) for begin, end in zip(ends[:-1], ends[1:], strict=True)]
