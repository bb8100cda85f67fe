"""The adapter on a toy bundle, compared with the same graphs run plainly, and in the ways a device mistreats it."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import edgeadapt
from edgeadapt import Adapter
from edgeadapt.errors import BudgetError, BundleError, InputError, StateError, UsageError
from edgeadapt.preprocess import prepare
from tests.child import ROOT, environment
from tests.toybundle import CLASSES, SIDE, Slow, Toy

pytestmark = pytest.mark.device


COUNTED = ("frames", "steps", "skipped_frames", "rejected_steps", "bad_frames", "paused_steps", "pressure_events", "abandoned_steps")
NOTHING = dict.fromkeys(COUNTED, 0)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(batches=(1, 2, 4))


@pytest.fixture(scope="module")
def path(toy, tmp_path_factory) -> Path:
    return toy.write(tmp_path_factory.mktemp("toy") / "toy.edgeadapt")


@pytest.fixture
def adapter(path) -> Adapter:
    return Adapter.open(path)


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, SIDE, SIDE), dtype=np.float32)


def labels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CLASSES, count)


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def slowly(slow: Slow, role: str, x: np.ndarray, y: np.ndarray | None = None, **hyper: float) -> np.ndarray:
    """What the adapter should give: batches of 4, then 2, then 1; steps only where there is a graph."""
    result, position = [], 0
    while position < len(x):
        batch = next(size for size in (4, 2, 1) if size <= len(x) - position)
        name = f"{role}.b{batch}" if f"{role}.b{batch}" in slow.toy.specs else f"predict.b{batch}"
        rows = slice(position, position + batch)
        result.append(slow.run(name, x[rows], y[rows] if y is not None and name.startswith("learn") else None, **hyper))
        position += batch
    return np.concatenate(result)


# ---------------------------------------------------------------------------------------------------------- the numbers

CALLS = some.lists(some.tuples(some.sampled_from(["predict", "adapt", "learn"]), some.integers(1, 11), some.integers(0, 99)), min_size=1, max_size=8)
MANY = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@MANY
@given(calls=CALLS)
def test_any_calls_give_the_numbers_of_plain_runs(toy, path, calls):
    adapter, slow = Adapter.open(path), Slow(toy)
    for role, count, seed in calls:
        x, y = frames(count, seed), labels(count, seed)
        got = adapter.learn(x, y) if role == "learn" else getattr(adapter, role)(x)
        assert np.array_equal(got, slowly(slow, role, x, y))
        assert equal(adapter.state, slow.state)


def test_adapting_gives_the_logits_before_the_update_and_then_changes_parameters(toy, path):
    adapter, other = Adapter.open(path), Adapter.open(path)
    before = adapter.state
    assert np.array_equal(adapter.adapt(frames(4)), other.predict(frames(4)))
    after = adapter.state
    assert {name for name in before if not np.array_equal(before[name], after[name])} == set(toy.specs["adapt.b4"].writes)
    assert not np.array_equal(adapter.predict(frames(4)), other.predict(frames(4)))


def test_adapting_lowers_entropy_and_learning_lowers_loss(path):
    adapter = Adapter.open(path)
    entropies = []
    for _ in range(20):
        adapter.adapt(frames(4))
        entropies.append(adapter.metrics["entropy"])
    assert entropies[-1] < entropies[0] * 0.9
    losses = []
    for _ in range(20):
        adapter.learn(frames(4), labels(4))
        losses.append(adapter.metrics["loss"])
    assert losses[-1] < losses[0] * 0.9


def test_predicting_moves_only_the_statistics_and_not_even_those_if_asked(toy, adapter):
    before = adapter.state
    first = adapter.predict(frames(4), update_statistics=False)
    assert np.array_equal(adapter.predict(frames(4), update_statistics=False), first)
    assert equal(adapter.state, before)
    adapter.predict(frames(4))
    after = adapter.state
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {"norm.mean", "norm.var"}
    mean = 0.75 * before["norm.mean"] + 0.25 * features(toy, frames(4)).mean((0, 2, 3))
    assert np.allclose(after["norm.mean"], mean, atol=1e-5)


def features(toy: Toy, x: np.ndarray) -> np.ndarray:
    """The frozen convolutions in numpy."""
    for name in ("stem", *(f"conv{level}" for level in range(toy.depth))):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
        x = np.maximum(np.einsum("nchwij,ocij->nohw", windows, toy.frozen[name]), 0)
    return x


def test_the_source_stays_what_it_was(toy, path):
    adapter, slow = Adapter.open(path), Slow(toy)
    wanted = np.concatenate([slow.run("source.b4", frames(4)), slow.run("source.b2", frames(7)[4:6]), slow.run("source.b1", frames(7)[6:])])
    wanted[:4] = slow.run("source.b4", frames(7)[:4])
    first = adapter.source(frames(7))
    assert np.array_equal(first, wanted)
    adapter.adapt(frames(20, 3))
    state, stats = adapter.state, adapter.stats
    assert np.array_equal(adapter.source(frames(7)), first)
    assert equal(adapter.state, state)
    assert adapter.stats == stats


def test_at_the_start_the_adapted_network_is_the_source(adapter):
    """A toy's scale is 1 and its shift 0, so with the statistics held it is the source to the last bit."""
    assert np.array_equal(adapter.predict(frames(5), update_statistics=False), adapter.source(frames(5)))


def test_uint8_frames_are_prepared_as_the_manifest_says(path):
    x = np.random.default_rng(3).integers(0, 256, (7, SIDE, SIDE, 3), dtype=np.uint8)
    one, two = Adapter.open(path), Adapter.open(path)
    assert np.array_equal(one.adapt(x), two.adapt(prepare(x, one.manifest.input)))
    assert equal(one.state, two.state)


def test_one_frame_gives_one_row(path):
    adapter, other = Adapter.open(path), Adapter.open(path)
    for call in ("predict", "adapt", "source"):
        row = getattr(adapter, call)(frames(1)[0])
        assert row.shape == (CLASSES,)
        assert np.array_equal(row, getattr(other, call)(frames(1))[0])
    row = adapter.learn(frames(1)[0], np.int64(2))
    assert row.shape == (CLASSES,)


def test_results_are_the_callers_own(adapter):
    first = adapter.predict(frames(4), update_statistics=False)
    kept = first.copy()
    adapter.predict(frames(4, 9))
    adapter.predict(frames(1, 9))
    assert np.array_equal(first, kept)
    first[...] = 0
    assert np.array_equal(adapter.source(frames(4)), adapter.source(frames(4)))


def test_frames_are_never_written_to(adapter):
    x = frames(9)
    x.flags.writeable = False
    adapter.adapt(x)
    adapter.adapt(x[::-1, :, ::-1])  # nor need they be contiguous
    assert np.array_equal(x, frames(9))


@pytest.mark.parametrize(("count", "steps", "skipped"), [(1, 0, 1), (2, 1, 0), (3, 1, 1), (4, 1, 0), (7, 2, 1), (8, 2, 0), (13, 3, 1)])
def test_frames_are_split_over_the_planned_batches(adapter, count, steps, skipped):
    adapter.adapt(frames(count))
    assert adapter.stats == {**NOTHING, "frames": count, "steps": steps, "skipped_frames": skipped}
    adapter.learn(frames(count), labels(count))
    assert adapter.stats["steps"] == 2 * steps
    assert adapter.stats["skipped_frames"] == 2 * skipped
    adapter.predict(frames(count))
    assert adapter.stats["steps"] == 2 * steps
    assert adapter.stats["frames"] == 3 * count


@pytest.mark.parametrize("method", ["norm", "source"])
def test_methods_without_a_step_predict_when_asked_to_adapt(tmp_path, method):
    toy = Toy(method=method)
    path = toy.write(tmp_path / "x")
    adapter, other = Adapter.open(path), Adapter.open(path)
    before = adapter.state
    assert np.array_equal(adapter.adapt(frames(9)), other.predict(frames(9)))
    assert equal(adapter.state, other.state)
    assert equal(adapter.state, before) == (method == "source")
    assert adapter.stats == {**NOTHING, "frames": 9}
    with pytest.raises(UsageError, match=rf"\({method}\) cannot learn from labels"):
        adapter.learn(frames(4), labels(4))


def test_segmentation_keeps_its_maps(tmp_path):
    toy = Toy(task="segmentation")
    adapter, slow = Adapter.open(toy.write(tmp_path / "x")), Slow(toy)
    y = np.random.default_rng(0).integers(0, CLASSES, (4, SIDE, SIDE))
    assert np.array_equal(adapter.learn(frames(4), y), slow.run("learn.b4", frames(4), y))
    assert np.array_equal(adapter.adapt(frames(4)), slow.run("adapt.b4", frames(4)))
    assert adapter.predict(frames(1)[0]).shape == (CLASSES, SIDE, SIDE)
    bad = frames(3)
    bad[1] = np.nan
    assert np.isnan(adapter.predict(bad)).all((1, 2, 3)).tolist() == [False, True, False]
    with pytest.raises(InputError, match=f"labels are whole numbers of shape 4x{SIDE}x{SIDE}"):
        adapter.learn(frames(4), labels(4))


# ----------------------------------------------------------------------------------------------------- steps that fail


@pytest.mark.parametrize("call", ["adapt", "learn"])
def test_a_step_that_is_not_finite_leaves_the_state_as_it_was_to_the_last_bit(adapter, call):
    adapter.adapt(frames(8))
    before = adapter.state
    extra = (labels(4),) if call == "learn" else ()
    logits = getattr(adapter, call)(frames(4, 2), *extra, rate=3e38, momentum=3e38)
    assert np.isfinite(logits).all()
    assert equal(adapter.state, before)
    assert adapter.stats["rejected_steps"] == 1
    assert adapter.stats["steps"] == 2
    getattr(adapter, call)(frames(4, 2), *extra)
    assert not equal(adapter.state, before)
    assert adapter.stats["steps"] == 3


def test_a_loss_that_is_not_finite_drops_the_step_whatever_the_state(adapter, monkeypatch):
    adapter.adapt(frames(4))
    before, graph = adapter.state, adapter._service.live()._graph("adapt.b4")
    session = graph.session

    class Lossy:
        io_binding = session.io_binding

        def run_with_iobinding(self, binding: Any) -> None:
            session.run_with_iobinding(binding)
            graph.metrics[graph.spec.metrics.index("loss")] = np.nan

    monkeypatch.setattr(graph, "session", Lossy())
    adapter.adapt(frames(4))
    assert equal(adapter.state, before)
    assert adapter.stats["rejected_steps"] == 1


def test_statistics_that_are_not_finite_are_dropped_too(adapter):
    before = adapter.state
    adapter.predict(frames(2) * np.float32(1e30))  # finite frames whose variance is not
    assert equal(adapter.state, before)
    assert adapter.stats["rejected_steps"] == 1
    adapter.predict(frames(2) * np.float32(1e30), update_statistics=False)
    assert equal(adapter.state, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_frames_never_reach_a_graph_and_the_rest_go_on(path, bad):
    adapter, other = Adapter.open(path), Adapter.open(path)
    x = frames(11)
    x[[0, 3, 9], 1, 2, 3] = bad
    good = np.delete(np.arange(11), [0, 3, 9])
    got = adapter.adapt(x)
    assert np.isnan(got[[0, 3, 9]]).all()
    assert np.array_equal(got[good], other.adapt(x[good]))
    assert equal(adapter.state, other.state)
    assert adapter.stats == {**other.stats, "frames": 11, "bad_frames": 3}
    y = labels(11)
    assert np.array_equal(adapter.learn(x, y)[good], other.learn(x[good], y[good]))
    assert equal(adapter.state, other.state)
    assert np.array_equal(adapter.source(x)[good], other.source(x[good]))


def test_only_bad_frames(adapter):
    before = adapter.state
    x = np.full((5, 3, SIDE, SIDE), np.nan, np.float32)
    assert np.isnan(adapter.adapt(x)).all()
    assert np.isnan(adapter.predict(x[0])).all()
    assert adapter.predict(x[0]).shape == (CLASSES,)
    assert equal(adapter.state, before)
    assert adapter.stats == {**NOTHING, "frames": 7, "bad_frames": 7}


def test_a_run_that_fails_for_want_of_memory_is_a_budget_error_and_harmless(adapter, monkeypatch):
    adapter.adapt(frames(4))
    before, graph = adapter.state, adapter._service.live()._graph("adapt.b4")

    class Full:
        io_binding = graph.session.io_binding

        def run_with_iobinding(self, binding: Any) -> None:
            raise RuntimeError("... Available memory of 8380160 is smaller than requested bytes of 8388608")

    with monkeypatch.context() as patch:
        patch.setattr(graph, "session", Full())
        with pytest.raises(BudgetError, match=r"graph adapt\.b4 failed: there is not enough memory"):
            adapter.adapt(frames(4, 1))
    assert equal(adapter.state, before)
    adapter.adapt(frames(4, 1))
    assert not equal(adapter.state, before)


# ---------------------------------------------------------------------------------------------------- the user's mistakes


@pytest.mark.parametrize("call", ["predict", "adapt", "source"])
@pytest.mark.parametrize(
    "x",
    [
        np.zeros((0, 3, SIDE, SIDE), np.float32),
        np.zeros((1, 3, SIDE, SIDE)),
        np.zeros((1, 3, 9, 9), np.float32),
        np.zeros((1, 9, 9, 1), np.uint8),
        "x",
    ],
)
def test_other_frames_are_refused(adapter, call, x):
    with pytest.raises(InputError):
        getattr(adapter, call)(x)
    assert adapter.stats["frames"] == 0


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (np.zeros(3, np.int64), "of shape 4, not int64 of shape 3"),
        (np.zeros((4, 1), np.int64), "of shape 4, not int64 of shape 4x1"),
        (np.zeros(4, np.float32), "not float32"),
        (np.zeros(4, np.bool_), "not bool"),
        (np.array([0, 1, 2, CLASSES]), f"from 0 to {CLASSES - 1}"),
        (np.array([0, 1, 2, -1]), "go from -1 to 2"),
    ],
)
def test_other_labels_are_refused(adapter, y, said):
    with pytest.raises(InputError, match=said):
        adapter.learn(frames(4), y)
    assert adapter.stats["frames"] == 0


def test_any_whole_numbers_are_labels(path):
    one, two = Adapter.open(path), Adapter.open(path)
    y = labels(4)
    assert np.array_equal(one.learn(frames(4), y.astype(np.uint8)), two.learn(frames(4), list(y)))
    assert equal(one.state, two.state)


def test_scalars_are_set_for_good_or_for_one_call(toy, path):
    adapter, slow = Adapter.open(path), Slow(toy)
    assert dict(adapter.hyper) == {"mix": 0.25, "rate": 0.05, "momentum": 0.5}
    adapter.adapt(frames(4), rate=0.5, mix=1.0)
    slow.run("adapt.b4", frames(4), rate=0.5, mix=1.0)
    assert dict(adapter.hyper) == {"mix": 0.25, "rate": 0.05, "momentum": 0.5}
    adapter.hyper["rate"] = 0
    adapter.hyper.update(mix=0.125)
    slow.hyper.update(rate=0.0, mix=0.125)
    adapter.adapt(frames(4, 1))
    slow.run("adapt.b4", frames(4, 1))
    assert equal(adapter.state, slow.state)
    adapter.hyper = {"rate": 1.0}
    assert dict(adapter.hyper) == {"mix": 0.125, "rate": 1.0, "momentum": 0.5}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("speed", 1.0, "no scalar 'speed'"), ("mix", 1.5, "out of range"), ("mix", np.nan, "out of range"), ("mix", "x", "not 'x'")],
)
def test_other_scalars_are_refused(adapter, name, value, said):
    before = dict(adapter.hyper)
    for use in (
        lambda: adapter.hyper.__setitem__(name, value),
        lambda: adapter.adapt(frames(4), **{name: value}),
        lambda: setattr(adapter, "hyper", {name: value}),
    ):
        with pytest.raises(UsageError, match=said):
            use()
    with pytest.raises(UsageError, match="cannot be removed"):
        del adapter.hyper["mix"]
    assert dict(adapter.hyper) == before
    assert adapter.stats["frames"] == 0


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_other_numbers_of_threads_are_refused(path, threads):
    with pytest.raises(UsageError, match="threads"):
        Adapter.open(path, threads=threads)


def test_a_closed_adapter_says_so(path):
    with Adapter.open(path) as adapter:
        adapter.predict(frames(1))
    adapter.close()
    for use in (lambda: adapter.predict(frames(1)), lambda: adapter.learn(frames(4), labels(4))):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(toy, tmp_path):
    def wrong(**changes: Any) -> Any:
        graphs = {**toy.specs, "predict.b1": replace(toy.specs["predict.b1"], **changes)}
        return toy.write(tmp_path / "x", graphs=graphs)

    for changes, said in (
        ({"hyper": ("mix", "rate")}, "input hyper.rate: expected the names of the manifest, got a missing one"),
        ({"reads": ("norm.mean", "norm.var", "norm.gamma", "head.bias")}, "input state.norm.beta: expected the names of the manifest, got one more"),
        ({"writes": ("norm.mean",)}, "output new.norm.var"),
        ({"metrics": ("loss",)}, "output metric.loss"),
    ):
        with pytest.raises(BundleError) as caught:
            Adapter.open(wrong(**changes))
        assert said in str(caught.value)
    with pytest.raises(BundleError, match="output logits"):
        Adapter.open(toy.write(tmp_path / "x", task=replace(toy.manifest().task, classes=CLASSES + 1, names=None)))
    with pytest.raises(BundleError, match="input x: expected"):
        Adapter.open(toy.write(tmp_path / "x", input=replace(toy.manifest().input, shape=(3, SIDE, SIDE + 1), resize=None)))


# ------------------------------------------------------------------------------------------------------ save and resume

RESUME = """
import sys
import numpy as np
from edgeadapt import Adapter
from tests.test_adapter import frames, labels
adapter = Adapter.open(sys.argv[1])
adapter.load(sys.argv[2] or None)
results = [adapter.adapt(frames(9, 5)), adapter.predict(frames(3, 6)), adapter.learn(frames(6, 7), labels(6)), adapter.source(frames(2))]
np.savez(sys.argv[3], *results, **adapter.state, stats=np.array(list(adapter.stats.values())), hyper=np.array(list(adapter.hyper.values())))
"""


@pytest.mark.parametrize("where", ["file", "slots"])
def test_stopped_and_resumed_it_gives_the_same_to_the_last_bit(toy, tmp_path, where):
    path = toy.write(tmp_path / "toy.edgeadapt")
    adapter = Adapter.open(path)
    adapter.adapt(frames(9, 1))
    adapter.hyper["rate"] = 0.123
    adapter.learn(frames(5, 2), labels(5))
    saved = adapter.save(tmp_path / "saved" if where == "file" else None)
    assert saved.parent == (tmp_path if where == "file" else tmp_path / "toy.edgeadapt.state")
    command = [sys.executable, "-c", RESUME, str(path), str(saved) if where == "file" else "", str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment())
    wanted = [adapter.adapt(frames(9, 5)), adapter.predict(frames(3, 6)), adapter.learn(frames(6, 7), labels(6)), adapter.source(frames(2))]
    with np.load(tmp_path / "out.npz") as found:
        for index, array in enumerate(wanted):
            assert found[f"arr_{index}"].tobytes() == array.tobytes()
        for name, array in adapter.state.items():
            assert found[name].tobytes() == array.tobytes()
        assert found["stats"].tolist() == list(adapter.stats.values())
        assert found["hyper"].tolist() == list(adapter.hyper.values())


def test_reset_goes_back_to_the_start(toy, adapter):
    first = adapter.adapt(frames(8))
    adapter.hyper["mix"] = 0.25
    adapter.reset()
    assert equal(adapter.state, toy.state)
    assert np.array_equal(adapter.adapt(frames(8)), first)
    assert adapter.stats["steps"] == 4


def test_loading_goes_back_and_forth_between_states(tmp_path, path):
    adapter = Adapter.open(path)
    states = []
    for seed in range(3):
        adapter.adapt(frames(4, seed))
        adapter.save(tmp_path / f"{seed}")
        states.append(adapter.state)
    for seed in (1, 0, 2, 0):
        adapter.load(tmp_path / f"{seed}")
        assert equal(adapter.state, states[seed])
        assert adapter.stats["steps"] == seed + 1
        adapter.adapt(frames(12, 9))


def test_a_folder_of_slots_can_be_named(toy, tmp_path):
    adapter = Adapter.open(toy.write(tmp_path / "x"))
    adapter.adapt(frames(4))
    adapter.save()
    other = Adapter.open(toy.write(tmp_path / "y"))
    other.load(tmp_path / "x.state")
    assert equal(other.state, adapter.state)


def test_a_state_that_cannot_be_loaded_changes_nothing(tmp_path, path):
    adapter = Adapter.open(path)
    stranger = Adapter.open(Toy(width=4).write(tmp_path / "other"))
    stranger.save(tmp_path / "strange")
    adapter.adapt(frames(4))
    before, stats = adapter.state, adapter.stats
    adapter.save(tmp_path / "mine")
    (tmp_path / "torn").write_bytes((tmp_path / "mine").read_bytes()[:-1])
    for name, said in (("strange", "is the state of"), ("torn", "sound"), ("gone", "cannot be read")):
        with pytest.raises(StateError, match=said):
            adapter.load(tmp_path / name)
    assert equal(adapter.state, before)
    assert adapter.stats == stats


def test_the_state_can_be_put_back_by_hand(adapter):
    adapter.adapt(frames(4))
    kept = adapter.state
    adapter.adapt(frames(8, 1))
    adapter.state = kept
    assert equal(adapter.state, kept)
    with pytest.raises(StateError, match=r"'norm\.mean' holds NaN"):
        adapter.state = {**kept, "norm.mean": np.full_like(kept["norm.mean"], np.nan)}
    with pytest.raises(StateError, match="is missing"):
        adapter.state = {}
    assert equal(adapter.state, kept)


# -------------------------------------------------------------------------------------------------------------- threads


def test_some_of_the_state_can_be_read_and_put_back(adapter):
    before = adapter.state
    some = adapter.tensors(["norm.gamma", "norm.mean"])
    assert list(some) == ["norm.gamma", "norm.mean"]
    adapter.adapt(frames(4))
    after = adapter.state
    assert (some["norm.gamma"] == before["norm.gamma"]).all(), "it is a copy"
    adapter.put(some)
    for name, value in adapter.state.items():
        assert (value == (before if name in some else after)[name]).all(), name
    with pytest.raises(StateError, match=r"norm\.gamma"):
        adapter.put({"norm.gamma": np.zeros(3, np.float32)})
    with pytest.raises(StateError, match="unknown"):
        adapter.put({"unknown": np.zeros(3, np.float32)})
    assert (adapter.state["norm.mean"] == before["norm.mean"]).all()


def test_predictions_take_scalars_for_one_call(path):
    with Adapter.open(path) as adapter, Adapter.open(path) as other:
        other.hyper["mix"] = 0.75
        assert (adapter.predict(frames(4), mix=0.75) == other.predict(frames(4))).all()
        assert "mix" not in adapter.hyper.chosen
        assert (adapter.state["norm.mean"] == other.state["norm.mean"]).all()
        with pytest.raises(UsageError, match="mix = 2 is out of range"):
            adapter.predict(frames(4), mix=2.0)


def test_predictions_beside_adaptation_always_see_a_whole_state(path):
    """Each must be that of the state before or after one of the steps; a torn read would be neither."""
    steps, x = 30, frames(3, 77)
    plain = Adapter.open(path)
    allowed = {plain.predict(x, update_statistics=False).tobytes()}
    for seed in range(steps):
        plain.adapt(frames(4, seed))
        allowed.add(plain.predict(x, update_statistics=False).tobytes())
    # x is split in two, and a step may come between: compare the halves
    halves = {part for whole in allowed for part in (whole[: 2 * CLASSES * 4], whole[2 * CLASSES * 4 :])}
    adapter, done, seen, faults = Adapter.open(path), threading.Event(), [0], []

    def predict() -> None:
        while not done.is_set() or not seen[0]:
            got = adapter.predict(x, update_statistics=False).tobytes()
            seen[0] += 1
            if not {got[: 2 * CLASSES * 4], got[2 * CLASSES * 4 :]} <= halves:
                faults.append(got)

    threads = [threading.Thread(target=predict) for _ in range(2)]
    for thread in threads:
        thread.start()
    for seed in range(steps):
        adapter.adapt(frames(4, seed))
    done.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert equal(adapter.state, plain.state)


def test_a_waiting_call_gets_the_next_turn(path):
    """A thread that goes from run to run cannot take its next turn before one that already waits."""
    adapter = Adapter.open(path)
    order: list[str] = []

    def predict() -> None:
        with adapter._serving.turn():
            order.append("waited")

    thread = threading.Thread(target=predict)
    with adapter._serving.turn():
        thread.start()
        while not adapter._serving.turn.gate.locked():
            time.sleep(0.001)
    with adapter._serving.turn():
        order.append("went on")
    thread.join()
    assert order == ["waited", "went on"]


def test_many_batches_are_as_many_turns(path, monkeypatch):
    adapter = Adapter.open(path)
    turns: list[int] = []
    real = adapter._serving.turn
    monkeypatch.setattr(adapter._serving, "turn", lambda: turns.append(1) or real())
    adapter.adapt(frames(4 * 5 + 3))
    assert len(turns) == 7


# --------------------------------------------------------------------------------------------------------------- memory


def test_a_budget_that_does_not_fit_is_refused_with_every_line(path):
    with pytest.raises(BudgetError) as caught:
        Adapter.open(path, budget="1MiB")
    text = str(caught.value)
    lines = ("resident now", "region", "weights", "graph structures", "code", "state", "frames and logits", "process's peak", "budget", "missing")
    for line in lines:
        assert re.search(rf"\n  {line} +[0-9,]+ B ", text), line
    assert "1,048,576 B" in text
    assert "give a budget that is enough: predict only, at batch 1, needs" in text
    with Adapter.open(path, budget="8GiB") as adapter:  # the refused one holds no claim
        assert adapter.memory["budget"] == 2**33


def test_one_budget_a_process(path):
    with Adapter.open(path, budget="8GiB"):
        with pytest.raises(BudgetError, match="has an adapter with a budget of 8 GiB; a second one cannot have 12 GiB"):
            Adapter.open(path, budget="12GiB")
        with Adapter.open(path, budget=2**33) as same, Adapter.open(path) as unbounded:
            assert same.memory["budget"] == 2**33
            assert unbounded.memory["budget"] is None
    with Adapter.open(path, budget="12GiB"):
        pass
    Adapter.open(path, budget="16GiB")  # let go of without closing
    gc.collect()
    Adapter.open(path, budget="20GiB").close()


def test_an_adapter_that_could_not_be_opened_holds_no_claim(toy, path, tmp_path):
    specs = {**toy.specs, "predict.b1": replace(toy.specs["predict.b1"], metrics=("loss",))}
    with pytest.raises(BundleError) as kept:  # with its traceback, and so the adapter that never was
        Adapter.open(toy.write(tmp_path / "x", graphs=specs), budget="8GiB")
    Adapter.open(path, budget="12GiB").close()
    assert kept.value.exit_code == 4


def test_memory_is_reported(adapter, path):
    report = adapter.memory
    facts = {"resident", "peak", "budget", "planned", "level", "reason", "graphs", "missing"}
    assert report["planned"] == sum(size for name, size in report.items() if name not in facts)
    assert 0 < report["resident"] <= report["peak"] * 1.05
    assert adapter.bundle.weights_size <= report["weights"] <= -(-path.stat().st_size // 4096) * 4096
    assert report["state"] == sum(2 * max(64, 4 * spec.size) for spec in adapter.manifest.state)
    assert (report["level"], report["reason"], report["missing"]) == (0, "", ())
    assert set(report["graphs"]) == set(adapter.manifest.graphs)


def in_a_fresh_process(code: str, *arguments: str) -> Any:
    command = [sys.executable, "-c", code, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment()).stdout)


SERVE = """
import json, sys
import numpy as np
import edgeadapt
adapter = edgeadapt.Adapter.open(sys.argv[1], budget="1GiB")
x = np.zeros((5, 6, 6, 3), np.uint8)
adapter.predict(x), adapter.adapt(x), adapter.source(x), adapter.learn(x, np.zeros(5, np.int64))
adapter.save(sys.argv[2]), adapter.load(sys.argv[2])
print(json.dumps(sorted(sys.modules)))
"""


def test_serving_loads_neither_torch_nor_onnx_nor_what_costs_memory(path, tmp_path):
    loaded = set(in_a_fresh_process(SERVE, str(path), str(tmp_path / "state")))
    assert "onnxruntime" in loaded
    assert loaded & {"torch", "onnx", "google.protobuf", "hashlib", "zipfile", "tempfile", "PIL", "asyncio", "numpy.random"} == set()


def test_importing_edgeadapt_loads_neither_onnxruntime_nor_torch():
    loaded = set(
        in_a_fresh_process(
            "import json, sys, edgeadapt; edgeadapt.errors; edgeadapt.__version__; dir(edgeadapt); print(json.dumps(sorted(sys.modules)))"
        )
    )
    assert loaded & {"torch", "onnx", "onnxruntime", "numpy", "edgeadapt.runtime", "edgeadapt.bundle"} == set()


def test_the_lazy_names():
    assert edgeadapt.Adapter is Adapter
    assert set(edgeadapt.__all__) <= set(dir(edgeadapt))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = edgeadapt.nothing


SECOND = """
import json, sys
import numpy as np
from edgeadapt import Adapter
from edgeadapt.runtime.memory import resident
adapter = Adapter.open(sys.argv[1])
x = np.zeros((4, 3, 6, 6), np.float32)
adapter.predict(x[:1])
grown = []
for use in (lambda: adapter.predict(x), lambda: adapter.adapt(x), lambda: adapter.source(x[:1]), lambda: [adapter.adapt(x) for _ in range(30)]):
    before = resident()
    use()
    grown.append(resident() - before)
print(json.dumps(grown))
"""


@pytest.mark.native
def test_further_sessions_share_the_weights(tmp_path):
    """Each would take another 21 MB if it mapped them again."""
    path = Toy(width=256, depth=9).write(tmp_path / "big")
    assert path.stat().st_size > 20e6
    grown = in_a_fresh_process(SECOND, str(path))
    assert max(grown) < 2e6
    assert sum(grown) < 4e6
