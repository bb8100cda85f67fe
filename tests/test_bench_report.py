"""What is told of a bench: figures of each row and stream, a table, and a page that needs nothing else."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from edgeadapt.bench import page, report, scores
from edgeadapt.bench.frames import Samples
from edgeadapt.bench.record import COLUMNS, Record
from edgeadapt.bench.report import Run, summarise, table, text
from edgeadapt.bench.streams import NAMES, Sizes, Stream, build
from edgeadapt.report.page import render

pytestmark = pytest.mark.device

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
DATA = Samples(IMAGES, np.arange(40) % 5)
SIZES = Sizes(frames=40, step=4, visit=20, bad=10, rounds=3, corruptions=("fog", "contrast"))
SVG = "{http://www.w3.org/2000/svg}"


def run(row: str, stream: Stream, share: float, batch: int = 4, seed: int = 0, **facts: object) -> Run:
    rng = np.random.default_rng(seed)
    count = len(stream)
    columns = {name: np.zeros(count, kind) for name, kind in COLUMNS.items()}
    columns |= {name: getattr(stream, name) for name in ("index", "domain", "severity", "round", "scored")}
    columns["wrong"] = (rng.random(count) < share).astype(np.float32)
    columns["confidence"] = rng.random(count).astype(np.float32)
    columns["milliseconds"] = np.arange(count, dtype=np.float32)
    told = {"seed": stream.seed, "domains": list(stream.domains), "frames": count, "nonfinite": 1, "peak_bytes": 50 * 2**20, "joules_frame": None}
    return Run(row, stream.name, batch, Record("k", {**told, "counters": {"steps": 2}, **facts}, columns))


def bench(names=NAMES, seeds=(0, 1), batches=(1, 4), **facts):
    streams = [build(name, DATA, SIZES, seed) for name in names for seed in seeds]
    shares = {"source": 0.6, "step 0": 0.5, "tent": 0.2}
    runs = [
        run(row, stream, share, batch, 7 * stream.seed + batch + len(row), **facts)
        for stream in streams
        for batch in batches
        for row, share in shares.items()
    ]
    found = {"bundles": ["<a&b>.edgeadapt"], "settings": {"seeds": "0, 1"}, "adapting": ["tent"], "draws": 50, **summarise(runs, "source", 50)}
    return runs, found


def test_a_cell_has_the_figures_of_all_its_seeds():
    runs, found = bench()
    assert found["rows"] == ["source", "step 0", "tent"]
    assert found["streams"] == list(NAMES)
    assert len(found["cells"]) == 3 * len(NAMES) * 2
    cell = next(cell for cell in found["cells"] if (cell["row"], cell["stream"], cell["batch"]) == ("tent", "continual", 4))
    mine = [one.record.outcome() for one in runs if (one.row, one.stream, one.batch) == ("tent", "continual", 4)]
    both = scores.together(mine)
    assert cell["seeds"] == [0, 1]
    assert (cell["frames"], cell["scored"], cell["nonfinite"], cell["counters"]) == (160, 160, 2, {"steps": 4})
    assert cell["error"]["value"] == pytest.approx(100 * both.wrong.mean())
    assert cell["error"]["low"] < cell["error"]["value"] < cell["error"]["high"]
    assert list(cell["domains"]) == ["fog", "contrast"]
    assert cell["ece"] == pytest.approx(scores.calibration(both))
    source = scores.together([one.record.outcome() for one in runs if (one.row, one.stream, one.batch) == ("source", "continual", 4)])
    assert cell["difference"]["value"] == pytest.approx(100 * (both.wrong.mean() - source.wrong.mean()))
    assert cell["difference"]["high"] < 0


def test_a_guarded_row_is_held_against_not_adapting_and_against_the_row_without() -> None:
    stream = build("continual", DATA, SIZES, 0)
    shares = {"source": 0.7, "step 0": 0.5, "tent": 0.1, "tent, guarded": 0.2}
    runs = [run(row, stream, share, 4, 3 + len(row)) for row, share in shares.items()]
    found = summarise(runs, "source", 50)
    without, adapting, guarded = (runs[number].record.outcome() for number in (1, 2, 3))
    cell = found["cells"][3]
    assert all("worse" not in other for other in found["cells"][:3])
    assert cell["worse"]["value"] == pytest.approx(100 * (guarded.wrong.mean() - without.wrong.mean()))
    gain = without.wrong.mean() - adapting.wrong.mean()
    assert cell["kept"]["value"] == pytest.approx((without.wrong.mean() - guarded.wrong.mean()) / gain)
    header, rows = report.guarded(found, 4) or ([], [])
    assert header == ["", "continual"]
    assert rows[0] == ["tent, guarded: points worse", text(cell["worse"], sign=True)]
    assert rows[1][1].startswith(f"{100 * cell['kept']['value']:.0f}")
    told = {"bundles": ["x"], "settings": {}, "adapting": ["tent"], "draws": 50, **found}
    assert "With a guard, batch 4" in render(page.page_of(told))
    assert report.guarded(bench(["clean"])[1], 4) is None


@pytest.mark.parametrize("name", ["forgetting", "single", "repeated", "noise"])
def test_where_clean_frames_come_last_the_error_is_theirs(name):
    runs, found = bench([name], seeds=[0], batches=[4])
    cell = found["cells"][2]
    outcome = runs[2].record.outcome().of("clean after shift")
    assert cell["scored"] == len(outcome) == 40
    assert cell["error"]["value"] == pytest.approx(100 * outcome.wrong.mean())
    assert (cell["forgetting"] is not None) == (name == "forgetting")


def test_rounds_are_told_where_there_are_such():
    _, found = bench(["recurring", "clean"], seeds=[0], batches=[4])
    first, last = found["cells"][0], found["cells"][-1]
    assert len(first["rounds"]) == 3
    assert first["slope"]["low"] <= first["slope"]["value"] <= first["slope"]["high"]
    assert (last["rounds"], last["slope"]) == ([], None)


def test_segments_cover_a_stream_and_hold_its_errors():
    runs, found = bench(["gradual"], seeds=[0], batches=[4])
    parts = found["segments"][0]["parts"]
    assert [part["severity"] for part in parts] == [1, 2, 3, 4, 5, 4, 3, 2, 1] * 2
    assert [part["begin"] for part in parts[1:]] == [part["end"] for part in parts[:-1]]
    weighted = sum((part["end"] - part["begin"]) * part["errors"]["tent"] for part in parts) / parts[-1]["end"]
    assert weighted == pytest.approx(100 * runs[2].record.columns["wrong"].mean())
    assert bench(["mixed"])[1]["segments"] == []
    noise = bench(["noise"], seeds=[0], batches=[4])[1]["segments"][0]["parts"]
    assert [bool(part["errors"]) for part in noise] == [False, True, True]


def test_costs_are_of_all_runs_of_a_row():
    runs, found = bench(["clean", "noise"], joules_frame=0.5)
    cost = next(cost for cost in found["costs"] if (cost["row"], cost["batch"]) == ("tent", 4))
    times = np.concatenate([one.record.columns["milliseconds"] for one in runs if (one.row, one.batch) == ("tent", 4)])
    assert (cost["ms_p50"], cost["ms_p95"]) == pytest.approx(np.quantile(times, [0.5, 0.95]))
    assert cost["joules_frame"] == pytest.approx(0.5)
    assert cost["peak_bytes"] == 50 * 2**20


def test_the_table_has_a_row_a_row_and_a_column_a_stream():
    _, found = bench()
    header, rows = table(found, 4)
    assert header == ["", *NAMES, "forgets", "a round", "ECE", "memory", "ms p50", "p95"]
    assert [row[0] for row in rows] == ["source", "step 0", "tent"]
    assert {len(row) for row in rows} == {len(header)}
    cell = next(cell for cell in found["cells"] if (cell["row"], cell["stream"], cell["batch"]) == ("tent", "mixed", 4))
    assert rows[2][header.index("mixed")] == text(cell["error"])
    assert rows[0][header.index("memory")] == "50 MiB"
    assert table(bench(["clean"], joules_frame=0.125)[1], 1)[1][0][-1] == "0.125"
    assert table(bench(["clean"])[1], 1)[0] == ["", "clean", "ECE", "memory", "ms p50", "p95"]


def test_intervals_in_words():
    assert text({"value": 28.14, "low": 27.5, "high": 28.7}) == "28.1 ±0.6"
    assert text({"value": 2.0, "low": 1.5, "high": 2.5}, 2, sign=True) == "+2.00 ±0.50"
    assert text({"value": -2.0, "low": None, "high": None}, sign=True) == "-2.0"
    assert text(None) == "–"


def test_the_page_is_well_formed_and_shows_every_stream(tmp_path):
    _, found = bench()
    html = render(page.page_of(found))
    root = ElementTree.fromstring(html.split("\n", 1)[1])
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag in ("h1", "h2", "p", "td", "th")]
    assert "Bench of <a&b>.edgeadapt" in texts
    assert {f"Stream {name}" for name in NAMES} <= set(texts)
    assert {"recurring, round by round, batch 1", "mixed, by domain, batch 4", "Difference to source", "Settings"} <= set(texts)
    assert any(line.startswith("tent changes the error on the stream continual at batch 4 from ") for line in texts)
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in html
    assert "<script" not in html
    whiskers = [line for line in root.iter(f"{SVG}line") if line.attrib.get("class") == "whisker"]
    assert len(whiskers) >= 3 * 3 * len(NAMES)
    path = report.write(tmp_path, page.page_of(found), found)
    assert path.read_text(encoding="utf-8") == html
    assert json.loads((tmp_path / "bench.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found))


def test_a_page_of_one_row_and_nothing_scored_is_still_a_page():
    stream = build("clean", DATA, SIZES)
    one = run("source", stream, 0.5)
    one.record.columns["wrong"][:] = np.nan  # type: ignore[index]
    found = {"bundles": ["a"], "settings": {}, "adapting": [], "draws": 50, **summarise([one], "source", 50)}
    assert found["cells"][0]["error"] is None
    assert "1 row over 1 stream." in render(page.page_of(found))
    assert table(found, 4)[1][0][1:3] == ["–", "–"]
