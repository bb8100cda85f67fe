"""LAME and T3A beside the programs of their papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeadapt.errors import ExportError
from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.export import export
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.methods.t3a import T3A as OurT3A
from edgeadapt.exporters.programs import Model, Program, build
from edgeadapt.runtime.adapter import Adapter
from tests.reference.gradientless import T3A, lame
from tests.test_reference import BATCH, CLASSES, SHAPE, captured, doubles, largest, network, stream


def program_of(name: str, kind: str, **settings: Any) -> Program:
    method = METHODS[kind](captured(name), Setup(CLASSES, settings=settings))
    return build(Model(method, {}, method.backbone.source_statistics(), "source", "sgd"), "predict", BATCH, torch.zeros(BATCH, *SHAPE))


def run(program: Program, x: Tensor, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """In double precision."""
    given = {key: value.double() if value.is_floating_point() else value for key, value in {**program.example, **(state or {}), "x": x}.items()}
    with doubles():
        return program(given)


def both(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The features that the last linear layer reads, and the logits."""
    seen: list[Tensor] = []
    model = network(name).double()
    layer = model.fc if hasattr(model, "fc") else model.linear
    hook = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(x)
    hook.remove()
    model.float()
    return seen[0], logits


@pytest.mark.parametrize("name", ["resnet14", "wideresnet10"])
def test_lame_follows_the_papers_program(name: str) -> None:
    """Which stops when it stays."""
    program = program_of(name, "lame", neighbours=3)
    for x, _ in stream(3):
        features, logits = both(name, x)
        want = lame(features, logits, 3)
        found = run(program, x)["logits"].exp()
        assert largest(found - want) < 1e-5
        assert largest(logits.softmax(1) - want) > 1e-3


def test_lame_alone_is_the_model_itself() -> None:
    method = METHODS["lame"](capture(network("resnet14"), SHAPE, 1), Setup(CLASSES))
    program = build(Model(method, {}, method.backbone.source_statistics(), "source", "sgd"), "predict", 1, torch.zeros(1, *SHAPE))
    (x, _), *_ = stream(1)
    want = network("resnet14")(x[:1].float()).detach()
    assert largest(program({**program.example, "x": x[:1].float()})["logits"] - want) < 1e-5


@pytest.mark.parametrize("name", ["resnet14", "wideresnet10"])
@pytest.mark.parametrize("supports", [2, 20])
def test_t3a_follows_the_papers_program(name: str, supports: int) -> None:
    """Batch after batch; with two members a class, many are passed over."""
    program = program_of(name, "t3a", supports=supports)
    method = program.model.method
    assert isinstance(method, OurT3A)
    weight, bias = method._weight()
    plain = T3A(weight.double(), bias.double(), supports)
    state: dict[str, Tensor] = {}
    for x, _ in stream(5):
        out = run(program, x, state)
        state = {f"state.{key.removeprefix('new.')}": value for key, value in out.items() if key.startswith("new.")}
        assert set(state) == {"state.memory.supports", "state.memory.entropy"}
        want = plain(*both(name, x))
        assert largest(out["logits"] - want) < 1e-9 * largest(want)
    there = state["state.memory.entropy"].flatten() < 1e3
    assert int(there.sum()) == len(plain.supports)
    assert largest(state["state.memory.supports"][there] - plain.supports) < 1e-9


class Unlike(nn.Module):
    """A classifier of 1×1 convolutions, one that is no vector, and one that is not the end."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.head = kind, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        x = x if self.kind == "dense" else x.mean((2, 3), keepdim=True)
        x = self.head(x)
        return x if self.kind == "dense" else x.flatten(1)[:, :4] if self.kind == "cut" else x.flatten(1)


def sample(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["lame", "t3a"])
def test_a_convolution_may_be_the_classifier(kind: str, tmp_path: Any) -> None:
    """Exported and run: T3A's memory follows predictions, is in the state, and a prediction that must leave no trace leaves none."""
    path = tmp_path / "net.edgeadapt"
    torch.manual_seed(0)
    report = export(Unlike("conv").eval(), path, shape=(3, 8, 8), method=kind, batches=(8,))
    assert report.manifest["hyper"] == {}
    with Adapter.open(path, prepared=False) as adapter:
        x = sample().numpy()
        before = adapter.state
        adapter.predict(x, update_statistics=False)
        assert all(np.array_equal(before[name], value) for name, value in adapter.state.items())
        adapter.adapt(x)
        moved = [name for name, value in adapter.state.items() if not np.array_equal(before[name], value)]
        assert moved == {"lame": [], "t3a": ["memory.supports", "memory.entropy"]}[kind]
        adapter.save(tmp_path / "s.safetensors")
        after = adapter.state
        adapter.reset()
        assert all(np.array_equal(before[name], value) for name, value in adapter.state.items())
        adapter.load(tmp_path / "s.safetensors")
        assert all(np.array_equal(after[name], value) for name, value in adapter.state.items())


@pytest.mark.parametrize("kind", ["lame", "t3a"])
def test_dense_predictions_are_refused(kind: str) -> None:
    with pytest.raises(ExportError, match=f"{kind} reads one vector of features a frame"):
        export(Unlike("dense").eval(), None, shape=(3, 8, 8), method=kind)


def test_t3a_refuses_a_classifier_that_is_not_the_end() -> None:
    with pytest.raises(ExportError, match="t3a needs a classifier that gives the 4 logits itself"):
        export(Unlike("cut").eval(), None, shape=(3, 8, 8), method="t3a")


def test_t3a_refuses_sets_that_are_too_large() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1000))
    with pytest.raises(ExportError, match=r"would hold 38,400,000 numbers.*\n.*supports=87"):
        export(model, None, shape=(3, 8, 8), method="t3a", settings={"supports": 200})
