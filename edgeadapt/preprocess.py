"""Frames as cameras and sensors give them, made into what the graphs take: one function, used on the device and by the exporter alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.manifest import InputSpec
from edgeadapt.errors import InputError
from edgeadapt.units import format_shape


def prepare(x: NDArray[Any], spec: InputSpec, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Frames as a float32 batch, channels first.

    Args:
        x: uint8 images [N,H,W,C] or [H,W,C], for one channel also [N,H,W] or [H,W]: resized where `spec.resize` says so, divided by 255,
            then (x - mean) / std. Or float32 [N,*shape] or [*shape], taken as is.
        spec: the model's input.
        out: where to put the result, float32 [N,*shape]; else it is new, or a view of a float32 `x`.

    Returns:
        float32 [N,*shape]. Resizing is Pillow's bilinear filter, with antialiasing when it shrinks, rounded to uint8.

    Raises:
        InputError: as `batch_of`; resizing is needed and Pillow is not installed.
    """
    return convert(batch_of(x, spec)[0], spec, out)


def convert(frames: NDArray[Any], spec: InputSpec, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """As `prepare`, for frames [N,...] that `batch_of` has checked."""
    if frames.dtype == np.float32:
        if out is None:
            return frames
        out[...] = frames
        return out
    if out is None:
        out = np.empty((len(frames), *spec.shape), np.float32)
    if frames.shape[1:3] != spec.shape[1:]:
        for frame, place in zip(frames, out):
            np.divide(resized(frame, spec.shape[1], spec.shape[2]).transpose(2, 0, 1), np.float32(255), out=place)
    else:
        np.divide(frames.transpose(0, 3, 1, 2), np.float32(255), out=out)
    if spec.mean is not None:
        out -= np.array(spec.mean, np.float32)[:, None, None]
    if spec.std is not None:
        out /= np.array(spec.std, np.float32)[:, None, None]
    return out


def batch_of(x: NDArray[Any], spec: InputSpec) -> tuple[NDArray[Any], bool]:
    """Checks frames against the model's input, without converting them.

    Returns:
        a view [N,...] of `x`, for images always [N,H,W,C], and whether `x` was one frame without N.

    Raises:
        InputError: another dtype than uint8 or float32, a shape that does not fit, no frames, or uint8 for an input that is no image.
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
    else:
        raise InputError(f"frames are uint8 images or float32, not {x.dtype}", "convert them with .astype(numpy.float32), scaled as in training")
    if not len(frames):
        raise InputError("there are no frames in the batch", "give at least one")
    return frames, single


def _float_hint(x: NDArray[Any], spec: InputSpec) -> str:
    if len(spec.shape) == 3 and x.ndim in (3, 4) and x.shape[-1] == spec.shape[0]:
        return "channels come first in float32: x.transpose(0, 3, 1, 2) for a batch"
    return "reshape or resize them; the manifest's input.shape is one frame"


def _images(x: NDArray[Any], spec: InputSpec) -> tuple[NDArray[Any], bool]:
    """uint8 frames as [N,H,W,C], and whether they came as one frame."""
    if len(spec.shape) != 3:
        raise InputError(f"uint8 is for images, but one frame of this model is {format_shape(spec.shape)}", "give float32, scaled as in training")
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
    if spec.resize is None and frames.shape[1:3] != (height, width):
        raise InputError(
            f"images are {height} x {width}, not {frames.shape[1]} x {frames.shape[2]}; this bundle does not resize",
            "resize them, or export with resizing",
        )
    if 0 in frames.shape[1:]:
        raise InputError(f"images of {frames.shape[1]} x {frames.shape[2]} have no pixels", "check the camera")
    return frames, single


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
        return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
    bands = [Image.fromarray(np.ascontiguousarray(frame[:, :, band])) for band in range(frame.shape[2])]
    return np.stack([np.asarray(band.resize((width, height), Image.Resampling.BILINEAR)) for band in bands], axis=2)
