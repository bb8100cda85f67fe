"""The methods' programs, and the bundles made of them, beside plain PyTorch implementations that share no code with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeadapt.bundle import InputSpec
from edgeadapt.exporters.backbone import Normaliser
from edgeadapt.exporters.capture import Captured, capture
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.export import export
from edgeadapt.exporters.methods import METHODS, Method, Outcome, Setup, loss
from edgeadapt.exporters.options import calibration_rows
from edgeadapt.exporters.programs import Model, Program, build, last_parts
from edgeadapt.runtime.adapter import Adapter
from tests.reference import Adaptation, EcoTTA, Norm, Side, Source, Tent, fixed, twin
from tests.reference.base import entropy
from tests.zoo.calibrate import calibrate
from tests.zoo.named import resnet_cifar, wideresnet

BATCH, SHAPE, CLASSES, STEPS = 8, (3, 32, 32), 10, 5
MODELS = {"resnet14": lambda: resnet_cifar(14), "wideresnet10": lambda: wideresnet(10, 1)}
PARTS = {"resnet14": (1, 1, 2, 2), "wideresnet10": (1, 1, 1)}
STEP = {"mix": 0.3, "rate": 0.01}

State = dict[str, Tensor]


@cache
def network(name: str) -> nn.Module:
    """A random model with plausible statistics. Nobody changes it."""
    return calibrate(MODELS[name](), SHAPE)


@cache
def captured(name: str, batch: int = BATCH) -> Captured:
    return capture(network(name), SHAPE, batch)


@contextmanager
def doubles() -> Iterator[None]:
    """Constants made on the way are double too, so that rounding hides no difference."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@dataclass
class Pair:
    """A program of ours and the plain implementation, at the same state, both in double precision."""

    method: Method
    program: Program
    given: State
    plain: Adaptation

    @property
    def state(self) -> State:
        return {name.removeprefix("state."): value for name, value in self.given.items() if name.startswith("state.")}

    def step(self, x: Tensor, y: Tensor | None = None) -> tuple[State, State]:
        """Give both a batch; (ours, theirs): logits and the state that follows, from which ours starts next time."""
        self.given["x"] = x
        if y is not None:
            self.given["y"] = y
        with doubles():
            out = self.program(self.given)
            logits = self.plain.learn(x, y) if y is not None else self.plain.adapt(x) if self.program.role == "adapt" else self.plain.predict(x)
        after = {name.removeprefix("new."): value for name, value in out.items() if name.startswith("new.")}
        self.given |= {f"state.{name}": value for name, value in after.items()}
        return {"logits": out["logits"], **after}, {"logits": logits, **self.plain.state()}


def disturbed(state: Mapping[str, tuple[str, Tensor]]) -> State:
    """Parameters and statistics away from the ones and zeros they start at; moments as they are."""
    random = torch.Generator().manual_seed(1)
    table = {}
    for name, (kind, value) in state.items():
        noise = 0.1 * torch.randn(value.shape, generator=random)
        table[name] = value if kind == "moment" else value * (1 + noise) if name.endswith("variance") else value + noise
    return table


def pair(
    name: str,
    kind: str,
    role: str = "adapt",
    statistics: str | None = None,
    exact: bool = False,
    single: bool = False,
    train: int | None = None,
    **hyper: float,
) -> Pair:
    """Both implementations of a method over one model; `single` chooses how the plain EcoTTA gets its gradients; `train` parts, or all."""
    method = METHODS[kind](captured(name), Setup(CLASSES, train=train))
    values = {**method.backbone.source_statistics(), **method.own_statistics()}
    parameters = disturbed({name: ("parameter", value) for name, value in method.parameters().items()})
    ours = Model(method, parameters, values, statistics or method.statistics, method.optimiser, exact)
    ours = ours if train is None else last_parts(ours, train)
    program = build(ours, role, BATCH, torch.zeros(BATCH, *SHAPE), torch.zeros(BATCH, dtype=torch.int64))
    given = dict(program.example)
    given |= {f"state.{key}": value for key, value in disturbed(ours.state()).items() if f"state.{key}" in given}
    given |= {f"hyper.{key}": torch.tensor(value) for key, value in hyper.items() if f"hyper.{key}" in given}
    given = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    scalars = {key.removeprefix("hyper."): float(value) for key, value in given.items() if key.startswith("hyper.")}
    options = {"live": ours.statistics == "live", "exact": exact, **scalars}
    if kind == "ecotta":
        plain: Adaptation = EcoTTA(network(name), PARTS[name], single, **options)
    else:
        plain = {"source": Source, "norm": Norm, "tent": Tent, "side": Side}[kind](network(name), **options)
    plain.freeze(ours.fixed)
    plain = plain.double()
    both = Pair(method, program, given, plain)
    plain.load(both.state)
    return both


def split_by_margin(both: Pair, x: Tensor) -> None:
    """Set the margin so that half of the predictions for x are selected."""
    values = entropy(copy.deepcopy(both.plain).adapt(x)).sort().values
    both.plain.margin = float(values[BATCH // 2 - 1 : BATCH // 2 + 1].mean()) / math.log(CLASSES)
    if "hyper.margin" in both.given:
        both.given["hyper.margin"] = torch.tensor(both.plain.margin, dtype=torch.float64)


def stream(count: int, seed: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches that drift, with labels."""
    random = torch.Generator().manual_seed(seed)
    for t in range(count):
        x = torch.randn((BATCH, *SHAPE), generator=random, dtype=torch.float64) * (1 + 0.2 * t) + 0.1 * t
        yield x, torch.randint(0, CLASSES, (BATCH,), generator=random)


def largest(values: Tensor) -> float:
    return float(values.abs().max())


def differences(ours: State, theirs: State, before: State) -> dict[str, float]:
    """The largest difference of each tensor against its largest value, or against how far it has come from `before`."""
    return {
        name: largest(value - theirs[name]) / max(largest(theirs[name] - before.get(name, torch.zeros(()))), 1e-9) for name, value in ours.items()
    }


CASES: dict[str, dict[str, Any]] = {
    "norm": {"kind": "norm", "role": "predict"},
    "source": {"kind": "source", "role": "predict"},
    "tent": {"kind": "tent", "rate": 3e-3},
    "tent-learn": {"kind": "tent", "role": "learn", "rate": 3e-3},
    "tent-source": {"kind": "tent", "statistics": "source"},
    "ecotta": {"kind": "ecotta"},
    "ecotta-batch": {"kind": "ecotta", "mix": 1.0},
    "ecotta-single": {"kind": "ecotta", "single": True},
    "ecotta-exact": {"kind": "ecotta", "exact": True},
    "ecotta-exact-single": {"kind": "ecotta", "exact": True, "single": True},
    "ecotta-learn": {"kind": "ecotta", "role": "learn"},
    "ecotta-source": {"kind": "ecotta", "statistics": "source"},
    "ecotta-predict": {"kind": "ecotta", "role": "predict"},
    "side": {"kind": "side"},
    "side-live": {"kind": "side", "statistics": "live"},
    "side-learn": {"kind": "side", "role": "learn", "rate": 1e-3},
    "tent-last": {"kind": "tent", "train": 1, "rate": 3e-3},
    "ecotta-last": {"kind": "ecotta", "train": 1},
    "ecotta-last-two": {"kind": "ecotta", "train": 2},
    "ecotta-last-two-single": {"kind": "ecotta", "train": 2, "single": True},
    "ecotta-last-exact": {"kind": "ecotta", "train": 1, "exact": True},
    "ecotta-last-learn": {"kind": "ecotta", "train": 1, "role": "learn"},
    "ecotta-last-source": {"kind": "ecotta", "train": 1, "statistics": "source"},
    "side-last": {"kind": "side", "train": 1, "statistics": "live"},
}


DEEP = ("norm", "tent", "ecotta", "ecotta-exact", "side-live", "tent-last", "ecotta-last-two")


@pytest.mark.parametrize(("model", "case"), [("wideresnet10", case) for case in CASES] + [("resnet14", case) for case in DEEP])
def test_program_follows_the_plain_implementation(model: str, case: str) -> None:
    """Logits, parameters, moments and statistics, step after step."""
    both = pair(model, **{**STEP, **CASES[case]})
    split_by_margin(both, next(stream(1))[0])
    before, selected = both.state, []
    for x, y in stream(STEPS):
        ours, theirs = both.step(x, y if both.program.role == "learn" else None)
        written = {name for name in theirs if name == "logits" or name.startswith("statistics.") or both.program.role != "predict"}
        assert set(ours) == written
        found = differences(ours, theirs, before)
        worst = max(found, key=lambda name: found[name])
        assert found[worst] < 1e-8, f"{worst}: {found[worst]:.1e}"
        assert all(largest(value - before[name]) > 0 for name, value in ours.items() if name != "logits"), "something never moves"
        selected.append(float((entropy(theirs["logits"]) < both.plain.margin * math.log(CLASSES)).double().mean()))
    assert selected[0] == 0.5


def test_nothing_confident_leaves_only_the_regulariser() -> None:
    """The mean over an empty selection is no division by zero, and the entropy moves nothing."""
    both = pair("resnet14", "ecotta", **{**STEP, "margin": 0.0, "regulariser": 0.0})
    before = both.state
    for x, _ in stream(2):
        ours, theirs = both.step(x)
        for name in both.plain.trained:
            assert torch.equal(ours[name], before[name])
            assert torch.equal(theirs[name], before[name])


def test_statistics_stay_at_weight_zero() -> None:
    both = pair("wideresnet10", "ecotta", **{**STEP, "mix": 0.0})
    before = both.state
    (x, _), *_ = stream(1)
    fixed = both.plain.predict(x, follow=False)
    ours, theirs = both.step(x)
    statistics = [name for name in before if name.startswith("statistics.")]
    assert statistics
    assert all(torch.equal(ours[name], before[name]) and torch.equal(theirs[name], before[name]) for name in statistics)
    torch.testing.assert_close(ours["logits"], fixed, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["ecotta", "tent"])
def test_exact_gradients_are_others_than_with_constant_statistics(kind: str) -> None:
    """The two differ by far more than either differs from its own plain implementation (the cases above)."""
    moment = {"ecotta": "momentum.", "tent": "first."}[kind]  # after one step: the gradient, up to a factor
    (x, _), *_ = stream(1)
    found = []
    for exact in (False, True):
        both = pair("resnet14", kind, exact=exact, **STEP)
        split_by_margin(both, x)
        found += [{name: value for name, value in side.items() if name.startswith(moment)} for side in both.step(x)]
    ours, plain_ours, exactly, plain_exactly = found
    assert max(differences(ours, plain_ours, {}).values()) < 1e-8
    assert max(differences(exactly, plain_exactly, {}).values()) < 1e-8
    apart = differences(exactly, ours, {})
    assert sum(value > 0.05 for value in apart.values()) > len(apart) / 2


@pytest.mark.parametrize("exact", [False, True])
def test_regulariser_reaches_its_own_part_alone(exact: bool) -> None:
    """Gradient of each part's drift by the parameters of every part, in the plain implementation; and ours agrees with their sum."""
    both = pair("resnet14", "ecotta", exact=exact, **STEP)
    plain = both.plain
    assert isinstance(plain, EcoTTA)
    (x, _), *_ = stream(1)
    names, values = list(plain.trained), list(plain.trained.values())
    drifts = plain.drifts(plain.walk(x)[1])
    total = {name: torch.zeros_like(value) for name, value in zip(names, values)}
    for k, drift in enumerate(drifts):
        gradients = torch.autograd.grad(drift, values, allow_unused=True, retain_graph=True)
        for name, gradient in zip(names, gradients):
            if name.startswith(f"meta.{k}."):
                assert gradient is not None
                assert largest(gradient) > 0, name
                total[name] += gradient
            else:
                assert gradient is None or largest(gradient) == 0, f"part {k} reaches {name}"
    mine = gradient_of(both, x, lambda outcome: outcome.terms["drift"])
    assert max(differences(mine, total, {}).values()) < 1e-8


def test_the_reported_loss_counts_trained_parts_alone() -> None:
    """It is what is minimised: nothing that is trained could change the distance of the parts before."""
    (x, _), *_ = stream(1)
    found = {}
    for train in (None, 2):
        both = pair("resnet14", "ecotta", train=train, **STEP)
        plain = both.plain
        assert isinstance(plain, EcoTTA)
        split_by_margin(both, x)
        both.given["x"] = x
        with doubles():
            loss = both.program(both.given)["metric.loss"]
            logits, between = plain.walk(x)
            drifts = plain.drifts(between)
            want = (plain.objective(logits, None) + plain.regulariser * sum(drifts)).detach()
        assert float(loss) == pytest.approx(float(want), rel=1e-10)
        found[train] = float(loss), len(drifts)
    assert found[None][1] == 4
    assert found[2][1] == 2
    assert found[2][0] < found[None][0]


def gradient_of(both: Pair, x: Tensor, objective: Callable[[Outcome], Tensor], frozen: bool = False) -> State:
    """Gradients of an objective over our forward pass: by the method's parameters, or by the frozen tensors (those it reaches)."""
    weights = {name.removeprefix("weights."): value.detach() for name, value in both.given.items() if name.startswith("weights.")}
    parameters = {name: both.state[name].detach().requires_grad_() for name in both.program.model.parameters}
    if frozen:
        weights = {name: value.requires_grad_() if value.is_floating_point() else value for name, value in weights.items()}
    values = {name: {**both.state, **weights}[f"statistics.{name}"] for name in both.program.model.values}
    live = both.program.model.statistics == "live"
    normalise = Normaliser(values, "live" if live else "source", both.given.get("hyper.mix", 1.0), both.program.model.exact)
    with doubles():
        outcome = both.method.forward(both.method.backbone.run(weights, normalise), x, weights, parameters)
        by = {name: value for name, value in (weights if frozen else parameters).items() if value.requires_grad}
        found = torch.autograd.grad(objective(outcome), list(by.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(by, found) if gradient is not None}


@pytest.mark.parametrize("statistics", ["source", "live"])
def test_side_gradient_never_enters_the_backbone(statistics: str) -> None:
    """Of the frozen tensors only the classifier behind the residual, and the scaling of the taps in front of the side network, see a gradient."""
    both = pair("wideresnet10", "side", statistics=statistics, **STEP)
    (x, _), *_ = stream(1)
    hyper = {name.removeprefix("hyper."): value for name, value in both.given.items() if name.startswith("hyper.")}
    found = gradient_of(both, x, lambda outcome: loss(both.method.unlabelled(outcome, hyper)), frozen=True)
    assert {name for name in found if not name.startswith("side.tap.")} == {"fc.weight", "fc.bias"}
    plain = both.plain
    assert isinstance(plain, Side)
    with doubles():
        logits = plain.requires_grad_(True).backward(x, None)
    assert logits.requires_grad
    reached = {name for name, value in plain.named_parameters() if value.grad is not None}
    assert {name for name in reached if name.startswith("model.")} == {"model.fc.weight", "model.fc.bias"}


def test_side_network_starts_at_the_frozen_model() -> None:
    """Its residual is zero at first: the logits are the frozen model's own, to the last bit."""
    (x, _), *_ = stream(1)
    both = pair("resnet14", "side", **STEP)
    for name in ("side.residual.weight", "side.residual.bias"):
        both.given[f"state.{name}"] = torch.zeros_like(both.given[f"state.{name}"])
    both.plain.load(both.state)
    frozen = pair("resnet14", "source", role="predict")
    assert isinstance(both.plain, Side)
    adapted, untouched = both.plain.both(x)
    assert torch.equal(adapted, untouched)
    assert torch.equal(both.step(x)[0]["logits"], frozen.step(x)[0]["logits"])


# ------------------------------------------------------------------------------------------------ the bundle on onnxruntime


BUNDLES: list[tuple[str, str, str | None, int | None]] = [
    ("resnet14", "ecotta", None, None),
    ("resnet14", "ecotta", None, 2),
    ("wideresnet10", "ecotta", None, None),
    ("wideresnet10", "tent", None, None),
    ("wideresnet10", "tent", None, 1),
    ("wideresnet10", "side", "live", None),
]
TURNS = ("adapt", "adapt", "learn", "predict", "adapt", "learn")


@pytest.mark.parametrize(("model", "kind", "statistics", "train"), BUNDLES)
def test_bundle_follows_the_plain_implementation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, kind: str, statistics: str | None, train: int | None
) -> None:
    """The exported graphs, run by the adapter in single precision: what it predicts and what it becomes, turn by turn."""
    monkeypatch.setattr("edgeadapt.exporters.warmup.MEASURED", BATCH)  # samples for the first statistics, which are not the question here
    batches = [(x.float().numpy(), y.numpy()) for x, y in stream(len(TURNS))]
    data = Samples(np.concatenate([x for x, _ in batches[:2]]), np.arange(2 * BATCH) % CLASSES, InputSpec(SHAPE))
    options: dict[str, Any] = {"batches": (BATCH,), "rate": 0.02 if kind == "ecotta" else 3e-3, "statistics": statistics, "train": train}
    path = tmp_path / "model.edgeadapt"
    options |= {"epochs": 0} if kind == "ecotta" else {}
    export(network(model), path, shape=SHAPE, data=data, method=kind, allow_drop=True, warmup_batch=BATCH, **options)
    with Adapter.open(path) as adapter:
        random = np.random.default_rng(0)
        moved = {spec.name for spec in adapter.manifest.state if spec.kind == "parameter"}
        noise = {name: 0.05 * random.standard_normal(value.shape) for name, value in adapter.state.items() if name in moved}
        adapter.state = {name: (value + noise.get(name, 0)).astype(np.float32) for name, value in adapter.state.items()}
        start = adapter.state
        untouched = fixed(adapter.bundle)
        assert bool(untouched) == (train is not None)
        plain = twin(network(model), adapter.manifest.to_json(), start, BATCH, frozen=untouched)
        if isinstance(plain, Side):
            kept, _ = data.split(0.1, 0)
            plain.calibrate([torch.from_numpy(data.tensor(rows)) for rows in calibration_rows(kept, BATCH, 0)])
        values = entropy(copy.deepcopy(plain).adapt(torch.from_numpy(batches[0][0]))).sort().values
        plain.margin = float(values[BATCH // 2 - 1 : BATCH // 2 + 1].mean()) / math.log(CLASSES)
        if "margin" in adapter.hyper:
            adapter.hyper["margin"] = plain.margin
        for turn, (x, y) in zip(TURNS, batches):
            mine = adapter.learn(x, y) if turn == "learn" else getattr(adapter, turn)(x)
            given = torch.from_numpy(x)
            theirs = plain.learn(given, torch.from_numpy(y)) if turn == "learn" else getattr(plain, turn)(given)
            after, other = adapter.state, plain.state()
            assert set(after) == set(other)
            assert np.abs(mine - theirs.numpy()).max() < 1e-4 * np.abs(mine).max()
            for name, value in after.items():
                far, scale = float(np.abs(value - other[name].numpy()).max()), max(float(np.abs(value).max()), 1e-9)
                if name in moved:  # Adam makes steps of some part of the rate even of a gradient that is nearly rounding alone
                    assert far < 1e-4 * scale + (0.0 if kind == "ecotta" else 0.3 * options["rate"]), f"{turn}: {name} {far / scale:.1e}"
                else:  # in a moment a ReLU's kink may switch single elements
                    assert far < (1e-5 if name.startswith("statistics.") else 1e-2) * scale, f"{turn}: {name} {far / scale:.1e}"
            apart, way = length(after, other, moved), length(after, start, moved)
            assert apart < 2e-3 * way, f"{turn}: {apart / way:.1e}"


def length(one: Mapping[str, Any], other: Mapping[str, Any], names: set[str]) -> float:
    """Length of the difference of all these tensors together."""
    return float(sum(((np.asarray(one[name]) - np.asarray(other[name])) ** 2).sum() for name in names)) ** 0.5
