"""A small graph of standard ONNX operators, built node by node and written out as an ONNX model.

The exporter owns this representation (rather than editing ONNX protobufs) because every later stage, from folding to the memory
schedule, wants cheap lookups by name, and because the weights must stay outside the graph: a constant is either small and written
into the graph, or frozen and written once into the bundle's weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

OPSET = 20
IR_VERSION = 9

Array = npt.NDArray[Any]

MANY, VECTOR_BYTES = 4, 8192
"""From so many vectors of no more bytes than that on they are computed joined: a session holds about half as much of every node."""


def joinable(sizes: Iterable[int]) -> bool:
    """Whether vectors of so many bytes are better computed together."""
    found = list(sizes)
    return len(found) >= MANY and max(found) <= VECTOR_BYTES


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor in the graph: its name, static shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements, without padding."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


@dataclass(slots=True)
class Node:
    """One operator. Empty input names are omitted optional inputs; `module` is the path of the user's module it came from."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    module: str = ""


class Graph:
    """Nodes in execution order, with the values and constants they name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.constants: dict[str, Array] = {}
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.module = ""
        self._renamed: dict[str, str] = {}
        self._counter = itertools.count(1)
        self._forward: frozenset[str] | None = None
        self._pool: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def copy(self) -> Graph:
        """The same graph, to be changed apart from this one; arrays are shared."""
        other = Graph(self.name)
        other.nodes = [Node(node.op, list(node.inputs), list(node.outputs), dict(node.attributes), node.module) for node in self.nodes]
        other.values, other.constants, other._pool = dict(self.values), dict(self.constants), dict(self._pool)
        other.inputs, other.outputs = list(self.inputs), list(self.outputs)
        other.module, other._renamed, other._counter = self.module, dict(self._renamed), self._counter  # shared: names stay unlike
        other._forward = self._forward
        return other

    def beside(self) -> Graph:
        """An empty graph over the same values, constants and names: nodes made in it can be put into this one."""
        other = Graph(self.name)
        other.values, other.constants, other._pool, other._counter = self.values, self.constants, self._pool, self._counter
        return other

    def fresh(self, stem: str) -> str:
        """A name that is not in use."""
        return f"{stem}_{next(self._counter)}"

    def declare(self, name: str, shape: Sequence[int], dtype: npt.DTypeLike) -> Value:
        """Register a value under a name."""
        value = Value(name, tuple(int(size) for size in shape), np.dtype(dtype))
        self.values[name] = value
        return value

    def input(self, name: str, shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> Value:
        """Declare a graph input."""
        self.inputs.append(name)
        return self.declare(name, shape, dtype)

    def weight(self, name: str, array: Array) -> Value:
        """A frozen tensor; `array` is viewed, not copied, if it is contiguous."""
        self.constants[name] = np.asarray(array, order="C")
        return self.declare(name, array.shape, array.dtype)

    def constant(self, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Value:
        """A constant, shared by all that have the same dtype, shape and bytes."""
        data = np.asarray(array, dtype=dtype, order="C")
        key = (data.dtype.str, data.shape, data.tobytes())
        if key not in self._pool:
            name = self.fresh("c")
            self.constants[name] = data
            self._pool[key] = self.declare(name, data.shape, data.dtype)
        return self._pool[key]

    def ints(self, values: Iterable[int]) -> Value:
        """A constant vector of int64, as shapes, axes and pads are given."""
        return self.constant(np.asarray(list(values), dtype=np.int64))

    def add(self, op: str, inputs: Sequence[Value | None], shapes: Sequence[tuple[Sequence[int], npt.DTypeLike]], **attributes: Any) -> list[Value]:
        """Append a node with several outputs, each given by shape and dtype."""
        outputs = [self.declare(self.fresh(op.lower()), shape, dtype) for shape, dtype in shapes]
        names = [value.name if value is not None else "" for value in inputs]
        while names and not names[-1]:
            names.pop()
        self.nodes.append(Node(op, names, [value.name for value in outputs], attributes, self.module))
        return outputs

    def op(self, op: str, inputs: Sequence[Value | None], shape: Sequence[int], dtype: npt.DTypeLike | None = None, **attributes: Any) -> Value:
        """Append a node with one output; its dtype is the first input's unless given."""
        first = next((value for value in inputs if value is not None), None)
        kind = dtype if dtype is not None else first.dtype if first is not None else np.float32
        return self.add(op, inputs, [(shape, kind)], **attributes)[0]

    def output(self, name: str, value: Value) -> None:
        """Give a value to the caller under a name; a value that is an input or is given twice is copied."""
        value = self.values[self._renamed.get(value.name, value.name)]
        if value.name in self.outputs or not any(value.name in node.outputs for node in self.nodes):
            value = self.op("Identity", [value], value.shape)
        self.rename(value.name, name)
        self.outputs.append(name)

    def end_forward(self) -> None:
        """What was made so far is the forward pass of a step."""
        self._forward = frozenset(out for node in self.nodes for out in node.outputs)

    def in_forward(self, nodes: Iterable[Node]) -> None:
        """More nodes belong to the forward pass."""
        if self._forward is not None:
            self._forward |= {out for node in nodes for out in node.outputs}

    def stands_for(self, node: Node, other: Node) -> Node:
        """A node that is put in another's place, or before it: it belongs to the forward pass if that does."""
        if not self.late(node):
            self.in_forward([other])
        return other

    def late(self, node: Node) -> bool:
        """Whether a node belongs to a step's backward pass; False where there is none. Nodes that passes make beside others' results do."""
        return self._forward is not None and not any(out in self._forward for out in node.outputs)

    def rewrite(self, replacement: Callable[[Node], list[Node] | None]) -> bool:
        """Put other nodes in the place of those that `replacement` gives some for; whether there were any."""
        nodes: list[Node] = []
        changed = False
        for node in self.nodes:
            found = replacement(node)
            nodes += [node] if found is None else found
            changed = changed or found is not None
        self.nodes = nodes
        return changed

    def rename(self, old: str, new: str) -> None:
        """Rename a produced value everywhere."""
        if self._forward is not None and old in self._forward:
            self._forward |= {new}
        for node in self.nodes:
            node.inputs = [new if name == old else name for name in node.inputs]
            node.outputs = [new if name == old else name for name in node.outputs]
        value = self.values.pop(old)
        self._renamed[old] = new
        self.values[new] = Value(new, value.shape, value.dtype)

    def readers(self) -> dict[str, list[int]]:
        """For each value, the indices of the nodes that read it."""
        table: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in node.inputs:
                if name:
                    table.setdefault(name, []).append(index)
        return table
