"""How much memory a graph takes in stock onnxruntime: read, ordered, counted to the byte and laid out, without torch, onnx or a run.

The exporter plans with it, the simulator answers with it, and the device prepares with it, so the three cannot disagree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeadapt.memory.graph import Graph, GraphLike, Node, NodeLike, Tensor, TensorLike, read
from edgeadapt.memory.liveness import Plan
from edgeadapt.memory.region import fits, smallest, suited
from edgeadapt.memory.rules import Machine
from edgeadapt.memory.schedule import best_order

if TYPE_CHECKING:
    from edgeadapt.memory.simulation import simulate

__all__ = [
    "Graph",
    "GraphLike",
    "Machine",
    "Node",
    "NodeLike",
    "Plan",
    "Tensor",
    "TensorLike",
    "best_order",
    "fits",
    "read",
    "simulate",
    "smallest",
    "suited",
]


def __getattr__(name: str) -> Any:
    """PEP 562: what a device does not need is imported when it is first used."""
    if name != "simulate":
        raise AttributeError(f"module 'edgeadapt.memory' has no attribute {name!r}")
    from edgeadapt.memory.simulation import simulate

    return simulate
