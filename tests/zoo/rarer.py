"""Layers whose operators models seldom use, or use with rarer arguments: the layer table's second half."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.pieces import CHANNELS, EVEN, IMAGE, SERIES, VECTOR, Apply

c = CHANNELS


def _f(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Apply(function)


def _assigned(mask: Callable[[Tensor], Tensor], value: float) -> Callable[[], nn.Module]:
    def assign(x: Tensor) -> Tensor:
        y = 1.5 * x
        y[mask(x)] = value
        return y

    return _f(assign)


def _second_masked(x: Tensor) -> Tensor:
    y = 1.5 * x
    y[:, x[0, :, 0, 0] < 0] = torch.linspace(-1.0, 1.0, 7)
    return y


def _repeated(x: Tensor) -> Tensor:
    return torch.tensor([0, 3, 3, 3, 1, 0, 2, 1]).expand(x.shape[0], -1)


def _unpooled(x: Tensor) -> Tensor:
    y, places = F.max_pool2d(x[:, :, :8, :6], 2, 2, return_indices=True)
    return F.max_unpool2d(y * y, places, 2, 2)


GROUPS: dict[str, tuple[tuple[int, ...], dict[str, Callable[[], nn.Module]]]] = {
    "indexing": (
        IMAGE,
        {
            "mask_zero": _assigned(lambda x: x < 0, 0.0),
            "mask_leading": _assigned(lambda x: x.mean(3) < 0, 0.5),
            "mask_second": _f(_second_masked),
            "mask_added": _f(lambda x: (1.5 * x).index_put((x > 0,), torch.tensor(0.25), accumulate=True) * x),
            "top": _f(lambda x: x.topk(3, dim=2).values),
            "sorted": _f(lambda x: x.sort(dim=1, descending=True).values),
            "unpooled": _f(_unpooled),
            "argmax_all": _f(lambda x: x * (1 + x[:1].argmax() % 5)),
            "argmax_kept": _f(lambda x: x * (1 + x.argmax(1, keepdim=True))),
            "argmin": _f(lambda x: x * x.argmin(2, keepdim=True)),
        },
    ),
    "gathering": (
        VECTOR,
        {
            "gather_repeated": _f(lambda x: x.gather(1, _repeated(x))),
            "scatter": _f(lambda x: (x * 0).scatter(1, torch.tensor([[5, 0, 3, 1, 4, 2, 7, 6]]).expand(x.shape[0], -1), x) + 0.1 * x),
            "scatter_add": _f(lambda x: torch.ones(x.shape[0], 4).scatter_add(1, _repeated(x), x)),
        },
    ),
    "promotion": (
        IMAGE,
        {
            "where_integer_float": _f(lambda x: x * torch.where(x > 0, torch.ones_like(x, dtype=torch.long), torch.full_like(x, 0.5))),
            "where_integer_scalar": _f(lambda x: x * torch.where(x > 0, torch.ones_like(x, dtype=torch.long), torch.tensor([0.5]))),
            "where_bool": _f(lambda x: x * (1 + torch.where(x > 0, x > 1, x < -1).float())),
            "bool_integer": _f(lambda x: x * ((x > 0) * 2 + 1)),
            "bool_sum": _f(lambda x: x * ((x > 0) + (x < -0.5))),
            "bool_product": _f(lambda x: x * ((x > -0.5) * (x < 0.5))),
            "bool_cumsum": _f(lambda x: x * (x > 0).cumsum(2)),
            "bool_order": _f(lambda x: x * ((x > 0) <= (x > 1))),
            "integer_mean": _f(lambda x: x * (3 * x).long().mean(1, keepdim=True, dtype=torch.float32)),
            "integer_sum": _f(lambda x: x * (3 * x).detach().sum(1, keepdim=True, dtype=torch.long)),
            "integer_prod": _f(lambda x: x * (2 + x).detach().prod(2, keepdim=True, dtype=torch.long)),
            "integer_cumsum": _f(lambda x: x * (3 * x).detach().cumsum(1, dtype=torch.long)),
            "integer_bits": _f(lambda x: x * ((5 * x).int() & 3)),
            "integer_sqrt": _f(lambda x: x * (5 * x).int().abs().sqrt()),
        },
    ),
    "rounding": (
        IMAGE,
        {
            "trunc": _f(lambda x: x * torch.div(x, 0.3, rounding_mode="trunc")),
            "floor": _f(lambda x: x * torch.div(x, -0.3, rounding_mode="floor")),
            "floor_by_tensor": _f(lambda x: x * torch.div(x, x.flip(1) + 0.05, rounding_mode="floor").clamp(-9, 9)),
            "floor_integer": _f(lambda x: x * (((10 * x).long() - 5) // 3)),
            "floor_integer_negative": _f(lambda x: x * ((10 * x).long() // -3)),
            "trunc_integer": _f(lambda x: x * torch.div((10 * x).long(), -3, rounding_mode="trunc")),
            "remainder": _f(lambda x: x * (x % 0.7)),
            "remainder_negative": _f(lambda x: x * (x % -0.7)),
            "remainder_integer": _f(lambda x: x * ((10 * x).long() % 3)),
            "fmod": _f(lambda x: x * torch.fmod(x, 0.7)),
            "decimals": _f(lambda x: x * x.round(decimals=1)),
            "decimals_negative": _f(lambda x: x * (40 * x).round(decimals=-1)),
            "toward_zero": _f(lambda x: x * (2 * x).trunc()),
        },
    ),
    "rarer": (
        IMAGE,
        {
            "expm1_large": _f(lambda x: torch.expm1(15 * x.tanh() + 15) * 1e-12),
            "clamp_tensors": _f(lambda x: x.clamp(torch.linspace(-1, 0, 7), x.mean(1, keepdim=True) + 0.3)),
            "clamp_one_tensor": _f(lambda x: torch.clamp(x, min=x.flip(1))),
            "isnan": _f(lambda x: torch.where(torch.isnan(x), torch.zeros_like(x), x * x)),
            "nan_to_num": _f(lambda x: torch.nan_to_num(x) * x),
            "norm_largest": _f(lambda x: x.norm(p=float("inf"), dim=1)),
            "norm_third": _f(lambda x: (x * x + 0.1).norm(p=3, dim=1)),
            "max_of_all": _f(lambda x: x * x.max() - x.min()),
            "hyperbolic": _f(lambda x: x.sinh() + x.cosh() + x.asinh() + (0.5 * x.tanh()).atanh()),
            "inverse_sine": _f(lambda x: (0.9 * x.tanh()).asin() * (0.8 * x.tanh()).acos()),
            "log10": _f(lambda x: (x * x + 0.1).log10()),
            "larger_output": lambda: nn.ConvTranspose2d(c, 6, 3, stride=2, dilation=3, padding=1, output_padding=2),
            "larger_output_cropped": lambda: nn.ConvTranspose2d(c, 6, 2, stride=1, dilation=(3, 2), padding=3, output_padding=(2, 1), bias=False),
        },
    ),
    "upsample_scaled": (
        EVEN,
        {
            "nearest": _f(lambda x: F.interpolate(x, scale_factor=2.1)),
            "nearest_exact": _f(lambda x: F.interpolate(x, scale_factor=2.1, mode="nearest-exact")),
            "nearest_exact_whole": _f(lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest-exact")),
            "bilinear": _f(lambda x: F.interpolate(x, scale_factor=2.1, mode="bilinear")),
            "smoothed": _f(lambda x: F.interpolate(x, size=(5, 3), mode="bilinear", antialias=True)),
            "trilinear": _f(lambda x: F.interpolate(x[:, None], size=(5, 9, 3), mode="trilinear")),
        },
    ),
    "upsample_scaled1d": (SERIES, {"nearest_exact": _f(lambda x: F.interpolate(x, scale_factor=2.05, mode="nearest-exact"))}),
}
