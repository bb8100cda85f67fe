"""Frame-by-frame normalisation beside plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from edgeadapt.errors import ExportError, UsageError
from edgeadapt.exporters.export import export
from edgeadapt.exporters.methods import METHODS, Setup
from edgeadapt.exporters.programs import Model, build
from tests.test_reference import BATCH, CLASSES, SHAPE, captured, doubles, largest, network, stream


class Frame(nn.Module):
    """One batch normalisation, frame by frame: a loop over frames and a mixture's moments, written out."""

    def __init__(self, norm: nn.Module, strength: float) -> None:
        super().__init__()
        self.norm, self.strength = norm, strength

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, eps = self.norm.running_mean, self.norm.running_var, self.norm.eps  # type: ignore[union-attr]
        rows = []
        for frame in x:
            own, spread = frame.mean((1, 2)), frame.var((1, 2), unbiased=False)
            far = (((own - mean) ** 2 / (variance + eps)).sum() / len(own)).sqrt()
            w = self.strength * far / (1 + far)
            m = (1 - w) * mean + w * own
            v = (1 - w) * (variance + mean**2) + w * (spread + own**2) - m**2
            rows.append(nn.functional.batch_norm(frame[None], m, v, self.norm.weight, self.norm.bias, False, 0.0, eps)[0])  # type: ignore[arg-type]
        return torch.stack(rows)


def framed(module: nn.Module, strength: float) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, Frame(child, strength))
        else:
            framed(child, strength)
    return module


@pytest.mark.parametrize("name", ["resnet14", "wideresnet10"])
@pytest.mark.parametrize(("strength", "batch"), [(0.0, BATCH), (0.3, BATCH), (1.0, BATCH), (0.3, 1)])
def test_lean_normalises_frame_by_frame(name: str, strength: float, batch: int) -> None:
    method = METHODS["lean"](captured(name, batch), Setup(CLASSES, settings={"strength": strength}))
    program = build(Model(method, {}, method.backbone.source_statistics(), "source", "sgd"), "predict", batch, torch.zeros(batch, *SHAPE))
    plain = framed(copy.deepcopy(network(name)), strength).double()
    x = next(stream(1))[0][:batch]
    given = {key: value.double() if value.is_floating_point() else value for key, value in program.example.items()}
    with doubles(), torch.no_grad():
        found, want = program({**given, "x": x})["logits"], plain(x)
    assert largest(found - want) < 1e-9 * largest(want)
    assert (largest(found - network(name).double()(x).detach()) > 1e-3) == (strength > 0)
    network(name).float()


def test_lean_of_vectors_is_the_model_itself() -> None:
    """A frame of a one-dimensional layer has no statistics of its own; one with positions does. The self-check runs the graphs."""
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    report = export(model.eval(), None, shape=(4, 16), method="lean", batches=(4,))
    assert report.manifest["state"] == []


def test_lean_is_refused_without_batch_normalisation_and_in_8_bits() -> None:
    with pytest.raises(ExportError, match="lean blends the statistics of batch normalisation, and this model has none"):
        export(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), None, shape=(3, 2, 2), method="lean")
    with pytest.raises(UsageError, match="lean needs the model in float32"):
        export(network("resnet14"), None, shape=SHAPE, method="lean", quantize="int8")
