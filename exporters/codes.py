"""The 256 numbers that a byte of an optimiser's moment stands for, and the way back from a number to its byte, as lookups.

The numbers are those of dynamic block-wise quantisation (Dettmers et al., arXiv 2110.02861): decade 10^(i−6) for i = 0 … 6 is cut into 2^i cells of
equal width, or 2^(i+1) where nothing is negative, each stands for its centre; 0 and 1 besides. So numbers near the largest of a block are known to
1 %, and numbers a million times smaller are still told from nothing.

The nearest number is found without a search: the fourth root spreads the decades evenly, so that a table of its multiples of 1/`FINE` leaves two
neighbours to choose from, and one comparison with the number half-way between them does that exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

LEVELS = 7
FINE = 1024
"""Steps of the fourth root in the table of guesses; half of them would be too few."""

FLOOR = 1.6e-7
"""What a squared gradient's code 0 counts as, against its block's largest: just below what is rounded to 0: its root is a safe divisor."""


@dataclass(frozen=True)
class Codes:
    """One table.

    Attributes:
        values: float32 (256,), rising: what each code stands for.
        middles: float32, half-way between one magnitude (0 first) and the next larger one; the last is infinite.
        guesses: int32 (FINE + 1,): for a fourth root of so many steps the smallest magnitude's index that it may be.
        signed: whether values are mirrored; code 127 is then the magnitude 0, else code 0 is.
    """

    values: NDArray[np.float32]
    middles: NDArray[np.float32]
    guesses: NDArray[np.int32]
    signed: bool


@cache
def codes(signed: bool) -> Codes:
    """The table for numbers of both signs, or for those that are never negative."""
    centres = [_decade(level, 2 ** (level + (not signed))) for level in range(LEVELS)]
    magnitudes = np.concatenate([[0.0], *centres, [1.0]])
    values = np.concatenate([-magnitudes[1:-1][::-1], magnitudes]) if signed else magnitudes
    middles = np.append((magnitudes[1:] + magnitudes[:-1]) / 2, np.inf).astype(np.float32)
    lowest = (np.maximum(np.arange(FINE + 1) - 0.01, 0.0) / FINE) ** 4  # a little lower than the cell begins, as roots are rounded
    return Codes(values.astype(np.float32), middles, np.searchsorted(middles, lowest).astype(np.int32), signed)


def _decade(level: int, cells: int) -> NDArray[np.float64]:
    edges = np.linspace(0.1, 1.0, cells + 1)
    return np.asarray((edges[1:] + edges[:-1]) / 2 * 10.0 ** (level - LEVELS + 1))
