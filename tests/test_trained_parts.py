"""Which parts are trained on the device: what is state, what is frozen, where the backward pass ends, and what `train` refuses."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeadapt.bundle import Bundle, InputSpec
from edgeadapt.cli.inspect import summary
from edgeadapt.errors import UsageError
from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.compile import PlacedWeights, compile_program
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.export import ExportReport, export
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.programs import Model, build, last_parts
from edgeadapt.exporters.schedules import Schedules
from edgeadapt.runtime.adapter import Adapter
from tests.reference import fixed
from tests.zoo.calibrate import calibrate
from tests.zoo.data import blobs
from tests.zoo.named import resnet_cifar

SHAPE, CLASSES, BATCH = (3, 16, 16), 4, 4


@cache
def network() -> nn.Module:
    return calibrate(resnet_cifar(8, classes=CLASSES), SHAPE)


@cache
def deeper() -> nn.Module:
    return calibrate(resnet_cifar(14, classes=CLASSES), SHAPE)


def samples() -> Samples:
    x, y = blobs(64, 16)
    return Samples(x, y, InputSpec(SHAPE))


def exported(path: Path | None, method: str, **options: Any) -> ExportReport:
    chosen: dict[str, Any] = {"batches": (BATCH,), "warmup_batch": 16, "allow_drop": True, "threads": 1, **options}
    chosen |= {"epochs": 1} if method == "ecotta" else {}
    return export(network(), path, shape=SHAPE, data=samples(), method=method, **chosen)


def trained(kind: str, train: int | None, model: nn.Module | None = None) -> Model:
    method = METHODS[kind](capture(model or network(), SHAPE, BATCH), Setup(CLASSES, 3, train=train))
    values = {**method.backbone.source_statistics(), **method.own_statistics()}
    whole = Model(method, method.parameters(), values, method.statistics, method.optimiser)
    return whole if train is None else last_parts(whole, train)


# ------------------------------------------------------------------------------------------------ what is trained


def heads(names: Any) -> set[str]:
    """The part that each parameter belongs to: "meta.1", "side.tap.0", or "" for none."""
    found = (re.match(r"meta\.\d+|side\.tap\.\d+", name) for name in names)
    return {match[0] if match else "" for match in found}


@pytest.mark.parametrize(
    ("kind", "train", "left"),
    [
        ("ecotta", 3, {"meta.0", "meta.1", "meta.2"}),
        ("ecotta", 2, {"meta.1", "meta.2"}),
        ("ecotta", 1, {"meta.2"}),
        ("side", 3, {"", "side.tap.0", "side.tap.1", "side.tap.2"}),
        ("side", 1, {"", "side.tap.2"}),
    ],
)
def test_the_last_parts_are_state_and_the_others_are_frozen(kind: str, train: int, left: set[str]) -> None:
    whole, part = trained(kind, None), trained(kind, train)
    assert heads(part.parameters) == left
    assert {**part.parameters, **part.fixed}.keys() == whole.parameters.keys()
    assert not part.parameters.keys() & part.fixed.keys()
    state = part.state()
    assert {name for name, (kind, _) in state.items() if kind == "parameter"} == set(part.parameters)
    assert not any(name.endswith(held) for name, (kind, _) in state.items() if kind == "moment" for held in part.fixed)
    assert {f"fixed.{name}" for name in part.fixed} <= part.frozen().keys()
    assert {name for name in state if name.startswith("statistics.")} == {name for name in whole.state() if name.startswith("statistics.")}


def test_tent_trains_the_layers_of_the_last_parts_and_behind_them() -> None:
    whole = trained("tent", None)
    assert whole.method.partition is None
    assert trained("tent", 3).parameters.keys() == whole.parameters.keys(), "all parts: the stem too"
    part = trained("tent", 1)
    assert part.method.partition is not None
    first = part.method.partition.cuts[-2].name  # where the last part begins
    order = [name for norm in part.method.backbone.captured.norms for name in (norm.weight, norm.bias)]
    ends = [name for name in order if name.startswith(f"{first}.")]
    assert set(order[: order.index(ends[-1]) + 1]) == part.fixed.keys()
    assert part.parameters.keys() == set(order) - part.fixed.keys()
    assert part.parameters


@pytest.mark.parametrize("kind", ["ecotta", "tent"])
def test_the_backward_pass_ends_at_the_first_part_that_is_trained(kind: str) -> None:
    """Fewer nodes, and a lower peak, with each part less; what comes before the first trained part is computed but not differentiated."""
    found = []
    for train in (3, 2, 1):
        program = build(trained(kind, train, deeper()), "adapt", BATCH, torch.randn(BATCH, *SHAPE))
        step = compile_program(program, PlacedWeights(), Schedules(variants=False))[0]
        names = [name.removeprefix("new.") for name in step.graph.outputs]
        assert set(step.writes) >= set(program.model.parameters)
        assert not set(names) & set(program.model.fixed)
        weights = [node for node in step.graph.nodes if node.op in ("Gemm", "MatMul", "ConvTranspose")]
        found.append((len(step.graph.nodes), step.peak, len(weights)))
    nodes, peaks, products = zip(*found)
    assert list(nodes) == sorted(set(nodes), reverse=True)
    assert list(peaks) == sorted(set(peaks), reverse=True)
    assert list(products) == sorted(set(products), reverse=True), "products of the backward pass"


# ------------------------------------------------------------------------------------------------ the bundle


def test_frozen_meta_networks_never_change_and_the_warm_up_trained_them(tmp_path: Path) -> None:
    path = tmp_path / "net.edgeadapt"
    report = exported(path, "ecotta", parts=3, train=1)
    bundle = Bundle.open(path)
    assert report.manifest["method"]["options"]["train"] == 1
    assert [part.trainable > 0 for part in bundle.manifest.partition] == [False, False, False, True]
    text = summary(bundle)
    assert "train=1" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("  layer") or line.startswith("  relu")]
    assert [row[-1] == "–" for row in rows] == [True, True, True, False]
    before = fixed(bundle)
    assert heads(before) == {"meta.0", "meta.1"}
    start = METHODS["ecotta"](capture(network(), SHAPE, BATCH), Setup(CLASSES, 3)).parameters()
    assert all(np.abs(value - start[name].numpy()).max() > 0 for name, value in before.items()), "the warm-up trains all parts"
    whole = exported(None, "ecotta", parts=3)
    assert whole.manifest["method"]["options"]["train"] == 3
    assert len(whole.manifest["state"]) - len(bundle.manifest.state) == 2 * len(before), "their moments are gone too"
    with Adapter.open(path) as adapter:
        adapter.hyper["margin"], adapter.hyper["rate"] = 10.0, 0.05
        random = np.random.default_rng(0)
        held, first = adapter.state, None
        for _ in range(4):
            logits = adapter.adapt(random.standard_normal((BATCH, *SHAPE)).astype(np.float32))
            first = logits if first is None else first
        after = adapter.state
        assert {name.rpartition("meta.")[2][0] for name in after if "meta." in name and not name.startswith("statistics.")} == {"2"}
        assert all(np.abs(after[name] - held[name]).max() > 0 for name in after), "what is trained and the statistics move"
    assert all((fixed(Bundle.open(path))[name] == value).all() for name, value in before.items())


def test_as_many_as_there_are_is_what_is_done_without(tmp_path: Path) -> None:
    """The same graphs and the same state, named or not."""
    paths = [tmp_path / "all.edgeadapt", tmp_path / "named.edgeadapt"]
    for path, options in zip(paths, ({}, {"train": 3})):
        exported(path, "ecotta", parts=3, **options)
    one, other = (Bundle.open(path) for path in paths)
    assert one.manifest.members == other.manifest.members


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ecotta", {"train": 0}, "train = 0 is too small"),
        ("ecotta", {"train": True}, "train = True is not a whole number"),
        ("ecotta", {"train": 4, "parts": 3}, "train = 4, and the model has 3 parts"),
        ("side", {"train": 9}, "train = 9, and the model has 3 parts"),
        ("norm", {"train": 1}, "norm has no use for train"),
        ("source", {"train": 1}, "source has no use for train"),
        ("tent", {"parts": 2}, "tent has no use for parts without train"),
        ("tent", {"cuts": ("layer1", "layer2")}, "tent has no use for cuts without train"),
    ],
)
def test_a_number_that_means_nothing_is_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        exported(None, method, **options)
    assert caught.value.hint


class _Bare(nn.Module):
    """Normalisation in front alone."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.back = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.back(self.middle(self.front(x))).mean((2, 3)))


def test_parts_without_anything_to_train_are_refused() -> None:
    with pytest.raises(UsageError, match="the last 1 of 2 parts have nothing that tent trains"):
        export(_Bare(), None, shape=SHAPE, method="tent", train=1, parts=2, batches=(BATCH,))
    report = export(_Bare(), None, shape=SHAPE, method="tent", train=2, parts=2, batches=(BATCH,))
    assert [part["trainable"] for part in report.manifest["partition"]] == [8, 0, 0]
