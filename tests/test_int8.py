"""Bundles on bytes: counted, planned and served with and without copies of their weights, and prepared with these in a file."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeadapt.bundle import Bundle
from edgeadapt.bundle.onnxwire import COPY, External
from edgeadapt.devices.boards import floor
from edgeadapt.errors import BundleError
from edgeadapt.memory import Machine, Plan, footprint, quantised, read, simulate
from edgeadapt.memory.graph import OWN
from edgeadapt.memory.ledger import Setup, ledger
from edgeadapt.memory.measured import measure
from edgeadapt.memory.simulation import Choice
from edgeadapt.runtime import choice as choices
from edgeadapt.runtime import copies, prepare_compare, prepared, preparing
from edgeadapt.runtime import session as sessions
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.choice import wanted
from edgeadapt.runtime.engine import Engine
from edgeadapt.runtime.memory import Needs, laid_out, planned
from edgeadapt.runtime.state import FlatState
from tests.child import TELLS, run_json
from tests.int8toy import Int8Toy
from tests.shapedtoy import ShapedToy
from tests.toybundle import SIDE

pytestmark = pytest.mark.device

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"depth": 2, "residual": False, "width": 64},
    "residual": {"depth": 2, "width": 64},
    "depthwise": {"depth": 2, "grouped": True, "width": 32},
    "zero points of a run": {"depth": 1, "moved": "zero", "width": 20},
    "scales of a run": {"depth": 1, "moved": "scale"},
}
ODD, WIDE = 90, 250
"""Channels that no kernel which writes bytes itself takes, so that copies are panels of a matrix everywhere: few, and enough to be seen."""

PROFILED = """
import json, sys
from edgeadapt.bundle import Bundle
from edgeadapt.runtime import profiling, region
from edgeadapt.runtime import session as sessions
bundle = Bundle.open(sys.argv[1], verify=False)
found = {}
for name in sys.argv[3:]:
    weights, graph = sessions.Weights(bundle), bundle.graph(name)
    with region.using(region.Region(prepacking=sys.argv[2] == "True")):
        chosen = sessions.options(1)
        weights.share(sessions.shared(graph, True), chosen)
        told = profiling.memory_of(graph.data, bundle.folder, options=chosen)
    found[name] = {"nodes": told.nodes, "in_use": told.in_use, "base": told.base}
print(json.dumps(found))
"""


def frames(batch: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((batch, 3, SIDE, SIDE), dtype=np.float32)


@pytest.mark.parametrize("prepacking", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_graph_is_counted_to_the_byte(tmp_path: Path, kind: str, prepacking: bool) -> None:
    """And runs as it is written: what makes floats of bytes is not done again for each that reads them."""
    toy = Int8Toy(**KINDS[kind])
    bundle = toy.bundle(tmp_path / "toy.edgeadapt")
    found = run_json([sys.executable, "-c", PROFILED, str(bundle.path), str(prepacking), *toy.graphs])
    for name, told in found.items():
        graph = read(toy.graphs[name])
        assert graph.countable
        assert told["nodes"] == list(range(len(graph.nodes)))
        machine = Machine.here(1, prepacking)
        if TELLS:
            assert [held - told["base"] for held in told["in_use"]] == Plan(graph, machine=machine).after()
            inside, beside = footprint.prepacked(graph, machine) if prepacking else (0, 0)
            assert inside + beside <= told["base"] < inside + beside + 8192


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_changes_no_number(tmp_path: Path, kind: str) -> None:
    path = Int8Toy(**KINDS[kind]).bundle(tmp_path / "toy.edgeadapt").path
    with Adapter.open(path, "8GiB") as one, Adapter.open(path) as other:
        for _ in range(3):
            assert np.array_equal(one.adapt(frames(4)), other.adapt(frames(4)))
        assert np.array_equal(one.predict(frames(1)), other.predict(frames(1)))


def test_a_bias_that_is_not_constant_is_added_or_the_graph_is_refused(tmp_path: Path) -> None:
    """Before 1.31 onnxruntime leaves it out where it prepacks weights for the kernel that writes bytes itself."""
    moving, constant = (Int8Toy(width=width, moved=moved).bundle(tmp_path / f"{moved}.edgeadapt") for width, moved in ((64, "bias"), (64, "")))
    if sessions.BIAS_LEFT_OUT:
        with pytest.raises(BundleError, match="leave out the bias of 2 convolutions"):
            Adapter.open(moving.path)
    else:
        with Adapter.open(moving.path) as one, Adapter.open(constant.path) as other:
            assert np.array_equal(one.adapt(frames(4)), other.adapt(frames(4)))
    panels = [Int8Toy(width=22, moved=moved).bundle(tmp_path / f"odd{moved}.edgeadapt") for moved in ("bias", "")]  # no such kernel
    with Adapter.open(panels[0].path) as one, Adapter.open(panels[1].path) as other:
        assert np.array_equal(one.adapt(frames(4)), other.adapt(frames(4)))


def test_without_copies_a_graph_needs_more_of_a_region_and_reads_weights_where_they_lie(tmp_path: Path) -> None:
    bundle = Int8Toy(width=128, depth=4).bundle(tmp_path / "toy.edgeadapt")
    needs = Needs(bundle, 1)
    kept, stored = needs.need("predict.b1", True), needs.need("predict.b1", False)
    assert stored.region > kept.region
    assert kept.places is not None
    assert stored.places is not None
    assert stored.places[0].bit_count() > kept.places[0].bit_count()
    lines = {prepacking: planned(needs, ["predict.b1", "adapt.b4"], prepacking).lines() for prepacking in (True, False)}
    assert lines[True]["prepacked weights"] > 2 * 5 * 128 * 128 * 9
    assert lines[False]["prepacked weights"] == 0
    assert lines[False]["region"] >= stored.region
    assert laid_out(needs, planned(needs, ["predict.b1"], False)).region.size >= stored.region


def test_figures_of_another_processor_are_not_believed(tmp_path: Path) -> None:
    toy = Int8Toy(width=64, depth=2)
    from edgeadapt.memory.figures import figures

    told = {name: replace(spec, figures=replace(figures(read(toy.graphs[name])), inside=2**40)) for name, spec in toy.specs.items()}
    assert Needs(Bundle.open(toy.write(tmp_path / "toy.edgeadapt", graphs=told)), 1)["predict.b1"].inside < 2**20


@pytest.mark.native
@pytest.mark.parametrize("prepacking", [True, False])
def test_the_ledger_is_what_a_process_takes(tmp_path: Path, prepacking: bool) -> None:
    """Weights that only copies are made of are not resident beside these; without copies they are, and nothing else."""
    bundle = Int8Toy(width=256, depth=4).bundle(tmp_path / "toy.edgeadapt")
    names = ("predict.b1", "adapt.b4")
    here, found = floor.look(), measure(bundle.path, Choice("adapt", 4, "adapt.b4", names, prepacking, 0, 0.0))
    told = ledger(bundle, Setup(names, here.floor, prepacking=prepacking, started=here.code))
    assert found["weights"] == pytest.approx(told["weights"].bytes, abs=65536)
    assert found["weights"] < 10**6 if prepacking else found["weights"] > 5 * 256 * 256 * 9
    region = sum(told[name].bytes for name in ("activations", "workspace", "gaps"))
    assert found["region"] - found["inside"] == pytest.approx(region, abs=16384 if TELLS else 65536)
    assert 0.95 * told.total < found["peak"] < 1.04 * told.total


def test_the_simulator_offers_copies_or_memory_with_their_times(tmp_path: Path) -> None:
    from edgeadapt.devices import boards

    bundle = Int8Toy(width=WIDE, depth=4).bundle(tmp_path / "toy.edgeadapt")
    found = simulate(bundle, boards.load("pi4-1gb"), role="adapt", batch=4)
    quick, small = (next(row for row in found.choices if row.prepacking is kept and row.role == "adapt") for kept in (True, False))
    assert small.total < quick.total - 4 * WIDE * WIDE * 9
    assert small.seconds == pytest.approx(2 * quick.seconds)


def test_leaner_forms_are_tried_before_copies_on_bytes_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = ShapedToy(lean=True).bundle(tmp_path / "toy.edgeadapt")
    needs, items = Needs(bundle, 1), wanted(bundle.manifest, None, None)
    monkeypatch.setattr(choices, "_ways", lambda _, item: list(bundle.manifest.forms(item.role, item.batch)))

    def tried() -> list[tuple[bool, bool]]:
        attempts = choices._attempts(needs, items, (items,))
        found = [(kept, any("lean" in name for form in forms.values() for name in form.graphs)) for forms, kept, _ in attempts]
        return list(dict.fromkeys(found))

    assert tried() == [(True, False), (False, False), (True, True), (False, True)]
    monkeypatch.setattr(needs, "on_bytes", lambda name: True)
    assert tried() == [(True, False), (True, True), (False, False), (False, True)]


# ---------------------------------------------------------------------------------------------------------- prepared


NAMES = ("predict.b1", "adapt.b4")


def made(width: int, factory: pytest.TempPathFactory) -> tuple[Bundle, prepared.Prepared]:
    """A bundle, and an entry that has both graphs: on a busy machine a version may seem slower than it is, so it is tried again."""
    bundle = Int8Toy(width=width, depth=4).bundle(factory.mktemp("odd") / "odd.edgeadapt")
    folder = factory.mktemp("cache")
    for attempt in range(6):
        found = preparing.make(bundle, cache=folder, names=NAMES, force=attempt > 0)
        if set(NAMES) <= set(found.graphs):
            return bundle, found
    return pytest.fail(str({name: found.record["graphs"][name]["why"] for name in NAMES}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, prepared.Prepared]:
    return made(ODD, tmp_path_factory)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, prepared.Prepared]:
    return made(WIDE, tmp_path_factory)


@pytest.fixture
def odd(pair: tuple[Bundle, prepared.Prepared]) -> Bundle:
    return pair[0]


@pytest.fixture
def entry(pair: tuple[Bundle, prepared.Prepared]) -> prepared.Prepared:
    return pair[1]


def test_each_version_is_compared_and_counted(entry: prepared.Prepared) -> None:
    for name in NAMES:
        versions = entry.record["graphs"][name]["versions"]
        for level in ("extended", "all"):
            assert versions[level]["exact"] in ((True,) if TELLS else (None,)), versions[level]
            assert versions[level]["stored_bytes"] > 9 * ODD * ODD * 4
            assert set(versions[level]["apart"]) >= {"logits", "statistics"}
            assert "differ" not in versions[level]["refused"]


@pytest.mark.parametrize("channels", [False, True])
def test_small_weights_and_scales_of_channels_are_prepared_like_others(tmp_path: Path, channels: bool) -> None:
    """Weights inside the graph have no place to tell of copies; onnxruntime's fused sums know one scale alone, and it fuses others too."""
    bundle = Int8Toy(width=22, depth=2, channels=channels).bundle(tmp_path / "toy.edgeadapt")
    entry = preparing.make(bundle, cache=tmp_path / "cache", names=NAMES)
    for name in NAMES:
        for level in ("extended", "all"):
            version = entry.record["graphs"][name]["versions"][level]
            assert "apart" in version or version["refused"].startswith(("it is the same", "its peak")), version
            assert version.get("apart", {"logits": 0.0})["logits"] <= prepare_compare.BYTES["logits"]


def external(graph: prepared.PreparedGraph, odd: Bundle, entry: prepared.Prepared) -> dict[str, External]:
    return {tensor.name: tensor for tensor in graph.read(odd.weights_size, entry.own_bytes).external}


def test_copies_lie_in_the_file_once_for_all_graphs(odd: Bundle, entry: prepared.Prepared) -> None:
    one, other = (external(entry.graphs[name], odd, entry) for name in NAMES)
    for level in range(4):
        assert one[f"conv{level}"].copies
        assert one[f"conv{level}"].copies == other[f"conv{level}"].copies
        assert one[f"conv{level}"].offset == other[f"conv{level}"].offset
    assert entry.graphs["predict.b1"].stored_bytes >= sum(length for tensor in one.values() for _, length in tensor.copies)
    assert entry.graphs["predict.b1"].base_bytes < ODD * ODD * 9
    assert other["after"].location != OWN  # what makes it floats reads it too
    assert not other["after"].copies


def test_prepared_graphs_on_bytes_serve_the_same(odd: Bundle, entry: prepared.Prepared) -> None:
    engines = [Engine(odd, FlatState(odd.manifest.state, odd.manifest.graphs, odd.initial_state()), 1, NAMES, ready) for ready in (None, entry)]
    spec, kinds = odd.manifest.graphs["adapt.b4"], {state.name: state.kind for state in odd.manifest.state}
    allowed = prepare_compare.limits(odd, "adapt.b4")
    for _ in range(3):
        found = []
        for engine in engines:
            engine.frames(4)[...] = frames(4)
            found.append({"logits": engine.run("adapt.b4", {}).logits.copy()})
            engine.frames(1)[...] = frames(1)
            found[-1]["alone"] = engine.run("predict.b1", {}).logits.copy()
        want, got = found
        assert np.abs(got["logits"] - want["logits"]).max() <= allowed["logits"] * np.abs(want["logits"]).max()
        assert np.abs(got["alone"] - want["alone"]).max() <= allowed["logits"] * np.abs(want["alone"]).max()
    assert spec.role in kinds or allowed is prepare_compare.BYTES


@pytest.mark.native
def test_copies_of_the_graph_that_runs_alone_are_resident(wide: Any) -> None:
    odd, entry = wide
    from edgeadapt.runtime.measured import present

    engine = Engine(odd, FlatState(odd.manifest.state, odd.manifest.graphs, odd.initial_state()), 1, NAMES, entry)
    file = str(entry.folder / OWN)
    before = copies.mapped(file)
    engine.prepare("predict.b1")
    between = copies.mapped(file)
    engine.prepare("adapt.b4")
    ranges = {"predict.b1": between - before, "adapt.b4": copies.mapped(file) - between}

    def held(name: str) -> int:
        return sum(present(*place) for place in ranges[name])

    for name, other in (NAMES, NAMES[::-1], NAMES):
        first = engine.run(name, {}, commit=False).logits.copy()
        assert held(name) > 4 * 9 * WIDE * WIDE
        assert held(other) == 0
        assert np.array_equal(engine.run(name, {}, commit=False).logits, first)


@pytest.mark.native
def test_the_ledger_of_prepared_graphs_is_what_a_process_takes(wide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    odd, entry = wide
    monkeypatch.setenv("EDGEADAPT_CACHE", str(entry.folder.parent))
    setup = Setup(NAMES, floor.look().floor, prepared=entry)
    told, exported = ledger(odd, setup), ledger(odd, replace(setup, prepared=None))
    found = measure(odd.path, Choice("adapt", 4, "adapt.b4", NAMES, True, 0, 0.0), prepared=True)
    assert found["weights"] <= told["weights"].bytes <= found["weights"] + 20 * 65536  # windows round up, for each copy
    assert told["prepacked weights"].bytes < exported["prepacked weights"].bytes - 8 * 9 * WIDE * WIDE
    assert told.total < exported.total - (2 if TELLS else 1) * 9 * WIDE * WIDE  # what does not tell counts what is copied twice
    assert 0.95 * told.total < found["peak"] < 1.03 * told.total


@pytest.mark.native
def test_a_budget_takes_prepared_graphs_on_bytes(wide: Any) -> None:
    odd, entry = wide
    needs, exported = Needs(odd, 1, entry), Needs(odd, 1)
    plan, other = (laid_out(given, planned(given, NAMES)) for given in (needs, exported))
    assert plan.total < other.total - 2 * 9 * WIDE * WIDE  # which version of a graph is the fastest here says how much less
    assert needs.need("predict.b1", False).region > needs["predict.b1"].region
    with Adapter.open(odd.path, "8GiB") as adapter:
        assert np.isfinite(adapter.adapt(frames(4))).all()


@pytest.mark.parametrize("value", ["QLinearConv+1|0;999999999999;0", "QLinearConv+1|5;6", "QLinearConv+1|-5;6;0", "QLinearConv+1|4096;64;0;1"])
def test_copies_from_elsewhere_are_refused(odd: Bundle, entry: prepared.Prepared, tmp_path: Path, value: str) -> None:
    graph = entry.graphs["predict.b1"]
    model = onnx.load(str(graph.model), load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if any(item.key.startswith(COPY) for item in tensor.external_data))
    for item in tensor.external_data:
        item.value = value if item.key.startswith(COPY) else item.value
    data = model.SerializeToString()
    (tmp_path / "graph.onnx").write_bytes(data)
    from edgeadapt.bundle.digest import sha256

    with pytest.raises(BundleError, match=r"copy of tensor|number of bytes|belongs"):
        replace(graph, model=tmp_path / "graph.onnx", digest=sha256(data).hexdigest()).read(odd.weights_size, entry.own_bytes)


def test_a_bundle_may_not_have_copies(tmp_path: Path) -> None:
    toy = Int8Toy(width=8)
    model = onnx.load_from_string(toy.graphs["predict.b1"])
    model.graph.initializer[-1].external_data.add(key=f"{COPY}0", value="QLinearConv+1|4096;64;0")
    toy.graphs["predict.b1"] = model.SerializeToString()
    with pytest.raises(BundleError, match="and nothing else"):
        toy.bundle(tmp_path / "toy.edgeadapt")


def test_only_weights_that_nothing_else_reads_are_let_go(odd: Bundle) -> None:
    predict, adapt = (quantised.released(read(odd.graph_bytes(name))) for name in NAMES)
    assert {"stem", "after", "conv0", "conv3"} <= predict
    assert "after" not in adapt
    assert "conv0" in adapt


def test_a_quantum_may_differ_and_six_may_not(odd: Bundle) -> None:
    allowed = prepare_compare.limits(odd, "predict.b1")
    assert prepare_compare.fault({"logits": 1 / 255}, allowed) == ""
    assert "logits" in prepare_compare.fault({"logits": 6 / 255}, allowed)
    floats = json.loads(json.dumps(allowed))
    assert floats == prepare_compare.BYTES
