"""Budgets at their edges: options that need one, room for the program itself, adapters that come and go, prepared graphs that vanish."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeadapt import Adapter
from edgeadapt.bundle import PLACEHOLDER, Bundle
from edgeadapt.bundle.digest import sha256
from edgeadapt.cli.main import main
from edgeadapt.errors import BudgetError, BundleError, UsageError
from edgeadapt.memory import footprint
from edgeadapt.memory.ledger import Setup, ledger
from edgeadapt.runtime import adapter as adapters
from edgeadapt.runtime import loading, memory, region, service, session
from edgeadapt.runtime.choice import wanted
from edgeadapt.runtime.memory import Needs
from edgeadapt.runtime.prepared import BUNDLE, OWN, Prepared, PreparedGraph
from edgeadapt.runtime.pressure import Level
from tests.child import run_json
from tests.test_budget import ENOUGH, MIB, Clocked, frames, shaped
from tests.toybundle import SIDE, Toy

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shaped(Toy(width=48, batches=(1, 16))).write(tmp_path_factory.mktemp("edges") / "toy.edgeadapt")


@pytest.fixture(autouse=True)
def nothing_claimed() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


# ------------------------------------------------------------------------------------------ what needs a budget


@pytest.mark.parametrize("option", ["reserve", "slack"])
def test_what_only_bounds_within_a_budget_is_refused_without_one(path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=f"{option} without a budget bounds nothing") as refused:
        Adapter.open(path, **{option: "16MiB"})  # type: ignore[arg-type]
    assert refused.value.hint == f"give a budget too, or leave {option} out"
    np.save(path.with_name("frame.npy"), np.zeros((1, *Bundle.open(path).manifest.input.shape), np.float32))
    assert main(["run", str(path), "--source", str(path.with_name("frame.npy")), f"--{option}", "16MiB"]) == 2
    assert f"{option} without a budget" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ slack


def test_slack_is_planned_for_and_a_line(path: Path) -> None:
    with Adapter.open(path, ENOUGH) as plain:
        planned = plain.memory["planned"] - plain.memory.get("starting", 0)
        assert "slack" not in plain.memory
    with Adapter.open(path, ENOUGH, slack="24MiB") as kept:
        assert kept.memory["slack"] == 24 * MIB
        assert kept.memory["planned"] - kept.memory.get("starting", 0) == planned + 24 * MIB
        assert kept._service.choice.least.lines()["slack"] == 24 * MIB


def test_a_budget_that_is_enough_without_slack_is_refused_with_it(path: Path) -> None:
    with Adapter.open(path, ENOUGH, strict=True) as probe:
        budget = memory.resident() + probe.memory["planned"] + 8 * MIB
    with Adapter.open(path, budget, strict=True):
        pass
    with pytest.raises(BudgetError) as refused:
        Adapter.open(path, budget, strict=True, slack=64 * MIB)
    line = next(line for line in refused.value.message.splitlines() if line.split()[0] == "slack")
    assert f"{64 * MIB:,} B" in line
    assert "kept free for the program" in line


def test_less_is_loaded_where_slack_takes_the_room(path: Path) -> None:
    needs = Needs(Bundle.open(path), 1)
    held = memory.resident()
    with Adapter.open(path, ENOUGH) as probe:
        whole = probe.memory["planned"]
    assert needs["adapt.b16"].region > 2 * footprint.LEAST_MARGIN
    budget = held + whole + 16 * MIB
    with Adapter.open(path, budget) as all_of_it:
        assert all_of_it.memory["missing"] == ()
    missing: tuple[str, ...] = ()
    for step in range(1, 60):  # until it is too little for all, and before it is too little for a step
        try:
            with Adapter.open(path, budget, slack=(10 + step // 4) * MIB + step % 4 * 256 * 1024) as less:
                missing = less.memory["missing"]
        except BudgetError:
            break
        if missing:
            break
    assert missing


def test_the_simulator_keeps_slack_free_too(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.open(path)
    setup = Setup(("adapt.b16",), 50_000_000)
    assert ledger(bundle, replace(setup, slack=MIB)).total == ledger(bundle, setup).total + MIB
    total = ledger(bundle, setup).total
    arguments = ["simulate", str(path), "--board", "x86-64", "--batch", "16", "--budget", str(2 * total)]
    assert main(arguments) == 0
    assert "slack" not in capsys.readouterr().out
    assert main([*arguments, "--slack", str(2 * total)]) == 5
    assert "slack" in capsys.readouterr().err


def test_run_takes_slack(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", x=frames(3))
    assert main(["run", str(path), "--source", str(tmp_path / "x.npz"), "--budget", "2GiB", "--slack", "4MiB"]) == 0
    assert main(["run", str(path), "--source", str(tmp_path / "x.npz"), "--budget", "1GiB", "--slack", "4GiB"]) == 5
    assert "slack" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- adapters that come and go


def test_what_a_closed_adapter_was_promised_is_not_counted_for_the_next(path: Path) -> None:
    first, second = Adapter.open(path, ENOUGH), Adapter.open(path, ENOUGH)
    assert first._claim is not None
    assert second._claim is not None
    both, one = second._claim.promised(), first._claim.planned
    first.close()
    assert second._claim.promised() == both - one
    third = Adapter.open(path, ENOUGH)
    assert third._claim is not None
    assert third._claim.promised() <= both + 3 * MIB  # two adapters again, and what the process itself has grown by
    third.close()
    second.close()


CLOSED = """
import gc, json, sys
import numpy as np
from edgeadapt import Adapter
from edgeadapt.runtime import memory
path = sys.argv[1]
x = np.sin(np.arange(256 * 3 * 36, dtype=np.float32)).reshape(256, 3, 6, 6)
with Adapter.open(path, "2GiB") as adapter:
    adapter.adapt(x)
    region, full = adapter.memory["region"], memory.resident()
print(json.dumps({"region": region, "given_back": full - memory.resident()}))
"""


@pytest.mark.native
def test_a_closed_adapter_gives_its_region_back_at_once(tmp_path: Path) -> None:
    bundle = shaped(Toy(width=128, batches=(1, 256))).write(tmp_path / "wide.edgeadapt")
    found = run_json([sys.executable, "-c", CLOSED, str(bundle)])
    assert found["region"] > 8 * MIB
    assert found["given_back"] > 0.8 * found["region"]


# ------------------------------------------------------------------------------------------- graphs that are no good


def edited(path: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """A bundle whose first graph was changed, and whose graphs do not state all shapes."""
    toy = Toy(batches=(1,), method="source")
    model = onnx.load_from_string(toy.graphs["predict.b1"])
    change(model)
    toy.graphs["predict.b1"] = model.SerializeToString()
    return toy.write(path)


def doubling(model: onnx.ModelProto) -> None:
    """Forty nodes that ask for four terabytes."""
    chain = ["x", *(f"twice{index}" for index in range(40))]
    nodes = [helper.make_node("Concat", [before, before], [after], axis=0) for before, after in zip(chain, chain[1:])]
    nodes += model.graph.node
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def test_a_region_that_grows_ends_where_the_budget_does(tmp_path: Path) -> None:
    with Adapter.open(edited(tmp_path / "x", doubling), budget=ENOUGH) as adapter:
        region = adapter._service.choice.plan.region
        assert (region.size, region.kept < adapter.memory["budget"]) == (0, True)
        with pytest.raises(BudgetError, match="memory ran out"):
            adapter.predict(frames(1))
        assert adapter.memory["peak"] < adapter.memory["budget"]


def test_looking_at_what_is_left_asks_no_region_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would remember how much that was, and with its next block take all addresses that there are."""
    made = []
    register = region._register
    monkeypatch.setattr(region, "_register", lambda wanted: (made.append(wanted), register(wanted)))
    loading.begin()
    assert made
    assert all(wanted.size for wanted in made)
    region.release()


@pytest.mark.parametrize("budget", [None, ENOUGH])
def test_a_tensor_that_stands_twice_is_refused(tmp_path: Path, budget: str | None) -> None:
    def twice(model: onnx.ModelProto) -> None:
        model.graph.initializer.add().CopyFrom(next(tensor for tensor in model.graph.initializer if tensor.external_data))

    path = edited(tmp_path / "x", twice)
    with pytest.raises(BundleError, match="cannot load graph"):
        Adapter.open(path, budget=budget)


@pytest.mark.parametrize("sizes", [[2**62], [-1], [1] * 65, [2**39] * 60])
def test_shapes_that_cannot_be_are_not_planned_for(tmp_path: Path, sizes: list[int]) -> None:
    path = edited(tmp_path / "x", lambda model: model.graph.value_info.append(helper.make_tensor_value_info("t0", TensorProto.FLOAT, sizes)))
    with pytest.raises(BundleError, match="sizes that cannot be"):
        Adapter.open(path, budget=ENOUGH)


def test_a_graph_that_the_rules_of_planning_cannot_follow_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise IndexError("no such input " + "x" * 9000)

    monkeypatch.setattr(memory, "figures", fails)
    with pytest.raises(BundleError, match=r"no graph that memory can be planned for .*no such input") as refused:
        Adapter.open(path, budget=ENOUGH)
    assert len(str(refused.value)) < 1000


def test_what_a_bundle_says_of_sizes_may_be_more_than_there_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(loading, "FlatState", fails)
    for budget in (None, ENOUGH):
        with pytest.raises(BudgetError, match="not enough memory for what it says"):
            Adapter.open(path, budget=budget)


def test_what_onnxruntime_says_is_told_in_short_and_by_its_kind() -> None:
    assert isinstance(session.failure("x", RuntimeError("x" * 9000 + "std::bad_alloc")), BudgetError)
    for reason in ("Available memory of 1", "Failed to allocate memory", "other"):
        assert len(str(session.failure("x", RuntimeError(reason + "x" * 9000)))) < 1000


# --------------------------------------------------------------------------------- prepared graphs that vanish


def wasteful(toy: Toy) -> dict[str, bytes]:
    """Has the toy's step hold copies of its frames to its end; the graphs without, as if they had been prepared so."""
    lean = {name: data for name, data in toy.graphs.items() if name in ("adapt.b16", "predict.b1")}
    model = onnx.load_from_string(toy.graphs["adapt.b16"])
    model.graph.node.insert(0, helper.make_node("Concat", ["x"] * 1600, ["copies"], axis=0))
    model.graph.value_info.append(helper.make_tensor_value_info("copies", TensorProto.FLOAT, [1600 * 16, 3, SIDE, SIDE]))
    toy.graphs["adapt.b16"] = model.SerializeToString()
    toy.specs["adapt.b16"] = replace(toy.specs["adapt.b16"], nodes=toy.specs["adapt.b16"].nodes + 1)
    return lean


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A bundle, and the folder of an entry with leaner graphs of it, which is found when the bundle is opened."""
    toy = shaped(Toy(width=48, batches=(1, 16)))
    lean = wasteful(toy)
    bundle, folder = toy.write(tmp_path / "toy.edgeadapt"), tmp_path / "entry"
    folder.mkdir()
    for name in (OWN, BUNDLE):
        (folder / name).touch()
    graphs = {}
    for name, data in lean.items():
        model = onnx.load_from_string(data)
        for tensor in model.graph.initializer:
            for item in tensor.external_data:
                item.value = BUNDLE if item.value == PLACEHOLDER else item.value
        file = folder / f"{name}.onnx"
        file.write_bytes(model.SerializeToString())
        graph = PreparedGraph(file, str(folder), "extended", len(model.graph.node), 0, 0, 0, 0, 0, sha256(file.read_bytes()).hexdigest())
        plain = Needs(Bundle.open(bundle), 1, Prepared(folder, {name: graph}, 0, {}))
        region = memory.smallest(plain.layout(name))
        graphs[name] = replace(graph, peak_bytes=region, region_bytes=region, packed_bytes=65536)
    monkeypatch.setattr(adapters, "find", lambda *_: Prepared(folder, graphs, 0, {}) if folder.is_dir() else None)
    return bundle, folder


def pressed(adapter: Adapter) -> Clocked:
    adapter._service._pressure = pressure = Clocked()
    return pressure


def down(adapter: Adapter, pressure: Clocked) -> None:
    pressure.signs.grade = 2
    while adapter.memory["level"] < Level.PREDICT:
        adapter.predict(frames(1), update_statistics=False)


def up(adapter: Adapter, pressure: Clocked) -> None:
    pressure.signs.grade = 0
    for _ in range(100):
        adapter.predict(frames(1), update_statistics=False)
        if not adapter.memory["level"]:
            break


def region_of(adapter: Adapter) -> int:
    return adapter._service.choice.plan.region.size


def test_once_all_is_loaded_again_no_step_up_takes_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only predicting gave back is taken by the first step up; to ask for it again would keep adaptation paused for good in a tight budget."""
    asked: list[tuple[Level, int]] = []
    held = 10**8
    with Adapter.open(path, ENOUGH) as adapter:
        pressure = pressed(adapter)
        look = pressure.look
        monkeypatch.setattr(service, "resident", lambda: held)
        monkeypatch.setattr(pressure, "look", lambda more=0: asked.append((Level(pressure.level), more)) or look(more))
        down(adapter, pressure)
        held -= 8000  # was given back
        asked.clear()
        pressure.signs.grade = 0
        while adapter.memory["level"] == Level.PREDICT:
            adapter.predict(frames(1), update_statistics=False)
        held += 6000  # is there again; runs touch the rest
        up(adapter, pressure)
        assert not adapter.memory["level"]
    assert {more for level, more in asked if level == Level.PREDICT} == {8000}
    assert {more for level, more in asked if level in (Level.SHED, Level.PAUSED)} == {2000}


def test_an_entry_that_vanishes_before_the_exchange_back_costs_no_step(entry: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    bundle, folder = entry
    with Adapter.open(bundle, ENOUGH) as adapter, Adapter.open(bundle, prepared=False) as twin:
        before = region_of(adapter)
        pressure = pressed(adapter)
        down(adapter, pressure)
        shutil.rmtree(folder)
        up(adapter, pressure)
        assert adapter.memory["level"] == Level.NORMAL
        assert region_of(adapter) > before  # laid out for the graphs as exported
        for seed in range(3):
            assert np.array_equal(adapter.adapt(frames(16, seed)), twin.adapt(frames(16, seed)))
        assert adapter.stats["steps"] == 3
        assert adapter.stats["paused_steps"] == 0
        assert "runs as exported" in caplog.text


def test_an_entry_that_vanishes_before_only_predicting_costs_no_prediction(entry: tuple[Path, Path]) -> None:
    bundle, folder = entry
    with Adapter.open(bundle, ENOUGH) as adapter:
        pressure = pressed(adapter)
        shutil.rmtree(folder)
        down(adapter, pressure)
        assert np.isfinite(adapter.adapt(frames(16))).all()
        up(adapter, pressure)
        assert np.isfinite(adapter.adapt(frames(16))).all()
        assert adapter.stats["steps"] == 1


def test_an_entry_that_vanishes_while_the_bundle_is_opened(entry: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, folder = entry
    find = adapters.find

    def vanishing(*given: Any) -> Any:
        found = find(*given)
        shutil.rmtree(folder, ignore_errors=True)
        return found

    monkeypatch.setattr(adapters, "find", vanishing)
    with Adapter.open(bundle, ENOUGH) as adapter:
        assert np.isfinite(adapter.adapt(frames(16))).all()
        assert adapter.stats["steps"] == 1


def test_where_the_exported_graphs_do_not_fit_the_budget_it_goes_on_predicting(entry: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    bundle, folder = entry
    with Adapter.open(bundle, ENOUGH, roles="adapt", prepared=False) as probe:
        exported = probe.memory["planned"]
    with Adapter.open(bundle, ENOUGH, roles="adapt") as adapter:
        assert adapter.memory["planned"] < exported - MIB
        pressure = pressed(adapter)
        down(adapter, pressure)
        shutil.rmtree(folder)
        claim, items = adapter._claim, wanted(adapter.manifest, "adapt", None)
        assert claim is not None
        held, least = claim.filled - claim.planned, adapter._service.choice.least.graphs
        claim.budget = claim.filled  # just what is planned
        adapter._service._again = lambda: loading._exported(adapter.bundle, items, claim, loading.Start(held, held, 0), loading.Terms(1), least)
        for seed in range(30):
            pressure.signs.grade = 0
            assert np.isfinite(adapter.adapt(frames(16, seed))).all()
        assert adapter.memory["level"] == Level.PREDICT
        assert adapter.stats["paused_steps"] == 30
        assert "the graphs as exported do not fit the budget" in caplog.text
