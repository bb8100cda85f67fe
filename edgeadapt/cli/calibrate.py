"""Measures this machine: what Python and onnxruntime hold, how fast a core computes and copies. Takes about eight seconds.

  edgeadapt calibrate
  edgeadapt calibrate --output pi5.toml        # a board profile to plan with on another machine

The result is a board profile in the user's cache folder, which plans for this machine use from then on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt._version import __version__

if TYPE_CHECKING:
    from edgeadapt.devices.boards import Board, Calibration
    from edgeadapt.devices.boards.floor import Floor

NAME, HELP = "calibrate", "measure this machine for plans"

SECONDS = 8.0
"""What a calibration takes, as long as loading onnxruntime does not take longer by itself."""

_SHARE_OF_FLOOR = 0.35
_LEAST_RUNS = 3


@dataclass(frozen=True)
class Work:
    """What is timed: a 3×3 convolution [batch, channels, image, image], a product of two square matrices, a copy of so many bytes."""

    batch: int = 16
    channels: int = 32
    image: int = 32
    matrix: int = 256
    copy: int = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help=f"how long to measure, 1 to 60 (default {SECONDS:g})")
    parser.add_argument("-o", "--output", metavar="FILE.toml", help="write the profile here and not to the cache folder")
    parser.add_argument("--json", action="store_true", help="print the profile and how it was measured as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures, writes, prints."""
    from edgeadapt.devices.boards import calibration, probe
    from edgeadapt.errors import UsageError

    if not 1 <= arguments.seconds <= 60:
        raise UsageError(f"--seconds {arguments.seconds:g}: expected 1 to 60", f"leave it out for {SECONDS:g}")
    if arguments.output is not None and not arguments.output.endswith(".toml"):
        raise UsageError(f"--output {arguments.output}: a board profile is a .toml file", f"name it {arguments.output}.toml")
    path = Path(arguments.output) if arguments.output is not None else calibration.place(probe.look())
    calibration.prepare_folder(path)
    board, made = measure(arguments.seconds)
    calibration.write(path, board, made)
    if arguments.json:
        json.dump({"path": str(path), "board": asdict(board), "calibration": asdict(made)}, sys.stdout, indent=1)
        print()
    else:
        print(summary(board, made, path))
    return 0


def measure(seconds: float = SECONDS, work: Work | None = None) -> tuple[Board, Calibration]:
    """Measures this machine.

    Args:
        seconds: about how long; every figure is measured at least a few times even if that takes longer.
        work: what is timed.

    Raises:
        EdgeAdaptError: onnxruntime does not work here.
    """
    from edgeadapt.devices.boards import Calibration, here, probe

    machine, board, work = probe.look(), here(), work or Work()
    begin = time.monotonic()
    floors = _floors(seconds * _SHARE_OF_FLOOR)
    each = max(seconds - (time.monotonic() - begin), 0.1 * seconds) / 5
    conv, product = _convolution(work), _product(work)
    one, matmul = (_rate(graph, 1, each) for graph in (conv, product))
    every, matmul_all = (_rate(graph, machine.cores, each) for graph in (conv, product)) if machine.cores > 1 else (one, matmul)
    copied = _copied(min(work.copy, max(machine.usable // 8, 1 << 20)), each)
    sizes = [floor.floor for floor in floors]
    versions = f"python {floors[0].python}, numpy {floors[0].numpy}, onnxruntime {floors[0].onnxruntime}"
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    measured = replace(
        board,
        floor=round(statistics.median(sizes)),
        floor_known="measured",
        code=round(statistics.median(floor.code for floor in floors)),
        floor_from=f"median of {len(sizes)} runs ({min(sizes) / 1e6:.1f} to {max(sizes) / 1e6:.1f} MB), {versions}",
        gflops=_rounded(one),
        gbps=_rounded(copied),
        rates_known="measured",
        rates_from=f"edgeadapt calibrate on {date[:10]}, {versions}",
    )
    made = Calibration(
        machine=machine.fingerprint,
        date=date,
        edgeadapt=__version__,
        python=floors[0].python,
        numpy=floors[0].numpy,
        onnxruntime=floors[0].onnxruntime,
        threads=machine.cores,
        gflops_all=_rounded(every),
        matmul=_rounded(matmul),
        matmul_all=_rounded(matmul_all),
    )
    return measured, made


def summary(board: Board, made: Calibration, path: Path) -> str:
    """The figures in words."""
    from edgeadapt.units import format_count

    cores = format_count(made.threads, "core")
    facts = [
        ("machine", f"{board.name}, {cores}"),
        ("floor", f"{board.floor / 1e6:.1f} MB: {board.floor_from}"),
        ("convolution", f"{board.gflops:g} GFLOP/s on one core, {made.gflops_all:g} on {cores}"),
        ("matrices", f"{made.matmul:g} GFLOP/s on one core, {made.matmul_all:g} on {cores}"),
        ("memory", f"{board.gbps:g} GB/s read and written by a copy on one core"),
        ("written to", str(path)),
    ]
    if made.gflops_all < board.gflops:
        facts.append(("note", "all cores were slower than one: other programs were busy, or it throttled; measure again when it is idle"))
    return "\n".join(f"{name:<12} {value}" for name, value in facts)


def _floors(seconds: float) -> list[Floor]:
    from edgeadapt.devices.boards import floor as floors
    from edgeadapt.errors import EdgeAdaptError

    found: list[Floor] = []
    end = time.monotonic() + seconds
    while not found or (time.monotonic() < end and len(found) < 5):
        found.append(floors.look())
        if found[-1].error:
            raise EdgeAdaptError(f"onnxruntime does not work here: {found[-1].error}", "edgeadapt doctor says more")
    return found


@dataclass(frozen=True)
class _Graph:
    model: bytes
    feeds: dict[str, Any]
    operations: int


def _convolution(work: Work) -> _Graph:
    image, kernel = [work.batch, work.channels, work.image, work.image], [work.channels, work.channels, 3, 3]
    operations = 2 * work.batch * work.channels * work.channels * 9 * work.image * work.image
    return _graph("Conv", {"x": image, "w": kernel}, image, operations, pads=[1, 1, 1, 1])


def _product(work: Work) -> _Graph:
    square = [work.matrix, work.matrix]
    return _graph("MatMul", {"x": square, "w": square}, square, 2 * work.matrix**3)


def _graph(operator: str, inputs: dict[str, list[int]], output: list[int], operations: int, **attributes: Any) -> _Graph:
    import numpy as np
    from onnx import TensorProto, helper

    def value(name: str, shape: list[int]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    node = helper.make_node(operator, list(inputs), ["y"], **attributes)
    graph = helper.make_graph([node], operator, [value(name, shape) for name, shape in inputs.items()], [value("y", output)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    random = np.random.default_rng(0)
    return _Graph(model.SerializeToString(), {name: random.random(shape, np.float32) for name, shape in inputs.items()}, operations)


def _rate(graph: _Graph, threads: int, seconds: float) -> float:
    """1e9 operations a second, graph optimisation off as in an adaptation step."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
    return graph.operations / _typical(lambda: session.run(None, graph.feeds), seconds) / 1e9


def _copied(size: int, seconds: float) -> float:
    """1e9 bytes a second, read plus written."""
    import numpy as np

    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    return 2 * size / _typical(lambda: np.copyto(target, source), seconds) / 1e9


def _typical(task: Callable[[], object], seconds: float) -> float:
    """A task's time, the first run left out: the lower quartile, which other processes disturb less than the median."""
    task()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _LEAST_RUNS or time.perf_counter() < end:
        begin = time.perf_counter()
        task()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 4]


def _rounded(rate: float) -> float:
    return float(f"{max(rate, 1e-6):.4g}")
