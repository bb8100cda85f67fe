"""Orders a graph's nodes so that few bytes are alive at once, and so that these fit into a small region."""

from __future__ import annotations

import random
from collections.abc import Iterator

from edgeadapt.memory.graph import GraphLike
from edgeadapt.memory.liveness import Plan
from edgeadapt.memory.ordering import Problem, Run
from edgeadapt.memory.ordering_lists import backward, forward, numbered
from edgeadapt.memory.ordering_search import Search
from edgeadapt.memory.region import fits, smallest
from edgeadapt.memory.rules import ALIGNMENT, X86, Machine

VISITS = 5_000_000
"""Work of a search, in visits of nodes and arcs: about half a microsecond each on a workstation."""
LAYOUTS = 60_000
"""Nodes laid out, over all orders whose regions are compared."""
LEAST = 400
"""What an order counts at least in that, for small graphs."""
GAIN = 0.002
"""Share of a region that is worth another order."""
PARTS = 8
"""Parts that an order is looked at in when its region is made smaller."""


def greedy(graph: GraphLike) -> list[int]:
    """A list schedule: of the nodes that are ready, one that frees memory, else the one that came first."""
    problem = Problem(graph, X86)
    return forward(problem.whole(), range(len(problem)))


def best_order(graph: GraphLike, machine: Machine = X86, effort: float = 1.0) -> list[int]:
    """The order with the least peak that was found, as indices of the graph's nodes.

    Of several, one that fits into a smaller region, and file order if none is better. The same graph has the same order on every machine.

    Args:
        graph: the graph; its file order must be a possible one.
        machine: what the workspace depends on.
        effort: how much work may be done, against what is usual: a few seconds of a workstation for 1600 nodes, most graphs less than one.
    """
    if not graph.nodes:
        return []
    problem = numbered(graph, machine)
    search = Search(problem, int(VISITS * effort))
    search.run()
    before, found = Plan(graph, None, machine), Plan(graph, [problem.index[node] for node in search.order], machine)
    layout = _Layout(graph, machine, before if before.peak <= found.peak else found, int(LAYOUTS * effort))
    layout.offer(greedy(graph), sure=True)
    for order in _alternatives(search, layout):
        layout.offer([problem.index[node] for node in order])
    return layout.plan.order


def _alternatives(search: Search, layout: _Layout) -> Iterator[list[int]]:
    """Orders of the same peak: all nodes by one rule, then the best order with one part after the other listed anew by a rank with noise."""
    yield from (list(run.order) for run in search.simple if run.peak <= search.peak)
    search.spread(PARTS)
    chosen = [part.best for part in search.parts]
    yield _joined(chosen)
    places, noise = [0.0] * len(search.order), random.Random(0)
    while not layout.over:
        at = noise.random() * len(places)
        for index, run in enumerate(chosen):
            at -= len(run.order)
            if at < 0:
                break
        width, listed = 4.0 ** int(1 + 3 * noise.random()), (forward, backward)[int(2 * noise.random())]
        for place, node in enumerate(run.order):
            places[node] = place + width * noise.random()
        segment = search.parts[index].segment
        other = segment.run(listed(segment, places))
        layout.left -= max(len(other.order), LEAST // 4)
        if other.peak <= search.peak:
            tried = [*chosen[:index], other, *chosen[index + 1 :]]
            yield _joined(tried)
            if layout.taken:
                chosen = tried


def _joined(runs: list[Run]) -> list[int]:
    return [node for run in runs for node in run.order]


class _Layout:
    """The order that fits into the smallest region so far.

    Attributes:
        plan: that order's.
        region: bytes it fits into.
        taken: whether the last order offered is as good, if not better.
        left: nodes that may still be laid out.
    """

    def __init__(self, graph: GraphLike, machine: Machine, plan: Plan, left: int) -> None:
        self.graph, self.machine, self.plan = graph, machine, plan
        self.region, self.taken, self.left = smallest(plan), False, left

    @property
    def over(self) -> bool:
        """Whether no order could be better by what counts, or all work is done."""
        return self.left <= 0 or self._wanted < max(self.plan.peak, ALIGNMENT)

    @property
    def _wanted(self) -> int:
        return self.region - max(ALIGNMENT, int(self.region * GAIN))

    def offer(self, order: list[int], sure: bool = False) -> None:
        """Take an order if its region is smaller by what counts; `sure`: look closely, as what fits is not monotone in the size."""
        self.left -= max(len(order), LEAST)
        plan = Plan(self.graph, order, self.machine)
        self.taken = False
        if self.over or plan.peak > self.plan.peak:
            return
        if (sure or fits(plan, self._wanted)) and (region := smallest(plan)) <= self._wanted:
            self.plan, self.region, self.taken = plan, region, True
        else:
            self.taken = fits(plan, self.region)
