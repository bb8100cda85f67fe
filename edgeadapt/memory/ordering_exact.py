"""The order of least peak of a few nodes, by going through the sets of nodes that can have run."""

from __future__ import annotations

import heapq

from edgeadapt.memory.ordering import Budget, Segment


def exact(segment: Segment, floor: int, limit: int, budget: Budget) -> list[int] | None:
    """An order of least peak.

    Sets are visited by the peak on the way there, lowest first. A node that fits under that peak and leaves no more alive than before is run at
    once: what stays alive is submodular in the set, so any order of the rest is as good with it in front.

    Args:
        floor: peaks below this in bytes are as good as this.
        limit: only an order whose peak is below this is wanted.

    Returns:
        None if there is no such order, or if the budget is spent before one is found.
    """
    problem, nodes = segment.problem, segment.nodes
    bit = {node: 1 << place for place, node in enumerate(nodes)}
    needs = [sum(bit.get(other, 0) for other in problem.before[node]) for node in nodes]
    follow = [[other for other in problem.after[node] if other in bit] for node in nodes]
    place = {node: count for count, node in enumerate(nodes)}
    last: dict[int, int] = {}  # by block: the readers after which it is given back, all ones if others follow the segment
    for block in segment.left:
        readers = {reader for reader in problem.readers[block] if reader not in segment.done}
        last[block] = sum(bit[reader] for reader in readers) if readers <= segment.inside else -1
    start, everything = 0, (1 << len(nodes)) - 1
    came: dict[int, tuple[int, int]] = {start: (start, -1)}
    queue = [(floor, segment.base, start, [node for node in nodes if not needs[place[node]]])]
    closed: set[int] = set()
    peaks = {start: floor}
    while queue and budget.spend(4):
        peak, alive, done, ready = heapq.heappop(queue)
        if done in closed:
            continue
        closed.add(done)
        if done == everything:
            order = []
            while done != start:
                done, node = came[done]
                order.append(node)
            return order[::-1]
        moves = []
        budget.spend(2 * len(ready))
        for node in ready:
            after, over = done | bit[node], problem.over[node]
            top = alive + problem.taken[node] + problem.scratch[node]
            if over >= 0 and _over(last, over, after) and dict(problem.read[node])[over] == 1:
                top -= problem.size[over]
            if top >= limit:
                continue
            left = alive + problem.taken[node]
            for block, _ in problem.read[node]:
                if _over(last, block, after):
                    left -= problem.size[block]
            moves.append((max(peak, top), left, after, node))
            if top <= peak and left <= alive:
                del moves[:-1]
                break
        for top, left, after, node in moves:
            if top < peaks.get(after, limit):
                peaks[after], came[after] = top, (done, node)
                free = [other for other in follow[place[node]] if not needs[place[other]] & ~after]
                heapq.heappush(queue, (top, left, after, [*(other for other in ready if other != node), *free]))
    return None


def _over(last: dict[int, int], block: int, after: int) -> bool:
    """Whether nobody reads a block any more when the nodes `after` have run."""
    return last[block] >= 0 and not last[block] & ~after
