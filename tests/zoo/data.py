"""Data for tests: the data pack where it is present, and small synthetic sets that a tiny model learns in seconds.

The pack is the folder named by EDGEADAPT_DATA. A test that needs it is marked `data`, which deselects it without the variable, and takes the
fixture `pack` (`from tests.zoo.data import pack_fixture  # noqa: F401`), which fails where the pack is absent all the same.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Windows = npt.NDArray[np.float32]


@cache
def _loaders(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("edgeadapt_data_loaders", folder / "loaders.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder / 'loaders.py'} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the pack may be read-only
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = kept
    return module


class Pack:
    """The data pack: its folder, its loaders, and whole sets read once a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaders = _loaders(folder)

    def weights(self, name: str) -> Path:
        """Path of weights/NAME.safetensors."""
        return self.folder / "weights" / f"{name}.safetensors"

    def images(self, name: str) -> tuple[Images, Labels]:
        """A labelled image set by its loader's name (cifar_test1000, cifar_train20k, cifar_holdout10k, cifar_test10k_jpeg, nips17).

        Returns:
            uint8 [N, H, W, 3] and int64 [N], copies.
        """
        x, y = _images(self.folder, name)
        return x.copy(), y.copy()


@cache
def _images(folder: Path, name: str) -> tuple[Images, Labels]:
    x, y = getattr(_loaders(folder), name)()
    return x, y.astype(np.int64)


def data_folder() -> Path | None:
    """The folder of the data pack, or None where EDGEADAPT_DATA is not set."""
    value = os.environ.get("EDGEADAPT_DATA", "")
    return Path(value).resolve() if value else None


@pytest.fixture(name="pack", scope="session")
def pack_fixture() -> Pack:
    """The data pack, for tests marked `data`."""
    folder = data_folder()
    if folder is None:
        pytest.fail("EDGEADAPT_DATA is not set; mark the test `data`, so that it is deselected without the data pack")
    if not (folder / "loaders.py").is_file():
        pytest.fail(f"EDGEADAPT_DATA={folder} has no loaders.py")
    return Pack(folder)


# ------------------------------------------------------------------------------------------------ synthetic


def _grid(height: int, width: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return rows, columns


def _bytes(x: npt.NDArray[np.float64]) -> Images:
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def gratings(count: int, size: int | tuple[int, int] = 32, classes: int = 4, seed: int = 0, noise: float = 20.0) -> tuple[Images, Labels]:
    """Images of stripes whose direction is the class; phase, frequency, colour and brightness vary.

    Returns:
        uint8 [count, H, W, 3] and int64 [count], balanced over the classes and shuffled, the same for the same arguments.
    """
    height, width = (size, size) if isinstance(size, int) else size
    random = np.random.default_rng([seed, count, height, width, classes])
    rows, columns = _grid(height, width)
    labels = random.permutation(np.arange(count) % classes).astype(np.int64)
    images = np.empty((count, height, width, 3), np.uint8)
    for k, label in enumerate(labels):
        angle = np.pi * label / classes + random.normal(0, 0.25 * np.pi / classes / 2)
        frequency = random.uniform(5, 9)
        wave = np.sin(frequency * (rows * np.sin(angle) + columns * np.cos(angle)) + random.uniform(0, 2 * np.pi))
        colour = random.uniform(30, 70, 3)
        images[k] = _bytes(random.uniform(110, 145) + wave[..., None] * colour + random.normal(0, noise, (height, width, 3)))
    return images, labels


def blobs(count: int, size: int | tuple[int, int] = 32, classes: int = 4, seed: int = 0, noise: float = 20.0) -> tuple[Images, Labels]:
    """Images of one soft spot whose colour and width tell the class; its place varies. Shapes and types as `gratings`."""
    height, width = (size, size) if isinstance(size, int) else size
    random = np.random.default_rng([seed, count, height, width, classes, 1])
    rows, columns = _grid(height, width)
    labels = random.permutation(np.arange(count) % classes).astype(np.int64)
    hues = 2 * np.pi * (np.arange(classes)[:, None] / classes + np.arange(3) / 3)
    images = np.empty((count, height, width, 3), np.uint8)
    for k, label in enumerate(labels):
        top, left = random.uniform(-0.5, 0.5, 2)
        radius = 0.25 + 0.3 * label / classes
        spot = np.exp(-((rows - top) ** 2 + (columns - left) ** 2) / (2 * radius**2))
        colour = 90 * np.cos(hues[label]) + random.normal(0, 8, 3)
        images[k] = _bytes(120 + spot[..., None] * colour + random.normal(0, noise, (height, width, 3)))
    return images, labels


def windows(count: int, channels: int = 6, length: int = 128, classes: int = 6, seed: int = 0, noise: float = 0.3) -> tuple[Windows, Labels]:
    """Sensor windows: a wave whose frequency and split over the channels tell the class; phase, gain and a slow drift vary.

    Returns:
        float32 [count, channels, length] of about unit size and int64 [count].
    """
    random = np.random.default_rng([seed, count, channels, length, classes])
    labels = random.permutation(np.arange(count) % classes).astype(np.int64)
    time = np.linspace(0, 1, length)
    mixing = np.cos(np.pi * (np.arange(classes)[:, None] + 1) * (np.arange(channels) + 0.5) / channels)
    data = np.empty((count, channels, length), np.float32)
    for k, label in enumerate(labels):
        wave = np.sin(2 * np.pi * ((3 + 2 * label) * time * random.uniform(0.95, 1.05) + random.uniform()))
        drift = random.normal(0, 0.2, (channels, 1)) + random.normal(0, 0.2, (channels, 1)) * time
        data[k] = random.uniform(0.8, 1.2) * mixing[label][:, None] * wave + drift + random.normal(0, noise, (channels, length))
    return data, labels


def masks(count: int, size: int | tuple[int, int] = 32, classes: int = 4, seed: int = 0, noise: float = 20.0) -> tuple[Images, Labels]:
    """Scenes for segmentation: background (class 0) with one coloured disc or rectangle of each other class, the later over the earlier.

    Returns:
        uint8 [count, H, W, 3] and the class of each pixel, int64 [count, H, W].
    """
    height, width = (size, size) if isinstance(size, int) else size
    random = np.random.default_rng([seed, count, height, width, classes, 2])
    rows, columns = _grid(height, width)
    hues = 2 * np.pi * (np.arange(classes)[:, None] / max(1, classes - 1) + np.arange(3) / 3)
    images = np.empty((count, height, width, 3), np.uint8)
    labels = np.zeros((count, height, width), np.int64)
    for k in range(count):
        image = np.full((height, width, 3), random.uniform(90, 130))
        for label in range(1, classes):
            top, left = random.uniform(-0.8, 0.8, 2)
            high, wide = random.uniform(0.3, 0.6, 2)
            inside = np.abs(rows - top) ** 2 / high**2 + np.abs(columns - left) ** 2 / wide**2 < 1
            if label % 2 == 0:
                inside = (np.abs(rows - top) < high) & (np.abs(columns - left) < wide)
            labels[k][inside] = label
            image[inside] = 125 + 80 * np.cos(hues[label]) + random.normal(0, 8, 3)
        images[k] = _bytes(image + random.normal(0, noise, image.shape))
    return images, labels


def to_float(images: Images, mean: tuple[float, ...] = (0.5, 0.5, 0.5), std: tuple[float, ...] = (0.25, 0.25, 0.25)) -> Windows:
    """uint8 [N, H, W, C] to float32 [N, C, H, W]: x / 255, minus mean, over std."""
    scaled = (images.astype(np.float32) / np.float32(255) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalisation of the pack's resnet20_cifar10 and resnet56_cifar10; wrn40_2_cifar10 takes 0.5 and 0.5."""
