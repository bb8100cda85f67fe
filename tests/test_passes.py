"""Graph passes: what they remove, that values stay, and what the memory plan says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.emit import to_onnx
from edgeadapt.exporters.ir import Graph
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.passes.simplify import (
    absorb_transposes,
    drop_unread,
    fold_constants,
    join_views,
    merge_equal,
    shrink_scalings,
    simplify,
    skip_expansions,
)
from edgeadapt.exporters.programs import Model, build
from edgeadapt.exporters.tracing import declare_inputs, emit, trace
from edgeadapt.memory import Plan, best_order
from tests.zoo import named
from tests.zoo.calibrate import calibrate

FLOAT = np.float32


def values(graph: Graph, seed: int = 0) -> list[Any]:
    """The graph's outputs for random inputs."""
    random = np.random.default_rng(seed)
    feeds = {name: random.standard_normal(graph.values[name].shape).astype(FLOAT) for name in graph.inputs}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(to_onnx(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def operators(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_constants_are_folded_but_large_ones_are_not_copied() -> None:
    graph = Graph("g")
    x = graph.input("x", (4, 4))
    small = graph.op("Sqrt", [graph.constant(np.full((4,), 4.0, FLOAT))], (4,))
    weight = graph.weight("w", np.ones((300, 300), FLOAT))
    large = graph.op("Transpose", [weight], (300, 300), perm=[1, 0])
    graph.output("y", graph.op("Mul", [x, small], (4, 4)))
    graph.output("z", graph.op("ReduceSum", [large], (), keepdims=0))
    before = values(graph)
    assert fold_constants(graph)
    assert operators(graph) == ["Transpose", "Mul", "ReduceSum"] or operators(graph) == ["Transpose", "Mul"]
    for old, new in zip(before, values(graph), strict=True):
        np.testing.assert_array_equal(old, new)


def test_equal_nodes_share_a_result_and_different_ones_do_not() -> None:
    graph = Graph("g")
    x = graph.input("x", (2, 3))
    a, b = graph.op("Relu", [x], (2, 3)), graph.op("Relu", [x], (2, 3))
    c, d = graph.op("Softmax", [x], (2, 3), axis=0), graph.op("Softmax", [x], (2, 3), axis=1)
    graph.output("y", graph.op("Sub", [graph.op("Add", [a, b], (2, 3)), graph.op("Sub", [c, d], (2, 3))], (2, 3)))
    before = values(graph)
    assert merge_equal(graph)
    assert operators(graph).count("Relu") == 1
    assert operators(graph).count("Softmax") == 2
    np.testing.assert_array_equal(before[0], values(graph)[0])


def test_chains_of_equal_nodes_merge_in_one_pass() -> None:
    graph = Graph("g")
    x = graph.input("x", (2, 3))
    ends = []
    for _ in range(3):
        value = x
        for op in ("Relu", "Exp", "Neg", "Tanh"):
            value = graph.op(op, [value], (2, 3))
        ends.append(value)
    graph.output("y", graph.op("Sum", ends, (2, 3)))
    before = values(graph)
    assert merge_equal(graph)
    assert operators(graph) == ["Relu", "Exp", "Neg", "Tanh", "Sum"]
    assert not merge_equal(graph)
    np.testing.assert_array_equal(before[0], values(graph)[0])


def test_every_scaling_moves_before_its_expansion_in_one_pass() -> None:
    graph = Graph("g")
    small = graph.input("small", (1, 3))
    for index in range(3):
        wide = graph.op("Expand", [graph.op("Exp", [small], (1, 3)), graph.ints([4, 3])], (4, 3))
        scaled = graph.op("Mul", [wide, graph.constant(2.0 + index, FLOAT)], (4, 3))
        graph.output(f"y{index}", graph.op("Div", [scaled, graph.constant(5.0, FLOAT)], (4, 3)))
    before = values(graph)
    assert shrink_scalings(graph)
    assert not shrink_scalings(graph)
    drop_unread(graph)
    assert operators(graph) == ["Exp", "Mul", "Div", "Expand"] * 3
    for old, new in zip(before, values(graph), strict=True):
        np.testing.assert_array_equal(old, new)


def test_places_of_maxima_that_nobody_reads_are_not_asked_for() -> None:
    graph = Graph("g")
    x = graph.input("x", (1, 2, 4, 4))
    shapes = [((1, 2, 2, 2), np.dtype(FLOAT)), ((1, 2, 2, 2), np.dtype(np.int64))]
    for index in range(2):
        y, places = graph.add("MaxPool", [x], shapes, kernel_shape=[2, 2], strides=[2, 2])
        graph.output(f"y{index}", graph.op("Exp", [y], y.shape))
    graph.output("places", places)
    drop_unread(graph)
    assert [len(node.outputs) for node in graph.nodes if node.op == "MaxPool"] == [1, 2]
    values(graph)
    nodes = graph.nodes
    graph.outputs.remove("places")
    assert drop_unread(graph)
    assert [len(node.outputs) for node in nodes if node.op == "MaxPool"] == [1, 2]  # whoever holds the nodes from before can go back to them


def test_views_of_views_and_transposes_are_absorbed() -> None:
    graph = Graph("g")
    x, w = graph.input("x", (2, 3, 4)), graph.input("w", (5, 12))
    flat = graph.op("Reshape", [graph.op("Reshape", [x, graph.ints([6, 4])], (6, 4)), graph.ints([2, 12])], (2, 12))
    turned = graph.op("Transpose", [w], (12, 5), perm=[1, 0])
    graph.output("y", graph.op("MatMul", [flat, turned], (2, 5)))
    before = values(graph)
    assert join_views(graph)
    assert absorb_transposes(graph)
    drop_unread(graph)
    assert operators(graph) == ["Reshape", "Gemm"]
    np.testing.assert_allclose(before[0], values(graph)[0], rtol=1e-6)


def test_expansions_before_elementwise_operators_are_skipped_only_where_the_shape_stays() -> None:
    graph = Graph("g")
    x, small = graph.input("x", (4, 3)), graph.input("small", (1, 3))
    wide = graph.op("Expand", [small, graph.ints([4, 3])], (4, 3))
    graph.output("y", graph.op("Mul", [x, wide], (4, 3)))
    graph.output("z", graph.op("Mul", [graph.op("Expand", [small, graph.ints([4, 3])], (4, 3)), graph.constant(2.0, FLOAT)], (4, 3)))
    before = values(graph)
    assert skip_expansions(graph)
    assert shrink_scalings(graph)
    drop_unread(graph)
    assert operators(graph) == ["Mul", "Mul", "Expand"]
    for old, new in zip(before, values(graph), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.fixture(scope="module")
def step() -> Graph:
    """An adaptation step, as lowered."""
    model = named.resnet_cifar(8)
    calibrate(model, (3, 16, 16), 0)
    method = METHODS["ecotta"](capture(model, (3, 16, 16), 4), Setup(10, 2))
    start = {**method.backbone.source_statistics(), **method.own_statistics()}
    program = build(Model(method, method.parameters(), start, "live", "sgd"), "adapt", 4, torch.randn(4, 3, 16, 16))
    graph = Graph("step")
    for name, value in emit(trace(program, program.example), graph, declare_inputs(graph, program.example, program.frozen)).items():
        graph.output(name, value)
    simplify(graph)
    return graph


def test_a_schedule_keeps_the_values_lowers_the_peak_and_is_deterministic(step: Graph) -> None:
    before, nodes, peak = values(step), list(step.nodes), Plan(step).peak
    order = best_order(step)
    assert Plan(step, order).peak < peak
    step.nodes = [step.nodes[index] for index in order]
    assert Plan(step).peak == Plan(step, range(len(order))).peak
    produced = set(step.inputs) | set(step.constants)
    for node in step.nodes:
        assert all(name in produced for name in node.inputs if name)
        produced.update(node.outputs)
    for old, new in zip(before, values(step), strict=True):
        np.testing.assert_array_equal(old, new)
    step.nodes = nodes
    assert best_order(step) == order


def test_the_two_evaluations_of_a_meta_network_are_one_in_the_graph(step: Graph) -> None:
    convolutions = [node for node in step.nodes if node.op == "Conv" and any("meta." in name for name in node.inputs)]
    assert len(convolutions) == 2
