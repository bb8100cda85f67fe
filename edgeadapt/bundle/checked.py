"""What the self-check at export could not check, as a bundle says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeadapt.bundle.reading import Node
from edgeadapt.units import format_count

UNCHECKED = "unchecked"
NAMED = 3
"""State tensors that are named in a line; of the others there is the number."""


def read_selfcheck(node: Node) -> dict[str, Any]:
    """The self-check of a manifest: free JSON, but what was not checked is names.

    Raises:
        BundleError: it is no mapping, or holds something else there.
    """
    found = node.free()
    for name, entry in found.items():
        if isinstance(entry, dict) and UNCHECKED in entry:
            names = node.child(name).child(UNCHECKED)
            if not names.items(Node.text):
                raise names.wrong("names of state tensors", "none")
    return found


def unchecked_of(selfcheck: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """By graph, the state tensors whose update could not be told from a wrong one; graphs that were checked whole are missing."""
    return {name: tuple(entry[UNCHECKED]) for name, entry in selfcheck.items() if isinstance(entry, Mapping) and UNCHECKED in entry}


def unchecked_lines(selfcheck: Mapping[str, Any]) -> list[str]:
    """The same in words, a line for graphs that have the same ones; none where all was checked."""
    graphs: dict[tuple[str, ...], list[str]] = {}
    for name, tensors in unchecked_of(selfcheck).items():
        graphs.setdefault(tensors, []).append(name)
    lines = []
    for tensors, names in graphs.items():
        more = f" and {format_count(len(tensors) - NAMED, 'more tensor')}" if len(tensors) > NAMED else ""
        lines.append(f"not checked in {', '.join(names)}: the update of {', '.join(tensors[:NAMED])}{more}, which hangs on rounding in PyTorch too")
    return lines
