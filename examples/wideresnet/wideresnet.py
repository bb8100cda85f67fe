"""WideResNet for small images (Zagoruyko and Komodakis 2016, arXiv 1605.07146), with the parameter names of the weights that `train.py` writes.

`edgeadapt export examples/wideresnet/wideresnet.py:wrn40_2 --weights wrn40_2.safetensors` takes the model from here.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 32


class Block(nn.Module):
    """Normalisation and ReLU come before each of two 3x3 convolutions, so the sum that leaves is not activated.

    Where the width changes, the way past them is a 1x1 convolution of the activated input.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.sc = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        past = x if self.sc is None else self.sc(active)
        return past + self.conv2(F.relu(self.bn2(self.conv1(active))))


def stage(before: int, after: int, stride: int, blocks: int) -> nn.Sequential:
    """Blocks of one width, of which the first changes width and resolution."""
    return nn.Sequential(Block(before, after, stride), *(Block(after, after, 1) for _ in range(blocks - 1)))


class WideResNet(nn.Module):
    """Three stages of 16, 32 and 64 times `widen` channels, each of (depth - 4) / 6 blocks, between a 3x3 convolution and a linear classifier.

    Takes float32 [N,3,H,W] as `to_input` makes it, gives logits [N,classes].
    """

    def __init__(self, depth: int, widen: int, classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.b1 = stage(16, 16 * widen, 1, blocks)
        self.b2 = stage(16 * widen, 32 * widen, 2, blocks)
        self.b3 = stage(32 * widen, 64 * widen, 2, blocks)
        self.bn = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b3(self.b2(self.b1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


def wrn40_2() -> nn.Module:
    """WideResNet-40-2 for 10 classes, its weights random: 2.2 million parameters."""
    return WideResNet(40, 2, 10)


def initial(depth: int, widen: int, classes: int, seed: int) -> WideResNet:
    """A network to train, the same for the same arguments; torch's own random state stays as it is.

    Convolutions start from the normal distribution of He et al. 2015 by the number of outputs, biases from zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = WideResNet(depth, widen, classes)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
    return net


def to_input(pixels: NDArray[np.uint8] | NDArray[np.float32], device: torch.device | str = "cpu") -> Tensor:
    """Images [N,H,W,C] of 0..255 as the network takes them: float32 [N,C,H,W] of -1..1, a copy whose channels lie together in memory."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
