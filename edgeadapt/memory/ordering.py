"""A graph as the schedule sees it: nodes and blocks by number, and what a node costs after any set of others.

What is alive depends on which nodes have run, not on their order, as long as every node runs after those it reads from: a view belongs to the block
that it looks into, and writing over an input is as good as taking a block and giving one back, but for the moment in between. A block that nobody
reads stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeadapt.memory.graph import GraphLike
from edgeadapt.memory.rules import IN_PLACE, VIEWS, Machine, rounded, workspace


class Problem:
    """Nodes and blocks by number.

    Args:
        graph: the graph.
        machine: what the workspace depends on.
        order: a possible order of its nodes, by which they are numbered; file order where None.

    Attributes:
        index: each node's place in the file.
        size: bytes of each block.
        maker: the node that takes it.
        readers: the nodes that read it, once for each time.
        made: the blocks that each node takes, and `taken`, their bytes.
        read: the blocks that each node reads, and how often.
        scratch: bytes of workspace while it runs.
        over: the block that it writes over if nobody else needs it any more, or -1.
        before, after: the nodes that it must follow, and those that must follow it.
    """

    def __init__(self, graph: GraphLike, machine: Machine, order: Sequence[int] | None = None) -> None:
        self.index = list(order) if order is not None else list(range(len(graph.nodes)))
        self.size: list[int] = []
        self.maker: list[int] = []
        outside, nodes = {*graph.inputs, *graph.constants, *graph.outputs}, [graph.nodes[index] for index in self.index]
        block: dict[str, int] = {}
        producer: dict[str, int] = {}
        self.before: list[list[int]] = []
        self.made: list[list[int]] = []
        self.read: list[list[tuple[int, int]]] = []
        self.over: list[int] = []
        for index, node in enumerate(nodes):
            read = [block[name] for name in node.inputs if name in block]
            self.read.append([(one, read.count(one)) for one in dict.fromkeys(read)])
            self.before.append(sorted({producer[name] for name in node.inputs if name in producer}))
            self.made.append([])
            over = -1
            for position, out in enumerate(node.outputs):
                if not out:
                    continue
                producer[out] = index
                if out in outside:
                    continue
                if position == 0 and node.op in VIEWS and node.inputs and node.inputs[0]:
                    if node.inputs[0] in block:
                        block[out] = block[node.inputs[0]]
                    continue
                if position == 0:
                    over = self._over(graph, node.op, node.inputs, out, block)
                block[out] = len(self.size)
                self.made[index].append(block[out])
                self.size.append(rounded(graph.values[out].nbytes))
                self.maker.append(index)
            self.over.append(over)
        self.readers: list[list[int]] = [[] for _ in self.size]
        self.after: list[list[int]] = [[] for _ in nodes]
        for index in range(len(nodes)):
            for one, times in self.read[index]:
                self.readers[one] += [index] * times
            for source in self.before[index]:
                self.after[source].append(index)
        self.taken = [sum(self.size[one] for one in made) for made in self.made]
        self.scratch = [workspace(graph, node, machine) for node in nodes]

    def __len__(self) -> int:
        return len(self.made)

    @staticmethod
    def _over(graph: GraphLike, op: str, inputs: Sequence[str], out: str, block: dict[str, int]) -> int:
        slot = IN_PLACE.get(op, len(inputs))
        if slot >= len(inputs) or inputs[slot] not in block:
            return -1
        old, new = graph.values[inputs[slot]], graph.values[out]
        return block[inputs[slot]] if old.shape == new.shape and old.nbytes == new.nbytes else -1

    def whole(self) -> Segment:
        """All nodes, from the start."""
        return Segment(self, tuple(range(len(self))), frozenset(), 0)


class Segment:
    """Nodes that run after some others and before the rest, in an order that is to be found.

    Args:
        problem: what it is a part of.
        nodes: in the order of their numbers.
        done: the nodes that have run before; with any of `nodes` also what these must follow.
        base: bytes that are alive at the start.

    Attributes:
        left: how often the blocks that the nodes read are still to be read.
    """

    def __init__(self, problem: Problem, nodes: tuple[int, ...], done: frozenset[int], base: int) -> None:
        self.problem, self.nodes, self.done, self.base = problem, nodes, done, base
        self.inside = frozenset(nodes)
        self.left: dict[int, int] = {}
        for node in nodes:
            for block, _ in problem.read[node]:
                if block not in self.left:
                    readers = problem.readers[block]
                    self.left[block] = sum(reader not in done for reader in readers) if done else len(readers)

    def split(self, first: frozenset[int]) -> tuple[Segment, Segment]:
        """The nodes of `first`, and those that follow."""
        one = Segment(self.problem, tuple(node for node in self.nodes if node in first), self.done, self.base)
        other = tuple(node for node in self.nodes if node not in first)
        return one, Segment(self.problem, other, self.done | first, one.run(one.nodes).after)

    def run(self, order: Sequence[int]) -> Run:
        """What an order of the nodes costs."""
        problem, left, alive = self.problem, dict(self.left), self.base
        size, curve = problem.size, []
        for node in order:
            top, over = alive + problem.taken[node] + problem.scratch[node], problem.over[node]
            if over >= 0 and left[over] == 1:
                top -= size[over]
            curve.append(top)
            alive += problem.taken[node]
            for block, times in problem.read[node]:
                left[block] -= times
                if not left[block]:
                    alive -= size[block]
        return Run(tuple(order), curve, max(curve, default=0), alive)


@dataclass(frozen=True)
class Run:
    """An order of a segment's nodes, the bytes in use while each runs, the largest of these, and what is alive at the end."""

    order: tuple[int, ...]
    curve: list[int]
    peak: int
    after: int

    @property
    def top(self) -> int:
        """The first node at the peak."""
        return self.order[self.curve.index(self.peak)]


class Budget:
    """Work that may still be done, in visits of a node, a block or an arc. Not time: the same graph gets the same order on every machine."""

    def __init__(self, visits: int) -> None:
        self.left = visits

    def spend(self, visits: int) -> bool:
        """Whether there was something left before this."""
        before, self.left = self.left, self.left - visits
        return before > 0
