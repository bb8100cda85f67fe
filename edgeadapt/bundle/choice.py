"""What a bundle says of how its numbers were chosen: every form that was thought of, what it takes, and how often it was wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from edgeadapt.bundle.reading import Node
from edgeadapt.units import format_bytes, format_count


@dataclass(frozen=True)
class Tried:
    """The numbers of a bundle that might have been, and what came of them.

    Attributes:
        quantize: what the frozen model is computed in, "none" (float32) or "int8".
        gradient, saved: what gradients pass it in, and what a step keeps for its backward pass, "float" or "int8"; "none" where there is no step.
        updates: how parameters are held, "reference", "compact" or "tiny"; "none" where there are none.
        parts, trained: that it was planned with; None where there is no choice.
        batch: the largest, at which it was measured.
        total: the process's peak, bytes; of one that does not fit, the least that came of what was asked for.
        seconds: of a step (where there is none, of a prediction), roughly.
        fits: whether that is within the budget.
        errors: share of wrong predictions under each shift; empty where it was not measured.
        clean: the same without a shift, from the start again; None where it was not measured.
        chosen: whether it is what the bundle has.
        why: it was not measured, though it fits, or could not be chosen; "" where nothing was amiss.
    """

    quantize: str
    gradient: str
    saved: str
    updates: str
    parts: int | None
    trained: int | None
    batch: int
    total: int
    seconds: float
    fits: bool
    errors: tuple[float, ...] = ()
    clean: float | None = None
    chosen: bool = False
    why: str = ""

    @property
    def numbers(self) -> tuple[str, str, str, str]:
        """What it is held and computed in: quantize, gradient, saved, updates. No two rows of a choice have the same."""
        return self.quantize, self.gradient, self.saved, self.updates

    @property
    def error(self) -> float | None:
        """The mean over the shifts; None where it was not measured."""
        return sum(self.errors) / len(self.errors) if self.errors else None


@dataclass(frozen=True)
class Choice:
    """How a bundle's numbers were chosen.

    Attributes:
        board, threads, budget: where, and within how many bytes.
        labelled: whether what is right are labels; else the float32 model's own predictions without a shift.
        samples: that every row was measured on, of each shift and of clean ones.
        shifts: their names, in the order in which they came.
        rows: in the order in which they were tried.
    """

    board: str
    threads: int
    budget: int
    labelled: bool
    samples: int
    shifts: tuple[str, ...]
    rows: tuple[Tried, ...]

    @property
    def chosen(self) -> Tried | None:
        """What the bundle has; None in a list that nothing was chosen from."""
        return next((row for row in self.rows if row.chosen), None)

    def title(self) -> str:
        """What the table shows, in a line."""
        threads = f" with {format_count(self.threads, 'thread')}" if self.threads > 1 else ""
        where = f"numbers for {format_bytes(self.budget)} on {self.board}{threads}"
        if not self.shifts:
            return where
        what = "wrong" if self.labelled else "not float32's without a shift"
        under = ", ".join(self.shifts)
        return f"{where}; predictions that are {what}, in percent, on {self.samples:,} held-out samples each: under {under}, and clean"

    def table(self) -> list[tuple[str, ...]]:
        """Header and rows of text; the first four columns and the last are words."""
        errors = ("wrong", "clean") if self.shifts else ()
        header = ("frozen", "gradients", "saved", "updates", "parts", "trained", "batch", "memory", "a step", *errors, "")
        return [header, *(self._row(row, bool(self.shifts)) for row in self.rows)]

    @staticmethod
    def _row(row: Tried, measured: bool) -> tuple[str, ...]:
        words = (text if text != "none" else "–" for text in (row.gradient, row.saved, row.updates))
        counts = ("–" if value is None else str(value) for value in (row.parts, row.trained, row.batch))
        takes = (format_bytes(row.total), f"{1000 * row.seconds:.3g} ms")
        errors = tuple("–" if value is None else f"{100 * value:.2f}" for value in (row.error, row.clean)) if measured else ()
        verdict = "chosen" if row.chosen else row.why or ("" if row.fits else "does not fit")
        return ("float" if row.quantize == "none" else row.quantize, *words, *counts, *takes, *errors, verdict)


def read_choice(node: Node) -> Choice:
    """From JSON, strictly.

    Raises:
        BundleError: a key is missing, unknown or wrongly typed, or rows contradict themselves.
    """
    node.keys({"board", "threads", "budget", "labelled", "samples", "shifts", "rows"})
    shifts = node.child("shifts").items(Node.text)
    if not shifts:
        raise node.child("shifts").wrong("one at least", "none")
    if len(set(shifts)) < len(shifts):
        raise node.child("shifts").wrong("every name once", "a name twice")
    budget = node.child("budget").integer(1)
    rows = node.child("rows").items(lambda row: _tried(row, shifts, budget))
    if len({row.numbers for row in rows}) < len(rows):
        raise node.child("rows").wrong("numbers that differ", "the same numbers twice")
    if len({row.gradient == "none" for row in rows}) > 1:
        raise node.child("rows").wrong("a step in each row or in none", "both")
    if (count := sum(row.chosen for row in rows)) != 1:
        raise node.child("rows").wrong("one that is chosen", str(count))
    return Choice(
        node.child("board").text(),
        node.child("threads").integer(1),
        budget,
        node.child("labelled").truth(),
        node.child("samples").integer(1),
        shifts,
        rows,
    )


def _tried(node: Node, shifts: Sequence[str], budget: int) -> Tried:
    node.keys({field.name for field in dataclasses.fields(Tried)})
    parts, trained = (node.child(key).maybe(lambda found: found.integer(1)) for key in ("parts", "trained"))
    row = Tried(
        quantize=node.child("quantize").text("none|int8"),
        gradient=node.child("gradient").text("none|float|int8"),
        saved=node.child("saved").text("none|float|int8"),
        updates=node.child("updates").text("none|reference|compact|tiny"),
        parts=parts,
        trained=trained,
        batch=node.child("batch").integer(1),
        total=node.child("total").integer(0),
        seconds=node.child("seconds").number(),
        fits=node.child("fits").truth(),
        errors=node.child("errors").items(Node.share),
        clean=node.child("clean").maybe(Node.share),
        chosen=node.child("chosen").truth(),
        why=node.child("why").text(),
    )
    if len(row.errors) not in (0, len(shifts)):
        raise node.child("errors").wrong(f"{len(shifts)}, one a shift, or none", str(len(row.errors)))
    if bool(row.errors) != (row.clean is not None):
        raise node.child("clean").wrong("a number exactly where there are errors", repr(row.clean))
    if row.seconds < 0:
        raise node.child("seconds").wrong("a number of at least 0", str(row.seconds))
    if row.chosen and not (row.fits and row.errors):
        raise node.child("chosen").wrong("false, where it does not fit or was not measured", "true")
    if bool(row.why) is not (row.fits is not bool(row.errors)):
        raise node.child("why").wrong("a reason exactly where it fits and was not measured, or was measured and does not fit", repr(row.why[:80]))
    if row.fits and row.total > budget:
        raise node.child("fits").wrong(f"false, where {row.total} bytes are more than the budget of {budget}", "true")
    if len({value == "none" for value in (row.gradient, row.saved, row.updates)}) > 1:
        raise node.child("gradient").wrong("none of gradient, saved and updates to be none, or all", " ".join(row.numbers[1:]))
    if row.quantize == "none" and row.gradient == "int8":
        raise node.child("gradient").wrong("float or none, where the frozen model is float32", "int8")
    if row.parts is not None and row.trained is not None and row.trained > row.parts:
        raise node.child("trained").wrong(f"at most the {row.parts} parts", str(row.trained))
    return row
