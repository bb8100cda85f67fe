"""Passes that leave codes alone: each gives the same bits with fewer or smaller tensors, and leaves be what it must not touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgeadapt.exporters.ir import Graph, Value
from edgeadapt.exporters.passes.requantise import compare_codes, cut_codes, make_late, pool_codes, skip_bounds, skip_roundings
from edgeadapt.exporters.passes.simplify import drop_unread, simplify
from tests.lowered import Arrays, run

FLOAT, CODE = np.float32, np.dtype(np.uint8)
SHAPE = (4, 3, 6, 6)
ONE, CHANNELS = np.array(0.05, FLOAT), np.array([0.05, 0.2, 0.011], FLOAT)
Pass = Callable[[Graph], bool]


class Build:
    """A graph over an input of codes, or of values that become codes."""

    def __init__(self, scale: Any = ONE, zero: Any = 0, runtime: bool = False) -> None:
        self.graph = Graph("g")
        self.codes = self.graph.input("codes", SHAPE, CODE)
        scale = np.asarray(scale, FLOAT)
        self.scale = self.graph.input("scale", scale.shape) if runtime else self.graph.constant(scale)
        self.given = {"scale": scale} if runtime else {}
        self.zero = self.graph.constant(np.broadcast_to(np.asarray(zero, np.uint8), scale.shape))
        self.values = self.made()

    @property
    def axis(self) -> dict[str, int]:
        return {"axis": 1} if self.scale.rank else {}

    def made(self) -> Value:
        """Values from the codes."""
        return self.graph.op("DequantizeLinear", [self.codes, self.scale, self.zero], SHAPE, FLOAT, **self.axis)

    def out(self, *values: Value) -> Graph:
        for index, value in enumerate(values):
            self.graph.output(f"out.{index}", value)
        return self.graph

    def run(self) -> Arrays:
        """For every code there is, at random places."""
        codes = np.random.default_rng(0).permutation(np.resize(np.arange(256), int(np.prod(SHAPE)))).astype(np.uint8).reshape(SHAPE)
        return run(self.graph, {"codes": codes, **self.given})


def operators(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def applied(built: Build, step: Pass) -> list[str]:
    """The operators that are left once a pass has changed the graph; its outputs stay the same to the bit."""
    before = built.run()
    assert step(built.graph)
    drop_unread(built.graph)
    after = built.run()
    assert {name: value.tobytes() for name, value in before.items()} == {name: value.tobytes() for name, value in after.items()}
    assert not step(built.graph)  # and there is no more to do
    return operators(built.graph)


def refused(built: Build, step: Pass) -> None:
    """The pass leaves the graph as it is."""
    nodes = [(node.op, list(node.inputs), list(node.outputs)) for node in built.graph.nodes]
    assert not step(built.graph)
    assert [(node.op, node.inputs, node.outputs) for node in built.graph.nodes] == nodes


def rounded(built: Build, x: Value, scale: Any = None, zero: Any = None, **attributes: Any) -> Value:
    to = built.scale if scale is None else built.graph.constant(np.asarray(scale, FLOAT))
    middle = built.zero if zero is None else built.graph.constant(np.broadcast_to(np.asarray(zero, np.uint8), to.shape))
    where = {"axis": 1} if to.rank else {}
    return built.graph.op("QuantizeLinear", [x, to, middle], x.shape, CODE, **{**where, **attributes})


def negated(built: Build, codes: Value) -> Value:
    """Something that reads codes: they are no graph output themselves."""
    return built.graph.op("BitwiseNot", [codes], codes.shape, CODE)


@pytest.mark.parametrize("scale", [ONE, CHANNELS])
@pytest.mark.parametrize("runtime", [False, True])
def test_values_on_a_grid_are_not_rounded_to_it_again(scale: Any, runtime: bool) -> None:
    built = Build(scale, 7, runtime)
    built.out(negated(built, rounded(built, built.values)))
    assert applied(built, skip_roundings) == ["BitwiseNot"]


@pytest.mark.parametrize(
    ("scale", "to", "attributes"),
    [
        (ONE, {"scale": 0.051}, {}),
        (ONE, {"zero": 8}, {}),
        (ONE, {"scale": CHANNELS}, {}),
        (CHANNELS, {"scale": ONE}, {}),
        (np.array([0.05] * 6, FLOAT), {}, {"axis": 2}),
    ],
    ids=["scale", "zero", "to channels", "to one", "axis"],
)
def test_values_on_another_grid_are_rounded(scale: Any, to: Any, attributes: Any) -> None:
    if attributes:
        built = Build.__new__(Build)
        built.graph = Graph("g")
        built.codes, built.given = built.graph.input("codes", (4, 6, 6, 6), CODE), {}
        built.scale, built.zero = built.graph.constant(scale), built.graph.constant(np.full(6, 7), CODE)
        built.values = built.graph.op("DequantizeLinear", [built.codes, built.scale, built.zero], (4, 6, 6, 6), FLOAT, axis=1)
    else:
        built = Build(scale, 7)
    built.out(negated(built, rounded(built, built.values, **to, **attributes)))
    refused(built, skip_roundings)


def test_codes_that_the_caller_gets_are_made() -> None:
    built = Build()
    built.out(rounded(built, built.values))
    refused(built, skip_roundings)


def test_chains_of_roundings_go_at_once() -> None:
    built = Build(CHANNELS, 3)
    first = rounded(built, built.values)
    again = built.graph.op("DequantizeLinear", [first, built.scale, built.zero], SHAPE, FLOAT, axis=1)
    built.out(negated(built, rounded(built, again)))
    before = built.run()
    while skip_roundings(built.graph):
        pass
    drop_unread(built.graph)
    assert operators(built.graph) == ["BitwiseNot"]
    assert built.run()["0"].tobytes() == before["0"].tobytes()


def bounded(built: Build, op: str, low: float | None = None, high: float | None = None) -> Value:
    ends = [None if end is None else built.graph.constant(end, FLOAT) for end in (low, high)]
    return built.graph.op(op, [built.values, *(ends if op == "Clip" else [])], SHAPE, FLOAT)


TOP = 255 * float(ONE)


@pytest.mark.parametrize("scale", [ONE, CHANNELS])
@pytest.mark.parametrize(
    ("op", "low", "high"), [("Relu", None, None), ("Clip", 0.0, None), ("Clip", -3.0, 60.0), ("Clip", None, 51.1), ("Clip", 0.0, 51.1)]
)
def test_bounds_that_a_grid_does_not_pass_bound_nothing(scale: Any, op: str, low: float | None, high: float | None) -> None:
    built = Build(scale)
    built.out(built.graph.op("Neg", [bounded(built, op, low, high)], SHAPE))
    assert applied(built, skip_bounds) == ["DequantizeLinear", "Neg"]


@pytest.mark.parametrize(
    ("scale", "zero", "op", "low", "high"),
    [
        (ONE, 1, "Relu", None, None),
        (ONE, 128, "Clip", 0.0, None),
        (CHANNELS, [0, 0, 1], "Relu", None, None),
        (-ONE, 0, "Relu", None, None),
        (CHANNELS * np.array([1, 1, -1], FLOAT), 0, "Relu", None, None),
        (ONE, 0, "Clip", 0.0, 0.99 * TOP),
        (CHANNELS, 0, "Clip", 0.0, 1.01 * TOP),
        (ONE, 0, "Clip", 0.1, None),
    ],
    ids=["zero", "middle", "one channel's zero", "negative", "one channel negative", "upper end", "one channel's upper end", "lower end"],
)
def test_bounds_that_a_grid_passes_stay(scale: Any, zero: Any, op: str, low: float | None, high: float | None) -> None:
    built = Build(scale, zero)
    bound = bounded(built, op, low, high)
    built.out(built.graph.op("Neg", [bound], SHAPE), built.graph.op("Neg", [built.values], SHAPE))
    found = built.run()
    assert not np.array_equal(found["0"], found["1"])  # it does bound
    refused(built, skip_bounds)


def test_bounds_are_kept_where_they_are_given_or_the_scale_is_of_a_run() -> None:
    built = Build()
    built.out(bounded(built, "Relu"))
    refused(built, skip_bounds)
    built = Build(runtime=True)
    built.out(built.graph.op("Neg", [bounded(built, "Relu")], SHAPE))
    refused(built, skip_bounds)
    built = Build()
    end = built.graph.input("end", ())
    built.out(built.graph.op("Neg", [built.graph.op("Clip", [built.values, None, end], SHAPE)], SHAPE))
    refused(built, skip_bounds)


def above(built: Build, bound: float = 0.0) -> Value:
    return built.graph.op("Greater", [built.values, built.graph.constant(bound, FLOAT)], SHAPE, np.bool_)


@pytest.mark.parametrize(("scale", "zero"), [(ONE, 0), (ONE, 128), (ONE, 255), (CHANNELS, 0), (CHANNELS, 77)])
def test_what_is_above_zero_is_seen_by_codes(scale: Any, zero: int) -> None:
    built = Build(scale, zero)
    built.out(above(built))
    assert applied(built, compare_codes) == ["Greater"]
    assert built.run()["0"].any() == (zero < 255)


@pytest.mark.parametrize(
    ("scale", "zero", "runtime", "bound"),
    [
        (ONE, 0, False, 0.01),
        (ONE, 0, True, 0.0),
        (-ONE, 0, False, 0.0),
        (np.array(0.0, FLOAT), 0, False, 0.0),
        (CHANNELS, [0, 1, 0], False, 0.0),
        (CHANNELS * np.array([1, -1, 1], FLOAT), 5, False, 0.0),
    ],
    ids=["bound", "runtime", "negative", "no scale", "zeros", "one negative"],
)
def test_other_comparisons_are_of_values(scale: Any, zero: Any, runtime: bool, bound: float) -> None:
    built = Build(scale, zero, runtime)
    built.out(above(built, bound))
    refused(built, compare_codes)


POOL: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}


def pooled(built: Build, places: bool = False) -> Value:
    shape = (4, 3, 3, 3)
    return built.graph.add("MaxPool", [built.values], [(shape, FLOAT), (shape, np.int64)][: 2 if places else 1], **POOL)[0]


@pytest.mark.parametrize(("scale", "zero"), [(ONE, 0), (ONE, 128), (CHANNELS, [0, 9, 255])])
def test_codes_are_pooled(scale: Any, zero: Any) -> None:
    built = Build(scale, zero)
    built.out(built.graph.op("Neg", [pooled(built)], (4, 3, 3, 3)))
    assert applied(built, pool_codes) == ["MaxPool", "DequantizeLinear", "Neg"]
    assert built.graph.values[built.graph.nodes[0].outputs[0]].dtype == CODE


@pytest.mark.parametrize("case", ["negative", "one negative", "runtime", "places", "output"])
def test_what_cannot_be_pooled_as_codes_is_not(case: str) -> None:
    scale = {"negative": -ONE, "one negative": CHANNELS * np.array([1, -1, 1], FLOAT)}.get(case, ONE)
    built = Build(scale, 5, case == "runtime")
    y = pooled(built, case == "places")
    built.out(y if case == "output" else built.graph.op("Neg", [y], (4, 3, 3, 3)))
    refused(built, pool_codes)


def sliced(built: Build, axis: int, source: Value | None = None) -> Value:
    ends = [built.graph.ints([place]) for place in (1, 3, axis)]
    shape = [2 if index == axis else size for index, size in enumerate(SHAPE)]
    return built.graph.op("Slice", [source or built.values, *ends], shape, FLOAT)


@pytest.mark.parametrize("scale", [ONE, CHANNELS])
def test_pieces_of_a_batch_are_cut_from_codes(scale: Any) -> None:
    built = Build(scale, 9)
    built.out(built.graph.op("Neg", [sliced(built, 0)], (2, *SHAPE[1:])))
    assert applied(built, cut_codes) == ["Slice", "DequantizeLinear", "Neg"]
    assert built.graph.values[built.graph.nodes[0].outputs[0]].dtype == CODE


@pytest.mark.parametrize("case", ["channels", "rows", "output", "no codes"])
def test_other_cuts_are_of_values(case: str) -> None:
    built = Build(CHANNELS, 9)
    axis = {"channels": 1, "rows": 2}.get(case, 0)
    y = sliced(built, axis, built.graph.op("Neg", [built.values], SHAPE) if case == "no codes" else None)
    built.out(y if case == "output" else built.graph.op("Abs", [y], y.shape))
    refused(built, cut_codes)


def two_passes(built: Build, output: bool = False) -> Graph:
    """A forward pass whose values a backward one reads twice, and makes codes of its own."""
    graph = built.graph
    mean = graph.op("ReduceMean", [built.values], (), keepdims=0)
    early = graph.op("Neg", [built.values], SHAPE)
    graph.end_forward()
    late = graph.op("Mul", [built.values, mean], SHAPE)
    more = graph.op("Add", [late, built.values], SHAPE)
    own = graph.op("DequantizeLinear", [rounded(built, more), built.scale, built.zero], SHAPE, FLOAT, **built.axis)
    return built.out(early, graph.op("Abs", [own], SHAPE), *([built.values] if output else []))


@pytest.mark.parametrize("scale", [ONE, CHANNELS])
@pytest.mark.parametrize("runtime", [False, True])
def test_a_backward_pass_makes_values_from_codes_again(scale: Any, runtime: bool) -> None:
    built = Build(scale, 9, runtime)
    graph = two_passes(built)
    early = ["DequantizeLinear", "ReduceMean", "Neg"]
    assert applied(built, make_late) == [*early, "DequantizeLinear", "Mul", "Add", "QuantizeLinear", "DequantizeLinear", "Abs"]
    first, again = graph.nodes[0], graph.nodes[3]
    assert graph.late(again)
    assert not graph.late(first)
    readers = graph.readers()
    assert {graph.nodes[index].op for index in readers[first.outputs[0]]} == {"ReduceMean", "Neg"}
    assert {graph.nodes[index].op for index in readers[again.outputs[0]]} == {"Mul", "Add"}


def test_without_a_backward_pass_nothing_is_made_again() -> None:
    built = Build()
    built.out(built.graph.op("Neg", [built.values], SHAPE), built.graph.op("Abs", [built.values], SHAPE))
    refused(built, make_late)


def test_all_passes_together_leave_codes_between_a_rounded_relu_and_its_readers() -> None:
    built = Build(CHANNELS)
    relu = bounded(built, "Relu")
    rounds = rounded(built, relu)
    again = built.graph.op("DequantizeLinear", [rounds, built.scale, built.zero], SHAPE, FLOAT, axis=1)
    mask = built.graph.op("Greater", [again, built.graph.constant(0.0, FLOAT)], SHAPE, np.bool_)
    pool = built.graph.op("MaxPool", [again], (4, 3, 3, 3), **POOL)
    built.out(negated(built, rounded(built, again)), mask, built.graph.op("Neg", [pool], (4, 3, 3, 3)))
    before = built.run()
    simplify(built.graph)
    assert sorted(operators(built.graph)) == ["BitwiseNot", "DequantizeLinear", "Greater", "MaxPool", "Neg"]
    assert {name: value.tobytes() for name, value in before.items()} == {name: value.tobytes() for name, value in built.run().items()}
    graph = built.graph
    assert [graph.values[name].shape for node in graph.nodes if node.op == "DequantizeLinear" for name in node.outputs] == [(4, 3, 3, 3)]
