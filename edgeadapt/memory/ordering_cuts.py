"""The least that can be alive while a node runs, and the nodes that must have run before to get there.

What is alive after a set of nodes is a cut: each block costs its bytes if its maker is inside and a reader outside. The least cut with all that a
node needs inside and all that needs it outside is no more than the node costs in any order (Dinic's maximum flow, 1970, finds it).
"""

from __future__ import annotations

from collections import deque

from edgeadapt.memory.ordering import Budget, Segment

SOURCE, SINK = 0, 1
ENDLESS = 1 << 62


class _Network:
    """Arcs with room for a flow; each next to its reverse."""

    def __init__(self, count: int) -> None:
        self.arcs: list[list[int]] = [[] for _ in range(count)]
        self.ends: list[int] = []
        self.room: list[int] = []

    def add(self, start: int, end: int, room: int) -> None:
        """An arc."""
        for one, other, free in ((start, end, room), (end, start, 0)):
            self.arcs[one].append(len(self.ends))
            self.ends.append(other)
            self.room.append(free)

    def levels(self, start: int, forward: bool = True) -> list[int]:
        """Arcs to each point from the start along free arcs, or against them; -1 where there is no way."""
        ends, room, found, queue = self.ends, self.room, [-1] * len(self.arcs), deque([start])
        found[start] = 0
        while queue:
            point = queue.popleft()
            for arc in self.arcs[point]:
                if room[arc if forward else arc ^ 1] and found[ends[arc]] < 0:
                    found[ends[arc]] = found[point] + 1
                    queue.append(ends[arc])
        return found

    def flow(self, budget: Budget) -> int | None:
        """The largest flow from the source to the sink; None if the budget is spent before."""
        total = 0
        while budget.spend(len(self.ends)):
            level = self.levels(SOURCE)
            if level[SINK] < 0:
                return total
            total += self._blocking(level, budget)
        return None

    def _blocking(self, level: list[int], budget: Budget) -> int:
        """Fill every shortest way."""
        ends, room, total = self.ends, self.room, 0
        following = [0] * len(self.arcs)
        path: list[int] = []
        point = SOURCE
        while True:
            if point == SINK:
                step = min(room[arc] for arc in path)
                total += step
                budget.spend(len(path))
                for place in range(len(path) - 1, -1, -1):
                    room[path[place]] -= step
                    room[path[place] ^ 1] += step
                    if not room[path[place]]:
                        full = place
                point = ends[path[full] ^ 1]
                del path[full:]
            arcs = self.arcs[point]
            while following[point] < len(arcs):
                arc = arcs[following[point]]
                if room[arc] and level[ends[arc]] == level[point] + 1:
                    break
                following[point] += 1
            else:
                if point == SOURCE:
                    return total
                point = ends[path.pop() ^ 1]
                following[point] += 1
                continue
            path.append(arc)
            point = ends[arc]


def least(segment: Segment, node: int, budget: Budget, late: bool = False) -> tuple[int, frozenset[int]] | None:
    """The least bytes in use while `node` of the segment runs, and the segment's nodes to run before it for that.

    Args:
        late: of several such sets the largest, else the smallest.

    Returns:
        None if the budget is spent before the answer.
    """
    problem, inside = segment.problem, segment.inside
    place = {other: count for count, other in enumerate(segment.nodes, 2)}
    for near, side in ((problem.before, SOURCE), (problem.after, SINK)):
        stack = [node]
        while stack:
            for other in near[stack.pop()]:
                if other in inside and place[other] > SINK:
                    place[other] = side
                    stack.append(other)
    place[node] = SINK
    blocks = dict.fromkeys(block for other in segment.nodes for block in problem.made[other])
    blocks.update(dict.fromkeys(segment.left))
    network = _Network(2 + len(segment.nodes) + len(blocks))
    always = segment.base
    for point, block in enumerate(blocks, 2 + len(segment.nodes)):
        start = place.get(problem.maker[block], SOURCE)
        stays = {place.get(reader, SINK) for reader in problem.readers[block] if reader not in segment.done} if problem.readers[block] else {SINK}
        if problem.maker[block] not in inside:  # counted in the base; the cut says whether it still is
            always -= problem.size[block]
        if start == SINK or not stays - {SOURCE}:
            continue
        if start == SOURCE and SINK in stays:
            always += problem.size[block]
            continue
        network.add(start, point, problem.size[block])
        for end in [SINK] if SINK in stays else sorted(stays - {SOURCE}):
            network.add(point, end, ENDLESS)
    for other in segment.nodes:
        for source in problem.before[other]:
            if source in inside and place[other] != SINK and place[source] not in (SOURCE, place[other]):
                network.add(place[other], place[source], ENDLESS)
    cut = network.flow(budget)
    if cut is None:
        return None
    reached = network.levels(SINK, forward=False) if late else network.levels(SOURCE)
    first = frozenset(other for other in segment.nodes if place[other] == SOURCE or (place[other] != SINK and (reached[place[other]] >= 0) != late))
    over = problem.over[node]
    spared = problem.size[over] if over >= 0 and _last(segment, node, over, place) else 0
    return always + cut + problem.taken[node] + problem.scratch[node] - spared, first


def _last(segment: Segment, node: int, block: int, place: dict[int, int]) -> bool:
    """Whether all other readers of a block may run before the node."""
    return all(reader == node or reader in segment.done or place.get(reader, SINK) != SINK for reader in segment.problem.readers[block])
