"""Large float32 tensors beside codes are made a piece of the batch at a time.

What treats each sample by itself (elementwise operators, codes made into values and back) is cut into pieces together with what joins it: its tensors
exist as pieces, each of which is let go of once it was read, and not whole. So a gradient that is added to between two blocks stays in pieces, and
only codes exist whole, and what something else reads as float32. Results are the same to the last bit, but
for sums over the batch, which add up in another order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from edgeadapt.exporters.ir import Graph, Node, Value
from edgeadapt.exporters.stretches import stretches

PIECE = 2**21
"""Bytes of float32 made at once, at most. Smaller pieces are little faster, and each costs nodes, of which a session holds some 4.5 KB each."""

MOST = 16
"""Pieces at most: beside codes as large as four of them, larger pieces weigh little."""

LOCAL = {"BatchNormalization", "Relu", "Clip", "Add", "Sub", "Mul", "QuantizeLinear"}
"""Operators that treat each sample of a batch by itself, where their other inputs are the same for all."""

SMALL = {"DequantizeLinear", "Cast"}
"""Operators that make float32 of a smaller form: a piece of it is made anew for each that reads it."""

REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"}


def batch_pieces(value: Value) -> list[int]:
    """Samples in each of the pieces that a tensor's batch is cut into, as equal as can be; one piece: it is not cut."""
    size = value.nbytes if value.dtype == np.float32 else 4 * value.nbytes
    return [end - begin for begin, end in stretches(value.shape[0], size, PIECE, MOST)]


def in_pieces(graph: Graph) -> bool:
    """Cut what can be; whether anything was."""
    found = _Joined(graph)
    cut = {id(node): part for part in found.parts() for node in part.nodes}
    if not cut:
        return False
    made: dict[int, _Pieces] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        part = cut.get(id(node))
        if part is None:
            nodes.append(node)
            continue
        pieces = made.setdefault(id(part), _Pieces(graph, found, part))
        new = pieces.of(node)
        if not graph.late(node):
            graph.in_forward(new)
        nodes += new
    graph.nodes = nodes
    return True


@dataclass
class _Part:
    """Nodes that are cut together, in their order. held: the tensors between them, which exist in pieces alone; sizes: of the pieces, in samples."""

    nodes: list[Node]
    sizes: list[int]
    held: set[str] = field(default_factory=set)
    sums: bool = False


class _Joined:
    """Which nodes can be cut, and what joins them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.makers = {out: node for node in graph.nodes for out in node.outputs}
        self._able = {id(node) for node in graph.nodes if self._can(node)}
        readers = graph.readers()
        self.held = {name for node in graph.nodes for name in node.outputs[:1] if self._stays(node, [graph.nodes[i] for i in readers.get(name, ())])}

    def large(self, name: str) -> bool:
        """Whether a tensor has a batch that is worth cutting."""
        value = self.graph.values.get(name)
        return value is not None and len(value.shape) > 2 and name not in self.graph.constants and len(batch_pieces(value)) > 1

    def small(self, name: str) -> Node | None:
        """What makes a large tensor of a smaller form, if anything does."""
        maker = self.makers.get(name)
        if maker is None or maker.op not in SMALL or not self.large(name) or self.graph.values[name].dtype != np.float32:
            return None
        source = self.graph.values[maker.inputs[0]]
        same = source.shape == self.graph.values[name].shape and maker.inputs[0] not in self.graph.constants
        return maker if same and source.dtype.itemsize == 1 and maker.attributes.get("axis", 1) == 1 else None

    def _can(self, node: Node) -> bool:
        graph = self.graph
        if node.op in REDUCTIONS:
            axes = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
            every = len(node.inputs) == 1 or (axes is not None and 0 in axes.tolist())
            value = graph.values[node.inputs[0]]
            return every and self.large(node.inputs[0]) and value.dtype == np.float32 and node.outputs[0] not in graph.outputs
        name = node.outputs[0]
        if node.op not in LOCAL or not self.large(name) or name in graph.outputs or node.attributes.get("axis", 1) != 1:
            return False
        return all(self._fits(other, graph.values[name].shape) for other in node.inputs if other)

    def _fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether an input has samples of its own for each of the output's, or is the same for all."""
        given = self.graph.values[name].shape
        if given == shape:
            return name not in self.graph.constants
        return not self.large(name) and (len(given) < len(shape) or given[0] == 1)

    def _stays(self, node: Node, readers: list[Node]) -> bool:
        """Whether what a node makes can be held in pieces: all that read it are cut as well, in the same pass."""
        if id(node) not in self._able or node.op in REDUCTIONS or self.graph.values[node.outputs[0]].dtype != np.float32:
            return False
        late = self.graph.late(node)
        return bool(readers) and all(id(other) in self._able and self.graph.late(other) == late for other in readers)

    def parts(self) -> list[_Part]:
        """What is worth cutting: where codes are read or made, and no more float32 exists whole than before."""
        graph, able = self.graph, [node for node in self.graph.nodes if id(node) in self._able]
        heads: dict[int, int] = {id(node): id(node) for node in able}

        def head(key: int) -> int:
            while heads[key] != key:
                key = heads[key]
            return key

        for node in able:
            for name in node.inputs:
                if name in self.held:
                    heads[head(id(node))] = head(id(self.makers[name]))
        found: dict[int, _Part] = {}
        for node in able:
            sizes = batch_pieces(graph.values[node.inputs[0] if node.op in REDUCTIONS else node.outputs[0]])
            part = found.setdefault(head(id(node)), _Part([], sizes))
            part.nodes.append(node)
            part.held |= self.held & set(node.outputs)
        return self._merged([part for part in found.values() if self._worth(part)])

    def _worth(self, part: _Part) -> bool:
        values = self.graph.values
        reads = any(self.small(name) is not None for node in part.nodes for name in node.inputs)
        whole = [node for node in part.nodes if node.op in LOCAL and node.outputs[0] not in part.held]
        part.sums = not whole
        if any(values[node.outputs[0]].dtype == np.float32 for node in whole):
            return bool(part.held) and (reads or any(node.op == "QuantizeLinear" for node in whole))
        return reads or (bool(part.held) and bool(whole))

    def _merged(self, parts: list[_Part]) -> list[_Part]:
        """Parts that only reduce the same small form are one: a mean, and that of the squares."""
        result: list[_Part] = []
        first: dict[tuple[str, bool], _Part] = {}
        for part in parts:
            forms = {name for node in part.nodes for name in node.inputs if self.small(name) is not None}
            key = (next(iter(forms)), self.graph.late(part.nodes[0])) if part.sums and len(forms) == 1 else None
            known = first.setdefault(key, part) if key is not None else part
            if known is part:
                result.append(part)
            else:
                known.nodes += part.nodes
                known.held |= part.held
        return result


class _Pieces:
    """The pieces of a part, made node by node."""

    def __init__(self, graph: Graph, joined: _Joined, part: _Part) -> None:
        self._graph, self._joined, self._part = graph, joined, part
        ends = np.cumsum(part.sizes).tolist()
        self._bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        self._held: dict[str, list[str]] = {}
        self._shared: dict[tuple[str, int], str] = {}

    def of(self, node: Node) -> list[Node]:
        """What takes a node's place."""
        made: list[Node] = []
        if not self._part.sums:
            self._shared = {}  # each node has its own pieces of what exists whole: shared ones would stay until the last has read them
        if node.op in REDUCTIONS:
            self._reduced(node, made)
            return made
        value = self._graph.values[node.outputs[0]]
        parts = []
        for index, (start, end) in enumerate(self._bounds):
            piece = self._graph.declare(self._graph.fresh("piece"), (end - start, *value.shape[1:]), value.dtype)
            inputs = [self._piece(name, index, node, made) for name in node.inputs]
            made.append(Node(node.op, inputs, [piece.name], dict(node.attributes), node.module))
            parts.append(piece.name)
        if value.name in self._part.held:
            self._held[value.name] = parts
        else:
            made.append(Node("Concat", parts, list(node.outputs), {"axis": 0}, node.module))
        return made

    def _piece(self, name: str, index: int, node: Node, made: list[Node]) -> str:
        """The piece of an input that a node's piece reads; the nodes that make it are put on `made`."""
        if name in self._held:
            return self._held[name][index]
        if not name or not self._joined.large(name):
            return name
        if (name, index) in self._shared:
            return self._shared[name, index]
        maker = self._joined.small(name)
        value, (start, end) = self._graph.values[name if maker is None else maker.inputs[0]], self._bounds[index]
        piece = self._graph.declare(self._graph.fresh("slice"), (end - start, *value.shape[1:]), value.dtype)
        bounds = [self._graph.ints([number]).name for number in (start, end, 0)]
        made.append(Node("Slice", [value.name, *bounds], [piece.name], {}, node.module))
        if maker is not None:
            numbers = self._graph.declare(self._graph.fresh("piece"), piece.shape, np.float32)
            made.append(Node(maker.op, [piece.name, *maker.inputs[1:]], [numbers.name], dict(maker.attributes), node.module))
            piece = numbers
        self._shared[name, index] = piece.name
        return piece.name

    def _reduced(self, node: Node, made: list[Node]) -> None:
        graph, value = self._graph, self._graph.values[node.inputs[0]]
        axes = set(graph.constants[node.inputs[1]].tolist()) if len(node.inputs) > 1 else set(range(len(value.shape)))
        kept = tuple(1 if {axis, axis - len(value.shape)} & axes else size for axis, size in enumerate(value.shape))
        parts = []
        for index in range(len(self._bounds)):
            part = graph.declare(graph.fresh("part"), kept, np.float32)
            read = self._piece(node.inputs[0], index, node, made)
            made.append(Node(node.op, [read, *node.inputs[1:]], [part.name], {**node.attributes, "keepdims": 1}, node.module))
            parts.append(part.name)
        sizes = self._part.sizes
        joined = graph.declare(graph.fresh("parts"), (len(sizes), *kept[1:]), np.float32)
        made.append(Node("Concat", parts, [joined.name], {"axis": 0}, node.module))
        if node.op == "ReduceMean" and len(set(sizes)) > 1:  # a piece counts by its samples
            shares = np.array(sizes, np.float32).reshape(-1, *(1 for _ in kept[1:])) * np.float32(len(sizes) / sum(sizes))
            weighted = graph.declare(graph.fresh("parts"), joined.shape, np.float32)
            made.append(Node("Mul", [joined.name, graph.constant(shares).name], [weighted.name], {}, node.module))
            joined = weighted
        made.append(Node(node.op, [joined.name, *node.inputs[1:]], list(node.outputs), dict(node.attributes), node.module))
