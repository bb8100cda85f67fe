"""Source data: samples like those the model was trained on, read once and checked, and given to the exporter as the device would see them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeadapt.bundle.inputspec import FITS, MOST_SIDE, ORDERS, InputSpec
from edgeadapt.errors import InputError, UsageError
from edgeadapt.exporters.reading import Found, Labels, Request, read
from edgeadapt.preprocess import prepare
from edgeadapt.progress import Progress, quiet
from edgeadapt.units import format_shape

MEMORY = 4 << 30
CHUNK = 256
Indices = NDArray[np.intp] | Sequence[int]


@dataclass(frozen=True)
class Samples:
    """Checked source samples.

    Attributes:
        x: uint8 images (N, H, W, C) of the input's height and width, or float32 (N, *spec.shape): as the model takes it, or where `spec.raw` is
            set as the sensor gives it.
        y: int64 classes (N,), or of every pixel (N, H, W); None where the samples carry no labels.
        spec: the model's input, and how uint8 images become it.
        names: class names, or None.
        origin: where they came from, in a few words.
    """

    x: NDArray[Any]
    y: Labels | None
    spec: InputSpec
    names: list[str] | None = None
    origin: str = ""

    def __len__(self) -> int:
        return len(self.x)

    def _rows(self, indices: Indices) -> NDArray[Any]:
        return np.ascontiguousarray(self.x[np.asarray(indices, np.intp)])

    def tensor(self, indices: Indices) -> NDArray[np.float32]:
        """The samples at `indices` as the graphs take them, float32 (n, *spec.shape), by the device's own `prepare`; a copy."""
        return prepare(self._rows(indices), self.spec)

    def pixels(self, indices: Indices) -> NDArray[np.float32] | None:
        """The samples at `indices` as images (n, C, H, W) in 0..1, before mean and deviation; None where they are no images.

        float32 samples count as images where undoing the given mean and deviation brings them into 0..1.
        """
        spec = self.spec
        if self.x.dtype == np.uint8:
            return prepare(self._rows(indices), dataclasses.replace(spec, mean=None, std=None))
        if spec.raw or len(spec.shape) != 3 or spec.mean is None or spec.std is None:
            return None
        mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (spec.mean, spec.std))
        undone = self._rows(indices) * std + mean
        return np.clip(undone, 0.0, 1.0) if undone.size and undone.min() > -0.01 and undone.max() < 1.01 else None

    def take(self, indices: Indices) -> Samples:
        """Some of the samples, copied."""
        chosen = np.asarray(indices, np.intp)
        return dataclasses.replace(self, x=self.x[chosen], y=None if self.y is None else self.y[chosen])

    def split(self, holdout: float, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Indices to train on and indices to hold out, each rising: the share `holdout` of every class, the same for the same seed.

        At least one sample is held out where holdout > 0 and there are two; the only sample of a class is trained on.
        """
        random = np.random.default_rng(seed)
        if self.y is None or self.y.ndim > 1:
            groups = [np.arange(len(self))]
        else:
            groups = [np.flatnonzero(self.y == label) for label in np.unique(self.y)]
        exact = [len(group) * holdout for group in groups]
        counts = [min(int(share), len(group) - 1) for share, group in zip(exact, groups, strict=True)]
        wanted = max(round(len(self) * holdout), 1 if holdout > 0 else 0)
        for k in sorted(range(len(groups)), key=lambda k: (counts[k] - exact[k], k)):
            if sum(counts) < wanted and counts[k] < len(groups[k]) - 1:
                counts[k] += 1
        held = [random.permutation(group)[:count] for group, count in zip(groups, counts, strict=True)]
        outside = np.sort(np.concatenate(held)).astype(np.intp)
        return np.setdiff1d(np.arange(len(self)), outside), outside

    def check(self, logits: Sequence[int]) -> None:
        """See that labels and names fit a model whose logits for one sample have this shape: (classes,) or (classes, H, W).

        Raises:
            InputError: they do not.
        """
        classes, place = int(logits[0]), tuple(int(size) for size in logits[1:])
        if self.names is not None and len(self.names) != classes:
            raise InputError(
                f"there are {len(self.names)} class names, and the model has {classes} classes", "give a name for each output of the model, in order"
            )
        if self.y is None:
            return
        if self.y.shape[1:] != place:
            what = f"{format_shape(place)}, as the model's logits" if place else "one class"
            found = format_shape(self.y.shape[1:]) if self.y.ndim > 1 else "one class"
            raise InputError(f"the labels of a sample are {found}, expected {what}", "check --task and the labels")
        _check_range(self.y, classes, "")

    def summary(self) -> str:
        """One line about them."""
        kind = "images" if self.x.dtype == np.uint8 else "samples"
        if self.y is None:
            labels = "without labels"
        elif self.y.ndim == 1:
            labels = f"of {len(np.unique(self.y))} classes"
        else:
            labels = f"with a class for every pixel, up to {int(self.y.max())}"
        return f"{len(self):,} {kind} {format_shape(self.x.shape[1:])} {self.x.dtype}, {labels}" + (f", from {self.origin}" if self.origin else "")


def load_samples(
    data: Any,
    spec: InputSpec,
    *,
    names: Sequence[str] | None = None,
    classes: int | None = None,
    labelled: bool = True,
    most: int | None = None,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Progress = quiet,
) -> Samples:
    """Read source samples and check them.

    Args:
        data: path of an .npz archive (or of a folder of .npy files, which are mapped) with x, y and perhaps names; path of a folder with one folder
            of images for each class; "MODULE:FUNCTION" that gives a map-style torch Dataset of (x, label), which is read once; or such a Dataset, or
            the arrays (x, y) themselves. uint8 images are brought to the input's size as `spec` says; float32 is taken as it is, or
            scaled where `spec.raw` is set. Where it makes windows of samples, x (T, C) with y (T,) is a recording.
        names: class names in the order of the model's outputs; a folder's names must be among them. Without, a folder's own, sorted.
        classes: number of the model's classes, where known.
        labelled: whether labels are wanted; without, they are not looked at and `y` is None.
        most: take at most so many samples, drawn by `seed` in equal share from every class.
        memory: refuse to hold more bytes than this.
        progress: told about every image that is read.

    Raises:
        InputError: the data is missing, damaged, or not what the model takes; labels are no whole numbers, out of range or all the same.
        UsageError, ExportError: the function that gives the data set is not found, or raises.
    """
    if isinstance(data, Samples):
        return data
    request = Request(spec, list(names) if names else None, classes, labelled, most, seed, memory, progress)
    return _checked(read(os.fspath(data) if isinstance(data, os.PathLike) else data, request), request)


def _checked(found: Found, request: Request) -> Samples:
    """The checks that are the same for all forms."""
    x, y, origin, names = found.x, found.y, found.origin, request.names or found.names
    if x.dtype == np.float32:
        _check_finite(x, origin)
    if y is not None:
        if y.ndim not in (1, 3, len(request.spec.shape)):
            raise InputError(
                f"{origin}: labels are {format_shape(y.shape)}, expected N classes, or N x H x W for segmentation",
                "give class indices, not one-hot rows",
            )
        _check_range(y, request.classes or (len(names) if names else None), f"{origin}: ")
        if (y == y.flat[0]).all():
            raise InputError(f"{origin}: every label is {y.flat[0]}", "give samples of all classes: after a warm-up on one it is all the model says")
    return Samples(x, y, request.spec, names, origin)


def _check_range(y: Labels, classes: int | None, prefix: str) -> None:
    least, largest = (int(y.min()), int(y.max())) if y.size else (0, 0)
    if least >= 0 and (classes is None or largest < classes):
        return
    wrong = least if least < 0 else largest
    first = int(np.argwhere(y == wrong)[0][0])
    hint = "classes are counted from 0"
    if least == 1 and classes == largest:
        hint += ": subtract 1"
    elif y.ndim > 1:
        hint += "; give unlabelled pixels a class of their own, or leave such samples out"
    raise InputError(f"{prefix}label {wrong} of sample {first} lies outside 0..{classes - 1 if classes else '…'}", hint)


def _check_finite(x: NDArray[np.float32], origin: str) -> None:
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK]
        rows = np.isfinite(part).reshape(len(part), -1).all(1)
        if not rows.all():
            raise InputError(
                f"{origin}: sample {start + int(np.argmin(rows))} holds NaN or infinite values", "repair or drop such samples, as in training"
            )


def spec_for(
    shape: Sequence[int],
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    resize: bool | Sequence[int] = False,
    *,
    fit: str = "stretch",
    crop: bool = False,
    order: str = "rgb",
    raw: bool = False,
    hop: int | None = None,
) -> InputSpec:
    """The input of a model from what a user says; see `InputSpec`.

    Args:
        shape: one float32 input, channels first.
        mean, std: one number a channel or one for all: of pixels in 0..1, or where `raw` is set of values as the sensor gives them.
        resize: whether uint8 images of another size are resized to the input, or the height and width that they are resized to.
        fit: "stretch" or "cover". With "cover" what is larger then is cut.
        crop: whether images that are larger then are cut to the input.
        order: of the channels that the model takes: "rgb" or "bgr".
        raw: whether float32 frames are values as the sensor gives them, which are scaled here and on the device.
        hop: of an input C x L, samples from one window to the next, where recordings and sensors give samples.

    Raises:
        UsageError: they do not fit each other.
    """
    shape = tuple(int(size) for size in shape)
    size = None if resize is False else tuple(shape[1:]) if resize is True else tuple(int(side) for side in resize)
    _check_input(shape, size, fit, crop, order, raw, hop)
    if len(shape) != 3 and not raw and (mean is not None or std is not None):
        raise UsageError(
            f"--mean and --std are for images, but the input is {format_shape(shape)}",
            "scale sensor data before it is given, as in training; or add --raw, and it is scaled by them here and on the device",
        )
    if raw and mean is None and std is None:
        raise UsageError("--raw says that frames are still to be scaled, and nothing says how", "give --mean and --std, or leave --raw out")
    values: list[tuple[float, ...] | None] = []
    bounds = ((-3e38, 3e38), (1e-30, 3e38)) if raw else ((0.0, 1.0), (1e-6, 10.0))
    for name, given, (least, most) in (("mean", mean, bounds[0]), ("std", std, bounds[1])):
        if given is None:
            values.append(None)
            continue
        try:
            several = tuple(np.asarray(given, np.float64).reshape(-1).tolist())
        except (TypeError, ValueError):
            raise UsageError(f"--{name} {given!r} is no list of numbers", "give one for each channel, or one for all") from None
        several *= shape[0] if len(several) == 1 else 1
        if len(several) != shape[0]:
            raise UsageError(f"--{name} has {len(several)} numbers for {shape[0]} channels", "give one for each channel, or one for all")
        if not all(least <= value <= most for value in several):
            raise UsageError(
                f"--{name} {', '.join(f'{value:g}' for value in several)} lies outside {least:g}..{most:g}",
                "give the one that training used" if raw else "it is of pixels in 0..1: divide that of pixels in 0..255 by 255",
            )
        values.append(several)
    resized = None if size is None else (size[0], size[1])
    return InputSpec(shape, resized, values[0], values[1], fit, crop or fit == "cover", order, raw, hop)


def _check_input(
    shape: tuple[int, ...], resize: tuple[int, ...] | None, fit: str, crop: bool, order: str, raw: bool, hop: int | None
) -> None:
    for name, value, known in (("fit", fit, FITS), ("order", order, ORDERS)):
        if value not in known:
            raise UsageError(f"{value!r} is no --{name}", f"use {' or '.join(known)}")
    images = [f"--{name}" for name, given in (("resize", resize), ("fit", fit != FITS[0]), ("crop", crop), ("order", order != ORDERS[0])) if given]
    if images and (len(shape) != 3 or raw):
        why = "with --raw frames are no images" if raw else f"the input is {format_shape(shape)}"
        raise UsageError(f"{' and '.join(images)}: for images, but {why}", "leave it out, and give frames in the input's shape")
    if order != ORDERS[0] and shape[0] != 3:
        raise UsageError(f"--order {order} is of three channels, and the input has {shape[0]}", "leave it out")
    if resize is not None and (len(resize) != 2 or (resize != shape[1:] and not (crop or fit == "cover"))):
        wanted = f"write --resize {format_shape(shape[1:])}, or add --crop, which cuts what is larger"
        raise UsageError(f"--resize {format_shape(resize)} is not the input's size", wanted)
    if resize is not None and max(resize) > MOST_SIDE:
        raise UsageError(f"--resize {format_shape(resize)} is too large", f"give sides of at most {MOST_SIDE}")
    if resize is not None and (resize[0] < shape[1] or resize[1] < shape[2]):
        raise UsageError(f"--resize {format_shape(resize)} is smaller than the input {format_shape(shape[1:])}", "give at least its size")
    if fit == "cover" and resize is None:
        raise UsageError("--fit cover says how images are resized, and they are not", f"add --resize {format_shape(shape[1:])}")
    if hop is not None and (len(shape) != 2 or hop < 1):
        why = f"the input is {format_shape(shape)}, no window C x L" if len(shape) != 2 else "windows begin at least one sample apart"
        raise UsageError(f"--hop {hop}: {why}", "leave it out, or give a number of samples")


def example_of(data: Samples | None, shape: Sequence[int], logits: Tensor, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs (batch, …) and targets to trace and check graphs with: samples drawn by `seed`, or random numbers where there are none.

    logits: of the model, (·, C, …).
    """
    places = (batch, *logits.shape[2:])
    if data is None:
        random = torch.Generator().manual_seed(seed)
        return torch.randn((batch, *shape), generator=random), torch.randint(int(logits.shape[1]), places, generator=random)
    indices = np.resize(np.random.default_rng(seed).permutation(len(data)), batch)
    target = torch.zeros(places, dtype=torch.int64) if data.y is None else torch.from_numpy(data.y[indices].astype(np.int64))
    return torch.from_numpy(np.ascontiguousarray(data.tensor(indices))), target
