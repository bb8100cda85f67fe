"""A bundle made by hand whose state is in small forms: weights in bytes with a unit a row, a momentum in codes, 16-bit biases, a count of steps.

Its steps are plain integer arithmetic, so that the device side can be tested without torch, and followed in numpy: `follow`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgeadapt.bundle import (
    GraphSpec,
    HyperSpec,
    InputSpec,
    Manifest,
    MethodInfo,
    ModelInfo,
    StateSpec,
    StatisticsInfo,
    Task,
    WeightsFile,
    write_bundle,
)

FEATURES, CLASSES, BATCH = 4, 3, 2
STATE = {
    "w": ("parameter", np.arange(-6, 6, dtype=np.int8).reshape(CLASSES, FEATURES)),
    "w.unit": ("parameter", np.full((CLASSES, 1), 0.125, np.float32)),
    "bias": ("parameter", np.array([1000, -2000, 0], np.int16)),
    "m": ("moment", np.full((CLASSES, FEATURES), 127, np.uint8)),
    "m.scale": ("moment", np.ones((CLASSES, 1), np.float32)),
    "counter": ("moment", np.zeros((), np.int64)),
}
_TYPES = {np.dtype(kind): number for kind, number in (("f4", 1), ("u1", 2), ("i1", 3), ("i2", 5), ("i8", 7))}


def follow(state: dict[str, np.ndarray], x: np.ndarray, rate: float) -> dict[str, np.ndarray]:
    """The state after a step."""
    push = np.float32(rate) * x.sum(0, dtype=np.float32)
    clipped = np.clip(np.rint(push), -1e6, 1e6)
    return {
        **state,
        "w": np.clip(state["w"].astype(np.float32) + clipped, -128, 127).astype(np.int8),
        "bias": np.clip(state["bias"].astype(np.float32) + clipped[:CLASSES], -32768, 32767).astype(np.int16),
        "m": np.clip(state["m"].astype(np.float32) + clipped, 0, 255).astype(np.uint8),
        "m.scale": (state["m.scale"] * np.float32(0.5)).astype(np.float32),
        "counter": state["counter"] + 1,
    }


def small_bundle(path: Path) -> Path:
    """Writes it."""
    graphs, specs = {}, {}
    for role, batch in (("source", 1), ("predict", 1), ("predict", BATCH), ("adapt", BATCH)):
        name = f"{role}.b{batch}"
        model, reads, writes, metrics = _graph(role, batch)
        graphs[name] = model.SerializeToString()
        hyper = ("rate",) if role == "adapt" else ()
        specs[name] = GraphSpec(f"graphs/{name}.onnx", role, batch, hyper, reads, writes, metrics, len(model.graph.node), 4096)
    state = tuple(StateSpec(name, value.shape, kind, value.dtype.name) for name, (kind, value) in STATE.items())
    manifest = Manifest(
        producer="edgeadapt toy",
        model=ModelInfo("tests.smalltoy", 0, ""),
        task=Task("classification", CLASSES),
        input=InputSpec((FEATURES,)),
        method=MethodInfo("toy", {"updates": "tiny", "trainable": 15}, "integers"),
        partition=(),
        statistics=StatisticsInfo("none"),
        hyper={"rate": HyperSpec(1.0, 0.0, 1e30, "learning rate")},
        state=state,
        batches=(1, BATCH),
        graphs=specs,
        opset=20,
        ir_version=9,
    )
    write_bundle(path, manifest, WeightsFile(), graphs, {name: value for name, (_, value) in STATE.items()})
    return path


def _graph(role: str, batch: int) -> tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def op(kind: str, *inputs: str, to: str = "", **attributes: object) -> str:
        out = to or f"t{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def const(value: object, dtype: object = np.float32) -> str:
        constants.append(onnx.numpy_helper.from_array(np.asarray(value, dtype), f"c{len(constants)}"))
        return constants[-1].name

    def op_cast(value: str, name: str, kind: int) -> None:
        nodes.append(helper.make_node("Cast", [value], [name], to=kind))

    weights = op("Mul", _cast(nodes, "state.w"), "state.w.unit")
    bias = op("Mul", _cast(nodes, "state.bias"), const(1e-3))
    op("Add", op("MatMul", "x", op("Transpose", weights, perm=[1, 0])), bias, to="logits")
    reads: tuple[str, ...] = ("w", "w.unit", "bias")
    writes: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    if role == "adapt":
        reads, writes, metrics = tuple(STATE), ("w", "bias", "m", "m.scale", "counter"), ("loss", "update")
        push = op("Mul", op("ReduceSum", "x", const([0], np.int64), keepdims=0), "hyper.rate")
        whole = op("Clip", op("Round", push), const(-1e6), const(1e6))
        for name, part, low, high in (
            ("w", whole, -128, 127),
            ("bias", op("Slice", whole, const([0], np.int64), const([CLASSES], np.int64)), -32768, 32767),
            ("m", whole, 0, 255),
        ):
            total = op("Clip", op("Add", _cast(nodes, f"state.{name}"), part), const(low), const(high))
            op_cast(total, f"new.{name}", _TYPES[STATE[name][1].dtype])
        op("Mul", "state.m.scale", const(0.5), to="new.m.scale")
        op("Add", "state.counter", const(1, np.int64), to="new.counter")
        op("Identity", const(0.25), to="metric.loss")
        op("ReduceSum", op("Mul", push, push), to="metric.update", keepdims=0)
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.FLOAT, [batch, FEATURES])]
    inputs += [value("hyper.rate", TensorProto.FLOAT, [])] if role == "adapt" else []
    inputs += [value(f"state.{name}", _TYPES[STATE[name][1].dtype], STATE[name][1].shape) for name in reads]
    outputs = [value("logits", TensorProto.FLOAT, [batch, CLASSES])]
    outputs += [value(f"metric.{name}", TensorProto.FLOAT, []) for name in metrics]
    outputs += [value(f"new.{name}", _TYPES[STATE[name][1].dtype], STATE[name][1].shape) for name in writes]
    graph = helper.make_graph(nodes, f"{role}.b{batch}", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True), reads, writes, metrics


def _cast(nodes: list[onnx.NodeProto], name: str) -> str:
    out = f"f{len(nodes)}"
    nodes.append(helper.make_node("Cast", [name], [out], to=TensorProto.FLOAT))
    return out
