"""Steps in pieces on the device: they are the whole step, they are chosen where only they fit, and others get their turns between the runs."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeadapt import Adapter
from edgeadapt.bundle import Bundle, Form, Manifest
from edgeadapt.cli.main import main
from edgeadapt.devices.boards import floor
from edgeadapt.errors import BundleError
from edgeadapt.memory import footprint, read, simulate
from edgeadapt.memory.ledger import Setup, ledger
from edgeadapt.memory.measured import compare, measure
from edgeadapt.memory.rules import misplaced_sums
from edgeadapt.memory.simulation import Choice as MemoryChoice
from edgeadapt.runtime import loading
from edgeadapt.runtime.choice import Choice, alone, choose, everything, wanted
from edgeadapt.runtime.engine import Engine
from edgeadapt.runtime.memory import Needs, planned
from edgeadapt.runtime.preparing import make
from edgeadapt.runtime.pressure import Level, Marks, Pressure, Sign, Signs
from edgeadapt.runtime.serving import Serving
from edgeadapt.runtime.state import FlatState
from tests.child import run_json
from tests.piecestoy import PiecesToy
from tests.test_simulate import Bench
from tests.toybundle import CLASSES, SIDE

pytestmark = pytest.mark.device

BATCH, MICRO = 8, (1, 2, 4)
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PiecesToy(width=16, batches=(1, 4, BATCH), micro=MICRO).write(tmp_path_factory.mktemp("pieces") / "toy.edgeadapt")


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, SIDE, SIDE), dtype=np.float32)


def labels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CLASSES, count)


def in_form(path: Path, micro: int, pressure: Pressure | None = None) -> Adapter:
    """An adapter that takes its steps of the largest batch in pieces of `micro`, or at once for 0, all else at once."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    steps = [next(form for form in manifest.forms(role, BATCH) if form.micro == micro) for role in ("adapt", "learn")]
    forms = (*alone(manifest, ["predict.b1", "source.b1", "predict.b4"]), *steps)
    names = list(dict.fromkeys(name for form in forms for name in form.graphs))
    plan = planned(Needs(bundle, 1), names, frames=BATCH)
    state = FlatState(manifest.state, {name: manifest.graphs[name] for name in names}, bundle.initial_state())
    least = planned(Needs(bundle, 1), ["predict.b1", "source.b1"])
    return Adapter(bundle, loading.Loaded(Choice(plan, least, (), forms), state, loading.load(bundle, state, 1, plan)), None, 1, pressure)


def close(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.allclose(left[name], right[name], **ROUNDING) for name in left)


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def margins(adapter: Adapter, x: np.ndarray) -> dict[int, float]:
    """By how many of the frames are selected, a margin that does it."""
    logits = adapter.predict(x).astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    levels = np.sort(-(p * np.log(p)).sum(1) / math.log(CLASSES))
    edges = [0.0, *((a + b) / 2 for a, b in zip(levels, levels[1:])), 2.0]
    return dict(enumerate(edges))


# ------------------------------------------------------------------------------------------------------- the same step


@pytest.mark.parametrize("micro", MICRO)
@pytest.mark.parametrize("selected", [0, 1, 3, BATCH])
def test_a_step_in_pieces_is_the_whole_step(path, micro, selected):
    whole, pieces = in_form(path, 0), in_form(path, micro)
    x = frames(BATCH)
    start, margin = whole.state, margins(in_form(path, 0), x)[selected]
    for step in range(3):
        want, got = (adapter.adapt(x, margin=margin if step == 0 else 0.9) for adapter in (whole, pieces))
        assert np.allclose(want, got, **ROUNDING)
        assert close(whole.state, pieces.state), step
        assert whole.metrics == pytest.approx(pieces.metrics, rel=1e-5)
        if step == 0:
            assert whole.metrics["selected"] == selected / BATCH
    assert pieces.stats == whole.stats
    assert pieces.stats["steps"] == 3
    assert not close(start, pieces.state)


@pytest.mark.parametrize("micro", MICRO)
def test_learning_in_pieces_is_the_whole_step(path, micro):
    whole, pieces = in_form(path, 0), in_form(path, micro)
    start = whole.state
    for seed in range(3):
        want, got = (adapter.learn(frames(BATCH, seed), labels(BATCH, seed)) for adapter in (whole, pieces))
        assert np.allclose(want, got, **ROUNDING)
        assert close(whole.state, pieces.state)
        assert whole.metrics == pytest.approx(pieces.metrics, rel=1e-5)
    assert np.abs(pieces.state["head.bias"] - start["head.bias"]).max() > 1e-3


def test_the_rate_of_a_step_in_pieces_is_that_of_its_batch(tmp_path):
    """And what the caller gives goes before it."""
    toy = PiecesToy(width=8, batches=(1, 4, BATCH), micro=(2,))
    toy.specs["adapt.b8"] = dataclasses.replace(toy.specs["adapt.b8"], defaults={"rate": 0.5, "margin": 5.0})
    place = toy.write(tmp_path / "toy.edgeadapt")
    whole, pieces = in_form(place, 0), in_form(place, 2)
    for change in ({}, {"rate": 0.01}):
        whole.adapt(frames(BATCH), **change)
        pieces.adapt(frames(BATCH), **change)
        assert close(whole.state, pieces.state)
        assert whole.metrics["selected"] == pieces.metrics["selected"] == 1.0
    assert not close(in_form(path=place, micro=0).state, pieces.state)


def test_frames_that_are_not_finite_are_no_part_of_a_step(path):
    whole, pieces = in_form(path, 0), in_form(path, 2)
    x = frames(BATCH + 3)
    x[[1, 4, 9]] = np.nan
    want, got = (adapter.adapt(x) for adapter in (whole, pieces))
    assert np.allclose(want, got, equal_nan=True, **ROUNDING)
    assert np.isnan(got[[1, 4, 9]]).all()
    assert np.isfinite(np.delete(got, [1, 4, 9], 0)).all()
    assert close(whole.state, pieces.state)
    assert pieces.stats["steps"] == 1
    assert pieces.stats["bad_frames"] == 3


def test_a_step_that_is_not_finite_is_dropped_and_leaves_nothing_behind(path):
    pieces, twin = in_form(path, 2), in_form(path, 2)
    before = pieces.state
    pieces.adapt(np.full((BATCH, 3, SIDE, SIDE), 3e38, np.float32))
    assert np.isnan(pieces._service.live().sums).any()
    assert (pieces.stats["rejected_steps"], pieces.stats["steps"]) == (1, 0)
    assert same(pieces.state, before)
    pieces.adapt(frames(BATCH))
    twin.adapt(frames(BATCH))
    assert same(pieces.state, twin.state)


def test_batches_that_are_not_whole_are_served_as_ever(path):
    pieces = in_form(path, 4)
    assert np.isfinite(pieces.adapt(frames(2 * BATCH + 3))).all()
    assert (pieces.stats["steps"], pieces.stats["skipped_frames"]) == (2, 3)


# ------------------------------------------------------------------------------------------------------- between the runs


def between(adapter: Adapter, monkeypatch: pytest.MonkeyPatch, at: int, then: Callable[[], object]) -> list[int]:
    """Has `then` done by another thread when run number `at` (from 1) is over; the runs so far. The caller's thread waits for it."""
    runs: list[int] = []
    real = Serving._run

    def run(self: Serving, *arguments: Any) -> Any:
        found = real(self, *arguments)
        if threading.current_thread() is caller:
            runs.append(1)
        return found

    turn = adapter._serving.turn
    caller = threading.current_thread()

    def turns() -> Any:
        if threading.current_thread() is caller and len(runs) == at and not done:
            done.append(1)
            other = threading.Thread(target=then)
            other.start()
            other.join(20)
            assert not other.is_alive()
        return turn()

    done: list[int] = []
    monkeypatch.setattr(Serving, "_run", run)
    monkeypatch.setattr(adapter._serving, "turn", turns)
    return runs


def test_a_prediction_of_another_thread_is_served_between_the_runs(path, monkeypatch):
    pieces, twin = in_form(path, 2), in_form(path, 2)
    x, got, steps = frames(5, 7), [], []
    runs = between(pieces, monkeypatch, 2, lambda: (got.append(pieces.predict(x)), steps.append((pieces.stats["steps"], len(runs)))))
    logits = pieces.adapt(frames(BATCH))
    assert steps == [(0, 2)]
    assert np.array_equal(got[0], twin.predict(x))
    assert np.array_equal(logits, twin.adapt(frames(BATCH)))
    assert same(pieces.state, twin.state)
    assert pieces.stats["abandoned_steps"] == 0


@pytest.mark.parametrize("how", ["reset", "load", "state"])
def test_a_state_put_in_place_between_the_runs_ends_the_step(path, tmp_path, monkeypatch, how):
    pieces, twin = in_form(path, 2), in_form(path, 2)
    pieces.adapt(frames(BATCH, 1))
    moved = pieces.state
    pieces.save(tmp_path / "saved")
    pieces.adapt(frames(BATCH, 2))
    initial = twin.state
    then: dict[str, Callable[[], object]] = {
        "reset": pieces.reset,
        "load": lambda: pieces.load(tmp_path / "saved"),
        "state": lambda: setattr(pieces, "state", moved),
    }
    between(pieces, monkeypatch, 3, then[how])
    before, x = pieces.state, frames(BATCH, 3)
    logits = pieces.adapt(x)
    now = initial if how == "reset" else moved
    assert same(pieces.state, now)
    for rows, state in ((slice(0, 6), before), (slice(6, 8), now)):  # what is left of the step is predicted
        twin.state = state
        assert np.allclose(logits[rows], twin.predict(x)[rows], **ROUNDING)
    assert pieces.stats["abandoned_steps"] == 1
    assert pieces.stats["steps"] == (1 if how == "load" else 2)
    assert (pieces.stats["skipped_frames"], pieces.stats["rejected_steps"]) == (0, 0)
    monkeypatch.undo()
    twin.state = pieces.state
    pieces.adapt(frames(BATCH, 4))
    twin.adapt(frames(BATCH, 4))
    assert same(pieces.state, twin.state)


def test_a_step_of_another_thread_waits_for_the_end(path, monkeypatch):
    """It is called between two runs of a step, and begins when that has ended."""
    pieces, twin = in_form(path, 1), in_form(path, 1)
    other = threading.Thread(target=pieces.adapt, args=(frames(BATCH, 1),))

    def call() -> None:
        other.start()
        while other.is_alive() and not pieces._serving._step.gate.locked():
            time.sleep(0.001)

    real, begun = Engine.begin, []
    monkeypatch.setattr(Engine, "begin", lambda self: (begun.append(pieces.stats["steps"]), real(self))[1])
    between(pieces, monkeypatch, 3, call)
    pieces.adapt(frames(BATCH))
    other.join()
    assert begun == [0, 1]
    monkeypatch.undo()
    for seed in (0, 1):
        twin.adapt(frames(BATCH, seed))
    assert same(pieces.state, twin.state)


class Script(Signs):
    """Says what it is told to."""

    def __init__(self) -> None:
        self.grade = 0

    def read(self, more: int = 0, relief: bool = False) -> Sign:
        return Sign(self.grade, "made up" if self.grade else "")


def clocked(tick: float = 1.0) -> Pressure:
    now = [0.0]

    def clock() -> float:
        now[0] += tick
        return now[0]

    return Pressure(Script(), Marks(interval=0.5, dwell=0.5, calm=4.0), clock)


@pytest.mark.parametrize("grade", [1, 2])
def test_memory_that_runs_short_between_the_runs_pauses_the_step(path, monkeypatch, grade):
    pieces, twin = in_form(path, 2, pressure := clocked()), in_form(path, 2)
    pieces.adapt(frames(BATCH))
    before, x = pieces.state, frames(BATCH, 1)
    between(pieces, monkeypatch, 2, lambda: setattr(pressure.signs, "grade", grade))
    logits = pieces.adapt(x)
    twin.state = before
    assert np.allclose(logits, twin.predict(x), **ROUNDING)
    assert same(pieces.state, before)
    assert (pieces.stats["steps"], pieces.stats["paused_steps"], pieces.stats["abandoned_steps"]) == (1, 1, 0)
    assert pieces.stats["pressure_events"] >= 1
    monkeypatch.undo()
    pressure.signs.grade = 0
    while pieces.memory["level"]:
        pieces.predict(frames(1))
    pieces.adapt(x)
    twin.adapt(x)
    assert same(pieces.state, twin.state)
    assert pieces.stats["steps"] == 2


@pytest.mark.parametrize("graph", ["adapt-sums.b2", "adapt-update"])
def test_a_run_that_is_refused_memory_pauses_the_step(path, monkeypatch, graph):
    pieces, twin = in_form(path, 2, clocked(0.0)), in_form(path, 2)
    session = pieces._service.live()._graph(graph).session

    class Full:
        io_binding = session.io_binding

        def run_with_iobinding(self, binding: Any) -> None:
            raise RuntimeError("... Available memory of 8380160 is smaller than requested bytes of 8388608")

    monkeypatch.setattr(pieces._service.live()._graph(graph), "session", Full())
    before = pieces.state
    assert np.allclose(pieces.adapt(frames(BATCH)), twin.predict(frames(BATCH)), **ROUNDING)
    assert same(pieces.state, before)
    assert pieces.stats["paused_steps"] == 1
    assert pieces.memory["level"] == Level.PAUSED


def test_graphs_that_are_loaded_anew_between_the_runs_end_the_step(path, monkeypatch):
    pieces = in_form(path, 2, clocked(0.0))
    before = pieces.state
    between(pieces, monkeypatch, 2, lambda: pieces._service._load(Level.NORMAL))
    assert np.isfinite(pieces.adapt(frames(BATCH))).all()
    assert same(pieces.state, before)
    assert pieces.stats["abandoned_steps"] == 1


# ------------------------------------------------------------------------------------------------------- what is chosen


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy = PiecesToy(width=64, depth=3, batches=(1, 4, 64), micro=(1, 16))
    return toy.write(tmp_path_factory.mktemp("large") / "toy.edgeadapt")


def taken(bundle: Bundle, budget: int, roles: Any = None, batches: Any = None) -> dict[tuple[str, int], int]:
    """For each step that a budget has room for, by role and batch, the frames of a piece."""
    found = choose(Needs(bundle, 1), wanted(bundle.manifest, roles, batches), budget, 0)
    assert set(found.plan.graphs) == {name for form in found.forms for name in form.graphs}
    return {(form.role, form.batch): form.micro for form in found.forms if form.role in ("adapt", "learn")}


def test_without_a_budget_steps_are_taken_at_once(large):
    bundle = Bundle.open(large)
    found = everything(Needs(bundle, 1, counted=False), wanted(bundle.manifest, None, None))
    assert not any(form.micro for form in found.forms)
    assert not any("sums" in name or "update" in name for name in found.plan.graphs)


@pytest.mark.usefixtures("light_start")
def test_pieces_are_taken_before_a_smaller_batch_and_the_largest_that_fit(large):
    bundle = Bundle.open(large)
    needs = Needs(bundle, 1)

    def total(*names: str) -> int:
        return planned(needs, ["predict.b1", *names], False, frames=64).total

    whole, sixteen, single = total("adapt.b64"), total("adapt-sums.b16", "adapt-update"), total("adapt-sums.b1", "adapt-update")
    assert single < sixteen < whole
    assert taken(bundle, whole, "adapt", [64]) == {("adapt", 64): 0}
    assert taken(bundle, whole - 1, "adapt", [64]) == {("adapt", 64): 16}
    assert taken(bundle, sixteen, "adapt", [64]) == {("adapt", 64): 16}
    assert taken(bundle, sixteen - 1, "adapt", [64]) == {("adapt", 64): 1}
    assert taken(bundle, total("adapt.b4") + 200_000, "adapt")[("adapt", 64)] == 1  # where a smaller batch would fit at once
    assert taken(bundle, 2**30) == dict.fromkeys([("adapt", 64), ("adapt", 4), ("learn", 64), ("learn", 4)], 0)


def test_what_is_planned_has_a_line_for_the_sums(large):
    bundle = Bundle.open(large)
    names = ["predict.b1", "adapt-sums.b1", "adapt-update"]
    used = [spec for spec in bundle.manifest.sums if spec.name in bundle.manifest.graphs["adapt-update"].sums]
    lines = planned(Needs(bundle, 1), names).lines()
    assert lines["sums"] == footprint.sums_bytes(spec.shape for spec in used) == sum(-(-math.prod(spec.shape) // 16) * 64 for spec in used)
    state = FlatState(bundle.manifest.state, {name: bundle.manifest.graphs[name] for name in names}, bundle.initial_state())
    assert Engine(bundle, state, 1, names).sums.nbytes == lines["sums"]
    assert "sums" not in planned(Needs(bundle, 1), ["predict.b1", "adapt.b4"]).lines()


FITTING = """
import json, sys
import numpy as np
from edgeadapt import Adapter
from edgeadapt.errors import BudgetError
path, steps = sys.argv[1], int(sys.argv[2])
frame = np.sin(np.arange(256 * 3 * 36, dtype=np.float32)).reshape(256, 3, 6, 6)
try:
    Adapter.open(path, "1MiB", roles="adapt", batches=[256])
except BudgetError as refusal:
    needed = {words[0]: int(words[-2]) for words in (part.split() for part in refusal.hint.split(": ")[1].split("; ")[:-1])}
budget = needed["adapt"] * 2**20
adapter = Adapter.open(path, budget, roles="adapt", batches=[256])
for step in range(steps):
    adapter.adapt(frame)
    adapter.predict(frame[:1])
memory = adapter.memory
print(json.dumps({"budget": budget, "peak": memory["peak"], "graphs": memory["graphs"], "stats": adapter.stats, "level": memory["level"]}))
"""


@pytest.mark.native
def test_a_budget_in_which_only_pieces_fit_is_kept(tmp_path):
    path = PiecesToy(width=256, batches=(1, 4, 256), micro=(1, 16)).write(tmp_path / "toy.edgeadapt")
    found = run_json([sys.executable, "-c", FITTING, str(path), "20"])
    assert {"adapt-sums.b16", "adapt-update"} < set(found["graphs"])
    assert "adapt.b256" not in found["graphs"]
    assert found["peak"] <= found["budget"]
    assert (found["stats"]["steps"], found["level"]) == (20, 0)


# ------------------------------------------------------------------------------------------------------- foretold


@pytest.mark.usefixtures("light_start")
def test_the_simulator_lists_steps_in_pieces(large, capsys):
    bundle = Bundle.open(large)
    found = simulate(bundle, Bench(), "adapt", 64)
    forms = {choice.micro: choice for choice in found.choices if choice.role == "adapt" and choice.batch == 64 and choice.prepacking}
    assert list(forms) == [1, 16, 0]  # least memory first
    assert forms[1].graphs == ("predict.b1", "adapt-sums.b1", "adapt-update")
    assert forms[1].words == "adapt at batch 64 (in pieces of 1)"
    assert forms[0].seconds < forms[16].seconds < forms[1].seconds
    tight = simulate(bundle, Bench(), "adapt", 64, budget=forms[16].total)
    assert tight.choice.micro == 16
    assert tight.ledger.total == tight.choice.total
    assert tight.ledger["sums"].bytes == footprint.sums_used(bundle.manifest, tight.choice.graphs)
    assert main(["simulate", str(large), "--role", "adapt", "--board", "pi5"]) == 0
    assert "in pieces of" in capsys.readouterr().out
    assert main(["inspect", str(large)]) == 0
    assert "adapt-update" in capsys.readouterr().out


@pytest.mark.native
@pytest.mark.parametrize("micro", [1, 16])
def test_what_is_measured_is_what_was_predicted(large, micro):
    bundle, names = Bundle.open(large), ("predict.b1", f"adapt-sums.b{micro}", "adapt-update")
    here, found = floor.look(), measure(large, MemoryChoice("adapt", 64, names[1], names, True, 0, 0.0, micro=micro))
    told = ledger(bundle, Setup(names, here.floor, frames=64, started=here.code))
    lines = {line["name"]: line for line in compare(told, found, here.floor - here.code)}
    assert lines["process's peak"]["predicted"] == pytest.approx(found["peak"], rel=0.04)
    region = lines["region for tensors"]
    assert abs(region["predicted"] - region["measured"]) <= 65536 + 2 * 4096
    assert 0 <= lines["sums"]["measured"] - lines["sums"]["predicted"] <= 2 * 4096


def test_pieces_are_prepared_too(path, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEADAPT_CACHE", str(tmp_path))
    bundle = Bundle.open(path)
    found = make(bundle)
    for name, graph in found.record["graphs"].items():
        for level in graph["versions"].values():
            assert not {key: value for key, value in level.get("apart", {}).items() if not value < 1e-3}, name
        if name.endswith(("b1", "b2", "b4")) and "-sums" in name and name in found.graphs:
            assert not misplaced_sums(read(found.graphs[name].model.read_bytes()), bundle.manifest.graphs[name].sums)
    assert found.record["graphs"]["adapt-update"]["versions"]["emitted"]["nodes"]
    whole = in_form(path, 0)
    names = ["predict.b1", "adapt-sums.b2", "adapt-update"]
    manifest = bundle.manifest
    state = FlatState(manifest.state, {name: manifest.graphs[name] for name in names}, bundle.initial_state())
    forms = (*alone(manifest, names[:1]), Form("adapt", BATCH, tuple(names[1:]), 2))
    plan = planned(Needs(bundle, 1, found), names, frames=BATCH)
    prepared = Adapter(bundle, loading.Loaded(Choice(plan, plan, (), forms), state, loading.load(bundle, state, 1, plan, found), found), None, 1)
    for seed in range(3):
        assert np.allclose(whole.adapt(frames(BATCH, seed)), prepared.adapt(frames(BATCH, seed)), atol=1e-4)
    assert all(np.allclose(value, prepared.state[name], atol=1e-4) for name, value in whole.state.items())


# ------------------------------------------------------------------------------------------------------- the format


def changed(path: Path, *changes: tuple[str, Any]) -> dict[str, Any]:
    """The manifest with values put at dotted places; `...` takes one away."""
    plain = copy.deepcopy(Bundle.open(path).manifest.to_json())
    for place, value in changes:
        *way, last = place.split("/")
        inner: Any = plain
        for key in way:
            inner = inner[int(key) if isinstance(inner, list) else key]
        if value is ...:
            del inner[int(last) if isinstance(inner, list) else last]
        else:
            inner[int(last) if isinstance(inner, list) else last] = value
    return plain


def moved(plain: dict[str, Any], old: str, new: str, **changes: Any) -> dict[str, Any]:
    graphs = plain["graphs"]
    graphs[new] = {**graphs.pop(old), "path": f"graphs/{new}.onnx", **changes}
    return plain


MALFORMED: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "sums without an update": (lambda path: changed(path, ("graphs/adapt-update", ...)), "a graph adapt-update, which ends the step"),
    "an update without sums": (
        lambda path: changed(path, *((f"graphs/learn-sums.b{size}", ...) for size in MICRO)),
        "expected graphs learn-sums of the same sums",
    ),
    "live statistics": (lambda path: changed(path, ("statistics/mode", "live")), "no steps in pieces where statistics follow the stream"),
    "no part of a batch": (lambda path: moved(changed(path), "adapt-sums.b2", "adapt-sums.b3", batch=3), "a part of a batch of adapt"),
    "a whole batch": (lambda path: moved(changed(path), "adapt-sums.b2", "adapt-sums.b8", batch=8), "a part of a batch of adapt"),
    "other sums": (lambda path: changed(path, ("graphs/adapt-sums.b2/sums/0", ...)), "graphs adapt-sums of the same sums"),
    "an unknown sum": (lambda path: changed(path, ("graphs/adapt-sums.b2/sums/0", "count.none")), "names of sums, in a graph of a step in pieces"),
    "a sum twice": (lambda path: changed(path, ("sums/1/name", "count.all")), "every name once"),
    "no sums": (lambda path: changed(path, ("graphs/adapt-sums.b2/sums", ...)), "names of sums, in a graph of a step in pieces"),
    "sums of a whole step": (lambda path: changed(path, ("graphs/adapt.b4/sums", ["count.all"])), "no sums, in a graph that is run alone"),
    "state written by a piece": (lambda path: changed(path, ("graphs/adapt-sums.b2/writes", ["norm.beta"])), "no new state"),
    "an update of other state": (lambda path: changed(path, ("graphs/adapt-update/writes/0", ...)), "what the adapt graphs write"),
    "an update with frames": (lambda path: changed(path, ("graphs/adapt-update/batch", 4)), "the name adapt-update.b4"),
    "a piece without frames": (lambda path: changed(path, ("graphs/adapt-sums.b2/batch", 0)), "at least 1"),
    "a lean piece": (lambda path: moved(changed(path), "adapt-sums.b2", "adapt-sums.b2.lean", variant="lean"), "which it is a variant of"),
    "a shape of text": (lambda path: changed(path, ("sums/0/shape", "1")), "a list"),
    "an unknown key": (lambda path: changed(path, ("sums/0/kind", "sum")), "not known in this format"),
    "another role": (lambda path: moved(changed(path), "adapt-sums.b2", "predict-sums.b2", role="predict-sums"), "keys like"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_manifests_are_refused(path, case):
    make_it, told = MALFORMED[case]
    with pytest.raises(BundleError) as refused:
        Manifest.from_json(make_it(path))
    assert told in refused.value.message


def test_a_manifest_is_read_as_it_was_written(path):
    manifest = Bundle.open(path).manifest
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert [form.micro for form in manifest.forms("adapt", BATCH)] == [0, 4, 2, 1]
    assert [form.micro for form in manifest.forms("adapt", 4)] == [0, 2, 1]
    assert manifest.planned("adapt") == (BATCH, 4)
    assert manifest.forms("predict", BATCH) == (Form("predict", BATCH, ("predict.b8",)),)


def test_graphs_that_contradict_the_manifest_are_refused(tmp_path):
    toy = PiecesToy(width=8, batches=(1, 4), micro=(2,))
    toy.sums["gradient.all.norm.beta"] = (9,)
    with pytest.raises(BundleError, match=r"sum\.gradient\.all\.norm\.beta"):
        in_toy(toy.write(tmp_path / "toy.edgeadapt"), "adapt-update")
    with pytest.raises(BundleError, match=r"input sum\.gradient\.all\.norm\.beta"):
        in_toy(tmp_path / "toy.edgeadapt", "adapt-sums.b2")


def in_toy(path: Path, name: str) -> None:
    bundle = Bundle.open(path)
    names = ["predict.b1", name]
    state = FlatState(bundle.manifest.state, {name: bundle.manifest.graphs[name] for name in names}, bundle.initial_state())
    Engine(bundle, state, 1, names).prepare(name)


def test_a_sum_that_is_read_twice_may_not_be_written_in_place():
    toy = PiecesToy(width=8, batches=(1, 4), micro=(2,))
    graph = read(toy.graphs["adapt-sums.b2"])
    names = toy.used("adapt")
    assert misplaced_sums(graph, names) == []
    adder = next(node for node in graph.nodes if "added.loss.all" in node.outputs)
    reader = next(node for node in graph.nodes if node.op == "Neg")
    reader.inputs.append("sum.loss.all")
    assert misplaced_sums(graph, names) == ["loss.all"]
    reader.inputs.pop()
    adder.op = "Sub"
    assert misplaced_sums(graph, names) == ["loss.all"]
    adder.op, adder.inputs[1] = "Add", "sum.count.all"
    assert set(misplaced_sums(graph, names)) == {"count.all"}


@pytest.fixture(autouse=True)
def nothing_claimed() -> Iterator[None]:
    """Adapters that a test let go of are gone before the next one claims a budget."""
    import gc

    yield
    gc.collect()
