"""Statistics that count as far as the stream has left the source."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeadapt.bundle import Bundle
from edgeadapt.errors import UsageError
from edgeadapt.exporters.blending import ASSUMED
from edgeadapt.exporters.export import export
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.programs import ALIKE, ANCHOR, MIXED, Model, Program, build
from edgeadapt.runtime.adapter import Adapter
from tests.test_reference import BATCH, CLASSES, SHAPE, captured, doubles, largest, network, stream

TRUST, DOUBT, LATE, FEW, OWN = 0.7, 0.03, 0.4, 0.6, 0.45


class Blended(nn.Module):
    """One batch normalisation that follows the stream and each frame by moments of a mixture, written out."""

    def __init__(self, norm: nn.Module, noise: float, mix: float, trust: float) -> None:
        super().__init__()
        self.norm, self.noise, self.mix, self.trust = norm, noise, mix, trust
        self.mean, self.second = norm.running_mean.double(), norm.running_var.double()  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor) -> Tensor:
        centre, spread, eps = self.norm.running_mean, self.norm.running_var, self.norm.eps  # type: ignore[union-attr]
        self.mean = (1 - self.mix) * self.mean + self.mix * x.mean((0, 2, 3))
        self.second = (1 - self.mix) * self.second + self.mix * x.var((0, 2, 3), unbiased=False)
        far = max(0.0, float(((self.mean - centre) ** 2 / (spread + eps)).mean()) - self.noise)  # type: ignore[operator]
        w = self.trust * far / (far + DOUBT)
        mean = (1 - w) * centre + w * self.mean  # type: ignore[operator]
        square = (1 - w) * (spread + centre**2) + w * (self.second + self.mean**2)  # type: ignore[operator]
        made = []
        for frame in x:
            own, places = frame.mean((1, 2)), frame.flatten(1)
            away = math.sqrt(float(((own - mean) ** 2 / (square - mean**2 + eps)).mean()))
            w = OWN * away / (1 + away)
            centre, second = (1 - w) * mean + w * own, (1 - w) * square + w * (places**2).mean(1)
            made.append(nn.functional.batch_norm(frame[None], centre, second - centre**2, self.norm.weight, self.norm.bias, False, 0.0, eps))  # type: ignore[arg-type]
        return torch.cat(made)


def blended(module: nn.Module, noise: dict[str, float], mix: float, path: str = "") -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            deep = list(noise).index(f"{path}{name}") / (len(noise) - 1)  # noise is in the order of execution
            setattr(module, name, Blended(child, noise[f"{path}{name}"], mix, TRUST * (1 + (LATE - 1) * deep)))
        else:
            blended(child, noise, mix, f"{path}{name}.")
    return module


def program_of(name: str, kind: str, role: str, batch: int = BATCH) -> Program:
    method = METHODS[kind](captured(name, batch), Setup(CLASSES))
    values = {**method.backbone.source_statistics(), **method.own_statistics()}
    model = Model(method, method.parameters(), values, "live", method.optimiser, anchored=True)
    return build(model, role, batch, torch.zeros(batch, *SHAPE), torch.zeros(batch, dtype=torch.int64))


def doubled(program: Program, **hyper: float) -> dict[str, Tensor]:
    given = {**program.example, **{f"hyper.{key}": torch.tensor(value) for key, value in hyper.items()}}
    return {key: value.double() if value.is_floating_point() else value for key, value in given.items()}


@pytest.mark.parametrize("batch", [BATCH, 1])
@pytest.mark.parametrize("name", ["resnet14", "wideresnet10"])
def test_layers_follow_as_far_as_the_stream_has_left(name: str, batch: int) -> None:
    """Batch after batch, also of one frame, with noise of each layer's own; some layers stay at the source, some follow."""
    program = program_of(name, "norm", "predict", batch)
    given = doubled(program, mix=0.5, trust=TRUST, doubt=DOUBT, late=LATE, few=FEW, own=OWN)
    random = torch.Generator().manual_seed(2)
    chances = {layer: 0.02 + 0.2 * torch.rand(2, generator=random, dtype=torch.float64) for layer in program.model.layers}
    given |= {f"weights.{name}": torch.stack(values) for name, values in zip((MIXED, ALIKE), zip(*chances.values(), strict=True), strict=True)}
    noise = {layer: float((1 - FEW) * mixed + FEW * alike) for layer, (mixed, alike) in chances.items()}
    plain = blended(copy.deepcopy(network(name)).double(), noise, float(given["hyper.mix"]))
    for x in (frames[:batch] for frames, _ in stream(4)):
        with doubles(), torch.no_grad():
            out, want = program({**given, "x": x}), plain(x)
        assert largest(out["logits"] - want) < 1e-8 * largest(want)
        given |= {f"state.{key.removeprefix('new.')}": value for key, value in out.items() if key.startswith("new.")}
    assert largest(want - network(name).double()(x).detach()) > 1e-3
    network(name).float()


def test_where_the_stream_is_the_source_the_model_is_itself() -> None:
    """With statistics as they start, all else equal, the logits are the frozen model's."""
    program = program_of("resnet14", "norm", "predict")
    given = {**program.example, "hyper.mix": torch.tensor(0.0), "hyper.trust": torch.tensor(1.0), "hyper.own": torch.tensor(0.0)}
    (x, _), *_ = stream(1)
    want = network("resnet14")(x.float()).detach()
    assert largest(program({**given, "x": x.float()})["logits"] - want) < 1e-5


@pytest.mark.parametrize("kind", ["tent", "ecotta", "eata"])
def test_steps_take_blended_statistics_as_constants(kind: str) -> None:
    """With trust and own 0 a step is one at source statistics, to the last digits: gradients pass a fixed scale; the statistics still follow."""
    (x, _), *_ = stream(1)
    program = program_of("wideresnet10", kind, "adapt")
    still = {"hyper.margin": torch.tensor(2.0)} if kind != "tent" else {}
    given = {**doubled(program, mix=0.5, trust=0.0, doubt=0.1, own=0.0), "x": x, **still}
    source = build(Model(program.model.method, program.model.parameters, program.model.values, "source", program.model.optimiser),
                   "adapt", BATCH, torch.zeros(BATCH, *SHAPE))  # fmt: skip
    with doubles():
        ours, theirs = program(given), source({**doubled(source), "x": x, **still})
    for key, value in theirs.items():
        assert largest(ours[key] - value) <= 1e-9 * max(largest(value), 1e-9), key
    moved = [key for key in ours if key.startswith("new.statistics.")]
    assert moved
    assert all(largest(ours[key] - given[f"state.{key.removeprefix('new.')}"]) > 0 for key in moved)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.na, self.b, self.nb = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.na(self.a(x)).relu()
        return self.fc(self.nb(self.b(x)).relu().mean((2, 3)))


def data(count: int = 256) -> tuple[Any, Any]:
    return np.random.default_rng(0).standard_normal((count, 3, 8, 8)).astype(np.float32), np.arange(count) % 4


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """With statistics of the data."""
    model = Net().train()
    for norm in (model.na, model.nb):
        norm.momentum = None
    with torch.no_grad():
        model(torch.from_numpy(data()[0]))
    return model.eval()


def test_noise_is_measured_on_source_windows(net: nn.Module, tmp_path: Any) -> None:
    """It is what windows of 64 differ by; so on more of the source the model is nearly itself, and on something else it follows."""
    path = tmp_path / "net.edgeadapt"
    report = export(net, path, shape=(3, 8, 8), data=data(), method="norm", statistics="anchored", batches=(32,), allow_drop=True)
    assert report.manifest["method"]["options"]["statistics"] == "anchored"
    assert report.manifest["statistics"]["mode"] == "live"
    assert set(report.manifest["hyper"]) == {"mix", "trust", "doubt", "late", "few", "own"}
    assert report.manifest["graphs"]["predict.b32"]["hyper"] == ["mix", "trust", "doubt", "late", "few", "own"]
    more = np.random.default_rng(1).standard_normal((32, 3, 8, 8)).astype(np.float32)
    with Adapter.open(path, prepared=False) as adapter:
        adapter.hyper = {"mix": 1.0, "trust": 1.0, "late": 1.0, "own": 0.0}
        frozen, found = adapter.source(more), adapter.predict(more)
        away = adapter.source(2 * more + 1), adapter.predict(2 * more + 1)
        assert np.abs(found - frozen).max() < 0.25 * np.abs(away[1] - away[0]).max()
        adapter.reset()
        assert np.abs(adapter.predict(more, update_statistics=False) - frozen).max() < 1e-5


def grouped(count: int = 512) -> tuple[Any, Any]:
    """Frames of four kinds, each brighter in places of its own."""
    random, y = np.random.default_rng(3), np.arange(count) % 4
    x = random.standard_normal((count, 3, 8, 8)).astype(np.float32)
    for kind in range(4):
        x[y == kind] += np.float32(1.5) * random.standard_normal((3, 1, 1)).astype(np.float32)
    return x, y


def test_the_reference_is_what_windows_of_the_source_look_like(tmp_path: Any) -> None:
    """Held against windows put together here: mixed ones, and those of one class."""
    x, y = grouped()
    torch.manual_seed(1)
    model = Net().train()
    for norm in (model.na, model.nb):
        norm.momentum = None
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimiser.step()
    for norm in (model.na, model.nb):
        norm.reset_running_stats()
    with torch.no_grad():
        model(torch.from_numpy(x))
    path = tmp_path / "net.edgeadapt"
    export(model.eval(), path, shape=(3, 8, 8), data=(x, y), method="norm", batches=(64,))
    reference = Bundle.open(path).manifest.reference
    assert reference is not None
    assert reference.window == 64
    seen: dict[str, Tensor] = {}
    model.na.register_forward_pre_hook(lambda _, given: seen.update(na=given[0]))

    def far(windows: list[Any]) -> float:
        found = []
        for rows in windows:
            with torch.no_grad():
                model(torch.from_numpy(x[rows]))
            found.append(float(((seen["na"].mean((0, 2, 3)) - model.na.running_mean) ** 2 / model.na.running_var).mean()))  # type: ignore[operator]
        return sum(found) / len(found)

    order = np.random.default_rng(5).permutation(len(x))
    mixed = far([order[i : i + 64] for i in range(0, len(order), 64)])
    alike = far([np.flatnonzero(y == kind)[i : i + 64] for kind in range(4) for i in (0, 64)])
    assert alike > 5 * mixed
    assert reference.layers["na"].mixed == pytest.approx(mixed, rel=0.6)
    assert reference.layers["na"].alike == pytest.approx(alike, rel=0.4)
    assert set(reference.layers) == {"na", "nb"}
    assert 3.5 < reference.classes <= 4.0
    with torch.no_grad():
        logits = model(torch.from_numpy(x))
    assert reference.entropy == pytest.approx(float(-(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()), rel=0.3)


def test_meta_networks_lie_where_their_parts_end() -> None:
    model = program_of("resnet14", "ecotta", "predict").model
    depths = {name: value for name, value in model.depths.items() if name.startswith("meta.")}
    assert depths == {f"meta.{k}.{norm}": (k + 1) / 4 for k in range(4) for norm in ("norm", "conv_norm")}
    own = [value for name, value in model.depths.items() if not name.startswith("meta.")]
    assert own == sorted(own)
    assert (own[0], own[-1]) == (0.0, 1.0)


def test_noise_without_data_is_assumed(net: nn.Module) -> None:
    program = program_of("resnet14", "norm", "predict")
    for name in (MIXED, ALIKE):
        assert program.frozen[f"weights.{name}"].tolist() == pytest.approx([ASSUMED] * len(program.model.layers))
    anchors = [key for key in program.frozen if key.startswith(f"weights.{ANCHOR}")]
    assert len(anchors) == 2 * len(program.model.layers)
    assert export(net, None, shape=(3, 8, 8), method="norm", statistics="anchored", batches=(4,)).manifest["hyper"]["trust"]["default"] == 0.7


@pytest.mark.parametrize("method", ["rotta", "cotta", "lean", "source"])
def test_methods_with_statistics_of_their_own_have_no_anchored_ones(net: nn.Module, method: str) -> None:
    with pytest.raises(UsageError, match="'anchored' statistics contradict it"):
        export(net, None, shape=(3, 8, 8), data=data(), method=method, statistics="anchored")
