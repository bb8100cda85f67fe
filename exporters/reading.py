"""Reads arrays out of what users have: an .npz archive or .npy files, a folder of images for each class, or a torch Dataset of their own.

Images come out as bytes of the input's size, resized by the device's own `prepare`, so that the exporter and the device see the same pixels.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from edgeadapt.bundle.inputspec import InputSpec
from edgeadapt.errors import EdgeAdaptError, InputError
from edgeadapt.exporters.load import call, one_line, resolve
from edgeadapt.preprocess import batch_of, fitted, placed, windows_of
from edgeadapt.progress import Progress
from edgeadapt.units import format_bytes, format_shape

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CHUNK = 256
SAVE = "save it with numpy.savez(path, x=images, y=labels)"
MORE = "give at least a few hundred samples"
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """What to read; the fields are the arguments of `load_samples`."""

    spec: InputSpec
    names: list[str] | None
    classes: int | None
    labelled: bool
    most: int | None
    seed: int
    memory: int
    progress: Progress


@dataclass(frozen=True)
class Found:
    """What was read: x uint8 (N, H, W, C) or float32 (N, *shape), y int64 or None, the names that came with it, and where it came from."""

    x: NDArray[Any]
    y: Labels | None
    names: list[str] | None
    origin: str


def read(data: Any, request: Request) -> Found:
    """Read a path, the name of a function, a data set, or arrays.

    Raises:
        InputError: the data is missing, damaged, or does not fit `request.spec`.
        UsageError, ExportError: the function is not found, or raises.
    """
    if not isinstance(data, str):
        return _thing(data, type(data).__name__, request)
    path = Path(data)
    if path.is_dir():
        return _arrays(*_npy(path), path.name, request) if (path / "x.npy").is_file() else _folder(path, request)
    if path.suffix == ".npz":
        return _arrays(*_npz(path, request), path.name, request)
    if path.exists() or ":" not in data:
        raise InputError(
            f"{data}: {'not a data set' if path.exists() else 'there is no such file or folder'}",
            "give an .npz archive with x and y, a folder with a folder of images for each class, or MODULE:FUNCTION for a torch Dataset",
        )
    thing = resolve(data, "dataset")
    return _thing(thing if hasattr(thing, "__getitem__") else call(thing, data, "dataset"), data, request)


def _thing(thing: Any, origin: str, request: Request) -> Found:
    array = (np.ndarray, torch.Tensor)
    if isinstance(thing, Mapping):
        return _arrays(thing.get("x"), thing.get("y"), thing.get("names"), origin, request)
    if isinstance(thing, array):
        return _arrays(thing, None, None, "array", request)
    if isinstance(thing, (tuple, list)) and len(thing) == 2 and isinstance(thing[0], array):
        return _arrays(thing[0], thing[1], None, "arrays", request)
    if not hasattr(thing, "__getitem__") or not hasattr(thing, "__len__"):
        raise InputError(
            f"{origin} is of type {type(thing).__name__}, expected a data set with a length and items (x, label)",
            "give a map-style torch Dataset, or the arrays (x, y)",
        )
    return _dataset(thing, origin, request)


# ------------------------------------------------------------------------------------------------ arrays


def _npz(path: Path, request: Request) -> tuple[Any, Any, Any]:
    """x, y and names of an archive."""
    wanted = ("x", "y", "names") if request.labelled else ("x", "names")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {entry.filename.removesuffix(".npy"): entry.file_size for entry in archive.infolist()}
        size = sum(members.get(name, 0) for name in wanted)
        if size > request.memory:
            raise _too_large(size, path.name, request, "save a part of it, or x.npy and y.npy in a folder, which are mapped and not read")
        with np.load(path, allow_pickle=False) as loaded:
            found = {name: loaded[name] for name in wanted if name in loaded.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        reason = "there is no such file" if not path.exists() else "it holds Python objects" if "allow_pickle" in str(error) else one_line(error)
        raise InputError(f"{path}: cannot be read as an archive of arrays: {reason}", SAVE) from error
    if "x" not in found:
        raise InputError(f"{path}: holds no array x, only {', '.join(members) or 'nothing'}", SAVE)
    return found["x"], found.get("y"), found.get("names")


def _npy(folder: Path) -> tuple[Any, Any, Any]:
    """x, y and names of a folder of .npy files, x mapped from the disk."""
    try:
        x = np.load(folder / "x.npy", mmap_mode="r", allow_pickle=False)
        y, names = (np.load(path, allow_pickle=False) if (path := folder / f"{name}.npy").is_file() else None for name in ("y", "names"))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{folder}: its .npy files cannot be read: {one_line(error)}", "save them with numpy.save, and not as objects") from error
    return x, y, names


def _arrays(x: Any, y: Any, names: Any, origin: str, request: Request) -> Found:
    x, y = (part.detach().cpu().numpy() if isinstance(part, torch.Tensor) else part for part in (x, y))
    if not isinstance(x, np.ndarray) or not x.ndim:
        raise InputError(
            f"{origin}: x is {'missing' if x is None else 'no array'}", "give uint8 images N x H x W x C, or float32 as the model takes it"
        )
    if request.labelled:
        if y is None:
            raise InputError(
                f"{origin}: holds no labels y", "add each sample's class as y; or add --unlabelled, to learn from the frozen model's predictions"
            )
        y = _labels(y, origin)
        if y.shape[:1] != x.shape[:1]:
            raise InputError(f"{origin}: {len(x)} samples and {y.size if y.ndim < 1 else len(y)} labels", "x and y must have the same length")
    if not len(x):
        raise InputError(f"{origin}: there are no samples in it", MORE)
    x, y = _recorded(x, y if request.labelled else None, origin, request)
    if request.most and request.most < len(x):
        chosen = draw(y, len(x), request.most, request.seed)
        x, y = x[chosen], None if y is None else y[chosen]
    before = x.shape[1:3]
    x = _fit(x, origin, request)
    if y is not None and y.ndim == 3 and x.dtype == np.uint8 and y.shape[1:] == before != x.shape[1:3]:
        y = np.stack([_fitted_mask(mask, request.spec) for mask in y])
    found = [str(name) for name in np.asarray(names)] if names is not None and np.asarray(names).dtype.kind == "U" else None
    return Found(x, y, found, origin)


def _recorded(x: NDArray[Any], y: Labels | None, origin: str, request: Request) -> tuple[NDArray[Any], Labels | None]:
    """Windows of a recording (T, C), where the device makes them of samples as well; those whose samples have one class all over."""
    spec = request.spec
    if spec.hop is None or x.ndim != 2 or x.shape[1:] != spec.shape[:1] or (y is not None and y.ndim != 1):
        return x, y
    windows = windows_of(x, spec)
    if not len(windows):
        raise InputError(f"{origin}: {len(x)} samples, and a window is {spec.shape[1]}", "give a longer recording, one row a sample")
    if y is None:
        return windows, None
    spans = np.lib.stride_tricks.sliding_window_view(y, spec.shape[1])[:: spec.hop]
    whole = (spans == spans[:, :1]).all(1)
    if not whole.any():
        raise InputError(f"{origin}: no window of {spec.shape[1]} samples has one class all over", "give recordings in which a class lasts longer")
    return windows[whole], spans[whole, 0]


def _fitted_mask(mask: Labels, spec: InputSpec) -> Labels:
    """A mask (H, W) in the input's size, resized and cut as its image, each pixel the class of the nearest."""
    height, width, top, left = placed(mask.shape[0], mask.shape[1], spec)
    whole = Image.fromarray(mask.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(whole)[top : top + spec.shape[1], left : left + spec.shape[2]].astype(np.int64)


def _labels(y: Any, origin: str) -> Labels:
    y = np.asarray(y)
    if not np.issubdtype(y.dtype, np.integer):
        raise InputError(f"{origin}: labels are {y.dtype}, expected whole numbers 0, 1, …", "give class indices: y.astype(numpy.int64)")
    return y.astype(np.int64)


def draw(y: Labels | None, count: int, most: int, seed: int) -> NDArray[np.intp]:
    """Rising indices of `most` out of `count` samples: each class gives as many as the others, while it has them."""
    order = np.random.default_rng(seed).permutation(count)
    if y is None or y.ndim > 1:
        return np.sort(order[:most])
    rank = np.empty(count, np.intp)
    for label in np.unique(y):
        mine = np.flatnonzero(y[order] == label)
        rank[mine] = np.arange(len(mine))
    return np.sort(order[np.argsort(rank, kind="stable")[:most]])


# ------------------------------------------------------------------------------------------------ to the model's input


def _fit(x: NDArray[Any], origin: str, request: Request) -> NDArray[Any]:
    """x (N, …) as the model takes it: checked, and images resized."""
    spec = request.spec
    images = x.dtype == np.uint8 and len(spec.shape) == 3 and x.ndim == 4 and x.shape[3] == spec.shape[0]
    if images and spec.resize is None and not spec.crop and x.shape[1:3] != spec.shape[1:]:
        raise _wrong_size(x.shape[1:3], origin, spec)
    try:
        frames, single = batch_of(x, spec)
    except InputError as error:
        raise InputError(f"{origin}: {error.message}", error.hint) from None
    if single:
        raise InputError(f"{origin}: x is one sample {format_shape(x.shape)}, expected many", "give samples with their number first")
    if frames.dtype != np.uint8 or frames.shape[1:3] == spec.shape[1:]:
        return frames
    out = _room(len(frames), frames.dtype, origin, request)
    for start in range(0, len(frames), CHUNK):
        out[start : start + CHUNK] = _resized(frames[start : start + CHUNK], spec)
        if len(frames) > 1:
            request.progress("resizing", min(start + CHUNK, len(frames)), len(frames))
    return out


def _resized(frames: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.uint8]:
    """Images in the input's size, by the device's own `fitted`."""
    return np.stack([fitted(frame, spec) for frame in frames])


def _room(count: int, dtype: np.dtype[Any], origin: str, request: Request) -> NDArray[Any]:
    """An empty array for `count` samples."""
    shape = request.spec.shape if dtype != np.uint8 else (*request.spec.shape[1:], request.spec.shape[0])
    size = count * int(np.prod(shape)) * dtype.itemsize
    if size > request.memory:
        raise _too_large(size, origin, request, "take a part of it with --samples, such as 5000: a tenth of the data warms up nearly as well as all")
    return np.empty((count, *shape), dtype)


def _too_large(size: int, origin: str, request: Request, hint: str) -> InputError:
    return InputError(f"{origin}: takes {format_bytes(size)}, more than the {format_bytes(request.memory)} that are held in memory", hint)


def _wrong_size(size: Sequence[int], origin: str, spec: InputSpec) -> InputError:
    wanted = format_shape(spec.shape[1:])
    return InputError(
        f"{origin}: images are {format_shape(tuple(size))} (height x width), the model takes {wanted}",
        f"add --resize {wanted}, or resize them as in training",
    )


# ------------------------------------------------------------------------------------------------ folders of images


def _folder(path: Path, request: Request) -> Found:
    if not request.labelled:
        return _images(sorted(_files(path)), None, None, path, request)
    found = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise InputError(
            f"{path}: holds no folders", "make a folder for each class with its images in it; for images without classes add --unlabelled"
        )
    names = request.names or [entry.name for entry in found]
    unknown = [entry.name for entry in found if entry.name not in names]
    if unknown:
        shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
        raise InputError(
            f"{path}: folder {unknown[0]!r} is none of the class names ({shown})",
            "rename the folders, or leave --names out: then the folders are the classes, sorted by name",
        )
    if request.classes and request.classes != len(names):
        raise InputError(
            f"{path}: holds {len(names)} folders, and the model has {request.classes} classes",
            "give the class of every output with --names, or make one folder for each class",
        )
    files: list[Path] = []
    labels: list[int] = []
    for entry in found:
        inside = sorted(_files(entry))
        if not inside:
            raise InputError(f"{entry}: holds no images", f"put images ({', '.join(IMAGES[:4])}, …) into it, or remove the folder")
        files += inside
        labels += [names.index(entry.name)] * len(inside)
    return _images(files, np.array(labels, np.int64), names, path, request)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and not path.name.startswith(".") and path.is_file())


def _images(files: list[Path], y: Labels | None, names: list[str] | None, path: Path, request: Request) -> Found:
    if not files:
        raise InputError(f"{path}: holds no images", f"put images ({', '.join(IMAGES[:4])}, …) into it")
    _image_input(str(path), request.spec)
    if request.most and request.most < len(files):
        chosen = draw(y, len(files), request.most, request.seed)
        files, y = [files[index] for index in chosen], None if y is None else y[chosen]
    x = _room(len(files), np.dtype(np.uint8), str(path), request)
    for index, file in enumerate(files):
        try:
            with Image.open(file) as image:
                x[index] = _decoded(image, str(file), request)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{file}: cannot be decoded: {one_line(error)}", "remove the file, or save it again") from error
        request.progress("reading images", index + 1, len(files))
    return Found(x, y, names, str(path))


def _image_input(origin: str, spec: InputSpec) -> None:
    if len(spec.shape) != 3 or spec.shape[0] not in MODES:
        raise InputError(
            f"{origin}: images have 1, 3 or 4 channels, but the model takes {format_shape(spec.shape)}", "give an .npz archive with x and y"
        )


def _decoded(image: Image.Image, origin: str, request: Request) -> NDArray[np.uint8]:
    """One image (H, W, C) of the input's size."""
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"{origin}: has pixels of type {image.mode}, not bytes", "convert it to 8 bits as in training, or give float32 arrays in an .npz archive"
        )
    spec = request.spec
    channels, height, width = spec.shape
    pixels = np.asarray(image.convert(MODES[channels])).reshape(image.height, image.width, channels)
    if pixels.shape[:2] == (height, width):
        return pixels
    if spec.resize is None and not spec.crop:
        raise _wrong_size(pixels.shape[:2], origin, spec)
    return _fit(pixels[None], origin, request)[0]


# ------------------------------------------------------------------------------------------------ torch data sets


def _dataset(items: Any, origin: str, request: Request) -> Found:
    try:
        count = len(items)
    except Exception as error:  # an iterable data set has the method, and it raises
        raise InputError(f"{origin}: has no length ({one_line(error)})", "give a map-style torch Dataset") from error
    if not count:
        raise InputError(f"{origin}: there are no samples in it", MORE)
    chosen = draw(None, count, min(request.most or count, count), request.seed)
    x: NDArray[Any] | None = None
    labels: list[NDArray[Any]] = []
    for place, index in enumerate(chosen):
        where = f"{origin}[{index}]"
        try:
            item = items[int(index)]
        except EdgeAdaptError:
            raise
        except Exception as error:
            raise InputError(f"{where} raised {one_line(error)}", "call it by itself in Python to see the whole traceback") from error
        value, label = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        array = _item(value, where, request)
        x = _room(len(chosen), array.dtype, origin, request) if x is None else x
        if array.dtype != x.dtype:
            raise InputError(f"{where} is {array.dtype}, the samples before it are {x.dtype}", "give all in one type")
        x[place] = array
        if request.labelled:
            if label is None:
                raise InputError(f"{where} is no pair (x, label)", "return both, or add --unlabelled")
            labels.append(np.asarray(label))
        request.progress("reading samples", place + 1, len(chosen))
    assert x is not None
    if len({label.shape for label in labels}) > 1:
        raise InputError(f"{origin}: its labels differ in shape", "give one class a sample, or masks of the input's size")
    names = getattr(items, "classes", None)
    own = [str(name) for name in names] if isinstance(names, (list, tuple)) and names else None
    return Found(x, _labels(np.stack(labels), origin) if request.labelled else None, own, origin)


def _item(value: Any, where: str, request: Request) -> NDArray[Any]:
    """One sample of a data set as it is kept: bytes (H, W, C), or float32 as the model takes it."""
    if isinstance(value, Image.Image):
        _image_input(where, request.spec)
        return _decoded(value, where, request)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        value = (value.permute(1, 2, 0) if value.dtype == torch.uint8 and value.dim() == 3 else value).numpy()
    if not isinstance(value, np.ndarray):
        raise InputError(f"{where} is of type {type(value).__name__}, expected a tensor, an array or a Pillow image", "convert it in the data set")
    return _fit(np.ascontiguousarray(value)[None], where, request)[0]
