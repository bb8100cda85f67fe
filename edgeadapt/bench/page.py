"""The bench's page: what stands in `report.summarise`, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeadapt.bench.report import guarded, table, text
from edgeadapt.report.charts import Band, Curve, Group, bars, lines
from edgeadapt.report.page import Page, Section, Table
from edgeadapt.units import format_count

WORDS = {
    "continual": "One corruption after another, without notice.",
    "gradual": "Each corruption swells and fades, severities 1-2-3-4-5-4-3-2-1.",
    "recurring": "The same corruptions again and again.",
    "mixed": "All corruptions shuffled together.",
    "sorted": "One corruption after another, in each the frames sorted by label.",
    "dirichlet": "One corruption after another, in each frames of one label tend to come together.",
    "forgetting": "Clean frames, all corruptions, and the same clean frames again: the bars are of these last ones.",
    "single": "One class only, then clean frames of all: the bars are of these.",
    "repeated": "One frame again and again, not scored, then clean frames: the bars are of these.",
    "noise": "Frames of noise, not scored, then clean frames: the bars are of these.",
    "clean": "The frames as they are.",
    "own": "Your own recordings, as they come. Where neighbouring frames are much alike, these intervals are too narrow.",
}

QUIET = ("clean", "forgetting", "single", "repeated", "noise")
"""Streams whose error is that of clean frames."""


def page_of(found: Mapping[str, Any]) -> Page:
    """The page of what `report.summarise` found, with "settings" (name to words) beside its figures."""
    batches: Sequence[int] = found["batches"]
    sections = [part for batch in batches for part in (_overview(found, batch), *_guarded(found, batch))]
    for stream in found["streams"]:
        sections += _stream(found, stream, batches)
    sections.append(_differences(found))
    sections.append(Section("Settings", table=Table(("", ""), list(found["settings"].items()), words=True)))
    best, lead = _finding(found)
    seeds = len({seed for cell in found["cells"] for seed in cell["seeds"]})
    footer = f"edgeadapt bench, {format_count(seeds, 'seed')}. Intervals hold 95 % of {found['draws']} draws over images; docs/bench.md explains all."
    return Page("Bench of " + ", ".join(found["bundles"]), lead, best, sections, footer)


def _overview(found: Mapping[str, Any], batch: int) -> Section:
    header, rows = table(found, batch)
    turned = [list(column) for column in zip(header, *rows)]  # streams below one another: there may be many
    words = "Error in percent of scored frames, with half the width of its 95 % interval; ECE is the calibration error, in percent, over all streams."
    words += " Memory is the process's most resident bytes; ms and J are a frame's."
    return Section(f"Batch {batch}", words, table=Table(turned[0], turned[1:]))


def _guarded(found: Mapping[str, Any], batch: int) -> list[Section]:
    watched = guarded(found, batch)
    if watched is None:
        return []
    turned = [list(column) for column in zip(watched[0], *watched[1])]
    words = "Points worse than not adapting (the better of the frozen model and step 0), and the share kept of the gain without a guard."
    return [Section(f"With a guard, batch {batch}", words, table=Table(turned[0], turned[1:]))]


def _finding(found: Mapping[str, Any]) -> tuple[list[tuple[str, str, str]], str]:
    """The first drifting stream's error without and with adapting, and a sentence about it."""
    stream = next((name for name in found["streams"] if name not in QUIET), found["streams"][0])
    batch, reference = found["batches"][-1], found["reference"]
    cells = {cell["row"]: cell for cell in found["cells"] if (cell["stream"], cell["batch"]) == (stream, batch) and cell["error"]}
    adapting = [row for row in found["adapting"] if row in cells]
    where = f"on the stream {stream} at batch {batch}"
    if reference not in cells or not adapting:
        return [], f"{format_count(len(found['rows']), 'row')} over {format_count(len(found['streams']), 'stream')}."
    best = min(adapting, key=lambda row: cells[row]["error"]["value"])
    before, after = cells[reference]["error"]["value"], cells[best]["error"]["value"]
    difference = cells[best]["difference"]
    verdict = f"{best} changes the error {where} from {before:.1f} to {after:.1f} %"
    if difference and difference["low"] is not None:
        sure = difference["low"] > 0 or difference["high"] < 0
        verdict += f" ({text(difference, sign=True)} points{'' if sure else ', which may be chance'})"
    return [(reference, f"{before:.1f} %", "c0"), (best, f"{after:.1f} %", "c1")], verdict + "."


def _stream(found: Mapping[str, Any], stream: str, batches: Sequence[int]) -> list[Section]:
    cells = {(cell["row"], cell["batch"]): cell for cell in found["cells"] if cell["stream"] == stream}
    rows = [row for row in found["rows"] if any((row, batch) in cells for batch in batches)]
    groups = [_group(f"batch {batch}", [(cells.get((row, batch)) or {}).get("error") for row in rows]) for batch in batches]
    chart = bars(f"error on {stream}", groups, rows, "%")
    sections = [Section(f"Stream {stream}", WORDS.get(stream, ""), chart)]
    for batch in batches:
        at = f", batch {batch}" if len(batches) > 1 else ""
        for part in found["segments"]:
            if (part["stream"], part["batch"]) == (stream, batch):
                chart = _along(found, part["parts"], stream)
                sections.append(Section(f"{stream}, along the stream{at}", "Error of each stretch, in percent.", chart))
        rounds = {row: cells[row, batch]["rounds"] for row in found["rows"] if (row, batch) in cells}
        if any(rounds.values()):
            sections.append(_rounds(found, stream, at, {row: cells[row, batch] for row in rounds}))
        if not any(part["stream"] == stream for part in found["segments"]) and any(len(cell["domains"]) > 1 for cell in cells.values()):
            sections.append(Section(f"{stream}, by domain{at}", "", _by_domain(found, cells, batch)))
    return sections


def _colour(found: Mapping[str, Any], row: str) -> int:
    return int(found["rows"].index(row))


def _along(found: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], stream: str) -> str:
    bands = [Band(part["domain"].replace("_", " "), part["begin"], part["end"], part["severity"] / 5) for part in parts]
    curves = []
    for row in found["rows"]:
        points = [((part["begin"] + part["end"]) / 2, part["errors"][row]) for part in parts if row in part["errors"]]
        if points:
            curves.append(Curve(row, points, _colour(found, row)))
    return lines(f"error along {stream}", curves, "%", bands=bands)


def _rounds(found: Mapping[str, Any], stream: str, at: str, cells: Mapping[str, Mapping[str, Any]]) -> Section:
    curves = [
        Curve(row, [(number + 1, value["value"]) for number, value in enumerate(cell["rounds"]) if value], _colour(found, row))
        for row, cell in cells.items()
        if cell["rounds"]
    ]
    rows = [(row, text(cell["slope"], 2, sign=True)) for row, cell in cells.items()]
    chart = lines(f"error of each round of {stream}", curves, "%", x_name="rounds")
    return Section(f"{stream}, round by round{at}", "Error of each round.", chart, Table(("", "points a round"), rows))


def _by_domain(found: Mapping[str, Any], cells: Mapping[tuple[str, int], Mapping[str, Any]], batch: int) -> str:
    rows = [row for row in found["rows"] if (row, batch) in cells]
    names = list(dict.fromkeys(name for row in rows for name in cells[row, batch]["domains"]))
    groups = [_group(name.replace("_", " "), [cells[row, batch]["domains"].get(name) for row in rows]) for name in names]
    return bars("error by domain", groups, rows, "%")


def _group(name: str, values: Sequence[Mapping[str, Any] | None]) -> Group:
    spans = [(value["low"], value["high"]) if value and value["low"] is not None else None for value in values]
    return Group(name, [value["value"] if value else None for value in values], spans)


def _differences(found: Mapping[str, Any]) -> Section:
    reference = found["reference"]
    names = [(row, batch) for row in found["rows"] for batch in found["batches"] if row != reference]
    cells = {(cell["row"], cell["batch"], cell["stream"]): cell["difference"] for cell in found["cells"]}
    rows = [[stream, *(text(cells.get((*name, stream)), sign=True) for name in names)] for stream in found["streams"]]
    header = [row if len(found["batches"]) == 1 else f"{row}, batch {batch}" for row, batch in names]
    words = f"Points of percent by which the error lies above that of the row {reference}, over the same frames; below 0 is better."
    return Section(f"Difference to {reference}", words, table=Table(["", *header], rows))
