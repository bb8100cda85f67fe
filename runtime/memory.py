"""What the process holds, what a bundle will need, and the one budget a process may have."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Mapping

from edgeadapt.bundle import Bundle
from edgeadapt.errors import BudgetError
from edgeadapt.units import format_bytes

FIRST_GRAPH = "predict.b1"
"""The graph that is loaded at opening, because every adapter needs it."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_NODE = 6144  # a loaded session's bytes a node: 5.1 KB measured on bare operators, 6.0 KB with initialisers and bindings


def resident() -> int:
    """The process's resident bytes now, as the operating system counts them."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE


def peak() -> int:
    """The most the process has held resident since it began, in bytes."""
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident()


def planned(bundle: Bundle, state_bytes: int) -> dict[str, int]:
    """What serving a bundle adds to a process in which its first graph is loaded but has not run, in bytes a line.

    activations: the largest planned peak, as all graphs share one arena. weights: all of them, once. graphs: the structures of those loaded later.
    state: all sets. buffers: frames and logits of the largest batch.

    Args:
        bundle: the bundle.
        state_bytes: what its state takes, all sets together.
    """
    manifest = bundle.manifest
    batch = max(graph.batch for graph in manifest.graphs.values())
    frame, output = 4 * math.prod(manifest.input.shape), 4 * manifest.task.classes
    if manifest.task.kind == "segmentation":
        output *= math.prod(manifest.input.shape[1:])  # at most one score a pixel and class
    return {
        "activations": max(graph.peak_bytes for graph in manifest.graphs.values()),
        "weights": bundle.weights_size,
        "graphs": _NODE * sum(graph.nodes for name, graph in manifest.graphs.items() if name != FIRST_GRAPH),
        "state": state_bytes,
        "buffers": batch * (frame + output),
    }


def check(budget: int, now: int, lines: Mapping[str, int]) -> None:
    """Refuses a plan that does not fit.

    Args:
        budget: the most the process may hold resident, in bytes.
        now: what it holds already.
        lines: what is planned on top, as `planned` says.

    Raises:
        BudgetError: it does not fit; the message has every line.
    """
    total = now + sum(lines.values())
    if total <= budget:
        return
    rows = [("resident now", now), *lines.items(), ("needed", total), ("budget", budget), ("missing", total - budget)]
    table = "\n".join(f"  {name:<13}{size:>14,} B  {format_bytes(size):>9}" for name, size in rows)
    raise BudgetError(
        f"the bundle does not fit the budget of {format_bytes(budget)}:\n{table}",
        f"give at least {format_bytes(math.ceil(total / 2**20) * 2**20)}, or export with a smaller batch or fewer trainable parts",
    )


class Claims:
    """The budgets of a process's living adapters. The budget bounds the process, so they must all have the same one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()

    def take(self, holder: object, budget: int) -> None:
        """Claims a budget until `holder` is closed or collected.

        Raises:
            BudgetError: another budget is claimed in this process.
        """
        with self._lock:
            for other in self._held.values():
                if other != budget:
                    raise BudgetError(
                        f"this process has an adapter with a budget of {format_bytes(other)}; a second one cannot have {format_bytes(budget)}",
                        "close the first, give both the same budget, or open the second in another process",
                    )
            self._held[holder] = budget

    def release(self, holder: object) -> None:
        """Gives a claim back; without one nothing happens."""
        with self._lock:
            self._held.pop(holder, None)


CLAIMS = Claims()
"""Those of this process."""
