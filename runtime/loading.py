"""Graphs loaded into one region, and looked at again once what they really took is known."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from edgeadapt.bundle import Bundle
from edgeadapt.errors import BudgetError
from edgeadapt.memory import cuda
from edgeadapt.runtime import choice as choices
from edgeadapt.runtime import library
from edgeadapt.runtime import region as regions
from edgeadapt.runtime.answers import Answers
from edgeadapt.runtime.choice import Choice, Item
from edgeadapt.runtime.claims import Claim
from edgeadapt.runtime.engine import Engine
from edgeadapt.runtime.memory import FIRST_GRAPH, INEXACT, Needs, Planned, laid_out, mapped_files, planned, resident
from edgeadapt.runtime.prepared import Prepared
from edgeadapt.runtime.region import Region
from edgeadapt.runtime.session import Unprepared
from edgeadapt.runtime.state import FlatState

LOG = logging.getLogger("edgeadapt")

_KEPT_AGAIN = 2  # how often to try with more room for what sessions keep
_REHEARSALS = 6  # how often to try with a larger region where runs are not what was laid out
_STEP = 2**20  # bytes that are planned less, at least, when more was taken than planned


class Terms(NamedTuple):
    """How a bundle is loaded, whatever is loaded of it.

    Attributes:
        threads: of one operator.
        device: the GPU that graphs run on; None for the CPU.
        slack: bytes of a budget that are kept free for the program.
        answering: frames are to be answered while a step runs.
        strict: everything that is wanted, or nothing.
    """

    threads: int
    device: cuda.Device | None = None
    slack: int = 0
    answering: bool = False
    strict: bool = False

    def needs(self, bundle: Bundle, prepared: Prepared | None = None, given: int = 0, counted: bool = True) -> Needs:
        """What the bundle's graphs take then. Where something was prepared, or what was is left out, that is on the CPU."""
        return Needs(bundle, self.threads, prepared, counted, self.device, self.slack, given, self.answering)


class Loaded(NamedTuple):
    """An engine over a state, why it has the graphs that it has, and which of them are prepared ones.

    again: where there are such, chooses once more within the same budget, but from the graphs as exported; see `_exported`.
    answers: what answers frames while a step runs; None for nothing.
    """

    choice: Choice
    state: FlatState
    engine: Engine
    prepared: Prepared | None = None
    again: Callable[[], Choice] | None = None
    answers: Answers | None = None


def everything(bundle: Bundle, items: list[Item], terms: Terms, prepared: Prepared | None = None) -> Loaded:
    """All that is wanted, each graph loaded when it is first run, in memory that grows as needed.

    Raises:
        BundleError: the first graph cannot be loaded.
        BudgetError: there is not enough memory for it.
        EdgeAdaptError: the GPU's provider does not start.
    """
    needs = terms.needs(bundle, counted=False)
    choice = choices.everything(needs, items)
    with _room(bundle):
        state = _state(bundle, choice)
        engine = Engine(bundle, state, terms.threads, choice.plan.graphs, prepared, limits=choice.plan.limits)
        engine.prepare(FIRST_GRAPH)
    _tell(needs, choice)
    answers = None
    if terms.answering:
        answers = Answers(bundle.manifest, state.seen())
        beside = Engine(bundle, answers.state, terms.threads, [FIRST_GRAPH], prepared, shared=engine)
        beside.prepare(FIRST_GRAPH)  # later, a step may be loading its own
        answers.use(beside)
    return Loaded(choice, state, engine, prepared, answers=answers)


def fit(
    bundle: Bundle,
    items: list[Item],
    claim: Claim,
    terms: Terms,
    prepared: Prepared | None = None,
    begun: Start | None = None,
) -> Loaded:
    """The best that fits, loaded. What cannot be counted beforehand is looked at then: if it took more than planned, less is loaded.

    What was prepared and has gone since it was found is not used: the choice is made from the graphs as exported.

    Raises:
        BundleError: a graph cannot be loaded.
        BudgetError: too little fits.
        EdgeAdaptError: the GPU's provider does not start.
    """
    begun = begun or start(claim)
    held = max(begun.held, claim.before())  # another adapter may have been opened since
    with _room(bundle):
        try:
            loaded, needs = _fitted(bundle, items, claim, terms, prepared, begun, held)
        except Unprepared as reason:
            LOG.warning("%s runs as exported: %s", bundle.path.name, reason.message)
            give_back()
            loaded, needs = _fitted(bundle, items, claim, terms, None, begun, held)
    claim.fill(held, loaded.choice.plan.ledger)
    _tell(needs, loaded.choice)
    return loaded


@contextmanager
def _room(bundle: Bundle) -> Iterator[None]:
    """What a bundle says of sizes may be more than any memory."""
    try:
        yield
    except MemoryError:
        raise BudgetError(f"{bundle.path}: there is not enough memory for what it says it takes", "use a machine with more") from None


def _fitted(
    bundle: Bundle,
    items: list[Item],
    claim: Claim,
    terms: Terms,
    prepared: Prepared | None,
    now: Start,
    held: int,
) -> tuple[Loaded, Needs]:
    ways, more = _ways(bundle, terms, now, prepared), 0
    while True:
        needs, choice, more = _chosen(ways, items, claim.budget, held, terms.strict, more)
        give_back()  # what planning left behind counts as well
        state, files = _state(bundle, choice), mapped_files()
        engine = load(bundle, state, terms.threads, choice.plan, needs.prepared)
        answers = None
        if terms.answering:
            answers = Answers(bundle.manifest, state.seen())
            answers.use(answering(bundle, answers.state, terms.threads, choice.plan, engine, needs.prepared))
        rehearsed = INEXACT and choice.plan.region.size > 0  # then all that runs take is resident already
        to_come = choice.plan.ledger.on_device + (0 if rehearsed else _to_come(choice.plan, state, mapped_files() - files, answers))
        excess = resident() + (held - now.now) + to_come - claim.budget
        if excess <= 0:
            break
        LOG.info("%s: its graphs took %d bytes more than planned; choosing again", bundle.path.name, excess)
        more += max(excess, _STEP)
        del engine, state, answers
        give_back()
    again = partial(_exported, bundle, items, claim, now._replace(held=held), terms, choice.least.graphs)
    return Loaded(choice, state, engine, needs.prepared, None if needs.prepared is None else again, answers), needs


def _ways(bundle: Bundle, terms: Terms, begun: Start, prepared: Prepared | None) -> list[Needs]:
    """With what was prepared and without it: that may take more, for weights of its own, and not be worth it."""
    return [terms.needs(bundle, ready, begun.given) for ready in ([None] if prepared is None else [prepared, None])]


def _exported(bundle: Bundle, items: list[Item], claim: Claim, begun: Start, terms: Terms, least: tuple[str, ...]) -> Choice:
    """What fits of the graphs as exported, noted in the claim; the least alone, as plan and as least, where nothing more does."""
    needs = terms.needs(bundle, given=begun.given)
    held = max(begun.held, claim.before(claim))  # by adapters that were opened since
    try:
        choice = _chosen([needs], items, claim.budget, held, False, 0)[1]
    except BudgetError:
        plan = laid_out(needs, planned(needs, least, False))
        choice = Choice(plan, plan, (), choices.alone(bundle.manifest, plan.graphs))
    claim.fill(held, choice.plan.ledger)
    return choice


def _chosen(ways: Sequence[Needs], items: list[Item], budget: int, held: int, strict: bool, more: int) -> tuple[Needs, Choice, int]:
    """A choice whose graphs were laid out in their regions, the way that leads to it, and the bytes that it leaves besides its plan.

    Raises:
        BudgetError: too little fits.
    """
    while True:
        needs, choice = _best(ways, items, budget, held, strict, more)
        plan, least = (_bounded(laid_out(needs, each), budget - held) for each in (choice.plan, choice.least))
        choice = replace(choice, plan=plan, least=least)
        excess = held + choice.plan.total - budget
        if excess <= 0:
            return needs, choice, more
        more += excess


def _bounded(plan: Planned, room: int) -> Planned:
    """The same plan. Where its region grows, because a graph does not say what it takes, it grows to that many bytes at most."""
    if plan.region.size:
        return plan
    return replace(plan, region=replace(plan.region, kept=max(room, plan.total)))


def _best(ways: Sequence[Needs], items: list[Item], budget: int, held: int, strict: bool, beyond: int) -> tuple[Needs, Choice]:
    """The best choice, and the first way that leads to it.

    Raises:
        BudgetError: no way fits.
    """
    found: list[tuple[Needs, Choice]] = []
    for index, needs in enumerate(ways):
        try:
            choice = choices.choose(needs, items, budget, held, strict, beyond)
        except BudgetError:
            if not found and index == len(ways) - 1:
                raise
            continue
        found.append((needs, choice))
        if not choice.missing and all(not needs.bundle.manifest.graphs[name].variant for name in choice.plan.graphs):
            break  # nothing is left to be wished
    return max(found, key=lambda pair: pair[1].rank)


class Start(NamedTuple):
    """Bytes that the process holds before anything of a bundle is planned, that it holds or has promised, and that were given back before."""

    now: int
    held: int
    given: int


def start(claim: Claim) -> Start:
    """As it stands; planning itself, and what it leaves, must not count twice."""
    given = begin()
    now = resident()
    return Start(now, max(now, claim.before()), given)


def begin() -> int:
    """Makes the process's first session, as it brings in more than code, and that belongs to what is held before; bytes of code given back then."""
    library.give_back()  # what importing it needed
    with regions.using(Region(4096)):  # one that grows would remember how much it was asked for, and next time ask the system for as much
        regions.left()
    return library.give_back()


def names(bundle: Bundle, items: list[Item], claim: Claim, begun: Start, terms: Terms, prepared: Prepared | None) -> tuple[str, ...]:
    """The graphs that `fit` would load.

    Raises:
        BudgetError: too little fits.
    """
    ways = _ways(bundle, terms, begun, prepared)
    try:
        return _chosen(ways, items, claim.budget, begun.held, terms.strict, 0)[1].plan.graphs
    except Unprepared:
        return _chosen(ways[1:], items, claim.budget, begun.held, terms.strict, 0)[1].plan.graphs


def _tell(needs: Needs, choice: Choice) -> None:
    """What was left out, passed over, or runs elsewhere than was asked for, as lines of the log."""
    bundle = needs.bundle.path.name
    if choice.missing:
        LOG.warning("%s: no room in the budget for %s", bundle, ", ".join(choice.missing))
    if choice.passed_over:
        LOG.info("%s: not used, because the GPU lacks operators of theirs: %s", bundle, ", ".join(choice.passed_over))
    for name in choice.plan.graphs if needs.device is not None else ():
        if lacking := needs[name].lacking:
            LOG.warning("%s: of %s, nodes run on the CPU, because the GPU lacks them: %s", bundle, name, ", ".join(lacking))


def _state(bundle: Bundle, choice: Choice) -> FlatState:
    graphs = bundle.manifest.graphs
    with bundle.stored_state() as initial:
        return FlatState(bundle.manifest.state, {name: graphs[name] for name in choice.plan.graphs}, initial)


def _to_come(plan: Planned, state: FlatState, mapped: int, answers: Answers | None) -> int:
    """Bytes that the first runs will add to graphs that are loaded, if `mapped` bytes of files came in with them."""
    lines = plan.lines()
    untouched = plan.region.size - lines["region"] < 256 <= plan.region.size  # nothing was prepacked into it: its table is still to be made
    first = lines["region"] + state.untouched + lines.get("sums", 0) + lines["frames and logits"] + (lines["region's table"] if untouched else 0)
    if plan.answering is not None and answers is not None:
        apart, own = plan.answering, plan.answering.lines()
        fresh = apart.region.size - own["region"] < 256  # nothing was prepacked into it
        first += own["region"] + (own["region's table"] if fresh else 0) + answers.state.untouched
        first += lines["frames and logits"] // 2  # the window that fills meanwhile is no more than the caller's frames
    return first + lines.get("slack", 0) + max(0, lines["weights"] + lines["code"] + lines.get("CUDA libraries", 0) - mapped)


def answering(bundle: Bundle, own: FlatState, threads: int, plan: Planned, engine: Engine, prepared: Prepared | None = None) -> Engine | None:
    """What answers frames while a step of `engine` runs, if the plan has it: the first graph over a state of its own, in a region of its own.

    Raises:
        as `load`.
    """
    return None if plan.answering is None else load(bundle, own, threads, plan.answering, prepared, engine)


def load(
    bundle: Bundle, state: FlatState, threads: int, plan: Planned, prepared: Prepared | None = None, shared: Engine | None = None
) -> Engine:
    """All graphs of a plan, loaded and bound, in a region that cannot grow.

    shared: an engine of the same bundle, whose mapping of the weights this one uses too.

    Raises:
        BundleError: a graph cannot be loaded.
        Unprepared: of those that were prepared, one has gone, and the exported one may not fit where it was to lie.
        BudgetError: there is not enough memory to load them, or onnxruntime does not hold to the limit.
        EdgeAdaptError: the GPU's provider does not start.
    """
    wanted = plan.region
    for _ in range(1 + _KEPT_AGAIN + _REHEARSALS * INEXACT):
        with regions.using(wanted):
            engine = Engine(bundle, state, threads, plan.graphs, prepared, True, plan.limits, shared)
            for name in plan.graphs:
                engine.prepare(name)
                library.give_back()
            left = regions.left() if wanted.size else wanted.kept
        if left is not None and (left <= wanted.kept or left >= wanted.size):  # taken already, or there to be taken whole
            engine.settle()
            library.give_back()
            if not INEXACT or not wanted.size or engine.rehearsed(plan.graphs):
                return engine
            more = max(wanted.size // 64, 65536)
            wanted = Region(-(-(wanted.size + more) // 256) * 256, wanted.kept, wanted.prepacking)
            LOG.info("%s: a graph does not run in the region that was laid out; loading them again with %d bytes more", bundle.path.name, more)
            del engine
            give_back()
            continue
        LOG.info("%s: its graphs keep more than %d bytes besides the region; loading them again with more room", bundle.path.name, wanted.kept)
        del engine
        give_back()
        wanted = Region(wanted.size, 16 * wanted.kept + plan.lines()["weights"] * len(plan.graphs), wanted.prepacking)
    raise BudgetError(f"{bundle.path}: onnxruntime does not keep to a limit of {wanted.size:,} bytes", "open the bundle without a budget")


def give_back() -> None:
    """Has what was let go of returned to the system: sessions and their bindings refer to each other, and malloc keeps what is freed in pieces."""
    gc.collect()
    regions.release()
    with suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    library.give_back()
