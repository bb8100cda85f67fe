"""Bytes in use along a graph's nodes, and what stands where most are."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgeadapt.memory.graph import Graph
from edgeadapt.memory.liveness import Plan

SCRATCH = "(workspace)"
"""Stands for an operator's own scratch memory among the tensors."""

_STATE = "state."
_NOT_PARAMETERS = tuple(f"{_STATE}{kind}" for kind in ("statistics.", "momentum.", "first.", "second.", "step"))


@dataclass(frozen=True)
class Standing:
    """A tensor that is held at the peak.

    Attributes:
        tensor: its name in the graph.
        shape: its sizes; empty for a scalar and for workspace.
        bytes: of its block.
        op: the operator that made it.
        module: the module that it came from: the user's, or the method's if the operator reads one of its parameters; where the operator belongs to
            none, that of the nearest operator before it.
        own: whether the operator itself belongs to that module.
        made, freed: nodes, counted from 0, after whose start and end the block is there.
    """

    tensor: str
    shape: tuple[int, ...]
    bytes: int
    op: str
    module: str
    own: bool
    made: int
    freed: int

    @property
    def place(self) -> str:
        """The module in words."""
        return self.module if self.own or not self.module else f"after {self.module}"


@dataclass(frozen=True)
class Curve:
    """One graph's use of memory.

    Attributes:
        graph: its name.
        points: bytes in use while each node runs, workspace included.
        peak: the position of the largest.
        op, module, own: of the node there; see `Standing`.
        standing: what is held there, the largest first.
    """

    graph: str
    points: tuple[int, ...]
    peak: int
    op: str
    module: str
    own: bool
    standing: tuple[Standing, ...]

    @property
    def most(self) -> int:
        """Bytes at the peak."""
        return self.points[self.peak] if self.points else 0

    @property
    def where(self) -> str:
        """The node at the peak in words."""
        module = f"{' of' if self.own else ' after'} {self.module}" if self.module else ""
        return f"node {self.peak + 1} of {len(self.points)}, {self.op}{module}"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "bytes": self.most}


def curve(name: str, graph: Graph, plan: Plan) -> Curve:
    """The curve of a planned graph."""
    points = plan.curve()
    if not points:
        return Curve(name, (), 0, "", "", False, ())
    peak = max(range(len(points)), key=points.__getitem__)
    producer = {out: index for index in plan.order for out in graph.nodes[index].outputs if out}
    begun = {tensor: position for position, event in enumerate(plan.events) for tensor in event.taken}
    ended = {tensor: position for position, event in enumerate(plan.events) for tensor in event.freed}
    nearest = _Nearest(graph, producer)
    held = []
    for tensor in plan.standing(peak):
        index = producer[tensor]
        module, own = nearest(index)
        last = ended.get(tensor, len(points) - 1)
        held.append(Standing(tensor, graph.values[tensor].shape, plan.sizes[tensor], graph.nodes[index].op, module, own, begun[tensor], last))
    at = plan.order[peak]
    module, own = nearest(at)
    if plan.events[peak].scratch:
        held.append(Standing(SCRATCH, (), plan.events[peak].scratch, graph.nodes[at].op, module, own, peak, peak))
    held.sort(key=lambda item: -item.bytes)
    return Curve(name, tuple(points), peak, graph.nodes[at].op, module, own, tuple(held))


class _Nearest:
    """The module of a node, or of the nearest one before it that has one."""

    def __init__(self, graph: Graph, producer: Mapping[str, int]) -> None:
        self._graph, self._producer = graph, producer

    def __call__(self, index: int) -> tuple[str, bool]:
        nodes = self._graph.nodes
        if nodes[index].module:
            return nodes[index].module, True
        for name in nodes[index].inputs:
            if name.startswith(_STATE) and not name.startswith(_NOT_PARAMETERS):
                return name.removeprefix(_STATE).rpartition(".")[0], True
        waiting, seen = deque([index]), {index}
        while waiting:
            for name in nodes[waiting.popleft()].inputs:
                before = self._producer.get(name)
                if before is None or before in seen:
                    continue
                if nodes[before].module:
                    return nodes[before].module, False
                seen.add(before)
                waiting.append(before)
        return "", False


def thinned(points: Sequence[int], count: int) -> list[int]:
    """At most `count` values, each the largest of its stretch, so that the peak is among them."""
    if len(points) <= count:
        return list(points)
    bounds = [len(points) * index // count for index in range(count + 1)]
    return [max(points[begin:end]) for begin, end in zip(bounds[:-1], bounds[1:])]
