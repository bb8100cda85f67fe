"""Figures: what a bundle states of its graphs is what reading them says, plans use it, and what others' rules made is not used."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from edgeadapt import Adapter
from edgeadapt.bundle import Bundle, Figures, Manifest
from edgeadapt.bundle.graphspec import FIGURES
from edgeadapt.errors import BudgetError, BundleError
from edgeadapt.memory import footprint, read
from edgeadapt.memory.figures import figures, structures
from edgeadapt.runtime.memory import Needs
from tests.child import run_json
from tests.shapedtoy import ShapedToy
from tests.toybundle import Toy

pytestmark = pytest.mark.device


def stated(toy: Toy, path: Path, **changes: Any) -> Bundle:
    """A toy's bundle that says what an exported one does of its graphs: figures and regions. changes: of the figures."""
    plain = Needs(Bundle.open(toy.write(path)), 1)
    specs = {
        name: replace(spec, figures=replace(figures(plain.graph(name)), **changes), region_bytes=plain[name].region)
        for name, spec in plain.bundle.manifest.graphs.items()
    }
    return Bundle.open(toy.write(path, graphs=specs))


@pytest.fixture(scope="module")
def toy() -> ShapedToy:
    return ShapedToy(width=48, batches=(1, 4), lean=True)


@pytest.fixture(scope="module")
def bundle(toy: ShapedToy, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return stated(toy, tmp_path_factory.mktemp("figures") / "stated.edgeadapt")


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph may be read."""

    def never(self: Bundle, name: str) -> bytes:
        raise AssertionError(f"{name} is read")

    monkeypatch.setattr(Bundle, "graph_bytes", never)


Shapes = tuple[tuple[int, ...], ...]

COUNTED: list[tuple[str, Shapes, tuple[int, ...], dict[str, Any], tuple[int, int, int, int, int, bool], tuple[float, float]]] = [
    # operator, what it takes (the last one is a constant), what it gives, attributes; then edges, attributes, initialisers, inside, beside, exact;
    # then operations and bytes moved, of which the slower counts
    ("Relu", ((2, 8),), (2, 8), {}, (2, 0, 0, 0, 0, True), (16, 128)),
    ("Reshape", ((2, 8), (2,)), (4, 4), {}, (3, 0, 1, 0, 0, True), (0, 0)),
    ("Transpose", ((2, 8),), (8, 2), {"perm": [1, 0]}, (2, 1, 0, 0, 0, True), (16, 128)),
    ("Conv", ((2, 4, 5, 5), (6, 4, 3, 3)), (2, 6, 3, 3), {}, (3, 0, 1, 0, 0, True), (2 * 18 * 216, 800 + 864 + 432 + 2 * 4 * 18 * 36)),
    ("Conv", ((2, 4, 5, 5), (4, 1, 3, 3)), (2, 4, 3, 3), {"group": 4}, (3, 1, 1, 0, 0, True), (2 * 18 * 36, 800 + 144 + 288 + 2 * 4 * 18 * 9 * 4)),
    ("Conv", ((2, 4, 5, 5), (6, 4, 1, 1)), (2, 6, 5, 5), {}, (3, 0, 1, 0, 0, True), (2 * 50 * 24, 800 + 96 + 1200)),
    ("ConvTranspose", ((2, 4, 3, 3), (4, 3, 2, 2)), (2, 3, 4, 4), {}, (3, 0, 1, 256, 0, True), (2 * 18 * 48, 288 + 192 + 384 + 2 * 4 * 18 * 12)),
    ("ConvTranspose", ((2, 4, 3, 3), (4, 1, 2, 2)), (2, 4, 4, 4), {"group": 4}, (3, 1, 1, 0, 0, True), (2 * 18 * 16, 864 + 2 * 4 * 18 * 4)),
    ("MatMul", ((2, 8), (8, 20)), (2, 20), {}, (3, 0, 1, 0, 1024, True), (2 * 8 * 40, 64 + 640 + 160)),
    ("Gemm", ((2, 8), (20, 8)), (2, 20), {"transB": 1}, (3, 3, 1, 0, 1024, True), (2 * 8 * 40, 64 + 640 + 160)),
    ("Gemm", ((8, 2), (8, 20)), (2, 20), {"transA": 1}, (3, 3, 1, 0, 1024, True), (2 * 8 * 40, 64 + 640 + 160)),
    ("BatchNormalization", ((2, 3, 4), (3,)), (2, 3, 4), {}, (6, 1, 1, 0, 0, True), (24, 96 + 4 * 12 + 96)),
    ("Hardmax", ((2, 8),), (2, 8), {}, (2, 0, 0, 0, 0, False), (16, 128)),
]


@pytest.mark.parametrize(("op", "takes", "gives", "attributes", "counts", "work"), COUNTED)
def test_what_is_counted(op: str, takes: Shapes, gives: tuple[int, ...], attributes: dict[str, Any], counts: Any, work: tuple[float, float]) -> None:
    """Another outcome here is another rule: raise FIGURES with it, or bundles that were exported before are planned by what they say."""
    assert FIGURES == 1
    names = [f"t{index}" for index in range(len(takes))]
    kind = TensorProto.INT64 if op == "Reshape" else TensorProto.FLOAT
    constants = [helper.make_tensor(names[-1], kind, takes[-1], np.ones(takes[-1], np.int64).ravel())] if len(takes) > 1 else []
    given = [*names, *names[-1:] * (5 - len(names))] if op == "BatchNormalization" else names
    inputs = [helper.make_tensor_value_info("t0", TensorProto.FLOAT, takes[0])]
    output = [helper.make_tensor_value_info("out", TensorProto.FLOAT, gives)]
    graph = helper.make_graph([helper.make_node(op, given, ["out"], **attributes)], "g", inputs, output, constants)
    found = figures(read(helper.make_model(graph).SerializeToString()))
    assert (found.edges, found.attributes, found.initialisers, found.inside, found.beside, found.exact) == counts
    assert found.seconds == pytest.approx(max(work[0] / 30e9, work[1] / 8e9) + 3e-6, abs=1e-9)


def test_structures(bundle: Bundle) -> None:
    for name, spec in bundle.manifest.graphs.items():
        graph = read(bundle.graph_bytes(name))
        assert spec.figures is not None
        assert structures(spec.nodes, spec.figures) == footprint.session_bytes(footprint.count(graph))


def test_windows_are_those_of_the_weights(toy: ShapedToy, bundle: Bundle) -> None:
    external = read(toy.graphs["adapt.b4"]).external
    frozen = {tensor.offset // 65536 for tensor in external} | {(tensor.offset + tensor.length - 1) // 65536 for tensor in external}
    assert {index for index in range(64) if bundle.windows("adapt.b4") >> index & 1} == frozen >= {0}
    own = [replace(tensor, location="weights.bin") for tensor in external]
    assert footprint.places(own, prepared=True) == (0, bundle.windows("adapt.b4"))
    assert footprint.places(own, prepared=False) == (bundle.windows("adapt.b4"), 0) == footprint.places(external, prepared=True)
    assert Bundle.open(bundle.path, verify=False).windows("adapt.b4") == bundle.windows("adapt.b4")


def test_needs_are_the_same_as_read(toy: ShapedToy, bundle: Bundle, tmp_path: Path) -> None:
    plain = Needs(Bundle.open(toy.write(tmp_path / "plain.edgeadapt")), 1)
    for threads in (1, 3):
        says = Needs(bundle, threads)
        specs = {name: replace(spec, figures=None) for name, spec in bundle.manifest.graphs.items()}
        reads = Needs(Bundle.open(toy.write(tmp_path / "told.edgeadapt", graphs=specs)), threads)
        for name in bundle.manifest.graphs:
            assert says[name] == reads[name]
            assert threads > 1 or says[name] == plain[name]


@pytest.mark.usefixtures("unread")
def test_a_plan_reads_no_graph(bundle: Bundle) -> None:
    needs = Needs(bundle, 2)
    assert all(needs[name].exact for name in bundle.manifest.graphs)
    with pytest.raises(BudgetError, match="does not fit the budget"):
        Adapter.open(bundle.path, 2**20)


def test_figures_by_other_rules_are_not_used(bundle: Bundle) -> None:
    told = json.loads(bundle.manifest.to_bytes())
    told["graphs"]["adapt.b4"]["figures"] = {"rules": FIGURES + 1, "else": "unknown"}
    manifest = Manifest.from_json(told)
    assert manifest.graphs["adapt.b4"].figures is None
    assert manifest.graphs["predict.b1"].figures is not None


def test_figures_that_are_stated_are_used(toy: ShapedToy, tmp_path: Path) -> None:
    assert Needs(stated(toy, tmp_path / "other.edgeadapt", beside=2**40), 1)["adapt.b4"].beside == 2**40


def test_that_a_graph_cannot_be_counted_is_nobodys_word(toy: ShapedToy, bundle: Bundle, tmp_path: Path) -> None:
    """Nothing would bound its region."""
    lying = stated(toy, tmp_path / "lying.edgeadapt", exact=False, beside=2**40)
    assert all(Needs(lying, 1)[name] == Needs(bundle, 1)[name] for name in bundle.manifest.graphs)


def test_a_graph_that_is_said_to_be_countable_and_is_not(tmp_path: Path) -> None:
    unshaped = Toy(width=48)
    specs = {name: replace(spec, region_bytes=2**20, figures=Figures(FIGURES, 1, 1, 1, 0, 0, True, 0.0)) for name, spec in unshaped.specs.items()}
    path = unshaped.write(tmp_path / "toy.edgeadapt", graphs=specs)
    with pytest.raises(BundleError, match="does not state the shape of") as refused:
        Adapter.open(path, "8GiB")  # the process of all tests has long been large
    assert "edited" in refused.value.hint
    Adapter.open(path).close()


@pytest.mark.native
def test_figures_that_lie_do_not_pass_a_budget(tmp_path: Path) -> None:
    """What is counted too small is noticed when the graphs are loaded: refused, or held, but for the little that a graph's first run takes."""
    path = stated(ShapedToy(depth=60), tmp_path / "toy.edgeadapt", edges=0, attributes=0, initialisers=0, inside=0, beside=0).path
    honest = stated(ShapedToy(depth=60), tmp_path / "honest.edgeadapt").path
    opened = {"lying": 0, "honest": 0}
    for budget in range(52, 70, 2):
        for name, bundle in (("lying", path), ("honest", honest)):
            held = run_json([sys.executable, "-c", SERVED, str(bundle), str(budget)])
            assert held["peak"] <= budget * 2**20 + (2**20 if name == "lying" else 0)
            opened[name] += held["peak"] > 0
    assert 0 < opened["honest"] < 9, "budgets on both sides of what it needs"
    assert opened["honest"] <= opened["lying"]


SERVED = """
import json, sys
import numpy as np
from edgeadapt import Adapter
from edgeadapt.errors import BudgetError
frames = np.zeros((4, 3, 6, 6), np.float32)
try:
    adapter = Adapter.open(sys.argv[1], f"{sys.argv[2]}MiB")
    for _ in range(3):
        adapter.adapt(frames)
    peak = adapter.memory["peak"]
except BudgetError:
    peak = 0
print(json.dumps({"peak": peak}))
"""


def test_a_graph_without_a_stated_region_is_read(toy: ShapedToy, bundle: Bundle, tmp_path: Path) -> None:
    specs = {name: replace(spec, region_bytes=0) for name, spec in bundle.manifest.graphs.items()}
    unknown = Bundle.open(toy.write(tmp_path / "toy.edgeadapt", graphs=specs))
    assert Needs(unknown, 1)["adapt.b4"] == Needs(bundle, 1)["adapt.b4"]


WRONG = [
    ({"rules": 0}, "figures.rules: expected a whole number of at least 1"),
    ({"edges": -1}, "figures.edges: expected a whole number of at least 0"),
    ({"inside": 1.5}, "figures.inside: expected a whole number"),
    ({"exact": 1}, "figures.exact: expected true or false"),
    ({"seconds": -1.0}, "figures.seconds: expected a number of at least 0"),
    ({"seconds": "1"}, "figures.seconds: expected a number"),
    ({"more": 1}, "figures.more is not known"),
]


@pytest.mark.parametrize(("changes", "says"), WRONG)
def test_figures_that_cannot_be(bundle: Bundle, changes: dict[str, Any], says: str) -> None:
    told = json.loads(bundle.manifest.to_bytes())
    assert Manifest.from_json(told) == bundle.manifest
    told["graphs"]["adapt.b4"]["figures"] |= changes
    with pytest.raises(BundleError) as refused:
        Manifest.from_json(told)
    assert says in refused.value.message


@pytest.mark.parametrize("key", [field.name for field in fields(Figures)])
def test_figures_are_whole(bundle: Bundle, key: str) -> None:
    told = json.loads(bundle.manifest.to_bytes())
    del told["graphs"]["adapt.b4"]["figures"][key]
    with pytest.raises(BundleError, match=rf"figures\.{key} is missing"):
        Manifest.from_json(told)


def test_the_manifest_has_none_of_its_own(bundle: Bundle) -> None:
    told = json.loads(bundle.manifest.to_bytes())
    told["figures"] = told["graphs"]["adapt.b4"]["figures"]
    with pytest.raises(BundleError, match=r"figures is not known"):
        Manifest.from_json(told)


def test_no_figures_are_no_key(toy: ShapedToy, tmp_path: Path) -> None:
    told = json.loads(Bundle.open(toy.write(tmp_path / "toy.edgeadapt")).manifest.to_bytes())
    assert all("figures" not in graph for graph in told["graphs"].values())
