"""What a plan must know of a graph, so small that a bundle states it: a graph of 1,700 nodes takes a workstation 60 ms to read, a board more."""

from __future__ import annotations

from edgeadapt.bundle.graphspec import FIGURES, Figures
from edgeadapt.memory import costs, footprint
from edgeadapt.memory.graph import Graph
from edgeadapt.memory.rules import X86, Machine

GFLOPS, GBPS = 30.0, 8.0
"""With these, forms of a step compare as they were measured to: a quarter in pieces 1.01 to 1.1, single frames 1.2 to 1.4."""


def figures(graph: Graph, machine: Machine = X86) -> Figures:
    """Of a graph that was read. What is counted, or how, may change only together with `FIGURES`: bundles state what it was.

    Copies of 8-bit weights depend on the machine, so of a graph that has such a bundle's word does not do.
    """
    of, (inside, beside) = footprint.count(graph), footprint.prepacked(graph, machine)
    seconds = 0.0 if graph.unknown() else round(costs.seconds(graph, GFLOPS, GBPS), 9)
    return Figures(FIGURES, of.edges, of.attributes, of.initialisers, inside, beside, graph.countable, seconds)


def structures(nodes: int, found: Figures) -> int:
    """Bytes of the session of a graph with so many nodes."""
    return footprint.session_bytes(footprint.Count(nodes, found.edges, found.attributes, found.initialisers))
