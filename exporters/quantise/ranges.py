"""Grids of 256 values for tensors that were looked at, and int8 codes for weights: what is cut off at the ends is weighed against what is rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeadapt.exporters.quantise.operators import CODES, LEVELS, codes_of, values_of

KEPT, LEAST = 2**15, 128
"""Values of a tensor that are kept of one look, and of a channel at least."""
TAIL = 64
"""Largest and smallest values of a channel that are kept of one look besides: rare ones carry much of the signal, and a sample has few of them."""
SHRINKS = tuple(1.0 - 0.05 * step for step in range(15))
"""Shares of the range that are tried, at both ends alike."""
NUDGES = (0.7, 0.8, 0.9, 1.1, 1.25)
"""Shares of the best of these that are then tried at one end alone."""
TINY = 1e-12


@dataclass(frozen=True)
class Grid:
    """Where the values of a tensor are rounded to: real = (code − zero)·scale for codes 0..255. scale, zero: () or (C,), float32 and uint8."""

    scale: Tensor
    zero: Tensor

    @property
    def low(self) -> Tensor:
        """The real value of code 0."""
        return -self.zero.to(torch.float32) * self.scale

    @property
    def high(self) -> Tensor:
        """The real value of code 255."""
        return (CODES - self.zero.to(torch.float32)) * self.scale


def grid_between(low: Tensor, high: Tensor, least: float = TINY) -> Grid:
    """The finest grid that reaches from `low` to `high` and has zero among its values; steps are `least` at least, as for a range without extent."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / CODES).clamp(min=least)
    return Grid(scale, torch.round(-low / scale).clamp(0, CODES).to(torch.uint8))


class Looks:
    """Values of one tensor over several looks at it.

    Args:
        channels: whether every channel (axis 1) has a grid of its own.
    """

    def __init__(self, channels: bool) -> None:
        self.channels = channels
        self.count = 0
        self._rows: list[Tensor] = []
        self._tails: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor) -> None:
        """A look: x (N, C, …)."""
        rows = x.detach().transpose(0, 1).flatten(1) if self.channels else x.detach().reshape(1, -1)
        tail = min(TAIL if self.channels else TAIL * x.shape[1], rows.shape[1])
        self._tails.append((rows.topk(tail, 1, largest=False)[0], rows.topk(tail, 1)[0]))
        step = max(1, rows.shape[1] // max(LEAST, KEPT // len(rows)))
        self._rows.append(rows[:, step // 2 :: step].clone())
        self.count += rows.shape[1]

    def grid(self, low: float | None = None, high: float | None = None) -> Grid:
        """The grid of least square error, of those that cut off a share of either end of what was seen.

        low, high: ends that are known, as a ReLU's; these are not cut.
        """
        search = _Search(torch.cat(self._rows, 1), self._tails, self.count)
        first = search.low if low is None else torch.full_like(search.low, low)
        last = search.high if high is None else torch.full_like(search.high, high)
        search.look(first, last)
        for share in SHRINKS:
            search.look(first if low is not None else first * share, last if high is not None else last * share)
        for end, fixed in ((0, low), (1, high)):
            ends = search.low, search.high
            for share in NUDGES if fixed is None else ():
                search.look(ends[0] * share if end == 0 else ends[0], ends[1] * share if end == 1 else ends[1])
        found = grid_between(search.low, search.high)
        return found if self.channels else Grid(found.scale.reshape(()), found.zero.reshape(()))


class _Search:
    """The ends with the least square error so far, row by row.

    Args:
        rows: a sample of the values, (channels, values).
        tails: the smallest and the largest values of each look, (channels, some) each.
        count: how many values there were in a row.
    """

    def __init__(self, rows: Tensor, tails: list[tuple[Tensor, Tensor]], count: int) -> None:
        self.rows, self.tails, self.count = rows, tails, count
        self.low = torch.stack([small.amin(1) for small, _ in tails]).amin(0)
        self.high = torch.stack([large.amax(1) for _, large in tails]).amax(0)
        self.error = torch.full_like(self.low, torch.inf)

    def look(self, low: Tensor, high: Tensor) -> None:
        """Try ends, each (channels,)."""
        grid = grid_between(low, high)
        first, last = grid.low[:, None], grid.high[:, None]
        inside = torch.minimum(torch.maximum(self.rows, first), last).T
        error = (values_of(codes_of(inside, grid.scale, grid.zero), grid.scale, grid.zero) - inside).square().mean(0)
        for small, large in self.tails:
            cut = (first - small).clamp(min=0.0).square().sum(1) + (large - last).clamp(min=0.0).square().sum(1)
            full = large.shape[1] * len(self.tails) < self.count  # else the tails hold all there is
            more = (small[:, -1] < grid.low) | (large[:, -1] > grid.high) if full else torch.zeros_like(cut, dtype=torch.bool)
            error = error + torch.where(more, torch.inf, cut / self.count)
        better = error < self.error
        self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)
        self.error = torch.where(better, error, self.error)


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (C_out, …) as int8 codes of its shape and scales (C_out,): for each output channel those of least square error."""
    rows = weight.detach().flatten(1)
    most = rows.abs().amax(1).clamp(min=TINY)
    best, least = most / LEVELS, torch.full_like(most, torch.inf)
    for share in SHRINKS[:8]:
        scale = most * share / LEVELS
        error = (torch.round(rows / scale[:, None]).clamp(-LEVELS, LEVELS) * scale[:, None] - rows).square().mean(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    codes = torch.round(rows / best[:, None]).clamp(-LEVELS, LEVELS).to(torch.int8)
    return codes.reshape(weight.shape), best
