"""In which order a graph's nodes run, and which leaner variants of it there are: found once for each graph, whatever its weights are.

The search takes most of an export's time and sees nothing but nodes, shapes and types. So what was found for a plan, before the warm-up, is used
again for the same graph with the weights that the warm-up left, and the memory that was planned is the memory that is taken.
"""

from __future__ import annotations

import hashlib

from edgeadapt.exporters.ir import Graph
from edgeadapt.exporters.passes.order import order
from edgeadapt.exporters.passes.rematerialise import rematerialise
from edgeadapt.memory import Plan, smallest

ALLOWANCES = {"lean": 0.05, "least": 100.0}
"""How much time, as a share of the step's own and roughly counted, each variant of a step may spend to save memory."""
WORTH = 0.9
"""A variant is kept if its peak is at most this share of the one before it."""

EFFORTS = (1.0, 3.0)
"""The orders that a leaner variant is tried in, by how much work each is worth. What is in use at the peak is no measure of the gaps between it."""


def ordered(graph: Graph, effort: float = 1.0) -> Plan:
    """Puts a graph's nodes in the order of least memory, and counts that. effort: of the search, see `order`."""
    graph.nodes = [graph.nodes[index] for index in order(graph, effort)]
    return Plan(graph)


def laid_out(graph: Graph, effort: float = 1.0) -> Plan:
    """Puts a graph's nodes in that order, of several, which runs in the smallest region, and counts that. effort: of the first."""
    best = min((Plan(graph, order(graph, effort * more)) for more in EFFORTS), key=smallest)
    graph.nodes = [graph.nodes[index] for index in best.order]
    return Plan(graph)


class Schedules:
    """Makes schedules and remembers them.

    Args:
        effort: of the search for an order, see `order`.
        variants: whether leaner variants of a step are made.
    """

    def __init__(self, effort: float = 1.0, variants: bool = True) -> None:
        self.effort, self.variants = effort, variants
        self._found: dict[str, list[tuple[str, Graph]]] = {}

    def of(self, graph: Graph, step: bool) -> list[tuple[str, Graph]]:
        """The graph in its order, under "", and if it is a `step` its variants by name, the leanest last. `graph` itself is put into that order."""
        key = _looks(graph, step)
        if key in self._found:
            return [(variant, _with_weights(known, graph)) for variant, known in self._found[key]]
        peak = ordered(graph, self.effort).peak
        made = [("", graph)]
        for variant, allowance in ALLOWANCES.items() if step and self.variants else ():
            leaner = graph.copy()
            rematerialise(leaner, allowance)
            if Plan(leaner).peak <= WORTH * peak:
                peak = laid_out(leaner, self.effort).peak
                made.append((variant, leaner))
        self._found[key] = made
        return made


def _with_weights(known: Graph, graph: Graph) -> Graph:
    """A schedule found before, with the constants that `graph` has now; those that the schedule itself added stay."""
    again = known.copy()
    again.constants |= {name: graph.constants[name] for name in again.constants if name in graph.constants}
    return again


def _looks(graph: Graph, step: bool) -> str:
    """A digest of everything that a schedule depends on: nodes, what they are joined by, shapes and types; not the values of constants."""
    used = {*graph.inputs, *(name for node in graph.nodes for name in (*node.inputs, *node.outputs))}
    digest = hashlib.sha256(repr((step, graph.inputs, graph.outputs, sorted(used & set(graph.constants)))).encode())
    for node in graph.nodes:
        digest.update(repr((graph.late(node), node.op, node.inputs, node.outputs, sorted(node.attributes.items()))).encode())
    for name, value in sorted(graph.values.items()):
        if name not in used:
            continue
        digest.update(repr((name, value.shape, value.dtype.str)).encode())
    return digest.hexdigest()
