"""The ledger's lines: by hand where they are counted, against onnxruntime and malloc where they were measured."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeadapt.bundle import weights
from edgeadapt.bundle.onnxwire import External
from edgeadapt.errors import BundleError, UsageError
from edgeadapt.memory import Graph, Machine, Node, Plan, Tensor, costs, footprint, read
from edgeadapt.memory.curve import SCRATCH, curve, thinned
from edgeadapt.memory.ledger import Ledger, Line, Setup, layout, ledger, used
from tests.child import TELLS, run_json
from tests.shapedtoy import ShapedToy
from tests.toybundle import CLASSES, SIDE, Toy

pytestmark = pytest.mark.device

FLOOR = 50_000_000
HERE = Setup((), FLOOR, arm=platform.machine() == "aarch64")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory):
    return ShapedToy().bundle(tmp_path_factory.mktemp("toy") / "toy.edgeadapt")


def graph_of(*nodes: Node, constants: tuple[str, ...] = (), **shapes: tuple[int, ...]) -> Graph:
    graph = Graph(list(nodes), {name: Tensor(shape, 32) for name, shape in shapes.items()}, inputs=["x"], outputs=["y"])
    graph.constants = {name: graph.values[name].nbytes for name in constants}
    return graph


def test_a_ledger_is_the_sum_of_its_lines_as_text_and_as_json() -> None:
    found = Ledger((Line("one", 1000, "counted", "a note"), Line("another", 2**20, "measured")))
    assert found.total == 1000 + 2**20
    assert found["another"].bytes == 2**20
    assert json.loads(json.dumps(found.plain()))["lines"][0] == {"name": "one", "bytes": 1000, "known": "counted", "note": "a note"}
    lines = found.table().splitlines()
    assert [line.split()[0] for line in lines] == ["one", "another", "process's"]
    assert "1,000 B    1000 B  counted   a note" in lines[0] or "1,000 B" in lines[0]
    assert "1,049,576 B" in lines[2]
    with pytest.raises(KeyError):
        found["none"]


def test_the_counted_lines_of_a_toy(bundle) -> None:
    found = ledger(bundle, Setup(("adapt.b4",), FLOOR, "estimated"))
    top = layout(bundle, "adapt.b4", Machine())
    assert {line.known for line in found.lines} == {"counted", "measured", "estimated"}
    assert found["Python and libraries"] == Line("Python and libraries", FLOOR - footprint.STARTED, "estimated", found["Python and libraries"].note)
    assert found["activations"].bytes + found["workspace"].bytes == top.plan.peak == max(top.plan.curve())
    assert found["activations"].bytes + found["workspace"].bytes + found["gaps"].bytes <= top.region + footprint.LEAST_MARGIN
    small = [3 * 64, 64, 64, 64]  # everything but statistics: gamma, beta, their moments; the head's bias is not written; all fit 64 bytes
    assert found["state"].bytes == 2 * 64 * (len(small) + 2) + 64
    assert found["frames and logits"].bytes == 2 * 4 * 4 * (3 * SIDE * SIDE + CLASSES)
    assert found["prepacked weights"].bytes == 2 * 4 * 8 * 16  # the head [8,5] in panels of 16 columns, for each of two graphs
    assert found["weights"].bytes % 4096 == 0
    assert 0 < found["weights"].bytes <= -(-bundle.path.stat().st_size // 4096) * 4096
    assert found["allowance"].bytes % 4096 == 0
    assert sum(line.bytes for line in found.lines) == found.total


def test_a_setup_changes_its_lines(bundle) -> None:
    base = ledger(bundle, Setup(("adapt.b4",), FLOOR))
    bare = ledger(bundle, Setup(("adapt.b4",), FLOOR, prepacking=False))
    assert bare["prepacked weights"].bytes == 0
    assert bare["region's table"].bytes <= base["region's table"].bytes
    two = ledger(bundle, Setup(("adapt.b4",), FLOOR, threads=2))
    assert two["threads"].bytes == footprint.THREAD
    assert (
        two["gaps"].bytes + two["workspace"].bytes + two["activations"].bytes
        > base["gaps"].bytes + base["workspace"].bytes + base["activations"].bytes
    )
    alone = ledger(bundle, Setup((), FLOOR))
    assert alone.total == base.total  # of a toy, starting takes most
    assert alone["starting"].bytes > base["starting"].bytes
    assert alone["graph structures"].bytes < base["graph structures"].bytes
    wide = ledger(bundle, Setup(("adapt.b4",), FLOOR, page=16384))
    assert wide["weights"].bytes % 16384 == 0


def test_code_that_was_measured_on_a_board_is_what_is_given_back_there(bundle) -> None:
    told, usual = (ledger(bundle, Setup(("adapt.b4",), FLOOR, started=started)) for started in (10_000_000, None))
    assert told["Python and libraries"].bytes == FLOOR - 10_000_000
    assert usual["Python and libraries"].bytes == FLOOR - footprint.STARTED
    none = ledger(bundle, Setup(("adapt.b4",), FLOOR, started=0))
    assert none["Python and libraries"].bytes == FLOOR


def test_loading_a_state_has_a_line(bundle) -> None:
    """The largest tensor, and those that the graphs in use do not write."""
    sizes = {spec.name: spec.nbytes for spec in bundle.manifest.state}
    for names in (("predict.b1",), ("predict.b1", "adapt.b4")):
        written = {name for graph in names for name in bundle.manifest.graphs[graph].writes}
        rest = sum(size for name, size in sizes.items() if name not in written)
        assert ledger(bundle, Setup(names, FLOOR))["restoring"].bytes == max(sizes.values()) + rest


def test_starting_counts_where_it_takes_more_than_serving(bundle, monkeypatch) -> None:
    """All of onnxruntime's code at first, then what is loaded and the code for making the last session."""
    small = ledger(bundle, Setup((), FLOOR))
    assert small.total == FLOOR + footprint.BEGINNING
    monkeypatch.setattr(footprint, "SESSION", 30_000_000)
    large = ledger(bundle, Setup((), FLOOR))
    kept = ("weights", "prepacked weights", "graph structures", "region's table", "state", "frames and logits", "allowance")
    loaded = ("Python and libraries", "adapter", *kept)
    assert large.total == sum(large[name].bytes for name in loaded) + footprint.LOADING
    assert large["starting"].bytes == footprint.LOADING - sum(line.bytes for line in large.lines if line.name not in (*loaded, "starting"))
    monkeypatch.setattr(footprint, "LOADING", 0)
    assert "starting" not in {line.name for line in ledger(bundle, Setup((), FLOOR)).lines}


def test_the_first_graph_is_always_among_those_in_use() -> None:
    assert used(("adapt.b4", "predict.b1")) == ("predict.b1", "adapt.b4")


def test_graphs_that_are_not_there_or_do_not_state_shapes_are_refused(bundle, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"has no graph adapt\.b7"):
        ledger(bundle, Setup(("adapt.b7",), FLOOR))
    plain = Toy().write(tmp_path / "plain.edgeadapt")
    from edgeadapt.bundle import Bundle

    with pytest.raises(BundleError, match="does not state the shapes"):
        ledger(Bundle.open(plain), Setup((), FLOOR))


def test_pages_of_weights_count_once_in_windows_that_end_with_the_file() -> None:
    def tensor(offset: int, length: int) -> External:
        return External("w", 1, (length // 4,), "", offset, length, True)

    window = weights.WINDOW
    assert footprint.mapped_pages(weights.windows([tensor(4096, 100), tensor(8192, 100)]), 10 * window, 4096) == window
    assert footprint.mapped_pages(weights.windows([tensor(window - 4, 8)]), 10 * window, 4096) == 2 * window
    assert footprint.mapped_pages(weights.windows([tensor(window, 100)]), window + 5000, 4096) == 8192
    assert footprint.mapped_pages(weights.windows([]), window, 4096) == 0


def test_of_a_region_only_what_was_ever_used_counts() -> None:
    sizes = (1024, 2048, 1024, 512)
    graph = Graph(inputs=["x"], outputs=["y"], values={"x": Tensor((1,), 32), "y": Tensor((1,), 32)})
    names = ["x", *(f"t{index}" for index in range(len(sizes))), "y"]
    graph.values |= {name: Tensor((size,), 32) for name, size in zip(names[1:-1], sizes)}
    graph.nodes = [Node("Exp", [a], [b]) for a, b in zip(names[:-1], names[1:])]
    plan = Plan(graph)
    assert plan.peak == 4 * (1024 + 2048)
    assert footprint.touched([plan], 2**20, 256) == 4 * (1024 + 2048 + 0)
    assert footprint.touched([plan], 2**20, 4096) == 12288
    assert footprint.touched([plan, plan], 12288, 256) == 12288
    assert footprint.touched([plan], 4096, 256) == 4096  # does not fit: all of it


PROFILED = """
import json, sys
from edgeadapt.runtime import profiling, session
found = []
for prepacking in (True, False):
    options = session.options(1)
    if not prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    found.append(profiling.memory_of(open(sys.argv[1], "rb").read(), ".", options=options).base)
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("op", "given", "weight", "made", "attributes"),
    [
        ("Gemm", (8, 64), (64, 10), (8, 10), {}),
        ("Gemm", (8, 64), (10, 64), (8, 10), {"transB": 1}),
        ("MatMul", (2, 8, 100), (100, 33), (2, 8, 33), {}),
        ("MatMul", (2, 16, 16), (2, 16, 16), (2, 16, 16), {}),
        ("ConvTranspose", (1, 8, 4, 4), (8, 4, 3, 3), (1, 4, 6, 6), {}),
        ("ConvTranspose", (1, 8, 4, 4), (8, 4, 3, 3), (1, 8, 6, 6), {"group": 2}),
        ("ConvTranspose", (1, 8, 4, 4), (8, 1, 3, 3), (1, 8, 6, 6), {"group": 8}),
        ("Conv", (1, 8, 4, 4), (8, 8, 3, 3), (1, 8, 2, 2), {}),
    ],
)
def test_copies_of_weights_are_onnxruntimes_to_the_byte(tmp_path: Path, op, given, weight, made, attributes) -> None:
    constant = onnx.numpy_helper.from_array(np.ones(weight, np.float32), "w")
    shapes = {"x": given, "t": given, "u": made, "y": made}
    values = {name: helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()}
    nodes = [helper.make_node("Neg", ["x"], ["t"]), helper.make_node(op, ["t", "w"], ["u"], **attributes), helper.make_node("Neg", ["u"], ["y"])]
    graph = helper.make_graph(nodes, "g", [values["x"]], [values["y"]], [constant], value_info=[values["t"], values["u"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    packed, bare = run_json([sys.executable, "-c", PROFILED, str(path)])
    assert sum(footprint.prepacked(read(path.read_bytes()))) == packed - bare or not TELLS


HELD = """
import json, sys
sys.path.insert(0, "benchmarks")
import _held
print(json.dumps(_held.heap(sys.argv[1], sys.argv[1])["sizes"][1]))
"""


@pytest.mark.native
def test_a_sessions_structures_are_about_what_malloc_gave_out(bundle, tmp_path) -> None:
    nodes, values = [], []
    for index in range(200):
        op, extra = (("Relu", []), ("Mul", ["c"]), ("Softmax", []), ("Add", ["c"]))[index % 4]
        nodes.append(helper.make_node(op, [f"t{index}", *extra], [f"t{index + 1}"], name=f"{index}:layer.{index}"))
        values.append(helper.make_tensor_value_info(f"t{index + 1}", 1, [4, 8]))
    ends = [helper.make_tensor_value_info(name, 1, [4, 8]) for name in ("t0", "t200")]
    constant = onnx.numpy_helper.from_array(np.ones(8, np.float32), "c")
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [constant], value_info=values[:-1])
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString())
    taken = run_json([sys.executable, "-c", HELD, str(path)])
    counted = footprint.session_bytes(footprint.count(read(path.read_bytes())))
    assert counted == pytest.approx(taken, rel=1 / 6 if TELLS else 1 / 4)  # measured on the newer one


def test_operations_and_bytes_of_products_by_hand() -> None:
    weight = (4, 3, 3, 3)
    conv = graph_of(Node("Conv", ["x", "w"], ["y"], {"group": 1}), constants=("w",), x=(2, 3, 8, 8), w=weight, y=(2, 4, 6, 6))
    assert costs.cost(conv, conv.nodes[0]).operations == 2 * 2 * 36 * 4 * 27
    deep = graph_of(Node("Conv", ["x", "w"], ["y"], {"group": 8}), constants=("w",), x=(1, 8, 4, 4), w=(8, 1, 3, 3), y=(1, 8, 4, 4))
    assert costs.cost(deep, deep.nodes[0]).operations == 2 * 16 * 8 * 9
    back = graph_of(Node("ConvTranspose", ["x", "w"], ["y"]), constants=("w",), x=(2, 4, 6, 6), w=weight, y=(2, 3, 8, 8))
    assert costs.cost(back, back.nodes[0]).operations == 2 * 2 * 36 * 4 * 27
    product = graph_of(Node("MatMul", ["x", "w"], ["y"]), x=(5, 8, 7), w=(7, 3), y=(5, 8, 3))
    assert costs.cost(product, product.nodes[0]) == costs.Cost(2 * 5 * 8 * 7 * 3, 4 * (280 + 21 + 120))
    turned = graph_of(Node("Gemm", ["x", "w"], ["y"], {"transA": 1}), x=(7, 8), w=(7, 3), y=(8, 3))
    assert costs.cost(turned, turned.nodes[0]).operations == 2 * 8 * 7 * 3
    plain = graph_of(Node("Add", ["x", "x"], ["y"]), x=(4, 4), y=(4, 4))
    assert costs.cost(plain, plain.nodes[0]) == costs.Cost(16, 192)
    view = graph_of(Node("Reshape", ["x"], ["y"]), x=(4, 4), y=(16,))
    assert costs.cost(view, view.nodes[0]) == costs.Cost(0, 0)
    assert costs.seconds(product, 1.0, 1e6) == pytest.approx(2 * 5 * 8 * 7 * 3 / 1e9 + costs.NODE_SECONDS)
    assert costs.seconds(product, 1e6, 1.0) == pytest.approx(4 * 421 / 1e9 + costs.NODE_SECONDS)


def test_what_stands_at_the_peak_and_where_it_came_from() -> None:
    nodes = [
        Node("Conv", ["x", "w"], ["a"], name="0:features.0"),
        Node("Exp", ["a"], ["b"], name="1:"),
        Node("Conv", ["b", "state.meta.0.conv.weight"], ["c"], name="2:"),
        Node("Add", ["c", "a"], ["y"], name="3:features.3"),
    ]
    shape = (1, 4, 16, 16)
    graph = graph_of(*nodes, constants=("w",), x=shape, a=shape, b=shape, c=shape, y=shape, w=(4, 4, 3, 3))
    graph.values["state.meta.0.conv.weight"] = Tensor((4, 4, 3, 3), 32)
    graph.inputs.append("state.meta.0.conv.weight")
    found = curve("adapt.b1", graph, Plan(graph))
    assert found.points == tuple(Plan(graph).curve())
    assert (found.peak, found.op, found.module, found.own) == (2, "Conv", "meta.0.conv", True)
    assert found.where == "node 3 of 4, Conv of meta.0.conv"
    standing = {item.tensor: item for item in found.standing}
    assert set(standing) == {"a", "b", "c", SCRATCH}
    assert sum(item.bytes for item in found.standing) == found.most
    assert (standing["a"].module, standing["a"].own, standing["a"].made, standing["a"].freed) == ("features.0", True, 0, 3)
    assert standing["b"].place == "after features.0"
    assert standing[SCRATCH].bytes == 65536


def test_a_curve_is_thinned_without_losing_its_peak() -> None:
    points = [*range(100), 1000, *range(100)]
    assert max(thinned(points, 10)) == 1000
    assert len(thinned(points, 10)) == 10
    assert thinned([1, 2], 10) == [1, 2]
