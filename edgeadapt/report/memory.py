"""The page of a simulation: the ledger, the configurations, and for each graph the curve of its memory and what stands at the peak."""

from __future__ import annotations

from edgeadapt.memory.curve import Curve
from edgeadapt.memory.simulation import Simulation
from edgeadapt.report.charts import Curve as Line
from edgeadapt.report.charts import Group, bars, lines
from edgeadapt.report.page import Page, Section, Table
from edgeadapt.units import format_bytes, format_count, format_shape

_MIB = 2**20
_SHOWN = 40


def page_of(found: Simulation) -> Page:
    """The page; texts are escaped where it is rendered."""
    total = format_bytes(found.ledger.total)
    figures = [("peak of the process", total, "c1")]
    lead = f"{found.choice.words} on {found.board} would take {total} at its peak."
    if found.budget is not None and found.margin is not None:
        figures.append(("budget", format_bytes(found.budget), ""))
        figures.append(("to spare" if found.fits else "too much", format_bytes(abs(found.margin)), "" if found.fits else "c0"))
        lead += " That fits the budget." if found.fits else " That does not fit the budget."
    figures.append(("a step, roughly", found.time(found.choice.seconds), ""))
    sections = [_ledger(found), _choices(found), *(_curve(curve) for curve in found.curves)]
    threads = format_count(found.threads, "thread")
    return Page(f"Memory of {found.bundle}", lead, figures, sections, f"edgeadapt simulate, {threads}, digest {found.digest[:16]}. Nothing was run.")


def _ledger(found: Simulation) -> Section:
    rows = [(line.name, f"{line.bytes:,}", format_bytes(line.bytes), line.known, line.note) for line in found.ledger.lines]
    rows.append(("peak of the process", f"{found.ledger.total:,}", format_bytes(found.ledger.total), "", ""))
    groups = [Group(line.name, [line.bytes / _MIB]) for line in found.ledger.lines if line.bytes >= _MIB / 20]
    chart = bars("Memory by line", groups, ["MiB"], "MiB")
    text = "Counted lines follow from the bundle to the byte or page, measured ones were measured on models made for it."
    notes = [("Not used, because the GPU lacks operators: ", found.passed_over), ("With nodes that run on the processor: ", found.on_processor)]
    text += "".join(f" {begin}{', '.join(names)}." for begin, names in notes if names)
    return Section("Line by line", text, chart, Table(("line", "bytes", "", "known", "what it is"), rows, total=True))


def _choices(found: Simulation) -> Section:
    rows = []
    for choice in found.choices:
        fits = {None: "", True: "fits", False: "does not fit"}[choice.fits] + (", best" if choice.best else "")
        packed = "prepacked" if choice.prepacking else "as stored"
        packed += ", prepared" if choice.prepared else ""
        piece, time = str(choice.micro or ""), (found.time(choice.seconds), found.time(choice.per_frame))
        rows.append((choice.graph, choice.role, str(choice.batch), str(choice.predicts), piece, packed, format_bytes(choice.total), *time, fits))
    header = ("graph of a step", "role", "batch", "predicts", "in pieces of", "weights", "memory", "a step", "a frame", "")
    text = (
        f"Those that no other configuration of the bundle beats in memory, time a frame and batch at once. Times are {found.times}."
    )
    return Section("Configurations", text, "", Table(header, rows))


def _curve(curve: Curve) -> Section:
    if not curve.points:
        return Section(curve.graph, "It has no nodes.")
    points = [(float(position), value / _MIB) for position, value in enumerate(curve.points)]
    peak = Line("the peak", [(float(curve.peak), curve.most / _MIB)], 0)
    chart = lines(f"Memory of {curve.graph}", [Line("in use", points), peak], "MiB", "nodes")
    text = f"{format_bytes(curve.most)} are in use at {curve.where}. This is held there, the largest first."
    rows = []
    for item in curve.standing[:_SHOWN]:
        shape = format_shape(item.shape) if item.shape else ""
        rows.append((item.tensor, shape, f"{item.bytes:,}", item.op, item.place, f"{item.made + 1} – {item.freed + 1}"))
    rest = curve.standing[_SHOWN:]
    if rest:
        rows.append((f"{len(rest)} more", "", f"{sum(item.bytes for item in rest):,}", "", "", ""))
    return Section(f"Graph {curve.graph}", text, chart, Table(("tensor", "shape", "bytes", "made by", "module", "held at nodes"), rows))
