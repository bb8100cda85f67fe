"""Trades time for memory: what stands idle at the peak is computed again where it is needed, or kept in a smaller form.

Of the tensors that a graph holds across its peak without reading them, the one that is cheapest to do without is taken, again and again: a
tensor is computed again just before its late readers from what is alive there anyway; a truth value is kept as a bit; a sign as one byte. Which
way and in which order follows from a rough count of arithmetic and of bytes moved, so the result is the same everywhere.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from edgeadapt.exporters.ir import Graph, Node, Value
from edgeadapt.exporters.passes.order import order
from edgeadapt.exporters.passes.simplify import drop_unread
from edgeadapt.memory import Plan
from edgeadapt.memory.rules import VIEWS

WORK = 800_000
"""Visits of nodes, over all choices and orders: what planning a graph anew for a choice takes, and looking for the nodes to repeat. Some ten
microseconds each on a workstation. The step of a ResNet-56 with 1,900 nodes takes 170,000."""

SINGLY = 240_000
"""Of these, as long as no more are spent, choices are made one by one, each looked at before the next."""

DOUBLED = 8
"""After that, as in graphs of many hundreds of small tensors, more are made at a time: twice as many after every so many looks."""

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
    elif node.op in ("MatMul", "MatMulInteger", "Gemm"):
        operations = 2 * math.prod(values[node.outputs[0]].shape) * values[node.inputs[0]].shape[-1]
    elif node.op in ("Exp", "Log", "Erf", "Tanh", "Sigmoid", "Softmax", "LogSoftmax", "Pow", "Div"):
        operations = 8 * math.prod(values[node.outputs[0]].shape)
    return operations * _OPERATIONS + moved * _BYTES


def total_seconds(graph: Graph) -> float:
    """A rough time of the whole graph."""
    return sum(seconds(graph, node) for node in graph.nodes)


class _Work:
    """What is left of the work, in visits of nodes."""

    def __init__(self, left: int) -> None:
        self.left, self._end, self._looks = left, left - SINGLY, 0

    def look(self, graph: Graph) -> None:
        """Counts a plan of the graph."""
        self.left -= len(graph.nodes)
        self._looks += self.left < self._end

    @property
    def many(self) -> int:
        """How many choices to make before the next look."""
        return 2 ** min(self._looks // DOUBLED, 16)


@dataclass(frozen=True)
class _Way:
    """A way to shorten a block's life, weighed.

    Attributes:
        block: the block.
        at: the node before which it is read again.
        cost: rough seconds.
        gain: bytes that it frees at the peak.
        make: gives the nodes.
    """

    block: str
    at: int
    cost: float
    gain: int
    make: Callable[[], _Choice]

    @property
    def ratio(self) -> float:
        """Seconds a byte."""
        return self.cost / self.gain


_ratio = attrgetter("ratio")


@dataclass(frozen=True)
class _Choice:
    """A way to shorten a block's life, made.

    Attributes:
        at: the first output of the node before which `before` is inserted; readers from there on read other names.
        after: the first output of the node after which `early` is.
        renamed: those names.
    """

    at: str
    before: list[Node]
    early: list[Node]
    after: str
    renamed: dict[str, str]


class _Graph:
    """A graph in its order, with what the search asks of it. plan: its plan, made already."""

    def __init__(self, graph: Graph, plan: Plan, curve: list[int], work: _Work) -> None:
        self.graph, self.plan, self.curve, self._work = graph, plan, curve, work
        self.limit = int(TINY * max(self.curve, default=0))
        self.producer = {out: index for index, node in enumerate(graph.nodes) for out in node.outputs if out}
        self.readers = graph.readers()
        self.tensors: dict[str, list[str]] = {}
        for name, block in self.plan.holders.items():
            self.tensors.setdefault(block, []).append(name)
        self.free = {*graph.inputs, *graph.constants}
        self._seconds: dict[int, float] = {}
        self.last: dict[str, int] = {}
        for block in self.plan.sizes:
            uses = [index for name in self.names(block) for index in self.readers.get(name, ())]
            self.last[block] = max(uses, default=self.producer[block])

    def seconds(self, index: int) -> float:
        """A rough time of a node."""
        if index not in self._seconds:
            self._seconds[index] = seconds(self.graph, self.graph.nodes[index])
        return self._seconds[index]

    def name(self, index: int) -> str:
        """The first output of a node."""
        return self.graph.nodes[index].outputs[0]

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

    def recomputed(self, block: str, at: int, most: float) -> list[int] | None:
        """The nodes that give the block's tensors read from `at` on again, from what is alive there; None if they are too many or take too long.

        most: rough seconds, above which they are not looked for any further.
        """
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
                self._work.left -= 1
                most -= self.seconds(index)
                if len(needed) > DEPTH or most < 0:
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


def _again(state: _Graph, block: str, at: int, worst: float) -> _Way | None:
    """Compute it again. worst: seconds a byte, above which that would not be chosen."""
    gain = state.plan.sizes[block]
    nodes = state.recomputed(block, at, worst * gain * (1 + 1e-9))  # a little more, for sums in another order
    if not nodes:  # too many, or none: what is small is kept as it is
        return None
    graph = state.graph

    def make() -> _Choice:
        renamed: dict[str, str] = {}
        clones = []
        for node in (graph.nodes[index] for index in nodes):
            for out in node.outputs:
                if out:
                    renamed[out] = graph.declare(graph.fresh("again"), graph.values[out].shape, graph.values[out].dtype).name
            inputs = [renamed.get(name, name) for name in node.inputs]
            clones.append(Node(node.op, inputs, [renamed.get(out, out) for out in node.outputs], dict(node.attributes), node.module))
        return _Choice(state.name(at), clones, [], "", renamed)

    return _Way(block, at, sum(state.seconds(index) for index in nodes), gain, make)


def _bits(state: _Graph, block: str, at: int) -> _Way | None:
    """Keep truth values as bits: eight stretches of the tensor, one a bit."""
    graph = state.graph
    value = graph.values[block]
    count = math.prod(value.shape)
    if value.dtype != np.bool_ or count % 8 or state.tensors.get(block):
        return None

    def make() -> _Choice:
        early, late, back = _as_bits(graph, value, graph.nodes[state.producer[block]].module)
        return _Choice(state.name(at), late, early, _after(state, block, at), {block: back})

    # cast, product, cast; mask, cast: bytes, but for the products, which are 32 bits for eight truth values, and for what is kept, an eighth
    moved = (1 + 1) * count + (1 + 4 / 8) * count + (4 + 1) * count / 8 + (1 / 8 + 1) * count + 2 * count
    return _Way(block, at, 2 * count * _OPERATIONS + (moved + 8 + 8) * _BYTES, state.plan.sizes[block] * 7 // 8, make)


def _as_bits(graph: Graph, value: Value, module: str) -> tuple[list[Node], list[Node], str]:
    """Nodes that pack truth values, nodes that unpack them, and the name of what these give."""
    count = math.prod(value.shape)
    scratch = graph.beside()
    scratch.module = module
    rows = scratch.op("Reshape", [value, scratch.ints([8, count // 8])], (8, count // 8))
    weights = scratch.constant(2 ** np.arange(8)[None], np.uint8)
    bits = scratch.op("Cast", [rows], rows.shape, np.int8, to=np.dtype(np.int8))
    packed = scratch.op("MatMulInteger", [weights, bits], (1, count // 8), np.int32)
    kept = scratch.op("Cast", [packed], packed.shape, np.uint8, to=np.dtype(np.uint8))
    early, scratch.nodes = scratch.nodes, []
    masked = scratch.op("BitwiseAnd", [kept, scratch.constant(2 ** np.arange(8)[:, None], np.uint8)], rows.shape, np.uint8)
    truth = scratch.op("Cast", [masked], rows.shape, np.bool_, to=np.dtype(np.bool_))
    back = scratch.op("Reshape", [truth, scratch.ints(value.shape)], value.shape, np.bool_)
    return early, scratch.nodes, back.name


def _byte(state: _Graph, block: str, at: int) -> _Way | None:
    """Keep a sign as one byte."""
    graph = state.graph
    value = graph.values[block]
    if graph.nodes[state.producer[block]].op != "Sign" or value.dtype != np.float32 or state.tensors.get(block):
        return None

    def make() -> _Choice:
        kept = graph.declare(graph.fresh("byte"), value.shape, np.int8)
        back = graph.declare(graph.fresh("sign"), value.shape, np.float32)
        module = graph.nodes[state.producer[block]].module
        early = [Node("Cast", [block], [kept.name], {"to": np.dtype(np.int8)}, module)]
        late = [Node("Cast", [kept.name], [back.name], {"to": np.dtype(np.float32)}, module)]
        return _Choice(state.name(at), late, early, _after(state, block, at), {block: back.name})

    return _Way(block, at, 2 * (4 + 1) * math.prod(value.shape) * _BYTES, state.plan.sizes[block] * 3 // 4, make)


def _after(state: _Graph, block: str, at: int) -> str:
    """The first output of the last node before `at` that reads or makes the block."""
    uses = [index for index in state.readers.get(block, ()) if index < at]
    return state.name(max([state.producer[block], *uses]))


def _apply(graph: Graph, choices: list[_Choice]) -> None:
    """Insert the nodes of choices, and have readers from there on read what these make."""
    begins: dict[str, list[_Choice]] = {}
    follows: dict[str, list[Node]] = {}
    for choice in choices:
        begins.setdefault(choice.at, []).append(choice)
        if choice.early:
            follows.setdefault(choice.after, []).extend(choice.early)
    nodes: list[Node] = []
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        here = begins.get(node.outputs[0], ())
        nodes += (_reading(clone, renamed) for choice in here for clone in choice.before)
        for choice in here:
            renamed = {**renamed, **choice.renamed}
        nodes.append(_reading(node, renamed))
        if not graph.late(node):
            graph.in_forward(follows.get(node.outputs[0], ()))
        nodes += follows.get(node.outputs[0], ())
    graph.nodes = nodes


def _reading(node: Node, renamed: dict[str, str]) -> Node:
    """The node, or one like it that reads other names."""
    if not renamed or not any(name in renamed for name in node.inputs):
        return node
    return Node(node.op, [renamed.get(name, name) for name in node.inputs], node.outputs, node.attributes, node.module)


def rematerialise(graph: Graph, allowance: float, target: int = 0, work: int = WORK) -> float:
    """Lower the peak in place: what stands idle at the peak is done without, then the nodes are ordered anew, and again while that helps.

    Args:
        graph: the graph, scheduled.
        allowance: the most time to spend, as a share of the graph's own.
        target: stop at this peak, in bytes.
        work: stop after so many visits of nodes, about.

    Returns:
        the rough time spent, as a share of the graph's own.
    """
    whole, left = total_seconds(graph), _Work(work)
    spent, peak = 0.0, Plan(graph).peak
    for _ in range(PASSES):
        _masks_first(graph)
        spent += _lower(graph, allowance * whole - spent, target, left)
        graph.nodes = [graph.nodes[index] for index in order(graph, EFFORT)]
        before, peak = peak, Plan(graph).peak
        if peak >= before or peak <= target or left.left <= 0:
            break
    return spent / whole if whole else 0.0


def _masks_first(graph: Graph) -> None:
    """Moves what makes truth values to where it can first be made.

    An order puts them off, as long as what they are made of is no larger; kept as bits, they would be far smaller.
    """
    moved: dict[str, list[Node]] = {}
    makers = {out: index for index, node in enumerate(graph.nodes) for out in node.outputs}
    gone: set[int] = set()
    for index, node in enumerate(graph.nodes):
        before = max((makers.get(name, -1) for name in node.inputs), default=-1)
        if graph.values[node.outputs[0]].dtype != np.bool_ or node.op in VIEWS or graph.late(node):
            continue  # what is made in the backward pass is not kept for it
        if 0 <= before < index - 1 and before not in gone:
            moved.setdefault(graph.nodes[before].outputs[0], []).append(node)
            gone.add(index)
    nodes: list[Node] = []
    for index, node in enumerate(graph.nodes):
        if index not in gone:
            nodes += [node, *moved.get(node.outputs[0], ())]
    graph.nodes = nodes


def _lower(graph: Graph, seconds_left: float, target: int, work: _Work) -> float:
    """Do without one tensor after the other, in the order of the nodes as it is; the rough seconds spent."""
    spent = 0.0
    banned: set[tuple[str, str]] = set()
    plan = Plan(graph)
    state = _Graph(graph, plan, plan.curve(), work)
    many = 1
    while work.left > 0:
        peak = max(state.curve, default=0)
        if peak <= target:
            break
        found = _cheapest(state, state.curve.index(peak), banned, seconds_left - spent, many)
        if not found:
            break
        before = graph.nodes
        _apply(graph, [way.make() for way in found])
        drop_unread(graph)
        work.look(graph)
        plan = Plan(graph)
        after = plan.curve()
        highest = max(after)
        if highest > peak or (highest == peak and after.count(peak) >= state.curve.count(peak)):
            graph.nodes = before
            if len(found) == 1:
                banned.add((found[0].block, before[found[0].at].outputs[0]))
            many = 1
            continue
        state = _Graph(graph, plan, after, work)
        spent += sum(way.cost for way in found)
        many = work.many
    return spent


def _cheapest(state: _Graph, position: int, banned: set[tuple[str, str]], seconds_left: float, many: int) -> list[_Way]:
    """The way that costs least for what it frees, of what stands idle at a position, or as many of the next ones; none if there is no time for it."""
    idle, sizes = list(state.idle(position)), state.plan.sizes
    least = SMALL * max((sizes[block] for block, _ in idle), default=0)
    best: list[_Way] = []  # the cheapest, no more than `many`
    for block, at in idle:
        if sizes[block] < least or (block, state.name(at)) in banned:
            continue
        kept = [way for way in (_bits(state, block, at), _byte(state, block, at)) if way is not None]
        worst = min([*(way.ratio for way in kept), *([best[-1].ratio] if len(best) == many else [])], default=math.inf)
        again = _again(state, block, at, worst)
        ways = kept if again is None else [again, *kept]
        if ways:
            insort(best, min(ways, key=_ratio), key=_ratio)
            del best[many:]
    taken = []
    for way in best:
        seconds_left -= way.cost
        if seconds_left < 0:
            break
        taken.append(way)
    return taken
