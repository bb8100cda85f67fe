"""Functions over torch tensors as graphs in onnxruntime, run as they were emitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from edgeadapt.exporters.emit import to_onnx
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.ir import Graph
from edgeadapt.exporters.passes.simplify import simplify
from edgeadapt.exporters.tracing import declare_inputs, emit, trace

Arrays = dict[str, npt.NDArray[Any]]


def graph_of(function: Callable[[dict[str, Tensor]], dict[str, Tensor]], example: Mapping[str, Tensor], simple: bool = False) -> Graph:
    """A function traced and lowered; all of `example` are inputs. simple: the passes run over it too."""
    graph = Graph("g")
    for name, value in emit(trace(function, example), graph, declare_inputs(graph, example, {})).items():
        graph.output(f"out.{name}", value)
    if simple:
        simplify(graph)
    return graph


def run(graph: Graph, feeds: Mapping[str, Any]) -> Arrays:
    """What onnxruntime makes of a graph, by the outputs' names without "out."."""
    session = open_session(to_onnx(graph), threads=1)
    found = session.run(None, {entry.name: np.asarray(feeds[entry.name]) for entry in session.get_inputs()})
    return {name.removeprefix("out."): value for name, value in zip(graph.outputs, found, strict=True)}


def same_bits(got: Arrays, want: Mapping[str, Tensor]) -> list[str]:
    """The names of outputs whose bytes differ, or whose type or shape does."""
    assert set(got) == set(want)
    return [name for name, value in got.items() if differs(value, want[name].detach().numpy())]


def differs(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Whether two arrays differ in type, shape or a bit; zeros of either sign are one and the same."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return True
    if one.dtype.kind == "f":
        one, other = one + one.dtype.type(0), other + other.dtype.type(0)
    return one.tobytes() != other.tobytes()
