"""A program made into a bundle's graph: traced, lowered, simplified, scheduled and written as ONNX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import fx

from edgeadapt.bundle import PLACEHOLDER, WEIGHTS_OFFSET, WeightsFile
from edgeadapt.bundle.roles import STEPS
from edgeadapt.errors import EdgeAdaptError, ExportError
from edgeadapt.exporters.capture import Captured, module_path
from edgeadapt.exporters.emit import to_onnx
from edgeadapt.exporters.ir import Array, Graph
from edgeadapt.exporters.lowering import Unsupported
from edgeadapt.exporters.passes.simplify import simplify
from edgeadapt.exporters.programs import Program
from edgeadapt.exporters.schedules import Schedules
from edgeadapt.exporters.tracing import declare_inputs, emit, trace
from edgeadapt.memory import Plan, smallest

Lowered = dict[tuple[str, int], Graph]
"""Graphs of a model's programs by role and batch, not yet in an order."""


class PlacedWeights:
    """The bundle's weights, with offsets as graphs write them: from the start of the bundle's file."""

    location = PLACEHOLDER

    def __init__(self) -> None:
        self.file = WeightsFile()
        self._known: dict[tuple[Any, ...], tuple[Array, tuple[int, int]]] = {}

    def add(self, array: Array) -> tuple[int, int]:
        """Keep an array; its absolute offset in the bundle and its length in bytes. Its bytes must stay as they are."""
        seen = (array.ctypes.data, array.dtype.str, array.shape, array.strides)  # every graph brings the same memory: it is hashed once
        if seen not in self._known:
            offset, length = self.file.add(array)
            self._known[seen] = array, (WEIGHTS_OFFSET + offset, length)  # held, or others might take its place in memory
        return self._known[seen][1]


@dataclass(frozen=True)
class Compiled:
    """A program's graph and what a bundle says about it. peak: of live tensors, bytes; region: the smallest one region that a run fits, bytes."""

    program: Program
    graph: Graph
    model: onnx.ModelProto
    peak: int
    region: int
    variant: str = ""

    @property
    def name(self) -> str:
        """Its name in the bundle."""
        return self.program.name + (f".{self.variant}" if self.variant else "")

    @property
    def reads(self) -> list[str]:
        """State tensors it takes."""
        return [name.removeprefix("state.") for name in self.graph.inputs if name.startswith("state.")]

    @property
    def writes(self) -> list[str]:
        """State tensors it gives anew."""
        return [name.removeprefix("new.") for name in self.graph.outputs if name.startswith("new.")]

    @property
    def hyper(self) -> list[str]:
        """Scalars it takes."""
        return [name.removeprefix("hyper.") for name in self.graph.inputs if name.startswith("hyper.")]

    @property
    def sums(self) -> dict[str, tuple[int, ...]]:
        """The sums between the runs of a step that it adds to or ends, and their shapes."""
        return {name.removeprefix("sum."): self.graph.values[name].shape for name in self.graph.inputs if name.startswith("sum.")}

    @property
    def metrics(self) -> list[str]:
        """Scalars it gives."""
        return [name.removeprefix("metric.") for name in self.graph.outputs if name.startswith("metric.")]


def compile_program(program: Program, weights: PlacedWeights, schedules: Schedules | None = None) -> list[Compiled]:
    """Make the graph of a program; of a step also its variants that take less memory, the leanest last. Schedules found before are used again.

    Raises:
        ExportError: as `lowered`.
    """
    return scheduled(program, lowered(program), weights, schedules or Schedules())


def lowered(program: Program) -> Graph:
    """A program as a simplified graph, not yet in an order.

    Raises:
        ExportError: an operator of the model, or its gradient, has no form in standard ONNX operators, cannot be differentiated, or is refused
            by ONNX's checker or onnxruntime; named with its module where that is known.
    """
    captured = program.model.method.backbone.captured
    try:
        traced = trace(program, program.example)
    except (EdgeAdaptError, MemoryError):
        raise
    except Exception as error:  # autograd and torch's decompositions raise many kinds; each is the user's model
        raise untraceable(error, captured, program.role) from error
    graph = Graph(program.name)
    inputs = declare_inputs(graph, program.example, program.frozen)
    try:
        outputs = emit(traced, graph, inputs)
    except Unsupported as error:
        raise explain(error, captured, program.role) from error
    for name, value in outputs.items():
        graph.output(name, value)
    with named_refusals():
        simplify(graph)
        used = {name for node in graph.nodes for name in node.inputs}
        graph.inputs = [name for name in graph.inputs if name in used or name == "x"]
    return graph


def scheduled(program: Program, graph: Graph, weights: PlacedWeights, schedules: Schedules) -> list[Compiled]:
    """A program's graph in its order, and its variants, with their weights in the bundle's."""
    with named_refusals():
        found = schedules.of(graph, program.role in STEPS)
        return [placed(program, form, Plan(form), weights, variant) for variant, form in found]


def placed(program: Program, graph: Graph, plan: Plan, weights: PlacedWeights, variant: str = "") -> Compiled:
    """A program's graph in its order, with its weights in the bundle's."""
    return Compiled(program, graph, to_onnx(graph, weights), plan.peak, smallest(plan), variant)


def _called(path: str) -> str:
    return repr(path) if path else "the model"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def untraceable(error: Exception, captured: Captured, role: str) -> ExportError:
    """An error that names the modules whose operators raise the same when each is differentiated alone."""
    reason = _first_line(error)
    owners: set[str] = set()
    if role.startswith(STEPS):
        for node, raised in _alone(captured):
            if isinstance(raised, Exception) and _first_line(raised) == reason:
                owners.add(_called(module_path(node)))
    where = ", ".join(sorted(owners)[:4]) or "the model"
    what = "differentiated" if role.startswith(STEPS) else "traced"
    return ExportError(
        f"{where}: the graph '{role}' cannot be {what}: {reason}",
        "replace the layer, or use a method whose gradient does not pass through it (norm, side)",
    )


_NODE = re.compile(r"(?:node name: |Name:'|name '|node \()\d+:([^)'\s]+)")
"""How onnx and onnxruntime name a node in their messages, which is "index:module"."""


@contextmanager
def named_refusals() -> Iterator[None]:
    """What ONNX's checker or onnxruntime raise for a graph, as an ExportError that names the module of the node they name."""
    try:
        yield
    except (EdgeAdaptError, MemoryError):
        raise
    except Exception as error:  # their exceptions share no base class
        found = _NODE.search(str(error))
        raise ExportError(
            f"{_called(found[1] if found else '')}: an operator is refused by onnxruntime: {_first_line(error)}",
            "replace the layer by one of ordinary float32 operators",
        ) from error


def explain(error: Unsupported, captured: Captured, role: str) -> ExportError:
    """An error that names the user's modules whose operators cannot be lowered."""
    missing = {item.operator for item in error.missing}
    reasons = "; ".join(sorted({item.reason for item in error.missing if item.reason})[:2])
    known = {item.module for item in error.missing if item.module}
    blamed = _forward_owners(captured, missing) or known or _gradient_owners(captured, missing)
    where = ", ".join(sorted({_called(path) for path in blamed})[:4]) or "the model"
    operators = ", ".join(sorted(name.removeprefix("aten.") for name in missing)[:4])
    what = (
        "cannot be differentiated here"
        if any("backward" in name for name in missing) and role.startswith(STEPS)
        else "has no form in standard ONNX operators"
    )
    return ExportError(
        f"{where}: operator {operators} {what}" + (f" ({reasons})" if reasons else ""),
        "replace the layer, or use a method whose gradient does not pass through it (norm, side)",
    )


def _forward_owners(captured: Captured, operators: Iterable[str]) -> set[str]:
    names = set(operators)
    return {module_path(node) for node in captured.operators if str(node.target) in names}


def _gradient_owners(captured: Captured, operators: Iterable[str]) -> set[str]:
    """Modules of the forward operators whose own gradient uses one of `operators`."""
    wanted = set(operators)
    return {module_path(node) for node, used in _alone(captured) if isinstance(used, set) and wanted & used}


def _alone(captured: Captured) -> Iterator[tuple[fx.Node, set[str] | Exception]]:
    """Each operator whose gradient may exist, with the operators that it uses, or what differentiating it alone raises."""
    for node in captured.operators:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        try:
            used: set[str] | Exception = _gradient_operators(node)
        except Exception as error:  # many operators cannot be differentiated alone: what takes constants only, for one
            used = error
        yield node, used


def _gradient_operators(node: fx.Node) -> set[str]:
    sources = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]
    example = {source.name: torch.zeros(tuple(source.meta["val"].shape), dtype=source.meta["val"].dtype) for source in sources}

    def alone(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        leaves = {name: tensor.detach().requires_grad_(tensor.is_floating_point()) for name, tensor in given.items()}
        args = fx.node.map_arg(node.args, lambda source: leaves[source.name])
        kwargs = fx.node.map_arg(node.kwargs, lambda source: leaves[source.name])
        target = node.target
        assert callable(target)
        result = target(*args, **kwargs)
        gradients = torch.autograd.grad(result.sum(), [leaf for leaf in leaves.values() if leaf.requires_grad], allow_unused=True)
        return {str(index): gradient for index, gradient in enumerate(gradients) if gradient is not None}

    traced = trace(alone, example)
    return {str(inner.target) for inner in traced.module.graph.nodes if inner.op == "call_function"}


def total_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of named tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
