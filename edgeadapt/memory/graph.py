"""What of an ONNX graph its memory depends on: nodes in their order, and the shape and type of each tensor."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgeadapt.bundle import onnxwire
from edgeadapt.errors import BundleError

OWN = "weights.bin"
"""Where a prepared graph says that those of its tensors lie which its bundle does not have as they are wanted."""


class TensorLike(Protocol):
    """A tensor of static shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    @property
    def nbytes(self) -> int:
        """Its elements' bytes."""
        ...


class NodeLike(Protocol):
    """An operator. Operators that are not the standard's carry their domain: "com.microsoft.FusedConv"."""

    @property
    def op(self) -> str:
        """The operator."""
        ...

    @property
    def inputs(self) -> Sequence[str]:
        """Names of its inputs; an empty one is left out."""
        ...

    @property
    def outputs(self) -> Sequence[str]:
        """Names of its outputs; an empty one is left out."""
        ...

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Whole numbers, lists of them, and texts; others are not kept."""
        ...

    @property
    def module(self) -> str:
        """The path of the user's module that it came from, or ""."""
        ...


class GraphLike(Protocol):
    """What is planned: the exporter's own graphs, and those read from a bundle."""

    @property
    def nodes(self) -> Sequence[NodeLike]:
        """In file order, which is the order of execution."""
        ...

    @property
    def values(self) -> Mapping[str, TensorLike]:
        """Every tensor by name."""
        ...

    @property
    def constants(self) -> Collection[str]:
        """Names of the initialisers."""
        ...

    @property
    def inputs(self) -> Sequence[str]:
        """What the caller gives."""
        ...

    @property
    def outputs(self) -> Sequence[str]:
        """What the caller gets, in memory of the caller's."""
        ...


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's shape, the bits of one element, and its TensorProto.DataType."""

    shape: tuple[int, ...]
    bits: int
    kind: int = 1

    @property
    def nbytes(self) -> int:
        """Its elements' bytes."""
        return (math.prod(self.shape) * self.bits + 7) // 8


@dataclass(slots=True)
class Node:
    """An operator of a graph that was read; see `NodeLike`. name: as written."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def module(self) -> str:
        """The path of the user's module: an exporter's node is named "index:module"."""
        return self.name.partition(":")[2]


@dataclass
class Graph:
    """A graph that was read; see `GraphLike`. constants: each initialiser's bytes; external: those that lie in another file."""

    nodes: list[Node] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    external: list[onnxwire.External] = field(default_factory=list)

    @property
    def stored(self) -> frozenset[str]:
        """Initialisers of which the file has the copies that loading would make."""
        return frozenset(tensor.name for tensor in self.external if tensor.copies)

    def unknown(self) -> list[str]:
        """Tensors that nodes name and whose shape the file does not state."""
        named = {name for node in self.nodes for name in (*node.inputs, *node.outputs) if name}
        return sorted(named - set(self.values))

    @property
    def countable(self) -> bool:
        """Whether its memory can be counted to the byte: all shapes are stated, and it is known what each operator does to memory."""
        from edgeadapt.memory.rules import uncounted

        return not self.unknown() and not uncounted(self)


def read(data: bytes | memoryview, where: str = "the graph") -> Graph:
    """Reads a serialised ModelProto; subgraphs and weights are passed over.

    Raises:
        BundleError: not a well-formed ONNX file, or an input or output without a static shape.
    """
    try:
        for number, value in onnxwire.fields(memoryview(data)):
            if number == 7:
                return _graph(onnxwire.view(value, "the graph"))
    except onnxwire.Malformed as reason:
        raise BundleError(f"{where} cannot be read: {reason}", "export the bundle again") from None
    raise BundleError(f"{where} holds no graph", "export the bundle again")


def _graph(data: onnxwire.Data) -> Graph:
    graph = Graph()
    for number, value in onnxwire.fields(data):
        if number == 1:
            graph.nodes.append(_node(onnxwire.view(value, "a node")))
        elif number == 5:
            name, tensor, place = _initialiser(onnxwire.view(value, "an initialiser"))
            graph.values[name] = tensor
            graph.constants[name] = tensor.nbytes
            if place is not None:
                graph.external.append(place)
        elif number in (11, 12, 13):
            name, known = _declared(onnxwire.view(value, "a value"))
            if known is not None:
                graph.values[name] = known
            elif number != 13:
                raise onnxwire.Malformed(f"{name!r} has no static shape")
            if number == 11:
                graph.inputs.append(name)
            elif number == 12:
                graph.outputs.append(name)
    return graph


def _node(data: onnxwire.Data) -> Node:
    node, domain = Node("", [], []), ""
    for number, value in onnxwire.fields(data):
        if number in (1, 2):
            (node.inputs if number == 1 else node.outputs).append(onnxwire.text(value, "a tensor's name"))
        elif number == 3:
            node.name = onnxwire.text(value, "a node's name")
        elif number == 4:
            node.op = onnxwire.text(value, "an operator's name")
        elif number == 5:
            node.attributes.update(_attribute(onnxwire.view(value, "an attribute")))
        elif number == 7:
            domain = onnxwire.text(value, "a domain")
    if domain not in ("", "ai.onnx"):
        node.op = f"{domain}.{node.op}"
    return node


def _attribute(data: onnxwire.Data) -> Iterator[tuple[str, Any]]:
    name = ""
    kept: Any = None
    numbers: list[int] = []
    for number, value in onnxwire.fields(data):
        if number == 1:
            name = onnxwire.text(value, "an attribute's name")
        elif number == 3 and isinstance(value, int):
            kept = _signed(value)
        elif number == 4:
            kept = onnxwire.text(value, "an attribute")
        elif number == 8:
            numbers += map(_signed, onnxwire.numbers(value))
    if numbers:
        kept = numbers
    if kept is not None:
        yield name, kept


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _initialiser(data: onnxwire.Data) -> tuple[str, Tensor, onnxwire.External | None]:
    name, kind = "", 1
    sizes: list[int] = []
    entries: dict[str, str] = {}
    for number, value in onnxwire.fields(data):
        if number == 1:
            sizes += onnxwire.numbers(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = onnxwire.text(value, "a tensor's name")
        elif number == 13:
            entries.update([onnxwire.entry(onnxwire.view(value, "external data"))])
    tensor = Tensor(tuple(sizes), onnxwire.BITS.get(kind, 8), kind)
    if not entries:
        return name, tensor, None
    held = tuple(place for key, value in sorted(entries.items()) if key.startswith(onnxwire.COPY) for place in onnxwire.copies(value, name))
    offset = entries.get("offset", "0")
    if not (offset.isascii() and offset.isdigit()):
        raise onnxwire.Malformed(f"the external data of {name!r} has no offset in bytes")
    return name, tensor, onnxwire.External(name, kind, tensor.shape, entries.get("location", ""), int(offset), tensor.nbytes, True, held)


def _declared(data: onnxwire.Data) -> tuple[str, Tensor | None]:
    name, kind, shape = "", 1, None
    for number, value in onnxwire.fields(data):
        if number == 1:
            name = onnxwire.text(value, "a tensor's name")
        elif number == 2:
            for inner, tensor in onnxwire.fields(onnxwire.view(value, "a type")):
                if inner == 1:
                    kind, shape = _tensor_type(onnxwire.view(tensor, "a tensor's type"))
    return name, None if shape is None else Tensor(shape, onnxwire.BITS.get(kind, 8), kind)


def _tensor_type(data: onnxwire.Data) -> tuple[int, tuple[int, ...] | None]:
    kind, shape = 1, None
    for number, value in onnxwire.fields(data):
        if number == 1 and isinstance(value, int):
            kind = value
        elif number == 2:
            sizes = []
            for inner, dimension in onnxwire.fields(onnxwire.view(value, "a shape")):
                if inner == 1:
                    sizes.append(next((v for k, v in onnxwire.fields(onnxwire.view(dimension, "a size")) if k == 1 and isinstance(v, int)), None))
            if onnxwire.impossible([size for size in sizes if size is not None]):
                raise onnxwire.Malformed(f"a shape of {len(sizes)} sizes that cannot be")
            if None not in sizes:
                shape = tuple(size for size in sizes if size is not None)
    return kind, shape
