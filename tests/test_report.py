"""Reports: well-formed, self-contained, with the numbers in them; and the bounded records they are made from."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from edgeadapt.errors import UsageError
from edgeadapt.report import Band, Curve, Group, Level, Page, Quantiles, Section, Table, Trace, bars, lines, render, write
from edgeadapt.report.charts import WIDTH
from edgeadapt.report.stream import Tally, smooth, summary, wrong

pytestmark = pytest.mark.device

SVG = "{http://www.w3.org/2000/svg}"
NASTY = '<b>&"\'\x00\ud800]]>'


def parsed(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter() if element.tag in (f"{SVG}text", f"{SVG}title")]


def coordinates(root: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for line in root.iter(f"{SVG}polyline") for pair in line.attrib["points"].split()]


def test_a_line_chart_draws_its_points_from_zero_up():
    root = parsed(lines("error", [Curve("frozen", [(0, 0), (50, 25), (100, 50)], 0)], "%", top=100))
    (x0, y0), (x1, y1), (x2, y2) = coordinates(root)
    assert x0 < x1 < x2
    assert y0 > y1 > y2
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert root.attrib["aria-label"] == "error"
    assert {"frozen", "100 %", "0", "100"} <= set(texts(root))


def test_a_line_chart_shows_bands_and_a_level():
    bands = [Band("noise", 0, 40, 0.2), Band("noise", 40, 60, 1.0), Band("snow", 60, 100, 0.4), Band("clean", 100, 120)]
    root = parsed(lines("memory", [Curve("resident", [(120, 70.0)])], "MiB", bands=bands, level=Level("budget 128 MiB", 128.0)))
    assert texts(root).count("noise") == 1
    assert {"snow", "clean", "budget 128 MiB"} <= set(texts(root))
    assert len([element for element in root.iter(f"{SVG}rect") if element.attrib["class"] == "ramp"]) == 3
    limit = next(element for element in root.iter(f"{SVG}line") if element.attrib["class"] == "limit")
    assert float(limit.attrib["y1"]) < coordinates(root)[0][1]


def test_a_bar_chart_has_a_bar_and_its_number_for_each_value():
    root = parsed(bars("by corruption", [Group("noise", (40.0, 10.0)), Group("snow", (None, 0.0))], ("without", "with"), "%"))
    widths = [float(element.attrib["width"]) for element in root.iter(f"{SVG}rect") if element.find(f"{SVG}title") is not None]
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.01)
    assert len(widths) == 3
    assert {"noise", "snow", "without", "with", "40.0 %", "10.0 %", "0.0 %", "noise, without: 40.0 %"} <= set(texts(root))


numbers = some.floats(0, 1e9, allow_nan=False)


@given(points=some.lists(some.tuples(numbers, numbers), max_size=20), level=some.none() | some.floats(1e-3, 1e9), name=some.text(max_size=20))
def test_any_line_chart_is_well_formed_and_inside_its_frame(points, level, name):
    budget = None if level is None else Level(name, level)
    chart = lines(name, [Curve(name, sorted(points))], name, bands=[Band(name, 0, 5, 0.5)], level=budget, height=280)
    for x, y in coordinates(parsed(chart)):
        assert -1 <= x <= WIDTH + 1
        assert -1 <= y <= 281


@given(values=some.lists(some.none() | numbers, max_size=6), name=some.text(max_size=20))
def test_any_bar_chart_is_well_formed(values, name):
    root = parsed(bars(name, [Group(name, [value]) for value in values], [name], name))
    assert all(float(element.attrib["width"]) <= WIDTH for element in root.iter(f"{SVG}rect"))


def page() -> Page:
    chart = lines("a", [Curve("b", [(1, 2)])], "%")
    table = Table(("", NASTY), [("noise", "40.0 %"), ("all", "12.3 %")], total=True)
    return Page(NASTY, "lead", [("error", "12.3 %", "c1")], [Section("Error", NASTY, chart, table)], "foot")


def test_a_page_is_well_formed_and_needs_nothing_else():
    html = render(page())
    root = ElementTree.fromstring(html.split("\n", 1)[1])
    found = "".join(root.itertext())
    for text in ("lead", "12.3 %", "40.0 %", "Error", "noise", "foot", '<b>&"'):
        assert text in found
    assert not re.findall(r"<script|<link|<img|@import|url\(|\ssrc=|\shref=", html)
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in html
    html.encode("utf-8")


def test_every_colour_of_a_chart_is_defined_for_light_and_dark():
    html = render(page())
    used = set(re.findall(r"var\((--\w+)\)", html))
    light, dark = re.findall(r":root \{([^}]*)\}", html)
    assert used == set(re.findall(r"(--\w+):", light)) == set(re.findall(r"(--\w+):", dark))


def test_a_report_is_two_files(tmp_path):
    path = write(tmp_path / "new" / "folder", page(), {"error": 1.5})
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert path.read_text(encoding="utf-8") == render(page())
    assert json.loads((path.parent / "report.json").read_text()) == {"error": 1.5}
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write(tmp_path / "file", page(), {})


@settings(max_examples=50)
@given(values=some.lists(some.floats(-1e6, 1e6), min_size=1, max_size=400), limit=some.sampled_from([2, 4, 32]))
def test_a_trace_stays_bounded_and_keeps_its_span_and_mean(values, limit):
    trace = Trace(limit)
    for index, value in enumerate(values):
        trace.add(index, value)
    points = trace.points
    assert len(points) <= limit
    assert points[-1][0] == len(values) - 1
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    widths = np.diff([-1, *(x for x, _ in points)])
    assert float(np.dot(widths, [y for _, y in points])) == pytest.approx(sum(values), rel=1e-6, abs=1e-3)


def test_a_trace_leaves_out_what_is_no_number():
    trace = Trace()
    for value in (math.nan, math.inf, 3.0):
        trace.add(0, value)
    assert trace.points == [(0, 3.0)]
    assert Trace().points == []


@given(values=some.lists(some.floats(1e-6, 1e6), min_size=1, max_size=300), share=some.floats(0.01, 1))
def test_quantiles_are_right_to_one_percent(values, share):
    found = Quantiles()
    for value in values:
        found.add(value)
    assert len(found) == len(values)
    exact = sorted(values)[max(0, math.ceil(share * len(values) - 1e-6) - 1)]
    assert found.at(share) == pytest.approx(exact, rel=0.011)


def test_quantiles_of_nothing_are_zero():
    assert Quantiles().at(0.5) == 0.0


@pytest.mark.parametrize(
    ("classes", "truth", "share"),
    [
        (np.array(2), 2, 0.0),
        (np.array(2), 1, 1.0),
        (np.array(2), None, None),
        (np.array(2), -1, None),
        (np.array(2), 5, None),
        (np.array([[0, 1], [2, 3]]), np.array([[0, 1], [3, 255]]), 1 / 3),
        (np.array([[0, 1], [2, 3]]), np.array([0, 1]), None),
        (np.array([[0, 1], [2, 3]]), 1, None),
    ],
)
def test_wrong_counts_only_what_has_a_truth(classes, truth, share):
    assert wrong(classes, truth, 5) == (None if share is None else pytest.approx(share))


FACTS = {
    "bundle": "m.edgeadapt",
    "digest": "ab" * 32,
    "method": "toy",
    "source": "photos",
    "adapt": True,
    "steps": 5,
    "rejected_steps": 1,
    "hyper": {},
}


def test_the_report_of_a_stream_holds_its_numbers():
    tally = Tally("classification")
    for number in range(100):
        tally.frame(float(number < 25), 0.9, 0.1, 2.0)
    tally.bad_frame("is torn")
    tally.window(70 * 2**20)
    html = render(summary(tally, FACTS, 71 * 2**20, 128 * 2**20)[0])
    for text in ("25.0 %", "25.00 % of the frames", "101, 1 of them bad; the first: is torn", "71 MiB", "budget 128 MiB"):
        assert text in html
    for text in ("5, and 1 rejected", "p50 2"):
        assert text in html
    data = summary(tally, FACTS, 71 * 2**20, None)[1]
    assert (data["frames"], data["bad_frames"], data["error_percent"], data["budget_bytes"]) == (101, 1, 25.0, None)
    assert len(data["curves"]["confidence"]) == 100
    json.dumps(data, allow_nan=False)


def test_the_report_of_a_stream_without_labels_says_nothing_of_errors():
    tally = Tally("segmentation")
    tally.frame(None, 0.5, 1.0, 3.0)
    made, data = summary(tally, FACTS, 1, None)
    assert data["error_percent"] is None
    assert "<h2>Error" not in render(made)


def test_running_means():
    assert smooth([(1, 1.0), (2, 3.0), (3, 5.0)], 2) == [(1, 1.0), (2, 2.0), (3, 4.0)]
    assert smooth([]) == []


def test_bars_show_intervals_and_rows_of_many_colours():
    names = [f"method {index} of a long name" for index in range(10)]
    root = parsed(bars("error", [Group("batch 4", [40.0] * 10, [(30.0, 50.0), *[None] * 9])], names, "%"))
    whiskers = [element for element in root.iter(f"{SVG}line") if element.attrib["class"] == "whisker"]
    assert len(whiskers) == 3
    span = whiskers[0]
    (bar, *_) = [element for element in root.iter(f"{SVG}rect") if element.find(f"{SVG}title") is not None]
    begin, end = (float(span.attrib[name]) for name in ("x1", "x2"))
    tip = float(bar.attrib["x"]) + float(bar.attrib["width"])
    assert begin < tip < end
    assert end - tip == pytest.approx(tip - begin, abs=0.2)
    assert "batch 4, method 0 of a long name: 40.0 % (30.0 to 50.0)" in texts(root)
    legend = [element for element in root.iter(f"{SVG}text") if element.text in names]
    assert len({element.attrib["y"] for element in legend}) > 1
    assert max(float(element.attrib["x"]) for element in legend) < WIDTH
    assert min(float(element.attrib["y"]) for element in root.iter(f"{SVG}rect") if element.find(f"{SVG}title") is not None) > max(
        float(element.attrib["y"]) for element in legend
    )


def test_many_curves_have_a_legend_of_several_lines_above_the_chart():
    names = [f"method {index} of a long name" for index in range(9)]
    root = parsed(lines("error", [Curve(name, [(0, 1), (1, 2)], index) for index, name in enumerate(names)], "%"))
    legend = [float(element.attrib["y"]) for element in root.iter(f"{SVG}text") if element.text in names]
    assert len(set(legend)) == 3
    assert max(legend) < min(y for _, y in coordinates(root))
    classes = [element.attrib["class"] for element in root.iter(f"{SVG}polyline")]
    assert classes == [f"curve c{index % 8}" for index in range(9)]


def test_a_table_of_words_says_so():
    page = Page("t", "l", sections=[Section("s", table=Table(("", ""), [("a", "b c")], words=True))])
    assert '<table class="words">' in render(page)
