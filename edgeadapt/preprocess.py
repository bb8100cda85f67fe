"""Frames as cameras and sensors give them, made into what the graphs take: the same functions on the device and in the exporter."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.inputspec import InputSpec
from edgeadapt.bundle.manifest import Manifest
from edgeadapt.errors import InputError
from edgeadapt.units import format_shape

PREPROCESSING = "preprocessing"
"""Of a manifest's self-check: the fingerprint of the machine that exported it."""

_MOST = 2**22  # pixels of an image that was made larger, in which its ratio is kept
_PROBE = ((61, 97), (97, 61), (40, 44))  # heights and widths, as shares in 60ths of the input's


def prepare(x: NDArray[Any], spec: InputSpec, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Frames as a float32 batch, channels first.

    Args:
        x: uint8 images [N,H,W,C] or [H,W,C], RGB, for one channel also [N,H,W] or [H,W]: resized and cut as `fitted` does, divided by 255, put into
            the order of the model's channels, then (x - mean) / std. Or float32 [N,*shape] or [*shape], taken as is; where `spec.raw` is set, they
            are values as the sensor gives them, and also become (x - mean) / std.
        spec: the model's input.
        out: where to put the result, float32 [N,*shape]; else it is new, or a view of a float32 `x`.

    Returns:
        float32 [N,*shape].

    Raises:
        InputError: as `batch_of`; resizing is needed and Pillow is not installed.
    """
    return convert(batch_of(x, spec)[0], spec, out)


def staged(x: NDArray[Any], spec: InputSpec) -> NDArray[np.float32]:
    """Frames as float32 [N,*shape] that an adapter takes for what they are: prepared, or where `spec.raw` is set as they came.

    Raises:
        InputError: as `prepare`.
    """
    return batch_of(x, spec)[0] if spec.raw else prepare(x, spec)


def convert(frames: NDArray[Any], spec: InputSpec, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """As `prepare`, for frames [N,...] that `batch_of` has checked."""
    if frames.dtype == np.float32:
        if out is None:
            return _scaled(frames.copy(), spec) if spec.raw else frames
        out[...] = frames
        return _scaled(out, spec) if spec.raw else out
    if out is None:
        out = np.empty((len(frames), *spec.shape), np.float32)
    order = slice(None, None, -1) if spec.order == "bgr" else slice(None)
    if frames.shape[1:3] != spec.shape[1:]:
        for frame, place in zip(frames, out):
            np.divide(fitted(frame, spec)[..., order].transpose(2, 0, 1), np.float32(255), out=place)
    else:
        np.divide(frames[..., order].transpose(0, 3, 1, 2), np.float32(255), out=out)
    return _scaled(out, spec)


def _scaled(x: NDArray[np.float32], spec: InputSpec) -> NDArray[np.float32]:
    """Less the mean and over the deviation of each channel, in place."""
    shape = (-1, *[1] * (len(spec.shape) - 1))
    if spec.mean is not None:
        x -= np.array(spec.mean, np.float32).reshape(shape)
    if spec.std is not None:
        x /= np.array(spec.std, np.float32).reshape(shape)
    return x


def batch_of(x: NDArray[Any], spec: InputSpec) -> tuple[NDArray[Any], bool]:
    """Checks frames against the model's input, without converting them.

    Returns:
        a view [N,...] of `x`, for images always [N,H,W,C], and whether `x` was one frame without N.

    Raises:
        InputError: another dtype than uint8 or float32, a shape that does not fit, no frames, or uint8 for an input that is no image or is raw.
    """
    if not isinstance(x, np.ndarray):
        raise InputError(f"frames are a numpy array, not {type(x).__name__}", "convert them with numpy.asarray")
    if x.dtype == np.float32:
        single = x.ndim <= len(spec.shape)
        frames = x[None] if single else x
        if frames.shape[1:] != spec.shape:
            wanted = format_shape(spec.shape)
            raise InputError(f"float32 frames are N x {wanted} or one frame {wanted}, not {format_shape(x.shape)}", _float_hint(x, spec))
    elif x.dtype == np.uint8:
        frames, single = _images(x, spec)
    elif spec.raw:
        raise InputError(f"frames are float32, not {x.dtype}", "convert them with .astype(numpy.float32), as the sensor gives them")
    else:
        raise InputError(f"frames are uint8 images or float32, not {x.dtype}", "convert them with .astype(numpy.float32), scaled as in training")
    if not len(frames):
        raise InputError("there are no frames in the batch", "give at least one")
    return frames, single


def _float_hint(x: NDArray[Any], spec: InputSpec) -> str:
    if len(spec.shape) == 3 and x.ndim in (3, 4) and x.shape[-1] == spec.shape[0]:
        return "channels come first in float32: x.transpose(0, 3, 1, 2) for a batch"
    if spec.hop is not None and x.ndim == 2 and x.shape[1] == spec.shape[0]:
        return "edgeadapt.preprocess.windows_of(x, spec) makes windows of samples"
    return "reshape or resize them; the manifest's input.shape is one frame"


def _images(x: NDArray[Any], spec: InputSpec) -> tuple[NDArray[Any], bool]:
    """uint8 frames as [N,H,W,C], and whether they came as one frame."""
    if len(spec.shape) != 3:
        hint = "as the sensor gives them" if spec.raw else "scaled as in training"
        raise InputError(f"uint8 is for images, but one frame of this model is {format_shape(spec.shape)}", f"give float32, {hint}")
    if spec.raw:
        raise InputError("frames are float32, not uint8: this bundle takes values as the sensor gives them", "convert them, channels first")
    channels, height, width = spec.shape
    if channels == 1 and (x.ndim == 2 or (x.ndim == 3 and x.shape[2] != 1)):
        x = x[..., None]  # grey frames without a channel axis
    single = x.ndim <= 3
    frames = x[None] if single else x
    if frames.ndim != 4 or frames.shape[3] != channels:
        first = frames.ndim == 4 and frames.shape[1] == channels
        raise InputError(
            f"uint8 images are N x H x W x {channels} or one H x W x {channels}, not {format_shape(x.shape)}",
            "channels come last in uint8: x.transpose(0, 2, 3, 1) for a batch" if first else f"convert them to {channels} channel(s)",
        )
    if 0 in frames.shape[1:]:
        raise InputError(f"images of {frames.shape[1]} x {frames.shape[2]} have no pixels", "check the camera")
    if spec.resize is None and frames.shape[1:3] != (height, width):
        if not spec.crop:
            raise InputError(
                f"images are {height} x {width}, not {frames.shape[1]} x {frames.shape[2]}; this bundle does not resize",
                "resize them, or export with resizing",
            )
        if frames.shape[1] < height or frames.shape[2] < width:
            raise InputError(
                f"images are at least {height} x {width}, not {frames.shape[1]} x {frames.shape[2]}; this bundle only cuts", "export with resizing"
            )
    return frames, single


def placed(height: int, width: int, spec: InputSpec) -> tuple[int, int, int, int]:
    """What becomes of an image of that size: the height and width it is resized to, then the top and left of what is cut out of it.

    As torchvision's Resize and CenterCrop have it, for a `resize` of two equal sides.
    """
    tall, wide = (height, width) if spec.resize is None else spec.resize
    if spec.fit == "cover":
        if tall * width >= wide * height:
            wide = tall * width // height
        else:
            tall = wide * height // width
    return tall, wide, round((tall - spec.shape[1]) / 2), round((wide - spec.shape[2]) / 2)


def fitted(frame: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.uint8]:
    """One image uint8 [H,W,C] in the input's size: resized by Pillow's bilinear filter, which smooths when it shrinks, and cut; uint8 [*shape[1:],C].

    Raises:
        InputError: Pillow is not installed, and it must be resized; or it is so narrow that an image which covers the input would be huge.
    """
    tall, wide, top, left = _placed(frame.shape[0], frame.shape[1], spec)
    if (tall, wide) != frame.shape[:2]:
        frame = resized(frame, tall, wide)
    return frame[top : top + spec.shape[1], left : left + spec.shape[2]]


def cut_out(image: Any, spec: InputSpec) -> NDArray[np.uint8]:
    """The same of an image of Pillow's, of mode L or RGB, without an array of it in its own size.

    Raises:
        InputError: it is too narrow.
    """
    tall, wide, top, left = _placed(image.height, image.width, spec)
    if (image.height, image.width) == spec.shape[1:]:
        tall, wide, top, left = image.height, image.width, 0, 0
    if (tall, wide) != (image.height, image.width):
        image = _resampled(image, tall, wide)
    found = np.asarray(image.crop((left, top, left + spec.shape[2], top + spec.shape[1])))
    return found[..., None] if found.ndim == 2 else found


def _placed(height: int, width: int, spec: InputSpec) -> tuple[int, int, int, int]:
    tall, wide, top, left = placed(height, width, spec)
    if tall * wide > max(_MOST, height * width):
        raise InputError(f"an image of {height} x {width} is too narrow: resized it would be {tall} x {wide}", "check the camera")
    return tall, wide, top, left


def resized(frame: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """One image uint8 [H,W,C] in another size, by Pillow's bilinear filter.

    Raises:
        InputError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise InputError(
            f"an image of {frame.shape[0]} x {frame.shape[1]} must be resized to {height} x {width}, which needs Pillow",
            "pip install edgeadapt[images], or give images in that size",
        ) from None
    frame = np.ascontiguousarray(frame)
    if frame.shape[2] == 3:
        return np.asarray(_resampled(Image.fromarray(frame), height, width))
    bands = [Image.fromarray(np.ascontiguousarray(frame[:, :, band])) for band in range(frame.shape[2])]
    return np.stack([np.asarray(_resampled(band, height, width)) for band in bands], axis=2)


def _resampled(image: Any, height: int, width: int) -> Any:
    from PIL.Image import Resampling

    return image.resize((width, height), Resampling.BILINEAR)


# ------------------------------------------------------------------------------------------------------------ samples


class Windows:
    """Samples of a sensor, as they come, made into windows: each the latest `shape[1]` samples, `hop` samples after the one before.

    Where samples are missing, begin with new ones: no window goes across the gap.

    Raises:
        InputError: the model takes no windows of samples.
    """

    def __init__(self, spec: InputSpec) -> None:
        self.channels, self.length, self.hop = _windowed(spec)
        self._held = np.zeros((0, self.channels), np.float32)
        self._skip = 0

    def push(self, samples: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """The windows float32 [C,L] that samples float32 [n,C] complete, each a new array."""
        skipped = min(self._skip, len(samples))
        self._skip -= skipped
        held = np.concatenate([self._held, samples[skipped:]])
        found = []
        while len(held) >= self.length:
            found.append(np.ascontiguousarray(held[: self.length].T))
            self._skip = max(0, self.hop - len(held))
            held = held[self.hop :]
        self._held = held
        return found

    def clear(self) -> None:
        """Forgets samples of no whole window: there is a gap."""
        self._held, self._skip = self._held[:0], 0


def windows_of(samples: NDArray[np.float32], spec: InputSpec) -> NDArray[np.float32]:
    """All windows [N,C,L] of a recording float32 [T,C], as `Windows` makes them; a view. N is 0 where it is shorter than one.

    Raises:
        InputError: as `Windows`.
    """
    channels, length, hop = _windowed(spec)
    if len(samples) < length:
        return np.zeros((0, channels, length), samples.dtype)
    return np.lib.stride_tricks.sliding_window_view(samples, length, axis=0)[::hop]


def _windowed(spec: InputSpec) -> tuple[int, int, int]:
    """Channels, length and hop."""
    if spec.hop is None or len(spec.shape) != 2:
        raise InputError(
            f"this bundle takes whole frames {format_shape(spec.shape)}, and no single samples", "send whole frames, or export with --hop"
        )
    return spec.shape[0], spec.shape[1], spec.hop


# ------------------------------------------------------------------------------------------------------------ the same everywhere


def fingerprint(spec: InputSpec) -> str:
    """A hash of what becomes of some images or samples that are the same everywhere: two machines with the same one prepare frames alike.

    Raises:
        InputError: Pillow is needed and not installed.
    """
    from edgeadapt.bundle.digest import sha256

    digest = sha256()
    for made in _probes(spec):
        digest.update(prepare(made, spec).tobytes())
    return digest.hexdigest()


def unlike(manifest: Manifest) -> str:
    """How frames are prepared otherwise here than where the bundle was exported, in words; "" if they are not, or the bundle does not say.

    Versions of Pillow may resize differently; all else is the same everywhere.
    """
    told = manifest.selfcheck.get(PREPROCESSING)
    if told is None or manifest.input.resize is None:
        return ""
    try:
        if told == fingerprint(manifest.input):
            return ""
    except InputError as reason:
        return reason.message
    from importlib.metadata import version

    return f"Pillow {version('pillow')} here makes other pixels of images than the one of this bundle's export, so it may predict differently"


def _probes(spec: InputSpec) -> list[NDArray[Any]]:
    if len(spec.shape) != 3 or spec.raw:
        count = int(np.prod(spec.shape))
        return [((np.arange(count, dtype=np.int64) * 7919 % 2003 - 1001).astype(np.float32) / np.float32(64)).reshape(spec.shape)]
    channels, height, width = spec.shape
    sizes = [(height, width)]
    if spec.resize is not None or spec.crop:
        sizes += [(max(height, height * tall // 40), max(width, width * wide // 40)) for tall, wide in _PROBE]
    return [_picture(tall, wide, channels) for tall, wide in sizes]


def _picture(height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """Edges, ramps and fine structure."""
    row, column, channel = np.ogrid[:height, :width, :channels]
    mixed = row * row + 3 * column * column + 5 * row * column + 31 * channel + 255 * ((row // 7 + column // 5) % 2)
    return (mixed % 256).astype(np.uint8)
