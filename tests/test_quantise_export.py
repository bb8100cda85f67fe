"""Whole exports with the frozen model in 8 bits: what the bundle holds, how it adapts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import edgeadapt
from edgeadapt.bundle import Bundle, InputSpec
from edgeadapt.cli.inspect import summary
from edgeadapt.errors import EdgeAdaptError, ExportError, UsageError
from edgeadapt.exporters import selfcheck
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.export import ExportReport, export
from edgeadapt.exporters.quantise import choose
from edgeadapt.exporters.warmup import _batches
from tests.zoo import named
from tests.zoo.calibrate import calibrate
from tests.zoo.data import gratings, to_float

SHAPE, BATCH = (3, 16, 16), 4
IMAGES, LABELS = gratings(96, 16)
CONVOLUTIONS = 7
"""Of the network below."""


def network() -> nn.Module:
    model = named.resnet_cifar(8, classes=4)
    return calibrate(model, SHAPE)


def data() -> Samples:
    """Labelled as the model itself has it, so that 8 bits are measured against a model that is right."""
    x = to_float(IMAGES)
    with torch.no_grad():
        y = network()(torch.from_numpy(x)).argmax(1).numpy()
    return Samples(x, y, InputSpec(SHAPE))


def exported(path: Path | None, method: str, **more: Any) -> ExportReport:
    options: dict[str, Any] = {"epochs": 0, "parts": 2} if method == "ecotta" else {}
    options |= {"method": method, "batches": (BATCH,), "allow_drop": True, "quantize": "int8", **more}
    return export(network(), path, shape=SHAPE, data=data(), warmup_batch=16, holdout=0.25, **options)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    for method in ("ecotta", "side"):
        exported(folder / f"{method}.edgeadapt", method)
    exported(folder / "slopes.edgeadapt", "ecotta", gradient="float")
    exported(folder / "float.edgeadapt", "ecotta", quantize="none")
    return {name: folder / f"{name}.edgeadapt" for name in ("ecotta", "side", "slopes", "float")}


def nodes(path: Path, graph: str) -> list[onnx.NodeProto]:
    return list(onnx.load_from_string(Bundle.open(path).graph(graph).data).graph.node)


def operators(path: Path, graph: str) -> list[str]:
    return [node.op_type for node in nodes(path, graph)]


def test_the_manifest_says_what_each_layer_is_computed_in(bundles: dict[str, Path]) -> None:
    with edgeadapt.Adapter.open(bundles["ecotta"]) as adapter:
        found = adapter.manifest.to_json()["quantisation"]
    assert found["form"] == "int8"
    assert (found["held_out"], len(found["layers"])) == (24, CONVOLUTIONS)
    assert found["float_accuracy"] >= found["accuracy"] - 0.1
    modules = {name: module for name, module in network().named_modules() if isinstance(module, nn.Conv2d)}
    assert {row["layer"]: row["weights"] for row in found["layers"]} == {name: module.weight.numel() for name, module in modules.items()}
    for row in found["layers"]:
        assert row["choice"] in ("int8", "float")
        assert (row["choice"] == "int8") == (row["why"] == "")
        assert row["decibels"] > 30 or row["why"] == "its error"
    assert sum(row["choice"] == "int8" for row in found["layers"]) >= 5
    with edgeadapt.Adapter.open(bundles["float"]) as adapter:
        assert not adapter.manifest.to_json().get("quantisation")


@pytest.mark.parametrize("name", ["ecotta", "side"])
@pytest.mark.parametrize("graph", ["source.b4", "predict.b4"])
def test_only_what_is_trained_or_was_left_is_convolved_in_float(bundles: dict[str, Path], name: str, graph: str) -> None:
    with edgeadapt.Adapter.open(bundles[name]) as adapter:
        rows = adapter.manifest.to_json()["quantisation"]["layers"]
        spared = sum(row["choice"] == "float" for row in rows)
    own = 2 if (name, graph) == ("ecotta", "predict.b4") else 0
    found = operators(bundles[name], graph)
    assert found.count("QLinearConv") == CONVOLUTIONS - spared
    assert found.count("Conv") == spared + own
    assert operators(bundles["float"], "source.b4").count("Conv") == CONVOLUTIONS


def test_statistics_that_stay_are_part_of_convolutions(bundles: dict[str, Path]) -> None:
    assert "BatchNormalization" not in operators(bundles["side"], "source.b4")
    assert operators(bundles["side"], "source.b4").count("Relu") == 1  # no convolution reads the last one
    assert operators(bundles["ecotta"], "predict.b4").count("BatchNormalization") >= CONVOLUTIONS


FRAMES = to_float(gratings(12, 16, seed=7)[0])


def test_a_side_network_adapts_beside_a_frozen_model_that_stays_as_it_is(bundles: dict[str, Path]) -> None:
    with edgeadapt.Adapter.open(bundles["side"]) as adapter:
        source = adapter.source(FRAMES)
        begun = adapter.predict(FRAMES)
        assert np.array_equal(begun, source)  # to the last bit
        adapter.adapt(FRAMES[:BATCH])
        adapter.learn(FRAMES[:BATCH], LABELS[:BATCH], rate=0.05)
        assert not np.array_equal(adapter.predict(FRAMES), begun)
        assert np.array_equal(adapter.source(FRAMES), source)


@pytest.mark.codes
@pytest.mark.parametrize("name", ["ecotta", "side"])
def test_the_frozen_model_is_near_the_users(bundles: dict[str, Path], name: str) -> None:
    with edgeadapt.Adapter.open(bundles[name]) as adapter, torch.no_grad():
        got, want = adapter.source(FRAMES), network()(torch.from_numpy(FRAMES)).numpy()
    signal = ((want - want.mean(0)) ** 2).mean()
    assert 0 < ((got - want) ** 2).mean() < 0.03 * signal


@pytest.mark.parametrize("name", ["ecotta", "side"])
def test_it_predicts_adapts_and_learns(bundles: dict[str, Path], name: str) -> None:
    with edgeadapt.Adapter.open(bundles[name]) as adapter:
        before = adapter.state
        for start in (0, 4, 8):
            assert adapter.adapt(FRAMES[start : start + BATCH]).shape == (BATCH, 4)
        assert (adapter.stats["steps"], adapter.stats["rejected_steps"]) == (3, 0)
        after = adapter.state
        assert all(np.isfinite(value).all() for value in after.values())
        parameters = [key for key in after if adapter.manifest.spec(key).kind == "parameter"]
        assert any(not np.array_equal(before[key], after[key]) for key in parameters)
        adapter.learn(FRAMES[:BATCH], LABELS[:BATCH], rate=0.01)
        first = adapter.metrics["loss"]
        for _ in range(15):
            adapter.learn(FRAMES[:BATCH], LABELS[:BATCH], rate=0.01)
        assert adapter.metrics["loss"] < first
        assert np.isfinite(adapter.predict(FRAMES)).all()


@pytest.mark.codes
def test_the_statistics_that_it_begins_with_are_those_that_its_graphs_measure(tmp_path: Path) -> None:
    """What 8 bits move a layer's statistics by, in deviations and as a share: as stored, and as onnxruntime measures it on the same batches."""
    stored, measured, batch = {}, {}, 16
    rows = list(_batches(data().split(0.25, 0)[0], batch, choose.MEASURED, 0))
    for form in ("int8", "none"):
        exported(tmp_path / f"{form}.edgeadapt", "norm", quantize=form, batches=(batch,))
        with edgeadapt.Adapter.open(tmp_path / f"{form}.edgeadapt") as adapter:
            stored[form], seen = adapter.state, []
            adapter.hyper["mix"] = 1.0
            for chosen in rows:
                adapter.predict(to_float(IMAGES[chosen]))
                seen.append(adapter.state)
            measured[form] = {key: np.mean([state[key] for state in seen], 0) for key in seen[0]}

    def moved(state: dict[str, Any], kind: str) -> Any:
        found = []
        for key in (key for key in state["none"] if key.endswith(kind)):
            variance = state["none"][key.removesuffix(kind) + "variance"]
            found.append((state["int8"][key] - state["none"][key]) / (np.sqrt(variance) if kind == "mean" else variance))
        return np.concatenate(found)

    for kind in ("mean", "variance"):
        told, here = moved(stored, kind), moved(measured, kind)
        assert np.sqrt(np.mean(here**2)) > 1e-3
        assert np.sqrt(np.mean((told - here) ** 2)) < 0.1 * np.sqrt(np.mean(here**2))


def test_weights_take_a_quarter_of_the_bytes(bundles: dict[str, Path]) -> None:
    """But for what stays float32: the meta networks' parameters are no weights, the classifier's are."""

    def size(path: Path) -> tuple[int, int]:
        graph = onnx.load_from_string(Bundle.open(path).graph("source.b4").data).graph
        large = [tensor for tensor in graph.initializer if len(tensor.dims) == 4]
        return sum(int(np.prod(tensor.dims)) * {1: 4, 3: 1}[tensor.data_type] for tensor in large), path.stat().st_size

    (plain, whole), (codes, less) = size(bundles["float"]), size(bundles["ecotta"])
    assert codes < 0.4 * plain
    assert less < whole + 200_000  # graphs are larger; the weights of this network are few


def test_gradients_pass_in_the_form_that_was_asked_for(bundles: dict[str, Path]) -> None:
    for name, in_codes in (("ecotta", True), ("slopes", False)):
        forward, step = (operators(bundles[name], graph).count("QLinearConv") for graph in ("predict.b4", "adapt.b4"))
        assert (step > forward) == in_codes
        assert ("ConvTranspose" in operators(bundles[name], "adapt.b4")) or in_codes


def test_a_sensitive_layer_stays_in_float(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        x = torch.from_numpy(to_float(IMAGES))
        # A channel in front of it has a size that nothing hangs on: the one grid of its input is too coarse for the others.
        model.layer2[0].bn1.weight[3] *= 3000.0  # type: ignore[union-attr, index]
        model.layer2[0].conv2.weight[:, 3] *= 1e-7  # type: ignore[union-attr, index]
        y = model(x).argmax(1).numpy()
    report = export(
        model, tmp_path / "m.edgeadapt", shape=SHAPE, data=Samples(to_float(IMAGES), y, InputSpec(SHAPE)), method="norm", batches=(BATCH,),
        quantize="int8", warmup_batch=16, holdout=0.25,
    )  # fmt: skip
    rows = {row["layer"]: row for row in report.manifest["quantisation"]["layers"]}
    assert (rows["layer2.0.conv2"]["choice"], rows["layer2.0.conv2"]["why"]) == ("float", "its error")
    assert rows["layer2.0.conv2"]["decibels"] < 30
    assert rows["layer1.0.conv1"]["choice"] == "int8"
    assert operators(tmp_path / "m.edgeadapt", "source.b4").count("Conv") == sum(row["choice"] == "float" for row in rows.values())


def test_where_no_error_is_allowed_all_stays_in_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "LIMIT", 0.0)
    report = exported(tmp_path / "m.edgeadapt", "side")
    assert {row["choice"] for row in report.manifest["quantisation"]["layers"]} == {"float"}
    assert "QLinearConv" not in operators(tmp_path / "m.edgeadapt", "predict.b4")


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"quantize": "int8"}, ExportError, "measured on source data, and none was given"),
        ({"quantize": "int4"}, UsageError, "quantize = 'int4' is not known"),
        ({"quantize": True}, UsageError, "quantize = True is not known"),
        ({"method": "tent", "gradient": "int8"}, UsageError, "gradients in 8 bits are of convolutions in 8 bits"),
        ({"method": "tent", "gradient": "half"}, UsageError, "gradient = 'half' is not known"),
        ({"method": "tent", "saved": "int4"}, UsageError, "saved = 'int4' is not known"),
        ({"quantize": "int8", "gradient": "int8"}, UsageError, "norm has no use for gradient"),
    ],
)
def test_what_cannot_be_is_said_plainly(options: dict[str, Any], kind: type[EdgeAdaptError], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        export(network(), None, shape=SHAPE, **{"method": "norm", "batches": (BATCH,), **options})
    assert caught.value.hint


def test_what_could_not_be_checked_stands_in_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = selfcheck._in_double

    def uncertain(program: Any, example: Any) -> Any:
        found = exact(program, example)
        return found and {name: 2 * value if name.startswith("new.momentum.") else value for name, value in found.items()}

    monkeypatch.setattr(selfcheck, "_in_double", uncertain)
    monkeypatch.setattr(selfcheck, "UPDATES", 1e-12)
    path = tmp_path / "m.edgeadapt"
    report = exported(path, "side", optimiser="sgd")
    names = report.manifest["selfcheck"]["adapt.b4"]["unchecked"]
    assert names
    assert all(name.startswith("momentum.") for name in names)
    line = f"the update of {', '.join(names[:3])}"
    for text in (report.table(), summary(Bundle.open(path))):
        assert [line in told for told in text.splitlines() if "not checked in adapt.b4" in told] == [True]


def test_stored_numbers_may_round_otherwise_as_far_as_double_precision_does_and_only_where_codes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(selfcheck, "FLIPS", 1e-9)
    monkeypatch.setattr(selfcheck, "refuse", lambda found: limits.append(found.flips_limit))
    exported(None, "side", updates="compact")
    coded = max(limits)
    limits.clear()
    exported(None, "side", updates="compact", quantize="none")
    assert coded > 1e-4
    assert max(limits) == 1e-9
