"""Orders a graph's nodes so that few bytes are alive at once.

A greedy list schedule: of the nodes that are ready, one that frees memory goes first, else the one that came first. Backward nodes thus wait for
their gradients, while masks and reductions of a tensor run as soon as they let it go.
"""

from __future__ import annotations

import heapq

from edgeadapt.memory.graph import GraphLike
from edgeadapt.memory.liveness import Plan
from edgeadapt.memory.rules import VIEWS, X86, Machine, rounded


class _Blocks:
    """Which tensors share a block through views, and what each block takes; in-place writing is not foreseen."""

    def __init__(self, graph: GraphLike) -> None:
        self._graph = graph
        self._outside = {*graph.inputs, *graph.constants, *graph.outputs}
        self._root: dict[str, str] = {}
        for node in graph.nodes:
            if node.op in VIEWS:
                self._root[node.outputs[0]] = self.owner(node.inputs[0])

    def owner(self, name: str) -> str:
        """The tensor whose block `name` uses."""
        return self._root.get(name, name)

    def size(self, name: str) -> int:
        """Bytes that `name` itself takes."""
        return 0 if not name or name in self._outside or name in self._root else rounded(self._graph.values[name].nbytes)


def greedy(graph: GraphLike) -> list[int]:
    """The order of the list schedule."""
    buffers = _Blocks(graph)
    producer = {out: index for index, node in enumerate(graph.nodes) for out in node.outputs}
    reads = [{buffers.owner(name) for name in node.inputs if name} for node in graph.nodes]
    readers: dict[str, set[int]] = {}
    for index, names in enumerate(reads):
        for name in names:
            readers.setdefault(name, set()).add(index)
    successors: list[list[int]] = [[] for _ in graph.nodes]
    waits = []
    for index, node in enumerate(graph.nodes):
        sources = {producer[name] for name in node.inputs if name in producer}
        waits.append(len(sources))
        for source in sources:
            successors[source].append(index)

    def growth(index: int) -> int:
        grown = sum(buffers.size(out) for out in graph.nodes[index].outputs)
        return grown - sum(buffers.size(name) for name in reads[index] if readers[name] == {index})

    ready = {index for index, count in enumerate(waits) if count == 0}
    heap = sorted(ready)
    order: list[int] = []
    freeing: set[int] = {index for index in ready if growth(index) <= 0}
    while ready:
        if freeing:
            index = min(freeing, key=lambda k: (growth(k), k))
        else:
            while heap[0] not in ready:
                heapq.heappop(heap)
            index = heap[0]
        ready.discard(index)
        freeing.discard(index)
        order.append(index)
        touched = set()
        for name in reads[index]:
            readers[name].discard(index)
            touched |= readers[name]
        for following in successors[index]:
            waits[following] -= 1
            if waits[following] == 0:
                ready.add(following)
                heapq.heappush(heap, following)
                touched.add(following)
        for other in touched & ready:
            if growth(other) <= 0:
                freeing.add(other)
    return order


def best_order(graph: GraphLike, machine: Machine = X86) -> list[int]:
    """The order with the least peak that was found, as indices of the graph's nodes; file order if nothing is better. Deterministic."""
    before = list(range(len(graph.nodes)))
    return min((before, greedy(graph)), key=lambda order: Plan(graph, order, machine).peak)
