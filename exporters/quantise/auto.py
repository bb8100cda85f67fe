"""Chooses what numbers are held in, within a budget: whatever fits is measured as the device would run it, and the best is exported.

Memory comes first and needs no training (see `exporters.planner`). Then a method is trained once for each number of parts among what fits: neither
8 bits, nor small forms, nor the batch make a difference to that. Then every candidate gets its own numbers and its own graph, adapts to the same
held-out samples under the same shifts, and is scored by what it predicted as they came.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from edgeadapt.bundle.choice import Choice, Tried
from edgeadapt.errors import BudgetError, ExportError, UsageError
from edgeadapt.exporters.compile import Compiled
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.methods import METHODS
from edgeadapt.exporters.options import REFERENCE, Options
from edgeadapt.exporters.planner import Candidate, Depth, Place, Plan, Row
from edgeadapt.exporters.programs import Model
from edgeadapt.exporters.quantise.measure import Errors, Stream, as_good, check_held, errors_of
from edgeadapt.exporters.storage import TIERS
from edgeadapt.exporters.training import Warmed
from edgeadapt.progress import Progress

ALIKE = 1.02
"""Times that differ by no more are equal: they are counted roughly."""
FORMS = (("none", "float", "float"), ("none", "float", "int8"), ("int8", "float", "int8"), ("int8", "int8", "int8"))
"""The frozen model, gradients through it, what a step keeps: what is looked at where the user names none of them."""


@dataclass(frozen=True)
class Precision:
    """What numbers are held in; "none" for what there is not, as where nothing is trained."""

    quantize: str
    gradient: str = "none"
    saved: str = "none"
    updates: str = "none"

    def options(self, options: Options) -> Options:
        """The options with these."""
        if self.updates == "none":
            return dataclasses.replace(options, quantize=self.quantize)
        gradient = None if self.quantize == "none" else self.gradient
        return dataclasses.replace(options, quantize=self.quantize, gradient=gradient, saved=self.saved, updates=self.updates)

    @property
    def words(self) -> str:
        """In words: "frozen model in int8, gradients in float, saved in int8, updates compact"."""
        frozen = f"frozen model in {'float' if self.quantize == 'none' else self.quantize}"
        return frozen if self.updates == "none" else f"{frozen}, gradients in {self.gradient}, saved in {self.saved}, updates {self.updates}"


def precisions(options: Options, given: Collection[str]) -> list[Precision]:
    """The candidates of an export, the plainest first. What the user named stays as it is.

    Args:
        options: of the export.
        given: names of those that the user gave.
    """
    if not METHODS[options.method].trains:
        return [Precision("none"), Precision("int8")]
    forms = [(quantize, gradient, options.saved or saved) for quantize, gradient, saved in FORMS]
    if options.gradient is not None:
        forms = [form for form in forms if form[1] == options.gradient]
    tiers = (options.updates,) if "updates" in given else (REFERENCE, *TIERS)
    return [Precision(*form, tier) for form in dict.fromkeys(forms) for tier in tiers]


@dataclass(frozen=True)
class Ready:
    """A model to compile, what its warm-up reports, and what holding its parameters in few bits costs."""

    model: Model
    warmup: dict[str, object] | None = None
    rounding: dict[str, object] | None = None


J = TypeVar("J", bound="Job")


class Job(Protocol):
    """What is needed of an export in progress."""

    options: Options
    data: Samples | None
    given: frozenset[str]

    def like(self: J, options: Options) -> J:
        """An export of the same with other numbers, the same layers in 8 bits."""
        ...

    def choose_layers(self) -> bool:
        """Which layers could be in 8 bits, and whether any is."""
        ...

    def plan(self, place: Place, depth: Depth = "whole", settled: Candidate | None = None) -> Plan:
        """What of it fits; its options are then those of what was chosen. settled: what is to be, with nothing left to choose."""
        ...

    def warm(self) -> Warmed | None:
        """All of its training that takes long."""
        ...

    def ready(self, warmed: Warmed | None) -> Ready:
        """The model to compile, in its numbers."""
        ...

    def stepping(self, ready: Ready) -> Compiled:
        """The graph that adapts at the largest batch, or that predicts, where nothing is trained."""
        ...


@dataclass
class _Entry(Generic[J]):
    """A candidate on its way."""

    precision: Precision
    job: J
    plan: Plan | None = None
    ready: Ready | None = None
    errors: Errors | None = None
    why: str = ""

    @property
    def row(self) -> Row:
        """What an adapter would load of it; of one that does not fit, what comes nearest."""
        assert self.plan is not None
        found = self.plan.row or self.plan.nearest
        assert found is not None
        return found

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.chosen is not None

    @property
    def key(self) -> object:
        """What its training depends on. A calibration is no training, and 8 bits change what it finds."""
        options, method = self.job.options, METHODS[self.job.options.method]
        return options.parts, None if method.warms_up else options.train, self.precision if method.calibrates else None

    def tried(self, chosen: bool = False) -> Tried:
        """As the bundle says it."""
        errors = () if self.errors is None else tuple(float(share) for share in self.errors.mean(1))
        row, precision = self.row, self.precision
        return Tried(
            precision.quantize,
            precision.gradient,
            precision.saved,
            precision.updates,
            row.parts,
            row.trained,
            row.batch,
            row.total,
            row.seconds,
            self.fits,
            errors[:-1],
            errors[-1] if errors else None,
            chosen,
            self.why,
        )


@dataclass(frozen=True)
class Won(Generic[J]):
    """What is to be exported: the export with its numbers, planned and trained, and all that was tried."""

    job: J
    ready: Ready
    plan: Plan
    choice: Choice
    warmed: Warmed


class Auto(Generic[J]):
    """A choice in progress.

    Args:
        job: the export, its numbers still to be chosen.
        place: where it must fit.
        progress: told of every stage.
    """

    def __init__(self, job: J, place: Place, progress: Progress) -> None:
        self.job, self.place, self.progress = job, place, progress
        self.entries: list[_Entry[J]] = []
        self.warmed: dict[object, Warmed] = {}

    def planned(self) -> Choice:
        """All candidates with what they take, and nothing measured."""
        self._enter()
        return self._choice(None, None, 0)

    def run(self) -> Won[J]:
        """Plan, train, measure, choose.

        Raises:
            InputError: no sample is held out to measure on.
            UsageError: nothing is left to choose.
            BudgetError: nothing fits, and nothing was trained.
            ExportError: nothing can be in 8 bits, and nothing else is left to choose; or no candidate could be made ready: what the first was
                refused for.
        """
        options, data = self.job.options, self.job.data
        assert data is not None
        check_held(data.split(options.holdout, options.seed)[1])
        self._enter()
        fitting = [entry for entry in self.entries if entry.fits]
        if not fitting:
            nearest = min(self.entries, key=lambda entry: entry.row.total)
            nearest.plan = nearest.job.plan(self.place)
            refuse(nearest.plan, nearest.precision)
            fitting = [nearest]  # with every graph it takes less after all
        stream, count = self._measure(fitting)
        measured = [entry for entry in fitting if entry.errors is not None]
        while True:
            best = self._best(measured)
            best.plan = self._settled(best)
            if best.fits:
                break
            best.why = "with every graph it does not fit"
            measured.remove(best)
            if not measured:
                refuse(best.plan, best.precision)
        assert best.ready is not None
        assert best.plan is not None
        return Won(best.job, best.ready, best.plan, self._choice(best, stream, count), self.warmed[best.key])

    def _enter(self) -> None:
        """All candidates, and what each could be within the budget."""
        found, refusal = precisions(self.job.options, self.job.given), None
        if len(found) == 1:
            raise UsageError(
                f"quantize = 'auto' has nothing left to choose: {found[0].words}",
                "name quantize too, or leave one of gradient, saved and updates to it",
            )
        try:
            if not self.job.choose_layers():
                refusal = ExportError("no layer of the model does well enough in 8 bits, and nothing else is left to choose", "leave quantize out")
        except ExportError as error:
            refusal = error
        if refusal is not None:  # nothing of the model is in 8 bits: what a step keeps still can be
            found = [precision for precision in found if precision.quantize == "none"]
            if len(found) < 2:
                raise refusal
        for done, precision in enumerate(found):
            self.progress("candidates", done, len(found), precision.words)
            entry = _Entry(precision, self.job.like(precision.options(self.job.options)))
            entry.plan = entry.job.plan(self.place, "step")
            self.entries.append(entry)
        self.progress("candidates", len(found), len(found))

    def _measure(self, fitting: Sequence[_Entry[J]]) -> tuple[Stream, int]:
        """Train what has to be, once for each number of parts; then have each candidate adapt. One that is refused is left out, and says why."""
        warmed, refusals = self._warm(fitting)
        if not warmed:
            raise next(iter(refusals.values()))
        self.warmed, first = warmed, next(iter(warmed.values()))
        assert self.job.data is not None
        stream = Stream.of(self.job.data, first.held, first.truth, self.job.options.seed)
        count, refusal = stream.counted([max(entry.job.options.batches) for entry in fitting if entry.key in warmed]), None
        for done, entry in enumerate(fitting):
            try:
                if entry.key in refusals:
                    raise refusals[entry.key]
                entry.ready = entry.job.ready(warmed[entry.key])
                compiled = entry.job.stepping(entry.ready)
                entry.errors = errors_of(compiled, stream, count, self.job.options.threads, self._told(done, len(fitting), entry.precision))
            except ExportError as error:  # too much accuracy is lost by it, say; others may do
                entry.why, refusal = " ".join(error.message.split()), refusal or error
        if refusal is not None and all(entry.errors is None for entry in fitting):
            raise refusal
        return stream, count

    @staticmethod
    def _warm(fitting: Sequence[_Entry[J]]) -> tuple[dict[object, Warmed], dict[object, ExportError]]:
        """Trainings by what they depend on, and what others were refused for."""
        warmed: dict[object, Warmed] = {}
        refusals: dict[object, ExportError] = {}
        for entry in fitting:
            if entry.key in warmed or entry.key in refusals:
                continue
            try:
                found = entry.job.warm()
            except ExportError as error:
                refusals[entry.key] = error
                continue
            assert found is not None
            warmed[entry.key] = found
        return warmed, refusals

    def _told(self, done: int, total: int, precision: Precision) -> Callable[[int, int], None]:
        return lambda part, parts: self.progress("measuring", done * parts + part, total * parts, precision.words)

    @staticmethod
    def _best(measured: Sequence[_Entry[J]]) -> _Entry[J]:
        """Of those that are as good as the best, the one that takes least time a frame, then least memory."""
        good = [measured[index] for index in as_good([entry.errors for entry in measured if entry.errors is not None])]
        quickest = min(entry.row.per_frame for entry in good)
        return min((entry for entry in good if entry.row.per_frame <= ALIKE * quickest), key=lambda entry: entry.row.total)

    def _settled(self, entry: _Entry[J]) -> Plan:
        """The plan of what was chosen, to the byte."""
        assert entry.plan is not None
        assert entry.plan.chosen is not None
        return entry.job.plan(self.place, settled=entry.plan.chosen)

    def _choice(self, best: _Entry[J] | None, stream: Stream | None, count: int) -> Choice:
        place, data = self.place, self.job.data
        rows = tuple(entry.tried(entry is best) for entry in self.entries)
        labelled = data is not None and data.y is not None
        return Choice(place.board.name, place.threads, place.budget or 0, labelled, count, () if stream is None else stream.shifts, rows)


def refuse(plan: Plan, precision: Precision) -> None:
    """Refuse a plan that does not fit, naming the numbers it is of.

    Raises:
        BudgetError: it does not.
    """
    try:
        plan.check()
    except BudgetError as error:
        raise BudgetError(f"{error.message} ({precision.words}), and none of the numbers that were tried takes less", error.hint) from None
