"""Whole exports in small forms: bytes in memory and on disk, budgets, runs that repeat, and what the user is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeadapt.bundle import Bundle, tensors
from edgeadapt.errors import ExportError, UsageError
from edgeadapt.exporters import selfcheck
from edgeadapt.exporters.export import ExportReport, export
from edgeadapt.exporters.training import Training
from edgeadapt.memory import footprint
from edgeadapt.memory.simulation import simulate
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.engine import Engine
from edgeadapt.runtime.state import FlatState
from tests.test_export import FRAMES, samples, tiny, untrained

CASES = {
    ("side", "compact", "adam"): {},
    ("side", "tiny", "sgd"): {"micro": (1, 2)},
    ("ecotta", "compact", "sgd"): {},
    ("ecotta", "tiny", "adam"): {"statistics": "source", "micro": (1,)},
    ("tent", "compact", "adam"): {},
}
Reports = dict[tuple[str, str, str], ExportReport]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("updates")
    data = samples(folder, (3, 16, 16), 10)
    found = {}
    for (method, tier, optimiser), more in CASES.items():
        path, own = folder / f"{method}-{tier}.edgeadapt", untrained(method, parts=2)
        choices: dict[str, Any] = {"method": method, "updates": tier, "optimiser": optimiser, "batches": (4,), **own, **more}
        found[method, tier, optimiser] = export(tiny(), path, shape=(3, 16, 16), data=data, allow_drop=True, **choices)
    return found


def opened(report: ExportReport) -> Adapter:
    assert report.path is not None
    return Adapter.open(report.path)


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


@pytest.mark.parametrize("case", CASES)
def test_no_float32_copy_of_a_parameter_or_moment_is_held_anywhere(reports: Reports, case: tuple[str, str, str], tmp_path: Path) -> None:
    """In memory, in the bundle and in saved files there are whole numbers, and a number a block for their scale."""
    bundle = Bundle.open(str(reports[case].path))
    manifest = bundle.manifest
    held = [spec for spec in manifest.state if spec.kind != "statistic"]
    count = manifest.method.options["trainable"]
    blocks = sum(spec.shape[0] for spec in held if spec.name.endswith(".unit"))
    wide = [spec for spec in held if spec.dtype == "float32"]
    assert all(spec.name == "step" or (spec.name.endswith((".unit", ".scale")) and spec.shape[1:] == (1,)) for spec in wide)
    vectors = sum(spec.size for spec in held if spec.name.endswith(".vectors"))
    moments = {"sgd": 1, "adam": 2}[case[2]]
    each = {"compact": 2, "tiny": 1}[case[1]]
    most = each * 1.1 * (count - vectors) + 2 * vectors + moments * 1.1 * count + 4 * blocks * (1 + moments) + 16
    assert sum(spec.nbytes for spec in held) <= most
    state = FlatState(manifest.state, manifest.graphs, bundle.initial_state())
    written = {name for graph in manifest.graphs.values() for name in graph.writes}
    assert state.nbytes == sum(-(-spec.nbytes // 64) * 64 * (1 + (spec.name in written)) for spec in manifest.state)
    assert state.nbytes == footprint.state_bytes(manifest.state, manifest.graphs, manifest.graphs)
    payload = sum(spec.nbytes for spec in manifest.state)
    assert manifest.members["state.safetensors"].size < payload + 200 * len(manifest.state) + 100
    with opened(reports[case]) as adapter:
        adapter.adapt(FRAMES[:4])
        path = adapter.save(tmp_path / "saved")
        assert {name: value.dtype.name for name, value in adapter.state.items()} == {spec.name: spec.dtype for spec in manifest.state}
    assert path.stat().st_size < payload + 200 * len(manifest.state) + 1500
    found, _ = tensors.read(path)
    assert sum(value.nbytes for value in found.values()) == payload


@pytest.mark.parametrize("case", CASES)
def test_runs_repeat_and_go_on_after_saving_and_rolling_back(reports: Reports, case: tuple[str, str, str], tmp_path: Path) -> None:
    labels = np.arange(4)

    def on(adapter: Adapter, steps: range) -> dict[str, Any]:
        for k in steps:
            frames = np.roll(FRAMES, k, 0)[:4]
            adapter.learn(frames, labels, rate=0.01) if k % 2 else adapter.adapt(frames, rate=0.01)
        return adapter.state

    with opened(reports[case]) as first, opened(reports[case]) as second:
        middle = on(first, range(4))
        path = first.save(tmp_path / "saved")
        end = on(first, range(4, 8))
        assert same(on(second, range(8)), end)
        assert not same(middle, end)
        first.state = middle
        assert same(on(first, range(4, 8)), end)
    with opened(reports[case]) as third:
        third.load(path)
        assert same(on(third, range(4, 8)), end)
        third.reset()
        assert same(on(third, range(8)), end)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "side"])
def test_the_side_network_starts_as_the_source_bit_for_bit(reports: Reports, case: tuple[str, str, str]) -> None:
    with opened(reports[case]) as adapter:
        assert np.array_equal(adapter.predict(FRAMES), adapter.source(FRAMES))


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_goes_wild_leaves_the_state_as_it_was(reports: Reports, case: tuple[str, str, str]) -> None:
    labels = np.arange(4)
    with opened(reports[case]) as adapter:
        adapter.learn(FRAMES[:4], labels)
        before = adapter.state
        adapter.learn(FRAMES[:4] * np.float32(1e25), labels, rate=10.0, momentum=0.0)
        after = adapter.state
        assert adapter.stats["rejected_steps"] == 1
        assert same(after, before)
        adapter.learn(FRAMES[:4], labels)
        assert adapter.stats["steps"] == 2


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "adam"])
def test_a_step_beyond_all_ranges_is_dropped_though_its_loss_is_finite(reports: Reports, case: tuple[str, str, str]) -> None:
    with opened(reports[case]) as adapter:
        adapter.learn(FRAMES[:4], np.arange(4))
        before = adapter.state
        for _ in range(2):
            adapter.learn(FRAMES[:4], np.arange(4), rate=10.0)
            assert np.isfinite(adapter.metrics["loss"])
            assert adapter.metrics["update"] == np.inf
        assert adapter.stats["rejected_steps"] == 2
        assert same(adapter.state, before)


def test_an_empty_batch_leaves_parameters_as_they_are(reports: Reports) -> None:
    """No prediction is confident and nothing regularises, after steps that left momentum."""
    for case in (("side", "compact", "adam"), ("side", "tiny", "sgd"), ("ecotta", "tiny", "adam")):
        with opened(reports[case]) as adapter:
            for _ in range(3):
                adapter.learn(FRAMES[:4], np.arange(4), rate=0.01)
            before = adapter.state
            for _ in range(3):
                adapter.adapt(FRAMES[:4], margin=0.0, regulariser=0.0, rate=0.01)
            assert adapter.stats["steps"] == 6
            assert adapter.metrics["update"] == 0.0
            for name, value in adapter.state.items():
                assert np.isfinite(value).all()
                if name.startswith("parameters."):
                    assert np.array_equal(value, before[name]), name


@pytest.mark.parametrize("case", [("side", "tiny", "sgd"), ("ecotta", "tiny", "adam")])
def test_steps_in_pieces_on_the_device_are_the_whole_step_but_for_ties(reports: Reports, case: tuple[str, str, str]) -> None:
    bundle = Bundle.open(str(reports[case].path))
    manifest = bundle.manifest
    ends = []
    for pieces in (False, True):
        state = FlatState(manifest.state, manifest.graphs, bundle.initial_state())
        engine = Engine(bundle, state, 1)
        for step in range(2):
            frames = np.roll(FRAMES, step, 0)[:4]
            hyper = {"rate": 0.01, "margin": 9.0}
            if not pieces:
                engine.frames(4)[...] = frames
                outcome = engine.run("adapt.b4", hyper)
            else:
                engine.begin()
                for frame in frames:
                    engine.frames(1)[...] = frame
                    engine.run("adapt-sums.b1", hyper)
                outcome = engine.run("adapt-update", hyper)
            assert outcome.finite
        ends.append((state.current(), outcome.metrics["update"]))
    (whole, moved), (cut, other) = ends
    assert moved == pytest.approx(other, rel=1e-3)
    assert int(whole["counter"]) == int(cut["counter"]) == 2
    for name in ("parameters.rows", "parameters.vectors"):
        apart = np.abs(whole[name].astype(int) - cut[name].astype(int))
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.02


def test_learning_lowers_the_loss_in_every_form(reports: Reports) -> None:
    for case in CASES:
        with opened(reports[case]) as adapter:
            adapter.learn(FRAMES[:4], np.arange(4), rate=0.01)
            first = adapter.metrics["loss"]
            for _ in range(20):
                adapter.learn(FRAMES[:4], np.arange(4), rate=0.01)
            assert adapter.metrics["loss"] < first, case


class Board:
    key, name, memory, page, arm, floor, floor_known = "here", "here", 2**34, 4096, False, 0, "measured"
    gflops, gbps, rates_known, code = 10.0, 5.0, "estimated", None


def test_the_ledger_counts_the_small_bytes(reports: Reports) -> None:
    bundle = Bundle.open(str(reports["side", "compact", "adam"].path))
    line = simulate(bundle, Board(), "adapt", 4).ledger["state"]
    graphs = bundle.manifest.graphs
    assert line.bytes == footprint.state_bytes(bundle.manifest.state, graphs, ["predict.b1", "predict.b4", "adapt.b4"])
    assert line.bytes < 0.45 * sum(8 * 4 * spec.size for spec in bundle.manifest.state if spec.name == "parameters.rows")


# ---------------------------------------------------------------------------------------------------------- what is told


def test_the_report_says_what_a_parameter_takes_and_warns_of_tiny_without_labels(reports: Reports) -> None:
    for (method, tier, optimiser), report in reports.items():
        text = report.table()
        size = {"int8": 1, "uint8": 1, "int16": 2, "int64": 8}
        mine = [entry for entry in report.manifest["state"] if entry["kind"] != "statistic"]
        held = sum(math.prod(entry["shape"]) * size.get(entry.get("dtype", ""), 4) for entry in mine)
        count = report.manifest["method"]["options"]["trainable"]
        assert f"updates: {tier}, {held / count:.1f} bytes a parameter with its moments" in text
        assert f"{count:,} trainable" in text
        assert "rounded to the other side, by one step; " in text
        assert ("warning: tiny suits learning from labels" in text) is (tier == "tiny"), (method, optimiser)
        if tier == "tiny":
            step = report.manifest["selfcheck"]["adapt.b4"]["step"]
            assert f"moved a parameter by {step:.1g} of its 8-bit steps" in text
            assert f"after about {1 / step:,.0f} steps of one direction" in text


def test_the_reference_is_what_it_is_without_the_option(tmp_path: Path) -> None:
    data = samples(tmp_path, (3, 16, 16), 10)
    paths = [tmp_path / f"{name}.edgeadapt" for name in ("without", "reference")]
    for path, more in zip(paths, ({}, {"updates": "reference"}), strict=True):
        report = export(tiny(), path, shape=(3, 16, 16), data=data, method="tent", batches=(2,), **more)  # type: ignore[arg-type]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"dtype" not in Bundle.open(paths[0]).manifest.to_bytes()
    assert "updates" not in report.manifest["method"]["options"]
    assert "updates: reference, 12.0 bytes a parameter with its moments" in report.table()
    assert "metric.update" not in str(report.manifest["graphs"])


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="updates = 'small' is not known"):
        export(tiny(), None, shape=(3, 16, 16), method="side", updates="small")
    with pytest.raises(UsageError, match="norm has no use for updates"):
        export(tiny(), None, shape=(3, 16, 16), method="norm", updates="tiny")


class Fragile(nn.Module):
    """Its classes differ by less than eight bits hold: a scale of 300 in one channel, and all that counts in another one's last digits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.norm.weight[:] = torch.tensor([1e6, 1.0, 1.0, 1.0])
            self.head.weight[0, 1], self.head.weight[1, 1] = 1.0, -1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.norm(x).mean((2, 3)))
        return result


def test_what_rounding_parameters_costs_is_measured_and_bounded(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((400, 4, 4, 4)).astype(np.float32)
    y = (x[:, 1].mean((1, 2)) < 0).astype(np.int64)
    choices: dict[str, Any] = {"shape": (4, 4, 4), "data": (x, y), "method": "tent", "batches": (4,), "updates": "compact"}
    with pytest.raises(ExportError, match=r"holding parameters as compact costs \d+\.\d points of clean accuracy \(100\.0 % before"):
        export(Fragile(), None, **choices)
    report = export(Fragile(), None, allow_drop=True, **choices)
    told = report.manifest["selfcheck"]["rounding"]
    assert told["accuracy_before"] == 1.0
    assert told["accuracy_after"] < 0.9
    assert f"rounding the parameters: 100.0 % right before, {100 * told['accuracy_after']:.1f} % after" in report.table()


def test_statistics_are_those_of_the_rounded_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up is that of float32; what is measured afterwards sees what the device will see."""
    seen = []
    before = Training._agreement

    def listening(self: Training, model: Any, *more: Any) -> float:
        seen.append(model)
        return before(self, model, *more)

    monkeypatch.setattr(Training, "_agreement", listening)
    data = samples(tmp_path, (3, 16, 16), 10, count=80)
    report = export(
        tiny(), None, shape=(3, 16, 16), data=data, method="ecotta", parts=2, epochs=1, batches=(4,), warmup_batch=16, updates="tiny", allow_drop=True
    )
    exact, rounded = seen[-3], seen[-2]
    assert rounded.storage is not exact.storage
    for name, value in exact.parameters.items():
        apart = (rounded.parameters[name] - value).abs()
        assert 0 < float(apart.max()) <= float(value.abs().max()) / 126
    changed = [name for name, value in exact.values.items() if not torch.equal(value, rounded.values[name])]
    assert any(name.startswith("meta.") for name in changed)
    assert report.manifest["selfcheck"]["rounding"]["updates"] == "tiny"
    assert selfcheck.FLIPS < 0.25
