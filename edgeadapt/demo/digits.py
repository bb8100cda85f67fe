"""The digits that the demo reads: handwritten, 8x8 pixels and 17 shades, shown as a camera would see them on paper.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998), CC BY 4.0; digits.txt says more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent
BUNDLE = FOLDER / "digits.edgeadapt"
SIDE = 32
TRAINING = 1200
"""The first 1200 images are for training, the other 597 for testing. They come, it seems, writer by writer, so hardly a hand is in both."""

_SHADES = 16  # the scanned originals count the dark pixels in blocks of 4x4
_PAPER, _INK = 225.0, 35.0


def training() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [1200,32,32,3] and labels int64 [1200] for training."""
    x, y = _load()
    return _frames(x[:TRAINING]), y[:TRAINING]


def testing() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [597,32,32,3] and labels int64 [597] that no model was trained on."""
    x, y = _load()
    return _frames(x[TRAINING:]), y[TRAINING:]


def _load() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with np.load(FOLDER / "digits.npz", allow_pickle=False) as file:
        return file["x"], file["y"].astype(np.int64)


def _frames(x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Dark ink on light paper, [N,8,8] enlarged to [N,32,32,3] by straight lines between the pixels' centres."""
    places = np.clip((np.arange(SIDE) + 0.5) * x.shape[1] / SIDE - 0.5, 0, x.shape[1] - 1)
    low = np.minimum(places.astype(int), x.shape[1] - 2)
    lines = np.zeros((SIDE, x.shape[1]), np.float32)
    lines[np.arange(SIDE), low] = 1 - (places - low)
    lines[np.arange(SIDE), low + 1] = places - low
    ink = lines @ (x.astype(np.float32) / _SHADES) @ lines.T
    grey = np.rint(_PAPER + (_INK - _PAPER) * ink).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)
