"""The count of a graph's memory: by hand on small graphs, and against onnxruntime's own profiler."""

from __future__ import annotations

import platform
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeadapt.errors import BundleError
from edgeadapt.memory import Graph, Machine, Node, Plan, Tensor, best_order, fits, read, region, smallest, suited
from edgeadapt.memory.region import Region
from tests.child import TELLS, run_json

pytestmark = pytest.mark.device


def chain(*operators: str, sizes: int = 64) -> Graph:
    """x → operators → y, all float32 of one size."""
    graph = Graph(inputs=["x"], outputs=["y"])
    names = ["x", *(f"t{index}" for index in range(len(operators) - 1)), "y"]
    graph.values = {name: Tensor((sizes,), 32) for name in names}
    graph.nodes = [Node(op, [a], [b]) for op, a, b in zip(operators, names[:-1], names[1:], strict=True)]
    return graph


def test_outputs_are_taken_before_inputs_are_freed() -> None:
    assert Plan(chain("Exp", "Exp", "Exp")).curve() == [256, 512, 256]


def test_in_place_operators_and_views_take_no_second_block() -> None:
    assert Plan(chain("Exp", "Relu", "Reshape", "Exp")).curve() == [256, 256, 256, 256]
    assert Plan(chain("Exp", "Tanh", "Identity", "Sigmoid", "Exp")).curve() == [256, 256, 256, 256, 256]
    assert Plan(chain("Exp", "Sqrt", "Exp")).peak == 512


def test_a_tensor_that_is_read_later_is_not_written_over() -> None:
    graph = chain("Exp", "Relu", "Exp")
    graph.nodes.append(Node("Neg", ["t0"], ["z"]))
    graph.values["z"] = Tensor((64,), 32)
    graph.outputs.append("z")
    assert Plan(graph).curve() == [256, 512, 512, 256]


def test_what_nobody_reads_stays_to_the_end() -> None:
    graph = chain("Exp", "Exp", "Exp")
    graph.nodes.insert(1, Node("Exp", ["x"], ["unread"]))
    graph.values["unread"] = Tensor((64,), 32)
    assert Plan(graph).curve() == [256, 512, 768, 512]


def test_a_cast_is_in_place_between_types_of_one_size_only() -> None:
    graph = chain("Not", "Cast", "Cast", "Exp")
    graph.values |= {"t0": Tensor((64,), 8), "t1": Tensor((64,), 8)}
    assert Plan(graph).after() == [256, 256, 512, 256]
    assert Plan(graph).sizes == {"t0": 256, "t2": 256}


def test_what_stands_at_a_node_is_named() -> None:
    plan = Plan(chain("Exp", "Exp", "Exp"))
    assert set(plan.standing(1)) == {"t0", "t1"}
    assert set(plan.standing(2)) == {"t1"}


def test_a_file_without_a_graph_or_with_torn_fields_is_refused() -> None:
    with pytest.raises(BundleError, match="no graph"):
        read(b"")
    with pytest.raises(BundleError, match="cannot be read"):
        read(conv_step(1).SerializeToString()[:200])


def conv_step(batch: int) -> onnx.ModelProto:
    """Convolutions of several kinds and their input gradients, with residual ways, masks, reductions and products."""
    nodes, inputs = [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8, 16, 16])]
    weights, values = [], {}
    generator = np.random.default_rng(0)

    def add(op: str, sources: list[str], shape: list[int], kind: int = TensorProto.FLOAT, **attributes: object) -> str:
        name = f"{op.lower()}{len(nodes)}"
        nodes.append(helper.make_node(op, sources, [name], name=f"{len(nodes)}:layer.{op}", **attributes))
        values[name] = helper.make_tensor_value_info(name, kind, shape)
        return name

    def weight(*shape: int) -> str:
        name = f"w{len(weights)}"
        weights.append(onnx.numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32) * 0.1, name))
        return name

    def conv(x: str, w: str, shape: list[int], stride: int = 1, pad: int = 1, group: int = 1) -> str:
        kernel = [3, 3] if pad else [1, 1]
        return add("Conv", [x, w], shape, kernel_shape=kernel, strides=[stride] * 2, pads=[pad] * 4, group=group)

    full, half = [batch, 8, 16, 16], [batch, 16, 8, 8]
    a = conv("x", weight(8, 8, 3, 3), full)
    r = add("Relu", [a], full)
    d = conv(r, weight(8, 1, 3, 3), full, group=8)
    s = add("Add", [d, r], full)
    zero = weight()
    mask = add("Greater", [s, zero], full, TensorProto.BOOL)
    t = add("Relu", [s], full)
    w = weight(16, 8, 3, 3)
    e = conv(t, w, half, stride=2)
    p = conv(e, weight(16, 16, 1, 1), half, pad=0)
    deep = conv(conv(p, weight(80, 16, 3, 3), [batch, 80, 4, 4], stride=2), weight(80, 80, 3, 3), [batch, 80, 4, 4])
    total = add("ReduceMean", [deep], [batch, 80, 1, 1], keepdims=1)
    values.pop(total)
    nodes[-1].input.append("axes")
    weights.append(onnx.numpy_helper.from_array(np.array([2, 3]), "axes"))
    back = add("ConvTranspose", [p, w], full, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])
    back = add("Mul", [back, add("Cast", [mask], full, to=TensorProto.FLOAT)], full)
    flat = add("Flatten", [back], [batch, 2048])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 2048])
    nodes.append(helper.make_node("Softmax", [flat], ["y"], name="last"))
    outputs = [result, helper.make_tensor_value_info(total, TensorProto.FLOAT, [batch, 80, 1, 1])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights, value_info=list(values.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


OPERATORS: dict[str, tuple[str, dict[str, object]]] = {
    "activations": ("Exp Sigmoid Exp Tanh Exp LeakyRelu Exp Elu Exp Celu Exp Selu Exp Softplus Exp Softsign Exp HardSigmoid Exp ThresholdedRelu", {}),
    "arithmetic": ("Exp Sqrt Neg Abs Reciprocal Floor Ceil Round Sign Sin Cos Erf Gelu Exp", {}),
    "softmax over the last axis": ("Exp Softmax Exp LogSoftmax Exp", {"axis": 3}),
    "softmax over another axis": ("Exp Softmax Exp LogSoftmax Exp", {"axis": 1}),
    "identity": ("Exp Identity Relu Identity Exp", {}),
    "clip and triangle": ("Exp Clip Exp Trilu Exp", {}),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_each_operator_is_in_place_or_not_as_the_profiler_says(tmp_path: Path, name: str) -> None:
    operators, attributes = OPERATORS[name]
    nodes, shape = [], [2, 8, 16, 16]
    for index, op in enumerate(operators.split()):
        nodes.append(helper.make_node(op, [f"t{index}"], [f"t{index + 1}"], **(attributes if "max" in op else {})))
    profiled(tmp_path, nodes, shape)


def test_masks_casts_choices_and_unread_tensors_are_as_the_profiler_says(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Greater", ["t0", "zero"], ["mask"]),
        helper.make_node("Not", ["mask"], ["other"]),
        helper.make_node("Cast", ["other"], ["bytes"], to=TensorProto.UINT8),
        helper.make_node("BitwiseAnd", ["bytes", "bytes"], ["both"]),
        helper.make_node("Exp", ["t0"], ["unread"]),
        helper.make_node("Split", ["t0"], ["left", "unread_right"], axis=1, num_outputs=2),
        helper.make_node("Concat", ["left", "left"], ["t1"], axis=1),
        helper.make_node("Cast", ["both"], ["again"], to=TensorProto.BOOL),
        helper.make_node("Where", ["again", "t1", "zero"], ["t2"]),
        helper.make_node("ScatterElements", ["t2", "places", "t1"], ["t3"], axis=0),
        helper.make_node("Exp", ["t3"], ["t4"]),
        helper.make_node("Exp", ["t4"], ["t5"]),
    ]
    places = np.zeros([2, 8, 16, 16], np.int64)
    places[1] = 1
    profiled(tmp_path, nodes, [2, 8, 16, 16], {"zero": np.zeros((), np.float32), "places": places})


def profiled(folder: Path, nodes: list[onnx.NodeProto], shape: list[int], constants: dict[str, np.ndarray] | None = None) -> None:
    """The count of nodes that take t0 and give the last one's output is the profiler's, node by node and in its peak."""
    given = [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("t0", nodes[-1].output[0])]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    found = run_json([sys.executable, "-c", PROFILED, str(path), "1"])
    agree(found, Plan(read(path.read_bytes())))


def agree(found: dict[str, Any], plan: Plan) -> None:
    """What the profiler told is what is counted."""
    if TELLS:
        assert [value - found["base"] for value in found["in_use"]] == plan.after()
        assert found["peak"] - found["base"] == plan.peak
    else:
        assert found["in_use"] == []


PROFILED = """
import json, sys
from edgeadapt.runtime import profiling
model, threads = open(sys.argv[1], "rb").read(), int(sys.argv[2])
found = profiling.memory_of(model, ".", threads)
print(json.dumps({"in_use": found.in_use, "peak": found.peak, "base": found.base}))
"""


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_count_is_the_profilers_to_the_byte(tmp_path: Path, batch: int, threads: int) -> None:
    model = conv_step(batch)
    path = tmp_path / "step.onnx"
    path.write_bytes(model.SerializeToString())
    found = run_json([sys.executable, "-c", PROFILED, str(path), str(threads)])
    agree(found, Plan(read(path.read_bytes()), machine=Machine(threads, platform.machine() == "aarch64")))


def test_a_region_is_laid_out_best_fit_and_joined_again() -> None:
    region = Region(1024)
    assert region.allocate("a", 256)
    assert region.allocate("b", 256)
    assert region.allocate("c", 256)
    region.free("b")
    assert region.allocate("d", 256)  # at the end: equal sizes, the lower address first
    region.free("a")
    assert not region.allocate("e", 768)
    region.free("c")
    region.free("d")
    assert region.allocate("e", 1024)


def test_the_smallest_region_fits_and_what_is_in_use_does_not_always() -> None:
    generator = random.Random(3)
    graph = Graph(inputs=["x"], outputs=["y"], values={"x": Tensor((1,), 32), "y": Tensor((1,), 32)})
    live: list[str] = ["x"]
    for index in range(200):
        name = f"t{index}"
        graph.values[name] = Tensor((generator.choice([64, 700, 5000, 9000]),), 32)
        graph.nodes.append(Node("Exp", generator.sample(live, min(3, len(live))), [name]))
        live = [*live[-12:], name]
    graph.nodes.append(Node("Exp", [live[-1]], ["y"]))
    plan = Plan(graph)
    size = smallest(plan)
    assert plan.peak <= size < 1.5 * plan.peak
    assert fits(plan, size)
    assert not fits(plan, plan.peak - 256)
    region = Region(size)
    assert region.run(plan)
    assert region.allocate("all", size)  # whole again, so one run tells what all runs find


def test_an_order_keeps_what_depends_on_what() -> None:
    graph = read(conv_step(2).SerializeToString())
    order = best_order(graph)
    assert sorted(order) == list(range(len(graph.nodes)))
    made = {*graph.inputs, *graph.constants}
    for index in order:
        assert all(name in made for name in graph.nodes[index].inputs)
        made.update(graph.nodes[index].outputs)
    assert Plan(graph, order).peak <= Plan(graph).peak


def test_one_size_suits_all_plans_or_none_does(monkeypatch) -> None:
    def plan(*sizes: int) -> Plan:
        names = ["x", *(f"t{index}" for index in range(len(sizes)))]
        graph = Graph([Node("Exp", [names[index]], [names[index + 1]]) for index in range(len(sizes))], inputs=["x"], outputs=[names[-1]])
        graph.values = {name: Tensor((size // 4,), 32) for name, size in zip(names, (256, *sizes))}
        return Plan(graph)

    small, large = plan(4096, 8192, 256), plan(65536, 131072, 256)  # the last is the caller's
    assert suited(200_000, [lambda: small, lambda: large]) == 200_192
    found = suited(150_000, [lambda: small, lambda: large])
    assert found is not None
    assert found >= large.peak > found - 4096
    assert suited(1000, [lambda: large]) is None
    refused = {200_192, 204_288}
    monkeypatch.setattr(region, "fits", lambda one, size: one is small or size not in refused)
    assert suited(200_000, [lambda: small, lambda: large]) == 208_384
