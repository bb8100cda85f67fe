"""The demo's model: a small residual network that reads digits. `python train.py` trains it in about a minute and writes what the export needs.

digits.safetensors are its weights, train.npz and test.npz the images (x uint8 N x 32 x 32 x 3, y int64 N).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgeadapt.demo import digits

MEAN, STD = 0.78, 0.25


class Block(nn.Module):
    """Two 3x3 convolutions and a way past them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.past = nn.Sequential()
        if stride != 1 or before != after:
            self.past = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.past(x))


class Digits(nn.Module):
    """A stem, four residual blocks, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.layer1 = nn.Sequential(Block(12, 12, 1))
        self.layer2 = nn.Sequential(Block(12, 24, 2))
        self.layer3 = nn.Sequential(Block(24, 48, 2))
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def model() -> nn.Module:
    """The network, its weights random."""
    return Digits()


def tensor(images: np.ndarray) -> Tensor:
    """uint8 [N,H,W,C] as the network takes it."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def jitter(x: Tensor, random: torch.Generator) -> Tensor:
    """Each image turned, scaled, sheared and moved a little."""
    count = len(x)
    draw = lambda low, high: torch.empty(count).uniform_(low, high, generator=random)  # noqa: E731
    angle, scale, shear = draw(-0.2, 0.2), draw(0.9, 1.15), draw(-0.15, 0.15)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1], theta[:, 0, 2] = scale * angle.cos(), shear - angle.sin(), draw(-0.12, 0.12)
    theta[:, 1, 0], theta[:, 1, 1], theta[:, 1, 2] = angle.sin(), scale * angle.cos(), draw(-0.12, 0.12)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="border", align_corners=False)


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (net.eval()(x).argmax(1) == y).float().mean().item()


def train(x: Tensor, y: Tensor, epochs: int = 60, batch: int = 60, rate: float = 0.05) -> nn.Module:
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    net = model()
    optimiser = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * (len(x) // batch))
    for _ in range(epochs):
        net.train()
        for index in torch.randperm(len(x), generator=random).split(batch):
            loss = F.cross_entropy(net(jitter(x[index], random)), y[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return net


def main(folder: str = ".") -> int:
    (train_x, train_y), (test_x, test_y) = digits.training(), digits.testing()
    net = train(tensor(train_x), torch.from_numpy(train_y))
    clean = accuracy(net, tensor(test_x), torch.from_numpy(test_y))
    out = Path(folder)
    save_file(net.state_dict(), out / "digits.safetensors")
    np.savez_compressed(out / "train.npz", x=train_x, y=train_y)
    np.savez_compressed(out / "test.npz", x=test_x, y=test_y)
    print(f"{sum(value.numel() for value in net.parameters())} parameters; {clean:.1%} of {len(test_y)} test images read correctly")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
