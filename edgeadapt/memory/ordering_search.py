"""The search for an order of least peak.

Wherever an order has its peak, the node there has a least cost in any order (`ordering_cuts`). Where the order costs more, the nodes are split in
two at that cut and each side is ordered by itself; so on with the highest side, until no order at all can do better or the highest side is at a
bound of its own. Then an earlier split was in the way: it is begun again with the cut of the node that ended it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeadapt.memory.ordering import Budget, Problem, Run, Segment
from edgeadapt.memory.ordering_cuts import least
from edgeadapt.memory.ordering_exact import exact
from edgeadapt.memory.ordering_lists import ranks, runs

ROUNDS = 16
"""Beginnings; the second half with the largest of several least cuts."""
LISTED = 6
"""Visits that a node takes in a list schedule."""
RESERVE = 0.2
"""Share of the work that is kept for windows around the peak."""
WINDOW = 0.1
"""Share of that for each."""
WINDOWS = (12, 24, 48)
"""Nodes around a peak that are tried in every order."""


@dataclass(frozen=True)
class Part:
    """A segment and its runs by every rule; `best` is the first of those with the least peak."""

    segment: Segment
    tried: tuple[Run, ...]
    best: Run


class Search:
    """One search.

    Args:
        problem: the graph.
        visits: how much work may be done.

    Attributes:
        bound: bytes that no order can go below, as far as known.
        peak: bytes of the best order.
        parts: that order, in parts that may each be ordered otherwise.
        visits: the work done.
    """

    def __init__(self, problem: Problem, visits: int) -> None:
        self.problem, self._allowed = problem, visits
        self._budget = Budget(visits)
        self._rules = ranks(problem)
        whole = problem.whole()
        self._whole = self._part(whole, whole.run(whole.nodes))
        self.peak, self.bound, self.parts = self._whole.best.peak, 0, [self._whole]

    @property
    def visits(self) -> int:
        """The work done so far."""
        return self._allowed - self._budget.left

    @property
    def simple(self) -> tuple[Run, ...]:
        """All nodes by each rule."""
        return self._whole.tried

    @property
    def order(self) -> list[int]:
        """The best order, as the nodes' numbers."""
        return [node for part in self.parts for node in part.best.order]

    def run(self) -> None:
        """Search until the bound is met or the budget spent."""
        self.raise_bound(Budget(self._allowed // 8))
        first: list[int] = []
        for count in range(ROUNDS):
            if self._over() or self._budget.left < self._allowed * RESERVE:
                break
            top = self._round(first, late=count >= ROUNDS // 2)
            self._ask(top, self._budget)
            first = [top, *(node for node in first if node != top)]
        while not self._over() and self._polish():
            pass

    def raise_bound(self, budget: Budget) -> None:
        """The largest least cost of a node; those that cost less in some known order need not be asked."""
        left = budget.left
        cheapest = [self.peak] * len(self.problem)
        for run in (*self.simple, self._whole.segment.run(self.order)):
            for node, cost in zip(run.order, run.curve, strict=True):
                cheapest[node] = min(cheapest[node], cost)
        for node in sorted(range(len(self.problem)), key=lambda node: -cheapest[node]):
            if cheapest[node] <= self.bound or not self._ask(node, budget):
                break
        self._budget.spend(left - budget.left)

    def _ask(self, node: int, budget: Budget) -> bool:
        answer = least(self._whole.segment, node, budget)
        self.bound = max(self.bound, answer[0] if answer else 0)
        return answer is not None

    def _over(self) -> bool:
        return self.peak <= self.bound or self._budget.left <= 0

    def spread(self, wanted: int) -> None:
        """Split the best order's largest parts where that does not raise the peak, so that more may be ordered otherwise."""
        parts = self.parts
        whole: set[tuple[int, ...]] = set()  # parts that stay so
        while len(parts) < wanted and (rest := [part for part in parts if part.segment.nodes not in whole]):
            largest = max(rest, key=lambda part: len(part.segment.nodes))
            whole.add(largest.segment.nodes)
            more = list(parts)
            if self._split(more, parts.index(largest), largest.best.top, False) and max(part.best.peak for part in more) <= self.peak:
                parts = more
        self.parts = parts

    def _part(self, segment: Segment, *known: Run) -> Part:
        self._budget.spend(len(segment.nodes) * 2 * len(self._rules) * LISTED)
        tried = (*known, *runs(segment, self._rules))
        return Part(segment, tried, min(tried, key=lambda run: run.peak))

    def _round(self, first: Sequence[int], late: bool) -> int:
        """Split at the cuts of `first`, then wherever the peak is; the node at the peak that remains."""
        parts = [self._whole]
        for node in first:
            self._split(parts, next(index for index, part in enumerate(parts) if node in part.segment.inside), node, late)
        while True:
            index = max(range(len(parts)), key=lambda index: parts[index].best.peak)
            top = parts[index].best
            if top.peak <= self.bound or not self._split(parts, index, top.top, late, top.peak):
                break
        if top.peak < self.peak:
            self.peak, self.parts = top.peak, parts
        return top.top

    def _split(self, parts: list[Part], index: int, node: int, late: bool, above: int | None = None) -> bool:
        """Split a part where `node` costs least, if that is less than `above`; whether it was split."""
        segment = parts[index].segment
        if len(segment.nodes) < 2 or (answer := least(segment, node, self._budget, late)) is None or (above is not None and answer[0] >= above):
            return False
        parts[index : index + 1] = [self._part(side) for side in segment.split(answer[1] or frozenset([node]))]
        return True

    def _polish(self) -> bool:
        """Try every order of some nodes around the peak; whether one was better."""
        order = self.order
        run = self._whole.segment.run(order)
        top = run.curve.index(run.peak)
        for width in WINDOWS:
            for begin in (top - width // 2, top - 3 * width // 4, top - width // 4):
                begin = max(0, min(begin, len(order) - width))
                before, rest = self._whole.segment.split(frozenset(order[:begin]))
                window, after = rest.split(frozenset(order[begin : begin + width]))
                if (found := self._exact(window, run.peak)) is None:
                    continue
                better = (before.run(order[:begin]), window.run(found), after.run(order[begin + width :]))
                self.parts = [self._part(segment, run) for segment, run in zip((before, window, after), better, strict=True) if segment.nodes]
                self.peak = max(part.best.peak for part in self.parts)
                return True
        return False

    def _exact(self, window: Segment, limit: int) -> list[int] | None:
        budget = Budget(min(self._budget.left, int(self._allowed * RESERVE * WINDOW)))
        before = budget.left
        found = exact(window, self.bound, limit, budget)
        self._budget.spend(before - budget.left)
        return found
