"""How numbers are held between steps: forms of parameters and of an optimiser's moments, as pure functions that trace into standard operators.

All of them work on blocks, (blocks, width): rows of a parameter, or equal pieces of rows, so that no block mixes rows. Nothing wraps around at the
ends of an integer type, and nothing is rounded toward zero: to the nearest (ties to even), or up or down by chance such that the mean is right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgeadapt.exporters.codes import FINE, FLOOR, codes

HEADROOM = 2.0
"""How far beyond its row's largest magnitude at export a parameter may go; it stays there at the end of its range."""

_NOTHING = 1e-30
"""A block whose largest magnitude is below this is held as zeros: its values over that magnitude might not be numbers."""


@dataclass(frozen=True)
class ParameterForm(ABC):
    """Whole numbers of a unit that never changes: `unit` (blocks, 1) is set at export, so that what is not moved keeps its bits.

    Attributes:
        dtype: of what is stored.
        low, high: the ends of its range.
        counts: units that stand for a row's largest magnitude, times `HEADROOM`.
        by_chance: whether increments are rounded by chance.
        steps: units in one of the numbers of `coarse`.
    """

    dtype: torch.dtype
    low: int
    high: int
    counts: int
    by_chance: bool = False
    steps: float = 1.0

    @abstractmethod
    def value(self, stored: Tensor, unit: Tensor) -> Tensor:
        """What the model computes with."""

    @abstractmethod
    def coarse(self, stored: Tensor) -> Tensor:
        """The whole numbers that this is in, to the bit: value = coarse · (unit · steps)."""


class Whole(ParameterForm):
    """Every bit counts: value = unit · stored."""

    def value(self, stored: Tensor, unit: Tensor) -> Tensor:
        """The number itself."""
        return stored.to(unit.dtype) * unit

    def coarse(self, stored: Tensor) -> Tensor:
        """As they are stored."""
        return stored


class Split(ParameterForm):
    """16 bits, of which the model sees the upper 8, rounded: value = 256·unit · sat8((stored + 128) >> 8).

    The lower byte gathers steps that are too small to be seen yet (QAS of tiny-training, arXiv 2206.15472, with a fixed-point master).
    """

    def value(self, stored: Tensor, unit: Tensor) -> Tensor:
        """The number that the upper byte says."""
        return self._upper(stored, unit.dtype) * (unit * self.steps)

    def coarse(self, stored: Tensor) -> Tensor:
        """The upper byte, int8."""
        return self._upper(stored, torch.float32).to(torch.int8)

    @staticmethod
    def _upper(stored: Tensor, dtype: torch.dtype) -> Tensor:
        return (stored.to(dtype) * (1 / 256) + 0.5).floor().clamp(-128.0, 127.0)


PARAMETERS: dict[str, ParameterForm] = {
    "split16": Split(torch.int16, -32768, 32767, 127 * 256, steps=256.0),
    "whole16": Whole(torch.int16, -32768, 32767, 32767),
    "chance8": Whole(torch.int8, -128, 127, 127, by_chance=True),
}


def unit_of(form: ParameterForm, largest: Tensor) -> Tensor:
    """The unit for rows whose largest magnitudes are given."""
    return HEADROOM * largest / form.counts


def stored(form: ParameterForm, values: Tensor, unit: Tensor) -> Tensor:
    """The nearest whole numbers of units."""
    return _held(form, (values / unit).round())


def moved(form: ParameterForm, before: Tensor, increment: Tensor, noise: Tensor | None) -> Tensor:
    """What is stored after a step; a zero increment leaves it as it is, to the bit.

    Args:
        form: of a parameter.
        before: what is stored.
        increment: in units.
        noise: numbers from 0 to less than 1, where it is rounded by chance: up where the fraction is larger.
    """
    return _held(form, before.to(increment.dtype) + (increment.round() if noise is None else by_chance(increment, noise)))


def by_chance(values: Tensor, noise: Tensor) -> Tensor:
    """The whole number below each, or above it as often as its fraction says; a whole number stays."""
    below = values.floor()
    return below + (noise < values - below).to(values.dtype)


def _held(form: ParameterForm, numbers: Tensor) -> Tensor:
    """Whole numbers in the form's type; what is beyond an end stays at it. A cast alone would wrap around."""
    return numbers.clamp(float(form.low), float(form.high)).to(form.dtype)


class MomentForm(Protocol):
    """One code an element, one scale a block."""

    def tables(self) -> Mapping[str, Tensor]:
        """Constants that it needs, by name."""
        ...

    def values(self, codes: Tensor, scales: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """The numbers: (blocks, width) from codes (blocks, width) and scales (blocks, 1)."""
        ...

    def codes(self, values: Tensor, tables: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Codes and scales of the nearest numbers."""
        ...

    def gaps(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """From each code's number to the farther of its neighbours', for scales of 1."""
        ...


@dataclass(frozen=True)
class Dynamic:
    """A byte of `codes.codes` an element, times its block's largest magnitude.

    The scale has the sign of the element that it is of. So that element is code 1 itself: what was read and is stored again keeps its bits, also
    where the largest is negative, which the table alone holds to 0.993 only.
    """

    signed: bool

    def tables(self) -> Mapping[str, Tensor]:
        """What codes stand for, the numbers half-way, and the guesses. Without signs code 0 stands for `FLOOR`."""
        found = codes(self.signed)
        values = torch.from_numpy(found.values.copy())
        if not self.signed:
            values[0] = FLOOR
        return {"values": values, "middles": torch.from_numpy(found.middles), "guesses": torch.from_numpy(found.guesses)}

    def values(self, codes: Tensor, scales: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """The table's number times the scale."""
        return tables["values"].index_select(0, codes.to(torch.int32).flatten()).reshape(codes.shape) * scales

    def codes(self, values: Tensor, tables: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The nearest of the table, exactly."""
        scales = values.amax(1, keepdim=True)
        if self.signed:
            least = values.amin(1, keepdim=True)
            scales = torch.where(scales + least >= 0.0, scales, least)
        shares = (values / torch.where(scales.abs() >= _NOTHING, scales, torch.ones((), dtype=scales.dtype))).flatten()
        sizes = shares.abs() if self.signed else shares
        place = (sizes.sqrt().sqrt() * float(FINE)).to(torch.int32).clamp(0, FINE)  # also of what is not a number, or the lookup would fail
        guess = tables["guesses"].index_select(0, place)
        size = guess.to(values.dtype) + (sizes > tables["middles"].index_select(0, guess)).to(values.dtype)
        numbers = (127.0 + shares.sign() * size).clamp(0.0, 255.0) if self.signed else size
        return numbers.to(torch.uint8).reshape(values.shape), scales


    def gaps(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """Of the table."""
        between = tables["values"].diff()
        wider = torch.maximum(torch.cat([between[:1], between]), torch.cat([between, between[-1:]]))
        return wider[codes.long()]


MOMENTS: dict[str, MomentForm] = {"signed8": Dynamic(True), "squares8": Dynamic(False)}
