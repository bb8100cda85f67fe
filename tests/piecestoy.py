"""The toy bundle with steps in pieces: statistics that stay, and an objective with two kinds of mean, of which one depends on the data.

    loss = Σ kept entropies / max(number kept, 1) + 0.1 · mean entropy

An entropy is kept if it is below margin · ln C. With labels the loss is the cross-entropy.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgeadapt.bundle import Bundle, GraphSpec, HyperSpec, Manifest, StatisticsInfo
from edgeadapt.bundle.manifest import SumSpec
from tests.shapedtoy import shaped
from tests.toybundle import CLASSES, HYPER, METRICS, SIDE, Toy, _Build

TRAINED = ("norm.gamma", "norm.beta", "head.bias")
MOMENTS = {"norm.gamma": "gamma.m", "norm.beta": "beta.m"}
MARGIN = HyperSpec(0.9, 0.0, 10.0, "of the entropy")


class PiecesToy(Toy):
    """As `Toy`. micro: the micro-batches of its steps."""

    def __init__(self, width: int = 8, depth: int = 1, batches: tuple[int, ...] = (1, 4), micro: tuple[int, ...] = (1, 2)) -> None:
        super().__init__(width, depth, batches)
        shapes = {name: self.state[name].shape for name in TRAINED}
        scalars = ("count.all", "count.selected", "loss.all", "loss.selected", "metric.entropy", "metric.selected")
        self.sums: dict[str, tuple[int, ...]] = dict.fromkeys(scalars, ())
        self.sums |= {f"gradient.{over}.{name}": shape for over in ("all", "selected") for name, shape in shapes.items() if name != "head.bias"}
        self.sums["gradient.all.head.bias"] = shapes["head.bias"]
        self.graphs, self.specs = {}, {}
        for batch in batches:
            for role in ("source", "predict", *(("adapt", "learn") if batch > 1 else ())):
                self._graph(role, batch)
        for role in ("adapt", "learn"):
            for size in micro:
                self._graph(f"{role}-sums", size)
            if micro:
                self._graph(f"{role}-update", 0)

    def manifest(self) -> Manifest:
        sums = tuple(SumSpec(name, shape) for name, shape in self.sums.items()) if any(spec.sums for spec in self.specs.values()) else ()
        hyper = {"rate": HYPER["rate"], "momentum": HYPER["momentum"], "margin": MARGIN}
        return replace(super().manifest(), statistics=StatisticsInfo("source", ("norm",)), hyper=hyper, sums=sums)

    def bundle(self, path: Path) -> Bundle:
        """Written and opened."""
        return Bundle.open(self.write(path))

    def used(self, role: str) -> tuple[str, ...]:
        """The sums of a step's role."""
        without = {"gradient.all.head.bias"} if role == "adapt" else {name for name in self.sums if ".selected" in name and name != "metric.selected"}
        return tuple(name for name in self.sums if name not in without)

    def _graph(self, role: str, batch: int) -> None:
        step, _, kind = role.partition("-")
        trains, labels = step in ("adapt", "learn"), step == "learn"
        reads = [] if kind == "update" else ["norm.mean", "norm.var"]
        reads += [] if role == "source" else ["norm.gamma", "norm.beta", *([] if kind == "update" and not labels else ["head.bias"])]
        moved = [name for name in TRAINED if labels or name != "head.bias"]
        updates = trains and kind != "sums"
        reads += [MOMENTS[name] for name in moved if name in MOMENTS] if updates else []
        writes = [*moved, *(MOMENTS[name] for name in moved if name in MOMENTS)] if updates else []
        hyper = ["margin"] if trains and kind != "update" else []
        hyper += ["rate", "momentum"] if updates else []
        build = PiecesBuild(self, role, batch, hyper, reads, writes, METRICS if updates else ())
        model = build.model()
        name = f"{role}.b{batch}" if batch else role
        self.graphs[name] = shaped(model.SerializeToString())
        names = (tuple(hyper), tuple(reads), tuple(writes), METRICS if updates else ())
        spec = GraphSpec(f"graphs/{name}.onnx", role, batch, *names, len(model.graph.node), batch * self.width * SIDE * SIDE * 16)
        self.specs[name] = replace(spec, sums=self.used(step) if kind else ())


class PiecesBuild(_Build):
    """One graph."""

    def model(self) -> onnx.ModelProto:
        toy, value = self.toy, helper.make_tensor_value_info
        assert isinstance(toy, PiecesToy)
        step, _, kind = self.role.partition("-")
        inputs, outputs = [], []
        if kind == "update":
            self.finish({name: f"sum.{name}" for name in toy.used(step)})
        else:
            pooled = self("ReduceMean", self.normalised(self.features()), self.axes(2, 3), keepdims=0)
            affine = "norm.gamma" in self.reads
            hidden = self("Add", self("Mul", pooled, "state.norm.gamma"), "state.norm.beta") if affine else pooled
            scores = self("MatMul", hidden, self.weight("head"))
            scores = self("Add", scores, "state.head.bias") if affine else scores
            self("Identity", scores, to="logits")
            inputs = [value("x", TensorProto.FLOAT, [self.batch, 3, SIDE, SIDE])]
            outputs = [value("logits", TensorProto.FLOAT, [self.batch, CLASSES])]
            if step in ("adapt", "learn"):
                shares = self.shares(pooled, scores, step == "learn")
                if kind:
                    for name in toy.used(step):
                        self("Add", f"sum.{name}", shares[name], to=f"added.{name}")
                else:
                    self.finish(shares)
                inputs += [value("y", TensorProto.INT64, [self.batch])] if step == "learn" else []
        inputs += [value(f"hyper.{name}", TensorProto.FLOAT, []) for name in self.hyper]
        inputs += [value(f"state.{name}", TensorProto.FLOAT, toy.state[name].shape) for name in self.reads]
        inputs += [value(f"sum.{name}", TensorProto.FLOAT, toy.sums[name]) for name in toy.used(step)] if kind else []
        outputs += [value(f"added.{name}", TensorProto.FLOAT, toy.sums[name]) for name in toy.used(step)] if kind == "sums" else []
        outputs += [value(f"metric.{name}", TensorProto.FLOAT, []) for name in self.metrics]
        outputs += [value(f"new.{name}", TensorProto.FLOAT, toy.state[name].shape) for name in self.writes]
        graph = helper.make_graph(self.nodes, "toy", inputs, outputs, [*self.constants.values(), *self.external])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)

    def shares(self, pooled: str, scores: str, labels: bool) -> dict[str, str]:
        """What this run adds to each sum."""
        p, logp = self("Softmax", scores, axis=1), self("LogSoftmax", scores, axis=1)
        entropy = self("Neg", self("ReduceSum", self("Mul", p, logp), self.axes(1), keepdims=1))
        keep = self.cast(self("Less", entropy, self("Mul", "hyper.margin", self.const(math.log(CLASSES)))))
        back = self("Transpose", "head", perm=[1, 0])
        mean = self.const(1.0 / self.batch)
        found = {"count.all": self("Identity", self.const(1.0)), "count.selected": self("ReduceSum", keep, keepdims=0)}
        found |= {"metric.entropy": self("ReduceMean", entropy, keepdims=0), "metric.selected": self("ReduceMean", keep, keepdims=0)}
        push = self("Neg", self("Mul", p, self("Add", logp, entropy)))
        if labels:
            classes = self.const(np.arange(CLASSES).reshape(1, CLASSES), np.int64)
            truth = self.cast(self("Equal", self("Reshape", "y", self.const([self.batch, 1], np.int64)), classes))
            told = self("ReduceSum", self("Mul", truth, logp), self.axes(1), keepdims=0)
            found["loss.all"] = self("Neg", self("ReduceMean", told, keepdims=0))
            pushes = {"all": self("Mul", self("Sub", p, truth), mean)}
            found["gradient.all.head.bias"] = self("ReduceSum", pushes["all"], self.axes(0), keepdims=0)
        else:
            found["loss.selected"] = self("ReduceSum", self("Mul", keep, entropy), keepdims=0)
            found["loss.all"] = self("Mul", self.const(0.1), found["metric.entropy"])
            pushes = {"selected": self("Mul", keep, push), "all": self("Mul", push, self.const(0.1 / self.batch))}
        for over, moved in pushes.items():
            into = self("MatMul", moved, back)
            found[f"gradient.{over}.norm.beta"] = self("ReduceSum", into, self.axes(0), keepdims=0)
            found[f"gradient.{over}.norm.gamma"] = self("ReduceSum", self("Mul", into, pooled), self.axes(0), keepdims=0)
        return found

    def finish(self, sums: dict[str, str]) -> None:
        """The means of sums, and the update."""
        kinds = [over for over in ("selected", "all") if f"loss.{over}" in sums]
        counts = {over: self("Max", sums[f"count.{over}"], self.const(1.0)) for over in {*kinds, "all"}}
        losses = [self("Div", sums[f"loss.{over}"], counts[over]) for over in kinds]
        self("Add" if len(losses) > 1 else "Identity", *losses, to="metric.loss")
        for name in ("entropy", "selected"):
            self("Div", sums[f"metric.{name}"], counts["all"], to=f"metric.{name}")
        for name in (name for name in TRAINED if name in self.writes):
            parts = [self("Div", sums[f"gradient.{over}.{name}"], counts[over]) for over in kinds if f"gradient.{over}.{name}" in sums]
            self.update(name, self("Add", *parts) if len(parts) > 1 else parts[0], MOMENTS.get(name))
