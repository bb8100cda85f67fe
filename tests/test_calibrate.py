"""`edgeadapt calibrate`: the whole way with tiny work, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeadapt.cli import calibrate, main
from edgeadapt.devices import boards
from edgeadapt.devices.boards import calibration, floor, probe
from edgeadapt.errors import EdgeAdaptError

pytestmark = pytest.mark.device

TINY = calibrate.Work(batch=1, channels=4, image=8, matrix=16, copy=1 << 16)
LOADED = floor.Floor("3.11.2", "2.4.6", "1.31.1", floor=50_000_000)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command on tiny work, with a cache folder of its own and without the children that measure the floor."""
    measure = calibrate.measure
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("EDGEADAPT_CACHE", raising=False)
    monkeypatch.setattr(calibrate, "measure", lambda seconds: measure(0.01, TINY))
    monkeypatch.setattr(floor, "look", lambda: LOADED)
    return tmp_path


@pytest.mark.native
def test_this_machine_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("EDGEADAPT_CACHE", raising=False)
    board, made = calibrate.measure(0.5, TINY)
    assert 20_000_000 < board.floor < 200_000_000
    assert (board.floor_known, board.rates_known) == ("measured", "measured")
    assert min(board.gflops, board.gbps, made.gflops_all, made.matmul, made.matmul_all) > 0
    assert made.machine == probe.look().fingerprint
    assert made.threads == probe.look().cores


def test_the_result_is_kept_and_used_here(tiny, capsys):
    assert main.main(["calibrate", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    path = calibration.place(probe.look())
    assert Path(told["path"]) == path
    assert path.is_relative_to(tiny)
    here = boards.here()
    assert (here.floor, here.floor_known, here.gflops, here.gbps) == (50_000_000, "measured", told["board"]["gflops"], told["board"]["gbps"])
    assert boards.read(path).calibration == boards.Calibration(**told["calibration"])
    assert main.main(["calibrate"]) == 0
    text = capsys.readouterr().out
    assert "floor        50.0 MB: median of " in text
    assert str(path) in text


def test_the_profile_goes_where_it_is_asked_to(tiny, capsys):
    output = tiny / "deep" / "board.toml"
    assert main.main(["calibrate", "--output", str(output)]) == 0
    assert boards.load(output).floor == 50_000_000
    assert not calibration.place(probe.look()).exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--seconds", "0.5"], "expected 1 to 60"), (["--seconds", "nan"], "expected 1 to 60"), (["-o", "board"], "is a .toml file")],
)
def test_wrong_options(tiny, options, told, capsys):
    assert main.main(["calibrate", *options]) == 2
    assert told in capsys.readouterr().err
    assert list(tiny.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_measuring(tiny, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "measure", lambda seconds: pytest.fail("it measured"))
    (tiny / "file").write_text("x")
    assert main.main(["calibrate", "--output", str(tiny / "file" / "board.toml")]) == EdgeAdaptError.exit_code
    told = capsys.readouterr().err
    assert "the calibration cannot be written to" in told
    assert "fix: make room, or name a folder that can be written" in told


def test_without_onnxruntime_it_says_so(tiny, monkeypatch, capsys):
    monkeypatch.setattr(floor, "look", lambda: floor.Floor(error="ImportError: none"))
    assert main.main(["calibrate"]) == 1
    assert "onnxruntime does not work here: ImportError: none" in capsys.readouterr().err
    assert list((tiny / "edgeadapt" / "boards").iterdir()) == []


def test_slower_on_all_cores_is_told():
    made = boards.Calibration("f" * 16, "2026-01-01", "0.1.0", "3.11", "2.4", "1.31", threads=4, gflops_all=5.0, matmul=1.0, matmul_all=1.0)
    text = calibrate.summary(boards.load("pi4"), made, Path("x.toml"))
    assert "all cores were slower than one" in text
