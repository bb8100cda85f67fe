"""How a row of the bench is served; what both the bench and the serving process know, in a module that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SOURCE, INITIAL, ADAPT, SINGLE = "source", "initial", "adapt", "single"


@dataclass(frozen=True)
class Setting:
    """How a row is served; all but `path` and `prepare` can change its results.

    Attributes:
        path: the bundle.
        mode: "source" (the frozen model), "initial" (the bundle's first state, nothing follows the stream), "adapt",
            "single" (adapting, each frame answered at once).
        batch: frames in a window.
        budget: bytes, or None.
        threads: of one operator.
        prepared: run graphs that were optimised for this machine.
        hyper: scalars of the method that differ from the bundle's.
        guard: a guard decides what of adaptation the stream gets.
        prepare: only optimise those graphs, and serve nothing.
    """

    path: str
    mode: str
    batch: int
    budget: int | None = None
    threads: int = 1
    prepared: bool = True
    hyper: Mapping[str, float] | None = None
    guard: bool = False
    prepare: bool = False

    def told(self) -> dict[str, Any]:
        """As JSON values, without what cannot change a result."""
        return {name: value for name, value in asdict(self).items() if name not in ("path", "prepare")}
