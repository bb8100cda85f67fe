"""EcoTTA held near what it was at the start, beside plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.methods.base import START
from edgeadapt.exporters.programs import Model, build
from tests.reference.ecotta import EcoTTA
from tests.test_reference import BATCH, CLASSES, PARTS, SHAPE, STEP, captured, disturbed, doubles, largest, network, stream


class Anchored(EcoTTA):
    """Each part is held near what its meta network, as it was, makes of the same input and statistics."""

    def remember(self) -> None:
        self.start = [copy.deepcopy(self.meta)]

    def drifts(self, between: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        found = []
        for now, before, (x, y, _) in zip(self.meta, self.start[0], between):
            for layer in ("norm", "conv_norm"):
                ours, theirs = getattr(now, layer), getattr(before, layer)
                theirs.live, (theirs.mean, theirs.variance) = False, ours.following
            with torch.no_grad():
                anchor = before(x, y)
            found.append((now(x.detach(), y.detach()) - anchor).abs().mean())
        return found


@pytest.mark.parametrize("name", ["resnet14", "wideresnet10"])
def test_ecotta_can_be_held_near_its_start(name: str) -> None:
    """At step 0 the drift is zero. Elsewhere, where no sign hangs on a last bit, parameters and moments are those of the plain implementation."""
    method = METHODS["ecotta"](captured(name), Setup(CLASSES, settings={"anchor": "start"}))
    parameters = disturbed({key: ("parameter", value) for key, value in method.parameters().items()})
    model = Model(method, parameters, {**method.backbone.source_statistics(), **method.own_statistics()}, "live", "sgd")
    program = build(model, "adapt", BATCH, torch.zeros(BATCH, *SHAPE))
    assert {key for key in program.frozen if key.startswith(f"weights.{START}")} == {f"weights.{START}{key}" for key in parameters}
    given = {key: value.double() if value.is_floating_point() else value for key, value in program.example.items()}
    given |= {f"hyper.{key}": torch.tensor(value, dtype=torch.float64) for key, value in {**STEP, "margin": 2.0, "regulariser": 5.0}.items()}
    plain = Anchored(network(name), PARTS[name], live=True, margin=2.0, regulariser=5.0, momentum=float(given["hyper.momentum"]), **STEP).double()
    plain.load({key.removeprefix("state."): value for key, value in given.items() if key.startswith("state.")})
    plain.remember()
    (x, _), *_ = stream(1)
    with doubles():
        free, out = (program({**given, "x": x, "hyper.regulariser": torch.tensor(weight, dtype=torch.float64)}) for weight in (0.0, 5.0))
    assert float(out["metric.loss"]) == pytest.approx(float(free["metric.loss"]), abs=1e-12)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, value in plain.start[0].named_parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=random, dtype=torch.float64))
            given[f"weights.{START}meta.{key}"] = value.detach().clone()
    drifts = []
    for x, _ in stream(4):
        with doubles():
            free = program({**given, "x": x, "hyper.regulariser": torch.tensor(0.0, dtype=torch.float64)})
            out = program({**given, "x": x})
            plain.adapt(x)
        drifts.append(float(out["metric.loss"] - free["metric.loss"]) / 5.0)
        after = plain.state()
        assert {key.removeprefix("new.") for key in out if key.startswith("new.")} == set(after)
        for key, value in after.items():
            assert largest(out[f"new.{key}"] - value) <= 1e-8 * max(largest(value), 1e-6), key
        given |= {f"state.{key.removeprefix('new.')}": value.detach() for key, value in out.items() if key.startswith("new.")}
    assert min(drifts) > 1e-3
