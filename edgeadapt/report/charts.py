"""Charts as SVG text. Colours come from the page's style sheet by class, so that a page can be light or dark; `STYLE` is that sheet."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 920

STYLE = """
svg.chart { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg.chart text { fill: var(--soft); font-variant-numeric: tabular-nums; }
svg.chart .strong { fill: var(--text); }
svg.chart .grid { stroke: var(--line); stroke-width: 1; }
svg.chart .base { stroke: var(--soft); stroke-width: 1; }
svg.chart .band { fill: var(--band); }
svg.chart .ramp { fill: var(--soft); opacity: .35; }
svg.chart .limit { stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 6 4; }
svg.chart .curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg.chart .whisker { stroke: var(--text); stroke-width: 1.5; }
"""

COLOURS = 8
STYLE += "".join(f"svg.chart .curve.c{k} {{ stroke: var(--c{k}); }} svg.chart .fill.c{k} {{ fill: var(--c{k}); }}\n" for k in range(COLOURS))

_LEFT, _RIGHT, _BOTTOM = 56, 16, 30
_LINE = 16  # between two lines of a legend
_ILLEGAL = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Curve:
    """A named line through (x, y) points; `colour` counts from 0 and begins again after `COLOURS`."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1


@dataclass(frozen=True)
class Band:
    """A stretch of x with a name; `level` from 0 to 1 is drawn as a step above the chart."""

    name: str
    begin: float
    end: float
    level: float = 0.0


@dataclass(frozen=True)
class Level:
    """A horizontal line, such as a budget."""

    name: str
    value: float


@dataclass(frozen=True)
class Group:
    """One row of a bar chart: its name and one value for each series, None for no bar; `intervals` has (low, high) for each value, or None."""

    name: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None] = ()


def escape(text: str) -> str:
    """Text for HTML and XML: markup escaped, characters that XML does not have replaced."""
    return html.escape(_ILLEGAL.sub("\ufffd", text))


def lines(
    title: str,
    curves: Sequence[Curve],
    unit: str,
    x_name: str = "frames",
    bands: Sequence[Band] = (),
    level: Level | None = None,
    top: float | None = None,
    height: int = 280,
) -> str:
    """A line chart from y = 0 up.

    Args:
        title: for readers of the page's text; not drawn.
        curves: drawn in their order.
        unit: of y, drawn at the top of its axis.
        x_name: what x counts.
        bands: stretches of x; neighbours of one name share one label.
        level: a horizontal line.
        top: what the y axis reaches at least; None fits it.
        height: in pixels at full width.

    Returns:
        a well-formed <svg> element.
    """
    xs = [x for curve in curves for x, _ in curve.points] + [band.end for band in bands]
    ys = [y for curve in curves for _, y in curve.points] + ([level.value] if level else [])
    right = _end(xs)
    steps = _ticks(_end(ys, top))
    entries = [(curve.name, curve.colour) for curve in curves]
    more = _LINE * (_legend(entries, 14)[1] - 1)
    head, height = (62 if bands else 34) + more, height + more
    plot = _Plot(right, steps[-1], head, height - _BOTTOM)
    parts = [*_bands(bands, plot), *_grid(plot, steps, unit), *_x_axis(plot, x_name)]
    if level:
        y = plot.y(level.value)
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(WIDTH - _RIGHT - 4, y - 6, level.name, "end", "strong"))
    for curve in curves:
        path = " ".join(f"{plot.x(x):.1f},{plot.y(min(y, plot.top)):.1f}" for x, y in curve.points)
        if len(curve.points) == 1:
            x, y = curve.points[0]
            parts.append(f'<circle class="fill c{curve.colour % COLOURS}" cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="3"/>')
        parts.append(f'<polyline class="curve c{curve.colour % COLOURS}" points="{path}"><title>{escape(curve.name)}</title></polyline>')
    return _svg(title, height, [*parts, *_legend(entries, 14)[0]])


def bars(title: str, groups: Sequence[Group], series: Sequence[str], unit: str, top: float | None = None) -> str:
    """Horizontal bars, one row a group and in it one bar a series, each with its value at its end, and its interval if it has one.

    Args:
        title: for readers of the page's text; not drawn.
        groups: the rows, from above.
        series: names of the values of a group; for the legend.
        unit: written after each value.
        top: the end of the axis; None fits it.
    """
    thick, gap, label = 11, 2, 150
    legend, rows = _legend([(name, place) for place, name in enumerate(series)], 14, label)
    above = _LINE * (rows - 1)
    row = len(series) * (thick + gap) + 14
    height = 30 + above + row * len(groups) + 6
    values = [value for group in groups for value in group.values if value is not None]
    values += [span[1] for group in groups for span in group.intervals if span is not None]
    most, room = _end(values, top), WIDTH - label - 80
    parts = [f'<line class="base" x1="{label}" x2="{label}" y1="{28 + above}" y2="{height - 6}"/>']
    for index, group in enumerate(groups):
        y = 34 + above + index * row
        parts.append(_text(label - 10, y + (row - 14) / 2 + 3, _fit(group.name, label - 12), "end", "strong"))
        for place, value in enumerate(group.values):
            if value is None:
                continue
            at, length = y + place * (thick + gap), max(1.0, min(value / most, 1.0) * room)
            span = group.intervals[place] if place < len(group.intervals) else None
            tip = f"{group.name}, {series[place]}: {value:.1f} {unit}" + (f" ({span[0]:.1f} to {span[1]:.1f})" if span else "")
            size = f'x="{label}" y="{at}" width="{length:.1f}" height="{thick}"'
            parts.append(f'<rect class="fill c{place % COLOURS}" {size} rx="2"><title>{escape(tip)}</title></rect>')
            if span:
                low, high = (label + min(max(end / most, 0.0), 1.0) * room for end in span)
                middle, length = at + thick / 2, max(length, high - label)
                parts.append(f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>')
                parts += [f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{at + 2}" y2="{at + thick - 2}"/>' for x in (low, high)]
            parts.append(_text(label + length + 6, at + thick - 1.5, f"{value:.1f} {unit}", "start", "strong"))
    return _svg(title, height, [*parts, *legend])


@dataclass(frozen=True)
class _Plot:
    """From data to pixels."""

    right: float
    top: float
    above: float
    below: float

    def x(self, value: float) -> float:
        return _LEFT + value / self.right * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self.below - value / self.top * (self.below - self.above)


def _end(values: Sequence[float], top: float | None = None) -> float:
    """Where an axis ends: above 0, so that all can be divided by it."""
    return max(top if top is not None else max(values, default=1.0), 1e-9)


def _ticks(top: float, wanted: int = 4) -> list[float]:
    """Round numbers from 0 to at least `top`."""
    raw = top / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [index * step for index in range(math.ceil(top / step - 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f") if abs(value) >= 1000 else f"{value:.4g}"


def _grid(plot: _Plot, steps: Sequence[float], unit: str) -> list[str]:
    parts = []
    for step in steps:
        y = plot.y(step)
        parts.append(f'<line class="{"base" if not step else "grid"}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{_number(step)}{f' {unit}' if step == steps[-1] else ''}", "end"))
    return parts


def _x_axis(plot: _Plot, name: str) -> list[str]:
    steps = [step for step in _ticks(plot.right, 6) if step <= plot.right * 1.0001]
    parts = [_text(plot.x(0), plot.below + 18, f"0 {name}", "start")]
    for step in steps[1:]:
        parts.append(_text(plot.x(step), plot.below + 18, _number(step), "end" if step > 0.97 * plot.right else "middle"))
    return parts


def _bands(bands: Sequence[Band], plot: _Plot) -> list[str]:
    """Every other stretch shaded, its name above, and how strong it is as a small step profile."""
    parts: list[str] = []
    runs: list[tuple[str, float, float]] = []
    for band in bands:
        if runs and runs[-1][0] == band.name and runs[-1][2] == band.begin:
            runs[-1] = (band.name, runs[-1][1], band.end)
        else:
            runs.append((band.name, band.begin, band.end))
    for index, (name, begin, end) in enumerate(runs):
        x, width = plot.x(begin), plot.x(end) - plot.x(begin)
        if index % 2:
            parts.append(f'<rect class="band" x="{x:.1f}" y="{plot.above - 32}" width="{width:.1f}" height="{plot.below - plot.above + 32:.1f}"/>')
        if width > 40:
            parts.append(_text(x + width / 2, plot.above - 18, _fit(name, width), "middle"))
    for band in bands:
        if band.level > 0:
            tall = 10 * min(band.level, 1.0)
            x, width = plot.x(band.begin), plot.x(band.end) - plot.x(band.begin)
            parts.append(f'<rect class="ramp" x="{x:.1f}" y="{plot.above - 2 - tall:.1f}" width="{width:.1f}" height="{tall:.1f}"/>')
    return parts


def _fit(name: str, width: float) -> str:
    room = int(width / 6.4)
    return name if len(name) <= room else name[: max(1, room - 1)] + "…"


def _legend(entries: Sequence[tuple[str, int]], y: float, x: float = _LEFT) -> tuple[list[str], int]:
    """Its parts, and how many lines they take."""
    parts, left, rows = [], x, 1
    for name, colour in entries:
        width = 44 + 6.6 * len(name)
        if left + width > WIDTH and left > x:
            left, y, rows = x, y + _LINE, rows + 1
        parts.append(f'<rect class="fill c{colour % COLOURS}" x="{left:.1f}" y="{y - 8}" width="14" height="4" rx="2"/>')
        parts.append(_text(left + 20, y - 2, name, "start", "strong"))
        left += width
    return parts, rows


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    head = f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return "\n".join([head, *parts, "</svg>"])
