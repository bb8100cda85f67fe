"""Figures: what a bundle states of its graphs is what reading them says, plans use it, and what others' rules made is not used."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from edgeadapt import Adapter
from edgeadapt.bundle import WEIGHTS_OFFSET, Bundle, Figures, Manifest, onnxwire
from edgeadapt.errors import BudgetError, BundleError
from edgeadapt.memory import footprint, read
from edgeadapt.memory.figures import RULES, figures, places, session_bytes, usable
from edgeadapt.runtime.memory import Needs
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


def test_what_is_counted() -> None:
    """Another outcome here is another rule: raise RULES, or bundles that were exported before are planned by what they say."""
    weights = [helper.make_tensor("t", TensorProto.FLOAT, (4, 3, 2, 2), [0.0] * 48), helper.make_tensor("g", TensorProto.FLOAT, (8, 20), [0.0] * 160)]
    nodes = [
        helper.make_node("ConvTranspose", ["x", "t"], ["a"], strides=[2, 2]),
        helper.make_node("ReduceMean", ["a"], ["m"], keepdims=0),
        helper.make_node("Gemm", ["f", "g"], ["logits"]),
    ]
    values = [("x", (2, 4, 3, 3)), ("f", (2, 8)), ("logits", (2, 20)), ("a", (2, 3, 6, 6)), ("m", ())]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values]
    graph = helper.make_graph(nodes, "g", infos[:2], infos[2:3], weights, value_info=infos[3:])
    found = figures(read(helper.make_model(graph).SerializeToString()))
    moved = [288 + 192 + 864 + 2 * 864, 864 + 4, 64 + 640 + 160]  # each node is slower to move than to compute
    assert found.seconds == pytest.approx(sum(moved) / 8e9 + 9e-6, abs=1e-9)
    assert asdict(replace(found, seconds=0.0)) == {
        "rules": 1,
        "nodes": 3,
        "edges": 8,
        "attributes": 4,
        "initialisers": 2,
        "inside": 256,
        "beside": 4 * 8 * 32,
        "exact": True,
        "seconds": 0.0,
        "windows": ("0", "0"),
    }
    assert session_bytes(found) == footprint.session_bytes(read(helper.make_model(graph).SerializeToString()))


def test_windows_are_those_of_the_weights(toy: ShapedToy) -> None:
    graph = read(toy.graphs["adapt.b4"])
    frozen = {tensor.offset // 65536 for tensor in graph.external} | {(tensor.offset + tensor.length - 1) // 65536 for tensor in graph.external}
    assert {index for index in range(64) if places(figures(graph))[0] >> index & 1} == frozen >= {WEIGHTS_OFFSET // 65536}
    graph.external = [replace(tensor, location="weights.bin") for tensor in graph.external]
    assert places(figures(graph, prepared=True)) == (0, places(figures(graph))[0])


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


def test_figures_by_other_rules_are_not_used(toy: ShapedToy, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = stated(toy, tmp_path / "other.edgeadapt", rules=RULES + 1, edges=0, beside=2**40)
    assert not usable(other.manifest.graphs["predict.b1"].figures)
    assert Needs(other, 1)["adapt.b4"] == Needs(bundle, 1)["adapt.b4"]
    lying = stated(toy, tmp_path / "lying.edgeadapt", beside=2**40)
    assert Needs(lying, 1)["adapt.b4"].beside == 2**40
    monkeypatch.setattr(onnxwire, "fields", None)
    assert Needs(lying, 1)["adapt.b4"].beside == 2**40, "which is not read"


def test_a_graph_without_a_stated_region_is_read(toy: ShapedToy, bundle: Bundle, tmp_path: Path) -> None:
    specs = {name: replace(spec, region_bytes=0) for name, spec in bundle.manifest.graphs.items()}
    unknown = Bundle.open(toy.write(tmp_path / "toy.edgeadapt", graphs=specs))
    assert Needs(unknown, 1)["adapt.b4"] == Needs(bundle, 1)["adapt.b4"]


WRONG = [
    ({"rules": 0}, "figures.rules: expected a whole number of at least 1"),
    ({"nodes": 1}, "figures.nodes: expected"),
    ({"edges": -1}, "figures.edges: expected a whole number of at least 0"),
    ({"inside": 1.5}, "figures.inside: expected a whole number"),
    ({"exact": 1}, "figures.exact: expected true or false"),
    ({"seconds": -1.0}, "figures.seconds: expected a number of at least 0"),
    ({"seconds": "1"}, "figures.seconds: expected a number"),
    ({"windows": ["0"]}, "figures.windows: expected two texts"),
    ({"windows": ["0", "0x1"]}, "figures.windows[1]: expected text like"),
    ({"windows": ["f" * 20000, "0"]}, "figures.windows[0]: expected text like"),
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


def test_no_figures_are_no_key(toy: ShapedToy, tmp_path: Path) -> None:
    told = json.loads(Bundle.open(toy.write(tmp_path / "toy.edgeadapt")).manifest.to_bytes())
    assert all("figures" not in graph for graph in told["graphs"].values())
