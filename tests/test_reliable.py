"""EATA and SAR beside plain PyTorch, step after step in double precision; and TENT, EATA and SAR on models without batch normalisation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeadapt.errors import ExportError, UsageError
from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.export import export
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.methods.eata import Eata as OurEata
from edgeadapt.exporters.programs import Model, Program, build
from edgeadapt.exporters.storage import TIERS, Packed
from tests.reference import Eata, Sar
from tests.reference.base import entropy
from tests.test_reference import BATCH, CLASSES, SHAPE, captured, differences, disturbed, doubles, largest, network, stream


def program_of(name: str, kind: str, role: str = "adapt", statistics: str = "live", settings: dict[str, Any] | None = None) -> Program:
    """A method's program over one of the small models, its parameters away from where the model has them."""
    method = METHODS[kind](captured(name), Setup(CLASSES, settings=settings or {}))
    parameters = disturbed({key: ("parameter", value) for key, value in method.parameters().items()})
    model = Model(method, parameters, method.backbone.source_statistics(), statistics, method.optimiser)
    return build(model, role, BATCH, torch.zeros(BATCH, *SHAPE), torch.zeros(BATCH, dtype=torch.int64))


def start_of(program: Program, **hyper: float) -> dict[str, Tensor]:
    """The program's inputs in double precision: statistics disturbed, scalars as given."""
    given = dict(program.example)
    moved = disturbed({key: item for key, item in program.model.state().items() if item[0] == "statistic"})
    given |= {f"state.{key}": value for key, value in moved.items() if f"state.{key}" in given}
    given |= {f"hyper.{key}": torch.tensor(value) for key, value in hyper.items()}
    return {key: value.double() if value.is_floating_point() else value for key, value in given.items()}


def scalars(given: dict[str, Tensor], *names: str) -> dict[str, float]:
    return {name: float(given[f"hyper.{name}"]) for name in names}


def state_of(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("state."): value for name, value in given.items() if name.startswith("state.")}


def stepped(program: Program, given: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Our step; `given` goes on from it."""
    with doubles():
        out = program({**given, "x": x})
    after = {name.removeprefix("new."): value.detach() for name, value in out.items() if name.startswith("new.")}
    given |= {f"state.{name}": value for name, value in after.items()}
    return {"logits": out["logits"].detach(), **after}


def margin_at(plain: nn.Module, x: Tensor, share: float) -> float:
    """The margin below which that share of the predictions for x lies."""
    with torch.no_grad():
        values = entropy(plain(x)).sort().values
    for layer in plain.norms.values():  # type: ignore[operator, union-attr]
        layer.following = None
    at = round(share * len(values))
    return float((values[at - 1] + values[at]) / 2) / math.log(CLASSES)


def eata_pair(name: str, **hyper: float) -> tuple[Program, dict[str, Tensor], Eata]:
    program = program_of(name, "eata")
    random = torch.Generator().manual_seed(4)
    method = program.model.method
    importance = {key: torch.rand(value.shape, generator=random) for key, value in method.parameters().items()}
    given = start_of(program, **hyper)
    given |= {f"weights.fisher.{key}": value.double() for key, value in importance.items()}
    plain = Eata(network(name), importance={key: value.double() for key, value in importance.items()},
                 **scalars(given, "mix", "rate", "momentum", "margin", "distance", "fisher")).double()  # fmt: skip
    plain.start = {key: value.detach().clone() for key, value in plain.trained.items()}
    plain.load(state_of(given))
    return program, given, plain


@pytest.mark.parametrize("name", ["resnet14", "wideresnet10"])
def test_eata_follows_the_plain_implementation(name: str) -> None:
    """Some predictions are unsure, some redundant; a batch with none leaves parameters and momentum as they are."""
    program, given, plain = eata_pair(name, mix=0.3, rate=0.02, distance=0.6, fisher=0.5)
    margin = margin_at(plain, next(stream(1))[0], 0.5)
    seen = []
    for index, (x, _) in enumerate(stream(6)):
        plain.margin = 0.0 if index == 3 else margin if index else 1.5
        given["hyper.margin"] = torch.tensor(plain.margin, dtype=torch.float64)
        before = state_of(given)
        if index:
            plain.distance = between(plain, x)
            given["hyper.distance"] = torch.tensor(plain.distance, dtype=torch.float64)
        ours, logits = stepped(program, given, x), plain.adapt(x)
        theirs = {"logits": logits, **plain.state()}
        assert set(ours) == set(theirs)
        found = differences(ours, theirs, before if index else {})
        worst = max(found, key=lambda key: found[key] if index != 3 else largest(ours[key] - theirs[key]))
        assert largest(ours[worst] - theirs[worst]) <= 1e-8 * max(largest(theirs[worst]), 1e-9), worst
        kept = sum(torch.equal(ours[key], before[key]) for key in plain.trained)
        seen.append(kept == len(plain.trained))
        if index == 3:
            assert all(torch.equal(ours[f"momentum.{key}"], before[f"momentum.{key}"]) for key in plain.trained)
    assert seen == [False, False, False, True, False, False]
    assert float(state_of(given)["memory.known"]) == 1.0


def between(plain: Eata, x: Tensor) -> float:
    """A cosine to the mean prediction that half of the more confident predictions for x are below."""
    assert plain.mean is not None
    with torch.no_grad():
        logits = plain(x)
    sure = logits[entropy(logits).argsort()[: BATCH // 2]]
    alike = nn.functional.cosine_similarity(plain.mean.unsqueeze(0), sure.softmax(1), dim=1).sort().values
    return float((alike[len(alike) // 2 - 1] + alike[len(alike) // 2]) / 2)


def test_eata_selects_by_redundancy() -> None:
    """At a cosine that half of the predictions pass, fewer count than without: the pair above would not tell if none ever were redundant."""
    program, given, plain = eata_pair("resnet14", mix=0.3, rate=0.02, margin=1.5)
    (first, _), (second, _) = stream(2)
    plain.adapt(first)
    stepped(program, given, first)
    plain.distance = between(plain, second)
    given["hyper.distance"] = torch.tensor(plain.distance, dtype=torch.float64)
    every = {**given, "hyper.distance": torch.tensor(1.1, dtype=torch.float64)}
    ours, all_of_them = stepped(program, given, second), stepped(program, every, second)
    plain.adapt(second)
    assert largest(ours["memory.mean"] - plain.state()["memory.mean"]) < 1e-9
    assert largest(ours["memory.mean"] - all_of_them["memory.mean"]) > 1e-4


def test_eata_measures_fisher_information_as_the_plain_implementation() -> None:
    method = METHODS["eata"](captured("wideresnet10"), Setup(CLASSES))
    assert isinstance(method, OurEata)
    batches = [x.float() for x, _ in stream(3)]
    method.calibrate(batches, {**method.backbone.tensors, **method.frozen()}, method.backbone.source_statistics())
    plain = Eata(network("wideresnet10"), mix=1.0, exact=True)
    plain.measure(batches)
    found = {key.removeprefix("fisher."): value for key, value in method.frozen().items()}
    assert set(found) == set(plain.importance)
    for key, value in plain.importance.items():
        assert largest(found[key] - value) <= 2e-3 * largest(value), key
    assert min(largest(value) for value in found.values()) > 0


@pytest.mark.parametrize("name", ["resnet14", "wideresnet10"])
@pytest.mark.parametrize("collapse", [0.0, 0.9])
def test_sar_follows_the_plain_implementation(name: str, collapse: float) -> None:
    """With a reset on the way, where the moving loss falls below the mark; the last stage is not trained."""
    program = program_of(name, "sar")
    frozen = set(METHODS["tent"](captured(name), Setup(CLASSES)).parameters()) - set(program.model.parameters)
    last = {"resnet14": "layer3", "wideresnet10": "b3"}[name]
    assert frozen
    assert all(key.startswith((last, "bn")) for key in frozen)
    given = start_of(program, mix=0.3, rate=0.02, radius=0.02, collapse=0.0)
    plain = Sar(network(name), frozen=sorted(frozen), **scalars(given, "mix", "rate", "momentum", "margin", "radius", "collapse")).double()
    plain.load(state_of(given))
    plain.start = {key: given[f"weights.start.{key}"] for key in plain.trained}
    known = []
    for index, (x, _) in enumerate(stream(5)):
        if collapse and index == 2:
            plain.collapse = 100.0
        plain.margin = margin_at(plain, x, 0.75)
        given["hyper.margin"] = torch.tensor(plain.margin, dtype=torch.float64)
        given["hyper.collapse"] = torch.tensor(plain.collapse, dtype=torch.float64)
        ours, logits = stepped(program, given, x), plain.adapt(x)
        theirs = {"logits": logits, **plain.state()}
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            assert largest(ours[key] - value) <= 1e-8 * max(largest(value), 1e-6), (index, key)
        if plain.collapse:
            assert all(torch.equal(ours[key], given[f"weights.start.{key}"]) for key in plain.trained)
        plain.collapse = 0.0
        known.append(float(ours["memory.known"]))
    assert plain.resets == (1 if collapse else 0)
    assert known[:2] == [1.0, 1.0]


def test_sar_without_a_confident_prediction_only_lets_momentum_run() -> None:
    program = program_of("resnet14", "sar")
    given = start_of(program, mix=0.3, rate=0.02, margin=0.0)
    (x, _), *_ = stream(1)
    ours = stepped(program, given, x)
    assert float(ours["memory.known"]) == 0.0
    assert all(torch.equal(ours[key], program.example[f"state.{key}"].double()) for key in program.model.parameters)


def test_sar_trains_the_last_stage_too_where_it_is_told_to() -> None:
    every = program_of("resnet14", "sar", settings={"freeze": "none"})
    assert set(every.model.parameters) == set(METHODS["tent"](captured("resnet14"), Setup(CLASSES)).parameters())


class Grouped(nn.Module):
    """Group, layer and instance normalisation, and no batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, 2, 1), nn.InstanceNorm2d(8, affine=True)
        self.c, self.nc = nn.Conv2d(8, 8, 3, 2, 1), nn.GroupNorm(4, 8)
        self.nd, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.na(self.a(x)).relu()
        x = self.nb(self.b(x)).relu()
        x = self.nc(self.c(x)).relu()
        return self.fc(self.nd(x.mean((2, 3))))


class Positioned(Grouped):
    """Of images of 16 × 16, with a layer normalisation over channels and positions: its scales have three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.nd = nn.LayerNorm((8, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.nb(self.b(self.na(self.a(x)).relu())).relu()
        return self.fc(self.nd(self.nc(self.c(x)).relu()).mean((2, 3)))


def labelled(x: Tensor) -> tuple[Any, Any]:
    return x.numpy(), np.arange(len(x)) % 5


def grouped(kind: type[Grouped] = Grouped) -> nn.Module:
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        model.fc.weight.mul_(4.0)
    return model


NAMES = {f"{layer}.{kind}" for layer in ("na", "nb", "nc", "nd") for kind in ("weight", "bias")}


def test_tent_trains_every_kind_of_normalisation() -> None:
    """Against a plain step, by autograd over the model itself."""
    model = grouped()
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    method = METHODS["tent"](capture(model, (3, 16, 16), 4), Setup(5))
    program = build(Model(method, method.parameters(), {}, "none", "sgd"), "adapt", 4, x)
    out = program(dict(program.example))
    names = dict(model.named_parameters())
    loss = entropy(model(x)).mean()
    gradients = dict(zip(sorted(NAMES), torch.autograd.grad(loss, [names[key] for key in sorted(NAMES)])))
    assert set(method.parameters()) == NAMES
    for key, gradient in gradients.items():
        assert largest(out[f"new.momentum.{key}"] - gradient) <= 1e-5 * largest(gradient) + 1e-8, key
        assert largest(gradient) > 0


@pytest.mark.parametrize("model", [Grouped, Positioned])
@pytest.mark.parametrize("kind", ["tent", "eata", "sar"])
def test_models_without_batch_normalisation_are_exported_and_checked(kind: str, model: type[Grouped]) -> None:
    """The self-check runs every graph beside PyTorch; SAR leaves what lies behind the last change of resolution."""
    data = labelled(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2)))
    report = export(grouped(model), None, shape=(3, 16, 16), data=data, method=kind, batches=(4,), micro="none")
    trained = {row["name"] for row in report.manifest["state"] if row["kind"] == "parameter"}
    assert trained == (NAMES if kind != "sar" else {key for key in NAMES if not key.startswith(("nc", "nd"))})
    memory = {row["name"] for row in report.manifest["state"] if row["kind"] == "memory"}
    assert memory == {"tent": set(), "eata": {"memory.mean", "memory.known"}, "sar": {"memory.loss", "memory.known"}}[kind]


@pytest.mark.parametrize("kind", ["tent", "eata", "sar"])
def test_a_model_without_any_normalisation_is_refused(kind: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    with pytest.raises(ExportError, match=f"{kind} trains the scale and shift of normalisation layers, and this model has none"):
        export(model, None, shape=(3, 2, 2), data=labelled(torch.randn(8, 3, 2, 2)), method=kind)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("sar", {"freeze": "first"}, "freeze = 'first' is not possible"),
        ("sar", {"thaw": "none"}, "sar has no setting 'thaw'"),
        ("tent", {"freeze": "none"}, "tent has no setting 'freeze'"),
    ],
)
def test_settings_are_checked(method: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export(grouped(), None, shape=(3, 16, 16), method=method, settings=settings)


def test_a_step_that_is_none_leaves_small_forms_as_they_are() -> None:
    """Parameters and moments in 16 and 8 bits, under both optimisers."""
    for optimiser in ("sgd", "adam"):
        program = program_of("wideresnet10", "eata")
        model = program.model
        storage = Packed(TIERS["compact"], model.parameters, 0)
        model = Model(model.method, storage.values(), model.values, "live", optimiser, storage=storage)
        step = build(model, "adapt", BATCH, torch.zeros(BATCH, *SHAPE))
        given = {**step.example, "hyper.margin": torch.tensor(1.5)}
        batches = [x.float() for x, _ in stream(2)]
        first = {f"state.{name.removeprefix('new.')}": value for name, value in step({**given, "x": batches[0]}).items() if name.startswith("new.")}
        after = step({**given, **first, "x": batches[1], "hyper.margin": torch.tensor(0.0)})
        held = model.held()
        moved = [name for name in held if not torch.equal(first.get(f"state.{name}", held[name][1]), held[name][1])]
        assert any(held[name][0] == "parameter" for name in moved)
        for name in moved:
            assert torch.equal(after[f"new.{name}"], first[f"state.{name}"]), (optimiser, name)


@pytest.mark.parametrize("kind", ["eata", "sar", "t3a", "tent"])
@pytest.mark.parametrize("choices", [{"quantize": "int8"}, {"quantize": "int8", "statistics": "anchored"}, {"updates": "compact"}])
def test_methods_with_a_memory_go_with_8_bits_and_small_forms(kind: str, choices: dict[str, Any]) -> None:
    """Passes over source data, by which ranges are found and costs are measured, get the memory as it starts."""
    if kind == "t3a" and "updates" in choices:
        return
    x = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        model.train()(x)
    report = export(model.eval(), None, shape=(3, 16, 16), data=labelled(x), method=kind, batches=(8,), allow_drop=True, **choices)
    assert {row["name"] for row in report.manifest["state"] if row["kind"] == "memory"} == {
        "eata": {"memory.mean", "memory.known"}, "sar": {"memory.loss", "memory.known"},
        "t3a": {"memory.supports", "memory.entropy"}, "tent": set(),
    }[kind]  # fmt: skip


class Torn(nn.Module):
    """The first normalisation is out of the gradient's reach."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).detach()).relu().mean((2, 3)))


def test_sar_leaves_what_no_gradient_reaches() -> None:
    report = export(Torn().eval(), None, shape=(3, 8, 8), method="sar", batches=(4,), settings={"freeze": "none"})
    assert {row["name"] for row in report.manifest["state"] if row["kind"] == "parameter"} == {"a.weight", "a.bias", "b.weight", "b.bias"}


@pytest.mark.parametrize("method", ["eata", "sar"])
def test_steps_that_need_all_frames_are_not_cut(method: str) -> None:
    """Nothing is tried where nothing could be; what was asked for is refused."""
    data = labelled(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2)))
    report = export(grouped(), None, shape=(3, 16, 16), data=data, method=method, batches=(8,))
    assert not any("left_out" in row for row in report.manifest["selfcheck"].values())
    with pytest.raises(UsageError, match=f"a step of {method} needs all of its frames at once"):
        export(grouped(), None, shape=(3, 16, 16), data=data, method=method, batches=(8,), micro=(1,))


def test_fisher_information_of_an_8_bit_export_is_that_of_the_float_one() -> None:
    """It is measured once, at the warm-up's batch size, not on the few samples that ranges are measured on."""
    seen = []

    def counting(self: Any, batches: Any, tensors: Any, statistics: Any) -> None:
        seen.append([len(x) for x in batches])
        kept(self, batches, tensors, statistics)

    kept = OurEata.calibrate
    x = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OurEata, "calibrate", counting)
        choices = {"method": "eata", "batches": (8,), "allow_drop": True, "quantize": "int8", "warmup_batch": 16}
        export(model.eval(), None, shape=(3, 16, 16), data=labelled(x), **choices)
    assert seen == [[16] * 5]
