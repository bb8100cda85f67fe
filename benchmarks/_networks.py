"""The networks that the benchmarks adapt. Needs torch and the checkout, nothing of edgeadapt."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tests.zoo.calibrate import calibrate
from tests.zoo.named import load_weights, resnet50, resnet_cifar, wideresnet

SHAPE, CLASSES = (3, 32, 32), 10


@dataclass(frozen=True)
class Network:
    """An architecture, the pack's weights for it, how images become its input, and the labelled images it is scored on; and one input's shape."""

    factory: Callable[[], nn.Module]
    weights: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scored: str
    shape: tuple[int, int, int] = SHAPE

    def trained(self, pack: Path) -> nn.Module:
        """With the pack's weights."""
        return load_weights(self.factory(), pack / "weights" / f"{self.weights}.safetensors")

    def random(self) -> nn.Module:
        """With random weights and plausible statistics: enough where only time and memory count."""
        return calibrate(self.factory(), self.shape)


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
NETWORKS = {
    "resnet20": Network(lambda: resnet_cifar(20), "resnet20_cifar10", *IMAGENET, "cifar_test1000"),
    "resnet56": Network(lambda: resnet_cifar(56), "resnet56_cifar10", *IMAGENET, "cifar_test1000"),
    "wrn40-2": Network(wideresnet, "wrn40_2_cifar10", *HALF, "cifar_holdout10k"),
}
"""The CIFAR networks. wrn40-2 never saw the holdout; the ResNets did, and are scored on the test images."""
EVERY = {**NETWORKS, "resnet50": Network(resnet50, "", *HALF, "", (3, 224, 224))}
"""With one that there are no weights for: where only time and memory count."""


def data_pack() -> Path:
    """The folder of the data pack.

    Raises:
        SystemExit: EDGEADAPT_DATA does not name it.
    """
    folder = Path(os.environ.get("EDGEADAPT_DATA", ""))
    if not (folder / "loaders.py").is_file():
        raise SystemExit("EDGEADAPT_DATA must name the folder of the data pack")
    return folder


def resnet20() -> nn.Module:
    """For `edgeadapt bench --model benchmarks._networks:resnet20`."""
    return NETWORKS["resnet20"].factory()


def resnet56() -> nn.Module:
    """For `edgeadapt bench --model benchmarks._networks:resnet56`."""
    return NETWORKS["resnet56"].factory()


def wrn40_2() -> nn.Module:
    """For `edgeadapt bench --model benchmarks._networks:wrn40_2`."""
    return NETWORKS["wrn40-2"].factory()
