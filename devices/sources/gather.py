"""All frames of a source at once, for whoever needs them again and again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources.base import Source
from edgeadapt.errors import InputError, SourceError
from edgeadapt.preprocess import batch_of, fitted
from edgeadapt.units import format_shape


def gather(source: Source, spec: InputSpec) -> tuple[NDArray[Any], NDArray[np.int64], list[str]]:
    """A source's frames and labels.

    Args:
        source: it ends.
        spec: the model's input; images are brought to its size as they are read where the bundle does that.

    Returns:
        uint8 [N,H,W,C] or float32 [N,*spec.shape]; labels int64 [N] or [N,H,W], -1 for frames without; what was wrong with frames that were left out.

    Raises:
        SourceError: the source broke off or gave no frame that can be used.
        InputError: frames of several sizes that the bundle does not resize, or labels of several shapes.
    """
    frames, labels, faults = [], [], []
    for frame in source:
        if frame.pixels is None:
            faults.append(f"{frame.id} {frame.fault}")
            continue
        pixels = frame.pixels if frame.pixels.dtype != np.uint8 or frame.pixels.ndim != 2 else frame.pixels[..., None]
        if (spec.resize is not None or spec.crop) and pixels.dtype == np.uint8 and pixels.shape[:2] != spec.shape[1:]:
            pixels = fitted(batch_of(pixels, spec)[0][0], spec)  # now: all of them in full size may be more than there is memory
        frames.append(pixels)
        labels.append(-1 if frame.truth is None else frame.truth)
    if not frames:
        why = f"; the first: {faults[0]}" if faults else ""
        raise SourceError(f"{source.name} gave no frames that can be used{why}", "check that its files are images this machine can read")
    known = [np.shape(label) for label in labels if not isinstance(label, int) or label >= 0]
    shape = known[0] if known else ()
    for what, shapes in (("frames", {frame.shape for frame in frames}), ("labels", set(known))):
        if len(shapes) > 1:
            several = " and ".join(sorted(format_shape(one) for one in shapes)[:2])
            raise InputError(f"{source.name} holds {what} of several sizes, such as {several}", "give all in one size, or a bundle that resizes")
    filled = [np.full(shape, label) if np.shape(label) != shape else label for label in labels]
    return np.stack(frames), np.asarray(filled, np.int64), faults
