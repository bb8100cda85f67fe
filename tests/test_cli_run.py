"""`edgeadapt run`: what it prints for each stream, that it adapts as the adapter does, and how it ends when something goes wrong."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeadapt import Adapter
from edgeadapt.bundle import Bundle
from edgeadapt.cli.main import main
from edgeadapt.devices.sources import Frame
from edgeadapt.errors import SourceError, UsageError
from edgeadapt.runtime.prepared import find
from edgeadapt.runtime.pressure import Marks, Sign, Signs
from edgeadapt.runtime.stream import Stream, decide
from tests import child
from tests.toybundle import CLASSES, SIDE, Toy

pytestmark = pytest.mark.device

COUNT = 10


def frames(count: int = COUNT, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, SIDE, SIDE)).astype(np.float32)


LABELS = np.random.default_rng(1).integers(0, CLASSES, COUNT)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(batches=(1, 2, 4))


@pytest.fixture
def path(toy, tmp_path) -> Path:
    return toy.write(tmp_path / "toy.edgeadapt")


@pytest.fixture
def stream(tmp_path) -> Path:
    np.savez(tmp_path / "frames.npz", x=frames(), y=LABELS)
    return tmp_path / "frames.npz"


@pytest.fixture
def run(capsys):
    """Runs the command; gives its exit code, its lines parsed, and what it said besides."""

    def call(*arguments: object, stdin: bytes | None = None, monkeypatch: Any = None) -> tuple[int, list[dict[str, Any]], str]:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        code = main(["run", *map(str, arguments)])
        told = capsys.readouterr()
        return code, [json.loads(line) for line in told.out.splitlines()], told.err

    return call


def test_predictions_are_those_of_the_adapter_window_by_window(path, stream, run):
    code, lines, said = run(path, "--source", stream)
    assert code == 0
    with Adapter.open(path) as adapter:
        x = frames()
        logits = np.concatenate([adapter.adapt(x[:4]), adapter.adapt(x[4:8]), adapter.predict(x[8:])])
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probability = shifted / shifted.sum(1, keepdims=True)
    assert [line["index"] for line in lines] == [line["id"] for line in lines] == list(range(COUNT))
    assert [line["label"] for line in lines] == logits.argmax(1).tolist()
    assert [line["name"] for line in lines] == [f"class {label}" for label in logits.argmax(1)]
    assert [line["confidence"] for line in lines] == pytest.approx(probability.max(1), abs=1e-4)
    assert [line["entropy"] for line in lines] == pytest.approx(-(probability * np.log(probability)).sum(1), abs=1e-3)
    assert [line["adapted"] for line in lines] == [True] * 8 + [False] * 2
    assert [line["truth"] for line in lines] == LABELS.tolist()
    assert all(line["ms"] > 0 for line in lines)
    assert f"error      {100 * (logits.argmax(1) != LABELS).mean():.2f} % of the frames" in said
    assert "steps      2\n" in said
    assert "frames     10\n" in said


def test_without_adapting_nothing_moves(path, stream, run):
    _, lines, said = run(path, "--source", stream, "--no-adapt", "--save")
    with Adapter.open(path) as adapter:
        assert [line["label"] for line in lines] == adapter.predict(frames(), update_statistics=False).argmax(1).tolist()
        begun = adapter.state
        adapter.load()
        assert all(np.array_equal(begun[name], value) for name, value in adapter.state.items())
    assert not any(line["adapted"] for line in lines)
    assert "steps      0\n" in said


@pytest.mark.parametrize(("method", "adapted"), [("norm", True), ("source", False)])
def test_methods_without_steps(method, adapted, tmp_path, stream, run):
    path = Toy(method=method, batches=(1, 4)).write(tmp_path / "other.edgeadapt")
    code, lines, _ = run(path, "--source", stream)
    assert code == 0
    assert [line["adapted"] for line in lines] == [adapted] * 8 + [False] * 2


def test_a_stopped_and_resumed_stream_goes_on_as_if_it_had_not_stopped(path, tmp_path, run):
    np.savez(tmp_path / "first.npz", x=frames()[:4])
    np.savez(tmp_path / "then.npz", x=frames()[4:])
    np.savez(tmp_path / "whole.npz", x=frames())
    whole = run(path, "--source", tmp_path / "whole.npz", "--save", tmp_path / "whole.state")[1]
    first = run(path, "--source", tmp_path / "first.npz", "--save")[1]
    code, then, said = run(path, "--source", tmp_path / "then.npz", "--resume", "--save", tmp_path / "then.state")
    assert code == 0
    assert "steps      1\n" in said
    assert f"saved to {tmp_path / 'then.state'}" in said
    kept = ("label", "confidence", "entropy", "adapted")
    assert [[line[key] for key in kept] for line in [*first, *then]] == [[line[key] for key in kept] for line in whole]
    with Adapter.open(path) as one, Adapter.open(path) as other:
        one.load(tmp_path / "whole.state")
        other.load(tmp_path / "then.state")
        assert all(np.array_equal(one.state[name], value) for name, value in other.state.items())
    again = run(path, "--source", tmp_path / "first.npz", "--state", tmp_path / "then.state")[1]
    assert [line["confidence"] for line in again] != [line["confidence"] for line in first]


def test_scalars_are_set_after_the_state_is_loaded(path, stream, run, tmp_path):
    run(path, "--source", stream, "--set", "rate=0.5", "--save", tmp_path / "a.state")
    run(path, "--source", stream, "--state", tmp_path / "a.state", "--set", "rate=0", "--set", "mix=0", "--save", tmp_path / "b.state")
    with Adapter.open(path) as one, Adapter.open(path) as other:
        one.load(tmp_path / "a.state")
        other.load(tmp_path / "b.state")
        assert (one.hyper["rate"], other.hyper["rate"]) == (0.5, 0.0)
        assert np.array_equal(one.state["norm.gamma"], other.state["norm.gamma"])
        assert np.array_equal(one.state["norm.mean"], other.state["norm.mean"])


def test_defaults_of_each_batch_hold_where_nothing_is_set(toy, tmp_path, stream, run):
    graphs = {name: replace(spec, defaults={"mix": 0.01 * spec.batch} if "mix" in spec.hyper else {}) for name, spec in toy.specs.items()}
    path = toy.write(tmp_path / "own.edgeadapt", graphs=graphs)
    run(path, "--source", stream, "--save", tmp_path / "plain.state", "--report", tmp_path / "report")
    run(path, "--source", stream, "--set", "rate=0.01", "--save", tmp_path / "set.state")
    with Adapter.open(path) as library, Adapter.open(path) as served:
        for part in (slice(0, 4), slice(4, 8)):
            library.adapt(frames()[part])
        library.predict(frames()[8:])
        served.load(tmp_path / "plain.state")
        assert served.hyper.chosen == {}
        assert all(np.array_equal(library.state[name], value) for name, value in served.state.items())
        served.load(tmp_path / "set.state")
        assert served.hyper.chosen == {"rate": 0.01}
    assert json.loads((tmp_path / "report" / "report.json").read_text())["hyper"]["mix"] == pytest.approx(0.04)


@pytest.mark.parametrize("words", ["--save {stream}/x", "--save {folder}", "--save {folder}/gone/x", "--report {stream}", "--report {stream}/a/b"])
def test_where_nothing_can_be_written_is_found_before_the_stream_begins(words, path, stream, tmp_path, run):
    code, lines, said = run(path, "--source", stream, *words.format(stream=stream, folder=tmp_path).split())
    assert code in (2, 7)
    assert lines == []
    assert "edgeadapt: error: the " in said
    assert "\n  fix: " in said


@pytest.mark.parametrize("option", ["--limit", "--top"])
@pytest.mark.parametrize("value", ["x", "0", "-3", "1.5"])
def test_counts_that_are_none(option, value, path, stream, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(path), "--source", str(stream), f"{option}={value}"])
    assert stopped.value.code == 2
    assert f"argument {option}: '{value}' is not a whole number above 0" in capsys.readouterr().err


def test_a_torn_picture_in_a_folder_does_not_stop_the_stream(path, tmp_path, run):
    folder = tmp_path / "photos"
    for index in range(6):
        (folder / "class 1").mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(index).integers(0, 256, (9 + index, 8, 3)).astype(np.uint8)
        Image.fromarray(image).save(folder / "class 1" / f"{index}.png")
    torn = folder / "class 1" / "2.png"
    torn.write_bytes(torn.read_bytes()[:60])
    code, lines, said = run(path, "--source", folder)
    assert code == 0
    assert [line["id"] for line in lines] == [f"class 1/{index}.png" for index in range(6)]
    assert [line["index"] for line in lines] == list(range(6))
    assert "cannot be read as an image" in lines[2]["error"]
    assert "label" not in lines[2]
    assert [line.get("adapted") for line in lines] == [True, True, None, True, True, False]
    assert all(line["truth"] == 1 for line in lines if "error" not in line)
    assert "frames     6, 1 of them bad" in said


def test_bad_frames_of_arrays_are_told_and_passed_over(path, run, monkeypatch):
    x = frames(4)
    x[1, 0, 0, 0] = np.nan
    pieces = [x[0], x[1], np.zeros((3, 2, 2), np.float32), x[2:]]
    data = io.BytesIO()
    for piece in pieces:
        np.save(data, piece)
    code, lines, _ = run(path, "--source", "-", "--stdin-format", "npy", "--batch", 2, stdin=data.getvalue(), monkeypatch=monkeypatch)
    assert code == 0
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[1]["error"] == "holds NaN or infinite values"
    assert "3x6x6" in lines[2]["error"]
    assert [line.get("adapted") for line in lines] == [True, None, None, True, False]


def test_paths_on_standard_input(path, tmp_path, run, monkeypatch):
    Image.fromarray(np.zeros((7, 7), np.uint8)).save(tmp_path / "a.png")
    text = f'{tmp_path}/a.png\n{{"path": "{tmp_path}/a.png", "label": "class 4"}}\ngone.png\n'
    code, lines, _ = run(path, "--source", "-", stdin=text.encode(), monkeypatch=monkeypatch)
    assert code == 0
    assert [line["id"] for line in lines] == [f"{tmp_path}/a.png"] * 2 + ["gone.png"]
    assert (lines[0].get("truth"), lines[1]["truth"]) == (None, 4)
    assert "error" in lines[2]


def test_segmentation_prints_shares_of_pixels(tmp_path, run):
    path = Toy(batches=(1, 4), task="segmentation").write(tmp_path / "seg.edgeadapt")
    y = np.random.default_rng(0).integers(0, CLASSES, (COUNT, SIDE, SIDE)).astype(np.uint8)
    y[0] = 255
    np.savez(tmp_path / "maps.npz", x=frames(), y=y)
    code, lines, said = run(path, "--source", tmp_path / "maps.npz", "--top", 2)
    assert code == 0
    assert all(1 <= len(line["shares"]) <= 2 and "label" not in line for line in lines)
    everything = run(path, "--source", tmp_path / "maps.npz")[1]
    assert [sum(line["shares"].values()) for line in everything] == pytest.approx([1.0] * COUNT, abs=1e-3)
    assert "error" not in everything[0]
    off = [line["error"] for line in everything[1:]]
    assert float(said.split("error ")[1].split()[0]) == pytest.approx(100 * np.mean(off), abs=0.02)
    assert "% of the pixels with a label (9 frames)" in said


def test_limit_and_top(path, stream, run):
    code, lines, _ = run(path, "--source", stream, "--limit", 3, "--top", 3)
    assert code == 0
    assert len(lines) == 3
    for line in lines:
        assert line["top"][0]["label"] == line["label"]
        assert [entry["confidence"] for entry in line["top"]] == sorted((entry["confidence"] for entry in line["top"]), reverse=True)
        assert len(line["top"]) == 3


def test_a_report_is_written(path, stream, run, tmp_path):
    code, lines, said = run(path, "--source", stream, "--report", tmp_path / "report", "--budget", "8GiB")
    assert code == 0
    assert f"report     {tmp_path / 'report' / 'report.html'}" in said
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    wrong = [line["label"] != line["truth"] for line in lines]
    assert data["error_percent"] == pytest.approx(100 * np.mean(wrong))
    assert (data["frames"], data["steps"], data["budget_bytes"], data["adapt"]) == (COUNT, 2, 8 * 2**30, True)
    assert "budget 8 GiB" in (tmp_path / "report" / "report.html").read_text()


def test_changes_of_the_memory_level_are_told_and_the_lines_go_on(path, stream, run, monkeypatch, caplog):
    grades = iter([0, 1, *[0] * 100])
    monkeypatch.setattr(Signs, "read", lambda self, more=0, relief=False: Sign(0, "") if relief else Sign(next(grades), "made up"))
    monkeypatch.setattr(Marks.__init__, "__defaults__", (None, 10.0, 0.0, 0.0, 1000.0))
    code, lines, said = run(path, "--source", stream, "--budget", "8GiB", "--reserve", "1MiB")
    assert code == 0
    assert [line["index"] for line in lines] == list(range(COUNT))
    assert not any(line["adapted"] for line in lines)
    assert "paused     2 steps were not taken because memory was short\n" in said
    assert re.search(r"\nlevel      after \d+\.\d s adaptation paused: made up\n", said)
    assert "memory: from normal to adaptation paused: made up" in caplog.text


def test_without_adapting_only_predictions_are_loaded(path, stream, run, monkeypatch):
    asked = []
    real = Adapter.open
    monkeypatch.setattr(Adapter, "open", lambda *given, **named: asked.append(real(*given, **named)) or asked[-1])
    run(path, "--source", stream, "--budget", "8GiB", "--no-adapt", "--batch", "2")
    run(path, "--source", stream, "--budget", "8GiB")
    assert asked[0].batches == {"predict": (2, 1), "adapt": (), "source": (), "learn": ()}
    assert asked[1].batches == {"predict": (4, 2, 1), "adapt": (4, 2), "source": (), "learn": ()}


def test_a_stream_needs_what_it_was_opened_for(path):
    with Adapter.open(path, roles="predict") as adapter, pytest.raises(UsageError, match="opened without adapt"):
        Stream(adapter)
    with Adapter.open(path, batches=[2]) as adapter:
        assert Stream(adapter).window == 2
        with pytest.raises(UsageError, match="opened without adapt at batch 4"):
            Stream(adapter, window=4)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--source", "{stream}", "--budget", "1MiB"], 5, "does not fit the budget"),
        (["--source", "{stream}", "--budget", "much"], 2, "not a size"),
        (["--source", "{stream}", "--set", "rate"], 2, "NAME=VALUE"),
        (["--source", "{stream}", "--set", "speed=1"], 2, "no scalar 'speed'"),
        (["--source", "{stream}", "--set", "mix=2"], 2, "out of range"),
        (["--source", "{stream}", "--batch", "3"], 2, "--batch 2 or 4"),
        (["--source", "{stream}", "--resume"], 7, ""),
        (["--source", "{stream}", "--state", "{folder}/gone"], 7, "gone"),
        (["--source", "{folder}/gone"], 6, "does not exist"),
        (["--source", "{folder}/empty"], 6, "gave no frames"),
        (["--source", "{folder}/torn"], 3, "none of the 1 frames could be used"),
        (["--source", "{stream}", "--report", "{stream}"], 2, "cannot be written"),
        (["--source", "{stream}", "--save", "{stream}/x"], 7, ""),
    ],
)
def test_what_goes_wrong_has_its_exit_code(arguments, code, message, path, stream, tmp_path, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.png").write_bytes(b"torn")
    found, _, said = run(path, *(text.format(stream=stream, folder=tmp_path) for text in arguments))
    assert found == code
    assert message in said
    assert "edgeadapt: error: " in said
    assert "Traceback" not in said


def test_a_source_that_breaks_off_is_told_after_its_frames_are_served(path, tmp_path, run):
    np.save(tmp_path / "frames.npy", frames())
    (tmp_path / "frames.npy").write_bytes((tmp_path / "frames.npy").read_bytes()[:-4])
    code, lines, said = run(path, "--source", tmp_path / "frames.npy", "--save", tmp_path / "kept.state")
    assert code == 6
    assert [line["index"] for line in lines] == list(range(9))
    assert "frames     9\n" in said
    assert "ended in row 9 of 10" in said
    assert (tmp_path / "kept.state").is_file()


def served(path: Path, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edgeadapt", "run", str(path), "--no-prepared", "--source", "-", "--stdin-format", "npy"]
    command += map(str, arguments)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, bufsize=0, preexec_fn=child.heed_interrupts, **pipes)  # noqa: PLW1509 - only sets a signal


def saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_an_interrupted_stream_answers_as_it_goes_and_keeps_its_state(path, tmp_path):
    with served(path, "--save", tmp_path / "kept.state") as process:
        process.stdin.write(saved(frames(5)))
        for index in range(4):  # a whole window is answered while the stream is open
            assert json.loads(process.stdout.readline())["index"] == index
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode().endswith("edgeadapt: interrupted\n")
    assert "frames     4\n" in said.decode()
    with Adapter.open(path) as adapter:
        adapter.load(tmp_path / "kept.state")
        assert adapter.stats["steps"] == 1


def test_a_reader_that_goes_away_ends_the_stream_quietly(path, tmp_path):
    read, write = os.pipe()
    os.close(read)
    np.savez(tmp_path / "frames.npz", x=frames())
    command = [sys.executable, "-m", "edgeadapt", "run", str(path), "--no-prepared", "--source", str(tmp_path / "frames.npz")]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert ended.returncode == 141
    assert "Traceback" not in ended.stderr
    assert "Broken" not in ended.stderr


def test_windows_keep_order_when_every_other_frame_is_bad(path):
    x = frames(40)
    given = [Frame(index, None if index % 2 else x[index], fault="torn" if index % 2 else "") for index in range(40)]
    with Adapter.open(path) as adapter:
        found = list(Stream(adapter).run(given))
        assert adapter.stats["steps"] == 5
    assert [prediction.index for window in found for prediction in window] == list(range(40))
    assert all((prediction.logits is None) == bool(prediction.index % 2) for window in found for prediction in window)


def test_endless_bad_frames_are_told_as_they_come(path):
    given = [Frame(0, frames(1)[0])] + [Frame(index, None, fault="torn") for index in range(1, 1000)]
    with Adapter.open(path) as adapter:
        sizes = [len(window) for window in Stream(adapter).run(given)]
    assert sum(sizes) == 1000
    assert max(sizes) < 300


def test_a_source_error_comes_after_what_was_waiting(path):
    def broken():
        yield Frame(0, frames(1)[0])
        raise SourceError("unplugged")

    with Adapter.open(path) as adapter:
        windows = Stream(adapter).run(broken())
        assert len(next(windows)) == 1
        with pytest.raises(SourceError, match="unplugged"):
            next(windows)


def test_a_window_that_no_graph_takes_is_refused(path):
    with Adapter.open(path) as adapter, pytest.raises(UsageError, match="adapt on 8 frames"):
        Stream(adapter, window=8)


def test_a_rejected_step_is_not_called_an_adaptation(path):
    with Adapter.open(path) as adapter:
        adapter.hyper["rate"] = 3e38
        adapter.hyper["momentum"] = 1.0
        x = frames(40)
        windows = list(Stream(adapter).run(Frame(index, row) for index, row in enumerate(x)))
        adapted = [all(prediction.adapted for prediction in window) for window in windows]
        assert adapted.count(True) == adapter.stats["steps"]
        assert adapted.count(False) == adapter.stats["rejected_steps"] > 0


def test_decisions_of_one_class_and_of_sure_logits():
    assert decide(np.zeros(1, np.float32)).confidence == 1.0
    sure = decide(np.array([-1e30, 1e30], np.float32))
    assert (sure.label, sure.confidence, sure.entropy) == (1, 1.0, 0.0)


def test_the_graphs_that_are_used_are_prepared_before_the_first_frame_and_once(path, stream, tmp_path, run, monkeypatch):
    monkeypatch.setenv("EDGEADAPT_CACHE", str(tmp_path / "cache"))

    def looked_at() -> set[str]:
        found = find(Bundle.open(path))
        return set(found.record["graphs"])

    code, lines, said = run(path, "--source", stream, "--batch", "2", "--budget", "2GiB", "--prepared")
    assert code == 0
    assert len(lines) == COUNT
    assert "preparing" in said
    assert looked_at() == {"predict.b1", "predict.b2", "adapt.b2"}
    assert "preparing" not in run(path, "--source", stream, "--batch", "2", "--budget", "2GiB", "--prepared")[2]
    assert "preparing" in run(path, "--source", stream, "--no-adapt", "--prepared")[2]  # without a budget all batches are served
    assert looked_at() == {"predict.b1", "predict.b2", "predict.b4", "adapt.b2"}
