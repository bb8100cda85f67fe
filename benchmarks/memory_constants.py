"""The constants of edgeadapt/memory/footprint.py, measured on models made for it: chains of one operator, and bundles of almost nothing.

  python -m benchmarks.memory_constants

None of the networks whose memory is predicted elsewhere takes part. Needs onnx, numpy and onnxruntime, no torch. Every figure comes from a process
of its own; malloc's own count (mallinfo2, glibc 2.33 or newer) is used where a figure lies in the heap, so that pages do not blur it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._floors import trivial_model
from benchmarks._turns import environment

SHAPE = (1, 8, 4, 4)
KERNEL: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1}
ONE, EIGHT, WEIGHT = np.ones(1, np.float32), np.ones(8, np.float32), np.ones((8, 8, 3, 3), np.float32)
SIZES = np.array(SHAPE)
KINDS: dict[str, tuple[Sequence[np.ndarray], dict[str, Any], tuple[int, ...]]] = {
    "Relu": ((), {}, SHAPE),
    "Neg": ((), {}, SHAPE),
    "Identity": ((), {}, SHAPE),
    "Softmax": ((), {}, SHAPE),
    **{op: ((), {}, SHAPE) for op in ("Exp", "Log", "Sqrt", "Abs", "Reciprocal", "Sigmoid", "LogSoftmax")},
    **{op: ((), {"kernel_shape": [1, 1], "strides": [1, 1]}, SHAPE) for op in ("MaxPool", "AveragePool")},
    **{op: ((ONE,), {}, SHAPE) for op in ("Add", "Sub", "Pow", "Max")},
    "Mul": ((EIGHT.reshape(1, 8, 1, 1),), {}, SHAPE),
    "Div": ((ONE,), {}, SHAPE),
    "Clip": ((ONE.reshape(())[()] * 0, ONE.reshape(())[()]), {}, SHAPE),
    "Reshape": ((SIZES,), {}, SHAPE),
    "Expand": ((SIZES,), {}, SHAPE),
    "Pad": ((np.zeros(8, np.int64),), {}, SHAPE),
    "Slice": (tuple(np.array([value]) for value in (0, 8, 1, 1)), {}, SHAPE),
    "Transpose": ((), {"perm": [0, 1, 3, 2]}, SHAPE),
    "ReduceSum": ((np.array([1, 2]),), {"keepdims": 1}, (1, 1, 1, 4)),
    "ReduceMax": ((np.array([1, 2]),), {"keepdims": 1}, (1, 1, 1, 4)),
    "Concat": ((np.ones((1, 0, 4, 4), np.float32),), {"axis": 1}, SHAPE),
    "ReduceMean": ((np.array([1, 2]),), {"keepdims": 1}, (1, 1, 1, 4)),
    "MatMul": ((np.ones((4, 4), np.float32),), {}, SHAPE),
    "Gemm": ((np.ones((4, 4), np.float32), np.ones(4, np.float32)), {"alpha": 1.0, "beta": 1.0}, (4, 4)),
    "Conv": ((WEIGHT,), KERNEL, SHAPE),
    "ConvTranspose": ((WEIGHT,), {**KERNEL, "output_padding": [0, 0]}, SHAPE),
    "BatchNormalization": ((EIGHT,) * 4, {"epsilon": 1e-5}, SHAPE),
}
"""Operators of the exporter's graphs: the constants that each takes besides its first input, its attributes, its shape."""


TIMES = 9
"""Processes of what differs from one to the next."""
MANY = 1500
"""Tensors of a bundle that tells what each costs; enough for pages not to blur it."""


def chain(op: str, count: int, own: bool) -> bytes:
    """A graph of one operator after another, with constants of its own for each of them or the same for all."""
    import onnx.numpy_helper
    from onnx import helper

    constants, attributes, shape = KINDS[op]
    names = ["x", *(f"{op.lower()}_{index}" for index in range(count - 1)), "y"]
    values = [helper.make_tensor_value_info(name, 1, shape) for name in names]
    nodes, weights = [], {}
    for index in range(count):
        given = [f"c_{index if own else 0}_{k}" for k in range(len(constants))]
        weights |= dict(zip(given, constants))
        name = f"{index}:layer1.{index // 10}.conv1"
        nodes.append(helper.make_node(op, [names[index], *given], [names[index + 1]], name=name, **attributes))
    tensors = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "chain", values[:1], values[-1:], tensors, value_info=values[1:-1])
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
    return data


def fusible() -> bytes:
    """A graph in which onnxruntime makes every kind of operator that preparing brings: fused and blocked convolutions, fused products."""
    from onnx import helper, numpy_helper

    random = np.random.default_rng(0)
    tensors = {f"w{index}": random.standard_normal((16, 16, 3, 3)).astype(np.float32) for index in range(3)}
    tensors |= {"m": random.standard_normal((8, 8)).astype(np.float32), "c": np.ones(8, np.float32), "two": np.full((), 2, np.float32)}
    tensors |= {"rows": np.array([-1, 8])}
    pads: dict[str, Any] = {"pads": [1] * 4}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], **pads),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["d"], **pads),
        helper.make_node("Add", ["d", "b"], ["e"]),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("MaxPool", ["f"], ["g"], kernel_shape=[1, 1]),
        helper.make_node("Erf", ["g"], ["h"]),
        helper.make_node("Conv", ["h", "w2"], ["i"], **pads),
        helper.make_node("Sigmoid", ["i"], ["j"]),
        helper.make_node("Reshape", ["j", "rows"], ["k"]),
        helper.make_node("Gemm", ["k", "m", "c"], ["l"]),
        helper.make_node("Relu", ["l"], ["n"]),
        helper.make_node("Transpose", ["n"], ["o"], perm=[1, 0]),
        helper.make_node("MatMul", ["o", "n"], ["p"]),
        helper.make_node("Mul", ["p", "two"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    given = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "fusible", [value("x", 1, [1, 16, 8, 8])], [value("y", 1, [8, 8])], given)
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
    return data


def mixture(count: int) -> bytes:
    """A graph of so many operators of each kind, each with constants and results of its own; to be read only, as its parts do not join."""
    import onnx

    whole = onnx.ModelProto()
    for op in KINDS:
        part = onnx.load_from_string(chain(op, count, True))
        if not whole.graph.node:
            whole.CopyFrom(part)
            continue
        for node in part.graph.node:
            node.input[0] = whole.graph.node[-1].output[0]
            for names in (node.input, node.output):
                names[:] = [name if name == node.input[0] and names is node.input else f"{op}.{name}" for name in names]
            whole.graph.node.append(node)
        for kept, values in (
            (whole.graph.initializer, part.graph.initializer),
            (whole.graph.value_info, (*part.graph.value_info, *part.graph.output)),
        ):
            for value in values:
                value.name = f"{op}.{value.name}"
                kept.append(value)
    data: bytes = whole.SerializeToString()
    return data


def sessions(folder: Path) -> dict[str, Any]:
    """What a session takes: a fit over chains of every kind, and where it is off most."""
    from edgeadapt.memory import footprint, read

    paths, rows, small, kinds = [], [], [], []

    def add(op: str, count: int, own: bool) -> None:
        data = chain(op, count, own)
        paths.append(folder / f"{op}-{count}-{own}.onnx")
        paths[-1].write_bytes(data)
        graph = read(data)
        rows.append(list(footprint.count(graph)))
        small.append(sum(graph.constants.values()))  # lie inside the file
        kinds.append(f"{op}{' with its own constants' if own else ''}")

    for op, (constants, _, _) in KINDS.items():
        add(op, 1, False)  # once for the library's own tables
        for count in (100, 400):
            for own in (False, True) if constants else (False,):
                add(op, count, own)
    sizes = child("heap", *map(str, paths))["sizes"]
    chosen = [index for index, row in enumerate(rows) if row[0] > 1]
    size = np.array([sizes[index] - small[index] for index in chosen], float)
    shares = np.array([rows[index] for index in chosen]) / size[:, None]
    fitted = np.linalg.lstsq(shares, np.ones(len(size)), rcond=None)[0]
    off = {kinds[index]: round(float(value) - 1, 3) for index, value in zip(chosen, shares @ fitted)}
    worst = dict(sorted(off.items(), key=lambda pair: -abs(pair[1]))[:6])
    return {
        "SESSION": statistics.median(size for row, size in zip(rows, sizes) if row[0] == 1),
        **dict(zip(("NODE", "EDGE", "ATTRIBUTE", "INITIALISER"), fitted.tolist())),
        "worst fits": worst,
    }


def empty_bundle(path: Path, tensors: int = 1, weights: int = 1, batches: Sequence[int] = (1,)) -> Path:
    """A bundle whose graphs average their input, change the sign of some state tensors, and add up some frozen ones."""
    from onnx import TensorProto, helper

    from edgeadapt.bundle import (
        PLACEHOLDER,
        WEIGHTS_OFFSET,
        GraphSpec,
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

    names = [f"statistics.layer.{index}.mean" for index in range(tensors)]
    file, frozen = WeightsFile(), []
    for index in range(weights):
        offset, length = file.add(np.full(4, index, np.float32))
        place = {"location": PLACEHOLDER, "offset": WEIGHTS_OFFSET + offset, "length": length}
        frozen.append(TensorProto(name=f"weights.layer.{index}", dims=[4], data_type=1, data_location=TensorProto.EXTERNAL))
        for key, value in place.items():
            frozen[-1].external_data.add(key=key, value=str(value))
    frozen += [TensorProto(name="axes", dims=[2], data_type=7, int64_data=[2, 3])]
    graphs, specs = {}, {}
    for batch in batches:
        inputs = [helper.make_tensor_value_info("x", 1, [batch, 3, 4, 4])]
        inputs += [helper.make_tensor_value_info(f"state.{name}", 1, [4]) for name in names]
        outputs = [helper.make_tensor_value_info("logits", 1, [batch, 3])]
        outputs += [helper.make_tensor_value_info(f"new.{name}", 1, [4]) for name in names]
        nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["logits"], keepdims=0)]
        nodes += [helper.make_node("Neg", [f"state.{name}"], [f"new.{name}"]) for name in names[1:]]
        sums = [f"state.{names[0]}", *(f"sum_{index}" for index in range(weights - 1)), f"new.{names[0]}"]
        nodes += [helper.make_node("Add", [sums[index], f"weights.layer.{index}"], [sums[index + 1]]) for index in range(weights)]
        values = [helper.make_tensor_value_info(name, 1, [4]) for name in sums[1:-1]]
        graph = helper.make_graph(nodes, "empty", inputs, outputs, frozen, value_info=values)
        data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
        for role in ("source", "predict"):
            name = f"{role}.b{batch}"
            graphs[name] = data
            specs[name] = GraphSpec(f"graphs/{name}.onnx", role, batch, reads=tuple(names), writes=tuple(names), nodes=len(nodes))
    manifest = Manifest(
        producer="a benchmark",
        model=ModelInfo("empty", 0, ""),
        task=Task("classification", 3),
        input=InputSpec((3, 4, 4)),
        method=MethodInfo("norm", {}, "nothing"),
        partition=(),
        statistics=StatisticsInfo("live", ("layer",)),
        hyper={},
        state=tuple(StateSpec(name, (4,), "statistic") for name in names),
        batches=tuple(batches),
        graphs=specs,
        opset=20,
        ir_version=9,
    )
    write_bundle(path, manifest, file, graphs, {name: np.ones(4, np.float32) for name in names})
    return path


def child(*arguments: str) -> dict[str, Any]:
    """A function of `_held.py` in a process of its own, with malloc as users have it."""
    command = [sys.executable, str(Path(__file__).with_name("_held.py")), *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env={**environment(1), "ORT_DISABLE_TELEMETRY": "1"})
    if ended.returncode:
        raise SystemExit(ended.stderr)
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def measure(folder: Path) -> dict[str, Any]:
    """Every constant."""
    trivial = folder / "trivial.onnx"
    trivial_model(str(trivial))
    found = sessions(folder)
    (folder / "mixture.onnx").write_bytes(mixture(48))
    base = child("floor", str(trivial))
    plain = [str(folder / f"{op}-1-False.onnx") for op in KINDS]
    pages = child("kernels", str(trivial), *plain)
    (folder / "fusible.onnx").write_bytes(fusible())
    child("optimised", str(folder / "fusible.onnx"), str(folder / "fused.onnx"))
    fused = child("kernels", str(trivial), *plain, str(folder / "fused.onnx"))["code"]
    bundles: dict[str, tuple[dict[str, Any], str]] = {
        "few": ({}, "1"),
        "tensors": ({"tensors": MANY}, "1"),
        "named": ({"tensors": MANY, "batches": (1, 2)}, "1"),
        "bound": ({"tensors": MANY, "batches": (1, 2)}, "1,2"),
        "weights": ({"weights": MANY, "batches": (1, 2)}, "1"),
        "again": ({"weights": MANY, "batches": (1, 2)}, "1,2"),
    }
    held = {name: child("adapter", str(empty_bundle(folder / f"{name}.edgeadapt", **made)), used) for name, (made, used) in bundles.items()}
    own = {name: values["resident"] - values["code"] for name, values in held.items()}
    name_each = (own["named"] - own["tensors"]) / MANY / 4  # reads and writes, of source and predict
    bound = (own["bound"] - own["named"]) / MANY / 2
    alone, crowd = (child("threads", str(folder / "Conv-100-False.onnx"), count)["resident"] for count in ("1", "5"))
    return {
        **found,
        "STARTED": base["given"],
        "BEGINNING": child("beginning")["resident"] - base["resident"],
        "LOADING": pages["loading"],
        "CODE": pages["code"],
        "FUSED_CODE": fused - pages["code"],
        "ADAPTER": own["few"] - base["resident"] + base["code"],
        "NAME": name_each,
        "BOUND": bound,
        "TENSOR": (own["tensors"] - own["few"]) / MANY - 2 * bound - 4 * name_each,
        "PLANNED": _planned(folder, str(trivial), [str(folder / f"{op}-400-True.onnx") for op in ("Conv", "Mul", "Reshape", "Add")]),
        "WEIGHT": (2 * own["weights"] - own["again"] - own["few"]) / MANY,
        "EXTERNAL": (own["again"] - own["weights"]) / MANY,
        "THREAD": (crowd - alone) / 4,
        **child("region", str(trivial)),
        "floor": base["resident"],
    }


def _planned(folder: Path, trivial: str, served: Sequence[str]) -> float:
    """Bytes a node, the most of some processes: whether a whole arena of Python's stays is a matter of chance."""
    plain, after = ([child("reading", trivial, path, *served) for _ in range(TIMES)] for path in ("", str(folder / "mixture.onnx")))
    usual = statistics.median(found["resident"] for found in plain)
    return max((found["resident"] - usual) / found["nodes"] for found in after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    for name, value in found.items():
        print(f"{name:<12} {value:,.0f}" if isinstance(value, (int, float)) else f"{name:<12} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
