"""The architectures users bring, at their published sizes, in plain torch.

Parameter names follow the checkpoints they are meant to load: the data pack's for the CIFAR networks, torchvision's for ResNet and MobileNetV2.
Every factory works without arguments, so that `tests.zoo.named:resnet18` names a model, and takes `seed`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.calibrate import seeded

# ------------------------------------------------------------------------------------------------ CIFAR ResNet, post-activation


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut subsamples and pads with zero channels, so it has no parameters (option A of He et al. 2015)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride = stride
        self.extra = outside - inside

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1 or self.extra:
            front = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, front, self.extra - front))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """6n+2 layers over three stages of 16, 32 and 64 channels."""

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(CifarBlock(16, 16, 1) for _ in range(count)))
        self.layer2 = nn.Sequential(CifarBlock(16, 32, 2), *(CifarBlock(32, 32, 1) for _ in range(count - 1)))
        self.layer3 = nn.Sequential(CifarBlock(32, 64, 2), *(CifarBlock(64, 64, 1) for _ in range(count - 1)))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.shape[3])
        return self.linear(out.view(out.size(0), -1))


@seeded
def resnet_cifar(depth: int = 20, classes: int = 10) -> nn.Module:
    """CIFAR ResNet of `depth` = 6n+2 layers for 3x32x32; loads resnet20_cifar10 and resnet56_cifar10 of the data pack."""
    return CifarResNet(depth, classes)


# ------------------------------------------------------------------------------------------------ WideResNet, pre-activation


class WideBlock(nn.Module):
    """Norm and ReLU before each convolution; where the width changes, a 1x1 shortcut on the activated input (Zagoruyko and Komodakis 2016)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        if inside != outside:
            self.sc = nn.Conv2d(inside, outside, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (self.sc(active) if hasattr(self, "sc") else x)


class WideResNet(nn.Module):
    """6n+4 layers over three stages of 16, 32 and 64 times `widen` channels."""

    def __init__(self, depth: int, widen: int, classes: int) -> None:
        super().__init__()
        count = (depth - 4) // 6
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        stages = []
        for k, (inside, outside) in enumerate(itertools.pairwise(widths)):
            stages.append(nn.Sequential(WideBlock(inside, outside, 2 if k else 1), *(WideBlock(outside, outside, 1) for _ in range(count - 1))))
        self.b1, self.b2, self.b3 = stages
        self.bn = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b3(self.b2(self.b1(self.conv1(x))))
        out = F.adaptive_avg_pool2d(F.relu(self.bn(out)), 1)
        return self.fc(torch.flatten(out, 1))


@seeded
def wideresnet(depth: int = 40, widen: int = 2, classes: int = 10) -> nn.Module:
    """WideResNet-`depth`-`widen` for 3x32x32; the defaults load wrn40_2_cifar10 of the data pack."""
    return WideResNet(depth, widen, classes)


# ------------------------------------------------------------------------------------------------ MobileNetV2


def he_normal(model: nn.Module) -> None:
    """Convolutions from the normal distribution of He et al. 2015, by fan-in: otherwise a deep untrained network ignores its input."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


class ConvNormReLU6(nn.Sequential):
    """Convolution with 'same' padding, batch norm, ReLU6."""

    def __init__(self, inside: int, outside: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inside, outside, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False), nn.BatchNorm2d(outside), nn.ReLU6(inplace=True)
        )


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, linear projection 1x1; added to the input where the shapes agree (Sandler et al. 2018)."""

    def __init__(self, inside: int, outside: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inside * expand
        layers: list[nn.Module] = [] if expand == 1 else [ConvNormReLU6(inside, hidden, 1)]
        layers += [ConvNormReLU6(hidden, hidden, 3, stride, groups=hidden), nn.Conv2d(hidden, outside, 1, bias=False), nn.BatchNorm2d(outside)]
        self.conv = nn.Sequential(*layers)
        self.add = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.add else self.conv(x)


class MobileNetV2(nn.Module):
    """(expansion, channels, blocks, stride of the first) by stage, channels times `width` rounded to a multiple of 8."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, width: float, classes: int) -> None:
        super().__init__()
        inside = self.rounded(32 * width)
        last = self.rounded(1280 * max(1.0, width))
        layers: list[nn.Module] = [ConvNormReLU6(3, inside, 3, 2)]
        for expand, channels, count, stride in self.STAGES:
            outside = self.rounded(channels * width)
            for k in range(count):
                layers.append(InvertedResidual(inside, outside, stride if k == 0 else 1, expand))
                inside = outside
        self.features = nn.Sequential(*layers, ConvNormReLU6(inside, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))
        he_normal(self)

    @staticmethod
    def rounded(channels: float) -> int:
        """The nearest multiple of 8, at least 8, never below nine tenths of `channels`."""
        near = max(8, int(channels / 8 + 0.5) * 8)
        return near if near >= 0.9 * channels else near + 8

    def forward(self, x: Tensor) -> Tensor:
        out = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(out, 1))


@seeded
def mobilenet_v2(width: float = 1.0, classes: int = 1000) -> nn.Module:
    """MobileNetV2 for 3x224x224 (any size from 32 on), with torchvision's parameter names."""
    return MobileNetV2(width, classes)


# ------------------------------------------------------------------------------------------------ ResNet for 224


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = projection(inside, width, stride)
        nn.init.constant_(self.bn2.weight, 0.25)  # the branches add up: at 1 the logits of an untrained network saturate every softmax

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1 down, 3x3 (which carries the stride), 1x1 up to four times the width."""

    expansion = 4

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(inside, 4 * width, stride)
        nn.init.constant_(self.bn3.weight, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def projection(inside: int, outside: int, stride: int) -> nn.Sequential | None:
    """A 1x1 convolution with norm for the shortcut, or None where the shapes agree."""
    if stride == 1 and inside == outside:
        return None
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))


class ResNet(nn.Module):
    """7x7 stem with max pool, four stages, global average pool (He et al. 2015), with torchvision's parameter names."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], counts: tuple[int, int, int, int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inside, stages = 64, []
        for k, count in enumerate(counts):
            blocks = []
            for j in range(count):
                blocks.append(block(inside, 64 << k, 2 if k and not j else 1))
                inside = (64 << k) * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inside, classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@seeded
def resnet18(classes: int = 1000) -> nn.Module:
    """ResNet-18 for 3x224x224 (any size from 32 on)."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes)


@seeded
def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50 for 3x224x224 (any size from 32 on)."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes)


# ------------------------------------------------------------------------------------------------ sensors, segmentation, transformer


class SensorNet(nn.Module):
    """Three 1-D convolutions with batch norm, the later two of stride 2, and a global average."""

    def __init__(self, channels: int, length: int, classes: int) -> None:
        super().__init__()
        self.input_shape = (channels, length)
        self.block1 = nn.Sequential(nn.Conv1d(channels, 16, 5, padding=2, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.block2 = nn.Sequential(nn.Conv1d(16, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm1d(32), nn.ReLU())
        self.block3 = nn.Sequential(nn.Conv1d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm1d(64), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.block3(self.block2(self.block1(x)))).squeeze(-1))


@seeded
def sensor_net(channels: int = 6, length: int = 128, classes: int = 6) -> nn.Module:
    """A 1-D network for windows of `channels` x `length` samples."""
    return SensorNet(channels, length, classes)


class DoubleConv(nn.Sequential):
    """Twice 3x3 convolution, batch norm, ReLU."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(
            nn.Conv2d(inside, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
        )


class SegmentationNet(nn.Module):
    """Two levels down and up with concatenated skips (after Ronneberger et al. 2015); one step up is learned, the other bilinear."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.enter = DoubleConv(3, width)
        self.down1 = DoubleConv(width, 2 * width)
        self.down2 = DoubleConv(2 * width, 4 * width)
        self.lift = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up1 = DoubleConv(4 * width, 2 * width)
        self.up2 = DoubleConv(3 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        full = self.enter(x)
        half = self.down1(F.max_pool2d(full, 2))
        quarter = self.down2(F.max_pool2d(half, 2))
        half = self.up1(torch.cat([half, self.lift(quarter)], dim=1))
        half = F.interpolate(half, size=full.shape[2:], mode="bilinear", align_corners=False)
        return self.head(self.up2(torch.cat([full, half], dim=1)))


@seeded
def segmentation_net(classes: int = 4, width: int = 8) -> nn.Module:
    """A small U-shaped network for 3xHxW, H and W multiples of 4; logits N x classes x H x W."""
    return SegmentationNet(classes, width)


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP, both residual. `fused` picks one qkv matrix and scaled_dot_product_attention, otherwise nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)
        else:
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.fused = fused
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def mix(self, x: Tensor) -> Tensor:
        if not self.fused:
            return self.attention(x, x, x, need_weights=False)[0]
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """Patch convolution, learned positions, two encoder layers, mean over tokens (after Dosovitskiy et al. 2020)."""

    def __init__(self, classes: int, size: int, patch: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, fused=k % 2 == 0) for k in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(x)).mean(dim=1))


@seeded
def tiny_vit(classes: int = 10, size: int = 32, patch: int = 8, width: int = 32, heads: int = 4, depth: int = 2) -> nn.Module:
    """A small vision transformer for 3 x size x size; even layers use scaled_dot_product_attention, odd ones nn.MultiheadAttention."""
    return TinyViT(classes, size, patch, width, heads, depth)


NAMED: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "resnet_cifar": (resnet_cifar, (3, 32, 32)),
    "wideresnet": (wideresnet, (3, 32, 32)),
    "mobilenet_v2": (mobilenet_v2, (3, 224, 224)),
    "resnet18": (resnet18, (3, 224, 224)),
    "resnet50": (resnet50, (3, 224, 224)),
    "sensor_net": (sensor_net, (6, 128)),
    "segmentation_net": (segmentation_net, (3, 32, 32)),
    "tiny_vit": (tiny_vit, (3, 32, 32)),
}
"""Every named model: its factory and the input shape it was published with."""


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a safetensors file in place; every key must fit, only `num_batches_tracked` may be missing. Returns the model in eval mode.

    Raises:
        KeyError: a key of the file or of the model has no partner.
    """
    from safetensors.torch import load_file

    report = model.load_state_dict(load_file(path), strict=False)
    missing = [key for key in report.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or report.unexpected_keys:
        raise KeyError(f"{path}: missing {missing}, unexpected {report.unexpected_keys}")
    return model.eval()
