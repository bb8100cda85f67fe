"""Graphs loaded into one region, and looked at again once what they really took is known."""

from __future__ import annotations

import ctypes
import gc
import logging
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from edgeadapt.bundle import Bundle
from edgeadapt.errors import BudgetError
from edgeadapt.runtime import choice as choices
from edgeadapt.runtime import region as regions
from edgeadapt.runtime.choice import Choice, Item
from edgeadapt.runtime.engine import Engine
from edgeadapt.runtime.memory import FIRST_GRAPH, Claim, Needs, Planned, laid_out, mapped_files, resident
from edgeadapt.runtime.prepared import Prepared
from edgeadapt.runtime.region import Region
from edgeadapt.runtime.state import FlatState

LOG = logging.getLogger("edgeadapt")

_KEPT_AGAIN = 2  # how often to try with more room for what sessions keep
_STEP = 2**20  # bytes that are planned less, at least, when more was taken than planned


class Loaded(NamedTuple):
    """An engine over a state, why it has the graphs that it has, and which of them are prepared ones."""

    choice: Choice
    state: FlatState
    engine: Engine
    prepared: Prepared | None = None


def everything(bundle: Bundle, items: list[Item], threads: int, prepared: Prepared | None = None) -> Loaded:
    """All that is wanted, each graph loaded when it is first run, in memory that grows as needed.

    Raises:
        BundleError: the first graph cannot be loaded.
    """
    choice = choices.everything(Needs(bundle, threads, counted=False), items)
    state = _state(bundle, choice)
    engine = Engine(bundle, state, threads, choice.plan.graphs, prepared)
    engine.prepare(FIRST_GRAPH)
    return Loaded(choice, state, engine, prepared)


def fit(bundle: Bundle, items: list[Item], claim: Claim, threads: int, strict: bool, prepared: Prepared | None = None) -> Loaded:
    """The best that fits, loaded. What cannot be counted beforehand is looked at then: if it took more than planned, less is loaded.

    Raises:
        BundleError: a graph cannot be loaded.
        BudgetError: too little fits.
    """
    needs = Needs(bundle, threads, prepared)
    regions.left()  # the process's first session brings in pages of the libraries, which belong to what is held now
    now = resident()
    held, more = max(now, claim.promised()), 0
    while True:
        choice = choices.choose(needs, items, claim.budget, held, strict, more)
        choice = replace(choice, plan=laid_out(needs, choice.plan), least=laid_out(needs, choice.least))
        excess = held + choice.plan.total - claim.budget
        if excess > 0:
            more += excess
            continue
        files, state = mapped_files(), _state(bundle, choice)
        engine = load(bundle, state, threads, choice.plan, prepared)
        excess = resident() + (held - now) + _to_come(choice.plan, mapped_files() - files) - claim.budget
        if excess <= 0:
            break
        LOG.info("%s: its graphs took %d bytes more than planned; choosing again", bundle.path.name, excess)
        more += max(excess, _STEP)
        del engine, state
        give_back()
    claim.filled = held + choice.plan.total
    if choice.missing:
        LOG.warning("%s: no room in the budget for %s", bundle.path.name, ", ".join(choice.missing))
    return Loaded(choice, state, engine, prepared)


def _state(bundle: Bundle, choice: Choice) -> FlatState:
    graphs = bundle.manifest.graphs
    return FlatState(bundle.manifest.state, {name: graphs[name] for name in choice.plan.graphs}, bundle.initial_state())


def _to_come(plan: Planned, mapped: int) -> int:
    """Bytes that the first runs will add to graphs that are loaded, if `mapped` bytes of files came in with them."""
    lines = plan.lines()
    untouched = plan.region.size - lines["region"] < 256 <= plan.region.size  # nothing was prepacked into it: its table is still to be made
    first = lines["region"] + lines["state"] + lines.get("sums", 0) + lines["frames and logits"] + (lines["region's table"] if untouched else 0)
    return first + max(0, lines["weights"] + lines["code"] - mapped)


def load(bundle: Bundle, state: FlatState, threads: int, plan: Planned, prepared: Prepared | None = None) -> Engine:
    """All graphs of a plan, loaded and bound, in a region that cannot grow.

    Raises:
        BundleError: a graph cannot be loaded.
        BudgetError: there is not enough memory to load them, or onnxruntime does not hold to the limit.
    """
    wanted = plan.region
    for _ in range(1 + _KEPT_AGAIN):
        with regions.using(wanted):
            engine = Engine(bundle, state, threads, plan.graphs, prepared)
            for name in plan.graphs:
                engine.prepare(name)
            left = regions.left() if wanted.size else wanted.kept
        if left is not None and (left <= wanted.kept or left >= wanted.size):  # taken already, or there to be taken whole
            engine.settle()
            return engine
        LOG.info("%s: its graphs keep more than %d bytes besides the region; loading them again with more room", bundle.path.name, wanted.kept)
        del engine
        give_back()
        wanted = Region(wanted.size, 16 * wanted.kept + plan.lines()["weights"] * len(plan.graphs), wanted.prepacking)
    raise BudgetError(f"{bundle.path}: onnxruntime does not keep to a limit of {wanted.size:,} bytes", "open the bundle without a budget")


def give_back() -> None:
    """Has what was let go of returned to the system: sessions and their bindings refer to each other, and malloc keeps what is freed in pieces."""
    gc.collect()
    with suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
