"""Memory of 8-bit operators: by hand on small graphs, and against onnxruntime's own profiler."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeadapt.memory import Graph, Machine, Plan, Tensor, footprint, read, rules, smallest
from edgeadapt.memory import quantised as quantised_rules
from edgeadapt.memory.graph import Node
from edgeadapt.memory.rules import KNOWN, blocks
from tests.child import TELLS, run_json

pytestmark = pytest.mark.device

MICROSOFT = "com.microsoft"
SHAPE = [2, 16, 12, 12]
SCALE, ZERO = np.float32(0.02), np.uint8(3)

CHILD = """
import json, sys
from pathlib import Path
from edgeadapt.runtime import profiling, session
chosen = session.options(int(sys.argv[2]))
if sys.argv[3] == "False":
    chosen.add_session_config_entry("session.disable_prepacking", "1")
found = profiling.memory_of(Path(sys.argv[1]).read_bytes(), ".", int(sys.argv[2]), options=chosen)
print(json.dumps({"in_use": found.in_use, "peak": found.peak, "base": found.base}))
"""


def model(nodes: list[onnx.NodeProto], given: dict[str, tuple[int, list[int]]], constants: dict[str, Any], outputs: list[str]) -> bytes:
    """A model whose shapes are those of a run: onnx does not infer those of onnxruntime's own operators."""
    import onnxruntime

    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in given.items()]
    kept = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    names = [name for node in nodes for name in node.output if name]

    def made(values: list[onnx.ValueInfoProto], shown: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        return helper.make_model(helper.make_graph(nodes, "g", inputs, shown, kept, value_info=values), opset_imports=imports, ir_version=9)

    chosen = onnxruntime.SessionOptions()
    chosen.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    whole = made([], [onnx.ValueInfoProto(name=name) for name in names])
    session = onnxruntime.InferenceSession(whole.SerializeToString(), chosen, providers=["CPUExecutionProvider"])
    feeds = {name: np.ones(shape, helper.tensor_dtype_to_np_dtype(kind)) for name, (kind, shape) in given.items()}
    found = session.run_with_ort_values(names, {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()})
    values = {name: helper.make_tensor_value_info(name, value.element_type(), value.shape()) for name, value in zip(names, found, strict=True)}
    data: bytes = made([values[name] for name in names if name not in outputs], [values[name] for name in outputs]).SerializeToString()
    return data


def agree(folder: Path, data: bytes, threads: int = 1, prepacking: bool = True) -> Plan:
    """The count of a graph is the profiler's, node by node, in its peak and in the copies of its weights."""
    graph, machine = read(data), Machine.here(threads, prepacking)
    assert graph.countable
    plan, (inside, beside) = Plan(graph, machine=machine), footprint.prepacked(graph, machine)
    path = folder / "graph.onnx"
    path.write_bytes(data)
    found = run_json([sys.executable, "-c", CHILD, str(path), str(threads), str(prepacking)])
    if not TELLS:
        assert found["in_use"] == []
        return plan
    assert [value - found["base"] for value in found["in_use"]] == plan.after()
    loading = max((graph.values[quantised_rules.weight_of(node)].nbytes for node in graph.nodes if quantised_rules.weight_of(node)), default=0)
    told = found["peak"] - found["base"]
    assert told == plan.peak or plan.peak < told <= loading * prepacking  # one copy is turned round while it is packed, before any run
    small = found["base"] - inside - beside
    assert 0 <= small <= 1.2 * sum(graph.constants.values())  # scales, zero points and the like are taken as they are, weights are not
    assert small <= sum(size for size in graph.constants.values() if size < 1024)
    return plan


def convolution(
    index: int, shape: list[int], out: int, kernel: int, stride: int = 1, group: int = 1, **options: Any
) -> tuple[list[Any], dict[str, Any]]:
    """A QLinearConv of t(index) that gives t(index + 1), with its constants. Options: pad, last, bare (no bias)."""
    going, generator = shape[-1 if options.get("last") else 1], np.random.default_rng(index)
    pad = options.get("pad", kernel // 2)
    constants = {
        f"w{index}": generator.integers(-100, 100, (out, going // group, kernel, kernel)).astype(np.int8),
        f"ws{index}": np.full(out, 0.01, np.float32),
        f"wz{index}": np.zeros(out, np.int8),
        f"b{index}": np.zeros(out, np.int32),
        "scale": SCALE,
        "zero": ZERO,
    }
    names = [f"t{index}", "scale", "zero", f"w{index}", f"ws{index}", f"wz{index}", "scale", "zero", f"b{index}"]
    attributes: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4, "group": group}
    if options.get("last"):
        attributes |= {"channels_last": 1, "domain": MICROSOFT}
    node = helper.make_node("QLinearConv", names[: 8 if options.get("bare") else 9], [f"t{index + 1}"], **attributes)
    return [node], constants


def convolutions(last: bool, seed: int) -> Iterator[tuple[list[Any], dict[str, Any], list[int]]]:
    """Chains of convolutions of many kinds."""
    pick = random.Random(seed)
    for _ in range(6):
        batch, side = pick.choice([1, 2, 3]), pick.choice([7, 8, 16])
        channels = pick.choice([3, 4, 16, 24, 64, 68])
        shape = [batch, side, side, channels] if last else [batch, channels, side, side]
        nodes: list[Any] = []
        constants: dict[str, Any] = {}
        for index in range(5):
            kernel, stride = pick.choice([(1, 1), (3, 1), (3, 2), (1, 2), (5, 1)])
            group = pick.choice([1, 1, 1, channels, 4 if channels % 4 == 0 else 1])
            out = channels if group == channels else pick.choice([4, 16, 20, 24, 48, 64, 80])
            given, bare = [*shape[:3], channels] if last else [batch, channels, side, side], pick.random() < 0.4
            node, more = convolution(index, given, out, kernel, stride, group, last=last, bare=bare)
            if bare:
                more.pop(f"b{index}")
            nodes, constants, channels = nodes + node, {**constants, **more}, out
        yield nodes, constants, shape


@pytest.mark.parametrize("prepacking", [True, False])
@pytest.mark.parametrize("last", [False, True])
def test_convolutions_of_every_kind_are_as_the_profiler_says(tmp_path: Path, last: bool, prepacking: bool) -> None:
    for seed, (nodes, constants, shape) in enumerate(convolutions(last, 7)):
        ends = [helper.make_node("DequantizeLinear", ["t5", "scale", "zero"], ["y"])]
        data = model([*nodes, *ends], {"t0": (TensorProto.UINT8, shape)}, constants, ["y"])
        agree(tmp_path, data, 1 + seed % 2, prepacking)


@pytest.mark.parametrize("moved", [[], ["zero"]])
def test_copies_of_weights_that_two_nodes_read_are_as_the_profiler_says(tmp_path: Path, moved: list[str]) -> None:
    """The kernel that writes bytes itself keeps its copy for each node, the others one for all."""
    for out, group in ((64, 1), (24, 24)):
        shape = [1, out, 16, 16]  # large enough to take more than loading does
        (first,), constants = convolution(0, shape, out, 3, 1, group)
        second = onnx.NodeProto.FromString(first.SerializeToString())
        second.output[0] = "t2"
        given = {"t0": (TensorProto.UINT8, shape), **{name: (TensorProto.UINT8, []) for name in moved}}
        kept = {name: array for name, array in constants.items() if name not in moved}
        end = quantised("QLinearAdd", "t1", "scale", "zero", "t2", "scale", "zero", "scale", "zero", outputs=("y",), own=True)
        agree(tmp_path, model([first, second, end], given, kept, ["y"]))


def test_weights_scales_and_zero_points_may_come_from_the_caller(tmp_path: Path) -> None:
    (node,), constants = convolution(0, SHAPE, 32, 3)
    for moved in (["zero"], ["w0"], ["b0"], ["scale", "ws0"]):
        given = {"t0": (TensorProto.UINT8, SHAPE)}
        given |= {name: (helper.np_dtype_to_tensor_dtype(np.asarray(constants[name]).dtype), list(np.shape(constants[name]))) for name in moved}
        kept = {name: array for name, array in constants.items() if name not in moved}
        end = helper.make_node("DequantizeLinear", ["t1", "scale", "zero"], ["y"])
        agree(tmp_path, model([node, end], given, kept, ["y"]))


def quantised(op: str, *sources: str, outputs: tuple[str, ...] = ("t",), own: bool = False, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(sources), list(outputs), domain=MICROSOFT if own else "", **attributes)


PAIR = ("q", "scale", "zero", "r", "scale", "zero", "scale", "zero")
MATRIX = ("m", "scale", "zero", "w", "scale", "wz")
CHAINS: dict[str, list[onnx.NodeProto]] = {
    "bytes by channels": [
        quantised("QuantizeLinear", "e", "scales", "zeros", outputs=("a",), axis=1),
        quantised("DequantizeLinear", "a", "scales", "zeros", outputs=("t",), axis=1),
    ],
    "scales of a run": [
        quantised("DynamicQuantizeLinear", "e", outputs=("a", "as", "az")),
        quantised("DequantizeLinear", "a", "as", "az", outputs=("b",)),
        quantised("QuantizeLinear", "b", "as", "az", outputs=("t",)),
    ],
    "sums": [quantised("QLinearAdd", *PAIR, outputs=("a",), own=True), quantised("QLinearMul", "a", *PAIR[1:], own=True)],
    "joined": [quantised("QLinearConcat", "scale", "zero", *PAIR[:6], own=True, axis=1)],
    "activations": [
        quantised("QLinearSigmoid", *PAIR[:3], "scale", "zero", outputs=("a",), own=True),
        quantised("QLinearLeakyRelu", "a", "scale", "zero", "scale", "zero", own=True),
    ],
    "choices": [
        quantised("Greater", "q", "r", outputs=("a",)),
        quantised("QLinearWhere", "a", *PAIR, own=True),
    ],
    "pooling": [
        quantised("QLinearAveragePool", *PAIR[:3], "scale", "zero", outputs=("a",), own=True, kernel_shape=[2, 2], strides=[2, 2]),
        quantised("QLinearGlobalAveragePool", "a", "scale", "zero", "scale", "zero", outputs=("b",), own=True),
        quantised("QLinearSoftmax", "b", "scale", "zero", "scale", "zero", own=True, axis=1, opset=13),
    ],
    "largest of bytes": [
        quantised("Transpose", "q", outputs=("a",), perm=[0, 2, 3, 1]),
        quantised("NhwcMaxPool", "a", outputs=("b",), own=True, kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1]),
        quantised("QLinearAveragePool", "b", "scale", "zero", "scale", "zero", own=True, kernel_shape=[2, 2], channels_last=1),
    ],
    "products": [
        quantised("Flatten", "q", outputs=("m",)),
        quantised("QLinearMatMul", *MATRIX, "scale", "zero", outputs=("a",)),
        quantised("MatMulInteger", "m", "w", "zero", "wz", outputs=("c",)),
        quantised("Clip", "c", "low", "high", outputs=("d",)),
        quantised("Cast", "d", outputs=("f",), to=TensorProto.UINT8),
        quantised("QLinearAdd", "a", *PAIR[1:3], "f", *PAIR[4:], own=True),
    ],
    "fused products": [
        quantised("Flatten", "q", outputs=("m",)),
        quantised("QGemm", *MATRIX, "", "scale", "zero", outputs=("a",), own=True),
        quantised("QGemm", "m", "scale", "zero", "turned", "scale", "wz", outputs=("b",), own=True, transB=1),
        quantised("MatMulIntegerToFloat", "m", "w", "scale", "scale", "zero", "wz", outputs=("c",), own=True),
        quantised("DynamicQuantizeMatMul", "c", "square", "scale", "wz", outputs=("d",), own=True),
        quantised("QuantizeLinear", "b", "scale", "zero", outputs=("f",), own=True),
        quantised("QLinearAdd", "a", *PAIR[1:3], "f", *PAIR[4:], outputs=("g",), own=True),
        quantised("DequantizeLinear", "g", "scale", "zero", outputs=("h",), own=True),
        quantised("Add", "h", "d"),
    ],
    "bits": [
        quantised("BitwiseAnd", "q", "r", outputs=("a",)),
        quantised("BitwiseOr", "a", "r", outputs=("b",)),
        quantised("BitwiseXor", "b", "r", outputs=("c",)),
        quantised("BitShift", "c", "zero", outputs=("d",), direction="LEFT"),
        quantised("Clip", "d", "zero", "most", outputs=("f",)),
        quantised("Split", "f", outputs=("g", "h"), axis=1, num_outputs=2),
        quantised("Concat", "h", "g", outputs=("i",), axis=1),
        quantised("Slice", "i", "from", "to", "axes"),
    ],
    "small forms": [
        quantised("Round", "e", outputs=("a",)),
        quantised("Cast", "a", outputs=("b",), to=TensorProto.INT8),
        quantised("Abs", "b", outputs=("c",)),
        quantised("Cast", "c", outputs=("d",), to=TensorProto.INT16),
        quantised("Sign", "d", outputs=("f",)),
        quantised("Cast", "f", outputs=("g",), to=TensorProto.BFLOAT16),
        quantised("Reshape", "g", "shape", outputs=("h",)),
        quantised("Cast", "h", outputs=("i",), to=TensorProto.INT32),
        quantised("Neg", "i", outputs=("j",)),
        quantised("Cast", "j", outputs=("k",), to=TensorProto.UINT16),
        quantised("Transpose", "k", outputs=("l",), perm=[0, 1, 3, 2]),
        quantised("Cast", "l", outputs=("n",), to=TensorProto.BOOL),
        quantised("Not", "n", outputs=("o",)),
        quantised("Cast", "o", outputs=("p",), to=TensorProto.FLOAT),
        quantised("ReduceMax", "p", "axes", outputs=("m",)),
        quantised("ReduceMin", "m", "first"),
    ],
}


@pytest.mark.parametrize("prepacking", [True, False])
@pytest.mark.parametrize("name", CHAINS)
def test_each_operator_on_bytes_is_as_the_profiler_says(tmp_path: Path, name: str, prepacking: bool) -> None:
    generator, depth = np.random.default_rng(0), int(np.prod(SHAPE[1:]))
    weight = generator.integers(-100, 100, (depth, 10)).astype(np.int8)
    constants = {
        **{"scale": SCALE, "zero": ZERO, "scales": np.full(16, 0.02, np.float32), "zeros": np.full(16, 3, np.uint8)},
        **{"w": weight, "turned": np.ascontiguousarray(weight[::-1].T), "wz": np.int8(0), "square": weight[:10]},
        **{"low": np.int32(0), "high": np.int32(200), "most": np.uint8(200), "from": np.array([0]), "to": np.array([8]), "axes": np.array([1])},
        **{"first": np.array([2, 3]), "shape": np.array(SHAPE)},
    }
    heads = [
        quantised("Exp", "x", outputs=("e",)),
        quantised("QuantizeLinear", "e", "scale", "zero", outputs=("q",)),
        quantised("QuantizeLinear", "x", "scale", "zero", outputs=("r",)),
    ]
    ends = [quantised("Cast", "t", outputs=("u",), to=TensorProto.FLOAT), quantised("Neg", "u", outputs=("v",))]
    ends.append(quantised("Exp", "v", outputs=("y",)))
    nodes = [*heads, *CHAINS[name], *ends]
    used = {source for node in nodes for source in node.input}
    kept = {key: array for key, array in constants.items() if key in used}
    agree(tmp_path, model(nodes, {"x": (TensorProto.FLOAT, SHAPE)}, kept, ["y"]), prepacking=prepacking)


def test_every_known_operator_on_bytes_is_looked_at() -> None:
    made = {f"{MICROSOFT}.{node.op_type}" if node.domain else node.op_type for nodes in CHAINS.values() for node in nodes}
    made |= quantised_rules.CONVOLUTIONS | {"com.microsoft.DequantizeLinear"}
    assert made <= KNOWN
    assert {op for op in KNOWN if op.removeprefix("com.microsoft.").startswith(("Q", "Deq", "Dyn", "Nhwc", "MatMulI"))} <= made


def one(out: int, going: int, kernel: int = 3, side: int = 8, group: int = 1) -> Graph:
    shapes = {"x": ((1, going, side, side), 2), "w": ((out, going // group, kernel, kernel), 3), "y": ((1, out, side, side), 2), "z": ((), 2)}
    graph = Graph(inputs=["x"], outputs=["y"], values={name: Tensor(shape, 8, kind) for name, (shape, kind) in shapes.items()})
    graph.constants = {"w": graph.values["w"].nbytes, "z": 1}
    attributes = {"pads": [kernel // 2] * 4, "strides": [1, 1], "group": group}
    graph.nodes = [Node("QLinearConv", ["x", "s", "z", "w", "s", "z", "s", "z"], ["y"], attributes)]
    return graph


def test_a_convolutions_scratch_and_copy_by_hand() -> None:
    graph = one(64, 64)
    node = graph.nodes[0]
    turned, windows = 64 * 64, 9 * 64
    assert blocks(graph, node, Machine(wide=True)) == (turned, turned, 8 * windows)
    assert footprint.prepacked(graph, Machine(wide=True)) == (64 * 64 * 9, 0)
    arm = Machine(arm=True, wide=True)
    assert blocks(graph, node, arm) == (turned + 256, turned, 8 * windows)
    plain = Machine(prepacking=False)
    assert blocks(graph, node, plain) == (64 * 64 * 9, 4 * turned, turned, turned, 64 * windows)
    assert footprint.prepacked(graph, plain) == (0, 0)


@pytest.mark.parametrize(("out", "going", "arm", "wide", "direct"), [
    (20, 64, False, True, True), (20, 64, False, False, False), (20, 64, False, None, False), (12, 64, False, True, False),
    (24, 64, True, False, True), (24, 64, True, True, False), (24, 64, True, None, False), (32, 68, True, True, True), (32, 68, True, False, False),
    (32, 64, True, None, True), (32, 32, True, True, False),
])
def test_what_kernel_a_convolution_gets_depends_on_the_processor(out: int, going: int, arm: bool, wide: bool | None, direct: bool) -> None:
    """And where that is not known what takes more is counted."""
    graph, machine = one(out, going), Machine(arm=arm, wide=wide)
    assert (len(blocks(graph, graph.nodes[0], machine)) == 3) is direct
    inside, beside = footprint.prepacked(graph, machine)
    assert bool(inside) is direct
    assert bool(beside) is not direct


def test_the_processor_is_known_by_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, arm, wide, direct in (
        ({"avx2", "avx512bw"}, False, True, True),
        ({"avx2"}, False, False, True),
        ({"sse4_2"}, False, False, False),
        (set(), False, None, True),
        ({"asimd", "asimddp"}, True, True, True),
        ({"asimd"}, True, False, True),
    ):
        monkeypatch.setattr(rules, "_flags", lambda flags=flags: frozenset(flags))
        monkeypatch.setattr(rules.os, "uname", lambda arm=arm: SimpleNamespace(machine="aarch64" if arm else "x86_64"))
        here = Machine.here(2, False)
        assert (here.threads, here.arm, here.wide, here.prepacking, here.direct) == (2, arm, wide, False, direct)
    graph = one(64, 64)
    assert len(blocks(graph, graph.nodes[0], Machine(wide=True, direct=False))) == 4


def test_scratch_in_several_blocks_finds_room_between_tensors() -> None:
    graph = one(64, 64)
    plan = Plan(graph, machine=Machine(wide=True))
    assert smallest(plan) == plan.peak == sum(plan.events[0].pieces)
