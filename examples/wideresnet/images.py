"""Labelled images to train on and others to measure on: from an archive or folders, or from the data pack that EDGEADAPT_DATA names."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from wideresnet import SIDE

from edgeadapt.errors import InputError, UsageError
from edgeadapt.exporters.data import Samples, load_samples, spec_for

VARIABLE = "EDGEADAPT_DATA"
MEASURED = 2000
FORM = f"give uint8 images x (N x {SIDE} x {SIDE} x 3) and their classes y (0, 1, …): numpy.savez('train.npz', x=images, y=labels)"
SPEC = spec_for((3, SIDE, SIDE), 0.5, 0.5)


def find(data: str | None, share: float, seed: int) -> tuple[Samples, Samples]:
    """The images to train on and those held out; both carry labels 0..K-1.

    Args:
        data: what `edgeadapt export --data` takes, of which `share` is held out, drawn by `seed` from every class. None: the data pack's 20 000
            training images, and the first 2 000 of the 10 000 that it holds out.

    Raises:
        UsageError: neither is given.
        InputError: the data is missing, damaged, of another size or type, or a class has no images.
    """
    if data is not None:
        samples = _given(data)
        kept, outside = samples.split(share, seed)
        if not len(outside):
            raise InputError(f"{data}: none of its {len(samples)} images can be held out", "give two images of a class, or a larger --holdout")
        return samples.take(kept), samples.take(outside)
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise UsageError("there are no images to train on", f"give an archive with --data train.npz, or the folder of the data pack in {VARIABLE}")
    train, held = (_pack(Path(folder), *parts) for parts in (("train20k", "train20k_a", "train20k_b"), ("holdout10k", "holdout10k")))
    return train, held.take(range(MEASURED))


def identity(samples: Samples) -> str:
    """How many there are and what they hold, in a few words: equal for the same images with the same labels in the same order."""
    state = hashlib.sha256()
    for array in (samples.x, samples.y):
        state.update(np.ascontiguousarray(array).data)
    return f"{len(samples)} with SHA-256 {state.hexdigest()[:16]}"


def _given(data: str) -> Samples:
    try:
        samples = load_samples(data, SPEC)
        assert samples.y is not None  # load_samples was asked for them
        classes = int(samples.y.max()) + 1
        samples.check((classes,))
    except InputError as error:  # its own hints name options of the export
        raise InputError(error.message if Path(data).name in error.message else f"{data}: {error.message}", FORM) from error
    if samples.x.dtype != np.uint8:
        raise InputError(f"{data}: images are {samples.x.dtype}, expected uint8, the pixels as they are", FORM)
    absent = next((k for k, label in enumerate(np.unique(samples.y)) if k != label), None)
    if absent is not None:
        raise InputError(f"{data}: classes run to {classes - 1}, but class {absent} has no image", "number the classes 0, 1, … without gaps")
    return samples


def _pack(folder: Path, name: str, *sheets: str) -> Samples:
    """One set of the data pack: sheets of images side by side, without loss, and their labels."""
    try:
        with np.load(folder / "cifar" / "labels.npz") as labels:
            y = labels[name].astype(np.int64)
        x = np.concatenate([_cut(folder / "cifar" / f"cifar10_{sheet}_lossless.webp", len(y) // len(sheets)) for sheet in sheets])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{VARIABLE}={folder}: {name} cannot be read from it: {error}", f"let {VARIABLE} name the folder of the data pack, or give --data"
        ) from error
    return Samples(x, y, SPEC, origin="the data pack")


def _cut(path: Path, count: int) -> NDArray[np.uint8]:
    """The first images of a sheet, row by row."""
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB"))
    rows, columns = sheet.shape[0] // SIDE, sheet.shape[1] // SIDE
    tiles: NDArray[np.uint8] = sheet.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(rows * columns, SIDE, SIDE, 3)
    if len(tiles) < count:
        raise ValueError(f"{path.name} holds {len(tiles)} images, expected {count}")
    return tiles[:count]
