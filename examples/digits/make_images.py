"""make_images.py FILE.npz: the demo's digits, as scikit-learn ships them, in one small file: x uint8 (1797, 8, 8) from 0 to 16, y uint8 (1797,)."""

from __future__ import annotations

import sys

import numpy as np
from sklearn.datasets import load_digits


def main(path: str) -> int:
    digits = load_digits()
    np.savez_compressed(path, x=digits.images.astype(np.uint8), y=digits.target.astype(np.uint8))
    print(f"{path}: {len(digits.images)} images")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
