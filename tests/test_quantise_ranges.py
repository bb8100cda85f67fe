"""Grids for tensors that were looked at: what they hold, what they cut off, and what they cost against every other choice of ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgeadapt.exporters.quantise.operators import quantise
from edgeadapt.exporters.quantise.ranges import KEPT, Grid, Looks, grid_between, weight_codes
from tests.zoo.calibrate import noise

FEW, MANY = (4, 3, 8, 8), (16, 4, 32, 32)
"""A tensor whose values the looks keep all of, and one of which they keep a sample."""


def looked(*tensors: Tensor, channels: bool = False) -> Looks:
    looks = Looks(channels)
    for x in tensors:
        looks.add(x)
    return looks


def error(x: Tensor, grid: Grid) -> float:
    """Mean square of what rounding to a grid takes from x."""
    return float((quantise(x, grid.scale, grid.zero) - x).square().mean())


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (-0.3, 2.9), (0.0, 6.0), (0.7, 2.0), (-5.0, -0.5), (-4.0, 0.0), (0.0, 0.0), (-1e-9, 1e-9), (-3e8, 1e3)]
)
def test_a_grid_reaches_both_ends_and_holds_zero(low: float, high: float) -> None:
    grid = grid_between(torch.tensor([low, -1.0]), torch.tensor([high, 1.0]))
    assert (grid.scale.dtype, grid.zero.dtype, grid.scale.shape, grid.zero.shape) == (torch.float32, torch.uint8, (2,), (2,))
    scale, zero = grid.scale[0], grid.zero[0]
    assert float(scale) > 0
    assert float(grid.low[0]) <= min(low, 0.0) + 0.501 * float(scale)
    assert float(grid.high[0]) >= max(high, 0.0) - 0.501 * float(scale)
    assert float(grid.high[0] - grid.low[0]) == pytest.approx(max(high, 0.0) - min(low, 0.0), rel=1e-5, abs=1e-9)  # and no farther
    assert float(quantise(torch.zeros(1, 1), scale, zero)) == 0.0
    assert (int(zero) == 0) == (low >= 0.0)
    assert int(zero) == 255 or not high <= 0.0 or low == 0.0


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("shape", [FEW, MANY])
@pytest.mark.parametrize("offset", [0.0, 0.9, -3.0])
def test_what_is_spread_evenly_is_not_cut(channels: bool, shape: tuple[int, ...], offset: float) -> None:
    x = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1 + offset
    grid = looked(x, channels=channels).grid()
    assert (grid.scale.shape, grid.zero.shape) == (((shape[1],), (shape[1],)) if channels else ((), ()))
    assert torch.equal(quantise(x, grid.scale, grid.zero), quantise(x.clamp(x.min(), x.max()), grid.scale, grid.zero))
    assert float((quantise(x, grid.scale, grid.zero) - x).abs().max()) <= 1.1 * float(grid.scale.max())


@pytest.mark.parametrize("channels", [False, True])
def test_far_ends_are_cut_where_that_costs_less_than_coarse_steps(channels: bool) -> None:
    x = noise((64, 4, 32, 32)).sign() * -torch.rand((64, 4, 32, 32), generator=torch.Generator().manual_seed(1)).clamp(min=1e-7).log()
    grid = looked(x, channels=channels).grid()
    axes = [axis for axis in range(4) if axis != 1]
    low, high = (x.amin(axes), x.amax(axes)) if channels else (x.min(), x.max())
    assert bool((grid.high < 0.97 * high).all())
    assert error(x, grid) < 0.95 * error(x, grid_between(low, high))
    for share in (0.3, 0.5, 0.7, 0.9):
        assert error(x, grid) <= 1.02 * error(x, grid_between(share * low, share * high))


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rare_values_that_carry_the_signal_are_kept(channels: bool, sign: float) -> None:
    x = 0.01 * noise(MANY)
    for k in range(MANY[1]):
        x[k, k, 5, 7] = sign * 10.0  # one in 16384: a sample of the values holds none of them
    grid = looked(x, channels=channels).grid()
    got = quantise(x, grid.scale, grid.zero)
    assert float((got - x)[x.abs() > 1].abs().max()) < 0.05
    assert error(x, grid) < 1.05 * error(x, grid_between(x.min(), x.max()))


def test_a_value_is_kept_whichever_look_it_is_in() -> None:
    quiet, loud = 0.01 * noise(MANY), 0.01 * noise(MANY, 1)
    loud[0, 2] = 3 * noise(MANY[2:], 2)
    for order in ((quiet, loud), (loud, quiet)):
        grid = looked(*order, channels=True).grid()
        assert float(grid.high[2]) > 5.0
        assert float(grid.high[1]) < 0.1
        one = looked(*order).grid()
        assert float(one.high) > 5.0


@pytest.mark.parametrize("channels", [False, True])
def test_known_ends_are_kept(channels: bool) -> None:
    x = noise(MANY).clamp(0.0, 1.0) ** 8  # most of it near zero: without known ends the upper one would be cut
    high = 6.0
    grid = looked(x, channels=channels).grid(0.0, high)
    assert not grid.zero.any()
    torch.testing.assert_close(grid.high, torch.full_like(grid.high, high))
    both = looked(x, channels=channels).grid(-2.0, high)
    torch.testing.assert_close(both.low, torch.full_like(both.low, -2.0), atol=0.017, rtol=0.0)  # half a step
    free = looked(x, channels=channels).grid(0.0)
    assert not free.zero.any()
    assert float(free.high.max()) <= 1.0 + 1e-6


def test_constant_channels_have_a_grid_of_their_own() -> None:
    x = noise(FEW)
    x[:, 0], x[:, 1] = 0.0, 0.25
    grid = looked(x, channels=True).grid()
    got = quantise(x, grid.scale, grid.zero)
    assert torch.equal(got[:, 0], x[:, 0])
    torch.testing.assert_close(got[:, 1], x[:, 1], rtol=1e-6, atol=0.0)
    assert bool((grid.scale > 0).all())
    assert bool(grid.scale.isfinite().all())
    alone = looked(torch.zeros(FEW)).grid()
    assert torch.equal(quantise(torch.zeros(FEW), alone.scale, alone.zero), torch.zeros(FEW))
    constant = torch.full(FEW, -7.5)
    alone = looked(constant).grid()
    torch.testing.assert_close(quantise(constant, alone.scale, alone.zero), constant)


def test_channels_are_looked_at_apart() -> None:
    size = torch.tensor([1e-3, 1.0, 50.0]).reshape(1, 3, 1, 1)
    x = size * (2 * torch.rand(FEW, generator=torch.Generator().manual_seed(0)) - 1)
    grid = looked(x, channels=True).grid()
    assert float((grid.scale / (size.flatten() * 2 / 255)).sub(1).abs().max()) < 0.1
    one = looked(x).grid()
    assert torch.equal(quantise(x, one.scale, one.zero)[:, 0], torch.zeros(4, 8, 8))
    assert quantise(x, grid.scale, grid.zero)[:, 0].unique().numel() > 100


def test_looks_keep_no_more_than_they_say() -> None:
    looks = looked(noise((64, 4, 32, 32)))
    assert looks._rows[0].numel() <= 2 * KEPT
    assert looks.count == 64 * 4 * 32 * 32


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (8, 1, 5), (3, 7)])
def test_codes_of_weights_are_those_of_least_error_channel_by_channel(shape: tuple[int, ...]) -> None:
    weight = noise(shape) * torch.logspace(-3, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    weight[1] = 0.0
    codes, scale = weight_codes(weight)
    assert (codes.dtype, codes.shape, scale.shape) == (torch.int8, weight.shape, (shape[0],))
    assert int(codes.abs().amax()) <= 127
    assert bool((scale > 0).all())
    assert not codes[1].any()
    per = [1] * (len(shape) - 1)
    got = codes.float() * scale.reshape(-1, *per)
    step = weight.abs().flatten(1).amax(1) / 127
    plain = torch.round(weight / step.clamp(min=1e-12).reshape(-1, *per)) * step.reshape(-1, *per)
    for k in range(shape[0]):
        assert float((got[k] - weight[k]).square().sum()) <= 1.0001 * float((plain[k] - weight[k]).square().sum())


def test_a_lone_large_weight_is_cut_only_where_that_pays() -> None:
    weight = 0.02 * noise((2, 4096))
    weight[0, 0], weight[1, 0] = 0.12, 30.0
    codes, scale = weight_codes(weight)
    assert float(scale[0]) < 0.12 / 127 * 0.999  # a little is cut off one of 4096
    assert int(codes[0, 0]) == 127
    assert float(codes[1, 0] * scale[1]) == pytest.approx(30.0, rel=0.01)
