"""Passes over graphs whose tensors are codes: gradients masked and scaled as codes, float32 made in pieces, small forms before the backward pass."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeadapt.exporters.emit import to_onnx
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.passes import pieces, products
from edgeadapt.exporters.passes.gradients import largest_code, mask_codes, scale_codes
from edgeadapt.exporters.passes.order import order
from edgeadapt.exporters.passes.pieces import in_pieces
from edgeadapt.exporters.passes.products import cut_products
from edgeadapt.exporters.passes.requantise import join_units, make_late
from edgeadapt.exporters.passes.simplify import drop_unread

SHAPE = (8, 4, 6, 6)
U8 = np.dtype(np.uint8)


def run(graph: Graph, feeds: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    found = open_session(to_onnx(graph), threads=1).run(None, dict(feeds))
    return [np.asarray(item) for item in found]


def feeds_of(graph: Graph) -> dict[str, NDArray[np.generic]]:
    random = np.random.default_rng(0)
    made: dict[str, NDArray[np.generic]] = {}
    for name in graph.inputs:
        value = graph.values[name]
        drawn = random.standard_normal(value.shape) if value.dtype.kind == "f" else random.integers(0, 256 if value.dtype == U8 else 2, value.shape)
        made[name] = np.asarray(drawn).astype(value.dtype)
    return made


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def values(graph: Graph, codes: Value, zero: int = 128, scale: float = 0.05) -> Value:
    return graph.op("DequantizeLinear", [codes, graph.constant(scale, np.float32), graph.constant(zero, U8)], codes.shape, np.float32)


def test_a_mask_acts_on_codes() -> None:
    graph = Graph("g")
    codes, mask = graph.input("codes", SHAPE, np.uint8), graph.input("mask", SHAPE, np.bool_)
    cast = graph.op("Cast", [mask], SHAPE, np.float32, to=np.dtype(np.float32))
    graph.output("y", graph.op("Mul", [values(graph, codes), cast], SHAPE))
    feeds = feeds_of(graph)
    before = run(graph, feeds)
    assert mask_codes(graph)
    assert drop_unread(graph)
    assert ops(graph) == ["Where", "DequantizeLinear"]
    assert graph.values[graph.nodes[0].outputs[0]].dtype == U8
    assert np.array_equal(run(graph, feeds)[0], before[0])  # but for the sign of zeros
    assert (before[0] == 0).any()
    assert (before[0] != 0).any()


@pytest.mark.parametrize(("shape", "unit"), [((4, 6), (4, 1)), ((4, 4, 6), (4, 1)), ((4, 6), (1, 1)), ((4, 6), (1, 6))])
def test_bytes_times_a_unit_a_row_are_made_into_values_at_once_where_they_are_a_matrix(shape: tuple[int, ...], unit: tuple[int, ...]) -> None:
    """Of three axes a unit of two lies along the second one, and the result has the same shape."""
    graph = Graph("g")
    held, units = graph.input("held", shape, np.int8), graph.input("unit", unit, np.float32)
    cast = graph.op("Cast", [held], shape, np.float32, to=np.dtype(np.float32))
    graph.output("y", graph.op("Mul", [cast, units], shape))
    feeds = {"held": np.arange(np.prod(shape), dtype=np.int8).reshape(shape), "unit": np.linspace(0.5, 2.0, int(np.prod(unit)), dtype=np.float32)}
    feeds["unit"] = feeds["unit"].reshape(unit)
    before = run(graph, feeds)
    joined = shape[:-1] == unit[:1]
    assert join_units(graph) is joined
    drop_unread(graph)
    assert ops(graph) == (["Reshape", "DequantizeLinear"] if joined else ["Cast", "Mul"])
    assert np.array_equal(run(graph, feeds)[0], before[0])


@pytest.mark.parametrize("reason", ["two readers", "a broadcast mask", "a zero for each channel"])
def test_a_mask_stays_where_it_must(reason: str) -> None:
    graph = Graph("g")
    codes = graph.input("codes", SHAPE, np.uint8)
    mask = graph.input("mask", (1, *SHAPE[1:]) if reason == "a broadcast mask" else SHAPE, np.bool_)
    cast = graph.op("Cast", [mask], mask.shape, np.float32, to=np.dtype(np.float32))
    made = values(graph, codes)
    if reason == "a zero for each channel":
        scale, zero = graph.constant(np.full(4, 0.1, np.float32)), graph.constant(np.arange(4), U8)
        made = graph.op("DequantizeLinear", [codes, scale, zero], SHAPE, np.float32, axis=1)
    graph.output("y", graph.op("Mul", [made, cast], SHAPE))
    if reason == "two readers":
        graph.output("z", graph.op("Neg", [made], SHAPE))
    assert not mask_codes(graph)


@pytest.mark.parametrize("each", [False, True], ids=["one scale", "a scale for each channel"])
def test_factors_of_channels_act_on_the_scale(each: bool) -> None:
    graph = Graph("g")
    codes, factor = graph.input("codes", SHAPE, np.uint8), graph.input("factor", (4,))
    made = values(graph, codes)
    if each:
        scale, zero = graph.constant(np.linspace(0.1, 0.4, 4), np.float32), graph.constant(np.full(4, 128), U8)
        made = graph.op("DequantizeLinear", [codes, scale, zero], SHAPE, np.float32, axis=1)
    wide = graph.op("Reshape", [factor, graph.ints((1, 4, 1, 1))], (1, 4, 1, 1))
    graph.output("y", graph.op("Mul", [wide, made], SHAPE))
    feeds = feeds_of(graph)
    (before,) = run(graph, feeds)
    assert scale_codes(graph)
    assert drop_unread(graph)
    assert ops(graph) == ["Mul", "DequantizeLinear"]
    (after,) = run(graph, feeds)
    assert np.abs(after - before).max() <= 1e-6 * np.abs(before).max()


def test_a_factor_for_each_sample_is_no_factor_of_channels() -> None:
    graph = Graph("g")
    codes, factor = graph.input("codes", (4, 4, 6, 6), np.uint8), graph.input("factor", (4,))
    wide = graph.op("Reshape", [factor, graph.ints((4, 1, 1, 1))], (4, 1, 1, 1))
    graph.output("y", graph.op("Mul", [values(graph, codes), wide], (4, 4, 6, 6)))
    assert not scale_codes(graph)


def moving(graph: Graph, codes: Value) -> Value:
    """Codes to codes through statistics of their own, as a normalisation that follows the stream."""
    made, axes = values(graph, codes), graph.ints((0, 2, 3))
    mean = graph.op("ReduceMean", [made, axes], (4,), keepdims=0)
    square = graph.op("ReduceMean", [graph.op("Mul", [made, made], made.shape), axes], (4,), keepdims=0)
    scale = graph.op("Reciprocal", [graph.op("Sqrt", [square], (4,))], (4,))
    zeros, ones = graph.constant(np.zeros(4, np.float32)), graph.constant(np.ones(4, np.float32))
    y = graph.op("BatchNormalization", [made, scale, mean, zeros, ones], made.shape, epsilon=0.0)
    y = graph.op("Relu", [y], made.shape)
    return graph.op("QuantizeLinear", [y, graph.constant(0.01, np.float32), graph.constant(0, U8)], made.shape, np.uint8)


@pytest.mark.parametrize("batch", [8, 7])  # in pieces of one size, and of two
def test_large_tensors_are_made_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    shape = (batch, *SHAPE[1:])
    monkeypatch.setattr(pieces, "PIECE", 4 * int(np.prod(SHAPE)) // 4)
    graph = Graph("g")
    graph.output("y", graph.op("Identity", [moving(graph, graph.input("codes", shape, np.uint8))], shape))
    feeds = feeds_of(graph)
    (before,) = run(graph, feeds)
    assert in_pieces(graph)
    assert drop_unread(graph)
    whole = [value for node in graph.nodes for value in (graph.values[out] for out in node.outputs) if value.shape == shape]
    assert {value.dtype for value in whole} == {U8}  # nothing else exists whole
    assert sum(node.op == "Concat" for node in graph.nodes) == 3
    assert sum(node.op == "QuantizeLinear" for node in graph.nodes) == 4
    (after,) = run(graph, feeds)
    apart = np.abs(after.astype(int) - before.astype(int))
    assert apart.max() <= 1
    assert apart.mean() < 0.01
    assert len(np.unique(before)) > 20


def test_pieces_are_as_equal_as_can_be_and_not_many() -> None:
    assert pieces.batch_pieces(Value("x", (61, 32, 32, 32), np.dtype(np.uint8))) == [15, 15, 15, 16]
    assert pieces.batch_pieces(Value("x", (64, 64, 112, 112), np.dtype(np.float32))) == [4] * 16
    assert pieces.batch_pieces(Value("x", (2, 64, 112, 112), np.dtype(np.float32))) == [1, 1]
    assert pieces.batch_pieces(Value("x", (16, 8, 8, 8), np.dtype(np.uint8))) == [16]


def test_small_tensors_and_open_chains_are_left() -> None:
    graph = Graph("g")
    graph.output("y", moving(graph, graph.input("codes", SHAPE, np.uint8)))
    assert not in_pieces(graph)


def test_a_chain_that_others_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 64)
    graph = Graph("g")
    made = graph.op("Relu", [values(graph, graph.input("codes", SHAPE, np.uint8))], SHAPE)
    graph.output("y", graph.op("QuantizeLinear", [made, graph.constant(0.01, np.float32), graph.constant(0, U8)], SHAPE, np.uint8))
    graph.output("z", graph.op("Exp", [made], SHAPE))
    assert not in_pieces(graph)


def step() -> Graph:
    """A forward pass whose values a backward pass reads, with its small form made as late as can be."""
    graph = Graph("g")
    made = graph.op("Exp", [graph.input("x", SHAPE)], SHAPE)
    codes = graph.op("QuantizeLinear", [made, graph.constant(0.05, np.float32), graph.constant(0, U8)], SHAPE, np.uint8)
    again = graph.op("DequantizeLinear", [codes, graph.constant(0.05, np.float32), graph.constant(0, U8)], SHAPE, np.float32)
    logits = graph.op("ReduceMean", [graph.op("Mul", [made, again], SHAPE), graph.ints((1, 2, 3))], (8,), keepdims=0)
    graph.end_forward()
    gradient = graph.op("Mul", [again, graph.op("Reshape", [logits, graph.ints((8, 1, 1, 1))], (8, 1, 1, 1))], SHAPE)
    graph.output("logits", logits)
    graph.output("new.w", graph.op("ReduceMean", [gradient, graph.ints((0, 2, 3))], (4,), keepdims=0))
    return graph


def test_the_backward_pass_makes_its_own_values() -> None:
    graph = step()
    feeds = feeds_of(graph)
    before = run(graph, feeds)
    assert make_late(graph)
    made = [out for node in graph.nodes if not graph.late(node) for out in node.outputs]
    crossing = {name for node in graph.nodes if graph.late(node) for name in node.inputs if name in made and len(graph.values[name].shape) > 2}
    assert {graph.values[name].dtype for name in crossing} == {U8}
    assert [item.tobytes() for item in run(graph, feeds)] == [item.tobytes() for item in before]


def test_the_forward_pass_comes_first() -> None:
    graph = step()
    make_late(graph)
    placed = [graph.late(graph.nodes[index]) for index in order(graph)]
    assert placed == sorted(placed)
    assert sorted(order(graph)) == list(range(len(graph.nodes)))
    last = max(index for index, late in enumerate(placed) if not late)
    assert "QuantizeLinear" in [graph.nodes[index].op for index in order(graph)[: last + 1]]


def test_a_graph_without_a_mark_has_no_backward_pass() -> None:
    graph = Graph("g")
    graph.output("y", graph.op("Exp", [graph.input("x", SHAPE)], SHAPE))
    assert not graph.late(graph.nodes[0])
    assert order(graph) == [0]
    assert not make_late(graph)


def blocks(graph: Graph, open_end: bool) -> None:
    """A gradient that goes through two blocks, as codes through one branch and in float32 through the other, and is reduced on its way."""
    shape = (8, *SHAPE[1:])
    grid = graph.constant(np.full(4, 0.03, np.float32)), graph.constant(np.full(4, 128), U8)
    gradient = graph.op("Exp", [graph.input("x", shape)], shape)
    mask = graph.op("Cast", [graph.input("mask", shape, np.bool_)], shape, np.float32, to=np.dtype(np.float32))
    for index in range(2):
        gradient = graph.op("Add", [gradient, values(graph, graph.input(f"codes{index}", shape, np.uint8))], shape)
        gradient = graph.op("Mul", [gradient, mask], shape)
        graph.output(f"codes_of{index}", graph.op("Identity", [graph.op("QuantizeLinear", [gradient, *grid], shape, np.uint8, axis=1)], shape))
        most = graph.op("ReduceMax", [gradient, graph.ints((0, 2, 3))], (4,), keepdims=0)
        total = graph.op("ReduceSum", [graph.op("Mul", [gradient, mask], shape), graph.ints((0, 2, 3))], (4,), keepdims=0)
        graph.output(f"sum{index}", graph.op("Mul", [most, total], (4,)))
    if open_end:
        graph.output("y", graph.op("Exp", [gradient], shape))


@pytest.mark.parametrize("open_end", [False, True], ids=["ends in codes", "ends in float32"])
def test_a_gradient_stays_in_pieces_between_blocks(monkeypatch: pytest.MonkeyPatch, open_end: bool) -> None:
    monkeypatch.setattr(pieces, "PIECE", 4 * int(np.prod(SHAPE)) // 4)
    graph = Graph("g")
    blocks(graph, open_end)
    feeds = feeds_of(graph)
    before = dict(zip(graph.outputs, run(graph, feeds), strict=True))
    assert in_pieces(graph)
    drop_unread(graph)
    whole = [node.op for node in graph.nodes for out in node.outputs if graph.values[out].shape == SHAPE and graph.values[out].dtype == np.float32]
    assert whole == (["Exp", "Concat", "Exp"] if open_end else ["Exp"])
    assert ops(graph).count("Add") == 8
    for name, after in zip(graph.outputs, run(graph, feeds), strict=True):
        if name.startswith("sum"):
            assert np.abs(after - before[name]).max() <= 1e-5 * np.abs(before[name]).max()
        else:
            assert np.array_equal(after, before[name])


@pytest.mark.parametrize("reason", ["float32 alone", "read by the other pass", "each sample's own"])
def test_what_would_not_be_less_is_not_cut(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(pieces, "PIECE", 64)
    graph = Graph("g")
    x = graph.op("Exp", [graph.input("x", SHAPE)], SHAPE)
    y = x if reason == "float32 alone" else values(graph, graph.input("codes", SHAPE, np.uint8))
    other = graph.op("ReduceMax", [x, graph.ints((1, 2, 3))], (8, 1, 1, 1), keepdims=1) if reason == "each sample's own" else x
    made = graph.op("Add", [y, other], SHAPE)
    if reason == "read by the other pass":
        graph.end_forward()
    graph.output("y", graph.op("Exp", [graph.op("Relu", [made], SHAPE)], SHAPE))
    assert not in_pieces(graph)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("each", [False, True], ids=["one scale", "a scale for each channel"])
def test_the_largest_magnitude_is_that_of_a_code(each: bool, sign: int) -> None:
    graph = Graph("g")
    codes = graph.input("codes", SHAPE, np.uint8)
    scale = graph.op("Neg", [graph.input("scale", (4,) if each else ())], (4,) if each else ())
    zero = graph.constant(np.full(scale.shape, 128), U8)
    made = graph.op("DequantizeLinear", [codes, scale, zero], SHAPE, np.float32, axis=1)
    axes = graph.ints((0, 2, 3))
    lowest = graph.op("ReduceMin", [made, axes], (4,), keepdims=0)
    graph.output("y", graph.op("Max", [graph.op("ReduceMax", [made, axes], (4,), keepdims=0), graph.op("Neg", [lowest], (4,))], (4,)))
    feeds = feeds_of(graph)
    feeds["scale"] = np.asarray(sign * np.abs(feeds["scale"]), np.float32)
    (before,) = run(graph, feeds)
    assert largest_code(graph)
    drop_unread(graph)
    assert {graph.values[name].dtype for node in graph.nodes if node.op.startswith("Reduce") for name in node.inputs[:1]} == {U8}
    assert np.array_equal(run(graph, feeds)[0], before)


def test_the_largest_of_two_tensors_or_of_each_sample_stays() -> None:
    graph = Graph("g")
    first, second = (values(graph, graph.input(name, SHAPE, np.uint8)) for name in ("a", "b"))
    for made, other, axes in ((first, second, (0, 2, 3)), (first, first, (1, 2, 3))):
        size = (SHAPE[1],) if 0 in axes else (SHAPE[0],)
        lowest = graph.op("Neg", [graph.op("ReduceMin", [other, graph.ints(axes)], size, keepdims=0)], size)
        graph.output(f"y{len(graph.outputs)}", graph.op("Max", [graph.op("ReduceMax", [made, graph.ints(axes)], size, keepdims=0), lowest], size))
    assert not largest_code(graph)


@pytest.mark.parametrize("kind", ["the same for all samples", "a constant with samples"])
def test_what_has_no_samples_of_its_own_is_not_cut_with_the_batch(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(pieces, "PIECE", 64)
    graph = Graph("g")
    made = values(graph, graph.input("codes", SHAPE, np.uint8))
    if kind == "the same for all samples":
        other = graph.op("Exp", [graph.input("table", SHAPE[1:])], SHAPE[1:])
    else:
        other = graph.constant(np.ones(SHAPE, np.float32))
    total = graph.op("Relu", [graph.op("Add", [made, other], SHAPE)], SHAPE)
    codes = graph.op("QuantizeLinear", [total, graph.constant(0.05, np.float32), graph.constant(0, U8)], SHAPE, np.uint8)
    graph.output("y", graph.op("Identity", [codes], SHAPE))
    feeds = feeds_of(graph)
    before = run(graph, feeds)
    in_pieces(graph)
    drop_unread(graph)
    assert np.array_equal(run(graph, feeds)[0], before[0])
    assert "Slice" not in ops(graph) or not any(node.inputs[0] == other.name for node in graph.nodes if node.op == "Slice")


@pytest.mark.parametrize("form", ["by rows of blocks", "with a batch of one"])
def test_a_large_product_is_made_in_the_stretches_it_is_read_in(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(products, "LARGE", 64)
    graph = sliced_product(*((1,) if form == "with a batch of one" else ()))
    feeds = feeds_of(graph)
    before = run(graph, feeds)
    assert cut_products(graph)
    drop_unread(graph)
    assert ops(graph).count("MatMul") == 3
    assert max(graph.values[node.outputs[0]].nbytes for node in graph.nodes) < 12 * 8 * 4  # the whole one is gone
    for one, other in zip(run(graph, feeds), before, strict=True):
        assert np.abs(one - other).max() <= 1e-6 * np.abs(other).max()


@pytest.mark.parametrize("reason", ["half a row", "another reader", "many of a batch", "small"])
def test_a_product_that_is_wanted_whole_stays(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(products, "LARGE", 2**20 if reason == "small" else 64)
    stretches = {"block": 4, "at": 3} if reason == "half a row" else {}
    graph = sliced_product(*((2,) if reason == "many of a batch" else ()), **stretches)
    if reason == "another reader":
        name = next(node.outputs[0] for node in graph.nodes if node.op == "MatMul")
        graph.output("all", graph.op("Exp", [graph.values[name]], graph.values[name].shape))
    assert not cut_products(graph)


def sliced_product(*batch: int, block: int = 2, at: int = 8) -> Graph:
    """A product of 12 rows and 8 columns, seen as rows of so many numbers, and read in three stretches."""
    graph = Graph("g")
    left, right = graph.input("left", (*batch, 12, 5)), graph.input("right", (*batch, 5, 8))
    rows = 12 * 8 * int(np.prod(batch)) // block
    product = graph.op("Reshape", [graph.op("MatMul", [left, right], (*batch, 12, 8)), graph.ints((rows, block))], (rows, block))
    for index, (begin, end) in enumerate(zip((0, at, 2 * at), (at, 2 * at, rows), strict=True)):
        bounds = [graph.ints([number]) for number in (begin, end, 0, 1)]
        part = graph.op("Slice", [product, *bounds], (end - begin, block))
        graph.output(f"y{index}", graph.op("Abs", [part], part.shape))
    return graph
