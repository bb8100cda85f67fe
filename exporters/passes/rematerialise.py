"""Trades time for memory: what stands idle at the peak is computed again where it is needed, or kept in a smaller form.

Of the tensors that a graph holds across its peak without reading them, the one that is cheapest to do without is taken, again and again: a
tensor is computed again just before its late readers from what is alive there anyway; a truth value is kept as a bit; a sign as one byte. Which
way and in which order follows from a rough count of arithmetic and of bytes moved, so the result is the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgeadapt.exporters.ir import Graph, Node
from edgeadapt.exporters.passes.simplify import drop_unread
from edgeadapt.memory import Plan, best_order
from edgeadapt.memory.rules import VIEWS

ROUNDS = 400
"""At most this many choices."""

PASSES = 4
"""At most this many times the nodes are ordered anew."""

EFFORT = 0.3
"""How much work each of these orders is worth; the last one is the caller's affair."""

SMALL = 0.02
"""Tensors below this share of the largest one that stands idle are left alone."""

TINY = 0.0005
"""Tensors below this share of the peak are simply kept longer where something else is computed from them again."""

DEPTH = 24
"""At most this many nodes are repeated for one tensor."""

_OPERATIONS, _BYTES = 1 / 20e9, 1 / 8e9  # seconds of one core, roughly: only their ratio matters


def seconds(graph: Graph, node: Node) -> float:
    """A rough time of one node."""
    values = graph.values
    moved = sum(values[name].nbytes for name in (*node.inputs, *node.outputs) if name)
    if node.op in VIEWS:
        return 0.0
    operations = 0
    if node.op == "Conv":
        operations = 2 * math.prod(values[node.outputs[0]].shape) * math.prod(values[node.inputs[1]].shape[1:])
    elif node.op == "ConvTranspose":
        operations = 2 * math.prod(values[node.inputs[0]].shape) * math.prod(values[node.inputs[1]].shape[1:])
    elif node.op in ("MatMul", "Gemm"):
        operations = 2 * math.prod(values[node.outputs[0]].shape) * values[node.inputs[0]].shape[-1]
    elif node.op in ("Exp", "Log", "Erf", "Tanh", "Sigmoid", "Softmax", "LogSoftmax", "Pow", "Div"):
        operations = 8 * math.prod(values[node.outputs[0]].shape)
    return operations * _OPERATIONS + moved * _BYTES


def total_seconds(graph: Graph) -> float:
    """A rough time of the whole graph."""
    return sum(seconds(graph, node) for node in graph.nodes)


@dataclass(frozen=True)
class _Choice:
    """One way to shorten a block's life: nodes to insert at a position, and names that readers from there on read instead."""

    block: str
    at: int
    before: list[Node]
    early: list[Node]
    after: int
    renamed: dict[str, str]
    cost: float
    gain: int


class _Graph:
    """A graph in its order, with what the search asks of it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.plan = Plan(graph)
        self.curve = self.plan.curve()
        self.limit = int(TINY * max(self.curve, default=0))
        self.producer = {out: index for index, node in enumerate(graph.nodes) for out in node.outputs if out}
        self.readers = graph.readers()
        self.tensors: dict[str, list[str]] = {}
        for name, block in self.plan.holders.items():
            self.tensors.setdefault(block, []).append(name)
        self.free = {*graph.inputs, *graph.constants}
        self.last: dict[str, int] = {}
        for block in self.plan.sizes:
            uses = [index for name in self.names(block) for index in self.readers.get(name, ())]
            self.last[block] = max(uses, default=self.producer[block])

    def names(self, block: str) -> list[str]:
        """The tensors in a block."""
        return [block, *self.tensors.get(block, ())]

    def owner(self, name: str) -> str:
        """The block of a tensor."""
        return self.plan.holders.get(name, name)

    def idle(self, position: int) -> Iterator[tuple[str, int]]:
        """Blocks that are held at a position, not read there and not made there, with their first reader after it."""
        for block in self.plan.standing(position):
            uses = sorted(index for name in self.names(block) for index in self.readers.get(name, ()))
            made = [self.producer[name] for name in self.names(block) if name in self.producer]
            later = [index for index in uses if index > position]
            if later and position not in uses and max(made) < position:
                yield block, later[0]

    def recomputed(self, block: str, at: int) -> list[int] | None:
        """The nodes that give the block's tensors read from `at` on again, from what is alive there; None if they are too many."""
        wanted = [name for name in self.names(block) if any(index >= at for index in self.readers.get(name, ()))]
        needed: set[int] = set()
        stack = list(wanted)
        while stack:
            name = stack.pop()
            if name in self.free or self._small(name) or (self.owner(name) != block and self._stays(name, at)):
                continue
            index = self.producer.get(name)
            if index is None or name in self.graph.outputs:
                return None
            if index not in needed:
                needed.add(index)
                if len(needed) > DEPTH:
                    return None
                stack += [item for item in self.graph.nodes[index].inputs if item]
        return sorted(needed)

    def _small(self, name: str) -> bool:
        """Whether a tensor is so small that it is simply kept longer."""
        return name in self.producer and self.owner(name) == name and self.plan.sizes.get(name, self.limit) < self.limit

    def _stays(self, name: str, at: int) -> bool:
        """Whether this tensor itself, not one written over it, is still in its block at `at`."""
        block = self.owner(name)
        if self.last.get(block, -1) < at:
            return False
        writers = [self.producer[item] for item in self.names(block) if self.graph.nodes[self.producer[item]].op not in VIEWS]
        return self.producer[name] >= max(writers) or (len(writers) == 1 and self.graph.nodes[self.producer[name]].op in VIEWS)


def _again(state: _Graph, block: str, at: int) -> _Choice | None:
    """Compute it again."""
    nodes = state.recomputed(block, at)
    if nodes is None:
        return None
    graph = state.graph
    renamed: dict[str, str] = {}
    clones = []
    for index in nodes:
        node = graph.nodes[index]
        for out in node.outputs:
            if out:
                renamed[out] = graph.declare(graph.fresh("again"), graph.values[out].shape, graph.values[out].dtype).name
        inputs = [renamed.get(name, name) for name in node.inputs]
        clones.append(Node(node.op, inputs, [renamed.get(out, out) for out in node.outputs], dict(node.attributes), node.module))
    cost = sum(seconds(graph, node) for node in clones)
    return _Choice(block, at, clones, [], 0, renamed, cost, state.plan.sizes[block])


def _bits(state: _Graph, block: str, at: int) -> _Choice | None:
    """Keep truth values as bits: eight stretches of the tensor, one a bit."""
    graph = state.graph
    value = graph.values[block]
    count = math.prod(value.shape)
    if value.dtype != np.bool_ or count % 8 or state.tensors.get(block):
        return None
    scratch = graph.beside()
    scratch.module = graph.nodes[state.producer[block]].module
    rows = scratch.op("Reshape", [value, scratch.ints([8, count // 8])], (8, count // 8))
    weights = scratch.constant(2.0 ** np.arange(8)[None], np.float32)
    packed = scratch.op("MatMul", [weights, scratch.op("Cast", [rows], rows.shape, np.float32, to=np.dtype(np.float32))], (1, count // 8), np.float32)
    kept = scratch.op("Cast", [packed], packed.shape, np.uint8, to=np.dtype(np.uint8))
    early = scratch.nodes
    scratch.nodes = []
    masked = scratch.op("BitwiseAnd", [kept, scratch.constant(2 ** np.arange(8)[:, None], np.uint8)], rows.shape, np.uint8)
    truth = scratch.op("Cast", [masked], rows.shape, np.bool_, to=np.dtype(np.bool_))
    back = scratch.op("Reshape", [truth, scratch.ints(value.shape)], value.shape, np.bool_)
    cost = sum(seconds(graph, node) for node in (*early, *scratch.nodes))
    return _Choice(block, at, scratch.nodes, early, _after(state, block, at), {block: back.name}, cost, state.plan.sizes[block] * 7 // 8)


def _byte(state: _Graph, block: str, at: int) -> _Choice | None:
    """Keep a sign as one byte."""
    graph = state.graph
    value = graph.values[block]
    if graph.nodes[state.producer[block]].op != "Sign" or value.dtype != np.float32 or state.tensors.get(block):
        return None
    kept = graph.declare(graph.fresh("byte"), value.shape, np.int8)
    back = graph.declare(graph.fresh("sign"), value.shape, np.float32)
    module = graph.nodes[state.producer[block]].module
    early = [Node("Cast", [block], [kept.name], {"to": np.dtype(np.int8)}, module)]
    late = [Node("Cast", [kept.name], [back.name], {"to": np.dtype(np.float32)}, module)]
    cost = seconds(graph, early[0]) + seconds(graph, late[0])
    return _Choice(block, at, late, early, _after(state, block, at), {block: back.name}, cost, state.plan.sizes[block] * 3 // 4)


def _after(state: _Graph, block: str, at: int) -> int:
    """The last node before `at` that reads or makes the block."""
    uses = [index for index in state.readers.get(block, ()) if index < at]
    return max([state.producer[block], *uses])


def _apply(graph: Graph, choice: _Choice) -> None:
    nodes = list(graph.nodes)
    for index in range(choice.at, len(nodes)):
        node = nodes[index]
        if any(name in choice.renamed for name in node.inputs):
            inputs = [choice.renamed.get(name, name) for name in node.inputs]
            nodes[index] = Node(node.op, inputs, node.outputs, node.attributes, node.module)
    nodes[choice.at : choice.at] = choice.before
    if choice.early:
        nodes[choice.after + 1 : choice.after + 1] = choice.early
    graph.nodes = nodes


def rematerialise(graph: Graph, allowance: float, target: int = 0) -> float:
    """Lower the peak in place: what stands idle at the peak is done without, then the nodes are ordered anew, and again while that helps.

    Args:
        graph: the graph, scheduled.
        allowance: the most time to spend, as a share of the graph's own.
        target: stop at this peak, in bytes.

    Returns:
        the rough time spent, as a share of the graph's own.
    """
    whole = total_seconds(graph)
    spent, peak = 0.0, Plan(graph).peak
    for _ in range(PASSES):
        spent += _lower(graph, allowance * whole - spent, target)
        graph.nodes = [graph.nodes[index] for index in best_order(graph, effort=EFFORT)]
        before, peak = peak, Plan(graph).peak
        if peak >= before or peak <= target:
            break
    return spent / whole if whole else 0.0


def _lower(graph: Graph, seconds_left: float, target: int) -> float:
    """Do without one tensor after the other, in the order of the nodes as it is; the rough seconds spent."""
    spent = 0.0
    banned: set[tuple[str, str]] = set()
    state = _Graph(graph)
    for _ in range(ROUNDS):
        peak = max(state.curve)
        if peak <= target:
            break
        position = state.curve.index(peak)
        best: _Choice | None = None
        idle = list(state.idle(position))
        least = SMALL * max((state.plan.sizes[block] for block, _ in idle), default=0)
        for block, at in idle:
            if state.plan.sizes[block] < least or (block, graph.nodes[at].outputs[0]) in banned:
                continue
            for way in (_again, _bits, _byte):
                choice = way(state, block, at)
                if choice is not None and (best is None or choice.cost / choice.gain < best.cost / best.gain):
                    best = choice
        if best is None or spent + best.cost > seconds_left:
            break
        before = graph.nodes
        _apply(graph, best)
        drop_unread(graph)
        following = _Graph(graph)
        after = following.curve
        if max(after) > peak or (max(after) == peak and after.count(peak) >= state.curve.count(peak)):
            graph.nodes = before
            banned.add((best.block, before[best.at].outputs[0]))
            continue
        state = following
        spent += best.cost
    return spent
