"""What an export is without a method, and the search for defaults of its scalars: what is tried, what is taken, and that the bundle says so."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeadapt.bundle import Bundle, InputSpec, Manifest
from edgeadapt.cli.inspect import summary
from edgeadapt.errors import BundleError, UsageError
from edgeadapt.exporters import search as searching
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.export import ExportReport, export, plan_export
from edgeadapt.exporters.methods.eata import Eata
from edgeadapt.exporters.methods.tent import Tent
from edgeadapt.exporters.options import mixing_weight
from edgeadapt.exporters.quantise.measure import Stream
from edgeadapt.exporters.search import _better, _mixed
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.stream import Stream as ServedStream
from tests.test_guard import SHAPE, images, net  # noqa: F401

BATCH = 16


def exported(model: nn.Module, path: Path | None = None, **choices: Any) -> ExportReport:
    return export(model, path, shape=SHAPE, data=images(400, 1), batches=(4, BATCH), warmup_batch=32, allow_drop=True, threads=1, **choices)


@pytest.fixture(scope="module")
def default(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportReport, Path]:  # noqa: F811
    path = tmp_path_factory.mktemp("default") / "net.edgeadapt"
    return exported(net, path, holdout=0.3), path


def test_without_a_method_it_is_eata_with_anchored_statistics(default: tuple[ExportReport, Path]) -> None:
    manifest = Bundle.open(default[1]).manifest
    assert manifest.method.name == "eata"
    assert manifest.method.options["statistics"] == "anchored"
    assert manifest.reference is not None


class Plain(nn.Module):
    """Without any normalisation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))


def test_a_model_without_normalisation_gets_a_side_network() -> None:
    report = exported(Plain().eval())
    assert report.manifest["method"]["name"] == "side"
    assert plan_export(Plain().eval(), shape=SHAPE, threads=1, batches=(4,)).rows


def test_a_model_with_layer_norm_keeps_its_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4)).eval()
    manifest = exported(model).manifest
    assert manifest["method"]["name"] == "eata"
    assert manifest["statistics"]["mode"] == "none"
    assert {row["scalars"].keys() <= {"rate"} for row in manifest["searched"]["rows"]} == {True}


def test_every_value_is_tried_and_told(default: tuple[ExportReport, Path]) -> None:
    report, path = default
    found = Bundle.open(path).manifest.searched
    assert found is not None
    assert (found.labelled, found.samples) == (True, 112)
    assert [row.batch for row in found.rows] == [BATCH] * (len(found.rows) - 1) + [4]
    assert found.rows[-1].scalars == found.chosen.scalars
    assert found.shifts == ("noisy", "louder", "offset", "fainter")
    assert len(found.rows) == 2 + sum(len(values) for values in searching.TRIED.values())
    assert found.streams == ("one by one", "mixed", "hardly following")
    assert all(len(row.errors) == 3 and 0 <= row.clean <= 1 for row in found.rows)
    for text in (report.table(), summary(Bundle.open(path))):
        assert "on 112 held-out samples each, in windows of 16 if not stated: under noisy" in text
        assert ", windows of 4" in text
        assert "rate x 0.25" in text
    assert Manifest.from_json(json.loads(json.dumps(report.manifest))).searched == found


def test_a_bad_default_is_found_out(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """At a rate that ruins the model a much lower one is taken, and stands in every graph by its batch."""
    monkeypatch.setattr(Tent, "rate", 3.0)
    monkeypatch.setattr(searching, "TRIED", {"rate": (1e-4, 1.0), "mix": (0.5,)})
    manifest = exported(net, tmp_path / "net.edgeadapt", holdout=0.3, method="tent", statistics="anchored", search=True).manifest
    rows = manifest["searched"]["rows"]
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen["scalars"]["rate"] == 1e-4
    assert np.mean(rows[0]["errors"]) > np.mean(chosen["errors"]) + 0.1
    for batch in (4, BATCH):
        assert manifest["graphs"][f"adapt.b{batch}"]["defaults"]["rate"] == pytest.approx(3e-4 * (batch / 64) ** 0.5)
        assert manifest["graphs"][f"learn.b{batch}"]["defaults"]["rate"] == pytest.approx(3.0 * (batch / 64) ** 0.5)
        factor = chosen["scalars"].get("mix", 1.0)
        assert manifest["graphs"][f"predict.b{batch}"]["defaults"]["mix"] == pytest.approx(mixing_weight(batch) * factor)
    assert manifest["hyper"]["rate"]["default"] == pytest.approx(3e-4 * (BATCH / 64) ** 0.5)


@pytest.mark.parametrize(
    ("choices", "adapt", "learn"),
    [({"statistics": "anchored"}, 0.25, 1.0), ({}, 1.0, 1.0), ({"statistics": "anchored", "rate": Eata.rate * BATCH / 64}, 1.0, 1.0)],
)
def test_steps_without_labels_are_smaller_where_statistics_are_anchored(net: nn.Module, choices: dict[str, Any], adapt: float, learn: float) -> None:  # noqa: F811
    """EATA's; a rate that the user gave is taken as it is."""
    graphs = exported(net, method="eata", **choices).manifest["graphs"]
    usual = Eata.rate * BATCH / 64
    for role, share in (("adapt", adapt), ("learn", learn)):
        assert graphs[f"{role}.b{BATCH}"]["defaults"]["rate"] == pytest.approx(share * usual)


def test_a_smaller_window_is_taken_where_it_is_better(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Larger ones are ruined here, whatever their scalars; a stream then takes the smaller by itself."""
    real = searching.errors_of

    def errors_of(compiled: Any, *rest: Any) -> Any:
        found = real(compiled, *rest)
        return np.maximum(found, np.random.default_rng(0).random(found.shape) < 0.8) if compiled.program.batch == BATCH else found

    monkeypatch.setattr(searching, "errors_of", errors_of)
    path = tmp_path / "net.edgeadapt"
    exported(net, path, holdout=0.3, method="norm", statistics="anchored", search=True)
    searched = Bundle.open(path).manifest.searched
    assert searched is not None
    assert (searched.window, searched.chosen.scalars) == (4, {})
    with Adapter.open(path) as adapter:
        assert ServedStream(adapter).window == 4
        assert ServedStream(adapter, window=BATCH).window == BATCH
        assert ServedStream(adapter, False).window == BATCH  # who only predicts has no use for it
    with Adapter.open(path, batches=[BATCH]) as adapter:
        assert ServedStream(adapter).window == BATCH


def test_what_the_user_set_is_not_searched_for(net: nn.Module) -> None:  # noqa: F811
    rows = exported(net, method="tent", statistics="anchored", rate=1e-4, search=True).manifest["searched"]["rows"]
    assert all("rate" not in row["scalars"] for row in rows)
    assert any("own" in row["scalars"] for row in rows)


@pytest.mark.parametrize("choices", [{"method": "eata"}, {"search": False}, {"method": "t3a"}])
def test_it_is_left_out_where_a_method_is_named_or_nothing_is_to_be_found(net: nn.Module, choices: dict[str, Any]) -> None:  # noqa: F811
    assert "searched" not in exported(net, **choices).manifest


def test_without_labels_the_frozen_model_says_what_is_right(net: nn.Module) -> None:  # noqa: F811
    x, _ = images(200, 1)
    data = Samples(x, None, InputSpec(SHAPE))
    report = export(net, None, shape=SHAPE, data=data, method="norm", statistics="anchored", search=True, batches=(BATCH,), warmup_batch=32)
    assert report.manifest["searched"]["labelled"] is False
    assert "not the frozen model's" in report.table()


def test_mixed_windows_have_every_shift_and_every_sample_under_each() -> None:
    frames = tuple(np.full((6, 1), 10.0 * index, np.float32) + np.arange(6, dtype=np.float32)[:, None] for index in range(4))
    found = _mixed(Stream(("a", "b", "c"), frames[:3], np.arange(6)))
    for place in range(6):
        assert sorted(float(one[place, 0]) for one in found.frames[:3]) == [place, 10.0 + place, 20.0 + place]
    assert {int(value) // 10 for value in found.frames[0][:, 0]} == {0, 1, 2}


def test_better_is_beyond_chance_and_at_no_cost() -> None:
    usual = np.zeros((3, 100))
    usual[:2, :40] = 1.0
    gained, cost, luck = usual.copy(), usual.copy(), usual.copy()
    gained[:2, :10] = 0.0
    cost[:2, :10], cost[2, :4] = 0.0, 1.0
    luck[0, :3], luck[1, 60:62] = 0.0, 1.0
    assert _better(gained, usual, usual)
    assert not _better(cost, usual, usual)
    assert not _better(luck, usual, usual)
    assert not _better(usual, gained, usual)


def test_a_search_that_was_asked_for_is_made_or_refused(net: nn.Module) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="t3a has no scalars that could be searched for"):
        exported(net, method="t3a", search=True)
    with pytest.raises(UsageError, match="on held-out samples, and no data was given"):
        export(net, None, shape=SHAPE, method="norm", statistics="anchored", search=True)


def test_what_was_given_must_fit_the_method_that_is_taken(net: nn.Module) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="eata, the method where none is named, has no use for width"):
        exported(net, width=8)
    with pytest.raises(UsageError, match="side, the method where none is named, has no use for parts"):
        exported(Plain().eval(), parts=2, train=1)


def test_search_is_true_or_false(net: nn.Module) -> None:  # noqa: F811
    with pytest.raises(UsageError, match="search = 'yes' is neither true nor false"):
        exported(net, search="yes")


def _broken(change: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    manifest = copy.deepcopy(manifest)
    change(manifest["searched"])
    return manifest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found.update(shifts=[]), "one at least"),
        (lambda found: found.update(streams=[]), "one at least"),
        (lambda found: found["rows"][0].update(errors=[0.1]), "3, one a stream"),
        (lambda found: found["rows"][0].update(clean=1.5), "a share from 0 to 1"),
        (lambda found: [row.update(chosen=False) for row in found["rows"]], "one that is chosen"),
        (lambda found: found["rows"].insert(0, found["rows"].pop(1)), "the usual scalars first"),
        (lambda found: found["rows"].insert(0, found["rows"].pop()), "the largest batch first"),
        (lambda found: found.update(rows=[]), "one that is chosen"),
        (lambda found: found["rows"][0].update(more=1), "more"),
        (lambda found: found["rows"][1].update(scalars={"Own": 1.0}), "Own"),
        (lambda found: found["rows"][1].update(batch=0), "batch"),
        (lambda found: found["rows"][1].update(batch=8), "batches that windows can have"),
        (lambda found: found["rows"][1].update(scalars={"unknown": 1.0}), "names that stand in hyper"),
        (lambda found: [row.update(chosen=row is found["rows"][2], scalars={"own": 0.9} if row is found["rows"][2] else row["scalars"])
                        for row in found["rows"]], "for own, its default"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(default: tuple[ExportReport, Path], change: Any, says: str) -> None:
    with pytest.raises(BundleError, match=says):
        Manifest.from_json(_broken(change, default[0].manifest))


