"""What each operator does to memory, against onnxruntime's profiler; and graphs with operators of which that is not known."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from onnx import TensorProto, helper

from edgeadapt import Adapter
from edgeadapt.bundle import Bundle
from edgeadapt.memory import Graph, Plan, read
from edgeadapt.memory.ledger import Setup, ledger
from edgeadapt.memory.rules import KNOWN, uncounted
from edgeadapt.runtime.memory import Needs, planned
from tests.child import TELLS, run_json
from tests.toybundle import SIDE, Toy

pytestmark = pytest.mark.device

FLOAT, SHAPE = np.float32, [2, 8, 16, 16]
ROWS = np.array([256, 16])
Case = tuple[str, list[str], dict[str, np.ndarray], dict[str, Any], int]  # operator, inputs, constants, attributes, number of outputs


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def case(op: str, inputs: str, outputs: int = 1, constants: dict[str, np.ndarray] | None = None, **attributes: Any) -> Case:
    return op, inputs.split(), constants or {}, attributes, outputs


def cases() -> Iterator[Case]:
    """Every operator whose memory is known. a, b: float32, m, n: truth values, u: bytes, q, r: matrices, k and the like: constants."""
    unary = "Abs Acos Acosh Asin Asinh Atan Atanh Ceil Celu Cos Cosh Elu Erf Exp Flatten Floor Gelu HardSigmoid Identity IsInf IsNaN LeakyRelu Log"
    for op in f"{unary} Neg Reciprocal Relu Round Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Trilu".split():
        yield case(op, "a")
    for op in ["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"]:
        more = {"fmod": 1} if op == "Mod" else {}
        yield case(op, "a b", **more)
        for shape in ((8, 1, 1), ()):
            yield case(op, "a k", constants={"k": np.ones(shape, FLOAT)}, **more)
    for op in ("And", "Or", "Xor"):
        yield case(op, "m n")
    yield case("Not", "m")
    yield case("BitwiseNot", "u")
    for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitShift"):
        yield case(op, "u k", constants={"k": np.array(1, np.uint8)}, **({"direction": "RIGHT"} if op == "BitShift" else {}))
    for axes in ((1,), (3,), (0,), (2, 3), (0, 2), (1, 3), (0, 2, 3), (0, 1, 2, 3)):
        for op in ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"):
            yield case(op, "a k", constants={"k": ints(*axes)})
    for axis in (1, 3):
        for op in ("Softmax", "LogSoftmax", "ArgMax", "ArgMin"):
            yield case(op, "a", axis=axis)
        for count in (3, SHAPE[axis]):
            yield case("TopK", "a k", 2, {"k": ints(count)}, axis=axis)
        yield case("CumSum", "a k", constants={"k": np.array(axis)})
        yield case("Concat", "a b", axis=axis)
        yield case("Gather", "a k", constants={"k": ints(1, 3)}, axis=axis)
        yield case("GatherElements", "a k", constants={"k": np.zeros(SHAPE, np.int64)}, axis=axis)
        yield case("ScatterElements", "a k b", constants={"k": np.zeros(SHAPE, np.int64)}, axis=axis, reduction="add")
        yield case("Split", "a", 2, axis=axis, num_outputs=2)
    for order in ((0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)):
        yield case("Transpose", "a", perm=order)
    yield case("Clip", "a k l", constants={"k": np.zeros((), FLOAT), "l": np.ones((), FLOAT)})
    for mode in ("constant", "reflect", "edge"):
        yield case("Pad", "a k", constants={"k": ints(0, 0, 1, 1, 0, 0, 1, 1)}, mode=mode)
    for begin, end, step in ((1, 15, 2), (-1, -100, -1)):
        yield case("Slice", "a k l o p", constants={"k": ints(begin), "l": ints(end), "o": ints(2), "p": ints(step)})
    yield case("Tile", "a k", constants={"k": ints(1, 2, 1, 1)})
    yield case("Expand", "a k", constants={"k": ints(3, *SHAPE)})
    yield case("Where", "m a b")
    yield case("Where", "m a k", constants={"k": np.zeros((), FLOAT)})
    yield case("Reshape", "a k", constants={"k": ints(2, -1)})
    yield case("Unsqueeze", "a k", constants={"k": ints(0)})
    yield case("Squeeze", "a")
    for kind in (TensorProto.UINT8, TensorProto.INT8, TensorProto.INT64, TensorProto.BOOL):
        yield case("Cast", "a", to=kind)
    pool: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}
    yield case("AveragePool", "a", **pool)
    yield case("MaxPool", "a", **pool)
    yield case("MaxPool", "a", 2, **pool)
    channels = {name: np.ones(8, FLOAT) for name in "klop"}
    yield case("BatchNormalization", "a k l o p", constants=channels)
    yield case("LayerNormalization", "a k", 3, {"k": np.ones(16, FLOAT)})
    yield case("MatMul", "a b")
    yield case("MatMul", "a k", constants={"k": np.ones((8, 16, 16), FLOAT)})
    yield case("Gemm", "q r", transB=1)
    yield case("Gemm", "q r k", constants={"k": np.ones(256, FLOAT)}, transB=1)
    yield case("Gemm", "q r", transA=1)
    yield case("Conv", "a k", constants={"k": np.ones((4, 8, 3, 3), FLOAT)}, pads=[1] * 4)
    yield case("ConvTranspose", "a k", constants={"k": np.ones((8, 4, 3, 3), FLOAT)}, pads=[1] * 4)


UNKNOWN: list[Case] = [
    case("Max", "a b a"),
    case("Min", "a b k", constants={"k": np.ones((8, 1, 1), FLOAT)}),
    case("Sum", "a b a"),
    case("Einsum", "a b", equation="bchw,bcwk->bchk"),
    case("Resize", "a  k".replace("  ", " none "), constants={"none": np.zeros(0, FLOAT), "k": np.array([1, 1, 2, 2], FLOAT)}, mode="linear"),
    case("LSTM", "z k l", 1, {"k": np.ones((1, 16, 4), FLOAT), "l": np.ones((1, 16, 4), FLOAT)}, hidden_size=4),
]


def model_of(given: Case) -> bytes:
    """a = exp(x), b = exp(y), the operator on them and on what is made of them, and each of its outputs as float32."""
    op, inputs, constants, attributes, outputs = given
    constants = {**constants, "rows": ROWS, "steps": ints(4, 256, 4)}
    node = helper.make_node
    nodes = [node("Exp", ["x"], ["a"]), node("Exp", ["y"], ["b"])]
    made = {
        "m": [node("Greater", ["a", "b"], ["m"])],
        "n": [node("Not", ["m"], ["n"])],
        "u": [node("Cast", ["a"], ["u"], to=TensorProto.UINT8)],
        "q": [node("Reshape", ["a", "rows"], ["q"])],
        "r": [node("Reshape", ["b", "rows"], ["r"])],
        "z": [node("Reshape", ["a", "steps"], ["z"])],
    }
    for name in inputs:
        nodes += made.get(name, [])
    results = [f"result{index}" for index in range(outputs)]
    nodes.append(node(op, inputs, results, **attributes))
    for name in results:
        nodes += [node("Identity", [name], [f"{name}.same"]), node("Cast", [f"{name}.same"], [f"{name}.float"], to=TensorProto.FLOAT)]
    value = helper.make_tensor_value_info
    used = {name for item in nodes for name in item.input}
    graph = helper.make_graph(
        nodes,
        "one",
        [value(name, TensorProto.FLOAT, SHAPE) for name in "xy"],
        [value(f"{name}.float", TensorProto.FLOAT, None) for name in results],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    data: bytes = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).SerializeToString()
    return data


PROFILED = """
import json, sys
import onnxruntime
from edgeadapt.runtime import profiling
found = []
for path in sys.argv[1:]:
    options = onnxruntime.SessionOptions()  # an arena of its own for each, so that the peak is its own
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = options.enable_mem_reuse = False
    told = profiling.memory_of(open(path, "rb").read(), ".", options=options)
    found.append({"in_use": told.in_use, "peak": told.peak, "base": told.base})
print(json.dumps(found))
"""


def told(folder: Path, models: list[bytes]) -> list[dict[str, Any]]:
    """What the profiler says of each."""
    paths = [folder / f"{index}.onnx" for index in range(len(models))]
    for path, model in zip(paths, models):
        path.write_bytes(model)
    found: list[dict[str, Any]] = run_json([sys.executable, "-c", PROFILED, *map(str, paths)])
    return found


BYTES = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger"}
"""Looked at in test_quantised.py."""


def test_every_known_operator_is_counted_to_the_byte(tmp_path: Path) -> None:
    every = list(cases())
    models = [model_of(given) for given in every]
    assert {op for op, *_ in every} == {op for op in KNOWN if not op.startswith("com.microsoft.")} - BYTES
    wrong = []
    for given, model, found in zip(every, models, told(tmp_path, models)):
        plan = Plan(read(model))
        if TELLS and ([value - found["base"] for value in found["in_use"]] != plan.after() or found["peak"] - found["base"] != plan.peak):
            wrong.append((given[0], given[3], found["peak"] - found["base"], plan.peak))
        assert read(model).countable, given[0]
    assert wrong == []


def test_operators_of_which_it_is_not_known_take_more_than_is_counted(tmp_path: Path) -> None:
    """So that those left out of the list are left out for a reason."""
    models = [model_of(given) for given in UNKNOWN]
    for given, model, found in zip(UNKNOWN, models, told(tmp_path, models)):
        assert uncounted(read(model)) == [given[0]]
        if TELLS:
            assert found["peak"] - found["base"] > Plan(read(model)).peak, given[0]


@pytest.mark.native
def test_what_onnxruntime_makes_of_them_is_known_too(tmp_path: Path) -> None:
    import onnxruntime

    weights = {"k": np.ones((8, 8, 3, 3), FLOAT), "l": np.ones((16, 8, 3, 3), FLOAT), "w": np.ones((16, 16), FLOAT), "o": np.ones(16, FLOAT)}
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "k"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["b"]),
        node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["c", "l"], ["d"], pads=[1] * 4),
        node("AveragePool", ["d"], ["e"], kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["e"], ["f"]),
        node("Flatten", ["f"], ["g"]),
        node("Gemm", ["g", "w", "o"], ["h"]),
        node("Relu", ["h"], ["i"]),
        node("Transpose", ["i"], ["j"], perm=[1, 0]),
        node("MatMul", ["j", "i"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    given, result = value("x", TensorProto.FLOAT, [2, 8, 16, 16]), value("y", TensorProto.FLOAT, [16, 16])
    graph = helper.make_graph(nodes, "g", [given], [result], [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
    made: set[str] = set()
    for level in (onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 4
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        made |= {item.op for item in read((tmp_path / "optimised.onnx").read_bytes()).nodes}
    assert {"com.microsoft.FusedConv", "com.microsoft.FusedGemm", "com.microsoft.FusedMatMul"} <= made
    assert {name for name in made if name.startswith("com.microsoft.")} <= KNOWN


# ------------------------------------------------------------------------------------------------------ bundles by hand


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy whose predict.b4 has a node of three inputs that nothing needs."""
    toy = Toy(batches=(1, 4))
    for name, data in toy.graphs.items():
        model = onnx.load_from_string(data)
        if name == "predict.b4":
            model.graph.node.insert(0, helper.make_node("Max", ["x", "x", "x"], ["largest"]))
        toy.graphs[name] = onnx.shape_inference.infer_shapes(model).SerializeToString()
    toy.specs["predict.b4"] = replace(toy.specs["predict.b4"], nodes=toy.specs["predict.b4"].nodes + 1)
    return toy.write(tmp_path_factory.mktemp("odd") / "odd.edgeadapt")


def test_a_graph_with_an_operator_that_is_not_known_is_no_exact_need(odd: Path) -> None:
    needs = Needs(Bundle.open(odd), 1)
    assert needs["predict.b1"].exact
    assert not needs["predict.b4"].exact
    assert needs["predict.b4"].region >= Plan(read(needs.bundle.graph_bytes("predict.b4"))).peak
    assert planned(needs, ["predict.b1"]).ledger["region"].known == "counted"
    both = planned(needs, ["predict.b1", "predict.b4"], prepacking=False)
    assert both.ledger["region"].known == "estimated"
    assert both.region.size == 0
    assert not both.region.prepacking


def test_it_serves_within_a_budget_in_memory_that_grows(odd: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, SIDE, SIDE), dtype=FLOAT)
    with Adapter.open(odd, "2GiB") as one, Adapter.open(odd) as other:
        assert np.array_equal(one.adapt(x), other.adapt(x))


def test_the_simulators_lines_say_that_they_are_estimates(odd: Path) -> None:
    lines = ledger(Bundle.open(odd), Setup(("predict.b4",), 50_000_000))
    assert {lines[name].known for name in ("activations", "workspace", "gaps", "region's table")} == {"estimated"}
    assert "Max" in lines["workspace"].note
    counted = ledger(Bundle.open(odd), Setup(("predict.b1",), 50_000_000))
    assert {counted[name].known for name in ("activations", "workspace", "gaps", "region's table")} == {"counted"}


def test_only_three_and_more_are_too_many(odd: Path) -> None:
    graph = Graph(read(Bundle.open(odd).graph_bytes("predict.b4")).nodes)
    assert uncounted(graph) == ["Max"]
    graph.nodes[0].inputs.pop()
    assert uncounted(graph) == []
