"""One small module per layer family, for checking gradients one by one.

Each is a sandwich: a parameterised layer, the layer under test, a flatten and a linear head of 5 classes, so that a wrong input gradient shows in
the parameters before it and a wrong output in those after it. The head weighs every position on its own: a gradient in the wrong place cannot average
out. Heights and widths differ, so that a transposed axis shows too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.calibrate import calibrate, noise, seeded
from tests.zoo.pieces import (
    CHANNELS,
    CLASSES,
    EVEN,
    IMAGE,
    SERIES,
    TOKENS,
    VECTOR,
    Apply,
    Attention,
    Bilinear,
    Concat,
    Gate,
    InplaceAdd,
    Residual,
    Sandwich,
    Scale,
    attention_by_hand,
    halves,
    patches,
    positive,
    self_attention,
    shuffle,
    unequal,
)
from tests.zoo.rarer import GROUPS as RARER

__all__ = ["CLASSES", "LAYERS", "example"]

c = CHANNELS
_Layer = Callable[[], nn.Module]


def _f(function: Callable[[Tensor], Tensor]) -> _Layer:
    return lambda: Apply(function)


_GROUPS: dict[str, tuple[tuple[int, ...], dict[str, _Layer]]] = {
    "conv2d": (
        IMAGE,
        {
            "plain": lambda: nn.Conv2d(c, 6, 3),
            "padded": lambda: nn.Conv2d(c, 6, 3, padding=1),
            "no_bias": lambda: nn.Conv2d(c, 6, 3, padding=1, bias=False),
            "pointwise": lambda: nn.Conv2d(c, 6, 1),
            "pointwise_strided": lambda: nn.Conv2d(c, 6, 1, stride=2),
            "over_padded": lambda: nn.Conv2d(c, 6, 3, padding=3),
            "pointwise_padded": lambda: nn.Conv2d(c, 6, 1, padding=1),
            "strided": lambda: nn.Conv2d(c, 6, 3, stride=2, padding=1),
            "strided_rest": lambda: nn.Conv2d(c, 6, 2, stride=3),
            "strided_unequal": lambda: nn.Conv2d(c, 6, (3, 5), stride=(2, 1), padding=(0, 2)),
            "patch": lambda: nn.Conv2d(c, 6, 3, stride=3),
            "large": lambda: nn.Conv2d(c, 6, 7, stride=2, padding=3),
            "dilated": lambda: nn.Conv2d(c, 6, 3, padding=2, dilation=2),
            "dilated_strided": lambda: nn.Conv2d(c, 6, 3, stride=2, padding=2, dilation=(2, 1)),
            "grouped": lambda: nn.Conv2d(c, 12, 3, padding=1, groups=4),
            "grouped_strided": lambda: nn.Conv2d(c, 4, 3, stride=2, padding=1, groups=2),
            "depthwise": lambda: nn.Conv2d(c, c, 3, padding=1, groups=c),
            "depthwise_strided": lambda: nn.Conv2d(c, c, 5, stride=2, padding=2, groups=c),
            "depthwise_multiplier": lambda: nn.Conv2d(c, 2 * c, 3, padding=1, groups=c),
            "depthwise_dilated": lambda: nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=c),
            "separable": lambda: nn.Sequential(nn.Conv2d(c, c, (1, 3), padding=(0, 1)), nn.Conv2d(c, 6, (3, 1))),
            "same": lambda: nn.Conv2d(c, 6, 3, padding="same"),
            "same_even_kernel": lambda: nn.Conv2d(c, 6, (4, 2), padding="same"),
            "same_dilated": lambda: nn.Conv2d(c, 6, 3, padding="same", dilation=2),
            "valid": lambda: nn.Conv2d(c, 6, 3, padding="valid"),
            "asymmetric_pad": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(c, 6, 3, stride=2)),
            "crop_pad": lambda: nn.Sequential(nn.ZeroPad2d((-1, 1, 0, -2)), nn.Conv2d(c, 6, 3)),
            "reflect": lambda: nn.Conv2d(c, 6, 3, padding=1, padding_mode="reflect"),
            "replicate": lambda: nn.Conv2d(c, 6, 3, padding=(2, 1), padding_mode="replicate"),
            "circular": lambda: nn.Conv2d(c, 6, 3, padding=1, padding_mode="circular"),
            "constant_pad": lambda: nn.Sequential(nn.ConstantPad2d((1, 0, 0, 2), 0.5), nn.Conv2d(c, 6, 3)),
            "shared": lambda: nn.Sequential(*[nn.Conv2d(c, c, 3, padding=1)] * 2),
        },
    ),
    "conv1d": (
        SERIES,
        {
            "plain": lambda: nn.Conv1d(c, 6, 3),
            "padded": lambda: nn.Conv1d(c, 6, 5, padding=2),
            "pointwise": lambda: nn.Conv1d(c, 6, 1),
            "strided": lambda: nn.Conv1d(c, 6, 4, stride=2, padding=1),
            "dilated": lambda: nn.Conv1d(c, 6, 3, padding=4, dilation=4),
            "grouped": lambda: nn.Conv1d(c, 12, 3, padding=1, groups=2),
            "depthwise": lambda: nn.Conv1d(c, c, 3, padding=1, groups=c),
            "causal": lambda: nn.Sequential(nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(c, 6, 3, dilation=2)),
            "same": lambda: nn.Conv1d(c, 6, 4, padding="same"),
            "reflect": lambda: nn.Conv1d(c, 6, 3, padding=1, padding_mode="reflect"),
            "replicate": lambda: nn.Conv1d(c, 6, 3, padding=1, padding_mode="replicate"),
            "circular": lambda: nn.Conv1d(c, 6, 3, padding=1, padding_mode="circular"),
        },
    ),
    "conv_transpose2d": (
        IMAGE,
        {
            "plain": lambda: nn.ConvTranspose2d(c, 6, 3),
            "padded": lambda: nn.ConvTranspose2d(c, 6, 3, padding=1),
            "strided": lambda: nn.ConvTranspose2d(c, 6, 2, stride=2),
            "overlapping": lambda: nn.ConvTranspose2d(c, 6, 4, stride=2, padding=1, bias=False),
            "output_padding": lambda: nn.ConvTranspose2d(c, 6, 3, stride=2, padding=1, output_padding=(1, 0)),
            "grouped": lambda: nn.ConvTranspose2d(c, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            "depthwise": lambda: nn.ConvTranspose2d(c, c, 4, stride=2, padding=1, groups=c),
            "dilated": lambda: nn.ConvTranspose2d(c, 6, 3, stride=2, padding=2, dilation=2),
        },
    ),
    "conv_transpose1d": (
        SERIES,
        {
            "strided": lambda: nn.ConvTranspose1d(c, 6, 4, stride=2, padding=1),
            "output_padding": lambda: nn.ConvTranspose1d(c, 6, 3, stride=3, padding=1, output_padding=2, groups=2),
        },
    ),
    "linear": (VECTOR, {"plain": lambda: nn.Linear(c, 6), "no_bias": lambda: nn.Linear(c, 6, bias=False), "dropout": lambda: nn.Dropout(0.5)}),
    "linear3d": (TOKENS, {"plain": lambda: nn.Linear(c, 6), "no_bias": lambda: nn.Linear(c, 6, bias=False)}),
    "norm2d": (
        IMAGE,
        {
            "batch": lambda: nn.BatchNorm2d(c),
            "batch_plain": lambda: nn.BatchNorm2d(c, affine=False),
            "batch_eps": lambda: nn.BatchNorm2d(c, eps=1e-2, momentum=0.3),
            "batch_conv": lambda: nn.Sequential(nn.Conv2d(c, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            "group": lambda: nn.GroupNorm(4, c),
            "group_plain": lambda: nn.GroupNorm(2, c, affine=False),
            "group_one": lambda: nn.GroupNorm(1, c),
            "group_each": lambda: nn.GroupNorm(c, c),
            "layer": lambda: nn.LayerNorm((c, 9, 7)),
            "layer_last": lambda: nn.LayerNorm(7),
            "instance": lambda: nn.InstanceNorm2d(c),
            "instance_affine": lambda: nn.InstanceNorm2d(c, affine=True),
            "instance_tracked": lambda: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
            "channels_last": _f(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (c,)).permute(0, 3, 1, 2)),
            "local_response": lambda: nn.LocalResponseNorm(3),
            "unit_length": _f(lambda x: F.normalize(x, dim=1)),
        },
    ),
    "norm1d": (
        SERIES,
        {
            "batch": lambda: nn.BatchNorm1d(c),
            "group": lambda: nn.GroupNorm(2, c),
            "instance": lambda: nn.InstanceNorm1d(c, affine=True),
        },
    ),
    "norm_vector": (VECTOR, {"batch": lambda: nn.BatchNorm1d(c), "layer": lambda: nn.LayerNorm(c)}),
    "norm_tokens": (
        TOKENS,
        {
            "layer": lambda: nn.LayerNorm(c),
            "layer_plain": lambda: nn.LayerNorm(c, elementwise_affine=False),
            "layer_no_bias": lambda: nn.LayerNorm(c, bias=False),
            "layer_two_axes": lambda: nn.LayerNorm((6, c)),
            "rms": lambda: nn.RMSNorm(c),
        },
    ),
    "activation": (
        IMAGE,
        {
            "relu": nn.ReLU,
            "relu_inplace": lambda: nn.ReLU(inplace=True),
            "relu6": nn.ReLU6,
            "relu6_inplace": lambda: nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU6(inplace=True)),
            "leaky_relu": lambda: nn.LeakyReLU(0.1),
            "leaky_relu_inplace": lambda: nn.LeakyReLU(0.2, inplace=True),
            "elu": nn.ELU,
            "elu_inplace": lambda: nn.ELU(0.5, inplace=True),
            "selu": nn.SELU,
            "celu": lambda: nn.CELU(0.7),
            "gelu": nn.GELU,
            "gelu_tanh": lambda: nn.GELU("tanh"),
            "silu": nn.SiLU,
            "silu_inplace": lambda: nn.SiLU(inplace=True),
            "hardswish": nn.Hardswish,
            "hardswish_inplace": lambda: nn.Hardswish(inplace=True),
            "hardsigmoid": nn.Hardsigmoid,
            "hardsigmoid_inplace": lambda: nn.Hardsigmoid(inplace=True),
            "hardtanh": lambda: nn.Hardtanh(-0.5, 0.8),
            "sigmoid": nn.Sigmoid,
            "log_sigmoid": nn.LogSigmoid,
            "tanh": nn.Tanh,
            "softplus": nn.Softplus,
            "softplus_beta": lambda: nn.Softplus(beta=2.0, threshold=3.0),
            "softsign": nn.Softsign,
            "mish": nn.Mish,
            "mish_inplace": lambda: nn.Mish(inplace=True),
            "prelu": nn.PReLU,
            "prelu_channels": lambda: nn.PReLU(c, init=0.1),
            "glu": lambda: nn.GLU(dim=1),
            "softmax": lambda: nn.Softmax(dim=1),
            "log_softmax": lambda: nn.LogSoftmax(dim=-1),
            "threshold": lambda: nn.Threshold(0.1, -0.2),
            "softshrink": lambda: nn.Softshrink(0.2),
            "hardshrink": lambda: nn.Hardshrink(0.2),
        },
    ),
    "max_pool": (
        IMAGE,
        {
            "plain": lambda: nn.MaxPool2d(2),
            "overlapping": lambda: nn.MaxPool2d(3, 2),
            "padded": lambda: nn.MaxPool2d(3, 2, 1),
            "stride_one": lambda: nn.MaxPool2d(3, 1, 1),
            "unequal": lambda: nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
            "dilated": lambda: nn.MaxPool2d(2, 2, 1, dilation=2),
            "ceil": lambda: nn.MaxPool2d(2, ceil_mode=True),
            "ceil_padded": lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            "gapped": lambda: nn.MaxPool2d(2, 3),
            "global": lambda: nn.AdaptiveMaxPool2d(1),
            "after_relu": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2)),
        },
    ),
    "max_pool1d": (SERIES, {"plain": lambda: nn.MaxPool1d(2), "padded_ceil": lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True)}),
    "avg_pool": (
        IMAGE,
        {
            "plain": lambda: nn.AvgPool2d(2),
            "overlapping": lambda: nn.AvgPool2d(3, 2),
            "padded": lambda: nn.AvgPool2d(3, 2, 1),
            "padded_not_counted": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            "stride_one": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
            "ceil": lambda: nn.AvgPool2d(2, ceil_mode=True),
            "ceil_padded": lambda: nn.AvgPool2d((4, 3), 2, 1, ceil_mode=True),
            "ceil_not_counted": lambda: nn.AvgPool2d((4, 3), 2, 1, ceil_mode=True, count_include_pad=False),
            "divisor": lambda: nn.AvgPool2d(3, divisor_override=5),
            "global": lambda: nn.AdaptiveAvgPool2d(1),
            "lp": lambda: nn.Sequential(nn.Sigmoid(), nn.LPPool2d(2, 2)),
        },
    ),
    "avg_pool1d": (SERIES, {"plain": lambda: nn.AvgPool1d(3, 2, 1), "not_counted_ceil": lambda: nn.AvgPool1d(3, 2, 1, True, False)}),
    "adaptive_pool": (
        IMAGE,
        {
            "avg": lambda: nn.AdaptiveAvgPool2d((3, 7)),
            "avg_uneven": lambda: nn.AdaptiveAvgPool2d((4, 3)),
            "avg_kept_axis": lambda: nn.AdaptiveAvgPool2d((None, 1)),
            "avg_larger": lambda: nn.AdaptiveAvgPool2d((12, 9)),
            "max": lambda: nn.AdaptiveMaxPool2d((3, 1)),
            "max_uneven": lambda: nn.AdaptiveMaxPool2d((4, 3)),
        },
    ),
    "adaptive_pool1d": (
        SERIES,
        {
            "avg_one": lambda: nn.AdaptiveAvgPool1d(1),
            "avg_uneven": lambda: nn.AdaptiveAvgPool1d(5),
            "max_one": lambda: nn.AdaptiveMaxPool1d(1),
            "max_uneven": lambda: nn.AdaptiveMaxPool1d(5),
        },
    ),
    "combine": (
        IMAGE,
        {
            "residual": lambda: Residual(nn.Conv2d(c, c, 3, padding=1)),
            "residual_inplace": lambda: InplaceAdd(nn.Conv2d(c, c, 3, padding=1)),
            "inplace_after_residual": lambda: nn.Sequential(Residual(nn.Conv2d(c, c, 3, padding=1)), nn.ReLU(inplace=True)),
            "gate": Gate,
            "scale": Scale,
            "concat": lambda: Concat(1),
            "concat_width": lambda: Concat(-1),
            "chunk": _f(halves),
            "split": _f(unequal),
            "stack": _f(lambda x: torch.stack([x, x.sigmoid()], dim=2)),
            "maximum": _f(lambda x: torch.maximum(x, x.flip(1))),
            "minimum": _f(lambda x: torch.minimum(x, 0.3 - x)),
            "add_alpha": _f(lambda x: torch.add(x, x.tanh(), alpha=0.5)),
            "constant": _f(lambda x: (2.0 - x) * 1.5 + 3 / (4 + x.tanh())),
            "divide": _f(lambda x: x / (1 + x.abs().sum(1, keepdim=True))),
        },
    ),
    "shape": (
        EVEN,
        {
            "slice": _f(lambda x: x[:, 2:7, 1:, :-1]),
            "strided_slice": _f(lambda x: x[:, :, ::3, ::2]),
            "negative_slice": _f(lambda x: x[:, -3:, -5:-1]),
            "select": _f(lambda x: x[:, :, 2] + x[:, :, -1]),
            "narrow": _f(lambda x: x.narrow(1, 3, 4)),
            "space_to_depth": _f(patches),
            "pad": _f(lambda x: F.pad(x, (1, 2, 0, 3, 1, 1))),
            "flip": _f(lambda x: x.flip(-1) * x),
            "roll": _f(lambda x: torch.roll(x, (1, -2), (2, 3)) * x),
            "flatten": _f(lambda x: x.flatten(2).tanh()),
            "view": _f(lambda x: x.view(x.size(0), 4, 2, -1).sigmoid()),
            "permute": _f(lambda x: x.permute(0, 2, 3, 1).softmax(-1)),
            "transpose": _f(lambda x: x.transpose(1, 2).contiguous().tanh()),
            "unflatten": _f(lambda x: x.unflatten(1, (2, 4)).mean(2)),
            "squeeze": _f(lambda x: x.mean(2, keepdim=True).squeeze(2).unsqueeze(1)),
            "expand": _f(lambda x: x[:, :1].expand(-1, 3, -1, -1) * x[:, 2:5]),
            "repeat": _f(lambda x: x[:, :3].repeat(1, 2, 1, 1) * x[:, 2:]),
            "tile_interleave": _f(lambda x: x[:, :, :2].repeat_interleave(2, dim=2)),
            "index_constant": _f(lambda x: x[:, [0, 3, 5, 3]]),
            "unbind": _f(lambda x: torch.cat([part * (k + 1.0) for k, part in enumerate(x.unbind(2))], dim=1)),
            "pixel_shuffle": lambda: nn.PixelShuffle(2),
            "pixel_unshuffle": lambda: nn.PixelUnshuffle(2),
            "channel_shuffle": _f(shuffle),
            "channel_shuffle_module": lambda: nn.ChannelShuffle(4),
            "unfold": lambda: nn.Unfold(3, padding=1, stride=2),
        },
    ),
    "upsample": (
        IMAGE,
        {
            "nearest_scale": lambda: nn.Upsample(scale_factor=2),
            "nearest_size": _f(lambda x: F.interpolate(x, size=(13, 11))),
            "nearest_smaller": _f(lambda x: F.interpolate(x, size=(4, 5))),
            "nearest_fraction": lambda: nn.Upsample(scale_factor=1.5),
            "nearest_exact": _f(lambda x: F.interpolate(x, size=(12, 5), mode="nearest-exact")),
            "bilinear_scale": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
            "bilinear_size": _f(lambda x: F.interpolate(x, size=(13, 11), mode="bilinear")),
            "bilinear_smaller": _f(lambda x: F.interpolate(x, size=(4, 5), mode="bilinear")),
            "bilinear_corners_scale": lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            "bilinear_corners_size": _f(lambda x: F.interpolate(x, size=(13, 11), mode="bilinear", align_corners=True)),
            "bicubic": _f(lambda x: F.interpolate(x, size=(13, 11), mode="bicubic")),
        },
    ),
    "upsample1d": (
        SERIES,
        {
            "nearest": lambda: nn.Upsample(scale_factor=2),
            "linear": lambda: nn.Upsample(scale_factor=2, mode="linear"),
            "linear_corners": lambda: nn.Upsample(size=20, mode="linear", align_corners=True),
        },
    ),
    "attention": (
        TOKENS,
        {
            "multihead": Attention,
            "multihead_no_bias": lambda: Attention(bias=False),
            "scaled_dot_product": _f(self_attention),
            "scaled_dot_product_causal": _f(lambda x: self_attention(x, causal=True)),
            "scaled_dot_product_scale": _f(lambda x: self_attention(x, scale=0.3)),
            "by_hand": _f(attention_by_hand),
            "softmax": _f(lambda x: torch.softmax(x, dim=1)),
            "encoder_layer": lambda: nn.TransformerEncoderLayer(c, 2, 12, batch_first=True, norm_first=True),
        },
    ),
    "product": (
        TOKENS,
        {
            "einsum": lambda: Bilinear(lambda x, w: torch.einsum("btc,cd->btd", x, w)),
            "einsum_pair": _f(lambda x: torch.einsum("btc,bsc->bts", x, x.tanh())),
            "matmul": lambda: Bilinear(torch.matmul),
            "matmul_pair": _f(lambda x: x.transpose(1, 2) @ x),
            "bmm": _f(lambda x: torch.bmm(x, x.transpose(1, 2))),
            "matrix_left": lambda: Bilinear(lambda x, w: w @ x.transpose(1, 2)),
            "outer": _f(lambda x: x[:, 0, :, None] * x[:, 1, None, :]),
        },
    ),
    "reduce": (
        IMAGE,
        {
            "mean": _f(lambda x: x.mean((2, 3))),
            "mean_keep": _f(lambda x: x - x.mean((1, 2), keepdim=True)),
            "mean_one": _f(lambda x: x.mean(-1)),
            "sum": _f(lambda x: x.sum((2, 3)) * 0.1),
            "sum_one": _f(lambda x: x.sum(dim=1)),
            "amax": _f(lambda x: x.amax((2, 3))),
            "amin": _f(lambda x: x.amin(1)),
            "max_value": _f(lambda x: x.max(dim=-1).values),
            "min_value": _f(lambda x: x.min(dim=1).values),
            "std": _f(lambda x: x.std((2, 3))),
            "var": _f(lambda x: x.var(1, unbiased=False)),
            "norm": _f(lambda x: x.norm(dim=1)),
            "logsumexp": _f(lambda x: x.logsumexp(1)),
            "cumsum": _f(lambda x: x.cumsum(2) * 0.2),
            "prod": _f(lambda x: (1 + 0.1 * x).prod(2)),
        },
    ),
    "pointwise": (
        IMAGE,
        {
            "clamp": _f(lambda x: x.clamp(-0.4, 0.6)),
            "clamp_min": _f(lambda x: x.clamp(min=-0.1)),
            "clamp_max": _f(lambda x: x.clamp(max=0.2)),
            "pow": _f(lambda x: positive(x) ** 1.7),
            "square": _f(lambda x: x.pow(2) + x.square()),
            "cube": _f(lambda x: x**3),
            "sqrt": _f(lambda x: positive(x).sqrt()),
            "rsqrt": _f(lambda x: positive(x).rsqrt()),
            "reciprocal": _f(lambda x: positive(x).reciprocal()),
            "exp": _f(lambda x: (0.5 * x).exp()),
            "exp2": _f(torch.exp2),
            "expm1": _f(lambda x: torch.expm1(0.5 * x)),
            "log": _f(lambda x: positive(x).log()),
            "log1p": _f(lambda x: torch.log1p(x * x)),
            "log2": _f(lambda x: positive(x).log2()),
            "abs": _f(lambda x: x.abs()),
            "neg": _f(lambda x: -x * x),
            "sign": _f(lambda x: x * torch.sign(x.detach() - 0.1)),
            "detach": _f(lambda x: x * x.sigmoid().detach()),
            "floor": _f(lambda x: x - torch.floor(x)),
            "round": _f(lambda x: x * torch.round(x)),
            "sin": _f(lambda x: x.sin() + (2 * x).cos()),
            "atan": _f(lambda x: x.atan()),
            "erf": _f(lambda x: x.erf()),
            "where": _f(lambda x: torch.where(x > 0.1, x, 0.3 * x)),
            "where_le": _f(lambda x: torch.where((x <= 0.2) & (x >= -0.5), x.sin(), 0.0)),
            "mask": _f(lambda x: x * (x > 0).float()),
            "masked_fill": _f(lambda x: x.masked_fill(x < -0.3, -1.0)),
            "lerp": _f(lambda x: torch.lerp(x, x.tanh(), 0.3)),
            "addcmul": _f(lambda x: torch.addcmul(x, x, x.sigmoid(), value=0.5)),
            "hardsigmoid_gate": _f(lambda x: x * F.hardsigmoid(x)),
            "double": _f(lambda x: x.double().tanh().float()),
        },
    ),
}


def _factory(layer: _Layer, shape: tuple[int, ...]) -> Callable[[], nn.Module]:
    @seeded
    def build() -> nn.Module:
        with warnings.catch_warnings():  # torch remarks once a process that an uneven 'same' padding costs a copy
            warnings.filterwarnings("ignore", message="Using padding='same'")
            return calibrate(Sandwich(layer(), shape), shape)

    return build


LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    f"{group}.{name}": (_factory(layer, shape), shape) for group, (shape, layers) in {**_GROUPS, **RARER}.items() for name, layer in layers.items()
}
"""Every layer under test, "family.variant": a factory of its sandwich (keyword `seed`, logits [N, 5], eval mode), and one input's shape."""


def example(name: str, batch: int = 2, seed: int = 1) -> tuple[nn.Module, Tensor]:
    """The module of this name and a batch of inputs for it."""
    factory, shape = LAYERS[name]
    return factory(), noise((batch, *shape), seed)
