"""Which tensor holds memory while which node runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from edgeadapt.memory.graph import GraphLike
from edgeadapt.memory.rules import BEFORE, IN_PLACE, VIEWS, X86, Machine, blocks, rounded


@dataclass(slots=True)
class Event:
    """What one node does to memory: blocks it takes, scratch while it runs, blocks that are given back after it.

    scratch: bytes in all; pieces: those of each block of it; before: whether it is taken before the outputs are.
    """

    taken: list[str] = field(default_factory=list)
    scratch: int = 0
    freed: list[str] = field(default_factory=list)
    pieces: tuple[int, ...] = ()
    before: bool = False


class Plan:
    """A graph's blocks in the order of execution.

    Args:
        graph: the graph.
        order: indices of its nodes; file order where None.
        machine: what the workspace depends on.

    Attributes:
        sizes: bytes of each block, rounded, by the tensor that took it.
        events: one a node, in the order.
    """

    def __init__(self, graph: GraphLike, order: Sequence[int] | None = None, machine: Machine = X86) -> None:
        self.graph = graph
        self.order = list(order) if order is not None else list(range(len(graph.nodes)))
        self.sizes: dict[str, int] = {}
        self.holders: dict[str, str] = {}
        self.events: list[Event] = []
        self._fill(machine)

    def _fill(self, machine: Machine) -> None:
        graph = self.graph
        outside = {*graph.inputs, *graph.constants, *graph.outputs}
        uses: dict[str, int] = {}
        for index in self.order:
            for name in graph.nodes[index].inputs:
                if name:
                    uses[name] = uses.get(name, 0) + 1
        block = self.holders  # of tensors in another's block
        held: dict[str, int] = {}  # uses still to come, by block

        def owner(name: str) -> str:
            return block.get(name, name)

        for index in self.order:
            node = graph.nodes[index]
            event = Event(before=node.op in BEFORE)
            for position, out in enumerate(node.outputs):
                if not out or out in outside:
                    continue
                source = self._shared(node.op, node.inputs, position)
                if source and node.op not in VIEWS and not self._last(source, out, held, owner(source)):
                    source = ""
                if source:
                    block[out] = owner(source)
                    if block[out] in held:
                        held[block[out]] += uses.get(out, 0)
                else:
                    self.sizes[out] = rounded(graph.values[out].nbytes)
                    held[out] = uses.get(out, 0)
                    event.taken.append(out)
            event.pieces = blocks(graph, node, machine)
            event.scratch = sum(event.pieces)
            for name in node.inputs:
                if name and owner(name) in held:
                    held[owner(name)] -= 1
            touched = dict.fromkeys(owner(name) for name in (*node.inputs, *node.outputs) if name)
            unread = {name for name in node.outputs if name and not uses.get(name)}  # onnxruntime frees them after the run
            event.freed = [name for name in touched if held.get(name) == 0 and name not in unread]
            for name in event.freed:
                del held[name]
            self.events.append(event)

    def _shared(self, op: str, inputs: Sequence[str], position: int) -> str:
        if position or (op not in VIEWS and op not in IN_PLACE):
            return ""
        slot = IN_PLACE.get(op, 0)
        return inputs[slot] if slot < len(inputs) else ""

    def _last(self, source: str, out: str, held: dict[str, int], owner: str) -> bool:
        values = self.graph.values
        return held.get(owner) == 1 and values[source].shape == values[out].shape and values[source].nbytes == values[out].nbytes

    def curve(self) -> list[int]:
        """Bytes in use while each node runs, scratch included."""
        used, points, sizes = 0, [], self.sizes
        for event in self.events:
            for name in event.taken:
                used += sizes[name]
            points.append(used + event.scratch)
            for name in event.freed:
                used -= sizes[name]
        return points

    def after(self) -> list[int]:
        """Bytes in use after each node, before its inputs are freed and without scratch: what onnxruntime's profiler tells, less its base."""
        used, points = 0, []
        for event in self.events:
            used += sum(self.sizes[name] for name in event.taken)
            points.append(used)
            used -= sum(self.sizes[name] for name in event.freed)
        return points

    @property
    def peak(self) -> int:
        """The largest point of the curve, in bytes."""
        return max(self.curve(), default=0)

    def standing(self, position: int) -> Iterator[str]:
        """The blocks that are held while the node at `position` of the order runs, by the tensor that took each."""
        held: dict[str, None] = {}
        for event in self.events[:position]:
            held.update(dict.fromkeys(event.taken))
            for name in event.freed:
                del held[name]
        held.update(dict.fromkeys(self.events[position].taken))
        yield from held
