"""Whole exports: every method on every family of models, through the self-check and the device's adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgeadapt
from edgeadapt.bundle import InputSpec
from edgeadapt.errors import BundleError, ExportError, InputError, UsageError
from edgeadapt.exporters import selfcheck
from edgeadapt.exporters.data import Samples, load_samples
from edgeadapt.exporters.export import export
from edgeadapt.exporters.methods.side import Side
from edgeadapt.exporters.options import calibration_rows
from edgeadapt.runtime import session as sessions
from tests.zoo import generated, named
from tests.zoo.calibrate import calibrate

METHODS = ("source", "norm", "tent", "ecotta", "side")


def samples(path: Path, shape: tuple[int, ...], classes: int, count: int = 40, dense: tuple[int, ...] = ()) -> Any:
    random = np.random.default_rng(0)
    x = random.standard_normal((count, *shape)).astype(np.float32)
    y = random.integers(classes, size=(count, *dense))
    np.savez(path / "train.npz", x=x, y=y)
    return load_samples(str(path / "train.npz"), InputSpec(shape))


def untrained(method: str, **options: Any) -> dict[str, Any]:
    """Options that only the method with meta networks takes."""
    return {**options, "epochs": 0} if method == "ecotta" else {}


def tiny() -> nn.Module:
    model = named.resnet_cifar(8)
    calibrate(model, (3, 16, 16), 0)
    return model


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    data = samples(folder, (3, 16, 16), 10)
    paths = {}
    for method in METHODS:
        paths[method] = folder / f"{method}.edgeadapt"
        export(tiny(), paths[method], shape=(3, 16, 16), data=data, method=method, batches=(4,), allow_drop=True, **untrained(method, parts=2))
    return paths


FRAMES = np.random.default_rng(5).standard_normal((9, 3, 16, 16)).astype(np.float32)


def torch_logits(x: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    with torch.no_grad():
        result: np.ndarray[Any, np.dtype[np.float32]] = tiny()(torch.from_numpy(x)).numpy()
    return result


@pytest.mark.parametrize("method", METHODS)
def test_the_source_graph_is_the_users_model(bundles: dict[str, Path], method: str) -> None:
    with edgeadapt.Adapter.open(bundles[method]) as adapter:
        np.testing.assert_allclose(adapter.source(FRAMES), torch_logits(FRAMES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["source", "side"])
def test_a_method_that_keeps_the_start_point_equals_the_source_bit_for_bit(bundles: dict[str, Path], method: str) -> None:
    with edgeadapt.Adapter.open(bundles[method]) as adapter:
        assert np.array_equal(adapter.predict(FRAMES), adapter.source(FRAMES))


@pytest.mark.parametrize("method", ["norm", "tent"])
def test_without_new_statistics_live_normalisation_equals_the_source_bit_for_bit(bundles: dict[str, Path], method: str) -> None:
    with edgeadapt.Adapter.open(bundles[method]) as adapter:
        before = adapter.state
        assert np.array_equal(adapter.predict(FRAMES, update_statistics=False), adapter.source(FRAMES))
        assert all(np.array_equal(value, before[name]) for name, value in adapter.state.items())


@pytest.mark.parametrize("method", ["tent", "ecotta", "side"])
def test_adapt_returns_the_logits_of_its_own_forward_pass(bundles: dict[str, Path], method: str) -> None:
    with edgeadapt.Adapter.open(bundles[method]) as first, edgeadapt.Adapter.open(bundles[method]) as second:
        np.testing.assert_allclose(first.adapt(FRAMES[:4]), second.predict(FRAMES[:4]), rtol=1e-5, atol=1e-5)
        changed = [name for name, value in first.state.items() if not np.array_equal(value, second.state[name])]
        assert any(first.manifest.spec(name).kind == "parameter" for name in changed)


@pytest.mark.parametrize("method", ["tent", "ecotta", "side"])
def test_learning_lowers_the_loss_on_what_was_learned(bundles: dict[str, Path], method: str) -> None:
    labels = np.arange(4) % 10
    with edgeadapt.Adapter.open(bundles[method]) as adapter:
        adapter.learn(FRAMES[:4], labels, rate=0.01)
        first = adapter.metrics["loss"]
        for _ in range(15):
            adapter.learn(FRAMES[:4], labels, rate=0.01)
        assert adapter.metrics["loss"] < first


def test_live_statistics_move_by_the_mixing_weight(bundles: dict[str, Path]) -> None:
    with edgeadapt.Adapter.open(bundles["norm"]) as adapter:
        before = adapter.state
        assert adapter.manifest.graphs["predict.b4"].defaults["mix"] == pytest.approx(0.05)
        adapter.predict(FRAMES[:4])
        with torch.no_grad():
            x = tiny().conv1(torch.from_numpy(FRAMES[:4]))  # type: ignore[operator, union-attr]
        want = 0.95 * before["statistics.bn1.mean"] + 0.05 * x.mean((0, 2, 3)).numpy()
        np.testing.assert_allclose(adapter.state["statistics.bn1.mean"], want, rtol=1e-4, atol=1e-6)
        want = 0.95 * before["statistics.bn1.variance"] + 0.05 * x.var((0, 2, 3), unbiased=False).numpy()
        np.testing.assert_allclose(adapter.state["statistics.bn1.variance"], want, rtol=1e-4, atol=1e-6)


class _Sensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.hidden(x)).relu())
        return logits


def test_single_values_do_not_wear_a_running_variance_down(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Sensor()
    calibrate(model, (6,), 0)
    export(model, tmp_path / "m.edgeadapt", shape=(6,), method="norm", batches=(4,))
    x = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)
    with edgeadapt.Adapter.open(tmp_path / "m.edgeadapt") as adapter:
        for frame in x:
            adapter.predict(frame)
        with torch.no_grad():
            want = model.hidden(torch.from_numpy(x[200:])).var(0).numpy()
        np.testing.assert_array_less(0.4 * want, adapter.state["statistics.norm.variance"])
        np.testing.assert_array_less(adapter.state["statistics.norm.variance"], 2.5 * want)


def test_batch_and_rate_defaults_follow_the_batch(bundles: dict[str, Path]) -> None:
    with edgeadapt.Adapter.open(bundles["ecotta"]) as adapter:
        graphs = adapter.manifest.graphs
        assert graphs["predict.b1"].defaults == {"mix": pytest.approx(0.02)}
        assert graphs["adapt.b4"].defaults["rate"] == pytest.approx(5e-4 * 4 / 64)


def test_frozen_weights_are_stored_once(bundles: dict[str, Path]) -> None:
    with edgeadapt.Adapter.open(bundles["ecotta"]) as adapter:
        members = adapter.manifest.members
        assert members["weights.bin"].size < 1.2 * sum(parameter.nbytes for parameter in tiny().parameters()) + 65536


@pytest.mark.parametrize(
    ("factory", "shape", "options"),
    [
        (lambda: named.wideresnet(16, 1), (3, 32, 32), {"parts": 3}),
        (lambda: named.mobilenet_v2(width=0.25, classes=10), (3, 32, 32), {"parts": 3}),
        (lambda: named.resnet18(classes=10), (3, 32, 32), {"parts": 2}),
        (named.sensor_net, (6, 128), {"parts": 2}),
        (named.segmentation_net, (3, 32, 32), {"parts": 2}),
        (named.tiny_vit, (3, 32, 32), {"parts": 2}),
    ],
)
@pytest.mark.parametrize("method", ["ecotta", "side"])
def test_families_of_models_pass_the_self_check(
    factory: Callable[[], nn.Module], shape: tuple[int, ...], options: dict[str, Any], method: str, tmp_path: Path
) -> None:
    model = factory()
    calibrate(model, shape, 0)
    with torch.no_grad():
        logits = model(torch.zeros((2, *shape)))
    data = samples(tmp_path, shape, logits.shape[1], 24, tuple(logits.shape[2:]))
    choices = {"method": method, "batches": (2,), "allow_drop": True, **untrained(method, **options)}
    report = export(model, tmp_path / "m.edgeadapt", shape=shape, data=data, **choices)
    assert {"adapt.b2", "learn.b2", "predict.b1", "source.b2"} <= set(report.manifest["graphs"])
    with edgeadapt.Adapter.open(tmp_path / "m.edgeadapt") as adapter:
        x = data.tensor(np.arange(5))
        assert adapter.adapt(x).shape == (5, *logits.shape[1:])
        assert adapter.stats["steps"] == 2


@pytest.mark.parametrize("seed", range(15))
def test_generated_architectures_pass_the_self_check(seed: int, tmp_path: Path) -> None:
    """Each method on some of them. The operators and gradients of twice as many are held against torch in test_lowering."""
    model, shape, _ = generated.generate(seed)
    with torch.no_grad():
        logits = model(torch.zeros((2, *shape)))
    data = samples(tmp_path, shape, logits.shape[1], 16, tuple(logits.shape[2:]))
    normalised = any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in model.modules())
    method = ("ecotta", "side", "tent" if normalised else "side")[seed % 3]
    choices = {"method": method, "batches": (2,), "allow_drop": True, "holdout": 0.2, **untrained(method, parts=3)}
    report = export(model, None, shape=shape, data=data, **choices)
    assert report.manifest["selfcheck"]["adapt.b2"]["updates"] < selfcheck.UPDATES


@pytest.mark.slow
@pytest.mark.parametrize("make", [named.resnet18, named.resnet50])
def test_large_images_pass_the_self_check(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    calibrate(model, (3, 224, 224), 0)
    data = samples(tmp_path, (3, 224, 224), 4, 12)
    report = export(model, None, shape=(3, 224, 224), data=data, method="ecotta", batches=(1,), epochs=0, warmup_batch=2, allow_drop=True)
    assert report.manifest["partition"][0]["name"] == "maxpool"
    assert report.manifest["selfcheck"]["adapt.b1"]["updates"] < selfcheck.UPDATES
    assert report.manifest["selfcheck"]["learn.b1"]["updates"] < selfcheck.UNCERTAIN


def test_exact_and_constant_statistics_gradients_differ(tmp_path: Path) -> None:
    steps = {}
    for exact in (False, True):
        export(tiny(), tmp_path / "m.edgeadapt", shape=(3, 16, 16), method="tent", batches=(4,), exact=exact, optimiser="sgd", rate=0.1)
        with edgeadapt.Adapter.open(tmp_path / "m.edgeadapt") as adapter:
            adapter.adapt(FRAMES[:4], mix=1.0)
            steps[exact] = adapter.state["momentum.bn1.weight"]
    assert np.abs(steps[True] - steps[False]).max() > 1e-3 * np.abs(steps[True]).max()


class _Wrong(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x.flatten(1))
        return y if y.sum() > 0 else -y


class _Sequence(nn.Module):
    """A class for every step of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n, self.head = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.n(self.a(x)).relu())
        return logits


class _Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv3d(1, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        return logits


LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        (_Wrong(), {"method": "norm"}, ExportError, "returns 2 values"),
        (_Branches(), {"method": "norm"}, ExportError, "torch.export cannot trace _Branches"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double(), {"method": "norm"}, ExportError, "float"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), {"method": "ecotta"}, ExportError, "too few to cut"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), {"method": "tent"}, ExportError, "this model has none"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), {"method": "eco"}, UsageError, "'eco' is not known"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), {"methd": "norm"}, UsageError, "no option 'methd'"),
        (LINEAR, {"method": "norm", "batches": (0,)}, UsageError, "no list of batch sizes"),
        (LINEAR, {"method": "norm", "batches": ("2",)}, UsageError, "no list of batch sizes"),
        (LINEAR, {"method": "norm", "batches": 16}, UsageError, "no list of batch sizes"),
        (LINEAR, {"method": "norm"}, ExportError, "this model has none"),
        (LINEAR, {"method": "norm", "statistics": "source"}, UsageError, "norm adapts nothing but its statistics"),
        (LINEAR, {"method": "source", "statistics": "live"}, UsageError, "source does not adapt"),
        (LINEAR, {"method": "source", "names": ("a", "b")}, UsageError, "2 class names, and the model has 3"),
        (LINEAR, {"method": "side"}, ExportError, "side is calibrated on source data, and none was given"),
        (LINEAR, {"method": "tent", "rate": float("nan")}, UsageError, "rate = nan"),
        (LINEAR, {"method": "tent", "rate": -1.0}, UsageError, "rate = -1.0"),
        (_Sequence(), {"method": "tent", "rate": 11.0, "shape": (3, 32)}, UsageError, "rate = 11 is out of range"),
        (LINEAR, {"method": "norm", "threads": -1}, UsageError, "threads = -1 is too small"),
        (LINEAR, {"method": "norm", "seed": -1}, UsageError, "seed = -1 is too small"),
        (LINEAR, {"method": "norm", "seed": 0.5}, UsageError, "seed = 0.5 is not a whole number"),
        (LINEAR, {"method": "norm", "holdout": "much"}, UsageError, "holdout = 'much'"),
        (LINEAR, {"max_drop": 0.0}, UsageError, "max_drop = 0.0 is not a number above 0"),
        (LINEAR, {"max_drop": float("nan")}, UsageError, "max_drop = nan"),
        (LINEAR, {"warmup_rate": float("inf")}, UsageError, "warmup_rate = inf"),
        (LINEAR, {"method": "tent", "cuts": ("a",)}, UsageError, "tent has no use for cuts"),
        (LINEAR, {"method": "norm", "parts": 4}, UsageError, "norm has no use for parts"),
        (LINEAR, {"method": "side", "parts": 4}, UsageError, "side has no use for parts"),
        (LINEAR, {"method": "source", "kernel": 0}, UsageError, "source has no use for kernel"),
        (LINEAR, {"method": "ecotta", "width": 8}, UsageError, "ecotta has no use for width"),
        (LINEAR, {"method": "side", "epochs": 0}, UsageError, "side has no use for epochs"),
        (LINEAR, {"method": "tent", "warmup_rate": 0.1}, UsageError, "tent has no use for warmup_rate"),
        (LINEAR, {"method": "norm", "rate": 0.1}, UsageError, "norm has no use for rate"),
        (LINEAR, {"method": "norm", "exact": True}, UsageError, "norm has no use for exact"),
        (LINEAR, {"parts": 2, "cuts": ("a", "b")}, UsageError, "cuts already say how many parts"),
        (_Volume(), {"method": "source", "shape": (1, 4, 4, 4)}, ExportError, "four sizes at most"),
    ],
)
def test_what_cannot_be_exported_is_said_plainly(model: nn.Module, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        export(model, None, **{"shape": (3, 2, 2), **options})


def test_a_warm_up_that_ruins_the_model_fails_the_export(tmp_path: Path) -> None:
    model = tiny()
    data = samples(tmp_path, (3, 16, 16), 10, 60)
    with torch.no_grad():
        data.y[...] = model(torch.from_numpy(data.tensor(np.arange(60)))).argmax(1).numpy()  # the model is right on all of it
    options: dict[str, Any] = {"shape": (3, 16, 16), "data": data, "method": "ecotta", "parts": 2, "batches": (2,), "epochs": 0, "holdout": 0.5}
    with pytest.raises(ExportError, match=r"costs .* points of clean accuracy"):
        export(model, None, **options)
    report = export(model, None, allow_drop=True, **options)
    assert report.manifest["warmup"]["clean_accuracy_before"] == 1.0
    assert report.manifest["warmup"]["clean_accuracy_after"] < 0.98


def test_a_model_that_guesses_on_its_own_data_is_refused(tmp_path: Path) -> None:
    data = samples(tmp_path, (3, 16, 16), 10, 200)
    with pytest.raises(ExportError, match="chance for 10 classes") as caught:
        export(tiny(), None, shape=(3, 16, 16), data=data, method="side", batches=(2,), holdout=0.5)
    assert "--mean" in caught.value.hint


def test_a_warm_up_needs_samples_to_hold_out(tmp_path: Path) -> None:
    data = Samples(np.zeros((4, 3, 16, 16), np.float32), np.arange(4), InputSpec((3, 16, 16)))
    with pytest.raises(InputError, match="none of the 4 samples can be held out") as caught:
        export(tiny(), None, shape=(3, 16, 16), data=data, method="ecotta", parts=2, batches=(2,), epochs=0, warmup_batch=2)
    assert "200 samples" in caught.value.hint
    with pytest.raises(InputError, match="cannot be calibrated on 1 sample"):
        export(tiny(), None, shape=(3, 16, 16), data=data.take([0]), method="side", batches=(2,))


def test_an_accuracy_that_is_no_number_passes_no_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeadapt.exporters.training.Training._agreement", lambda *arguments: float("nan"))
    with pytest.raises(ExportError, match="the warm-up costs nan points"):
        export(tiny(), None, shape=(3, 16, 16), data=samples(tmp_path, (3, 16, 16), 10), method="ecotta", parts=2, batches=(2,), epochs=0)


def test_calibration_rows_come_from_all_of_sorted_data() -> None:
    kept = np.arange(1000) * 2
    rows = calibration_rows(kept, 32, 3)
    assert [len(chosen) for chosen in rows] == [32] * 8
    assert len(set(np.concatenate(rows).tolist())) == 256
    assert set(np.concatenate(rows) // 200) == set(range(10))
    assert all(np.array_equal(one, other) for one, other in zip(rows, calibration_rows(kept, 32, 3), strict=True))
    assert [len(chosen) for chosen in calibration_rows(kept[:70], 32, 0)] == [32, 32]


def test_the_side_network_is_calibrated_on_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    measure = Side.calibrate

    def watched(self: Side, batches: Any, *others: Any) -> None:
        seen.extend(batches)
        measure(self, batches, *others)

    monkeypatch.setattr(Side, "calibrate", watched)
    y = np.repeat(np.arange(10), 20)
    x = np.random.default_rng(0).standard_normal((200, 3, 16, 16)).astype(np.float32)
    x[:, 0, 0, 0] = y
    options: dict[str, Any] = {"method": "side", "batches": (2,), "allow_drop": True, "warmup_batch": 16}
    export(tiny(), None, shape=(3, 16, 16), data=Samples(x, y, InputSpec((3, 16, 16))), **options)
    assert {int(value) for batch in seen for value in batch[:, 0, 0, 0]} == set(range(10))


def test_parts_that_the_model_has_no_room_for_are_told(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shape": (3, 16, 16), "data": samples(tmp_path, (3, 16, 16), 10), "batches": (2,), "epochs": 0, "allow_drop": True}
    options["method"] = "ecotta"
    report = export(tiny(), None, parts=30, **options)
    assert len(report.manifest["partition"]) == 4
    assert (report.manifest["method"]["options"]["parts"], report.manifest["method"]["options"]["parts_asked"]) == (3, 30)
    assert "asked for 30 parts, the model has room for 3" in report.table()
    report = export(tiny(), None, **options)
    assert report.manifest["method"]["options"]["parts"] == 3
    assert "asked for" not in report.table()


def test_a_class_for_every_step_of_a_sequence(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, y = random.standard_normal((40, 3, 32)).astype(np.float32), random.integers(4, size=(40, 32))
    model = calibrate(_Sequence(), (3, 32))
    report = export(model, tmp_path / "m.edgeadapt", shape=(3, 32), data=(x, y), method="tent", batches=(2,), rate=0.01)
    assert report.manifest["task"]["kind"] == "segmentation"
    with edgeadapt.Adapter.open(tmp_path / "m.edgeadapt") as adapter:
        with torch.no_grad():
            want = model(torch.from_numpy(x[:3])).numpy()
        np.testing.assert_allclose(adapter.source(x[:3]), want, rtol=1e-4, atol=1e-4)
        assert adapter.adapt(x[0:2]).shape == adapter.learn(x[0:2], y[0:2]).shape == (2, 4, 32)
        assert adapter.stats["steps"] == 2
        with pytest.raises(InputError, match="labels are whole numbers of shape 2x32"):
            adapter.learn(x[0:2], y[0:2, 0])


def test_a_bundle_that_a_device_could_not_open_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.edgeadapt").write_bytes(b"old")
    real = sessions.load

    def fails(bundle: Any, name: str, *others: Any) -> Any:
        if name == "predict.b2":
            raise BundleError("unheard of")
        return real(bundle, name, *others)

    monkeypatch.setattr(sessions, "load", fails)
    with pytest.raises(ExportError, match="a device could not open it: unheard of"):
        export(tiny(), tmp_path / "m.edgeadapt", shape=(3, 16, 16), method="norm", batches=(2,))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.edgeadapt", b"old")]


def test_data_may_be_given_as_a_path_or_as_arrays(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (40, 20, 20, 3)).astype(np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "train.npz", x=x, y=y, names=np.array(list("abcdefghij")))
    options: dict[str, Any] = {"shape": [3, 16, 16], "mean": (0.5,), "std": (0.2, 0.2, 0.3), "resize": True, "method": "side", "batches": [2]}
    reports = [edgeadapt.export(tiny(), None, data=data, **options) for data in (str(tmp_path / "train.npz"), tmp_path / "train.npz", (x, y))]
    wanted = {"shape": [3, 16, 16], "resize": [16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.3]}
    assert [report.manifest["input"] for report in reports] == [wanted] * 3
    assert [report.manifest["task"]["names"] for report in reports] == [list("abcdefghij")] * 2 + [None]
    assert reports[0].manifest["selfcheck"] == reports[2].manifest["selfcheck"]
    without = {**options, "method": "norm"}
    assert edgeadapt.export(tiny(), None, **without).manifest["input"] == wanted  # the device scales images although none were given here
    ready = Samples(x, y, InputSpec((3, 20, 20)))
    with pytest.raises(UsageError, match="say themselves how frames become the input"):
        edgeadapt.export(tiny(), None, data=ready, **options)
    with pytest.raises(UsageError, match="the samples are 3x20x20, and shape says 3x16x16"):
        edgeadapt.export(tiny(), None, shape=(3, 16, 16), data=ready, method="side")
    with pytest.raises(InputError, match="there is no such file"):
        edgeadapt.export(tiny(), None, **{**options, "data": "nothing.npz"})


@pytest.mark.smoke
def test_the_shortest_way_from_a_model_to_an_adapted_state(tmp_path: Path) -> None:
    model = calibrate(_Sequence(), (3, 32))
    report = edgeadapt.export(model, tmp_path / "m.edgeadapt", shape=(3, 32), method="tent", batches=(4,))
    assert report.path == tmp_path / "m.edgeadapt"
    x = np.random.default_rng(0).standard_normal((4, 3, 32)).astype(np.float32)
    with edgeadapt.Adapter.open(report.path) as adapter:
        begun = adapter.state
        adapter.adapt(x)
        assert adapter.stats["steps"] == 1
        assert all(not np.array_equal(begun[name], value) for name, value in adapter.state.items())
