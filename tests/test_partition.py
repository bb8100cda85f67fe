"""Where models can be cut, and EcoTTA's rule of denser cuts early."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edgeadapt.errors import ExportError
from edgeadapt.exporters.backbone import Backbone, Normaliser
from edgeadapt.exporters.capture import capture
from edgeadapt.exporters.partition import candidates, partition, shares
from tests.zoo import generated, named


@pytest.mark.parametrize(
    ("units", "parts", "counts"),
    [
        (12, 4, (2, 2, 4, 4)),
        (18, 4, (3, 3, 6, 6)),
        (16, 4, (3, 3, 5, 5)),
        (9, 4, (1, 2, 3, 3)),
        (27, 4, (4, 5, 9, 9)),
        (12, 5, (2, 2, 2, 2, 4)),
        (18, 5, (3, 3, 3, 3, 6)),
        (3, 3, (1, 1, 1)),
        (4, 1, (4,)),
    ],
)
def test_shares_follow_the_papers_table(units: int, parts: int, counts: tuple[int, ...]) -> None:
    assert shares(units, parts) == counts


@pytest.mark.parametrize("units", range(1, 30))
def test_shares_use_every_unit_once(units: int) -> None:
    for parts in range(1, units + 1):
        counts = shares(units, parts)
        assert len(counts) == parts
        assert sum(counts) == units
        assert min(counts) >= 1


def test_a_wide_residual_network_is_cut_as_in_the_paper() -> None:
    captured = capture(named.wideresnet(), (3, 32, 32), 2)
    found = partition(captured, 5)
    assert found.units == (3, 3, 3, 3, 6)
    assert [cut.shape for cut in found.cuts] == [(16, 32, 32), (32, 32, 32), (32, 32, 32), (64, 16, 16), (64, 16, 16), (128, 8, 8)]
    assert partition(captured, 4).cuts[0].name == "conv1"


@pytest.mark.parametrize(
    ("factory", "shape", "units"),
    [
        (lambda: named.resnet_cifar(20), (3, 32, 32), 9),
        (lambda: named.resnet_cifar(56), (3, 32, 32), 27),
        (lambda: named.mobilenet_v2(classes=10), (3, 64, 64), 18),
        (lambda: named.resnet18(classes=10), (3, 64, 64), 8),
        (lambda: named.resnet50(classes=10), (3, 64, 64), 16),
        (named.sensor_net, (6, 128), 2),
        (named.segmentation_net, (3, 32, 32), 4),
        (named.tiny_vit, (3, 32, 32), 2),
    ],
)
def test_units_are_residual_blocks_or_layers(factory: Callable[[], nn.Module], shape: tuple[int, ...], units: int) -> None:
    assert len(candidates(capture(factory(), shape, 2))) - 1 == units


def test_a_transformers_tokens_have_their_channels_last() -> None:
    assert all(cut.channels_last and cut.channels == 32 for cut in candidates(capture(named.tiny_vit(), (3, 32, 32), 2)))


@pytest.mark.parametrize("seed", range(12))
def test_segments_between_cuts_give_the_models_own_output(seed: int) -> None:
    model, shape, _ = generated.generate(seed)
    captured = capture(model, shape, 2)
    backbone = Backbone(captured, [cut.node for cut in candidates(captured)])
    x = torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        got = backbone.run(captured.tensors, Normaliser(backbone.source_statistics())).whole(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_cuts_can_be_given_by_name() -> None:
    captured = capture(named.resnet_cifar(20), (3, 32, 32), 2)
    found = partition(captured, 4, ["layer2", "layer1", "layer3"])
    assert [cut.name for cut in found.cuts] == ["layer1", "layer2", "layer3"]
    assert found.units == (3, 3)


def test_a_wrong_name_is_met_with_near_ones() -> None:
    captured = capture(named.resnet_cifar(20), (3, 32, 32), 2)
    with pytest.raises(ExportError, match="did you mean layer1") as caught:
        partition(captured, 4, ["layer1", "layr1.0"])
    assert "'layr1.0'" in caught.value.message


class _Bypassed(nn.Module):
    """Every layer is bypassed by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.a(x) + x) + x)
        logits: Tensor = self.head(y.mean((2, 3)) + x.mean((2, 3)))
        return logits


def test_a_model_that_cannot_be_cut_says_where_and_why() -> None:
    with pytest.raises(ExportError, match="from 'a' on, connections bypass"):
        partition(capture(_Bypassed(), (3, 8, 8), 2), 2)


def test_a_model_of_one_layer_says_so() -> None:
    with pytest.raises(ExportError, match="1 layers with weights"):
        partition(capture(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (3, 2, 2), 2), 2)


class _Tokens(nn.Module):
    """A standard encoder over a window of tokens."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.layers = nn.Sequential(*[nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, norm_first=pooled) for _ in range(3)])
        self.head, self.pooled = nn.Linear(12, 5), pooled

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.layers(self.embed(x))
        logits: Tensor = self.head(tokens.mean(1) if self.pooled else tokens[:, 0])
        return logits


@pytest.mark.parametrize("pooled", [False, True])
def test_standard_encoders_have_their_channels_last(pooled: bool) -> None:
    places = candidates(capture(_Tokens(pooled), (16, 6), 2))
    assert len(places) >= 3
    assert all(cut.channels_last and cut.channels == 12 and cut.spatial == (16,) for cut in places)


class _Casts(nn.Module):
    """Casts that tracing turns into checks without readers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.float()).relu()
        x = self.c(self.b(x.to(torch.float32)).relu()).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def test_casts_leave_the_places_to_cut() -> None:
    assert len(candidates(capture(_Casts(), (3, 12, 12), 2))) == 3
