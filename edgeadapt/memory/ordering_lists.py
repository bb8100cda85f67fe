"""List schedules of a segment: of the nodes that may run next, one that frees memory, else the first by some rank; from the front or from the end."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence

from edgeadapt.memory.graph import GraphLike
from edgeadapt.memory.ordering import Problem, Run, Segment
from edgeadapt.memory.rules import Machine

TURNS = 4
"""How often the best list schedule is the rank of the next."""
CROWD = 48
"""A block with more readers is not followed up at each of its reads, only near the last."""


def numbered(graph: GraphLike, machine: Machine) -> Problem:
    """The graph with its nodes numbered by a good list schedule, which hardly depends on the order in the file."""
    problem = Problem(graph, machine)
    segment = problem.whole()
    best = min(runs(segment, ranks(problem)), key=lambda run: run.peak)
    for _ in range(TURNS):
        before, best = best, min((best, *runs(segment, [_places(best.order)])), key=lambda run: run.peak)
        if best is before:
            break
    return Problem(graph, machine, best.order)


def ranks(problem: Problem) -> list[list[int]]:
    """Rules for the choice among nodes that free nothing.

    Each node's number, its place in a walk that finishes one result after another, how long a way leads to it, and how long a way leads on.
    """
    count = len(problem)
    depth, height = [0] * count, [0] * count
    for node in range(count):
        depth[node] = max((depth[other] + 1 for other in problem.before[node]), default=0)
    for node in reversed(range(count)):
        height[node] = max((height[other] + 1 for other in problem.after[node]), default=0)
    walk = _walk(problem, depth)
    by_depth = _places(sorted(range(count), key=lambda node: (depth[node], walk[node])))
    by_height = _places(sorted(range(count), key=lambda node: (-height[node], walk[node])))
    return [list(range(count)), walk, by_depth, by_height]


def _places(order: Sequence[int]) -> list[int]:
    places = [0] * len(order)
    for place, node in enumerate(order):
        places[node] = place
    return places


def _walk(problem: Problem, depth: Sequence[int]) -> list[int]:
    """Places in a depth-first walk from the results, nearest first, to what they need, farthest first."""

    def needs(node: int) -> Iterator[int]:
        return iter(sorted(problem.before[node], key=lambda other: -depth[other]))

    order: list[int] = []
    seen = [False] * len(problem)
    results = [node for node in range(len(problem)) if not problem.after[node]]
    for result in sorted(results, key=lambda node: depth[node]):
        stack = [(result, needs(result))]
        while stack:
            node, rest = stack[-1]
            following = next((other for other in rest if not seen[other]), None)
            if following is None:
                stack.pop()
                order.append(node)
            else:
                seen[following] = True
                stack.append((following, needs(following)))
    return _places(order)


def runs(segment: Segment, rules: Sequence[Sequence[int]]) -> Iterator[Run]:
    """The segment's run by every rule, from the front and from the end."""
    for rank in rules:
        yield segment.run(forward(segment, rank))
        yield segment.run(backward(segment, rank))


def forward(segment: Segment, rank: Sequence[float]) -> list[int]:
    """From the front: the node that grows memory least if one does not grow it, else the first by rank."""
    problem, left = segment.problem, dict(segment.left)
    size, readers = problem.size, problem.readers

    def growth(node: int) -> int:
        grown = problem.taken[node]
        for block, times in problem.read[node]:
            if left[block] == times:
                grown -= size[block]
        return grown

    def used(node: int) -> Iterator[int]:
        for block, times in problem.read[node]:
            left[block] -= times
            if 0 < left[block] < CROWD:
                yield from readers[block]

    return _listed(segment, problem.before, problem.after, rank, growth, used)


def backward(segment: Segment, rank: Sequence[float]) -> list[int]:
    """The same from the end, where a node takes what it reads and gives back what it makes."""
    problem, inside, done = segment.problem, segment.inside, segment.done
    alive = {block for block in segment.left if any(reader not in inside and reader not in done for reader in problem.readers[block])}

    def growth(node: int) -> int:
        grown = -problem.taken[node]
        for block, _ in problem.read[node]:
            if block not in alive:
                grown += problem.size[block]
        return grown

    def used(node: int) -> Iterator[int]:
        for block, _ in problem.read[node]:
            if block not in alive:
                alive.add(block)
                yield from problem.readers[block]

    order = _listed(segment, problem.after, problem.before, [-place for place in rank], growth, used)
    order.reverse()
    return order


def _listed(
    segment: Segment,
    needs: Sequence[Sequence[int]],
    follow: Sequence[Sequence[int]],
    rank: Sequence[float],
    growth: Callable[[int], int],
    used: Callable[[int], Iterable[int]],
) -> list[int]:
    """The list schedule.

    Args:
        segment: the nodes.
        needs, follow: each node's neighbours against and with the direction of time.
        rank: what decides where nothing is freed.
        growth: bytes more alive if a node were next.
        used: notes that a node is next, and tells whose growth may have changed.
    """
    inside = segment.inside
    waits = {node: sum(other in inside for other in needs[node]) for node in segment.nodes}
    ready = {node for node in segment.nodes if not waits[node]}
    others = [(rank[node], node) for node in ready]
    heapq.heapify(others)
    freeing: list[tuple[int, float, int]] = []
    known: dict[int, int] = {}

    def look(node: int) -> None:
        grown = growth(node)
        if grown <= 0 and known.get(node) != grown:
            known[node] = grown
            heapq.heappush(freeing, (grown, rank[node], node))

    for node in segment.nodes:
        if node in ready:
            look(node)
    order = []
    while ready:
        chosen = -1
        while freeing and chosen < 0:
            grown, _, node = heapq.heappop(freeing)
            if node in ready and known[node] == grown:
                chosen = node
        while chosen < 0:
            node = heapq.heappop(others)[1]
            if node in ready:
                chosen = node
        ready.discard(chosen)
        order.append(chosen)
        for node in used(chosen):
            if node in ready:
                look(node)
        for node in follow[chosen]:
            if node in inside:
                waits[node] -= 1
                if not waits[node]:
                    ready.add(node)
                    heapq.heappush(others, (rank[node], node))
                    look(node)
    return order
