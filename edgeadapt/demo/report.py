"""The demo's page: error, memory and time over the stream, and a table."""

from __future__ import annotations

from typing import Any

from edgeadapt.demo.loop import MIB, SCALE, STAGES, Tally, words
from edgeadapt.report import Band, Curve, Group, Level, Page, Section, Table, bars, lines
from edgeadapt.report.stream import smooth
from edgeadapt.units import format_bytes

NAMES = ("without adapting", "adapting")


def page(tally: Tally, facts: dict[str, Any]) -> tuple[Page, dict[str, Any]]:
    """The report as a page and as plain JSON values.

    Args:
        tally: of the finished run.
        facts: bundle, digest, model, parameters, method, batch, peak_bytes, steps, rejected_steps.
    """
    without, adapting = tally.all.errors()
    rows = [(words(name), count) for name, count in zip(STAGES, tally.stages) if count.frames]
    budget = format_bytes(tally.budget)
    frozen_time, adapting_time = tally.milliseconds
    lead = (
        f"{tally.all.frames:,} frames of test images under drifting corruptions. The model reads {without:.1f} % of them wrong as it was trained, "
        f"and {adapting:.1f} % when it adapts to the stream, without a single label."
    )
    made = Page(
        "Handwritten digits while the picture goes bad",
        lead,
        [
            ("wrong without adapting", f"{without:.1f} %", "c0"),
            ("wrong adapting", f"{adapting:.1f} %", "c1"),
            ("resident at most", format_bytes(facts["peak_bytes"]), ""),
            ("budget", budget, ""),
            ("ms a frame adapting", f"{adapting_time.at(0.5):.2f}", ""),
        ],
        [*_charts(tally, rows), Section("In numbers", table=_table(rows, tally))],
        _footer(facts),
    )
    return made, _data(tally, facts, rows, (frozen_time.at(0.5), adapting_time.at(0.5)), (frozen_time.at(0.95), adapting_time.at(0.95)))


def _footer(facts: dict[str, Any]) -> str:
    return (
        f"Bundle {facts['bundle']} ({facts['digest'][:16]}…): {facts['parameters']:,} parameters, method {facts['method']}, {facts['steps']} steps "
        f"on windows of {facts['batch']}, {facts['rejected_steps']} rejected. Corruptions after Hendrycks and Dietterich (2019) in their strengths "
        "for photographs. Digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998), CC BY 4.0."
    )


def _charts(tally: Tally, rows: list[tuple[str, Any]]) -> list[Section]:
    bands = [Band(words(name), begin, end, severity / 5) for name, begin, end, severity in tally.bands]
    curves = [Curve(name, smooth(trace.points, 6), which) for which, (name, trace) in enumerate(zip(NAMES, tally.errors))]
    times = [Curve(name, smooth(trace.points, 6), which) for which, (name, trace) in enumerate(zip(NAMES, tally.time))]
    level = Level(f"budget {format_bytes(tally.budget)}", tally.budget / MIB)
    return [
        Section(
            "Error over the stream",
            "Percent of frames read wrong, as a running mean. The steps above are the corruption's severity, 1 to 5 and back. Both ways see "
            "the same frames; an adapted prediction is made before the model learns from its frame.",
            lines("error over the stream, both ways", curves, "%", bands=bands, top=100, height=320),
        ),
        Section("Error by corruption", "", bars("error by corruption", [Group(name, count.errors()) for name, count in rows], NAMES, "%")),
        Section(
            "Memory against the budget",
            "Resident bytes of the whole process: interpreter, libraries, model, adaptation, and the making of the corrupted pictures.",
            lines("resident memory", [Curve("resident", tally.memory.points)], "MiB", level=level, height=220),
        ),
        Section(
            "Time a frame",
            "Preparing and predicting; for the adapting model the whole step, forward and back. A window's time divided by its frames.",
            lines("time a frame", times, "ms", height=220),
        ),
    ]


def _table(rows: list[tuple[str, Any]], tally: Tally) -> Table:
    cells = []
    for name, count in [*rows, ("all", tally.all)]:
        without, adapting = count.errors()
        cells.append((name, f"{count.frames:,}", f"{without:.1f} %", f"{adapting:.1f} %", f"{adapting - without:+.1f}"))
    return Table(("", "frames", *NAMES, "difference"), cells, total=True)


Pair = tuple[float, float]


def _data(tally: Tally, facts: dict[str, Any], rows: list[tuple[str, Any]], middle: Pair, slow: Pair) -> dict[str, Any]:
    def both(pair: Pair) -> dict[str, float]:
        return {"without": round(pair[0], 4), "adapting": round(pair[1], 4)}

    return {
        **facts,
        "frames": tally.all.frames,
        "scale": SCALE,
        "error_percent": both(tally.all.errors()),
        "stages": [{"name": name, "frames": count.frames, "error_percent": both(count.errors())} for name, count in rows],
        "ms_p50": both(middle),
        "ms_p95": both(slow),
        "resident_bytes": tally.resident,
        "budget_bytes": tally.budget,
        "curves": {
            "error_without": tally.errors[0].points,
            "error_adapting": tally.errors[1].points,
            "memory_mib": tally.memory.points,
            "ms_without": tally.time[0].points,
            "ms_adapting": tally.time[1].points,
        },
    }
