"""The parts that random architectures are drawn from: single layers, blocks and heads, each returned with a description in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")


class Rejected(Exception):
    """This draw does not fit; draw again."""


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def pick(self, *choices: T) -> T:
        """One of the choices, all alike; repeat one to make it likelier."""
        return choices[self.integer(0, len(choices) - 1)]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return float(torch.rand((), generator=self.generator)) < probability


@dataclass(frozen=True)
class Kit:
    """The layer classes of one dimensionality."""

    rank: int
    conv: type[nn.Module]
    transposed: type[nn.Module]
    batch: type[nn.Module]
    instance: type[nn.Module]
    max_pool: type[nn.Module]
    avg_pool: type[nn.Module]
    adaptive_avg: type[nn.Module]
    adaptive_max: type[nn.Module]
    dropout: type[nn.Module]
    smooth: str


ONE = Kit(
    1,
    nn.Conv1d,
    nn.ConvTranspose1d,
    nn.BatchNorm1d,
    nn.InstanceNorm1d,
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool1d,
    nn.Dropout,
    "linear",
)
TWO = Kit(
    2,
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.InstanceNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout2d,
    "bilinear",
)

# ------------------------------------------------------------------------------------------------ ways to join branches


class Residual(nn.Module):
    """shortcut(x) + body(x), then an activation or none; `inplace` adds in place."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, after: nn.Module, inplace: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.after, self.inplace = body, shortcut, after, inplace

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.inplace:
            out += self.shortcut(x)
        else:
            out = self.shortcut(x) + out
        return self.after(out)


class Parallel(nn.Module):
    """Branches of one input, concatenated over channels."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Dense(nn.Module):
    """The input itself, concatenated with what a layer makes of it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.body(x)), 1)


class Excite(nn.Module):
    """Channels scaled by a gate computed from their means."""

    def __init__(self, kit: Kit, channels: int, hidden: int, activation: nn.Module, gate: nn.Module, linear: bool) -> None:
        super().__init__()
        layer: Callable[[int, int], nn.Module] = nn.Linear if linear else lambda a, b: kit.conv(a, b, 1)
        self.down, self.activation, self.up, self.gate = layer(channels, hidden), activation, layer(hidden, channels), gate
        self.axes, self.linear = tuple(range(2, 2 + kit.rank)), linear

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(self.up(self.activation(self.down(x.mean(self.axes, keepdim=not self.linear)))))
        if self.linear:
            gate = gate.reshape(gate.shape[0], gate.shape[1], *[1] * len(self.axes))
        return x * gate


class Split(nn.Module):
    """One half of the channels passes, the other is worked on; then the halves are interleaved (channel shuffle)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        out = torch.stack([left, self.body(right)], dim=2)
        return out.flatten(1, 2)


class GlobalMean(nn.Module):
    """Mean over all positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[-1]) if x.dim() == 3 else x.mean(dim=[-2, -1])


class View(nn.Module):
    """Flatten by view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous().view(x.size(0), -1)


class Interpolate(nn.Module):
    """F.interpolate to a fixed size."""

    def __init__(self, size: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.size, self.mode = size, mode

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=self.size, mode=self.mode)


# ------------------------------------------------------------------------------------------------ single layers


def activation(draw: Draw, channels: int) -> tuple[nn.Module, str]:
    """An activation with its name; ReLU is the likeliest."""
    inplace = draw.chance(0.4)
    choices: dict[str, Callable[[], nn.Module]] = {
        "relu": lambda: nn.ReLU(inplace),
        "relu6": lambda: nn.ReLU6(inplace),
        "leaky_relu": lambda: nn.LeakyReLU(0.1, inplace),
        "elu": lambda: nn.ELU(1.0, inplace),
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU("tanh"),
        "silu": lambda: nn.SiLU(inplace),
        "hardswish": lambda: nn.Hardswish(inplace),
        "hardsigmoid": lambda: nn.Hardsigmoid(inplace),
        "sigmoid": nn.Sigmoid,
        "tanh": nn.Tanh,
        "softplus": nn.Softplus,
        "mish": lambda: nn.Mish(inplace),
        "prelu": nn.PReLU,
        "prelu_channels": lambda: nn.PReLU(channels),
        "none": nn.Identity,
    }
    name = draw.pick("relu", "relu", "relu", "relu", *choices)
    return choices[name](), name


def norm(draw: Draw, kit: Kit, channels: int) -> tuple[nn.Module, str]:
    """A normalisation with its name; batch norm is the likeliest."""
    groups = draw.pick(*(g for g in (2, 4, channels) if channels % g == 0)) if channels % 2 == 0 else 1
    choices: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: kit.batch(channels),
        "group": lambda: nn.GroupNorm(groups, channels),
        "layer": lambda: nn.GroupNorm(1, channels),
        "instance": lambda: kit.instance(channels, affine=draw.chance(0.5)),
        "no-norm": nn.Identity,
    }
    name = draw.pick("batch", "batch", "batch", "batch", *choices)
    return choices[name](), name


def convolution(draw: Draw, kit: Kit, inside: int, outside: int, stride: int, bias: bool) -> tuple[nn.Module, str]:
    """A convolution with its description. With stride 1 the size is kept two times in three, otherwise it may shrink or grow."""
    kernel = tuple(draw.pick(1, 3, 3, 3, 5) for _ in range(kit.rank)) if draw.chance(0.2) else (draw.pick(1, 3, 3, 3, 5),) * kit.rank
    dilation = draw.pick(1, 1, 1, 1, 2)
    shared = [g for g in range(2, inside + 1) if inside % g == 0 and outside % g == 0]
    groups = draw.pick(1, 1, 1, *shared[:2], shared[-1]) if shared else 1
    same = tuple(dilation * (k - 1) // 2 for k in kernel)
    padding = same if draw.chance(0.7) else tuple(draw.integer(0, p + 1) for p in same)
    mode = draw.pick(*["zeros"] * 9, "reflect", "replicate", "circular")
    border = f"pad {padding}" if mode == "zeros" else f"pad {padding} {mode}"
    text = f"conv{'x'.join(map(str, kernel))}({inside}->{outside}, /{stride}, {border}, g{groups}, d{dilation})"
    return kit.conv(inside, outside, kernel, stride, padding, dilation, groups, bias, mode), text


def unit(draw: Draw, kit: Kit, inside: int, outside: int, stride: int = 1, active: bool = True) -> tuple[nn.Sequential, str]:
    """Convolution, normalisation, activation (unless `active` is false), in this order or, one time in five, norm and activation first."""
    before = draw.chance(0.2)
    layer, name = norm(draw, kit, inside if before else outside)
    conv, text = convolution(draw, kit, inside, outside, stride, bias=before or name == "no-norm" or draw.chance(0.2))
    act, act_name = activation(draw, inside if before else outside)
    if before:
        if hasattr(act, "inplace"):
            act.inplace = False  # without a norm it would write into a value that a shortcut still reads
        return nn.Sequential(layer, act, conv), f"{name} {act_name} {text}"
    return nn.Sequential(conv, layer, act if active else nn.Identity()), f"{text} {name}{' ' + act_name if active else ''}"


def pool(draw: Draw, kit: Kit, size: Sequence[int]) -> tuple[nn.Module, str]:
    """Max, average or adaptive pooling."""
    kernel, ceil = draw.pick(2, 2, 3), draw.chance(0.3)
    padding = draw.integer(0, 1) if kernel == 3 else 0
    kind = draw.pick("max", "max", "avg", "avg", "adaptive_avg", "adaptive_max")
    stride = draw.pick(2, 2, 2, 1, 3)
    options = f"{kernel}/{stride} pad {padding}{' ceil' if ceil else ''}"
    if kind == "max":
        return kit.max_pool(kernel, stride, padding, ceil_mode=ceil), f"maxpool{options}"
    if kind == "avg":
        count = draw.chance(0.5)
        return kit.avg_pool(kernel, stride, padding, ceil, count), f"avgpool{options}{' counted' if count else ''}"
    target = tuple(draw.integer(max(1, s // 3), s) for s in size)
    if draw.chance(0.5):  # half of them divide evenly
        target = tuple(max(d for d in range(1, t + 1) if s % d == 0) for s, t in zip(size, target, strict=True))
    factory = kit.adaptive_avg if kind == "adaptive_avg" else kit.adaptive_max
    return factory(target if kit.rank == 2 else target[0]), f"{kind} to {target}"


def upsample(draw: Draw, kit: Kit, channels: int, size: Sequence[int]) -> tuple[nn.Module, str]:
    """Nearest, linear or transposed convolution, to about twice the size."""
    kind = draw.pick("nearest", "smooth", "corners", "transposed", "size")
    if kind == "transposed":
        kernel, padding, extra = draw.pick((2, 0, 0), (4, 1, 0), (3, 1, 1))
        return kit.transposed(channels, channels, kernel, 2, padding, extra), f"transposed{kernel}/2"
    if kind == "size":
        return Interpolate(tuple(s + draw.integer(1, s) for s in size), draw.pick("nearest", kit.smooth)), "interpolate to a size"
    if kind == "nearest":
        return nn.Upsample(scale_factor=2), "upsample nearest"
    return nn.Upsample(scale_factor=2, mode=kit.smooth, align_corners=kind == "corners"), f"upsample {kind}"


# ------------------------------------------------------------------------------------------------ blocks


def block(draw: Draw, kit: Kit, shape: tuple[int, ...]) -> tuple[nn.Module, str]:
    """One block for features of this shape (channels first, no batch axis)."""
    inside, size = shape[0], shape[1:]
    outside = draw.pick(inside, inside + 4, 2 * inside, 8, 12, 16, 24, 32, 48)
    rarer = ("bottleneck", "parallel", "parallel", "dense", "excite", "split", "pool", "dropout", "upsample")
    kind = draw.pick(*["plain"] * 4, *["residual"] * 4, *rarer)
    if kind == "plain":
        body, text = unit(draw, kit, inside, outside, draw.pick(1, 1, 2, 2, 3))
        return body, text
    if kind == "residual":
        stride = draw.pick(1, 1, 2)
        first, text1 = unit(draw, kit, inside, outside, stride)
        active = draw.chance(0.3)
        second, text2 = unit(draw, kit, outside, outside, active=active)
        body = nn.Sequential(first, second)
        straight = stride == 1 and outside == inside
        shortcut = nn.Identity() if straight else nn.Sequential(kit.conv(inside, outside, 1, stride, bias=False), kit.batch(outside))
        after, name = activation(draw, outside)
        inplace = not active and draw.chance(0.5)  # an activation's output is saved for its gradient and must not be overwritten
        return Residual(body, shortcut, after, inplace), f"residual[{text1}; {text2}]{'' if straight else ' projected'} then {name}"
    if kind == "bottleneck":
        hidden = inside * draw.pick(2, 3)
        act, name = activation(draw, hidden)
        twice, _ = activation(draw, hidden)
        middle = kit.conv(hidden, hidden, 3, 1, 1, groups=hidden, bias=False)
        body = nn.Sequential(kit.conv(inside, hidden, 1, bias=False), kit.batch(hidden), act, middle, kit.batch(hidden), twice)
        body.extend([kit.conv(hidden, inside, 1, bias=False), kit.batch(inside)])
        return Residual(body, nn.Identity(), nn.Identity(), False), f"inverted bottleneck x{hidden // inside} {name}"
    if kind == "parallel":
        parts = [unit(draw, kit, inside, draw.pick(4, 8, 12)) for _ in range(draw.integer(2, 3))]
        if draw.chance(0.4):
            parts.append((nn.Sequential(kit.max_pool(3, 1, 1)), "maxpool3/1"))
        return Parallel([p for p, _ in parts]), "parallel[" + " | ".join(t for _, t in parts) + "]"
    if kind == "dense":
        body, text = unit(draw, kit, inside, draw.pick(4, 8))
        return Dense(body), f"dense[{text}]"
    if kind == "excite":
        act, name = activation(draw, hidden := max(2, inside // 4))
        gate, gate_name = draw.pick((nn.Sigmoid(), "sigmoid"), (nn.Hardsigmoid(), "hardsigmoid"))
        linear = draw.chance(0.4)
        return Excite(kit, inside, hidden, act, gate, linear), f"excite {name} {gate_name}{' linear' if linear else ''}"
    if kind == "split":
        if inside % 2:
            raise Rejected("odd channels")
        body, text = unit(draw, kit, inside // 2, inside // 2)
        return Split(body), f"split[{text}]"
    if kind == "pool":
        return pool(draw, kit, size)
    if kind == "upsample":
        return upsample(draw, kit, inside, size)
    return (kit.dropout(0.3), "dropout") if draw.chance(0.5) else (nn.Dropout(0.1, inplace=True), "dropout in place")


def head(draw: Draw, kit: Kit, shape: tuple[int, ...], classes: int) -> tuple[nn.Sequential, str]:
    """From features to logits [N, classes]; the last parameterised layer is `out`."""
    channels, size = shape[0], shape[1:]
    cells = channels
    for s in size:
        cells *= s
    kinds = ["mean", "pooled", "max", "conv", "hidden", "small"] + (["flatten", "flatten", "view"] if cells <= 4096 else [])
    kind = draw.pick(*kinds)
    layers = nn.Sequential()
    if kind in ("flatten", "view"):
        layers.add_module("flatten", nn.Flatten() if kind == "flatten" else View())
        layers.add_module("out", nn.Linear(cells, classes))
    elif kind == "mean":
        layers.add_module("pool", GlobalMean())
        layers.add_module("out", nn.Linear(channels, classes))
    elif kind == "conv":
        layers.add_module("out", kit.conv(channels, classes, 1))
        layers.add_module("pool", kit.adaptive_avg(1))
        layers.add_module("flatten", nn.Flatten())
    else:
        to = draw.integer(2, 3) if kind == "small" else 1
        layers.add_module("pool", kit.adaptive_max(1) if kind == "max" else kit.adaptive_avg(to))
        layers.add_module("flatten", nn.Flatten(1))
        features = channels * to**kit.rank
        if kind == "hidden":
            act, _name = activation(draw, 24)
            layers.add_module("fc", nn.Linear(features, 24))
            layers.add_module("act", act)
            layers.add_module("drop", nn.Dropout(0.2))
            features = 24
        layers.add_module("out", nn.Linear(features, classes))
    return layers, f"{kind} head"
