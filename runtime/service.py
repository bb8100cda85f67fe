"""The graphs in use, and how they give way when memory is short."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from edgeadapt.bundle import Bundle, Form
from edgeadapt.errors import BudgetError, EdgeAdaptError, UsageError
from edgeadapt.runtime import loading
from edgeadapt.runtime.choice import ROLES, Choice, alone
from edgeadapt.runtime.engine import Engine, Outcome
from edgeadapt.runtime.memory import FIRST_GRAPH, Planned, peak, resident
from edgeadapt.runtime.pressure import Change, Level, Pressure
from edgeadapt.runtime.session import Unprepared

LOG = logging.getLogger("edgeadapt")


class Service:
    """Runs an adapter's graphs. Not thread-safe: called under the adapter's lock.

    Args:
        bundle: the bundle.
        loaded: its graphs over their state.
        threads: onnxruntime's threads for one operator.
        pressure: says when to give way; None: never.
        counters: "paused_steps" and "pressure_events" are counted there.

    Attributes:
        choice: what is loaded while memory is not short, and why.
        batches: of each role, the largest first, at that time.
        caches: what lets go of each cache's memory, by the cache's name.
        answers: what answers frames while a step runs; None for nothing.
    """

    def __init__(self, bundle: Bundle, loaded: loading.Loaded, threads: int, pressure: Pressure | None, counters: dict[str, int]) -> None:
        self.choice, self.caches = loaded.choice, dict[str, Callable[[], object]]()
        self._bundle, self._state, self._prepared, self._again = bundle, loaded.state, loaded.prepared, loaded.again
        self._threads, self._pressure, self._counters = threads, pressure, counters
        self._engine: Engine | None = loaded.engine
        self.answers = loaded.answers
        self._closed, self._engines = False, 0
        self._before = self._most = 0  # held before all but the least was given up, and what all takes beyond that
        self._narrow = False  # as exported, only the least fits, and what was prepared has gone
        self._forms = _by_role(loaded.choice.forms)
        self.batches = {role: tuple(sizes) for role, sizes in self._forms.items()}

    @property
    def level(self) -> Level:
        """How far it gives way at present."""
        return Level.NORMAL if self._pressure is None else self._pressure.level

    @property
    def reason(self) -> str:
        """Why; "" where it does not."""
        return "" if self._pressure is None else self._pressure.reason

    def changes(self) -> tuple[Change, ...]:
        """The latest changes of the level."""
        return () if self._pressure is None else tuple(self._pressure.changes)

    def names(self) -> tuple[str, ...]:
        """The graphs in use at present."""
        return tuple(dict.fromkeys(name for sizes in self._forms.values() for form in sizes.values() for name in form.graphs))

    def memory(self, budget: int | None) -> dict[str, Any]:
        """How memory stands; see `Adapter.memory`."""
        plan = self.choice.plan
        return {
            "resident": resident(),
            "peak": peak(),
            "budget": budget,
            "planned": plan.total,
            "level": int(self.level),
            "reason": self.reason,
            "graphs": self.names(),
            "missing": self.choice.missing,
            **({} if plan.limits is None else {"passed_over": self.choice.passed_over}),
            **plan.lines(),
        }

    @property
    def mark(self) -> tuple[int, int]:
        """Changes when a state is put in place or the graphs are loaded anew: what the runs of a step added up before is of no use then."""
        return self._state.replaced, self._engines

    def require(self, role: str) -> None:
        """Refuses a role that nothing was loaded for.

        Raises:
            BudgetError: for want of room.
            UsageError: it was not asked for.
        """
        if self.batches[role]:
            return
        if any(text.startswith(role) for text in self.choice.missing):
            raise BudgetError(f"there was no room for the {role} graphs in the budget", f"give more, or open with roles={role!r}")
        raise UsageError(f"this adapter was opened without {role}", "name it in roles, or give none: they say what is loaded")

    def live(self) -> Engine:
        """The engine.

        Raises:
            UsageError: closed.
            BudgetError: its graphs were let go of for want of memory, and there is not even enough to load the least.
        """
        self.check_open()
        if self._engine is None:
            self._engine = self._made(self.choice.least)
        return self._engine

    def check_open(self) -> None:
        """See that it was not closed.

        Raises:
            UsageError: it was.
        """
        if self._closed:
            raise UsageError("this adapter is closed", "open the bundle again")

    def close(self) -> None:
        """Lets go of the graphs, for good."""
        self._engine, self._closed = None, True
        self._hush()

    def look(self) -> None:
        """Follows the state of memory by one level, if it is time to look. No engine of before may be held any longer."""
        if self._pressure is not None and not self._closed and (level := self._pressure.look(self._missing())) is not None:
            self._go(level)

    def _missing(self) -> int:
        """Bytes that are still to come back of what was given up: all that is to be loaded, then pages that no run has touched yet."""
        return max(0, min(self._before - resident(), self._most))

    def pick(self, role: str, count: int) -> Form:
        """How the next of that many frames are run: the largest batch that fits; what no batch fits is predicted one by one."""
        for batch, form in self._forms[role].items():
            if batch <= count:
                return form
        return Form("predict", 1, (FIRST_GRAPH,))

    def begin(self) -> tuple[int, int]:
        """Begins a step in pieces; `mark` as it stands."""
        self.live().begin()
        return self.mark

    def pass_over(self, role: str, count: int) -> int:
        """Counts a step that is not taken; its number of frames, or 0 where none would have been taken."""
        batch = next((size for size in self.batches[role] if size <= count), 0)
        self._counters["paused_steps"] += batch > 0
        return batch

    def run(self, name: str, hyper: Mapping[str, float], commit: bool) -> Outcome | None:
        """A run; None if memory was refused, the state is as it was, and the level went down for it, so that it is worth trying again.

        Raises:
            BudgetError: memory was refused, and there is nothing left to let go of.
            BundleError: the graph cannot be run.
        """
        try:
            return self.live().run(name, hyper, commit)
        except BudgetError as refusal:
            reason = refusal.message.split(" (")[0]
        if self._pressure is None or (level := self._pressure.failed(reason)) is None:
            raise BudgetError(f"memory ran out: {reason}", "raise the budget, or export with a smaller batch")
        self._go(level)
        return None

    def _go(self, level: Level) -> None:
        """Goes one level down or up. The state stays as it is."""
        if self._pressure is None:
            return
        if Level.PREDICT in (level, self._pressure.level) and not self._exchange(level):
            return
        if level == Level.SHED > self._pressure.level:
            for name, release in self.caches.items():
                try:
                    release()
                except Exception:  # whatever a cache does, predictions go on
                    LOG.exception("the cache %s could not be released", name)
        self._counters["pressure_events"] += level > self._pressure.level
        self._pressure.go(level)

    def _exchange(self, level: Level) -> bool:
        """Exchanges all graphs for the least, or back; False if there is no memory for all."""
        if level == Level.PREDICT:
            self._before = resident()
            all_of_it, least = (plan.total - plan.ledger.passing for plan in (self.choice.plan, self.choice.least))
            self._most = all_of_it - least  # what a program let go of meanwhile need not come back
        try:
            self._load(level)
        except (EdgeAdaptError, MemoryError, OSError, RuntimeError) as refusal:
            reason = next(iter(str(refusal).splitlines()), "") or type(refusal).__name__
            LOG.warning("memory: %s", reason)
            self._engine, self._forms = None, self._least()
            if level < Level.PREDICT and self._pressure is not None:
                self._pressure.stay(reason)
            return level == Level.PREDICT  # `live` tries again
        return True

    def _least(self) -> dict[str, dict[int, Form]]:
        return _by_role(alone(self._bundle.manifest, self.choice.least.graphs))

    def _made(self, plan: Planned) -> Engine:
        """The engine of a plan of the choice. Where what was prepared has gone, the choice is made again, from the graphs as exported.

        Raises:
            BudgetError: then only predicting fits, and this is not the plan for that.
        """
        least = plan is self.choice.least
        try:
            engine = None if self._narrow and not least else loading.load(self._bundle, self._state, self._threads, plan, self._prepared)
        except Unprepared as reason:
            if self._again is None:
                raise
            LOG.warning("%s runs as exported: %s", self._bundle.path.name, reason.message)
            loading.give_back()
            self._choose(self._again())
            plan, engine = self.choice.least if least else self.choice.plan, None
        if self._narrow and not least:
            raise BudgetError("the graphs as exported do not fit the budget, and what was prepared has gone", "open the bundle again")
        self._engines += 1
        return engine or loading.load(self._bundle, self._state, self._threads, plan)

    def _choose(self, found: Choice) -> None:
        """Goes on with what was chosen from the graphs as exported."""
        self._prepared, self._narrow = None, found.plan is found.least
        if self._narrow:  # what there was before is still wanted, and counted where it is not done
            self.choice = replace(self.choice, least=found.least)
            return
        self.choice = found
        self.batches = {role: tuple(sizes) for role, sizes in _by_role(found.forms).items()}

    def _load(self, level: Level) -> None:
        least = level == Level.PREDICT
        self._engine = None
        self._hush()
        loading.give_back()
        self._engine = self._made(self.choice.least if least else self.choice.plan)
        if self.answers is not None and not least:
            plan, known = self.choice.plan, self.answers.state
            self.answers.use(loading.answering(self._bundle, known, self._threads, plan, self._engine, self._prepared))
        self._forms = self._least() if least else _by_role(self.choice.forms)

    def _hush(self) -> None:
        if self.answers is not None:
            self.answers.use(None)


def _by_role(forms: Iterable[Form]) -> dict[str, dict[int, Form]]:
    """For each role the forms by their batch, the largest first."""
    found = sorted(forms, key=lambda form: -form.batch)
    return {role: {form.batch: form for form in found if form.role == role} for role in ROLES}
