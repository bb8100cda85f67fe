"""What serving a stream showed: counted as it goes, in bounded memory, and told as a summary or a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.report.charts import Curve, Level, lines
from edgeadapt.report.page import Page, Section, Table
from edgeadapt.report.record import Quantiles, Trace
from edgeadapt.units import format_bytes

MIB = 2**20


def wrong(classes: NDArray[np.int64], truth: int | NDArray[Any] | None, count: int) -> float | None:
    """The share of wrong decisions in a frame: 0 or 1, or of pixels. Truth outside 0..count-1 is not counted; None where there is none to count."""
    if truth is None:
        return None
    known = np.asarray(truth)
    if known.shape != classes.shape:
        return None
    counted = (known >= 0) & (known < count)
    return float((known != classes)[counted].mean()) if counted.any() else None


class Tally:
    """Counts of a stream.

    Args:
        kind: the task's.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.frames, self.bad, self.labelled, self.wrong, self.fault = 0, 0, 0, 0.0, ""
        self.milliseconds, self.resident = Quantiles(), 0
        self.errors, self.confidence, self.entropy, self.time, self.memory = Trace(), Trace(), Trace(), Trace(), Trace()

    def frame(self, off: float | None, confidence: float, entropy: float, milliseconds: float) -> None:
        """A frame that was answered; `off` as `wrong` gives it."""
        self.frames += 1
        if off is not None:
            self.labelled += 1
            self.wrong += off
            self.errors.add(self.frames, 100 * off)
        self.confidence.add(self.frames, confidence)
        self.entropy.add(self.frames, entropy)
        self.time.add(self.frames, milliseconds)
        self.milliseconds.add(milliseconds)

    def bad_frame(self, fault: str) -> None:
        """A frame that was passed over."""
        self.frames += 1
        self.bad += 1
        self.fault = self.fault or fault

    def window(self, resident: int) -> None:
        """A window was answered with that many bytes resident."""
        self.resident = max(self.resident, resident)
        self.memory.add(self.frames, resident / MIB)

    @property
    def error(self) -> float | None:
        """Percent wrong of what has a truth."""
        return 100 * self.wrong / self.labelled if self.labelled else None

    def rows(self, steps: int, rejected: int, peak: int, budget: int | None) -> list[tuple[str, str]]:
        """The summary as (name, text)."""
        rows = [
            ("frames", f"{self.frames}" + (f", {self.bad} of them bad; the first: {self.fault}" if self.bad else "")),
            ("steps", f"{steps}" + (f", and {rejected} rejected" if rejected else "")),
        ]
        if self.error is not None:
            what = "pixels" if self.kind == "segmentation" else "frames"
            rows.append(("error", f"{self.error:.2f} % of the {what} with a label ({self.labelled} frames)"))
        if len(self.milliseconds):
            rows.append(("ms a frame", f"p50 {self.milliseconds.at(0.5):.3g}, p95 {self.milliseconds.at(0.95):.3g}"))
        limit = f" of a budget of {format_bytes(budget)}" if budget else "; no budget"
        rows.append(("memory", f"{format_bytes(peak)} resident at most{limit}"))
        return rows


def summary(tally: Tally, facts: Mapping[str, Any], peak: int, budget: int | None) -> tuple[Page, dict[str, Any]]:
    """A finished stream as a page and as plain JSON values.

    Args:
        tally: what was counted.
        facts: bundle, digest, method, source, adapt, steps, rejected_steps, hyper.
        peak: the process's most resident bytes.
        budget: its bound, or None.
    """
    used = len(tally.milliseconds)
    middle, slow = tally.milliseconds.at(0.5), tally.milliseconds.at(0.95)
    how = "adapting" if facts["adapt"] else "without adapting"
    page = Page(
        f"{facts['bundle']} on {facts['source']}",
        f"{used} frames served {how}, with the method {facts['method']}.",
        [*([] if tally.error is None else [("error", f"{tally.error:.1f} %", "c1")]), *_figures(tally, facts["steps"], peak)],
        [*_charts(tally, budget), Section("In numbers", table=Table(("", ""), tally.rows(facts["steps"], facts["rejected_steps"], peak, budget)))],
        f"bundle {facts['digest']}",
    )
    data = {
        **facts,
        "frames": tally.frames,
        "bad_frames": tally.bad,
        "labelled_frames": tally.labelled,
        "error_percent": tally.error,
        "ms_p50": middle,
        "ms_p95": slow,
        "peak_bytes": peak,
        "budget_bytes": budget,
        "curves": {name: getattr(tally, name).points for name in ("errors", "confidence", "entropy", "time", "memory")},
    }
    return page, data


def _figures(tally: Tally, steps: int, peak: int) -> list[tuple[str, str, str]]:
    middle = f"{tally.milliseconds.at(0.5):.3g}"
    return [("frames", f"{tally.frames}", ""), ("steps", f"{steps}", ""), ("ms a frame", middle, ""), ("memory", format_bytes(peak), "")]


def _charts(tally: Tally, budget: int | None) -> list[Section]:
    sections = []
    if tally.error is not None:
        points = smooth(tally.errors.points)
        top = min(100.0, max(10.0, 1.15 * max(y for _, y in points)))
        chart = lines("error over time", [Curve("error", points)], "%", top=top)
        sections.append(Section("Error", "Percent of decisions that were wrong, as a running mean.", chart))
    level = Level(f"budget {format_bytes(budget)}", budget / MIB) if budget else None
    confidence = lines("confidence over time", [Curve("confidence", tally.confidence.points)], "", top=1.0)
    memory = lines("memory over time", [Curve("resident", tally.memory.points)], "MiB", level=level)
    sections.append(Section("Confidence", "Probability of the chosen class; a fall often means that the picture has changed.", confidence))
    sections.append(Section("Memory", "Resident bytes of the whole process.", memory))
    sections.append(Section("Time", "Of a window, a frame.", lines("ms a frame over time", [Curve("ms a frame", tally.time.points)], "ms")))
    return sections


def smooth(points: Sequence[tuple[float, float]], width: int = 0) -> list[tuple[float, float]]:
    """Running means over that many neighbouring points; 0 takes a 24th of them."""
    width = width or max(1, len(points) // 24)
    return [(points[i][0], sum(y for _, y in points[max(0, i - width + 1) : i + 1]) / min(i + 1, width)) for i in range(len(points))]
