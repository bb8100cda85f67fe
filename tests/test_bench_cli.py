"""`edgeadapt bench`: its rows and streams, what it leaves on disk, and that it goes on where it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeadapt import Adapter
from edgeadapt.bench import child
from edgeadapt.bench.runner import Answer
from edgeadapt.bench.streams import NAMES
from edgeadapt.bundle import Bundle
from edgeadapt.bundle.reference import Reference
from edgeadapt.cli import bench as cli
from edgeadapt.cli.bench_rows import rows
from edgeadapt.cli.main import main
from edgeadapt.devices.sources import Frame
from edgeadapt.runtime.benched import windows
from tests.child import ROOT, environment
from tests.smalltoy import FEATURES, small_bundle
from tests.toybundle import CLASSES, SIDE, Toy

pytestmark = pytest.mark.device

COUNT = 24
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, CLASSES, COUNT)
QUICK = ("--no-prepared", "--corruptions", "contrast,fog", "--frames", "8")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    Toy(batches=(1, 4)).write(folder / "toy.edgeadapt")
    Toy(batches=(1, 2, 4), method="norm").write(folder / "norm.edgeadapt")
    np.savez(folder / "test.npz", x=IMAGES, y=LABELS)
    return folder


@pytest.fixture
def bench(toys, tmp_path, capsys):
    """Runs the command into a folder; gives its exit code, bench.json or None, what it printed and what it said."""

    def call(*arguments: object, output: str = "out", quick: bool = True) -> tuple[int, Any, str, str]:
        code = main(["bench", *map(str, arguments), *(QUICK if quick else ()), "--output", str(tmp_path / output)])
        told, path = capsys.readouterr(), tmp_path / output / "bench.json"
        return code, json.loads(path.read_text(encoding="utf-8")) if path.exists() else None, told.out, told.err

    return call


class Here(child.Child):
    """Serves in this process, which is quicker to start."""

    def serve(self, frames: Iterator[np.ndarray]) -> Iterator[Answer]:
        with Adapter.open(self._setting.path, prepared=False) as adapter:
            if not self._setting.prepare:
                for window in windows(adapter, self._setting, (Frame(k, x) for k, x in enumerate(frames))):
                    yield from (Answer(one.logits, one.milliseconds, one.adapted) for one in window)
            self._facts = {"peak_bytes": 50 * 2**20, "counters": adapter.stats}


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(child, "Child", Here)


def values(found: Any) -> list[Any]:
    """What two benches that saw the same must agree in: all but time, memory and energy."""
    return [{name: value for name, value in cell.items() if name != "peak_bytes"} for cell in found["cells"]]


def test_rows_streams_and_figures(bench, toys, tmp_path):
    code, found, printed, said = bench(toys / "toy.edgeadapt", "--data", toys / "test.npz", "--streams", "continual,noise", "--seeds", 2)
    assert code == 0
    assert found["rows"] == ["source", "step 0", "toy"]
    assert found["streams"] == ["continual", "noise"]
    assert [cell["seeds"] for cell in found["cells"]] == [[0, 1]] * 6
    assert [cell["frames"] for cell in found["cells"]] == [32] * 3 + [20] * 3
    assert found["cells"][0]["difference"] is None
    assert found["cells"][2]["counters"]["steps"] == 8
    assert all(cost["peak_bytes"] > 10**7 and cost["ms_p50"] > 0 for cost in found["costs"])
    assert found["digests"] == {"toy.edgeadapt": Bundle.open(toys / "toy.edgeadapt").digest}
    assert found["settings"]["seeds"] == "0, 1"
    assert "onnxruntime" in found["settings"]["versions"]
    assert "corruptions  contrast, fog" in printed
    assert "batch 4: error in percent" in printed
    assert printed.count("\n  toy ") == 1
    assert "toy on noise, batch 4, seed 1 (12/12): error" in said
    assert len(list((tmp_path / "out" / "runs").glob("*.json"))) == 12
    assert (tmp_path / "out" / "bench.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_what_is_there_is_not_run_again_and_what_is_damaged_is(here, bench, toys, tmp_path):
    asked = (toys / "toy.edgeadapt", "--data", toys / "test.npz", "--streams", "continual,clean")
    _, first, _, said = bench(*asked)
    assert said.count(": error") == 6
    _, again, _, said = bench(*asked)
    assert again == first
    assert said == ""
    files = sorted((tmp_path / "out" / "runs").glob("*"))
    files[0].write_bytes(files[0].read_bytes()[:-9])
    files[3].write_bytes(b"")
    files[4].unlink()
    _, mended, _, said = bench(*asked)
    assert said.count(": error") == 3
    assert values(mended) == values(first)
    _, fresh, _, said = bench(*asked, "--fresh")
    assert said.count(": error") == 6
    assert values(fresh) == values(first)
    _, other, _, said = bench(*asked, "--severity", 4)
    assert said.count(": error") == 3  # clean frames have no severity
    assert values(other)[3:] == values(first)[3:]


def test_a_killed_bench_goes_on_and_ends_as_if_it_had_not_been(here, bench, toys, tmp_path):
    asked = [str(toys / "toy.edgeadapt"), "--data", str(toys / "test.npz"), "--streams", "recurring,forgetting", *QUICK]
    command = [sys.executable, "-m", "edgeadapt", "bench", *asked, "--output", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    runs, end = tmp_path / "killed" / "runs", time.monotonic() + 120
    while len(list(runs.glob("*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.read_bytes() for path in runs.iterdir() if not path.name.endswith(".tmp")}
    done = [name for name in kept if name.endswith(".json")]
    assert 2 <= len(done) < 6
    code, found, _, said = bench(*asked, output="killed", quick=False)
    assert code == 0
    assert said.count(": error") == 6 - len(done)
    assert all((runs / name).read_bytes() == data for name, data in kept.items() if name.replace(".npz", ".json") in kept)
    _, whole, _, _ = bench(*asked, output="whole", quick=False)
    assert values(found) == values(whole)
    assert len(list(runs.glob("*.npz"))) == 6
    for path in runs.glob("*.npz"):
        with np.load(path) as one, np.load(tmp_path / "whole" / "runs" / path.name) as other:
            assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in one.files if name != "milliseconds")


def test_several_bundles_are_rows_of_their_methods(here, bench, toys):
    code, found, _, _ = bench(toys / "toy.edgeadapt", toys / "norm.edgeadapt", "--data", toys / "test.npz", "--streams", "mixed")
    assert code == 0
    assert found["rows"] == ["source", "toy, step 0", "norm, step 0", "toy", "norm"]
    assert found["adapting"] == ["toy", "norm"]


def test_rows_that_answer_each_frame_at_once(here, bench, toys):
    """Beside those of windows; the step before it is part of what the first frame of a window waits."""
    code, found, printed, _ = bench(toys / "toy.edgeadapt", "--data", toys / "test.npz", "--streams", "clean", "--single")
    assert code == 0
    assert found["rows"] == ["source", "step 0", "toy", "toy, one by one"]
    assert found["adapting"] == ["toy", "toy, one by one"]
    steps = [cell["counters"]["steps"] for cell in found["cells"]]
    assert steps[3] == steps[2] > 0
    assert "one by one" in printed


def test_rows_that_a_guard_watches(bench, toys, tmp_path):
    """Beside those without, with figures and a table of their own; a bundle that does not say what its source looks like has none."""
    path = Toy(batches=(1, 4)).write(tmp_path / "known.edgeadapt", reference=Reference(64, 4.0, 0.5, {}))
    code, found, printed, _ = bench(path, "--data", toys / "test.npz", "--streams", "clean", "--guard", "--single")
    assert code == 0
    assert found["rows"] == ["source", "step 0", "toy", "toy, one by one", "toy, guarded", "toy, one by one, guarded"]
    assert found["adapting"] == found["rows"][2:]
    assert ["worse" in cell for cell in found["cells"]] == [False] * 4 + [True] * 2
    assert "toy, guarded: points worse" in printed
    assert "% of the gain kept" in printed
    code, found, printed, _ = bench(path, "--data", toys / "test.npz", "--streams", "clean", "--guarded-only", "--single")
    assert code == 0
    assert found["rows"] == ["source", "step 0", "toy, guarded", "toy, one by one, guarded"]
    assert [(cell["worse"] is not None, cell["kept"]) for cell in found["cells"][2:]] == [(True, None)] * 2
    assert "toy, guarded: points worse" in printed
    code, _, _, said = bench(toys / "toy.edgeadapt", "--data", toys / "test.npz", "--streams", "clean", "--guard")
    assert code == 2
    assert "does not say what that looks like" in said


def test_bundles_of_one_method_go_by_their_files_and_other_models_have_a_source_of_their_own(toys, tmp_path):
    small = Toy(width=4, batches=(1, 4)).write(tmp_path / "small.edgeadapt")
    bundles = [Bundle.open(path) for path in (toys / "toy.edgeadapt", small, Toy(method="source").write(tmp_path / "plain.edgeadapt"))]
    names = [(line.name, line.mode) for line in rows(bundles)]
    assert names == [
        ("source", "source"),
        ("source of small", "source"),
        ("toy, step 0", "initial"),
        ("small, step 0", "initial"),
        ("toy", "adapt"),
        ("small", "adapt"),
    ]
    (tmp_path / "other").mkdir()
    twins = [bundles[0], Bundle.open(Toy(width=4).write(tmp_path / "other" / "toy.edgeadapt"))]
    assert len({line.name for line in rows(twins)}) == 6


def test_no_two_rows_have_one_name(toys, tmp_path):
    called = Bundle.open(Toy(width=4, batches=(1, 4)).write(tmp_path / "source.edgeadapt"))
    assert len({line.name for line in rows([Bundle.open(toys / "toy.edgeadapt"), called])}) == 6
    alike = []
    for width in (3, 4, 5):
        (tmp_path / str(width)).mkdir()
        alike.append(Bundle.open(Toy(width=width, method="source").write(tmp_path / str(width) / "m.edgeadapt")))
    assert len({line.name for line in rows(alike)}) == 3


def test_onnxruntime_need_not_be_the_package_of_that_name(here, bench, toys, monkeypatch):
    import importlib.metadata

    whole = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return whole(name)

    cli._machine.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", version)
    code, _, printed, _ = bench(toys / "norm.edgeadapt", "--data", toys / "test.npz", "--streams", "clean")
    assert (code, "onnxruntime " in printed) == (0, True)


def test_every_stream_can_be_asked_for_and_own_recordings_too(here, bench, toys, tmp_path):
    np.savez(tmp_path / "monday.npz", x=IMAGES[:5], y=LABELS[:5])
    folder = tmp_path / "tuesday"
    for number, label in enumerate(LABELS[:6]):
        (folder / f"class {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[number]).resize((9, 7 + number)).save(folder / f"class {label}" / f"{number}.png")
    (folder / f"class {LABELS[0]}" / "broken.png").write_bytes(b"no picture")
    own = ("--own", tmp_path / "monday.npz", folder)
    code, found, _, said = bench(toys / "norm.edgeadapt", "--data", toys / "test.npz", "--streams", "all", "--rounds", 2, *own)
    assert code == 0
    assert found["streams"] == [*NAMES, "own"]
    cell = found["cells"][-1]
    assert (cell["stream"], cell["frames"], list(cell["domains"])) == ("own", 11, ["monday", "tuesday"])
    assert "1 frames cannot be used and are left out; the first: " in said


def test_sensor_frames_have_the_streams_that_they_can_have(here, bench, tmp_path):
    bundle, rng = small_bundle(tmp_path / "small.edgeadapt"), np.random.default_rng(2)
    for name in ("day1", "day2"):
        np.savez(tmp_path / f"{name}.npz", x=rng.standard_normal((6, FEATURES)).astype(np.float32), y=rng.integers(0, 3, 6))
    days = [tmp_path / f"{name}.npz" for name in ("day1", "day2")]
    code, found, _, _ = bench(bundle, "--data", days[0], "--own", *days)
    assert code == 0
    assert found["streams"] == ["clean", "own"]
    code, found, _, _ = bench(bundle, "--own", *days, output="own")
    assert (code, found["streams"]) == (0, ["own"])
    code, found, _, _ = bench(bundle, "--data", days[0], "--streams", "all", output="all")
    assert (code, found["streams"]) == (0, ["single", "repeated", "noise", "clean"])
    code, _, _, said = bench(bundle, "--data", days[0], "--streams", "mixed", output="mixed")
    assert code == 2
    assert "the stream mixed corrupts images" in said


def test_segmentation_is_scored_by_pixels(here, bench, tmp_path):
    bundle = Toy(task="segmentation", batches=(1, 4)).write(tmp_path / "seg.edgeadapt")
    truth = np.random.default_rng(3).integers(-1, CLASSES, (COUNT, SIDE, SIDE))
    np.savez(tmp_path / "seg.npz", x=IMAGES, y=truth)
    code, _, _, _ = bench(bundle, "--data", tmp_path / "seg.npz", "--streams", "forgetting")
    assert code == 0
    with np.load(next((tmp_path / "out" / "runs").glob("*.npz"))) as file:
        assert len(np.unique(file["wrong"])) > 2


def test_a_budget_bounds_the_serving_process(bench, toys):
    asked = (toys / "toy.edgeadapt", "--data", toys / "test.npz", "--streams", "clean")
    code, found, printed, _ = bench(*asked, "--budget", "400MiB")
    assert code == 0
    assert "budget       400 MiB" in printed
    assert all(cost["peak_bytes"] < 400 * 2**20 for cost in found["costs"])
    code, _, _, said = bench(*asked, "--budget", "20MiB", output="none")
    assert code == 5
    assert "budget" in said


def test_what_could_not_be_prepared_is_told_and_run_again_once_it_can(bench, tmp_path, monkeypatch):
    bundle, rng = small_bundle(tmp_path / "small.edgeadapt"), np.random.default_rng(2)
    np.savez(tmp_path / "day.npz", x=rng.standard_normal((6, FEATURES)).astype(np.float32), y=rng.integers(0, 3, 6))
    asked = (bundle, "--data", tmp_path / "day.npz")
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("EDGEADAPT_CACHE", str(tmp_path / "file" / "cache"))
    code, found, _, said = bench(*asked, quick=False)
    assert code == 0
    assert "graphs that could not be optimised for this machine run as exported: adapt.b2, predict.b1, " in said
    assert found["settings"]["graphs"].startswith("optimised for this machine, threads 1; as exported: ")
    assert "source.b1 of small.edgeadapt" in found["settings"]["graphs"]
    _, again, _, said = bench(*asked, quick=False)
    assert again == found
    assert ": error" not in said
    monkeypatch.setenv("EDGEADAPT_CACHE", str(tmp_path / "cache"))
    _, better, _, said = bench(*asked, quick=False)
    assert said.count(": error") == 3
    assert better["settings"]["graphs"] == "optimised for this machine, threads 1"
    assert bench(*asked, quick=False)[3] == ""


def test_what_was_run_without_energy_is_run_again_where_it_can_be_read(here, bench, toys, monkeypatch):
    from edgeadapt.devices.boards import energy

    asked = (toys / "norm.edgeadapt", "--data", toys / "test.npz", "--streams", "clean")
    monkeypatch.setattr(energy.Energy, "__enter__", lambda self: setattr(self, "kind", "") or self)
    assert bench(*asked)[3].count(": error") == 3
    assert bench(*asked)[3] == ""
    monkeypatch.setattr(energy.Energy, "__enter__", lambda self: setattr(self, "kind", "rapl") or self)
    assert bench(*asked)[3].count(": error") == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--budget", "much"), 2, "'much' is not a size"),
        ((), 2, "there is nothing to run on"),
        (("--data", "test.npz", "--streams", "blurred"), 2, "unknown stream 'blurred'"),
        (("--data", "test.npz", "--streams", "own"), 2, "the stream own needs recordings"),
        (("--own", "test.npz", "--streams", "clean"), 2, "the stream clean is made of clean frames"),
        (("--data", "test.npz", "--batch", "3"), 2, "toy.edgeadapt: this bundle cannot adapt on 3 frames at a time\n  fix: use --batch 4"),
        (("--data", "test.npz", "--severity", "9"), 2, "severity is a whole number"),
        (("--data", "test.npz", "--corruptions", "fogg"), 2, "did you mean 'fog'?"),
        (("--data", "absent.npz",), 6, "absent.npz cannot be opened"),
        (("--data", "nolabels.npz"), 2, "nolabels.npz has no labels"),
        (("--data", "beyond.npz"), 3, "beyond.npz has the label 5, and the model has classes 0 to 4"),
        (("--data", "grey.npz"), 3, "uint8 images are N x H x W x 3"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments, code, message, bench, toys, monkeypatch):
    monkeypatch.chdir(toys)
    np.savez("nolabels.npz", x=IMAGES)
    np.savez("beyond.npz", x=IMAGES, y=LABELS + 1)
    np.savez("grey.npz", x=IMAGES[..., :1], y=LABELS)
    monkeypatch.setattr(child.Child, "serve", lambda *_: pytest.fail("something ran"))
    Toy(batches=(1, 4)).write(toys / "toy.edgeadapt")
    quick = ("--no-prepared",) if "--corruptions" in arguments else QUICK
    found, _, _, said = bench("toy.edgeadapt", *arguments, *quick, quick=False)
    assert found == code
    assert message in said


@pytest.mark.parametrize("option", [("--batch", "0"), ("--batch", "a"), ("--seeds", "0"), ("--seeds", "x"), ("--scale", "big")])
def test_options_that_cannot_be_are_refused(option, toys, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(toys / "toy.edgeadapt"), "--data", "x.npz", *option])
    assert ended.value.code == 2


def test_bundles_must_go_together(bench, toys, tmp_path):
    other = small_bundle(tmp_path / "small.edgeadapt")
    code, _, _, said = bench(toys / "toy.edgeadapt", other, "--data", toys / "test.npz")
    assert code == 2
    assert "small.edgeadapt and toy.edgeadapt are not of one model" in said
    code, _, _, said = bench(toys / "toy.edgeadapt", toys / "toy.edgeadapt", "--data", toys / "test.npz")
    assert (code, "a bundle is named twice" in said) == (2, True)


def test_a_place_that_cannot_be_written_is_told_first(bench, toys, tmp_path, monkeypatch):
    monkeypatch.setattr(child.Child, "serve", lambda *_: pytest.fail("something ran"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, _, _, said = bench(toys / "toy.edgeadapt", "--data", toys / "test.npz", output="file/below")
    assert code == 2
    assert "results cannot be written to" in said
