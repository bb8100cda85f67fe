"""What a plan must know of a graph, so small that a bundle states it: a graph of 1,700 nodes takes a workstation 60 ms to read, a board more."""

from __future__ import annotations

from edgeadapt.bundle.manifest import Figures
from edgeadapt.memory import costs, footprint
from edgeadapt.memory.graph import Graph

RULES = 1
"""To be raised with every change of what is counted here, or of how: figures by other rules are not used, and the graph is read."""

GFLOPS, GBPS = 30.0, 8.0
"""With these, forms of a step compare as they were measured to: a quarter in pieces 1.01 to 1.1, single frames 1.2 to 1.4."""


def figures(graph: Graph, prepared: bool = False) -> Figures:
    """Of a graph that was read. prepared: whether it was made for one machine, and may have weights of its own."""
    inside, beside = footprint.prepacked(graph)
    windows = footprint.places(graph, prepared, footprint.READ_AHEAD)
    return Figures(
        rules=RULES,
        **footprint.parts(graph),
        inside=inside,
        beside=beside,
        exact=graph.countable,
        seconds=0.0 if graph.unknown() else round(costs.seconds(graph, GFLOPS, GBPS), 9),
        windows=tuple(f"{found:x}" for found in windows),
    )


def usable(found: Figures | None) -> bool:
    """Whether these are as this edgeadapt would count them."""
    return found is not None and found.rules == RULES


def session_bytes(found: Figures) -> int:
    """As `footprint.session_bytes`."""
    return footprint.session_of(found.nodes, found.edges, found.attributes, found.initialisers)


def places(found: Figures) -> tuple[int, int]:
    """As `footprint.places`, for pages of 64 KiB at most; Linux has no others on the processors that onnxruntime runs on."""
    bundle, own = (int(text, 16) for text in found.windows)
    return bundle, own
