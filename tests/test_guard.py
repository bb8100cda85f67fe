"""The guard: what it measures, how its states follow one another, and what it puts back."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeadapt import Adapter
from edgeadapt.bundle.reference import Chance, Reference
from edgeadapt.cli.main import main
from edgeadapt.devices.sources import Frame
from edgeadapt.errors import InputError, UsageError
from edgeadapt.exporters.export import export
from edgeadapt.runtime import looks
from edgeadapt.runtime.guard import Guard
from edgeadapt.runtime.guarded import guarding_bytes
from edgeadapt.runtime.phases import Limits, Phase, Trial
from edgeadapt.runtime.pressure import Level
from edgeadapt.runtime.scores import Predicted, Shift, distance, runs_of
from edgeadapt.runtime.stream import Stream
from tests.toybundle import Toy

CLASSES, SHAPE, WINDOW = 4, (3, 8, 8), 32
OFTEN = Limits(trial=4, probation=2, calm=3)


def images(count: int, seed: int, classes: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a pattern for each class, float32 [N,3,8,8]."""
    random = np.random.default_rng(seed)
    y = random.permutation(np.resize(classes, count))
    patterns = 0.3 * np.random.default_rng(99).standard_normal((CLASSES, *SHAPE)).astype(np.float32)
    return (patterns[y] + random.standard_normal((count, *SHAPE)).astype(np.float32)).astype(np.float32), y


def shifted(x: np.ndarray) -> np.ndarray:
    """Darker, with less contrast, and another tint: what batch statistics undo."""
    return (0.4 * x + np.array([1.0, -0.7, 0.5], np.float32)[:, None, None]).astype(np.float32)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.na, self.b, self.nb = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.na(self.a(x)).relu()
        return self.fc(self.nb(self.b(x)).relu().flatten(1))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    x, y = (torch.from_numpy(part) for part in images(2048, 0))
    model = Net().train()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def bundles(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """tent with anchored statistics, tent and norm with live ones, tent with the source's."""
    folder = tmp_path_factory.mktemp("bundles")
    found = {}
    for name, method, statistics in (("tent", "tent", "anchored"), ("live", "tent", "live"), ("norm", "norm", "live"), ("still", "tent", "source")):
        found[name] = folder / f"{name}.edgeadapt"
        export(net, found[name], shape=SHAPE, data=images(512, 1), method=method, statistics=statistics, batches=(WINDOW,))
    return found


def wrong(guard: Guard, windows: int, seed: int, change: Any = None, classes: tuple[int, ...] = (0, 1, 2, 3)) -> float:
    """Share of wrong predictions over some windows."""
    found = []
    for index in range(windows):
        x, y = images(WINDOW, 1000 * seed + index, classes)
        logits, _ = guard(x if change is None else change(x))
        found.append(logits.argmax(1) != y)
    return float(np.mean(found))


def without_room(adapter: Adapter) -> None:
    """As with a budget that has room for steps, and for predicting one by one."""
    del adapter._service._forms["predict"][WINDOW]
    adapter._service.batches["predict"] = (1,)


def phases(guard: Guard) -> list[str]:
    return [verdict.after.value for verdict in guard.verdicts]


# -------------------------------------------------------------------------------------------------------------- measures


def test_spread_entropy_and_labels_are_those_of_the_mean_prediction() -> None:
    logits = np.log(np.array([[0.7, 0.1, 0.2], [0.1, 0.7, 0.2], [np.nan] * 3], np.float32))
    found = Predicted.of(logits)
    mean = np.array([0.4, 0.4, 0.2])
    assert found.labels.tolist() == [0, 1, -1]
    assert found.spread == pytest.approx(np.exp(-(mean * np.log(mean)).sum()), rel=1e-6)
    row = np.array([0.7, 0.1, 0.2])
    assert found.entropy == pytest.approx(-(row * np.log(row)).sum(), rel=1e-6)
    pixels = np.broadcast_to(logits[:2, :, None], (2, 3, 5))
    assert Predicted.of(pixels).spread == pytest.approx(found.spread, rel=1e-6)
    assert Predicted.of(pixels).labels.shape == (2, 5)
    assert math.isnan(Predicted.of(logits[2:]).spread)
    assert found.agreement(Predicted.of(np.log(np.array([[0.7, 0.1, 0.2], [0.7, 0.1, 0.2], [0.7, 0.1, 0.2]], np.float32)))) == pytest.approx(1 / 3)


def test_shift_is_what_lies_beyond_chance() -> None:
    reference = Reference(64, 3.0, 0.1, {"a": Chance(0.01, 0.05), "b": Chance(0.02, 0.02)})
    start = {f"statistics.{name}.{what}": np.full(4, value, np.float32) for name in "ab" for what, value in (("mean", 1.0), ("variance", 4.0))}
    score = Shift(reference, start)
    assert set(score.names) == {"statistics.a.mean", "statistics.b.mean"}
    means = {"statistics.a.mean": np.full(4, 1.0 + 2 * 0.3, np.float32), "statistics.b.mean": np.ones(4, np.float32)}  # D² 0.09 and 0
    for few, frames, known in ((1.0, 64, 0.05), (0.0, 64, 0.01), (0.0, 16, 0.04), (1.0, 128, 0.05)):
        assert score(means, frames, few) == pytest.approx((0.09 - known) / (0.09 - known + 0.02) / 2, rel=1e-3)
    assert score({name: np.ones(4, np.float32) for name in means}, 64) == 0
    assert math.isnan(Shift(Reference(64, 3.0, 0.1, {}), start)({}, 64))


def test_runs_are_neighbours_that_are_the_same_beyond_chance() -> None:
    assert runs_of(np.array([0, 1, 0, 1, 0, 1], np.int32)) == pytest.approx(-1.0)
    assert runs_of(np.array([0, 0, 0, -1, 1, 1, 1], np.int32)) == pytest.approx((4 / 5 - 1 / 2) / (1 / 2))
    assert runs_of(np.array([2, 2, 2, 2], np.int32)) == 1.0
    assert abs(runs_of(np.random.default_rng(0).integers(0, 10, 20000).astype(np.int32))) < 0.01
    assert math.isnan(runs_of(np.array([3, -1], np.int32)))
    assert math.isnan(runs_of(np.zeros(100, np.int32), 128))


def test_distance_is_of_all_tensors_together() -> None:
    start = {"a": np.array([3.0], np.float32), "b": np.array([4.0], np.float32)}
    assert distance({"a": np.array([3.0], np.float32), "b": np.array([4.5], np.float32)}, start) == pytest.approx(0.1)


# --------------------------------------------------------------------------------------------------------------- states


def test_on_the_source_nothing_is_learned(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN)
        assert wrong(guard, 10, 1) < 0.2
        assert wrong(guard, 10, 2, classes=(1,)) < 0.3
        assert phases(guard) == ["observing"]
        assert adapter.stats["steps"] == 0


def test_a_shift_is_adapted_to_proven_and_put_aside_when_it_has_passed(bundles: dict[str, Path]) -> None:
    """All the way from the warm-up to commits and back; and no worse than not adapting at any stage."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN)
        start = adapter.tensors(guard._learned.names)
        frozen = np.mean([(adapter.source(shifted(x)).argmax(1) != y).mean() for x, y in (images(WINDOW, 3000 + i) for i in range(20))])
        assert wrong(guard, 20, 3, shifted) < frozen - 0.1
        assert phases(guard)[:5] == ["observing", "adapting", "probation", "committed", "adapting"]
        assert adapter.stats["steps"] >= 8
        assert any((value != start[name]).any() for name, value in adapter.tensors(guard._learned.names).items())
        learning = adapter.stats["steps"]
        clean = wrong(guard, 8, 4)
        assert clean < 0.2
        assert phases(guard)[-1] == "observing"
        assert adapter.stats["steps"] <= learning + OFTEN.back + OFTEN.trial
        assert all((value == start[name]).all() for name, value in adapter.tensors(guard._learned.names).items())


def test_one_class_at_a_time_is_not_learned_from(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN)
        for kind in range(4):
            wrong(guard, 5, 5 + kind, shifted, (kind,))
        assert adapter.stats["steps"] == 0
        assert guard.phase is Phase.OBSERVING


def test_what_harms_is_rolled_back_and_the_wait_doubles(bundles: dict[str, Path]) -> None:
    """A rate at which entropy collapses: without a guard the model predicts one class; with one it is back as it started."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        adapter.hyper["rate"] = 10.0
        for index in range(120):
            x, _ = images(WINDOW, 9000 + index)
            adapter.adapt(shifted(x))
        assert np.mean([(adapter.adapt(shifted(x)).argmax(1) != y).mean() for x, y in (images(WINDOW, 9200 + i) for i in range(5))]) > 0.5
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        adapter.hyper["rate"] = 10.0
        guard = Guard(adapter, OFTEN)
        start = adapter.tensors(guard._learned.names)
        wrong(guard, 60, 9, shifted)
        verdicts = [verdict for verdict in guard.verdicts if verdict.after is Phase.ROLLED_BACK]
        assert len(verdicts) >= 2
        assert "it is as it started" in verdicts[0].reason
        for verdict in verdicts:
            assert (found := verdict.scores) is not None
            assert found.kept < OFTEN.kept or found.agreement < OFTEN.agreement or found.moved > OFTEN.most
        waits = [after.window - before.window for before, after in zip(guard.verdicts, list(guard.verdicts)[1:]) if before.after is Phase.ROLLED_BACK]
        assert waits[:2] == [3, 6]
        while guard.phase is not Phase.ROLLED_BACK:
            wrong(guard, 1, 10, shifted)
        assert all((value == start[name]).all() for name, value in adapter.tensors(guard._learned.names).items())
        assert wrong(guard, 3, 11, shifted) < 0.3


def test_parameters_stay_in_their_box(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        adapter.hyper["rate"] = 0.01
        guard = Guard(adapter, Limits(trial=4, probation=1, box=1e-4, agreement=0.0, kept=0.0))
        while guard.phase is not Phase.COMMITTED:
            wrong(guard, 1, guard.windows, shifted)
        assert "drawn back" in guard.verdicts[-1].reason
        assert guard._learned.away() == pytest.approx(1e-4, rel=0.01)


@pytest.mark.parametrize("name", ["live", "norm"])
def test_statistics_that_follow_wholly_do_so_only_on_shifted_windows(bundles: dict[str, Path], name: str) -> None:
    """Live statistics ruin windows of one class; with a guard the model is the source's there, and follows where that helps."""
    with Adapter.open(bundles[name], prepared=False) as adapter:
        guard, start = Guard(adapter, OFTEN), adapter.state
        x, y = images(WINDOW, 77, (2,))
        assert (guard(x)[0] == adapter.predict(x, update_statistics=False)).all()
        assert wrong(guard, 5, 12, classes=(2,)) <= np.mean([(adapter.source(x).argmax(1) != y).mean()]) + 0.15
        assert all((adapter.state[key] == value).all() for key, value in start.items())
        frozen = np.mean([(adapter.source(shifted(x)).argmax(1) != y).mean() for x, y in (images(WINDOW, 13000 + i) for i in range(12))])
        assert wrong(guard, 12, 13, shifted) < frozen - 0.05
        assert wrong(guard, 4, 14) < 0.2


def dimmed(x: np.ndarray) -> np.ndarray:
    return (0.6 * x).astype(np.float32)


def test_a_model_whose_statistics_stay_is_judged_by_its_entropy(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["still"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN)
        wrong(guard, 6, 15)
        assert adapter.stats["steps"] == 0
        assert guard.scores is not None
        assert math.isnan(guard.scores.shift)
        wrong(guard, 8, 16, dimmed)
        assert "adapting" in phases(guard)


# -------------------------------------------------------------------------------------------------------------- by hand


def test_pause_resume_mark_good_roll_back_and_reset(bundles: dict[str, Path]) -> None:
    told: list[Any] = []
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN, told.append)
        wrong(guard, 6, 20, shifted)
        assert guard.phase in (Phase.ADAPTING, Phase.PROBATION)
        steps = adapter.stats["steps"]
        assert steps > 0
        guard.mark_good()
        good = adapter.tensors(guard._learned.names)
        guard.pause()
        wrong(guard, 5, 21, shifted)
        wrong(guard, 5, 21)
        assert adapter.stats["steps"] == steps
        guard.roll_back()
        assert guard.phase is Phase.PAUSED, "who paused it resumes it"
        guard.resume()
        wrong(guard, 5, 22)
        assert all((value == good[name]).all() for name, value in adapter.tensors(guard._learned.names).items()), "on the source too"
        wrong(guard, 6, 22, shifted)
        assert adapter.stats["steps"] > steps
        guard.roll_back()
        assert all((value == good[name]).all() for name, value in adapter.tensors(guard._learned.names).items())
        guard.roll_back()
        assert guard._learned.away() == 0, "what was marked by hand is what it started as"
        guard.reset()
        assert guard.phase is Phase.WARM_UP
        assert any((value != good[name]).any() for name, value in adapter.tensors(guard._learned.names).items())
        assert [verdict.plain() for verdict in told] == [verdict.plain() for verdict in guard.verdicts]
        assert json.dumps([verdict.plain() for verdict in told])


@pytest.mark.parametrize("leave", ["settle", "pause and settle", "resume"])
def test_what_is_not_proven_is_put_aside_however_one_leaves(bundles: dict[str, Path], leave: str) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, Limits(trial=100))
        wrong(guard, 8, 23, shifted)
        assert guard._learned.away() > 0
        if leave != "settle":
            guard.pause()
        guard.resume() if leave == "resume" else guard.settle()
        assert guard._learned.away() == 0
        assert guard.phase is (Phase.PAUSED if leave == "pause and settle" else Phase.OBSERVING)


def test_exploded_parameters_are_rolled_back(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN)
        wrong(guard, 5, 24, shifted)
        adapter.put({name: np.full_like(value, 3e38) for name, value in adapter.tensors(guard._learned.boxed).items()})
        wrong(guard, 1, 25, shifted)
        assert "not finite" in guard.verdicts[-1].reason
        assert wrong(guard, 4, 26, shifted) < 0.3


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_probation_leaves_the_parameters_that_were_tried(at: int, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model that learned nothing is in place: to see whether the window is as the source, and to be compared with."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN)
        while guard.phase is not Phase.PROBATION:
            wrong(guard, 1, 100 + guard.windows, shifted)
        tried, predict = adapter.tensors(guard._learned.names), Adapter.predict
        calls = [adapter.tensors(guard._source)]

        def interrupted(self: Adapter, x: Any, update_statistics: bool = True, **hyper: float) -> Any:
            logits = predict(self, x, update_statistics, **hyper)
            calls.append(self.tensors(guard._source))
            if len(calls) > at:
                raise KeyboardInterrupt
            return logits

        monkeypatch.setattr(Adapter, "predict", interrupted)
        with pytest.raises(KeyboardInterrupt):
            guard(shifted(images(WINDOW, 1)[0]))
        assert all((value == tried[name]).all() for name, value in adapter.tensors(guard._learned.names).items())
        *_, served, looked_at = calls
        assert any((value != served[name]).any() for name, value in looked_at.items())
        assert all((value == served[name]).all() for name, value in adapter.tensors(guard._source).items())


def test_windows_of_three_of_four_classes_are_not_adapted_on_for_ever(bundles: dict[str, Path]) -> None:
    """Steps end where windows are no longer varied; what they made is then put on probation, and neither kept nor left unproven."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN)
        wrong(guard, 6, 27, shifted)
        wrong(guard, 40, 28, shifted, (0, 1, 2))
        assert not guard._learned.unproven
        assert "probation" in phases(guard)


def test_a_frame_that_cannot_be_used_does_not_hurry_statistics(bundles: dict[str, Path]) -> None:
    """Frames of such a window go one by one, and each would get the weight that is meant for the window."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN)
        for index in range(20):
            x, _ = images(WINDOW, 5000 + index)
            x[3] = np.nan
            guard(x)
        assert phases(guard) == ["observing"]
        assert guard._ways.renewed == 20


@pytest.mark.parametrize("tier", ["compact", "tiny"])
def test_parameters_in_few_bits_are_proven_and_rolled_back(net: nn.Module, tmp_path: Path, tier: str) -> None:
    path = tmp_path / "small.edgeadapt"
    export(net, path, shape=SHAPE, data=images(512, 1), method="tent", statistics="anchored", batches=(WINDOW,), updates=tier)
    with Adapter.open(path, prepared=False) as adapter:
        adapter.hyper["rate"] = 0.02
        guard = Guard(adapter, OFTEN)
        start = adapter.tensors(guard._learned.names)
        while Phase.COMMITTED not in [verdict.after for verdict in guard.verdicts]:
            wrong(guard, 1, 200 + guard.windows, shifted)
            assert guard.windows < 40
        assert math.isnan(guard._learned.away())
        adapter.save(tmp_path / "state.safetensors")
        again = Guard(adapter, OFTEN)
        loaded = adapter.tensors(again._learned.names)
        assert any((value != start[name]).any() for name, value in loaded.items())
        wrong(again, 7, 300, shifted)
        again.roll_back()
        assert all((value == loaded[name]).all() for name, value in adapter.tensors(again._learned.names).items())


@pytest.mark.parametrize(("method", "extra"), [("cotta", {"augmentations": 2}), ("rotta", {"capacity": 8}), ("t3a", {}), ("sar", {}), ("lame", {})])
def test_other_methods_are_served_and_rolled_back_whole(net: nn.Module, tmp_path: Path, method: str, extra: dict[str, Any]) -> None:
    """What steps change besides parameters, a teacher or a memory of frames, goes back with them."""
    path = tmp_path / "other.edgeadapt"
    export(net, path, shape=SHAPE, data=images(512, 1), method=method, batches=(WINDOW,), settings=extra)
    with Adapter.open(path, prepared=False) as adapter:
        guard, start = Guard(adapter, OFTEN), adapter.state
        wrong(guard, 16, 31, lambda x: shifted(0.7 * x))
        for index in range(4):
            adapter.adapt(shifted(images(WINDOW, 32 + index)[0]))
        assert (adapter.stats["steps"] > 0) == (method in ("cotta", "rotta", "sar"))
        assert method not in ("cotta", "rotta") or any((adapter.state[name] != start[name]).any() for name in guard._learned.names)
        guard.roll_back()
        guard.roll_back()
        assert all((adapter.state[name] == start[name]).all() for name in guard._learned.names)
        assert set(guard._learned.names) >= {spec.name for spec in adapter.manifest.state if spec.kind == "parameter"}


def test_a_state_to_be_saved_holds_nothing_unproven(bundles: dict[str, Path], tmp_path: Path) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, Limits(trial=100))
        wrong(guard, 10, 23, shifted)
        assert guard._learned.away() > 0
        guard.settle()
        assert guard._learned.away() == 0
        assert guard.phase is Phase.OBSERVING
        guard.settle()  # nothing more to put aside
        assert "not yet proven" in guard.verdicts[-1].reason


def test_parameters_of_a_loaded_state_are_what_is_gone_back_to(bundles: dict[str, Path], tmp_path: Path) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        for index in range(3):
            adapter.adapt(shifted(images(WINDOW, index)[0]))
        adapter.save(tmp_path / "state.safetensors")
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        adapter.load(tmp_path / "state.safetensors")
        guard = Guard(adapter, OFTEN)
        loaded = adapter.tensors(guard._learned.names)
        wrong(guard, 8, 24, shifted)
        guard.roll_back()
        assert all((value == loaded[name]).all() for name, value in adapter.tensors(guard._learned.names).items())


def test_a_window_as_the_source_is_answered_nearly_as_the_source(bundles: dict[str, Path]) -> None:
    """Frames' own statistics count half there, from the first such window on; and wholly from the first that is shifted."""
    clean, _ = images(WINDOW, 77, (0, 1, 2, 3))
    moved = shifted(clean)
    with Adapter.open(bundles["tent"], prepared=False) as adapter, Adapter.open(bundles["tent"], prepared=False) as plain:
        guard = Guard(adapter, Limits(warm_up=100))
        own = adapter.manifest.hyper["own"].default
        for x, scalars in ((clean, {"own": own / 2}), (clean, {"own": own / 2}), (moved, {}), (moved, {})):
            few = {name: value for name, value in guard.scalars.items() if name == "few"}
            mix = guard._ways.mixing(len(x))
            logits, _ = guard(x)
            wanted = plain.predict(x, **few, **scalars, **mix)
            assert np.array_equal(logits, wanted)
            assert [name for name, value in adapter.state.items() if (value != plain.state[name]).any()] == [], "it has followed once"
            assert guard.scalars.get("own") == scalars.get("own")
        for _ in range(8):
            guard(clean)
        assert guard.scalars["own"] == own / 2, "statistics are the source's again"
        guard.mark_good()
        guard(clean)
        assert guard.scalars["own"] == own / 2, "there is nothing learned in it"
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter)
        guard.ahead = True
        guard(clean)
        passes = adapter.stats["frames"]
        assert guard.scalars["own"] == own / 2, "frames that come now are answered so"
        guard(moved)
        assert adapter.stats["frames"] == passes + WINDOW, "what was answered is not predicted twice"
        assert "own" not in guard.scalars


def test_what_labels_taught_is_to_be_proven_as_any_steps(bundles: dict[str, Path]) -> None:
    x, y = images(2 * WINDOW, 78, (0, 1, 2, 3))
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter)
        start = adapter.tensors(guard._learned.names)
        assert guard.learn(x, y) == 2
        assert guard._learned.unproven
        assert guard.behind != "good"
        assert any((value != start[name]).any() for name, value in adapter.tensors(guard._learned.names).items())
        guard.settle()
        assert all((value == start[name]).all() for name, value in adapter.tensors(guard._learned.names).items())
        with pytest.raises(InputError):
            guard.learn(x, y[:3])
        assert not guard._learned.unproven


def test_a_scalar_that_was_set_is_left_alone(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        adapter.hyper["few"] = 0.3
        guard = Guard(adapter)
        wrong(guard, 5, 25)
        assert guard.scalars == {}
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter)
        few, still = {"few": guard.limits.few}, {"few": guard.limits.none}
        kinds = (((0, 1, 2, 3), None, {"few": 0.0, "own": 0.2}), ((1,), None, {**still, "own": 0.2}), ((0, 1), shifted, few))
        for classes, change, scalars in kinds:
            wrong(guard, 10, 26, change, classes)
            assert guard.scalars == scalars
        wrong(guard, 4, 26, shifted)
        assert guard.phase is Phase.ADAPTING
        assert guard.scalars == pytest.approx({"few": 0.0, "trust": 1.0, "late": 1.0, "own": 0.3}), "steps go with statistics that follow wholly"
        wrong(guard, 4, 26, shifted, (1,))
        assert guard.scalars == still
        assert adapter.hyper.chosen == {}, "what is saved is the user's"
        adapter.hyper["late"] = 0.5
        guard = Guard(adapter)
        wrong(guard, 8, 27, shifted)
        assert guard.phase is Phase.ADAPTING
        assert guard.scalars == {"few": 0.0}


def test_the_model_that_learned_nothing_is_compared_by_statistics_of_its_own(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by those that the inputs of later layers have where earlier ones have learned, with which it would look worse than it is."""
    seen: list[Predicted] = []
    add = Trial.add
    monkeypatch.setattr(Trial, "add", lambda self, mine, first: seen.append(first) or add(self, mine, first))
    with Adapter.open(bundles["tent"], prepared=False) as adapter, Adapter.open(bundles["tent"], prepared=False) as other:
        guard = Guard(adapter, Limits(trial=4, probation=8, calm=20))
        while guard.phase is not Phase.PROBATION:
            wrong(guard, 1, 200 + guard.windows, shifted)
        early = next(name for name in guard._learned.boxed if "scale" in name or "weight" in name)
        adapter.put({early: 3.0 * adapter.tensors([early])[early]})
        followed, jumps = 0, []
        for index in range(6):
            x = shifted(images(WINDOW, 7000 + index)[0])
            x = x if index < 3 else (np.float32(1.5) - x).astype(np.float32)
            usual, scalars = adapter.manifest.graphs[f"predict.b{WINDOW}"].defaults["mix"], dict(guard.scalars)
            guard(x)
            if index == 0:
                other.put(adapter.tensors(guard._source))  # what it begins with
            mix = max(usual, WINDOW / (guard.limits.before + WINDOW * (followed + 1)))
            expected = Predicted.of(other.predict(x, True, **scalars, mix=mix))
            followed = followed + 1 if guard._ways.renewed else 0  # a jump of the stream is one for both
            jumps += [] if guard._ways.renewed else [index]
            assert (seen != []) == (index > 0), "as soon as little is left of the statistics that there were"
            if seen:
                np.testing.assert_allclose(seen[-1].shares, expected.shares, atol=1e-5)
        assert 3 in jumps
        assert guard.phase is Phase.PROBATION


def test_steps_have_the_rate_of_labelled_ones_where_statistics_follow_wholly(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rates = tmp_path / "eata.edgeadapt", []
    export(net, path, shape=SHAPE, data=images(512, 1), method="eata", statistics="anchored", batches=(WINDOW,))
    adapt = Adapter.adapt
    monkeypatch.setattr(Adapter, "adapt", lambda self, x, **hyper: rates.append(hyper.get("rate")) or adapt(self, x, **hyper))
    with Adapter.open(path, prepared=False) as adapter:
        own = adapter.manifest.graphs[f"learn.b{WINDOW}"].defaults["rate"]
        assert own == pytest.approx(4 * adapter.manifest.graphs[f"adapt.b{WINDOW}"].defaults["rate"])
        wrong(Guard(adapter), 10, 30, shifted)
        assert rates[0] is None, "until it is known whether frames come in runs"
        assert rates[-1] == own
        rates.clear()
        adapter.reset()
        adapter.hyper["rate"] = 1e-3
        wrong(Guard(adapter), 8, 30, shifted)
        assert rates
        assert set(rates) == {None}


def test_what_was_learned_from_mixed_windows_is_put_aside_where_none_are(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN)
        while guard.phase is not Phase.COMMITTED:
            wrong(guard, 1, 300 + guard.windows, shifted)
        assert guard._learned.away() > 0
        wrong(guard, 10, 31, shifted, (0, 1))
        assert guard._learned.away() == 0
        assert guard._learned.good is None


def committed(adapter: Adapter, limits: Limits = OFTEN) -> Guard:
    """A guard that has just committed steps on shifted windows of all classes."""
    guard = Guard(adapter, limits)
    while guard.phase is not Phase.COMMITTED:
        wrong(guard, 1, 300 + guard.windows, shifted)
        assert guard.windows < 60
    return guard


def in_runs(guard: Guard, windows: int, seed: int) -> None:
    """Serves shifted windows of all classes, one class after the other."""
    for index in range(windows):
        x, y = images(WINDOW, seed + index)
        guard(shifted(x[np.argsort(y, kind="stable")]))


def test_clean_frames_after_a_shift_are_answered_as_the_source_at_once(bundles: dict[str, Path]) -> None:
    """What was learned under a shift makes statistics look shifted where nothing is: the model as it started tells, and answers."""
    clean = [images(WINDOW, 700 + index, (0, 1, 2, 3))[0] for index in range(3)]
    with Adapter.open(bundles["tent"], prepared=False) as adapter, Adapter.open(bundles["tent"], prepared=False) as plain:
        guard = committed(adapter)
        learned, half = adapter.tensors(guard._learned.names), adapter.manifest.hyper["own"].default / 2
        steps = adapter.stats["steps"]
        for index, x in enumerate(clean):
            assert guard._learned.good is not None
            plain.reset()
            assert np.array_equal(guard(x)[0], plain.predict(x, few=0.0, own=half))
            assert all((adapter.state[name] == plain.state[name]).all() for name in guard._source), "statistics are those of the source's model"
            if index < 2:
                assert all((value == learned[name]).all() for name, value in adapter.tensors(guard._learned.names).items())
        assert adapter.stats["steps"] == steps
        assert guard.phase is Phase.OBSERVING
        assert guard._learned.good is None
        assert guard._learned.laid_by is not None


def test_what_learned_under_a_shift_answers_while_there_is_one(bundles: dict[str, Path]) -> None:
    """The model as it started is only looked at, and no trace of that is left."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter, Adapter.open(bundles["tent"], prepared=False) as plain:
        guard = committed(adapter)
        guard.pause()
        for index in range(4):
            x = shifted(images(WINDOW, 720 + index, (0, 1, 2, 3))[0])
            plain.put({name: value.copy() for name, value in adapter.state.items()})
            wanted = plain.predict(x, **guard._ways.scalars, **guard._ways.mixing(len(x)))
            assert np.array_equal(guard(x)[0], wanted)
            assert [name for name, value in adapter.state.items() if (value != plain.state[name]).any()] == []


def test_a_probation_by_entropy_ends_though_predictions_are_sure(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of models whose statistics stay no window says that the stream is the source: what they learned makes them surer."""
    with Adapter.open(bundles["still"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN)
        while guard.phase is not Phase.PROBATION:
            wrong(guard, 1, 900 + guard.windows, dimmed)
            assert guard.windows < 60
        monkeypatch.setattr(guard, "_shifted", lambda scores: False)
        wrong(guard, 8, 950, dimmed)
        assert [verdict for verdict in guard.verdicts if verdict.before is verdict.after is Phase.PROBATION] == []
        assert any(verdict.before is Phase.PROBATION for verdict in guard.verdicts)


def test_what_was_learned_is_laid_by_at_the_source_and_proven_anew_when_the_shift_is_back(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter)
        while guard.phase is not Phase.OBSERVING:
            wrong(guard, 1, 350 + guard.windows)
            assert guard.windows < 60
        assert guard._learned.away() == 0
        laid_by = guard._learned.laid_by
        assert laid_by is not None
        while guard.phase is Phase.OBSERVING:
            wrong(guard, 1, 400 + guard.windows, shifted)
        assert guard.phase is Phase.PROBATION
        assert "taken up" in guard.verdicts[-1].reason
        assert guard._learned.unproven
        assert all((value == laid_by.tensors[name]).all() for name, value in adapter.tensors(guard._learned.names).items())
        while guard.phase is Phase.PROBATION:
            wrong(guard, 1, 500 + guard.windows, shifted)
        assert guard.phase is Phase.COMMITTED
        guard.roll_back()
        guard.roll_back()
        assert guard._learned.laid_by is None, "what was rolled back does not come again"


def test_what_was_learned_wholly_is_served_wholly_however_it_came_there(bundles: dict[str, Path]) -> None:
    """Also while it is paused, and after a roll-back, when it is not yet known how frames come; what was learned otherwise is not."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter, Limits(trial=4, probation=2, calm=8))
        assert guard._learned.wholly
        whole = dict(guard.scalars)
        assert whole["trust"] == whole["late"] == 1.0
        guard.roll_back()
        assert guard._learned.good is not None
        for _ in range(2):  # of 32 frames, of which runs are known from 128 on
            wrong(guard, 1, 600 + guard.windows, shifted)
            assert guard.scores is not None
            assert math.isnan(guard.scores.runs)
            assert guard.scalars == whole
        guard.pause()
        wrong(guard, 6, 33, shifted)
        assert guard.scalars == whole
        guard.mark_good()
        wrong(guard, 4, 33, shifted)
        assert guard.scalars == whole
        guard.reset()
        assert guard.scalars == {}
        wrong(guard, 1, 34, shifted)
        assert "trust" not in guard.scalars


@pytest.mark.parametrize("paused", [False, True])
def test_what_was_learned_wholly_is_put_aside_where_classes_come_in_runs(bundles: dict[str, Path], paused: bool) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter, Limits(trial=4, probation=2, calm=3, back=100))
        if paused:
            guard.pause()
        in_runs(guard, 14, 8000)
        assert guard.scores is not None
        assert guard.scores.spread > guard.limits.mixed
        assert any("in runs" in verdict.reason for verdict in guard.verdicts)
        assert guard._learned.good is None
        assert "trust" not in guard.scalars
        assert (guard.phase is Phase.PAUSED) == paused


def test_what_was_learned_otherwise_stays_where_windows_are_of_few_classes(bundles: dict[str, Path]) -> None:
    """With a `trust` of the user's; so are models that segment, of which runs are not known."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        adapter.hyper["trust"] = 0.7
        guard = committed(adapter, Limits(trial=4, probation=2, calm=3, back=100))
        assert not guard._learned.wholly
        good = guard._learned.good
        assert good is not None
        wrong(guard, 8, 35, shifted, (0, 1))
        assert guard._learned.good is good


def test_a_scalar_set_after_steps_that_were_learned_wholly_ends_their_use(bundles: dict[str, Path]) -> None:
    """Once, and not again and again: what is laid by is not taken up where statistics may not follow wholly."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter, OFTEN)
        adapter.hyper["trust"] = 0.7
        before = len(guard.verdicts)
        wrong(guard, 12, 37, shifted)
        reasons = [verdict.reason for verdict in list(guard.verdicts)[before:]]
        assert sum("as their user says" in reason for reason in reasons) == 1
        assert not any("taken up" in reason for reason in reasons)


@pytest.mark.parametrize("paused", [False, True])
def test_one_narrow_window_does_not_put_a_good_aside(bundles: dict[str, Path], paused: bool) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter, Limits(trial=4, probation=2, calm=3, back=100))
        good = guard._learned.good
        if paused:
            guard.pause()
        else:
            guard.roll_back()
        wrong(guard, 3, 38, shifted)
        wrong(guard, 1, 39, shifted, (1,))
        wrong(guard, 4, 40, shifted)
        assert guard._learned.good is good is not None
        assert not any("put aside" in verdict.reason for verdict in guard.verdicts)


@pytest.mark.parametrize("how", ["settle", "pause and resume", "few classes"])
def test_what_is_laid_by_outlives_a_probation_that_proves_nothing(bundles: dict[str, Path], how: str) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter)
        while guard.phase is not Phase.OBSERVING:
            wrong(guard, 1, 350 + guard.windows)
        laid_by = guard._learned.laid_by
        while guard.phase is not Phase.PROBATION:
            wrong(guard, 1, 400 + guard.windows, shifted)
        if how == "settle":
            guard.settle()
        elif how == "pause and resume":
            guard.pause()
            guard.resume()
        else:
            while guard.phase is Phase.PROBATION:
                wrong(guard, 1, 450 + guard.windows, shifted, (0, 1))
        assert guard.phase is Phase.OBSERVING
        assert guard._learned.away() == 0
        assert "trust" not in guard.scalars
        assert guard._learned.laid_by is laid_by is not None
        while guard.phase is not Phase.COMMITTED:
            wrong(guard, 1, 500 + guard.windows, shifted)
            assert guard.windows < 100
        assert guard._learned.laid_by is None, "it was proven anew, or what was learned since was"


def test_nothing_is_learned_from_runs_on_what_was_marked_good(bundles: dict[str, Path]) -> None:
    """What was learned wholly: steps on it would be thrown away window by window."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter, Limits(trial=4, probation=2, calm=3, back=100))
        guard.mark_good()
        in_runs(guard, 10, 8100)  # until it is known how they come
        before, steps = len(guard.verdicts), adapter.stats["steps"]
        in_runs(guard, 10, 8200)
        assert len(guard.verdicts) == before
        assert adapter.stats["steps"] == steps
        assert guard._learned.away() == 0


def test_a_pause_ends_the_use_of_steps_not_proven_where_windows_are_of_few_classes(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, Limits(trial=100, back=100))
        wrong(guard, 10, 41, shifted)
        assert guard._learned.wholly
        guard.pause()
        wrong(guard, 12, 42, shifted, (1,))
        assert guard._learned.away() == 0
        assert guard.phase is Phase.PAUSED


def test_frames_that_cannot_be_used_do_not_count_as_other_predictions(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN)
        while guard.phase is not Phase.PROBATION:
            wrong(guard, 1, 200 + guard.windows, shifted)
        while guard.phase is Phase.PROBATION:
            x = shifted(images(WINDOW, 8300 + guard.windows)[0])
            x[: WINDOW // 2 + 1] = np.nan
            guard(x)
        assert guard.phase is Phase.COMMITTED


def test_a_probation_ends_though_statistics_hardly_follow(bundles: dict[str, Path]) -> None:
    """Those of the model that learned nothing stay for long those that there were."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        adapter.hyper["mix"] = 0.005
        guard = Guard(adapter, OFTEN)
        wrong(guard, 2, 43, shifted)
        adapter.put({name: value for name, value in other_statistics(bundles["tent"]).items() if name in guard._source})
        while guard.phase is not Phase.PROBATION:
            wrong(guard, 1, 200 + guard.windows, shifted)
            assert guard.windows < 30
        begun = guard.windows
        while guard.phase is Phase.PROBATION:
            wrong(guard, 1, 300 + guard.windows, shifted)
            assert guard.windows < begun + 60
        assert guard.windows > begun + 40


def other_statistics(path: Path) -> dict[str, np.ndarray]:
    """The state after shifted windows."""
    with Adapter.open(path, prepared=False) as adapter:
        for index in range(5):
            adapter.predict(shifted(images(WINDOW, 9500 + index)[0]), mix=0.5)
        return adapter.state


def test_a_step_that_was_interrupted_after_it_was_taken_is_not_proven(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    adapt = Adapter.adapt

    def interrupted(self: Adapter, x: Any, **hyper: float) -> Any:
        adapt(self, x, **hyper)
        raise KeyboardInterrupt

    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, Limits(trial=100))
        while guard.phase is not Phase.ADAPTING:
            wrong(guard, 1, guard.windows, shifted)
        monkeypatch.setattr(Adapter, "adapt", interrupted)
        with pytest.raises(KeyboardInterrupt):
            guard(shifted(images(WINDOW, 1)[0]))
        assert guard._learned.away() > 0
        guard.settle()
        assert guard._learned.away() == 0


@pytest.mark.parametrize("name", ["tent", "norm"])
def test_an_empty_window_is_refused(bundles: dict[str, Path], name: str) -> None:
    with Adapter.open(bundles[name], prepared=False) as adapter, pytest.raises(InputError):
        Guard(adapter)(np.zeros((0, *SHAPE), np.float32))


def test_few_frames_after_a_roll_back_do_not_look_like_few_classes(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = committed(adapter)
        good = guard._learned.good
        guard.roll_back()
        x = shifted(images(WINDOW, 36)[0])
        for index in range(0, WINDOW, 4):
            guard(x[index : index + 4])
        assert guard._learned.good is good is not None
        assert guard.scalars["few"] == 0.0


def test_classes_in_runs_are_not_followed_where_they_are_few(bundles: dict[str, Path]) -> None:
    """The same frames of two classes: shuffled, statistics follow in part, and one class after the other, they are the source's."""
    for in_runs, scalars in ((False, {"few": Limits().few}), (True, {"few": Limits().none})):
        with Adapter.open(bundles["tent"], prepared=False) as adapter:
            guard = Guard(adapter, Limits(narrow=0.7))
            for index in range(10):
                x, y = images(WINDOW, index, (0, 1))
                guard(shifted(x[np.argsort(y, kind="stable")] if in_runs else x))
            assert guard.scalars == scalars
            assert guard.scores is not None
            assert (guard.scores.runs > 0.5) == in_runs


def test_frames_that_cannot_be_used_change_nothing(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter)
        logits, _ = guard(np.full((WINDOW, *SHAPE), np.nan, np.float32))
        assert np.isnan(logits).all()
        assert guard.scores is None
        assert wrong(guard, 3, 27) < 0.2


# ------------------------------------------------------------------------------------------------------- where it is used


@pytest.mark.parametrize("single", [False, True])
def test_a_stream_with_a_guard_answers_every_frame(bundles: dict[str, Path], single: bool) -> None:
    x, y = images(10 * WINDOW + 5, 30)
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        guard = Guard(adapter, OFTEN)
        served = [one for window in Stream(adapter, single=single, guard=guard).run(Frame(i, f) for i, f in enumerate(shifted(x))) for one in window]
        assert [one.index for one in served] == list(range(len(x)))
        assert guard.windows == (10 if single else 11)
        assert np.mean([one.logits.argmax() != label for one, label in zip(served, y)]) < 0.3  # type: ignore[union-attr]


def test_what_is_left_at_the_end_is_answered_with_the_frames_before(bundles: dict[str, Path]) -> None:
    """By the statistics of a whole window, and without a step."""
    x, size = shifted(images(8 * WINDOW + 5, 34)[0]), 8 * WINDOW
    with Adapter.open(bundles["tent"], prepared=False) as adapter, Adapter.open(bundles["tent"], prepared=False) as other:
        served = list(Stream(adapter, guard=Guard(adapter)).run(Frame(i, frame) for i, frame in enumerate(x)))
        guard = Guard(other)
        for begin in range(0, size, WINDOW):
            guard(x[begin : begin + WINDOW])
        steps = other.stats["steps"]
        assert guard.phase is Phase.ADAPTING
        last = guard(np.concatenate([x[size:], x[size - WINDOW + 5 : size]]), False)[0][:5]
        assert [len(window) for window in served] == [WINDOW] * 8 + [5]
        assert np.array_equal([one.logits for one in served[-1]], last)
        assert adapter.stats["steps"] == steps > 0


@pytest.mark.parametrize("room", [False, True])
def test_a_stream_that_ends_before_a_window_is_full_is_answered_frame_by_frame(bundles: dict[str, Path], room: bool) -> None:
    """So are frames that are left at the end where there is no room to predict a window."""
    x = images(WINDOW + 5, 35)[0][WINDOW if room else 0 :]
    with Adapter.open(bundles["tent"], prepared=False) as adapter, Adapter.open(bundles["tent"], prepared=False) as other:
        for one in () if room else (adapter, other):
            without_room(one)
        guard = Guard(other)
        expected = np.concatenate([guard(part)[0] for part in np.split(x, [0 if room else WINDOW]) if len(part)])
        served = [one.logits for window in Stream(adapter, guard=Guard(adapter)).run(Frame(i, f) for i, f in enumerate(x)) for one in window]
        assert np.array_equal(served, expected)
        assert adapter.stats["frames"] == len(x), "no other frames are predicted with them"


@pytest.mark.parametrize("how", ["put aside", "taken up", "rolled back", "drawn back"])
def test_statistics_that_stand_after_a_window_are_those_of_the_model_that_there_is(bundles: dict[str, Path], how: str) -> None:
    """Frames that are answered between two windows are normalised by them: the model that is put in place after a window has seen it as well."""
    changed: dict[str, Any] = {"rolled back": {"agreement": 1.1}, "drawn back": {"box": 1e-4}}
    with Adapter.open(bundles["tent"], prepared=False) as adapter, Adapter.open(bundles["tent"], prepared=False) as plain:
        adapter.hyper["mix"] = plain.hyper["mix"] = 1.0
        guard = committed(adapter)
        while how == "taken up" and guard.phase is not Phase.OBSERVING:
            wrong(guard, 1, 360 + guard.windows)
        guard.limits = replace(OFTEN, **changed.get(how, {}))
        while not re.search(how, f"{guard.verdicts[-1].reason} {guard.phase.value}"):
            x, y = images(WINDOW, 4000 + guard.windows)
            x = shifted(x[np.argsort(y, kind="stable")] if how == "put aside" else x)
            guard(x)
            assert guard.windows < 60
        assert guard.verdicts[-1].window == guard.windows
        assert (guard._learned.away() > 0) == (how != "put aside")
        plain.put(adapter.tensors(guard._learned.names))
        plain.predict(x, **guard.scalars)
        assert [name for name, value in adapter.state.items() if name in guard._source and (value != plain.state[name]).any()] == []


def test_what_is_put_in_place_is_followed_frame_by_frame_where_there_is_no_room(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the weights of single frames: that of a window would make statistics those of its last frame or two."""
    asked: list[dict[str, float]] = []
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        without_room(adapter)
        guard = Guard(adapter, Limits(trial=100))
        guard.ahead = True
        while adapter.stats["steps"] < 4:
            wrong(guard, 1, 600 + guard.windows, shifted)
            assert guard.windows < 60
        predict = adapter.predict
        monkeypatch.setattr(adapter, "predict", lambda x, *given, **scalars: asked.append(scalars) or predict(x, *given, **scalars))
        while "put aside" not in guard.verdicts[-1].reason:
            asked.clear()
            wrong(guard, 1, 700 + guard.windows)
            assert guard.windows < 90
    assert asked != []
    assert all("mix" not in scalars for scalars in asked)


@pytest.mark.parametrize(("single", "mix", "wholly"), [(False, 0.5, True), (True, 0.5, False), (False, 0.2, False)])
def test_statistics_of_windows_before_are_not_followed_wholly(bundles: dict[str, Path], single: bool, mix: float, wholly: bool) -> None:
    """They may be of another shift; so it is where frames are answered before their window is full, and where it counts little."""
    x = shifted(images(12 * WINDOW, 33)[0])
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        adapter.hyper["mix"] = mix
        guard = Guard(adapter, Limits(trial=100))
        list(Stream(adapter, single=single, guard=guard).run(Frame(i, frame) for i, frame in enumerate(x)))
        assert adapter.stats["steps"] > 4
        assert guard._learned.wholly == wholly
        assert ("trust" in guard.scalars) == wholly


@pytest.mark.parametrize(("name", "size"), [("live", WINDOW // 2), ("norm", WINDOW // 2), ("live", WINDOW), ("norm", WINDOW + 8)])
def test_live_statistics_follow_windows_that_are_predicted_one_by_one(bundles: dict[str, Path], name: str, size: int) -> None:
    """Of a size that nothing was exported for, or for which the budget has no room, whole or in part."""
    with Adapter.open(bundles[name], prepared=False) as adapter:
        if size <= WINDOW:
            without_room(adapter)
        guard, clean = Guard(adapter, OFTEN), [images(size, 6000 + index) for index in range(12)]
        for x, _ in clean:
            guard(x)
        assert guard.scores is not None
        assert guard.scores.shift < guard.limits.shifted
        frozen = np.mean([adapter.source(shifted(x)).argmax(1) != y for x, y in clean])
        assert np.mean([guard(shifted(x))[0].argmax(1) != y for x, y in clean]) < frozen / 3


@pytest.mark.parametrize("more", [0, 8])
def test_a_look_at_a_window_sees_the_same_means_however_it_is_predicted(bundles: dict[str, Path], more: int) -> None:
    x = shifted(images(WINDOW + more, 91)[0])
    with Adapter.open(bundles["norm"], prepared=False) as adapter:
        start = adapter.state
        names = [name for name in start if name.endswith(".mean")]
        found = [looks.means(adapter, names, start, x, passes) for passes in ([WINDOW, *more * [1]], len(x) * [1])]
        assert all((adapter.state[name] == value).all() for name, value in start.items())
        assert all((value == start[name]).all() for name, value in looks.means(adapter, names, start, x, []).items())
    for name in names:
        away = np.linalg.norm(found[0][name] - start[name])
        assert np.linalg.norm(found[1][name] - found[0][name]) < 0.05 * away


@pytest.mark.parametrize("level", [Level.PAUSED, Level.PREDICT])
def test_means_are_as_they_stand_where_memory_is_short(bundles: dict[str, Path], level: Level) -> None:
    """Before the look, or while it is taken: passes may then be of other sizes than was thought."""
    x = shifted(images(WINDOW, 92)[0])
    with Adapter.open(bundles["norm"], prepared=False, budget="2GiB") as adapter:
        start = adapter.state
        names = [name for name in start if name.endswith(".mean")]
        predict = adapter.predict

        def short(*given: Any, **hyper: Any) -> np.ndarray:
            adapter._service._pressure.level = level  # type: ignore[union-attr]
            return predict(*given, **hyper)

        adapter.predict = short  # type: ignore[method-assign]
        for _ in range(2):
            found = looks.means(adapter, names, start, x, [WINDOW])
            assert all((found[name] == start[name]).all() for name in names)


def test_short_memory_does_not_put_aside_what_was_learned(bundles: dict[str, Path]) -> None:
    """Frames are predicted one by one for a while, and then as before."""
    with Adapter.open(bundles["tent"], prepared=False, budget="2GiB") as adapter:
        guard = Guard(adapter, OFTEN)
        while guard.phase is not Phase.COMMITTED:
            wrong(guard, 1, 300 + guard.windows, shifted)
        assert guard._learned.wholly
        adapter._service._pressure.level = Level.PREDICT  # type: ignore[union-attr]
        adapter._service._pressure.look = lambda missing: None  # type: ignore[union-attr,method-assign]
        for index in range(6):
            guard(shifted(images(WINDOW, 9000 + index)[0]))
        assert guard._ways.passes == [1] * WINDOW
        assert guard._learned.wholly
        assert guard._learned.in_use


@pytest.mark.parametrize("size", [WINDOW, WINDOW + 8])
def test_what_is_left_of_statistics_before_is_by_the_passes_of_a_window(bundles: dict[str, Path], size: int) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        mix = {one: adapter.manifest.graphs[f"predict.b{one}"].defaults["mix"] for one in (1, WINDOW)}
        guard, x = Guard(adapter, OFTEN), shifted(images(size, 93)[0])
        guard(x)
        assert guard._ways.remains == pytest.approx((1 - mix[WINDOW]) * (1 - mix[1]) ** (size - WINDOW))
        without_room(adapter)
        x[0, 0, 0, 0] = np.nan
        guard(x)
        assert guard._ways.remains == pytest.approx((1 - mix[1]) ** (size - 1))


def test_a_probation_without_room_waits_until_little_is_left_of_statistics_before(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        without_room(adapter)
        guard, left = Guard(adapter, Limits(trial=4, probation=8, calm=20)), []
        mix = adapter.manifest.graphs["predict.b1"].defaults["mix"]
        while guard.phase is not Phase.PROBATION:
            wrong(guard, 1, 400 + guard.windows, shifted)
        for index in range(3):
            guard(shifted(images(WINDOW, 9100 + index)[0]))
            left.append(guard._comparing.trial.foreign)
        assert left == pytest.approx([(1 - mix) ** (WINDOW * count) for count in (1, 2, 3)])


@pytest.mark.parametrize("size", [WINDOW, WINDOW // 2])
def test_windows_that_are_predicted_one_by_one_are_not_followed_wholly(bundles: dict[str, Path], size: int) -> None:
    """Their frames are normalised by those before them, though a window's statistics, where it is predicted at once, are its own."""
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        without_room(adapter)
        guard = Guard(adapter, Limits(trial=100))
        for index in range(14):
            guard(shifted(images(size, 7000 + index)[0]))
        assert guard.phase is Phase.ADAPTING
        assert (adapter.stats["steps"] > 4) == (size == WINDOW)  # steps are for whole windows
        assert guard._learned.wholly is False
        assert "trust" not in guard.scalars


def test_chance_is_that_of_the_frames_that_statistics_follow(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of few frames vary by chance, and a moving average of many of them does not."""
    score, seen = Shift.__call__, list[int]()

    def spied(self: Shift, means: dict[str, np.ndarray], frames: int, few: float = 1.0) -> float:
        seen.append(frames)
        return score(self, means, frames, few)

    monkeypatch.setattr(Shift, "__call__", spied)
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        mix = {size: adapter.manifest.graphs[f"predict.b{size}"].defaults["mix"] for size in (1, WINDOW)}
        guard, singly, together = Guard(adapter), round((2.0 - mix[1]) / mix[1]), round(WINDOW * (2.0 - mix[WINDOW]) / mix[WINDOW])
        guard(images(WINDOW // 2, 8000)[0])
        assert seen == [singly]
        guard(images(WINDOW, 8001)[0])
        assert set(seen[1:]) == {together}
        assert singly != together
        without_room(adapter)
        guard(images(WINDOW, 8002)[0])
        assert seen[-1] == singly


def test_only_due_windows_get_steps(bundles: dict[str, Path]) -> None:
    with Adapter.open(bundles["tent"], prepared=False) as adapter:
        x = shifted(images(24 * WINDOW, 31)[0])
        list(Stream(adapter, every=4, guard=Guard(adapter, Limits(trial=100))).run(Frame(i, frame) for i, frame in enumerate(x)))
        assert 3 <= adapter.stats["steps"] <= 6


def test_what_cannot_be_guarded_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    path = Toy().write(tmp_path / "toy.edgeadapt")
    with Adapter.open(path, prepared=False) as adapter, pytest.raises(UsageError, match="does not say what that looks like"):
        Guard(adapter)
    with Adapter.open(bundles["tent"], prepared=False) as adapter, pytest.raises(UsageError, match="watches over adaptation"):
        Stream(adapter, adapt=False, guard=Guard(adapter))


class Wide(nn.Module):
    """Nearly all of its state are the statistics, scale and shift of one normalisation: 1 MiB each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n, self.fc = nn.Linear(12, 2**18), nn.BatchNorm1d(2**18), nn.Linear(2**18, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.n(self.a(x)).relu())


@pytest.mark.parametrize("statistics", ["anchored", "source"])
def test_the_bytes_that_a_guard_holds_are_what_is_said_of_them(tmp_path: Path, statistics: str) -> None:
    """Through commits and what was marked good: not more, and not so much less that one more copy would not be seen."""
    path = tmp_path / "wide.edgeadapt"
    random = np.random.default_rng(0)
    x, y = random.standard_normal((128, 12), np.float32), random.integers(0, CLASSES, 128)
    export(Wide().eval(), path, shape=(12,), data=(x, y), method="tent", statistics=statistics, batches=(32,), search=False)
    everything = Limits(trial=1, probation=2, agreement=0.0, kept=0.0, varied=0.0, mixed=0.0, most=math.inf, unsure=-math.inf)
    with Adapter.open(path, prepared=False) as adapter:
        said, one = guarding_bytes(adapter.manifest), 2 * 4 * 2**18  # what passes change, the least of its copies
        tracemalloc.start()
        guard = Guard(adapter, everything)
        for index in range(14):
            guard(3.0 + 0.2 * random.standard_normal((32, 12), np.float32) if index != 9 else x[:32])
        guard.mark_good()
        for _ in range(12):
            guard(3.0 + 0.2 * random.standard_normal((32, 12), np.float32))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert phases(guard).count("committed") >= 2
        assert said - one < peak < said


def test_the_command_line_tells_its_decisions(bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = images(12 * WINDOW, 32)
    np.savez(tmp_path / "test.npz", x=shifted(x), y=y)
    log, report = tmp_path / "verdicts.jsonl", tmp_path / "report"
    given = [str(bundles["tent"]), "--source", str(tmp_path / "test.npz"), "--no-prepared"]
    guarded = [*given, "--guard", "--verdicts", str(log), "--report", str(report), "--save", str(tmp_path / "saved")]
    assert main(["run", *guarded]) == 0
    said = capsys.readouterr()
    assert "adapting: the stream is shifted" in said.err
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["after"] for line in lines][:2] == ["observing", "adapting"]
    assert lines[1]["shift"] > 0
    assert json.loads((report / "report.json").read_text())["guard"] == lines
    within = [sys.executable, "-m", "edgeadapt", "run", *given, "--guard", "--budget", "96MiB"]
    assert "of 96 MiB" in subprocess.run(within, capture_output=True, text=True, check=True).stderr
    assert main(["run", *given, "--verdicts", str(log)]) == 2
    assert "--guard" in capsys.readouterr().err
    assert main(["run", *given, "--guard", "--no-adapt"]) == 2
    assert main(["run", *given, "--guard", "--verdicts", str(tmp_path / "no" / "file")]) == 2
