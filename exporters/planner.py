"""Chooses parts, trained parts and batch for a memory budget on a board, before a warm-up is paid for.

Memory does not depend on the values of weights. So bundles are made of the untrained method, small searches first, and each is counted by the ledger
that `edgeadapt simulate` uses. Which of those that fit is best cannot be known without data; what is taken is the first in an order of preference,
with what each step down that order cost where it was measured (docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from edgeadapt.bundle import Bundle
from edgeadapt.errors import BudgetError, UsageError
from edgeadapt.exporters.options import divides
from edgeadapt.memory.simulation import BoardLike, Choice, simulate
from edgeadapt.progress import Progress, quiet
from edgeadapt.units import format_bytes, format_count

SIZES = (64, 32, 16, 8, 4, 2, 1)
"""Batches that are listed where the user names none."""
PREFERRED = (16, 8, 4, 2, 1)
"""Batches that are taken where the user names none, in order."""
PARTS = 4
"""Parts that are taken where the user names none, or fewer where the model has no room for them."""
MOST_PARTS = 5
"""Parts that are looked at."""
FAR = 1.05
"""Where prediction alone takes so much more than the budget, it does whatever is trained."""

Depth = Literal["hurried", "step", "whole"]
"""How a candidate is compiled: "hurried", what adapting needs, after a short search for orders, without leaner variants and pieces (seconds); "step",
what adapting needs, with them, after the whole search; "whole", the bundle as it would be exported, to the byte of memory."""
_WORDS: dict[Depth, str] = {"hurried": "", "step": ", variants and pieces", "whole": ", every graph"}


@dataclass(frozen=True)
class Place:
    """What a bundle is planned for.

    Attributes:
        board: where it would run.
        budget: the most bytes that the process may hold; None: no limit.
        threads: that one operator may use there.
    """

    board: BoardLike
    budget: int | None = None
    threads: int = 1


@dataclass(frozen=True)
class Candidate:
    """What a bundle would be exported with.

    Attributes:
        parts: parts that the model is cut into; None where the method has none.
        trained: how many of them, from the last, are trained; None where there is no choice: all that the method trains.
        batches: that the bundle would be for.
    """

    parts: int | None
    trained: int | None
    batches: tuple[int, ...]


class Drafts(Protocol):
    """Who can make bundles of candidates: an export in progress."""

    def divisions(self) -> tuple[int, ...]:
        """Numbers of parts that can be chosen, the largest first; none where the method has no use for parts."""
        ...

    def in_pieces(self) -> bool:
        """Whether a step may also be taken frame by frame."""
        ...

    def draft(self, candidate: Candidate, depth: Depth) -> AbstractContextManager[Bundle]:
        """The bundle that a candidate would become, with weights that mean nothing; it is there inside the context."""
        ...


@dataclass(frozen=True)
class Wishes:
    """What the user has said; None or empty where not."""

    parts: int | None = None
    trained: int | None = None
    batches: tuple[int, ...] = ()
    micro: tuple[int, ...] = ()

    def divide(self, batches: Sequence[int]) -> Sequence[int]:
        """Those that every micro-batch that was named is a part of."""
        return [batch for batch in batches if all(divides(size, batch) for size in self.micro)]


@dataclass(frozen=True)
class Row:
    """A candidate at one of its batches, as a process would run it.

    Attributes:
        parts, trained, batch: of the candidate.
        graph: of a step; a leaner variant has a name of its own, and so has the run of a step in pieces.
        micro: frames of a piece, where the step is taken in pieces; 0 where not.
        prepacking: whether onnxruntime keeps rearranged copies of weights.
        total: the process's peak, bytes.
        seconds: of a step, roughly.
        fits: whether that is within the budget; None without one.
        depth: how it was compiled: "whole" is to the byte. Where that was not needed, a longer search may save some per cent of the tensors, leaner
            variants and pieces more, and the names in graphs that were left out take some ten KiB.
        chosen: the one that is taken.
        singly: whether it predicts frame by frame, for want of room for the graph that takes a whole batch.
    """

    parts: int | None
    trained: int | None
    batch: int
    graph: str
    prepacking: bool
    total: int
    seconds: float
    fits: bool | None
    depth: Depth
    micro: int = 0
    chosen: bool = False
    singly: bool = False

    @property
    def per_frame(self) -> float:
        """Seconds a frame."""
        return self.seconds / self.batch

    @property
    def words(self) -> str:
        """In words: "4 parts, the last 2 trained, batch 16 (adapt.b16.lean)", "batch 16 (in pieces of 4)"."""
        which = "" if self.trained is None else f", {'all' if self.trained == self.parts else f'the last {self.trained}'} trained"
        ways = {"without prepacked weights": not self.prepacking, "predicting frame by frame": self.singly}
        extra = ", ".join([f"in pieces of {self.micro}" if self.micro else self.graph, *(way for way, so in ways.items() if so)])
        parts = f"{format_count(self.parts, 'part')}{which}, " if self.parts else ""
        return f"{parts}batch {self.batch} ({extra})"


@dataclass(frozen=True)
class Plan:
    """What was looked at and what is taken.

    Attributes:
        board, key: its name, and its short one.
        threads: that one operator may use there.
        budget: bytes; None if there is none, and then nothing is chosen.
        rows: those that no other beats at once in memory, time a frame, batch, parts and trained parts, the most demanding first.
        chosen: the candidate to export; None if none fits.
        row: what of it an adapter would load within the budget.
        nearest: where none fits, what takes least of what was asked for.
        instead: where none fits, what would if all were free to choose.
        looked: how many candidates were compiled.
        rates_known: how the board's rates, and so the times, are known.
        note: what the figures take for granted.
    """

    board: str
    key: str
    threads: int
    budget: int | None
    rows: tuple[Row, ...]
    chosen: Candidate | None
    row: Row | None
    nearest: Row | None
    instead: Row | None
    looked: int
    rates_known: str
    note: str = ""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{name: getattr(self, name) for name in ("board", "key", "threads", "budget", "looked", "rates_known", "note")},
            "rows": [asdict(row) for row in self.rows],
            "chosen": None if self.row is None else asdict(self.row),
        }

    def line(self) -> str:
        """What was chosen, and why, in a line; "" without a budget."""
        if self.budget is None or self.row is None:
            return ""
        return f"chosen for {format_bytes(self.budget)} on {self.where}: {self.row.words}, {format_bytes(self.row.total)}"

    @property
    def where(self) -> str:
        """The board, and the threads where they are not one."""
        return self.board + (f" with {format_count(self.threads, 'thread')}" if self.threads > 1 else "")

    def check(self) -> Candidate:
        """What is to be exported.

        Raises:
            BudgetError: nothing fits; the message says what comes nearest, the hint what would fit.
            UsageError: there is no budget.
        """
        if self.chosen is not None:
            return self.chosen
        if self.budget is None or self.nearest is None:
            raise UsageError("nothing is chosen without a budget", "give one")
        needed = self.nearest.total
        raise BudgetError(
            f"nothing that was asked for fits the budget of {format_bytes(self.budget)} on {self.where}; the nearest is {self.nearest.words} with "
            f"{format_bytes(needed)}, {format_bytes(needed - self.budget)} more",
            f"give a budget of at least {-(-needed // 2**20)}MiB"
            + (f"; what fits: {self.instead.words} with {format_bytes(self.instead.total)}" if self.instead is not None else ""),
        )


def plan(drafts: Drafts, place: Place, wishes: Wishes, progress: Progress = quiet, listing: bool = False, depth: Depth = "whole") -> Plan:
    """Find what to export within a budget.

    Candidates are taken in the order of `preference`. Each is first compiled in a hurry; if predicting as many frames as a step takes at once fits,
    which a step does too, its step is compiled in full; if that fits, all of the bundle is, and what then fits is taken.

    Args:
        drafts: who makes the bundles.
        place: where they would run; without a budget candidates are only listed.
        wishes: what is not free to choose.
        progress: told of each candidate.
        listing: look at all candidates of `listed`, not only as far as the first that fits.
        depth: at which a candidate is believed. At less than "whole", where several plans are compared, it is not looked for what would fit instead.

    Raises:
        ExportError: the model cannot be compiled.
        UsageError: no batch has the micro-batches that were named.
    """
    if not wishes.batches and not wishes.divide(SIZES):
        sizes = ", ".join(map(str, wishes.micro))
        raise UsageError(f"no batch that is planned for can be taken in pieces of each of {sizes}", "say with batches which it is to be")
    search = _Search(drafts, place, progress, depth)
    divisions = drafts.divisions()
    taken: Candidate | None = None
    row: Row | None = None
    nearest: Row | None = None
    instead: Row | None = None
    if place.budget is not None:
        runs = preference(wishes, divisions)
        if taken := search.first(runs):
            row = search.best(taken)
        else:
            nearest = search.nearest(runs[-1][-1])
            free = Wishes(micro=wishes.micro)
            other = search.first(preference(free, divisions)) if wishes != free and depth == "whole" else None
            instead = search.best(other) if other else None
    if listing or place.budget is None:
        search.look(listed(wishes, divisions))
    rows = tuple(replace(item, chosen=item == row) for item in _front(search.rows, row))
    where = (place.board.name, place.board.key, place.threads, place.budget)
    return Plan(*where, rows, taken, row and replace(row, chosen=True), nearest, instead, search.looked, place.board.rates_known)


def preference(wishes: Wishes, divisions: Sequence[int]) -> list[list[Candidate]]:
    """What would be taken, in order: runs of candidates that differ in the trained parts alone, from all to one.

    What the user has said stays. Else four parts; a batch of 16, then smaller ones; at each as many parts trained as can be; at last fewer parts.
    The batch goes before the trained parts because it is worth more: on the stream of docs/benchmarks.md training only the last of four parts cost
    0.1 points of error, a batch of 16 instead of 64 cost 0.5, of 4 another 0.5, of 1 another 3. More than four parts (0.1 to 0.3 points in EcoTTA's
    own tables, for 15 to 70 % more memory) and batches over 16 (predictions wait for a batch to be full) are for the user to ask for. Where
    micro-batches were named, only batches that each of them divides are left.
    """
    return [
        [Candidate(parts, trained, batches) for trained in _trained(wishes, parts)]
        for parts in _usual(wishes, divisions)
        for batches in ([wishes.batches] if wishes.batches else [(size,) for size in wishes.divide(PREFERRED) or wishes.divide(SIZES)[-1:]])
    ]


def _usual(wishes: Wishes, divisions: Sequence[int]) -> Sequence[int | None]:
    """Numbers of parts to choose from, in order."""
    if wishes.parts is not None or not divisions:
        return [wishes.parts]
    enough = [parts for parts in divisions if parts >= (wishes.trained or 1)] or divisions
    return [parts for parts in enough if parts <= PARTS] or enough[-1:]


def _trained(wishes: Wishes, parts: int | None) -> Sequence[int | None]:
    return [wishes.trained] if wishes.trained is not None or not parts else range(parts, 0, -1)


def listed(wishes: Wishes, divisions: Sequence[int]) -> list[Candidate]:
    """What a table of candidates shows: every number of trained parts at every batch, and other numbers of parts at one batch."""
    first = _usual(wishes, divisions)[0]
    batches = [wishes.batches] if wishes.batches else [(size,) for size in wishes.divide(SIZES)]
    middle = wishes.batches or tuple(wishes.divide(PREFERRED)[:1] or wishes.divide(SIZES)[-1:])
    found = [Candidate(first, trained, size) for trained in _trained(wishes, first) for size in batches]
    others = [parts for parts in divisions if parts != first and parts >= (wishes.trained or 1)] if wishes.parts is None else []
    return found + [Candidate(parts, trained, middle) for parts in others for trained in _trained(wishes, parts)]


class _Search:
    """Candidates that were looked at, each once at each depth at most."""

    def __init__(self, drafts: Drafts, place: Place, progress: Progress, depth: Depth) -> None:
        self.drafts, self.place, self.progress = drafts, place, progress
        self._depths: tuple[Depth, ...] = ("step", "whole") if depth == "whole" else ("step",)
        self._in_pieces = drafts.in_pieces()
        self._rows: dict[Candidate, dict[Depth, list[Row]]] = {}
        self._hopeless: set[Candidate] = set()
        self._far = 0  # from this batch on, what must be beside a step is far over the budget

    @property
    def rows(self) -> list[Row]:
        """Of all candidates, as they were compiled last."""
        return [row for candidate in self._rows for row in self._known(candidate)]

    def _known(self, candidate: Candidate) -> list[Row]:
        """As it was compiled at the greatest depth."""
        found = self._rows[candidate]
        return found.get("whole") or found.get("step") or found["hurried"]

    @property
    def looked(self) -> int:
        """How many candidates were compiled."""
        return len(self._rows)

    def look(self, candidates: Sequence[Candidate]) -> None:
        """Compile all of them in a hurry."""
        for done, candidate in enumerate(candidates):
            self._compile(candidate, "hurried", (done, len(candidates)))
        self.progress("plan", len(candidates), len(candidates))

    def nearest(self, last: Candidate) -> Row:
        """Where nothing fits, what takes least at each of a candidate's batches, of the candidate that needs least; `last` is one that was asked for.

        It is compiled at the greatest depth: what is said of it is what it needs.
        """
        self._compile(last, "step")
        while True:
            needs = {candidate: self._needed(candidate) for candidate in self._rows}
            least = min(needs, key=lambda candidate: needs[candidate].total)
            if self._depths[-1] in self._rows[least]:
                return needs[least]
            self._compile(least, "whole" if "step" in self._rows[least] else "step")

    def _needed(self, candidate: Candidate) -> Row:
        """The row that decides whether a candidate fits."""
        rows = self._known(candidate)
        return max((min((row for row in rows if row.batch == size), key=_total) for size in candidate.batches), key=_total)

    def first(self, runs: Sequence[Sequence[Candidate]]) -> Candidate | None:
        """The first candidate that fits, of runs in which memory falls."""
        for run in runs:
            if self._fits(run[0]):
                return run[0]
            if len(run) == 1 or not self._fits(run[-1]):
                continue
            low, high = 0, len(run) - 1  # the first does not fit, the last one does
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if self._fits(run[middle]) else (middle, high)
            return run[high]
        return None

    def best(self, candidate: Candidate) -> Row:
        """What an adapter would load of a candidate that fits, at its largest batch: the quickest that fits."""
        rows = [row for row in self._known(candidate) if row.batch == max(candidate.batches)]
        return min((row for row in rows if row.fits), key=lambda row: (row.seconds, row.singly, row.total))

    def _fits(self, candidate: Candidate) -> bool:
        if self._far and max(candidate.batches) >= self._far:
            return False
        self._compile(candidate, "hurried")
        if candidate in self._hopeless:
            return False
        return all(self._within(candidate, depth) for depth in self._depths)

    def _within(self, candidate: Candidate, depth: Depth) -> bool:
        rows = self._compile(candidate, depth)
        return all(any(row.fits for row in rows if row.batch == batch) for batch in candidate.batches)

    def _compile(self, candidate: Candidate, depth: Depth, progress: tuple[int, int] = (0, 0)) -> list[Row]:
        found = self._rows.setdefault(candidate, {})
        if depth not in found:
            self.progress("plan", *progress, _note(candidate) + _WORDS[depth])
            with self.drafts.draft(candidate, depth) as bundle:
                found[depth] = [_row(candidate, choice, depth) for batch in candidate.batches for choice in self._choices(bundle, batch)]
                if self.place.budget is not None and depth == "hurried":
                    self._predicting(candidate, bundle, self.place.budget)
        return found[depth]

    def _choices(self, bundle: Bundle, batch: int) -> list[Choice]:
        """The forms of a step that no other beats, and the one that would be loaded."""
        found = simulate(bundle, self.place.board, None, batch, self.place.budget, self.place.threads)
        others = (choice for choice in found.choices if choice.role == found.choice.role and choice.batch == batch)
        return list({(choice.graph, choice.micro, choice.prepacking, choice.singly): choice for choice in (*others, found.choice)}.values())

    def _predicting(self, candidate: Candidate, bundle: Bundle, budget: int) -> None:
        """Whether a step can fit at all: it takes what predicting as many frames at once does, and more."""
        for beside in [1] if self._in_pieces else candidate.batches:
            needed = simulate(bundle, self.place.board, "predict", beside, budget, self.place.threads).ledger.total
            if needed > budget:
                self._hopeless.add(candidate)
            if needed > FAR * budget:
                self._far = min(self._far or beside, beside)


def _total(row: Row) -> int:
    return row.total


def _row(candidate: Candidate, choice: Choice, depth: Depth) -> Row:
    its = (choice.batch, choice.graph, choice.prepacking, choice.total, choice.seconds, choice.fits)
    return Row(candidate.parts, candidate.trained, *its, depth, choice.micro, singly=choice.singly)


def _note(candidate: Candidate) -> str:
    parts = f"{candidate.parts} parts, " if candidate.parts else ""
    trained = f"{candidate.trained} trained, " if candidate.trained is not None else ""
    return f"{parts}{trained}batch {', '.join(map(str, candidate.batches))}"


def _trains(row: Row) -> tuple[int, int, int]:
    """Less is better: more parts, more of them trained, fewer not trained."""
    parts, trained = row.parts or 0, row.trained or 0
    return -parts, -trained, parts - trained


def _front(rows: Sequence[Row], keep: Row | None) -> Iterator[Row]:
    """Rows that no other beats, and the one to keep."""

    def beats(one: Row, other: Row) -> bool:
        mine, its = ((row.total, row.per_frame, -row.batch, *_trains(row)) for row in (one, other))
        return mine != its and all(a <= b for a, b in zip(mine, its, strict=True))

    kept = [row for row in rows if row == keep or not any(beats(other, row) for other in rows)]
    yield from sorted(kept, key=lambda row: (-(row.parts or 0), -(row.trained or 0), -row.batch, -row.total, row.graph))
