"""Frames and parameters out of the bodies of requests. Nothing in them is believed before it was counted."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources import fitting, pictures
from edgeadapt.devices.sources.arrays import Reader, frames_shape
from edgeadapt.devices.sources.base import PictureTooLarge
from edgeadapt.errors import InputError
from edgeadapt.preprocess import batch_of
from edgeadapt.runtime.daemon.plain import one_line
from edgeadapt.runtime.daemon.web.refusals import Refusal
from edgeadapt.units import format_bytes, format_shape

FRAMES, JSON_BYTES = 64, 2**21
"""Frames of one request, and bytes of JSON, at most: numbers take many times as much as Python's."""

_NUMPY = b"\x93NUMPY"
_KINDS = 'send an image file, an array as numpy.save writes it, or JSON {"x": numbers}'


def frames_in(body: bytes, kind: str, spec: InputSpec, most: int, together: float = math.inf) -> tuple[NDArray[Any], object]:
    """The frames in a body: an image file, a numpy array, or JSON {"x": …, "label": …}.

    Args:
        body: as it came; what it is shows in its first bytes.
        kind: its Content-Type; "application/json" is believed.
        spec: what the bundle takes.
        most: bytes that reading one picture may take; see `Wanted.picture`.
        together: bytes that several frames may take as they are returned, which one may always.

    Returns:
        uint8 [N,H,W,C], H x W being the input's own, or float32 [N,*shape], N from 1 to `FRAMES`; and the label given with JSON, None without.

    Raises:
        Refusal: it is empty, or JSON that is too long, or a picture or several frames that are too large.
        InputError, SourceError: it cannot be read, or is not what the model takes.
    """
    if not body:
        raise Refusal(HTTPStatus.BAD_REQUEST, "the request has no body", _KINDS)
    label = None
    if body.startswith(_NUMPY):
        frames = _array(body, spec, most)
    elif kind == "application/json" or body.lstrip()[:1] in (b"{", b"["):
        frames, label = _numbers(body, spec)
    else:
        frames = _picture(body, spec, most)
    frames = batch_of(frames, spec)[0]
    if len(frames) > FRAMES:
        raise _too_many(len(frames))
    if len(frames) > 1 and frames.nbytes > together:
        message = f"{len(frames)} frames of this model take {format_bytes(frames.nbytes)}, and only {format_bytes(int(together))} may wait"
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, f"send at most {max(1, int(together) // frames[0].nbytes)} at once")
    return frames, label


def json_in(body: bytes) -> object:
    """What a body says in JSON; None for an empty one.

    Raises:
        Refusal: it is too long, or no JSON.
    """
    if len(body) > JSON_BYTES:
        message = f"JSON of {len(body)} bytes is too long"
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, f"send at most {JSON_BYTES}, or an array as numpy.save writes it")
    if not body.strip():
        return None
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as reason:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {one_line(str(reason), 200)}", 'send such as {"x": [0.5, 1.0]}') from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _numbers(body: bytes, spec: InputSpec) -> tuple[NDArray[np.float32], object]:
    given = json_in(body)
    if not isinstance(given, Mapping) or "x" not in given:
        raise InputError("the JSON has no x", 'send {"x": the numbers of one or more frames}')
    try:
        found = np.asarray(given["x"])
        if found.dtype.kind not in "iuf":
            raise ValueError
    except (ValueError, RecursionError, OverflowError):
        raise InputError("x is no number, list of numbers, or lists of equal length of them", _KINDS) from None
    with np.errstate(over="ignore"):
        x = found.astype(np.float32)
    if not np.isfinite(x).all():
        raise InputError("x has numbers that float32 cannot hold", "send numbers below 3e38")
    size = math.prod(spec.shape)
    if x.ndim == 1 and x.size == size:  # side by side, as in lines of a source
        x = x.reshape(spec.shape)
    return x, given.get("label")


def _array(body: bytes, spec: InputSpec, most: int) -> NDArray[Any]:
    file = io.BytesIO(body)
    reader = Reader(file, "the body")
    shape, _ = frames_shape(reader.shape, reader.dtype, spec)
    held, wanted = len(body) - file.tell(), reader.dtype.itemsize * math.prod(shape)
    if held != wanted:
        raise InputError(f"the array in the body has {held} bytes, and says that it has {wanted}", "send the whole file that numpy.save wrote")
    if shape[0] > FRAMES:
        raise _too_many(shape[0])
    try:
        fitting.check_array(shape[1:], reader.dtype, spec, most)
    except PictureTooLarge as reason:
        raise _too_large("a frame of the array", reason) from None
    found = np.frombuffer(reader.take(wanted, "the array"), reader.dtype).reshape(shape).astype(reader.dtype.newbyteorder("="), copy=False)
    return found if found.dtype != np.uint8 or shape[1:3] == spec.shape[1:] else np.stack([fitting.array(frame, spec) for frame in found])


def _too_large(what: str, reason: PictureTooLarge) -> Refusal:
    return Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{what} {reason.message}", reason.hint)


def _too_many(frames: int) -> InputError:
    return InputError(f"{frames} frames are more than one request may bring", f"send at most {FRAMES} at once")


def _picture(body: bytes, spec: InputSpec, most: int) -> NDArray[np.uint8]:
    if len(spec.shape) != 3 or spec.shape[0] not in (1, 3):
        raise InputError(f"the body is neither JSON nor a numpy array, and a frame {format_shape(spec.shape)} is no image", _KINDS)
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise InputError("reading image files needs Pillow, which is not on this device", "pip install edgeadapt[images]; or send an array") from None
    try:
        return pictures.bounded(io.BytesIO(body), spec, most)
    except PictureTooLarge as reason:
        raise _too_large("the body", reason) from None
    except InputError as reason:
        raise InputError(f"the body {reason.message}", reason.hint or _KINDS) from None
