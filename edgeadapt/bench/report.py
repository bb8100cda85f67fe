"""What a bench found, as plain JSON values and as rows of text; all seeds of a row, stream and batch are taken together.

A stream's error is that of its scored frames; where clean frames come after the rest of a stream (forgetting, single, repeated, noise), it is
theirs alone, because they show what the rest has left behind.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeadapt.bench import scores
from edgeadapt.bench.frames import CLEAN
from edgeadapt.bench.record import Record
from edgeadapt.bench.scores import Estimate, Outcome
from edgeadapt.bench.streams import AFTER
from edgeadapt.bundle.atomic import replacing
from edgeadapt.errors import UsageError
from edgeadapt.report.page import Page, render
from edgeadapt.units import format_bytes

JSON, HTML = "bench.json", "bench.html"
STILL, GUARDED = "step 0", ", guarded"
"""Ends of rows' names: of bundles that do not adapt, and of those that a guard watches, which are otherwise as the row without."""

_POINTS, _LEAST = 60, 16  # of a curve along a stream, and frames of each


@dataclass(frozen=True)
class Run:
    """A record, and what it is of."""

    row: str
    stream: str
    batch: int
    record: Record


@dataclass(frozen=True)
class Segment:
    """Neighbouring frames of one domain, severity and round, or a part of them: from frame `begin` to `end`, with each row's error in percent."""

    domain: str
    severity: int
    begin: int
    end: int
    errors: Mapping[str, float]


def summarise(runs: Sequence[Run], reference: str, draws: int = scores.DRAWS) -> dict[str, Any]:
    """All figures.

    Args:
        runs: in the order in which rows and streams are to be shown.
        reference: the row that others are compared with.
        draws: of each interval.

    Returns:
        JSON values: "cells", one for each row, stream and batch; "costs", one for each row and batch; "segments" of streams, by batch and stream.
        An interval is {"value", "low", "high"}, with None for a bound that is not known.
    """
    batches, streams, rows = (list(dict.fromkeys(getattr(run, name) for run in runs)) for name in ("batch", "stream", "row"))
    cells, costs, segments = [], [], []
    for batch in batches:
        for stream in streams:
            found = {row: [run.record for run in runs if (run.row, run.stream, run.batch) == (row, stream, batch)] for row in rows}
            found = {row: records for row, records in found.items() if records}
            outcomes = {row: scores.together([record.outcome() for record in records]) for row, records in found.items()}
            for row, records in found.items():
                against = outcomes.get(reference) if row != reference else None
                watched = _watched(row, reference, outcomes, draws) if row.endswith(GUARDED) else {}
                cells.append({"row": row, "stream": stream, "batch": batch, **_cell(records, outcomes[row], against, draws), **watched})
            if parts := _segments(found):
                segments.append({"stream": stream, "batch": batch, "parts": [vars(part) for part in parts]})
        costs += [_costs(row, batch, [run.record for run in runs if (run.row, run.batch) == (row, batch)]) for row in rows]
    return {"reference": reference, "rows": rows, "streams": streams, "batches": batches, "cells": cells, "costs": costs, "segments": segments}


def table(found: Mapping[str, Any], batch: int) -> tuple[list[str], list[list[str]]]:
    """The figures of one batch size as a header and rows of text: errors in percent with half their interval's width, then what serving cost."""
    cells = {(cell["row"], cell["stream"]): cell for cell in found["cells"] if cell["batch"] == batch}
    streams = [stream for stream in found["streams"] if any(name == stream for _, name in cells)]
    forgets = any(cell["forgetting"] for cell in cells.values())
    drifts = any(cell["slope"] for cell in cells.values())
    energy = any(cost["joules_frame"] is not None for cost in found["costs"])
    header = ["", *streams, *(["forgets"] if forgets else []), *(["a round"] if drifts else []), "ECE", "memory", "ms p50", "p95"]
    rows = []
    for cost in found["costs"]:
        mine = [cells[cost["row"], stream] for stream in streams if (cost["row"], stream) in cells]
        if cost["batch"] != batch or not mine:
            continue
        line = [cost["row"], *(text(cells.get((cost["row"], stream), {}).get("error")) for stream in streams)]
        line += [_first(mine, "forgetting")] if forgets else []
        line += [_first(mine, "slope", 2)] if drifts else []
        errors = [cell["ece"] for cell in mine if cell["ece"] is not None]
        line += [f"{sum(errors) / len(errors):.1f}" if errors else "–", format_bytes(cost["peak_bytes"]) if cost["peak_bytes"] else "–"]
        line += [f"{cost['ms_p50']:.3g}", f"{cost['ms_p95']:.3g}"]
        line += [("–" if cost["joules_frame"] is None else f"{cost['joules_frame']:.3g}")] if energy else []
        rows.append(line)
    return header + (["J/frame"] if energy else []), rows


def guarded(found: Mapping[str, Any], batch: int) -> tuple[list[str], list[list[str]]] | None:
    """Of rows with a guard and one batch size, by stream: points worse than not adapting, and the percentage kept of the gain without a guard.

    None where there are no such rows.
    """
    cells = [cell for cell in found["cells"] if cell["batch"] == batch and "worse" in cell]
    if not cells:
        return None
    streams = [stream for stream in found["streams"] if any(cell["stream"] == stream for cell in cells)]
    rows = []
    for row in dict.fromkeys(cell["row"] for cell in cells):
        mine = {cell["stream"]: cell for cell in cells if cell["row"] == row}
        sure = {stream: cell["kept"] for stream, cell in mine.items() if cell["kept"] and cell["kept"]["low"] is not None}
        kept = {stream: {name: 100 * end for name, end in value.items()} for stream, value in sure.items()}
        rows.append([f"{row}: points worse", *(text(mine.get(stream, {}).get("worse"), sign=True) for stream in streams)])
        rows.append(["% of the gain kept", *(text(kept.get(stream), 0) for stream in streams)])
    return ["", *streams], rows


def text(value: Mapping[str, Any] | None, digits: int = 1, sign: bool = False) -> str:
    """An interval as words: "28.1 ±0.6", or "–" where there is none; with `sign` also + before what is above 0."""
    if not value:
        return "–"
    plain = f"{value['value']:{'+' if sign else ''}.{digits}f}"
    return plain if value["low"] is None else f"{plain} ±{(value['high'] - value['low']) / 2:.{digits}f}"


def write(folder: str | os.PathLike[str], page: Page, found: Mapping[str, Any]) -> Path:
    """Writes bench.json and bench.html, whole or not at all.

    Returns:
        the page.

    Raises:
        UsageError: they cannot be written.
    """
    target = Path(folder)
    try:
        for name, content in ((JSON, json.dumps(found, indent=1, allow_nan=False) + "\n"), (HTML, render(page))):
            with replacing(target / name) as (file, _):
                file.write(content.encode())
    except OSError as reason:
        hint = "give a folder that can be written, with room on it"
        raise UsageError(f"the report cannot be written to {target}: {reason.strerror}", hint) from None
    return target / HTML


def judged(outcome: Outcome) -> Outcome:
    """The frames that a stream's error is of: clean ones after a shift where there are such, else all that are scored."""
    return outcome.of(AFTER) if AFTER in outcome.domains else outcome


def _cell(records: Sequence[Record], outcome: Outcome, against: Outcome | None, draws: int) -> dict[str, Any]:
    main = judged(outcome)
    rounds = int(outcome.round.max(initial=0)) > 0
    return {
        "seeds": [record.facts["seed"] for record in records],
        "frames": sum(record.facts["frames"] for record in records),
        "scored": len(main),
        "nonfinite": sum(record.facts["nonfinite"] for record in records),
        "error": _plain(scores.error(main, draws=draws)),
        "difference": None if against is None else _plain(scores.paired(main, judged(against), draws=draws)),
        "domains": {name: _plain(value) for name, value in scores.by_domain(outcome, draws=draws).items()},
        "forgetting": _plain(scores.forgetting(outcome, CLEAN, AFTER, draws=draws)) if AFTER in outcome.domains else None,
        "rounds": [_plain(value) for value in scores.by_round(outcome, draws=draws)] if rounds else [],
        "slope": _plain(scores.slope(outcome, draws=draws)) if rounds else None,
        "ece": scores.calibration(main),
        "peak_bytes": max((record.facts.get("peak_bytes") or 0 for record in records), default=0) or None,
        "counters": _added([record.facts.get("counters", {}) for record in records]),
    }


def _watched(row: str, reference: str, outcomes: Mapping[str, Outcome], draws: int) -> dict[str, Any]:
    """What a row with a guard is worse by than not adapting, the better of the frozen model and step 0, and what it keeps of the gain without it."""
    base = row.removesuffix(GUARDED)
    name = base.split(", ", 1)[0]
    still = [judged(outcomes[one]) for one in (reference, STILL, f"{name}, {STILL}") if one in outcomes]
    if not still:
        return {}
    best, mine = min(still, key=lambda one: float(one.wrong.mean()) if len(one) else math.inf), judged(outcomes[row])
    if not len(mine):
        return {}
    kept = scores.gain_kept(mine, judged(outcomes[base]), best, draws=draws) if base in outcomes else None
    return {"worse": _plain(scores.paired(mine, best, draws=draws)), "kept": _plain(kept)}


def _costs(row: str, batch: int, records: Sequence[Record]) -> dict[str, Any]:
    times = np.concatenate([record.columns["milliseconds"] for record in records]) if records else np.zeros(1)
    middle, slow = np.quantile(times, [0.5, 0.95]).tolist()
    joules = [(record.facts.get("joules_frame"), record.facts["frames"]) for record in records]
    known = [(each * count, count) for each, count in joules if each is not None]
    return {
        "row": row,
        "batch": batch,
        "ms_p50": middle,
        "ms_p95": slow,
        "peak_bytes": max((record.facts.get("peak_bytes") or 0 for record in records), default=0) or None,
        "joules_frame": sum(each for each, _ in known) / sum(count for _, count in known) if known and len(known) == len(joules) else None,
    }


def _segments(found: Mapping[str, Sequence[Record]]) -> list[Segment]:
    """The stretches of a stream with the error of each row in each, over all seeds; none where domains come mixed.

    A stretch has the same length for every seed, because only the order of frames follows from it.
    """
    first = next(iter(found.values()))[0]
    marks = np.stack([first.columns[name].astype(np.int64) for name in ("domain", "severity", "round")])
    edges = [0, *(np.flatnonzero((np.diff(marks) != 0).any(0)) + 1).tolist(), marks.shape[1]]
    if not 3 <= len(edges) <= 1 + marks.shape[1] // 4:
        return []
    parts: list[Segment] = []
    for begin, end in _cut(edges):
        errors = {}
        for row, records in found.items():
            wrong = np.concatenate([record.columns["wrong"][begin:end] for record in records])
            scored = np.concatenate([record.columns["scored"][begin:end] for record in records]) & np.isfinite(wrong)
            if scored.any():
                errors[row] = float(100 * wrong[scored].mean())
        parts.append(Segment(first.facts["domains"][int(marks[0, begin])], int(marks[1, begin]), begin, end, errors))
    return parts


def _cut(edges: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches between edges, long ones cut into equal parts, so that there are about `_POINTS` in all."""
    found = []
    for begin, end in zip(edges, edges[1:]):
        count = max(1, min(round(_POINTS * (end - begin) / edges[-1]), (end - begin) // _LEAST))
        cuts = [begin + (end - begin) * number // count for number in range(count + 1)]
        found += list(zip(cuts, cuts[1:]))
    return found


def _plain(value: Estimate | None) -> dict[str, float | None] | None:
    if value is None:
        return None
    low, high = (None if math.isnan(end) else end for end in (value.low, value.high))
    return {"value": value.value, "low": low, "high": high}


def _first(cells: Sequence[Mapping[str, Any]], name: str, digits: int = 1) -> str:
    """Of the first stream that has it; a bench has one that forgets and one that recurs."""
    own = [cell for cell in cells if cell[name]]
    chosen = [cell for cell in own if cell["stream"] == "forgetting"] or own
    return text(chosen[0][name], digits, sign=True) if chosen else "–"


def _added(counters: Sequence[Mapping[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(name for one in counters for name in one)
    return {name: sum(one.get(name, 0) for one in counters) for name in names}
