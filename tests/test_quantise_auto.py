"""Numbers chosen by what they do: which are tried, what each is measured by, which is taken, and that the bundle says so and is it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeadapt.bundle import Bundle, InputSpec, Manifest
from edgeadapt.cli.inspect import summary
from edgeadapt.cli.main import main
from edgeadapt.errors import BudgetError, BundleError, EdgeAdaptError, ExportError, InputError, UsageError
from edgeadapt.exporters import job as job_module
from edgeadapt.exporters import schedules, training
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.export import ExportReport, export, plan_export, plan_numbers
from edgeadapt.exporters.options import Options
from edgeadapt.exporters.quantise import auto, choose
from edgeadapt.exporters.quantise.auto import Precision, precisions
from edgeadapt.exporters.quantise.calibrate import shifted
from edgeadapt.exporters.quantise.measure import SEVERITY, Stream, as_good
from edgeadapt.memory import simulate
from edgeadapt.runtime.adapter import Adapter
from tests.test_simulate import Bench
from tests.workplace import workplace
from tests.zoo.calibrate import calibrate
from tests.zoo.data import gratings, to_float

SHAPE, BOARD, WIDE = (3, 16, 16), Bench(), 2**28
IMAGES = gratings(96, 16)[0]


class Small(nn.Module):
    """Four convolutions of sixteen channels with live normalisation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.convs = nn.ModuleList(nn.Conv2d(into, 16, 3, padding=1, bias=False) for into in (3, 16, 16, 16))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))
        self.linear = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms):
            x = norm(conv(x)).relu()
        return self.linear(x.mean((2, 3)))


def spread() -> Small:
    """With every class among its predictions."""
    model = calibrate(Small(), SHAPE)
    assert isinstance(model, Small)
    with torch.no_grad():
        logits = model(torch.from_numpy(to_float(IMAGES)))
        model.linear.weight /= logits.std(0)[:, None]
        model.linear.bias.copy_((model.linear.bias - logits.mean(0)) / logits.std(0))
    return model


@cache
def network() -> nn.Module:
    return spread()


def outlying() -> nn.Module:
    """With a channel of a size that nothing hangs on: one grid for it and the others is too coarse for these."""
    model = spread()
    with torch.no_grad():
        for conv, norm in zip(model.convs[1:], model.norms[:-1]):
            norm.weight[3] *= 3000.0
            norm.bias[3] = 3000.0
            conv.weight[:, 3] *= 1e-7
    return model


def data(model: nn.Module, labelled: bool = True) -> Samples:
    """Labelled as the model itself has it."""
    with torch.no_grad():
        y = model(torch.from_numpy(to_float(IMAGES))).argmax(1).numpy()
    return Samples(IMAGES, y if labelled else None, InputSpec(SHAPE))


@pytest.fixture(autouse=True)
def plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps have no leaner variants: these take a search, and fit where the quickest does not."""
    monkeypatch.setattr(schedules, "ALLOWANCES", {})


def exported(path: Path | None, budget: int | None, model: nn.Module | None = None, **options: Any) -> ExportReport:
    model = model or network()
    chosen: dict[str, Any] = {"data": data(model), "batches": (4,), "allow_drop": True, "quantize": "auto", **options}
    chosen |= {} if budget is None else {"board": BOARD}
    return export(model, path, shape=SHAPE, warmup_batch=16, holdout=0.25, threads=1, budget=budget, **chosen)


def rows(report: ExportReport) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = report.manifest["choice"]["rows"]
    return found


def chosen(report: ExportReport) -> dict[str, Any]:
    (found,) = (row for row in rows(report) if row["chosen"])
    return found


# ------------------------------------------------------------------------------------------------ what is tried


def test_every_combination_that_says_something_is_tried() -> None:
    found = precisions(Options.of({"quantize": "auto"}), ("quantize",))
    assert [item.updates for item in found[:3]] == ["reference", "compact", "tiny"]
    assert len(found) == len(set(found)) == 12
    assert {(item.quantize, item.gradient, item.saved) for item in found} == {
        ("none", "float", "float"), ("none", "float", "int8"), ("int8", "float", "int8"), ("int8", "int8", "int8"),
    }  # fmt: skip
    assert precisions(Options.of({"quantize": "auto", "method": "norm"}), ()) == [Precision("none"), Precision("int8")]
    for item in found:
        options = item.options(Options.of({"quantize": "auto"}))
        assert options.saves_codes == (item.saved == "int8")
        assert options.gradient_in_codes == (item.gradient == "int8")
        given = {name: getattr(options, name) for name in ("quantize", "gradient", "saved", "updates")}
        assert Options.of(given) == options, "what is made of it could have been given"


@pytest.mark.parametrize(
    ("given", "forms"),
    [
        ({"gradient": "int8"}, {("int8", "int8", "int8")}),
        ({"gradient": "float"}, {("none", "float", "float"), ("none", "float", "int8"), ("int8", "float", "int8")}),
        ({"saved": "float"}, {("none", "float", "float"), ("int8", "float", "float"), ("int8", "int8", "float")}),
        ({"saved": "int8", "gradient": "float"}, {("none", "float", "int8"), ("int8", "float", "int8")}),
    ],
)
@pytest.mark.parametrize("updates", [None, "compact", "reference"])
def test_what_was_named_stays(given: dict[str, str], forms: set[tuple[str, str, str]], updates: str | None) -> None:
    given = {**given, **({"updates": updates} if updates else {})}
    found = precisions(Options.of({"quantize": "auto", **given}), given)
    assert {(item.quantize, item.gradient, item.saved) for item in found} == forms
    assert {item.updates for item in found} == ({updates} if updates else {"reference", "compact", "tiny"})
    assert len(found) == len(set(found))


# ------------------------------------------------------------------------------------------------ what is measured


def test_of_those_as_good_as_the_best_nothing_is_left_out() -> None:
    random = np.random.default_rng(0)
    best = (random.random((3, 400)) < 0.2).astype(float)
    clean = np.ones((1, 400))

    def worse(count: int) -> Any:
        other = best.copy()
        other[:, np.flatnonzero(best.sum(0) == 0)[:count]] = 1.0
        return np.concatenate([other, clean])

    same = np.concatenate([best, 0 * clean])
    assert as_good([same, worse(0)]) == [0, 1], "clean samples do not count"
    assert as_good([worse(40), same, worse(1)]) == [1, 2], "one of 400 is within the standard error, forty are not"
    assert as_good([worse(40), worse(41)]) == [0, 1]
    assert as_good([same[:, :1], worse(0)[:, :1]]) == [0, 1]


def test_the_stream_is_in_no_order_of_classes_and_the_same_for_all() -> None:
    x = np.repeat(np.arange(8, dtype=np.uint8), 8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    samples = Samples(x, np.repeat(np.arange(8), 8), InputSpec((3, 4, 4)))
    held = np.arange(64)
    stream = Stream.of(samples, held, samples.y, 3)
    again = Stream.of(samples, held, samples.y, 3)
    assert stream.shifts == ("speckle_noise", "gaussian_blur", "spatter", "saturate")
    assert (np.diff(stream.truth) < 0).any()
    assert all(np.array_equal(one, other) for one, other in zip(stream.frames, again.frames, strict=True))
    assert np.allclose(stream.frames[-1][:, 0, 0, 0] * 255, stream.truth), "clean ones at last, each with its label"
    assert not np.array_equal(stream.frames[0], stream.frames[-1])
    assert (stream.counted([16]), stream.counted([24]), stream.counted([24, 20]), stream.counted([128])) == (64, 48, 48, 64)
    with pytest.raises(InputError, match="no sample is held out"):
        Stream.of(samples, held[:0], samples.y[:0], 0)
    sensor = Samples(np.ones((8, 6, 10), np.float32), None, InputSpec((6, 10)))
    assert Stream.of(sensor, np.arange(8), np.zeros(8), 0).shifts == ("noisy", "louder", "offset", "fainter")


def test_what_is_measured_is_shifted_further_than_what_ranges_are_taken_of() -> None:
    random = np.random.default_rng(0)
    sensor = Samples(random.standard_normal((8, 6, 10)).astype(np.float32), None, InputSpec((6, 10)))
    for samples in (sensor, Samples(IMAGES[:8], None, InputSpec(SHAPE))):
        stream, clean = Stream.of(samples, np.arange(8), np.zeros(8), 0), samples.tensor(np.arange(8))
        order = np.random.default_rng(0).permutation(8)
        for index, frames in enumerate(stream.frames[:-1]):
            near, far = (value - clean[order] for value in (shifted(samples, order, index, 0), frames))
            assert not np.allclose(near, far, atol=1e-2)
            assert samples is not sensor or 1.5 * np.abs(near).mean() < np.abs(far).mean()
            if stream.shifts[index] in ("noisy", "speckle_noise"):
                assert abs(np.corrcoef(near.ravel(), far.ravel())[0, 1]) < 0.2, "other noise"


@pytest.mark.codes
@pytest.mark.parametrize(("method", "more"), [("norm", {}), ("tent", {"updates": "compact", "saved": "int8", "optimiser": "sgd", "rate": 0.02})])
def test_what_was_measured_is_what_the_device_does(tmp_path: Path, method: str, more: dict[str, Any]) -> None:
    """The written bundle, given the same frames by its own adapter, is wrong where the table says."""
    path, samples = tmp_path / "net.edgeadapt", data(network())
    report = exported(path, WIDE, method=method, **more)
    row, told = chosen(report), report.manifest["choice"]
    held = samples.split(0.25, 0)[1]
    assert samples.y is not None
    stream = Stream.of(samples, held, samples.y[held], 0)
    assert (told["samples"], told["shifts"], told["labelled"], SEVERITY) == (24, list(stream.shifts), True, 5)
    found = []
    with Adapter.open(path) as adapter:
        for index, frames in enumerate(stream.frames):
            if index == len(stream.shifts):
                adapter.reset()
            guesses = np.concatenate([adapter.adapt(frames[start : start + 4]).argmax(1) for start in range(0, 24, 4)])
            found.append(float((guesses != stream.truth).mean()))
        assert adapter.stats["steps"] == (30 if method == "tent" else 0)
    assert [*row["errors"], row["clean"]] == pytest.approx(found, abs=1e-9)
    assert max(found) > 0.0


def test_without_labels_the_float_model_without_a_shift_is_right() -> None:
    report = exported(None, WIDE, data=data(network(), labelled=False), method="norm")
    assert not report.manifest["choice"]["labelled"]
    plain = rows(report)[0]
    assert 0.0 < max(plain["errors"])
    assert "not float32's without a shift" in report.table()


# ------------------------------------------------------------------------------------------------ what is taken

TENT: dict[str, Any] = {"method": "tent", "parts": 1, "train": 1, "batches": (64,), "updates": "reference", "gradient": "float"}


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer goes into 8 bits, whatever it gets wrong."""
    monkeypatch.setattr(choose, "LIMIT", 1e9)
    monkeypatch.setattr(choose, "ROUNDS", 0)


@pytest.mark.usefixtures("careless")
def test_what_is_bad_is_not_taken_and_a_small_budget_takes_another(tmp_path: Path) -> None:
    wide = exported(tmp_path / "wide.edgeadapt", WIDE, outlying(), **TENT)
    plain, saving, codes = rows(wide)
    assert [(row["quantize"], row["saved"]) for row in rows(wide)] == [("none", "float"), ("none", "int8"), ("int8", "int8")]
    assert all(row["fits"] for row in rows(wide))
    assert np.mean(codes["errors"]) > np.mean(plain["errors"]) + 0.1
    assert codes["seconds"] < plain["seconds"] < saving["seconds"], "that it is quicker does not help what is wrong"
    assert plain["chosen"]
    assert "quantisation" not in wide.manifest
    assert saving["total"] + 2**18 < plain["total"]
    budget = saving["total"] + 2**17
    narrow = exported(tmp_path / "narrow.edgeadapt", budget, outlying(), **TENT)
    assert chosen(narrow)["saved"] == "int8"
    assert chosen(narrow)["quantize"] == "none"
    plain = rows(narrow)[0]
    assert (plain["fits"], plain["errors"], plain["clean"], plain["why"]) == (False, [], None, "")
    assert plain["total"] > budget
    for name, report, limit in (("wide", wide, WIDE), ("narrow", narrow, budget)):
        found = simulate(Bundle.open(tmp_path / f"{name}.edgeadapt"), BOARD, budget=limit)
        assert found.fits
        assert found.choice.total == chosen(report)["total"] <= limit
        assert report.plan is not None
        assert report.plan.row is not None
        assert report.plan.row.total == found.choice.total
    text = summary(Bundle.open(tmp_path / "narrow.edgeadapt"))
    assert "does not fit" in text
    assert [line.split()[:4] for line in text.splitlines() if line.endswith("  chosen")] == [["float", "float", "int8", "reference"]]


@pytest.mark.usefixtures("careless")
def test_what_costs_too_much_accuracy_is_told_and_left_out() -> None:
    report = exported(None, WIDE, outlying(), method="norm", allow_drop=False)
    plain, codes = rows(report)
    assert (plain["chosen"], codes["chosen"], codes["errors"], codes["fits"]) == (True, False, [], True)
    assert "8 bits cost" in codes["why"]
    assert codes["why"] in report.table()


def test_a_method_is_trained_once_for_all_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = training.warm_up
    monkeypatch.setattr(training, "warm_up", lambda *given, **named: calls.append("warm-up") or real(*given, **named))
    given: dict[str, Any] = {"method": "ecotta", "epochs": 1, "parts": 1, "saved": "int8", "gradient": "int8"}
    path = tmp_path / "net.edgeadapt"
    report = exported(path, WIDE, **given)
    assert calls == ["warm-up"]
    assert [(row["quantize"], row["updates"]) for row in rows(report)] == [("int8", updates) for updates in ("reference", "compact", "tiny")]
    assert all(row["errors"] for row in rows(report))
    assert {(row["parts"], row["trained"], row["batch"]) for row in rows(report)} == {(1, 1, 4)}
    assert Bundle.open(path).manifest.choice is not None
    alone = exported(None, WIDE, **given, quantize="int8", updates=chosen(report)["updates"])
    for key in ("warmup", "state", "selfcheck", "method", "statistics"):
        assert alone.manifest[key] == report.manifest[key], "as if it had been asked for"


def test_the_same_every_time_and_none_is_touched_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method calibrates is measured anew in 8 bits, and must not be found in float32, which comes first and is taken here."""
    monkeypatch.setattr(auto, "as_good", lambda errors: [0])
    given: dict[str, Any] = {"method": "side", "train": 1, "updates": "reference", "saved": "int8", "gradient": "float", "seed": 5}
    one, other = (exported(tmp_path / name, WIDE, **given) for name in ("one.edgeadapt", "other.edgeadapt"))
    assert json.dumps(one.manifest) == json.dumps(other.manifest)
    assert len(rows(one)) == 2
    assert chosen(one)["quantize"] == "none"
    alone = exported(tmp_path / "alone.edgeadapt", WIDE, **{**given, "quantize": "none", "gradient": None})
    assert alone.manifest["members"]["weights.bin"] == one.manifest["members"]["weights.bin"]


# ------------------------------------------------------------------------------------------------ refusals


class Plain(nn.Sequential):
    """Without a convolution."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def test_a_model_without_convolutions_still_has_what_a_step_keeps() -> None:
    model = calibrate(Plain(), SHAPE)
    report = exported(None, WIDE, model, method="tent", updates="reference")
    assert [(row["quantize"], row["saved"]) for row in rows(report)] == [("none", "float"), ("none", "int8")]
    for given in ({"method": "norm"}, {"method": "tent", "gradient": "int8"}):
        with pytest.raises(ExportError, match="this model has none that could be in them"):
            exported(None, WIDE, model, **given)
    for quantize in ("int8", "none"):
        given = {"shape": SHAPE, "board": BOARD, "method": "norm", "quantize": quantize, "batches": (2,), "threads": 1}
        if quantize == "none":
            assert plan_export(model, **given).note == ""
            continue
        with pytest.raises(ExportError, match="this model has none that could be in them"):
            plan_export(model, **given)


NOTHING = "quantize = 'auto' has nothing left to choose: frozen model in int8, gradients in int8, saved in int8, updates compact"


def test_where_nothing_is_left_to_vary_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"method": "tent", "gradient": "int8", "updates": "compact"}
    with pytest.raises(UsageError, match=NOTHING) as caught:
        exported(None, WIDE, **given)
    assert caught.value.hint
    with pytest.raises(UsageError, match=NOTHING):
        plan_numbers(network(), shape=SHAPE, board=BOARD, budget=WIDE, **given)
    model = calibrate(Plain(), SHAPE)
    with pytest.raises(ExportError, match="this model has none that could be in them"):
        exported(None, WIDE, model, method="tent", saved="float", updates="reference")
    monkeypatch.setattr(choose, "LIMIT", 0.0)
    for given in ({"method": "norm"}, {"method": "tent", "saved": "float", "updates": "reference"}):
        with pytest.raises(ExportError, match="no layer of the model does well enough in 8 bits"):
            exported(None, WIDE, **given)
    report = exported(None, WIDE, method="tent", updates="reference")
    assert [(row["quantize"], row["saved"]) for row in rows(report)] == [("none", "float"), ("none", "int8")], "8 bits would be float32 again"


def test_that_no_sample_is_held_out_is_found_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto.Auto, "_enter", never)
    with pytest.raises(InputError, match="no sample is held out"):
        exported(None, WIDE, method="norm", data=Samples(IMAGES[:2], np.array([0, 1]), InputSpec(SHAPE)))


@pytest.mark.parametrize("where", ["warm", "stepping"])
def test_a_candidate_that_is_refused_is_left_out_and_tells_why(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    job = job_module.Job
    real, refused = getattr(job, where), {"int8"}

    def refusing(self: Any, *given: Any) -> Any:
        if self.options.saved in refused:
            raise ExportError(f"bytes between the passes\nfail at {where}", "none")
        return real(self, *given)

    monkeypatch.setattr(job, where, refusing)
    given: dict[str, Any] = {"method": "side", "train": 1, "updates": "reference", "gradient": "float"}
    report = exported(None, WIDE, **given)
    for row in rows(report):
        fails = row["saved"] == "int8"
        assert (row["why"], row["errors"] == [], row["fits"]) == (f"bytes between the passes fail at {where}" if fails else "", fails, True)
    assert chosen(report)["saved"] == "float"
    assert Manifest.from_json(report.manifest).choice is not None
    refused.add("float")
    with pytest.raises(ExportError, match=f"fail at {where}"):
        exported(None, WIDE, **given)


def never(*given: Any, **named: Any) -> Any:
    raise AssertionError("the work began")


def test_nothing_fits_and_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.Training, "warm", never)
    with pytest.raises(BudgetError, match="nothing that was asked for fits the budget of 50 MiB on a bench; the nearest is ") as caught:
        exported(tmp_path / "net.edgeadapt", 50 * 2**20, method="norm")
    assert "(frozen model in " in str(caught.value)
    assert "give a budget of at least" in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("budget", "options", "kind", "match"),
    [
        (None, {}, UsageError, "the best that fits a budget, and there is none"),
        (WIDE, {"data": None}, UsageError, "measured on source data, and none was given"),
        (WIDE, {"method": "norm", "gradient": "int8"}, UsageError, "norm has no use for gradient"),
        (WIDE, {"method": "norm", "updates": "compact"}, UsageError, "norm has no use for updates"),
    ],
)
def test_what_cannot_be_is_said_plainly(budget: int | None, options: dict[str, Any], kind: type[EdgeAdaptError], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        exported(None, budget, **{"method": "tent", **options})
    assert caught.value.hint


def test_a_plan_of_one_form_is_not_one_of_several() -> None:
    with pytest.raises(UsageError, match="plan_numbers"):
        plan_export(network(), shape=SHAPE, board=BOARD, quantize="auto")
    with pytest.raises(UsageError, match="there is none"):
        plan_numbers(network(), shape=SHAPE, board=BOARD, budget=None)


# ------------------------------------------------------------------------------------------------ what the bundle says


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return exported(None, WIDE, method="norm").manifest


def test_bundles_without_a_choice_are_read_as_before(told: dict[str, Any]) -> None:
    assert Manifest.from_json(told).to_json() == told
    older = {key: value for key, value in told.items() if key != "choice"}
    assert Manifest.from_json(older).choice is None
    assert "choice" not in Manifest.from_json(older).to_json()


FLOAT = {"gradient": "float", "saved": "float", "updates": "reference"}


def mine(choice: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in choice["rows"] if row["chosen"])
    return found


def other(choice: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in choice["rows"] if not row["chosen"])
    return found


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda choice: choice.update(more=1), r"choice\.more is not known"),
        (lambda choice: choice.pop("budget"), r"choice\.budget is missing"),
        (lambda choice: choice.update(shifts=[]), r"choice\.shifts: expected one at least"),
        (lambda choice: choice["rows"][0].update(chosen=choice["rows"][0]["chosen"] is False), r"choice\.rows: expected one that is chosen"),
        (lambda choice: choice["rows"][0].update(quantize="int4"), r"rows\[0\]\.quantize"),
        (lambda choice: choice["rows"][1].update(errors=[0.5]), r"rows\[1\]\.errors: expected 4, one a shift"),
        (lambda choice: choice["rows"][1].update(errors=[0.5, 0.5, 0.5, 1.5]), r"rows\[1\]\.errors\[3\]: expected a share"),
        (lambda choice: choice["rows"][1].update(clean=None), r"rows\[1\]\.clean: expected a number exactly where"),
        (lambda choice: mine(choice).update(fits=False), r"\.chosen: expected false, where it does not fit"),
        (lambda choice: [row.update(seconds=-1.0) for row in choice["rows"]], r"rows\[0\]\.seconds"),
        (lambda choice: [row.update(chosen=not row["chosen"]) for row in choice["rows"]], "the chosen row to say what quantisation says"),
        (lambda choice: [row.update({**FLOAT, "updates": "tiny"}) for row in choice["rows"]], "to hold parameters as the method's options say"),
        (lambda choice: [row.update(batch=77) for row in choice["rows"]], "the chosen row to be for one of the batches"),
        (lambda choice: choice.update(samples=0), r"choice\.samples"),
        (lambda choice: choice["shifts"].__setitem__(1, choice["shifts"][0]), r"choice\.shifts: expected every name once"),
        (lambda choice: choice["rows"].insert(0, {**choice["rows"][0], "chosen": False}), "expected numbers that differ"),
        (lambda choice: other(choice).update(errors=[], clean=None), r"\.why: expected a reason exactly where"),
        (lambda choice: other(choice).update(why="it cost too much"), r"\.why: expected a reason exactly where"),
        (lambda choice: other(choice).update(fits=False), r"\.why: expected a reason exactly where"),
        (lambda choice: other(choice).update(fits=False, errors=[], clean=None, why="it does not fit"), r"\.why: expected a reason exactly where"),
        (lambda choice: mine(choice).update(why="it does not fit"), r"\.why: expected a reason exactly where"),
        (lambda choice: choice.update(budget=other(choice)["total"] - 1), r"\.fits: expected false, where \d+ bytes are more than the budget"),
        (lambda choice: other(choice).update(saved="int8"), r"\.gradient: expected none of gradient, saved and updates to be none, or all"),
        (lambda choice: other(choice).update(FLOAT), r"rows: expected a step in each row or in none, got both"),
        (lambda choice: choice["rows"][0].update({**FLOAT, "gradient": "int8"}), r"rows\[0\]\.gradient: expected float or none"),
        (lambda choice: other(choice).update(parts=2, trained=3), r"\.trained: expected at most the 2 parts"),
    ],
)
def test_a_choice_that_contradicts_itself_is_refused(told: dict[str, Any], change: Any, match: str) -> None:
    broken = json.loads(json.dumps(told))
    change(broken["choice"])
    with pytest.raises(BundleError, match=match):
        Manifest.from_json(broken)


def test_a_row_that_fits_no_longer_with_every_graph_is_one_that_is_written(told: dict[str, Any]) -> None:
    """It was measured, and then did not fit."""
    content = json.loads(json.dumps(told))
    other(content["choice"]).update(fits=False, why="with every graph it does not fit", total=content["choice"]["budget"] + 1)
    assert Manifest.from_json(content).to_json() == content


def test_the_chosen_row_says_of_gradients_and_what_is_kept_what_the_rest_says(told: dict[str, Any]) -> None:
    """But gradients that no convolution lets pass in 8 bits are float32."""
    for chosen, had, right in (
        (("int8", "int8"), ("int8", "int8"), True),
        (("int8", "int8"), ("float", "int8"), True),
        (("float", "int8"), ("int8", "int8"), False),
        (("int8", "float"), ("float", "int8"), False),
    ):
        content = json.loads(json.dumps(told))
        codes = {"form": "int8", "held_out": 0, "labelled": False, "float_accuracy": None, "accuracy": None, "layers": []}
        content["quantisation"] = {**codes, "gradient": had[0], "saved": had[1]}
        row = mine(content["choice"])
        content["choice"]["rows"] = [{**row, **FLOAT, "quantize": "int8", "gradient": chosen[0], "saved": chosen[1]}]
        if right:
            Manifest.from_json(content)
            continue
        with pytest.raises(BundleError, match="the chosen row to say what quantisation says"):
            Manifest.from_json(content)


# ------------------------------------------------------------------------------------------------ from the shell


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    samples, text = data(network()), "from tests.test_quantise_auto import Plain as plain\nfrom tests.test_quantise_auto import network as tiny\n"
    return workplace(tmp_path, monkeypatch, "auto_models", text, samples.x, samples.y)


def shell(*words: str, model: str = "tiny") -> int:
    return main(["export", f"auto_models.py:{model}", "--input", "3x16x16", "--threads", "1", "--quiet", *words])


NORM = ("--method", "norm", "--batch", "4", "--board", "pi4-1gb", "--quantize", "auto")


@pytest.mark.usefixtures("here")
def test_the_command_chooses_and_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(*NORM, "--budget", "128MiB", "--data", "train.npz", "--holdout", "0.25", "--allow-drop", "-o", "net.edgeadapt") == 0
    output = capsys.readouterr().out
    header = next(line for line in output.splitlines() if line.startswith("frozen  gradients"))
    assert header.split()[:4] == ["frozen", "gradients", "saved", "updates"]
    assert "numbers for 128 MiB on Raspberry Pi 4, 1 GB; predictions that are wrong, in percent, on 24 held-out samples each" in output
    assert main(["inspect", "net.edgeadapt"]) == 0
    assert "numbers for 128 MiB on Raspberry Pi 4, 1 GB; " in capsys.readouterr().out
    assert main(["inspect", "net.edgeadapt", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["choice"]
    assert [row["quantize"] for row in told["rows"]] == ["none", "int8"]
    assert main(["simulate", "net.edgeadapt", "--board", "pi4-1gb", "--budget", "128MiB"]) == 0


@pytest.mark.usefixtures("here")
def test_candidates_are_listed_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(*NORM, "--budget", "128MiB", "--plan") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["numbers", "frozen", "float", "int8"]
    assert "every convolution that could be is taken to be in 8 bits" in lines[4]
    assert shell(*NORM, "--budget", "50MiB", "--plan", "--json") == 5
    output = capsys.readouterr()
    assert [row["fits"] for row in json.loads(output.out)["rows"]] == [False, False]
    assert "none of the numbers fits the budget of 50 MiB; the nearest takes" in output.err
    assert shell(*NORM, "--plan") == 2
    assert shell("--method", "norm", "--batch", "4", "--board", "pi4-1gb", "--quantize", "int8", "--plan") == 0
    assert "every convolution that could be is taken to be in 8 bits" in capsys.readouterr().out
    assert shell("--method", "norm", "--batch", "4", "--board", "pi4-1gb", "--plan") == 0
    assert "every convolution" not in capsys.readouterr().out
    assert shell("--method", "norm", "--batch", "4", "--board", "pi4-1gb", "--quantize", "int8", "--plan", model="plain") != 0
    assert "this model has none that could be in them" in capsys.readouterr().err
