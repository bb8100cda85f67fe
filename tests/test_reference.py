"""The methods' programs, and the bundles made of them, beside plain PyTorch implementations that share no code with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgeadapt.exporters.backbone import Normaliser
from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.methods import METHODS, Method, Setup
from edgeadapt.exporters.programs import Model, Program, build
from tests.reference import Adaptation, EcoTTA, Side, reference
from tests.zoo.calibrate import calibrate
from tests.zoo.named import resnet_cifar, wideresnet

BATCH, SHAPE, CLASSES, STEPS = 8, (3, 32, 32), 10, 6
MODELS = {"resnet20": lambda: resnet_cifar(20), "wideresnet10": lambda: wideresnet(10, 1)}
STEP = {"mix": 0.3, "rate": 0.01, "margin": 0.7}

State = dict[str, Tensor]


def network(name: str) -> nn.Module:
    """A random model with plausible statistics, some of whose predictions are confident."""
    model = calibrate(MODELS[name](), SHAPE)
    with torch.no_grad():
        (model.linear if hasattr(model, "linear") else model.fc).weight.mul_(6)
    return model


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


def pair(name: str, kind: str, role: str = "adapt", statistics: str | None = None, exact: bool = False, single: bool = False, **hyper: float) -> Pair:
    """Both implementations of a method over one model; `single` chooses how the plain EcoTTA gets its gradients."""
    model = network(name)
    method = METHODS[kind](capture(model, SHAPE, BATCH), Setup(CLASSES))
    values = {**method.backbone.source_statistics(), **method.own_statistics()}
    ours = Model(method, method.parameters(), values, statistics or method.statistics, method.optimiser, exact)
    program = build(ours, role, BATCH, torch.zeros(BATCH, *SHAPE), torch.zeros(BATCH, dtype=torch.int64))
    given = dict(program.example)
    given |= {f"state.{key}": value for key, value in disturbed(ours.state()).items() if f"state.{key}" in given}
    given |= {f"hyper.{key}": torch.tensor(value) for key, value in hyper.items() if f"hyper.{key}" in given}
    given = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    scalars = {key.removeprefix("hyper."): float(value) for key, value in given.items() if key.startswith("hyper.")}
    parts = [cut.name for cut in method.partition.cuts[1:]] if kind == "ecotta" and method.partition else []
    options = {"single": single} if kind == "ecotta" else {}
    plain = reference(model, kind, parts, ours.statistics, exact=exact, **scalars, **options).double()
    both = Pair(method, program, given, plain)
    plain.load(both.state)
    return both


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
    return {name: largest(value - theirs[name]) / max(largest(theirs[name] - before.get(name, torch.zeros(()))), 1e-9) for name, value in ours.items()}


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
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_program_follows_the_plain_implementation(model: str, case: str) -> None:
    """Logits, parameters, moments and statistics, step after step."""
    both = pair(model, **{**STEP, **CASES[case]})
    before, chosen = both.state, 0.0
    for x, y in stream(STEPS):
        ours, theirs = both.step(x, y if both.program.role == "learn" else None)
        assert {name for name in ours if name != "logits"} == set(theirs) - {"logits"}
        found = differences(ours, theirs, before)
        worst = max(found, key=lambda name: found[name])
        assert found[worst] < 1e-6, f"{worst}: {found[worst]:.1e}"
        assert all(largest(value - before[name]) > 0 for name, value in ours.items() if name != "logits"), "something never moves"
