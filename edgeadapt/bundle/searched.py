"""What a bundle says of how defaults of its scalars, and its window, were found: what was tried on the workstation, and how often it was wrong."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from edgeadapt.bundle.reading import Node

FACTORS = ("rate", "mix")
"""Scalars whose default depends on the batch: what is told of them is by how much that is multiplied."""
_SCALAR = r"[a-z][a-z0-9_]*"


@dataclass(frozen=True)
class Try:
    """Scalars that were not as usual, a window, and what came of them.

    Attributes:
        scalars: by name; those of `FACTORS` as factors.
        batch: frames of a window.
        errors: share of wrong predictions on each stream.
        clean: the same without a shift, from the start again.
        chosen: whether they are the bundle's.
    """

    scalars: dict[str, float]
    batch: int
    errors: tuple[float, ...]
    clean: float
    chosen: bool = False

    def words(self, usual: int) -> str:
        """In words: "own 0.6, rate x 4", and the window where it is not of as many frames as is usual."""
        scalars = ", ".join(f"{name} {'x ' if name in FACTORS else ''}{value:g}" for name, value in self.scalars.items()) or "as usual"
        return scalars if self.batch == usual else f"{scalars}, windows of {self.batch}"


@dataclass(frozen=True)
class Searched:
    """How the defaults of a bundle's scalars, and the frames of a window, were found.

    Attributes:
        labelled: whether what is right are labels; else the frozen model's own predictions without a shift.
        samples: of each shift and of clean ones.
        shifts: their names.
        streams: in which order they came, in words.
        rows: in the order in which they were tried; the first is as usual, at the largest batch.
    """

    labelled: bool
    samples: int
    shifts: tuple[str, ...]
    streams: tuple[str, ...]
    rows: tuple[Try, ...]

    @property
    def chosen(self) -> Try:
        """What the bundle has."""
        return next(row for row in self.rows if row.chosen)

    @property
    def window(self) -> int:
        """Frames of a window that a stream is best served with."""
        return self.chosen.batch

    def title(self) -> str:
        """What the table shows, in a line."""
        what = "wrong" if self.labelled else "not the frozen model's without a shift"
        where = f"{self.samples:,} held-out samples each, in windows of {self.rows[0].batch} if not stated: under {', '.join(self.shifts)}"
        return f"scalars; predictions that are {what}, in percent, on {where}"

    def table(self) -> list[tuple[str, ...]]:
        """Header and rows of text; the first column and the last are words."""
        usual = self.rows[0].batch
        shown = [(row.words(usual), *(f"{100 * share:.2f}" for share in (*row.errors, row.clean)), "chosen" * row.chosen) for row in self.rows]
        return [("scalars", *self.streams, "clean", ""), *shown]


def read_searched(node: Node) -> Searched:
    """From JSON, strictly.

    Raises:
        BundleError: a key is missing, unknown or wrongly typed, or rows contradict themselves.
    """
    node.keys({field.name for field in dataclasses.fields(Searched)})
    shifts = node.child("shifts").items(Node.text)
    if not shifts:
        raise node.child("shifts").wrong("one at least", "none")
    streams = node.child("streams").items(Node.text)
    if not streams:
        raise node.child("streams").wrong("one at least", "none")
    rows = node.child("rows").items(lambda row: _try(row, len(streams)))
    if (count := sum(row.chosen for row in rows)) != 1:
        raise node.child("rows").wrong("one that is chosen", str(count))
    if rows[0].scalars:
        raise node.child("rows").wrong("the usual scalars first", rows[0].words(rows[0].batch))
    if odd := next((row for row in rows if row.batch > rows[0].batch), None):
        raise node.child("rows").wrong("the largest batch first", str(odd.batch))
    return Searched(node.child("labelled").truth(), node.child("samples").integer(1), shifts, streams, rows)


def _try(node: Node, streams: int) -> Try:
    node.keys({field.name for field in dataclasses.fields(Try)})
    errors = node.child("errors").items(Node.share)
    if len(errors) != streams:
        raise node.child("errors").wrong(f"{streams}, one a stream", str(len(errors)))
    scalars, batch = node.child("scalars").mapping(Node.number, _SCALAR), node.child("batch").integer(1)
    return Try(scalars, batch, errors, node.child("clean").share(), node.child("chosen").truth())
