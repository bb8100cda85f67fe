"""The demo: its images and bundle, its plan, that adaptation wins on it, and how it looks with and without a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from edgeadapt import Adapter
from edgeadapt.bundle import Bundle
from edgeadapt.cli.main import main
from edgeadapt.demo import digits, report, view
from edgeadapt.demo.loop import CLEAN, STAGES, Step, Tally, plan, severity, steps, warm
from edgeadapt.errors import UsageError
from edgeadapt.memory import read
from edgeadapt.memory.figures import figures
from edgeadapt.report import render
from edgeadapt.terminal import Screen, Style, beside, is_live, style_of

pytestmark = pytest.mark.device

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STYLES = [Style(), Style(blocks=False), Style(colour=True), Style(colour=True, deep=True)]


def test_images_are_what_they_are_said_to_be():
    (x, y), (test_x, test_y) = digits.training(), digits.testing()
    assert (x.shape, test_x.shape) == ((1200, 32, 32, 3), (597, 32, 32, 3))
    assert (x.dtype, y.dtype) == (np.uint8, np.int64)
    assert set(y) == set(test_y) == set(range(10))
    assert {image.tobytes() for image in x}.isdisjoint({image.tobytes() for image in test_x})
    assert x.min() >= 30
    assert x.max() == 225


def test_enlarging_keeps_corners_and_runs_straight_between_centres():
    raw = np.zeros((1, 8, 8), np.uint8)
    raw[0, :, 4:] = 16
    row = digits._frames(raw)[0, 0, :, 0].tolist()
    assert row[0] == 225
    assert row[-1] == 35
    assert row == sorted(row, reverse=True)
    assert row[13:19] == [225, 201, 154, 106, 59, 35]


def test_the_shipped_bundle_is_small_and_whole():
    bundle = Bundle.open(digits.BUNDLE)
    assert bundle.path.stat().st_size < 2**20
    assert bundle.manifest.input.shape == (3, digits.SIDE, digits.SIDE)
    assert bundle.manifest.task.names == tuple("0123456789")
    assert "Alpaydin" in (digits.FOLDER / "digits.txt").read_text(encoding="utf-8")


def test_the_shipped_bundle_states_what_plans_need():
    bundle = Bundle.open(digits.BUNDLE)
    for name, spec in bundle.manifest.graphs.items():
        assert spec.figures == figures(read(bundle.graph_bytes(name))), name


def test_the_plan_shares_frames_evenly_and_shows_every_image_before_any_again():
    windows = plan(2_600, 16, 597)
    each = 2_600 // 16 // len(STAGES)
    assert len(windows) == each * len(STAGES)
    assert [window.name for window in windows[::each]] == list(STAGES)
    first = np.concatenate([window.index for window in windows])[:597]
    assert sorted(first) == list(range(597))
    assert all((window.severity == 0) == (window.name == CLEAN) for window in windows)
    with pytest.raises(UsageError, match="--frames 128"):
        plan(127, 16, 597)


@pytest.mark.parametrize("count", [1, 3, 9, 40, 200])
def test_a_stage_swells_and_fades(count):
    levels = [severity(number, count) for number in range(count)]
    assert levels == levels[::-1]
    assert max(levels) == 5
    assert set(levels) <= set(range(1, 6))
    half = levels[: (count + 1) // 2]
    assert half == sorted(half)
    if count >= 9:
        assert set(levels) == set(range(1, 6))


@pytest.fixture(scope="module")
def ran() -> tuple[Tally, Step, dict[str, object]]:
    images, labels = digits.testing()
    with Adapter.open(digits.BUNDLE) as adapter:
        begun = adapter.state
        warm(adapter, images, 16)
        assert all(np.array_equal(begun[name], value) for name, value in adapter.state.items())
        windows = plan(2_560, 16, len(images))
        tally = Tally(128 * 2**20, 2_560)
        for step in steps(adapter, windows, images, labels):
            tally.add(step)
        stats = adapter.stats
    facts = {"bundle": "digits.edgeadapt", "digest": "ab" * 32, "model": "m", "parameters": 44230, "method": "ecotta", "batch": 16}
    return tally, step, {**facts, "steps": stats["steps"] - 1, "rejected_steps": stats["rejected_steps"], "peak_bytes": 2**26}


def test_adaptation_wins_and_does_no_harm_to_clean_pictures(ran):
    tally, _, facts = ran
    without, adapting = tally.all.errors()
    assert without > 25
    assert adapting < 12
    for name, count in zip(STAGES, tally.stages):
        assert count.frames == 320
        if name == CLEAN:
            assert count.errors()[1] < 5
        else:
            assert count.errors()[1] < 0.6 * count.errors()[0]
    assert facts["steps"] == 160
    assert facts["rejected_steps"] == 0


def test_the_report_holds_the_numbers(ran):
    tally, _, facts = ran
    page, data = report.page(tally, facts)
    html = render(page)
    ElementTree.fromstring(html.split("\n", 1)[1])
    without, adapting = tally.all.errors()
    for text in (f"{without:.1f} %", f"{adapting:.1f} %", "gaussian noise", "budget 128 MiB", "Alpaydin", "2,560", "160 steps"):
        assert text in html
    assert html.count("<svg") == 4
    assert data["error_percent"] == {"without": round(without, 4), "adapting": round(adapting, 4)}
    assert sum(stage["frames"] for stage in data["stages"]) == data["frames"] == 2_560
    json.dumps(data, allow_nan=False)


@pytest.mark.parametrize("style", STYLES)
def test_the_view_fits_its_place(style, ran):
    tally, step, _ = ran
    lines = view.live(step, tally, style, "edgeadapt demo")
    assert len(lines) <= view.ROWS
    assert max(len(ANSI.sub("", line)) for line in lines) <= view.COLUMNS
    text = ANSI.sub("", "\n".join(lines))
    without, adapting = tally.all.errors()
    assert f"{without:5.1f} %" in text
    assert f"{adapting:5.1f} %" in text
    assert "2,560 of 2,560" in text
    assert "of 128 MiB" in text
    assert style.colour == ("\x1b" in "".join(lines))
    if not style.blocks:
        text.encode("ascii")


@pytest.mark.parametrize("style", STYLES)
def test_the_table_has_a_row_a_stage_and_the_sum(style, ran):
    tally, _, _ = ran
    rows = [ANSI.sub("", line) for line in view.table(tally, style)]
    assert [row.rsplit(None, 5)[0] for row in rows[1:10]] == [*(name.replace("_", " ") for name in STAGES), "all"]
    assert f"{tally.all.errors()[1]:.1f} %" in rows[9]


@pytest.mark.parametrize("style", STYLES)
def test_bars_and_sparklines_have_their_width(style):
    for share in (-1.0, 0.0, 0.001, 0.5, 0.999, 1.0, 7.0):
        assert len(ANSI.sub("", style.bar(share, 20, "with"))) == 20
    assert len(ANSI.sub("", style.spark([0.1] * 50, 30, "with"))) == 30
    assert ANSI.sub("", style.spark([0.0, 1.0], 4, "with")) == ("▁█  " if style.blocks else "_#  ")
    assert style.dots(2, 3) == ("●●○" if style.blocks else "**.")


@pytest.mark.parametrize("style", STYLES)
def test_pictures_have_their_size_and_go_from_dark_to_light(style):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = 255
    lines = style.picture(image, 24)
    assert [len(ANSI.sub("", line)) for line in lines] == [24] * 12
    if style.colour:
        assert lines[0].startswith("\x1b[38;2;0;0;0;48;2;0;0;0m▀" if style.deep else "\x1b[38;5;232;48;5;232m▀")
        assert ("255;255;255" if style.deep else "5;255") in lines[0]
    else:
        assert lines[0] == " " * 12 + ("█" if style.blocks else "@") * 12


def test_columns_side_by_side():
    assert beside(["aa"], 2, ["x", "y"]) == ["aa  x", "    y"]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_the_screen_is_drawn_in_place_and_gives_the_cursor_back():
    out = Terminal()
    with Screen(out, seconds=1000) as screen:
        assert screen.due()
        screen.draw(["one", "two"])
        assert not screen.due()
        screen.draw(["three"])
    assert out.getvalue() == "\x1b[?25lone\x1b[K\ntwo\x1b[K\n\x1b[2F\x1b[0Jthree\x1b[K\n\x1b[?25h"
    quiet = Terminal()
    Screen(quiet).close()
    assert quiet.getvalue() == ""


def test_what_a_terminal_can_show_is_found_out(monkeypatch):
    good = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    assert style_of(Terminal(), environment=good) == Style(True, True, True)
    assert style_of(Terminal(), colour=False, environment=good).colour is False
    assert style_of(Terminal(), environment={**good, "NO_COLOR": "1"}).colour is False
    assert style_of(Terminal(), environment={"TERM": "dumb"}).colour is False
    assert style_of(io.StringIO(), environment=good) == Style(False, False, True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    assert is_live(Terminal(), 78, 16, good)
    assert not is_live(Terminal(), 100, 16, good)
    assert not is_live(Terminal(), 78, 30, good)
    assert not is_live(Terminal(), 78, 16, {"TERM": "dumb"})
    assert not is_live(io.StringIO(), 78, 16, good)


@pytest.mark.smoke
def test_the_command_without_a_terminal(tmp_path, capsys):
    assert main(["demo", "--frames", "512", "--budget", "8GiB", "--report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert re.search(r"^all +512 +\d+\.\d % +\d+\.\d %$", out, re.MULTILINE)
    assert len(re.findall(r"^\d/8 ", out, re.MULTILINE)) == len(STAGES)
    assert f"report    {tmp_path / 'report.html'}" in out
    data = json.loads((tmp_path / "report.json").read_text())
    assert (data["frames"], data["steps"]) == (512, 32)


@pytest.mark.parametrize(("arguments", "code"), [(["--frames", "16", "--budget", "8GiB"], 2), (["--budget", "1MiB"], 5)])
def test_what_goes_wrong_has_its_exit_code(arguments, code, capsys):
    assert main(["demo", *arguments]) == code
    assert "edgeadapt: error: " in capsys.readouterr().err


@pytest.mark.native  # the emulator counts against the budget
@pytest.mark.parametrize("plain", [False, True])
def test_the_command_in_a_terminal(plain, tmp_path):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", "PYTHONUTF8": "1", "NO_COLOR": ""}
    command = [sys.executable, "-m", "edgeadapt", "demo", "--frames", "256", "--report", str(tmp_path), *(["--batch", "--no-color"] if plain else [])]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    out = b""
    try:
        while chunk := os.read(ours, 65536):
            out += chunk
    except OSError:  # how Linux tells that the other side has closed
        pass
    os.close(ours)
    assert process.wait(60) == 0, out.decode()
    assert (b"\x1b[?25l" in out) == (not plain)
    assert (b"\x1b[?25h" in out) == (not plain)
    assert (b"\x1b" in out) == (not plain)
    assert b"report.html" in out
    assert Path(tmp_path, "report.html").is_file()
