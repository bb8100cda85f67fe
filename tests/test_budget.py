"""The budget while an adapter runs: memory of fixed size, what is loaded of a bundle, and how it gives way and recovers without losing anything."""

from __future__ import annotations

import gc
import logging
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeadapt import Adapter
from edgeadapt.bundle import Bundle
from edgeadapt.errors import BudgetError, UsageError
from edgeadapt.memory import footprint
from edgeadapt.memory import region as region_rules
from edgeadapt.runtime import loading, memory, region
from edgeadapt.runtime.choice import Item, choose, wanted
from edgeadapt.runtime.engine import Engine
from edgeadapt.runtime.memory import Need, Needs, planned
from edgeadapt.runtime.preparing import make
from edgeadapt.runtime.pressure import Level, Marks, Pressure, Sign, Signs
from edgeadapt.runtime.region import Region
from edgeadapt.runtime.state import FlatState
from tests.child import run_json
from tests.toybundle import SIDE, Toy

pytestmark = pytest.mark.device

MIB = 2**20
ENOUGH = "2GiB"


def shaped(toy: Toy) -> Toy:
    """With the shape of every tensor in its graphs, as exported bundles have it."""
    toy.graphs = {name: onnx.shape_inference.infer_shapes(onnx.load_from_string(data)).SerializeToString() for name, data in toy.graphs.items()}
    return toy


@pytest.fixture(scope="module")
def toy() -> Toy:
    return shaped(Toy(width=48, batches=(1, 4, 16)))


@pytest.fixture(scope="module")
def path(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write(tmp_path_factory.mktemp("budget") / "toy.edgeadapt")


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, SIDE, SIDE), dtype=np.float32)


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


class Script(Signs):
    """Says what it is told to; without being told, that all is well."""

    def __init__(self) -> None:
        self.grade = 0

    def read(self, more: int = 0, relief: bool = False) -> Sign:
        return Sign(self.grade, "made up" if self.grade else "")


class Clocked(Pressure):
    """On a clock that goes a second further at every look, unless told otherwise."""

    def __init__(self) -> None:
        self.now, self.tick = 0.0, 1.0
        super().__init__(Script(), Marks(interval=1.0, dwell=1.0, calm=4.0), lambda: self.now)

    def look(self, more: int = 0) -> Level | None:
        self.now += self.tick
        return super().look(more)


def watched(path: Path, **options: Any) -> tuple[Adapter, Clocked]:
    """An adapter under a budget, and the pressure that the test makes on it."""
    adapter = Adapter.open(path, ENOUGH, **options)
    adapter._service._pressure = pressure = Clocked()
    return adapter, pressure


# --------------------------------------------------------------------------------------------------------- the region


def test_what_is_left_is_told_to_the_byte():
    with region.using(Region(1_000_192, 4_096)):
        assert region.left() == 1_004_288
    assert region.left() is None  # that which grows has no limit


def engine_in(place: Region, bundle: Bundle, *names: str) -> Engine:
    graphs = bundle.manifest.graphs
    with region.using(place):
        engine = Engine(bundle, FlatState(bundle.manifest.state, graphs, bundle.initial_state()), 1, names)
        for name in names:
            engine.prepare(name)
    return engine


def test_a_limit_that_copies_of_weights_have_passed_is_noticed(path):
    """`MatMul` packs its weight when it is loaded, and that is counted, never refused."""
    bundle, needs = Bundle.open(path), Needs(Bundle.open(path), 1)
    graphs, size = bundle.manifest.graphs, 2 * needs["predict.b4"].region
    for kept in (0, 65536):
        with region.using(Region(size, kept)):
            engine = Engine(bundle, FlatState(bundle.manifest.state, graphs, bundle.initial_state()), 1)
            engine.run("predict.b4", {})
            engine.prepare("predict.b1")
            left = region.left()
        assert left is None if kept == 0 else 0 < left < kept


def test_loading_makes_more_room_for_what_sessions_keep(path):
    bundle = Bundle.open(path)
    plan = planned(Needs(bundle, 1), ["predict.b1", "adapt.b4"])
    state = FlatState(bundle.manifest.state, bundle.manifest.graphs, bundle.initial_state())
    engine = loading.load(bundle, state, 1, replace(plan, region=replace(plan.region, kept=256)))
    assert engine.run("adapt.b4", {}).finite


def test_each_session_keeps_the_region_it_was_made_in(path):
    bundle, needs = Bundle.open(path), Needs(Bundle.open(path), 1)
    small = engine_in(Region(needs["predict.b4"].region + 65536, 65536), bundle, "predict.b4", "adapt.b16")
    large = engine_in(Region(4 * MIB, 65536), bundle, "adapt.b16")
    for _ in range(3):
        with pytest.raises(BudgetError, match="there is not enough memory"):
            small.run("adapt.b16", {})
        assert small.run("predict.b4", {}).finite
        assert large.run("adapt.b16", {}).finite


def test_after_a_refusal_the_next_run_gives_the_same_as_ever(path):
    bundle, needs = Bundle.open(path), Needs(Bundle.open(path), 1)
    engine = engine_in(Region(needs["predict.b4"].region + 65536, 65536), bundle, "predict.b4", "adapt.b16")
    engine.frames(4)[...] = frames(4)
    first = engine.run("predict.b4", {}, False).logits.copy()
    for _ in range(3):
        with pytest.raises(BudgetError):
            engine.run("adapt.b16", {})
        engine.frames(4)[...] = frames(4)
        assert np.array_equal(engine.run("predict.b4", {}, False).logits, first)


def test_every_graph_runs_in_the_region_that_was_planned(path, toy):
    with Adapter.open(path, ENOUGH) as adapter:
        plan = adapter._service.choice.plan
        assert set(plan.graphs) == set(toy.specs)
        assert plan.region.size > 0
        for batch in (1, 4, 16):
            adapter.predict(frames(batch))
            adapter.source(frames(batch))
            adapter.adapt(frames(batch))
            adapter.learn(frames(batch), np.zeros(batch, np.int64))
        assert adapter.memory["level"] == 0
        assert adapter.stats["steps"] == 4


def test_a_size_that_leads_to_gaps_is_not_taken(path, monkeypatch):
    needs = Needs(Bundle.open(path), 1)
    plan, asked = planned(needs, ["predict.b1", "adapt.b16"]), []

    def picky(plan: Any, size: int) -> bool:
        asked.append(size)
        return len(asked) > 3

    monkeypatch.setattr(region_rules, "fits", picky)
    found = memory.laid_out(needs, plan)
    assert found.region.size > plan.region.size
    assert len(set(asked)) > 3
    assert found.total > plan.total


def test_a_bundle_that_says_too_little_is_counted_anew(path):
    needs = Needs(Bundle.open(path), 1)
    true = needs["adapt.b16"].region
    needs._found["adapt.b16"] = replace(needs["adapt.b16"], region=true // 3, room=footprint.margined(true // 3))
    plan = memory.laid_out(needs, planned(needs, ["predict.b1", "adapt.b16"]))
    assert plan.region.size >= 0.9 * true
    assert needs["adapt.b16"].region == true


def test_with_a_budget_or_without_the_numbers_are_the_same(path):
    with Adapter.open(path, ENOUGH) as one, Adapter.open(path) as other:
        for seed in range(5):
            x = frames(21, seed)
            assert np.array_equal(one.adapt(x), other.adapt(x))
            assert np.array_equal(one.predict(x), other.predict(x))
        assert equal(one.state, other.state)


def test_adapters_without_a_budget_go_on_beside_one_with(path):
    with Adapter.open(path) as before, Adapter.open(path, ENOUGH), Adapter.open(path) as after:
        assert np.array_equal(before.adapt(frames(16)), after.adapt(frames(16)))
        assert after.memory["budget"] is None


# ---------------------------------------------------------------------------------------------------- what is loaded


class Made(Needs):
    """Needs as the test makes them: region by graph; everything else costs nothing."""

    def __init__(self, bundle: Bundle, regions: dict[str, int], inside: int = 0) -> None:
        super().__init__(bundle, 1)
        self._found = {name: Need(size, footprint.margined(size), inside, 0, 0, True, (0, 0)) for name, size in regions.items()}


STEPS = {"predict.b1": 1, "predict.b4": 2, "predict.b16": 6, "adapt.b4": 10, "adapt.b16": 40, "learn.b4": 12, "learn.b16": 44}
SIZES = {**STEPS, "source.b1": 1, "source.b4": 2, "source.b16": 6}


def serving(needs: Needs, *names: str) -> int:
    """What these graphs take once they have been loaded; that making their sessions takes more is left out."""
    plan = planned(needs, names)
    return plan.total - plan.lines().get("starting", 0)


def loaded(path: Path, room: float, roles: Any = None, batches: Any = None, strict: bool = False, inside: int = 0) -> set[str]:
    """The graphs that a budget with room for a region of that many MiB loads."""
    bundle = Bundle.open(path)
    needs = Made(bundle, {name: size * MIB for name, size in SIZES.items()}, inside)
    fixed = serving(needs, "predict.b1")
    budget = int(fixed + (room - 1) * MIB * 1.053) + 100_000
    return set(choose(needs, wanted(bundle.manifest, roles, batches), budget, 0, strict).plan.graphs)


def test_all_that_fits_is_loaded_steps_first(path):
    assert loaded(path, 45) == set(SIZES)
    assert set(SIZES) - loaded(path, 43) == {"learn.b16"}
    assert set(SIZES) - loaded(path, 39) == {"learn.b16", "adapt.b16"}
    assert set(SIZES) - loaded(path, 11) == {"learn.b16", "adapt.b16", "learn.b4"}


def test_a_bundle_that_cannot_adapt_in_its_budget_is_refused_unless_only_predictions_are_asked_for(path):
    with pytest.raises(BudgetError, match=r"to predict at batch 1 and adapt at batch 4 needs") as caught:
        loaded(path, 9)
    assert re.fullmatch(
        r"give a budget that is enough: predict only, at batch 1, needs \d+ MiB; adapt at batch 16 needs \d+ MiB; adapt at batch 4 needs \d+ MiB; "
        r"learn at batch 16 needs \d+ MiB; learn at batch 4 needs \d+ MiB; or only predict, with roles=\"predict\" or --no-adapt",
        caught.value.hint,
    )
    assert loaded(path, 9, "predict") == {"predict.b1", "predict.b4", "predict.b16"}
    assert loaded(path, 5, "predict") == {"predict.b1", "predict.b4"}
    with pytest.raises(BudgetError, match="to predict at batch 1 needs") as caught:
        loaded(path, 0, "predict")
    assert "or export with a smaller batch" in caught.value.hint


def test_each_role_that_is_named_is_loaded_at_some_batch(path):
    assert loaded(path, 41, ("learn", "adapt")) == {"predict.b1", "predict.b4", "predict.b16", "adapt.b4", "adapt.b16", "learn.b4"}
    assert loaded(path, 13, ("learn", "adapt")) == {"predict.b1", "predict.b4", "predict.b16", "adapt.b4", "learn.b4"}
    with pytest.raises(BudgetError, match="to predict at batch 1 and adapt at batch 4 and learn at batch 4"):
        loaded(path, 11, ("learn", "adapt"))


def test_only_the_batches_that_are_used(path):
    assert loaded(path, 45, batches=[4]) == {name for name in SIZES if not name.endswith("16")}
    with pytest.raises(UsageError, match="no graph for batch 3"):
        loaded(path, 45, batches=[3])


def test_strictly_everything_or_nothing(path):
    assert loaded(path, 45, strict=True) == set(SIZES)
    with pytest.raises(BudgetError, match="all that is asked for needs") as caught:
        loaded(path, 43, strict=True)
    assert "all of it needs" in caught.value.hint


def test_copies_of_weights_are_given_up_before_anything_else(path):
    bundle = Bundle.open(path)
    needs = Made(bundle, {name: size * MIB for name, size in SIZES.items()}, inside=MIB)
    items = wanted(bundle.manifest, None, None)
    names = [f"{item.role}.b{item.batch}" for item in items]
    with_copies, without = planned(needs, names).total, planned(needs, names, False).total
    assert choose(needs, items, with_copies, 0).plan.region.prepacking
    found = choose(needs, items, with_copies - 1, 0)
    assert not found.plan.region.prepacking
    assert not found.missing
    assert choose(needs, items, without - 1, 0).missing == ("learn at batch 4",)


def test_a_leaner_step_is_taken_for_what_is_needed_and_the_leanest_only_for_a_larger_batch(path):
    bundle = Bundle.open(path)
    graphs = dict(bundle.manifest.graphs)
    sizes = dict(SIZES)
    for name, lean, least in (("adapt.b16", 30, 20), ("adapt.b4", 9, 8), ("learn.b16", 31, 21), ("learn.b4", 9, 8)):
        for variant, size in (("lean", lean), ("least", least)):
            graphs[f"{name}.{variant}"] = replace(graphs[name], variant=variant)
            sizes[f"{name}.{variant}"] = size
    object.__setattr__(bundle, "manifest", replace(bundle.manifest, graphs=graphs))
    needs = Made(bundle, {name: size * MIB for name, size in sizes.items()})
    fixed = serving(needs, "predict.b1")

    def steps(room: float, roles: Any = None) -> set[str]:
        budget = int(fixed + (room - 1) * MIB * 1.053) + 100_000
        return {name for name in choose(needs, wanted(bundle.manifest, roles, None), budget, 0).plan.graphs if name[0] in "al"}

    assert steps(45) == {"adapt.b4", "adapt.b16", "learn.b4", "learn.b16"}
    assert steps(43) == {"adapt.b4.lean", "adapt.b16.lean", "learn.b4.lean", "learn.b16.lean"}
    assert steps(43, "adapt") == {"adapt.b4", "adapt.b16"}
    assert steps(20.6) == {"adapt.b4.least", "adapt.b16.least", "learn.b4.least"}
    assert steps(19) == {"adapt.b4", "learn.b4"}


def test_what_is_wanted_comes_in_the_order_of_its_worth(path):
    manifest = Bundle.open(path).manifest
    items = wanted(manifest, None, None)
    assert items[0] == Item("predict", 1, True)
    assert [str(item) for item in items[1:]] == [
        *("adapt at batch 16", "adapt at batch 4", "predict at batch 16", "predict at batch 4"),
        *("source at batch 1", "source at batch 4", "source at batch 16", "learn at batch 16", "learn at batch 4"),
    ]
    assert {item.role for item in items if item.needed} == {"predict", "adapt"}


def test_a_role_that_the_bundle_does_not_have(tmp_path, path):
    norm = Toy(method="norm").write(tmp_path / "norm")
    with pytest.raises(UsageError, match=r"this bundle \(norm\) has no graph to 'learn'"):
        Adapter.open(norm, roles="learn")
    with Adapter.open(norm, roles="adapt") as adapter:  # its adaptation is its statistics
        assert np.isfinite(adapter.adapt(frames(4))).all()
    with Adapter.open(path, roles="predict") as adapter:
        for use in (lambda: adapter.adapt(frames(4)), lambda: adapter.source(frames(1)), lambda: adapter.learn(frames(4), [0] * 4)):
            with pytest.raises(UsageError, match="was opened without"):
                use()


def test_what_was_left_out_is_told_and_logged(path, monkeypatch, caplog):
    real = Needs._read
    big = {"learn.b16", "learn.b4", "source.b1"}
    monkeypatch.setattr(Needs, "_read", lambda self, name: replace(real(self, name), structures=2**40) if name in big else real(self, name))
    with caplog.at_level(logging.WARNING, "edgeadapt"), Adapter.open(path, ENOUGH) as adapter:
        assert adapter.memory["missing"] == ("source at batch 1", "learn at batch 16", "learn at batch 4")
        assert adapter.batches["learn"] == ()
        with pytest.raises(BudgetError, match="no room for the learn graphs"):
            adapter.learn(frames(4), np.zeros(4, np.int64))
    assert "no room in the budget for source at batch 1, learn at batch 16, learn at batch 4" in caplog.text


def test_what_loading_takes_beyond_its_plan_is_left_out_of_the_next(path, monkeypatch, caplog):
    monkeypatch.setattr(loading, "INEXACT", False)  # what is laid out is not run first
    taken = iter([300 * MIB, 0, 0])
    real = loading._to_come
    monkeypatch.setattr(loading, "_to_come", lambda *given: real(*given) + next(taken))
    budget = memory.resident() + 280 * MIB
    with caplog.at_level(logging.INFO, "edgeadapt"), Adapter.open(path, budget) as adapter:
        assert adapter.memory["planned"] < 280 * MIB
    assert "more than planned; choosing again" in caplog.text


def test_a_second_adapter_counts_what_the_first_was_promised(path):
    gc.collect()
    with Adapter.open(path, ENOUGH) as first, Adapter.open(path, ENOUGH) as second:
        assert first._claim is not None
        assert second._claim is not None
        assert second._claim.filled >= first._claim.besides + first._claim.planned + second.memory["planned"]


def test_adapters_of_a_process_share_code_and_what_starting_took_is_gone(path):
    gc.collect()
    opened = [Adapter.open(path, ENOUGH) for _ in range(4)]
    claims = [adapter._claim for adapter in opened]
    ledger = opened[0]._service.choice.plan.ledger
    assert ledger.passing > 0
    each = ledger.total - ledger.passing - ledger.shared
    assert all(claim.planned == each for claim in claims)
    promised = [claim.promised() for claim in claims]
    assert promised == [max(claim.besides for claim in claims) + 4 * each + ledger.shared] * 4
    for adapter in opened:
        adapter.adapt(frames(16))
    assert memory.resident() <= promised[0]
    for adapter in opened:
        adapter.close()


def test_a_closed_adapter_gives_its_budget_back(path):
    with Adapter.open(path, "1GiB"):
        pass
    with Adapter.open(path, "2GiB") as other:
        assert other.memory["budget"] == 2**31


# ------------------------------------------------------------------------------------------------------------ levels


def test_down_to_predicting_and_up_again_with_nothing_lost(path):
    adapter, pressure = watched(path)
    twin = Adapter.open(path)
    released = []
    adapter.register_cache("replay", lambda: released.append(adapter._service.level))
    for seed in range(3):
        assert np.array_equal(adapter.adapt(frames(16, seed)), twin.adapt(frames(16, seed)))
    pressure.signs.grade = 1
    parameters = {spec.name for spec in adapter.manifest.state if spec.kind != "statistic"}
    kept = adapter.state
    for seed, level in enumerate((Level.PAUSED, Level.SHED)):
        assert np.array_equal(adapter.adapt(frames(16, seed)), twin.predict(frames(16, seed)))
        assert adapter.memory["level"] == level
        assert adapter.memory["reason"] == "made up"
    adapter.adapt(frames(16, 7))
    twin.reset()
    twin.state = {**adapter.state}
    assert adapter.memory["level"] == Level.PREDICT
    assert adapter.memory["graphs"] == ("predict.b1", "source.b1")
    assert released == [Level.PAUSED]
    x = frames(16, 8)
    for row, single in zip(adapter.adapt(x), x):
        assert np.array_equal(row, twin.predict(single))
    assert adapter.stats["paused_steps"] == 4
    assert adapter.stats["pressure_events"] == 3
    assert adapter.stats["skipped_frames"] == 0
    after = adapter.state
    assert equal({name: kept[name] for name in parameters}, {name: after[name] for name in parameters})
    pressure.signs.grade = 0
    levels = []
    while adapter.memory["level"]:
        adapter.predict(frames(1), update_statistics=False)
        levels.append(adapter.memory["level"])
    assert sorted(set(levels), reverse=True) == [3, 2, 1, 0]
    assert sorted(levels, reverse=True) == levels
    assert len(levels) >= 12
    assert equal(adapter.state, after)
    twin.state = after
    assert np.array_equal(adapter.adapt(frames(20, 9)), twin.adapt(frames(20, 9)))
    assert equal(adapter.state, twin.state)
    assert adapter.memory["reason"] == ""
    assert [(change.before, change.after) for change in adapter.changes] == [(0, 1), (1, 2), (2, 3), (3, 2), (2, 1), (1, 0)]


def test_a_region_that_is_too_small_costs_the_step_and_nothing_else(path, monkeypatch):
    monkeypatch.setattr(loading, "INEXACT", False)  # what is laid out is not run first
    adapter, pressure = watched(path)
    adapter.adapt(frames(16))
    service = adapter._service
    place = replace(service.choice.plan.region, size=Needs(Bundle.open(path), 1)["predict.b4"].region, prepacking=False)
    service.choice = replace(service.choice, plan=replace(service.choice.plan, region=place))
    service._load(Level.NORMAL)
    parameters = [spec.name for spec in adapter.manifest.state if spec.kind != "statistic"]
    before, x = adapter.state, frames(16, 1)
    twin = Adapter.open(path)
    twin.state = before
    pressure.tick = 0.0
    got = adapter.adapt(x)
    pressure.tick = 1.0
    assert np.array_equal(got, np.concatenate([twin.predict(row[None]) for row in x]))
    assert equal(adapter.state, twin.state)
    assert all(before[name].tobytes() == adapter.state[name].tobytes() for name in parameters)
    assert adapter.stats["paused_steps"] == 1
    assert [(change.after, change.reason) for change in adapter.changes] == [
        (1, "graph adapt.b16 failed: there is not enough memory"),
        (2, "graph predict.b16 failed: there is not enough memory"),
        (3, "graph predict.b16 failed: there is not enough memory"),
    ]
    for seed in range(60):
        assert np.isfinite(adapter.adapt(frames(16, seed))).all()
    assert adapter.stats["steps"] == 1  # each try failed, and they became rare
    assert 3 < adapter.stats["pressure_events"] < 25
    assert pressure.marks.calm < pressure._wait


def test_a_step_that_is_refused_memory_is_predicted(path, monkeypatch):
    adapter, _ = watched(path)
    twin = Adapter.open(path)
    graph = adapter._service.live()._graph("adapt.b16")

    class Full:
        io_binding = graph.session.io_binding

        def run_with_iobinding(self, binding: Any) -> None:
            raise RuntimeError("... Available memory of 8380160 is smaller than requested bytes of 8388608")

    monkeypatch.setattr(graph, "session", Full())
    assert np.array_equal(adapter.adapt(frames(20)), np.concatenate([twin.predict(frames(20)[:16]), twin.adapt(frames(20)[16:])]))
    assert adapter.memory["level"] == Level.PAUSED
    assert adapter.stats["paused_steps"] == 2


def test_a_refusal_without_pressure_to_answer_it_is_an_error(path, monkeypatch):
    monkeypatch.setattr(loading, "INEXACT", False)  # what is laid out is not run first
    adapter = Adapter.open(path)
    monkeypatch.setattr(Engine, "run", refuse)
    with pytest.raises(BudgetError, match="no room"):
        adapter.predict(frames(1))
    watched_one, pressure = watched(path)
    with pytest.raises(BudgetError, match="no room"):
        watched_one.predict(frames(1))
    assert pressure.level == Level.PREDICT
    monkeypatch.undo()
    assert np.isfinite(watched_one.predict(frames(3))).all()


def refuse(*anything: Any, **more: Any) -> Any:
    raise BudgetError("no room")


def test_labels_under_pressure_are_passed_over_and_counted(path):
    adapter, pressure = watched(path)
    before = adapter.state
    pressure.signs.grade = 1
    logits = adapter.learn(frames(21), np.zeros(21, np.int64))
    assert np.isfinite(logits).all()
    assert adapter.stats["paused_steps"] == 2
    assert adapter.stats["skipped_frames"] == 1
    assert adapter.stats["steps"] == 0
    assert np.array_equal(adapter.state["head.bias"], before["head.bias"])


def test_pressure_in_the_middle_of_a_call(path):
    """The frames of a step that is not taken are one step, however they are predicted."""
    adapter, pressure = watched(path)
    looks = iter([0, 0, 0, 1, 0, *[0] * 1000])
    look = pressure.look

    def changing(more: int = 0) -> Level | None:
        pressure.signs.grade = next(looks)
        return look(more)

    pressure.look = changing  # type: ignore[method-assign]
    assert np.isfinite(adapter.adapt(frames(16 * 12))).all()
    stats = adapter.stats
    assert stats["steps"] + stats["paused_steps"] == 12
    assert stats["paused_steps"] > 1
    assert stats["steps"] > 6
    assert stats["skipped_frames"] == 0


def test_a_cache_that_fails_does_not_stop_the_rest(path, caplog):
    adapter, pressure = watched(path)
    released: list[str] = []

    def broken() -> None:
        raise ValueError("no")

    adapter.register_cache("old", lambda: released.append("old"))
    adapter.register_cache("broken", broken)
    adapter.register_cache("large", lambda: released.append("large"))
    adapter.register_cache("old", lambda: released.append("new"))
    pressure.signs.grade = 2
    for _ in range(3):
        adapter.predict(frames(1))
    assert released == ["new", "large"]
    assert "the cache broken could not be released" in caplog.text
    assert adapter.memory["level"] == Level.PREDICT


def test_a_cache_gives_real_memory_back(path):
    adapter, pressure = watched(path)
    cache = [np.ones(64 * MIB, np.uint8)]
    adapter.register_cache("replay", cache.clear)
    adapter.predict(frames(1))  # brings in the code that it needs
    held = memory.resident()
    pressure.signs.grade = 1
    adapter.predict(frames(1))
    assert cache
    adapter.predict(frames(1))
    assert not cache
    assert held - memory.resident() > 60 * MIB


def test_where_there_is_no_room_to_go_back_it_stays_and_tries_again(path, monkeypatch, caplog):
    adapter, pressure = watched(path)
    pressure.signs.grade = 2
    for _ in range(3):
        adapter.predict(frames(1))
    pressure.signs.grade = 0
    real, full = loading.load, adapter._service.choice.plan
    fails = iter([True, True])

    def load(bundle: Any, state: Any, threads: int, plan: Any, *more: Any) -> Any:
        return refuse() if plan is full and next(fails, False) else real(bundle, state, threads, plan, *more)

    monkeypatch.setattr(loading, "load", load)
    for _ in range(60):
        assert np.isfinite(adapter.predict(frames(2))).all()
    assert caplog.text.count("memory: still predicting only: no room") == 2
    assert adapter.memory["level"] < Level.PREDICT


def test_where_there_is_no_room_for_the_least_the_next_call_tries_again(path, monkeypatch):
    adapter, pressure = watched(path)
    before = adapter.state
    monkeypatch.setattr(loading, "load", refuse)
    pressure.signs.grade = 2
    adapter.predict(frames(1), update_statistics=False)
    adapter.predict(frames(1), update_statistics=False)
    for _ in range(2):
        with pytest.raises(BudgetError, match="no room"):
            adapter.predict(frames(1))
    monkeypatch.undo()
    assert np.isfinite(adapter.predict(frames(2), update_statistics=False)).all()
    assert equal(adapter.state, before)


def test_states_are_saved_and_loaded_at_every_level(path, tmp_path):
    adapter, pressure = watched(path)
    adapter.adapt(frames(16))
    adapter.save(tmp_path / "before")
    kept = adapter.state
    pressure.signs.grade = 2
    for level in range(1, 4):
        adapter.predict(frames(1), update_statistics=False)
        assert adapter.memory["level"] == level
        adapter.save(tmp_path / str(level))
        adapter.reset()
        adapter.load(tmp_path / str(level))
        assert equal(adapter.state, kept)
    with Adapter.open(path) as other:
        other.load(tmp_path / "3")
        assert equal(other.state, kept)
        assert other.stats["pressure_events"] == 3


def test_levels_change_under_several_threads(path):
    adapter, pressure = watched(path)
    stop, faults = threading.Event(), []
    windows = 40

    def serve(call: Any, check: Any) -> None:
        try:
            while not stop.is_set():
                check(call())
        except Exception as reason:
            faults.append(reason)

    def finite(logits: np.ndarray) -> None:
        assert np.isfinite(logits).all()

    calls = [(lambda: adapter.predict(frames(5)), finite), (lambda: adapter.source(frames(3)), finite), (lambda: adapter.memory["level"], int)]
    threads = [threading.Thread(target=serve, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for index in range(windows):
        pressure.signs.grade = 1 if index % 13 in (3, 4, 5) else 0
        finite(adapter.adapt(frames(16, index)))
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
    stats = adapter.stats
    assert stats["steps"] + stats["paused_steps"] + stats["rejected_steps"] == windows
    assert stats["pressure_events"] >= 3
    assert all(abs(change.after - change.before) == 1 for change in adapter.changes)


def test_the_process_follows_its_own_signs(path, tmp_path, caplog):
    """From the adapter's own opening, on a board that is short of memory."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 1000000 kB\nMemAvailable: 100 kB\n")
    with Adapter.open(path, ENOUGH) as adapter:
        pressure = adapter._service._pressure
        assert pressure is not None
        pressure.signs = Signs(None, 0, Marks(), str(tmp_path))
        pressure._looked -= 1
        adapter.predict(frames(1))
        assert adapter.memory["level"] == Level.PAUSED
        assert "the system has 100 KiB left" in adapter.memory["reason"]
    with caplog.at_level(logging.WARNING, "edgeadapt"):
        Adapter.open(path, ENOUGH, reserve=2**60).close()
    assert "memory may run short: with what is planned, the system has" in caplog.text


def test_prepared_graphs_lie_in_a_region_of_their_own_size(path, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEADAPT_CACHE", str(tmp_path))
    norm = shaped(Toy(width=48, method="norm", batches=(1, 4))).write(tmp_path / "norm.edgeadapt")
    found = make(Bundle.open(norm))
    with Adapter.open(norm, ENOUGH) as one, Adapter.open(norm, ENOUGH, prepared=False) as other:
        assert one._service._prepared is not None
        assert other._service._prepared is None
        lines = [adapter._service.choice.plan.lines() for adapter in (one, other)]
        assert 0 < lines[0]["weights"] <= lines[1]["weights"] + found.own_bytes + 2**16
        for seed in range(3):
            assert np.allclose(one.adapt(frames(9, seed)), other.adapt(frames(9, seed)), atol=1e-4)
        one._service._pressure = pressure = Clocked()
        pressure.signs.grade = 2
        for _ in range(4):
            one.predict(frames(1))
        assert one.memory["level"] == Level.PREDICT
        assert one.memory["graphs"] == ("predict.b1", "source.b1")


# ------------------------------------------------------------------------------------------------- whole processes

HELD = """
import json, sys
import numpy as np
from edgeadapt import Adapter
from edgeadapt.errors import BudgetError
path, steps = sys.argv[1], int(sys.argv[2])
frame = np.sin(np.arange(16 * 3 * 36, dtype=np.float32)).reshape(16, 3, 6, 6)
try:
    Adapter.open(path, "1MiB", roles=("predict", "adapt"))
except BudgetError as refusal:
    needed = {words[0]: int(words[-2]) for words in (part.split() for part in refusal.hint.split(": ")[1].split("; ")[:-1])}
budget = needed["adapt"] * 2**20
adapter = Adapter.open(path, budget, roles=("predict", "adapt"))
held = []
for step in range(steps):
    adapter.adapt(frame)
    if step % 3 == 0:
        adapter.predict(frame[:1])
    if step in (0, steps - 1):
        held.append(adapter.memory["resident"])
print(json.dumps({"budget": budget, "peak": adapter.memory["peak"], "held": held, "level": adapter.memory["level"], "stats": adapter.stats}))
"""


@pytest.mark.native
def test_the_budget_that_a_refusal_names_is_enough_and_memory_stays_as_it_is(tmp_path):
    path = shaped(Toy(width=64, depth=3, batches=(1, 16))).write(tmp_path / "toy")
    found = run_json([sys.executable, "-c", HELD, str(path), "1000"])
    assert found["peak"] <= found["budget"]
    assert found["stats"]["steps"] == 1000
    assert found["level"] == 0
    first, last = found["held"]
    assert abs(last - first) <= 2**18  # the first looks at memory, after seconds, take 0.15 MiB once: as much by 2,000 steps as by 30,000


@pytest.fixture(autouse=True)
def nothing_claimed() -> Iterator[None]:
    """Adapters that a test let go of are gone before the next one claims a budget."""
    yield
    gc.collect()
