"""Early exits beside plain PyTorch, step after step in double precision; their warm-up; what a step takes; and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeadapt.bundle import InputSpec
from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import Normaliser
from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.compile import lowered
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.export import export
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.methods.exits import Exits
from edgeadapt.exporters.programs import Model, Program, build, last_parts
from edgeadapt.exporters.schedules import ordered
from edgeadapt.exporters.warmup import rate_at, warm_up
from tests.reference.base import entropy
from tests.reference.exits import Exits as Plain
from tests.test_reference import BATCH, CLASSES, PARTS, SHAPE, captured, differences, disturbed, largest, network, stream
from tests.test_reliable import grouped, labelled, scalars, start_of, state_of, stepped


def program_of(
    name: str, role: str = "adapt", statistics: str = "source", optimiser: str = "adam", train: int | None = None, **settings: Any
) -> Program:
    """The program over one of the small models; features standardised by numbers that are none of theirs."""
    method = METHODS["exits"](captured(name), Setup(CLASSES, train=train, settings=settings))
    random = torch.Generator().manual_seed(6)
    method.frozen().update({key: 0.5 + torch.rand(value.shape, generator=random) for key, value in method.frozen().items()})
    parameters = disturbed({key: ("parameter", value) for key, value in method.parameters().items()})
    model = Model(method, parameters, method.backbone.source_statistics(), statistics, optimiser)
    model = model if train is None else last_parts(model, train)
    return build(model, role, BATCH, torch.zeros(BATCH, *SHAPE), torch.zeros(BATCH, dtype=torch.int64))


def plain_of(name: str, program: Program, **options: Any) -> Plain:
    standard = {key: value.double() for key, value in program.model.method.frozen().items()}
    plain = Plain(
        network(name), PARTS[name], standard=standard, live=program.model.statistics == "live", optimiser=program.model.optimiser, **options
    )
    plain.freeze(program.model.fixed)
    return plain.double()


CASES: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd": {"optimiser": "sgd"},
    "learn": {"role": "learn", "optimiser": "sgd"},
    "live": {"statistics": "live"},
    "last": {"train": 1},
    "sharp": {"sharpness": 4.0, "grid": 1},
    "ensemble": {"teacher": "ensemble", "optimiser": "sgd"},
}


@pytest.mark.parametrize(("name", "case"), [("wideresnet10", case) for case in CASES] + [("resnet14", "sgd")])
def test_program_follows_the_plain_implementation(name: str, case: str) -> None:
    """Logits, parameters, moments and statistics, with a margin that half of a head's predictions pass."""
    program = program_of(name, **CASES[case])
    method = program.model.method
    given = start_of(program, rate=0.01, mix=0.3) if program.model.statistics == "live" else start_of(program, rate=0.01)
    names = ("rate", "momentum", "margin") + (("mix",) if "hyper.mix" in given else ())
    own = {key: method.setting(key) for key in method.settings}
    plain = plain_of(name, program, **own, **scalars(given, *names))
    plain.load(state_of(given))
    with torch.no_grad():
        exits, answer = plain.all(next(stream(1))[0])
        values = entropy(plain.together(exits, answer) if method.setting("teacher") == "ensemble" else exits[-1]).sort().values
    for layer in plain.norms.values():
        layer.following = None
    plain.margin = float(values[BATCH // 2 - 1 : BATCH // 2 + 1].mean()) / math.log(CLASSES)
    given["hyper.margin"] = torch.tensor(plain.margin, dtype=torch.float64)
    before = state_of(given)
    for x, y in stream(3):
        given |= {"y": y} if program.role == "learn" else {}
        ours = stepped(program, given, x)
        logits = plain.learn(x, y) if program.role == "learn" else plain.adapt(x)
        theirs = {"logits": logits, **plain.state()}
        assert set(ours) == set(theirs)
        found = differences(ours, theirs, before)
        worst = max(found, key=lambda key: found[key])
        assert found[worst] < 1e-8, f"{worst}: {found[worst]:.1e}"
    trained = {key.split(".")[1] for key in theirs if key.startswith("exit.")}
    assert trained == ({str(len(PARTS[name]) - 1)} if CASES[case].get("train") else {str(k) for k in range(len(PARTS[name]))})
    assert any(largest(value - before[key]) > 0 for key, value in ours.items() if key.startswith("exit."))


def test_features_are_measured_on_source_samples() -> None:
    method = METHODS["exits"](captured("wideresnet10"), Setup(CLASSES))
    batches = [x.float() for x, _ in stream(2)]
    method.calibrate(batches, method.backbone.tensors, method.backbone.source_statistics())
    plain = Plain(network("wideresnet10"), PARTS["wideresnet10"])
    rows = [torch.cat(found) for found in zip(*(plain.features(x)[0] for x in batches))]
    for k, found in enumerate(rows):
        torch.testing.assert_close(method.frozen()[f"exit.{k}.mean"], found.mean(0), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(method.frozen()[f"exit.{k}.scale"], 1 / found.std(0).clamp(min=1e-3), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("labels", [True, False])
def test_the_warm_up_trains_every_head_by_itself(labels: bool) -> None:
    """As plain SGD on the sum of the heads' losses, with the statistics that the model was trained with."""
    model = capture(network("wideresnet10"), SHAPE, 8)
    method = METHODS["exits"](model, Setup(CLASSES, seed=2))
    x, y = torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(3)).numpy(), np.arange(24) % CLASSES
    samples = Samples(x, y if labels else None, InputSpec(SHAPE))
    tensors = {**method.backbone.tensors, **method.frozen()}
    found = warm_up(method, method.parameters(), tensors, samples, epochs=2, rate=0.1, batch=8, seed=4)
    plain = Plain(network("wideresnet10"), PARTS["wideresnet10"])
    plain.load(method.parameters())
    optimiser, order = torch.optim.SGD(plain.exit.parameters(), 0.1, 0.9), np.random.default_rng(4)
    for step, chosen in enumerate(np.concatenate([order.permutation(24) for _ in range(2)]).reshape(6, 8)):
        exits, own = plain.all(torch.from_numpy(x[chosen]))
        target = torch.from_numpy(y[chosen]) if labels else own.softmax(1)
        losses = [F.cross_entropy(one, target) - (0.0 if labels else entropy(own).mean()) for one in exits]
        optimiser.param_groups[0]["lr"] = rate_at(step, 6, 3, 0.1)
        optimiser.zero_grad()
        torch.stack(losses).sum().backward()
        optimiser.step()
    for key, value in plain.trained.items():
        assert largest(found[key] - value.detach()) <= 1e-3 * largest(value.detach()), key


def test_the_model_itself_is_one_of_the_exits() -> None:
    """It counts by how much surer it is than heads that say nothing; no gradient reaches the ensemble."""
    method = METHODS["exits"](captured("wideresnet10"), Setup(CLASSES, settings={"sharpness": 100.0}))
    assert isinstance(method, Exits)
    model = network("wideresnet10")
    x = next(stream(1))[0].float()
    parameters = {key: value.requires_grad_() for key, value in method.parameters().items()}
    for key, value in parameters.items():
        if key.endswith("gain"):
            value.data.zero_()  # every class alike
    run = method.backbone.run({**method.backbone.tensors}, Normaliser(method.backbone.source_statistics(), "source"))
    outcome = method.forward(run, x, {**method.backbone.tensors, **method.frozen()}, parameters)
    own = model(x).detach()
    share = 1 / (1 + len(method.ends) * torch.exp(100.0 * (entropy(own) - math.log(CLASSES)))).unsqueeze(1)
    torch.testing.assert_close(outcome.logits.exp(), share * own.softmax(1) + (1 - share) / CLASSES, rtol=1e-3, atol=1e-4)
    assert not outcome.logits.requires_grad


def test_a_step_keeps_nothing_of_the_model() -> None:
    """It takes what predicting does, and less than half of what TENT's does."""
    peaks = {}
    for kind, role in (("exits", "predict"), ("exits", "adapt"), ("tent", "adapt")):
        method = METHODS[kind](captured("wideresnet10"), Setup(CLASSES))
        model = Model(method, method.parameters(), method.backbone.source_statistics(), "source", "adam")
        peaks[kind, role] = ordered(lowered(build(model, role, BATCH, torch.zeros(BATCH, *SHAPE))), 0.2).peak
    assert peaks["exits", "adapt"] <= 1.02 * peaks["exits", "predict"]
    assert peaks["exits", "adapt"] < 0.5 * peaks["tent", "adapt"]


@pytest.mark.parametrize("name", [pytest.param("resnet14", marks=pytest.mark.slow), pytest.param("wideresnet10", marks=pytest.mark.slow), "grouped"])
def test_bundles_are_checked(name: str) -> None:
    """The self-check runs every graph beside PyTorch, a batch of one and pieces too; the statistics are those of the model."""
    model, shape, classes = (grouped(), (3, 16, 16), 5) if name == "grouped" else (network(name), SHAPE, CLASSES)
    x, y = labelled(torch.randn(64, *shape, generator=torch.Generator().manual_seed(2)))
    sizes = (1,) if name == "grouped" else (1, 4)
    report = export(model, None, shape=shape, data=(x, y % classes), method="exits", batches=sizes, epochs=1, allow_drop=True, threads=1)
    assert report.manifest["statistics"]["mode"] == ("none" if name == "grouped" else "source")
    assert {"adapt.b1", *(() if name == "grouped" else ("adapt.b4", "adapt-sums.b1"))} <= set(report.manifest["graphs"])
    assert report.manifest["warmup"]["epochs"] == 1


class Dense(nn.Module):
    """A class at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if k == 0 else 8, 8, 3, padding=1) for k in range(4))
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.last(x)


@pytest.mark.parametrize(
    ("model", "y", "message"),
    [
        (Dense(), np.arange(1024).reshape(16, 8, 8) % 5, r"exits predict one class a frame, and this model's logits are \(16, 5, 8, 8\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), np.arange(16) % 5, "too few to cut"),
    ],
)
def test_models_that_do_not_fit_are_refused(model: nn.Module, y: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(model, None, shape=(3, 8, 8), data=(torch.randn(16, 3, 8, 8).numpy(), y), method="exits")
