"""A tiny bundle made by hand with onnx.helper: frozen convolutions, one live normalisation, trainable scale and shift, a frozen head.

Its graphs follow the naming that the exporter's do, so that the bundle format and the device side can be tested without torch. `Slow` is
the same state machine written plainly, to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import TensorProto, helper

from edgeadapt.bundle import (
    PLACEHOLDER,
    WEIGHTS_OFFSET,
    GraphSpec,
    HyperSpec,
    InputSpec,
    Manifest,
    MethodInfo,
    ModelInfo,
    Part,
    StateSpec,
    StatisticsInfo,
    Task,
    WeightsFile,
    write_bundle,
)

CLASSES = 5
SIDE = 6
HYPER = {
    "mix": HyperSpec(0.25, 0.0, 1.0, "weight of this batch's statistics"),
    "rate": HyperSpec(0.05, 0.0, 3e38, "learning rate"),
    "momentum": HyperSpec(0.5, 0.0, 3e38, "momentum; as the rate, large enough to break a step"),
}
METRICS = ("loss", "entropy", "selected")


class Toy:
    """The model's numbers, the builder of its graphs, and the finished manifest."""

    def __init__(self, width: int = 8, depth: int = 1, batches: tuple[int, ...] = (1, 4), method: str = "toy", task: str = "classification") -> None:
        rng = np.random.default_rng(7)
        self.width, self.depth, self.batches, self.method, self.task = width, depth, batches, method, task
        self.weights = WeightsFile()
        draw = rng.standard_normal
        self.frozen = {"stem": draw((width, 3, 3, 3), np.float32) / 3, "head": draw((width, CLASSES), np.float32)}
        for level in range(depth):
            self.frozen[f"conv{level}"] = draw((width, width, 3, 3), np.float32) / np.float32(3 * width**0.5)
        self.places = {name: self.weights.add(array) for name, array in self.frozen.items()}
        kinds = {"norm.mean": "statistic", "norm.var": "statistic"}
        if method == "toy":
            kinds |= {"norm.gamma": "parameter", "norm.beta": "parameter", "gamma.m": "moment", "beta.m": "moment", "head.bias": "parameter"}
        self.kinds = kinds
        sizes = {"head.bias": CLASSES}
        self.state = {name: np.zeros(sizes.get(name, width), np.float32) for name in kinds}
        self.state["norm.var"] += np.float32(0.7)
        self.state["norm.mean"] += np.float32(0.2)
        if method == "toy":
            self.state["norm.gamma"] += np.float32(1.0)
        self.graphs: dict[str, bytes] = {}
        self.specs: dict[str, GraphSpec] = {}
        roles = {"toy": ("source", "predict", "adapt", "learn"), "norm": ("source", "predict"), "source": ("source", "predict")}[method]
        for batch in batches:
            for role in roles:
                if batch > 1 or role in ("source", "predict"):
                    self._graph(role, batch)

    def manifest(self) -> Manifest:
        return Manifest(
            producer="edgeadapt toy",
            model=ModelInfo("tests.toybundle:Toy", sum(array.size for array in self.frozen.values()), ""),
            task=Task(self.task, CLASSES, tuple(f"class {index}" for index in range(CLASSES))),
            input=InputSpec((3, SIDE, SIDE), (SIDE, SIDE), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
            method=MethodInfo(self.method, {"K": 1}, "scale and shift by entropy"),
            partition=(Part("conv0", "stem", (self.width, SIDE, SIDE), 1000, 2 * self.width),),
            statistics=StatisticsInfo("live", ("norm",)),
            hyper=dict(HYPER),
            state=tuple(StateSpec(name, self.state[name].shape, kind) for name, kind in self.kinds.items()),
            batches=self.batches,
            graphs=dict(self.specs),
            opset=20,
            ir_version=9,
        )

    def builder(self, *arguments: Any) -> _Build:
        """What builds one graph."""
        return _Build(self, *arguments)

    def write(self, path: Path, **changes: Any) -> Path:
        write_bundle(path, replace(self.manifest(), **changes), self.weights, self.graphs, self.state)
        return path

    def _graph(self, role: str, batch: int) -> None:
        name = f"{role}.b{batch}"
        reads = ["norm.mean", "norm.var"]
        writes: list[str] = [] if role == "source" or self.method == "source" else list(reads)
        hyper = ["mix"] if writes else []
        metrics: tuple[str, ...] = ()
        if self.method == "toy" and role != "source":
            reads += ["norm.gamma", "norm.beta", "head.bias"]
        if role in ("adapt", "learn"):
            reads += ["gamma.m", "beta.m"]
            writes += ["norm.gamma", "norm.beta", "gamma.m", "beta.m"] + (["head.bias"] if role == "learn" else [])
            hyper += ["rate", "momentum"]
            metrics = METRICS
        build = self.builder(role, batch, hyper, reads, writes, metrics)
        model = build.model()
        self.graphs[name] = model.SerializeToString()
        self.specs[name] = GraphSpec(
            f"graphs/{name}.onnx",
            role,
            batch,
            tuple(hyper),
            tuple(reads),
            tuple(writes),
            metrics,
            len(model.graph.node),
            batch * self.width * SIDE * SIDE * 16,
        )


class _Build:
    """One graph."""

    def __init__(self, toy: Toy, role: str, batch: int, hyper: list[str], reads: list[str], writes: list[str], metrics: tuple[str, ...]) -> None:
        self.toy, self.role, self.batch, self.hyper, self.reads, self.writes, self.metrics = toy, role, batch, hyper, reads, writes, metrics
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.external: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        out = to or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        array = np.asarray(value, dtype)
        name = f"c{len(self.constants)}"
        self.constants[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str) -> str:
        array = self.toy.frozen[name]
        offset, nbytes = self.toy.places[name]
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", PLACEHOLDER), ("offset", str(WEIGHTS_OFFSET + offset)), ("length", str(nbytes))):
            tensor.external_data.add(key=key, value=value)
        self.external.append(tensor)
        return name

    def axes(self, *axes: int) -> str:
        return self.const(axes, np.int64)

    def features(self) -> str:
        h = self("Relu", self("Conv", "x", self.weight("stem"), pads=[1] * 4))
        for level in range(self.toy.depth):
            h = self("Relu", self("Conv", h, self.weight(f"conv{level}"), pads=[1] * 4))
        return h

    def normalised(self, h: str) -> str:
        """(h - mean) / sqrt(var + eps) with this batch's share mixed into the statistics."""
        column = self.const([1, self.toy.width, 1, 1], np.int64)
        mean, var = "state.norm.mean", "state.norm.var"
        if "norm.mean" in self.writes:
            found = self("ReduceMean", h, self.axes(0, 2, 3), keepdims=1)
            centred = self("Sub", h, found)
            spread = self("ReduceMean", self("Mul", centred, centred), self.axes(0, 2, 3), keepdims=0)
            flat = self("Reshape", found, self.const([self.toy.width], np.int64))
            keep = self("Sub", self.const(1.0), "hyper.mix")
            mean = self("Add", self("Mul", keep, mean), self("Mul", "hyper.mix", flat), to="new.norm.mean")
            var = self("Add", self("Mul", keep, var), self("Mul", "hyper.mix", spread), to="new.norm.var")
        deviation = self("Sqrt", self("Add", self("Reshape", var, column), self.const(1e-5)))
        return self("Div", self("Sub", h, self("Reshape", mean, column)), deviation)

    def model(self) -> onnx.ModelProto:
        toy = self.toy
        z = self.normalised(self.features())
        segment = toy.task == "segmentation"
        pooled = self("Transpose", z, perm=[0, 2, 3, 1]) if segment else self("ReduceMean", z, self.axes(2, 3), keepdims=0)
        affine = "norm.gamma" in self.reads
        hidden = self.affine(pooled) if affine else pooled
        scores = self("MatMul", hidden, self.weight("head"))
        if affine:
            scores = self("Add", scores, "state.head.bias")
        self("Transpose", scores, to="logits", perm=[0, 3, 1, 2]) if segment else self("Identity", scores, to="logits")
        if self.role in ("adapt", "learn"):
            self.step(pooled, scores, segment)
        out = (self.batch, CLASSES, SIDE, SIDE) if segment else (self.batch, CLASSES)
        value = helper.make_tensor_value_info
        inputs = [value("x", TensorProto.FLOAT, [self.batch, 3, SIDE, SIDE])]
        if self.role == "learn":
            inputs.append(value("y", TensorProto.INT64, [self.batch, SIDE, SIDE] if segment else [self.batch]))
        inputs += [value(f"hyper.{name}", TensorProto.FLOAT, []) for name in self.hyper]
        inputs += [value(f"state.{name}", TensorProto.FLOAT, toy.state[name].shape) for name in self.reads]
        outputs = [value("logits", TensorProto.FLOAT, out)]
        outputs += [value(f"metric.{name}", TensorProto.FLOAT, []) for name in self.metrics]
        outputs += [value(f"new.{name}", TensorProto.FLOAT, toy.state[name].shape) for name in self.writes]
        graph = helper.make_graph(self.nodes, "toy", inputs, outputs, [*self.constants.values(), *self.external])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)

    def affine(self, pooled: str) -> str:
        """Scale and shift."""
        return self("Add", self("Mul", pooled, "state.norm.gamma"), "state.norm.beta")

    def gradients(self, back: str, flat: str) -> tuple[str, str]:
        """Of scale and shift, from the head's and what these made."""
        return self("ReduceSum", self("Mul", back, flat), self.axes(0), keepdims=0), self("ReduceSum", back, self.axes(0), keepdims=0)

    def step(self, pooled: str, scores: str, segment: bool) -> None:
        """Entropy (or cross-entropy) gradients of the scale, the shift and, when learning, the head's bias; then SGD with momentum."""
        count = self.batch * (SIDE * SIDE if segment else 1)
        rows = self("Reshape", scores, self.const([count, CLASSES], np.int64))
        flat = self("Reshape", pooled, self.const([count, self.toy.width], np.int64))
        p, logp = self("Softmax", rows, axis=1), self("LogSoftmax", rows, axis=1)
        entropy = self("Neg", self("ReduceSum", self("Mul", p, logp), self.axes(1), keepdims=1))
        share = self.const(1.0 / count)
        mean_entropy = self("ReduceMean", entropy, keepdims=0, to="metric.entropy")
        if self.role == "learn":
            classes = self.const(np.arange(CLASSES).reshape(1, CLASSES), np.int64)
            labels = self("Reshape", "y", self.const([count, 1], np.int64))
            truth = self.cast(self("Equal", labels, classes))
            self("Neg", self("ReduceMean", self("ReduceSum", self("Mul", truth, logp), self.axes(1), keepdims=0), keepdims=0), to="metric.loss")
            push = self("Mul", self("Sub", p, truth), share)
        else:
            self("Identity", mean_entropy, to="metric.loss")
            push = self("Neg", self("Mul", self("Mul", p, self("Add", logp, entropy)), share))
        self("ReduceMean", self.cast(self("Less", entropy, self.const(100.0))), keepdims=0, to="metric.selected")
        back = self("MatMul", push, self("Transpose", "head", perm=[1, 0]))
        scale, shift = self.gradients(back, flat)
        self.update("norm.beta", shift, "beta.m")
        self.update("norm.gamma", scale, "gamma.m")
        if self.role == "learn":
            self.update("head.bias", self("ReduceSum", push, self.axes(0), keepdims=0), None)

    def cast(self, value: str) -> str:
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node("Cast", [value], [out], to=TensorProto.FLOAT))
        return out

    def update(self, name: str, gradient: str, moment: str | None) -> None:
        if moment is not None:
            gradient = self("Add", self("Mul", "hyper.momentum", f"state.{moment}"), gradient, to=f"new.{moment}")
        self("Sub", f"state.{name}", self("Mul", "hyper.rate", gradient), to=f"new.{name}")


class Slow:
    """What an adapter does, step by step with plain `session.run` calls on a dictionary of arrays."""

    def __init__(self, toy: Toy) -> None:
        import onnxruntime

        self.toy, self.sessions = toy, {}
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        for name, data in toy.graphs.items():
            model = onnx.load_from_string(data)
            for tensor in model.graph.initializer:
                if tensor.external_data:
                    tensor.CopyFrom(onnx.numpy_helper.from_array(toy.frozen[tensor.name], tensor.name))
            self.sessions[name] = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.state = {name: array.copy() for name, array in toy.state.items()}
        self.hyper = {name: spec.default for name, spec in HYPER.items()}

    def run(self, name: str, x: np.ndarray, y: np.ndarray | None = None, commit: bool = True, **hyper: float) -> np.ndarray:
        spec = self.toy.specs[name]
        values: Mapping[str, float] = {**self.hyper, **hyper}
        feeds = {
            "x": x,
            **{f"hyper.{key}": np.array(values[key], np.float32) for key in spec.hyper},
            **{f"state.{key}": self.state[key] for key in spec.reads},
        }
        if y is not None:
            feeds["y"] = y
        session = self.sessions[name]
        found = dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds)))
        if commit:
            self.state.update({key: found[f"new.{key}"] for key in spec.writes})
        return found["logits"]
