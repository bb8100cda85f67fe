"""The table of ATen operators that can be lowered, and what a rule is given.

A rule takes the graph under construction and the operator's arguments, with tensors replaced by `Value`s, and returns the `Value` or tuple of
values it computes. Gradients arrive here already as ATen operators, so one table serves the forward and the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from edgeadapt.exporters.ir import Graph, Value

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
FLOAT = np.dtype(np.float32)
BOOL = np.dtype(np.bool_)
INT = np.dtype(np.int64)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators by name, with ("mean.dim") or without ("mean") their overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def find(name: str) -> Rule | None:
    """The rule for "aten.op.overload", or None."""
    _, _, short = name.partition(".")
    base = short.partition(".")[0]
    return RULES.get(short) or RULES.get(base) or RULES.get(base.removesuffix("_copy"))


def lift(graph: Graph, value: Any, like: Value) -> Value:
    """A Python number as a scalar constant of `like`'s dtype; values pass through, cast to `like`'s dtype where they differ."""
    if isinstance(value, Value):
        return value if value.dtype == like.dtype else cast(graph, value, like.dtype)
    return graph.constant(np.asarray(value, dtype=like.dtype))


def cast(graph: Graph, value: Value, dtype: Any) -> Value:
    """`value` in another dtype."""
    kind = np.dtype(dtype)
    return value if value.dtype == kind else graph.op("Cast", [value], value.shape, kind, to=kind)


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """A torch dtype as numpy's; double is lowered as float, which is what the device computes in."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype({"bool": "bool", "float64": "float32", "float": "float32", "double": "float32"}.get(name, name))


def promote(a: Any, b: Any) -> np.dtype[Any]:
    """The dtype in which torch computes with two values or numbers (torch.result_type)."""

    def stand_in(value: Any) -> Any:
        if not isinstance(value, Value):
            return value
        return torch.empty((1,) * min(value.rank, 1), dtype=getattr(torch, value.dtype.name), device="meta")

    return numpy_dtype(torch.result_type(stand_in(a), stand_in(b)))


def typed(graph: Graph, value: Any, dtype: Any) -> Value:
    """A value cast to a dtype, or a number as a scalar constant of it."""
    return cast(graph, value, dtype) if isinstance(value, Value) else graph.constant(np.asarray(value, dtype=dtype))


def floating(graph: Graph, value: Value) -> Value:
    """`value`, as float32 where it is integer or boolean."""
    return value if value.dtype.kind == "f" else cast(graph, value, FLOAT)


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape numpy would broadcast to."""
    return tuple(int(size) for size in np.broadcast_shapes(*shapes))


def reshape(graph: Graph, value: Value, shape: Any) -> Value:
    """`value` viewed in another shape; no node where it has that shape already."""
    target = tuple(int(size) for size in shape)
    return value if value.shape == target else graph.op("Reshape", [value, graph.ints(target)], target)


def transpose(graph: Graph, value: Value, order: Any) -> Value:
    """`value` with its axes permuted; a reshape where only axes of size one move."""
    order = [axis % value.rank for axis in order]
    shape = tuple(value.shape[axis] for axis in order)
    if [axis for axis in order if value.shape[axis] != 1] == [axis for axis in range(value.rank) if value.shape[axis] != 1]:
        return reshape(graph, value, shape)
    return graph.op("Transpose", [value], shape, perm=order)


def reduce_sum(graph: Graph, value: Value, axes: Any, keep: bool = False) -> Value:
    """Sum over axes."""
    return reduce(graph, "ReduceSum", value, axes, keep)


def reduce(graph: Graph, op: str, value: Value, axes: Any, keep: bool) -> Value:
    """An ONNX reduction over axes; all of them where `axes` is empty or None."""
    dims = sorted({axis % value.rank for axis in axes}) if axes else list(range(value.rank))
    shape = [1 if axis in dims else size for axis, size in enumerate(value.shape) if keep or axis not in dims]
    if all(value.shape[axis] == 1 for axis in dims):
        return reshape(graph, value, shape)
    return graph.op(op, [value, graph.ints(dims)], shape, keepdims=int(keep))
