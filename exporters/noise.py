"""Random numbers without a generator's state: a hash of where a number is and of the step that needs it.

Two rounds of shifts, exclusive-ors and multiplications on 31-bit integers held in int64, whose products stay below 2^62: standard operators that
every processor computes alike. The same seed, step, stream and place give the same number, so that a run repeats, and a state that is loaded or
rolled back goes on as it went.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 2**31 - 1
_FIRST, _SECOND = 0x2C1B3C6D, 0x297A2D39
_STEP, _STREAM, _SEED = 0x3504F333, 0x5DB3D743, 0x1B873593
_ROW, _COLUMN = 0x4F1BBCDD, 0x6A09E667


def uniform(counter: Tensor, seed: int, stream: int, rows: int, columns: int, begin: int = 0) -> Tensor:
    """Numbers from 0 to less than 1, multiples of 2⁻²⁴.

    Args:
        counter: int64 scalar, of the step.
        seed, stream: that tell runs, and tensors of one step, apart.
        rows, columns: of the result.
        begin: its first row among all: a piece has the numbers that it has in the whole.

    Returns:
        (rows, columns), of the default floating type.
    """
    start = (_SEED * (seed + 1) + _STREAM * (stream + 1)) & MASK
    moment = _masked(_masked(counter) * _STEP)
    row = _mixed(_masked(moment + _places(begin, rows, _ROW, start).unsqueeze(1)))
    bits = _mixed(_masked(row + _places(0, columns, _COLUMN, 0).unsqueeze(0)))
    return _shifted(bits, 7).to(torch.get_default_dtype()) * 2.0**-24


def _places(begin: int, count: int, factor: int, start: int) -> Tensor:
    return _masked(torch.arange(begin, begin + count) * factor + start)


def _mixed(bits: Tensor) -> Tensor:
    bits = _masked((bits ^ _shifted(bits, 16)) * _FIRST)
    bits = _masked((bits ^ _shifted(bits, 15)) * _SECOND)
    return bits ^ _shifted(bits, 16)


def _masked(bits: Tensor) -> Tensor:
    return bits & MASK


def _shifted(bits: Tensor, by: int) -> Tensor:
    """The bits of a number that is not negative, moved right; a division, as onnxruntime shifts unsigned integers only."""
    return torch.div(bits, 2**by, rounding_mode="trunc")
