"""What the daemon's core hands to its HTTP server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources.base import Frame
from edgeadapt.runtime.daemon.events import Events
from edgeadapt.runtime.daemon.verbs import Function

PICTURE = 24 * 2**20
"""Bytes; see there."""


@dataclass(frozen=True)
class Gives:
    """Functions that are called from the threads of requests, several at once. What they raise as an EdgeAdaptError is told to who asked.

    Attributes:
        verbs: by name; see `verbs.VERBS`. "frame" gives a picture as said there, or, where frames are no pictures, the same with "values" in place
            of "shape" and "pixels": the frame's numbers as lists, [C][L] for windows of samples.
        ready: reasons why the daemon is not ready; none: it is.
        metrics: the text for Prometheus.
        predict: frames uint8 [N,H,W,C] or float32 [N,*input.shape] -> one mapping a frame, as `edgeadapt run` prints them. Changes nothing.
        post: takes a frame of the source "http"; None: the source is another one.
        events: what happens. Predictions have the kind "prediction" and as `facts` what `edgeadapt run` prints; perhaps "without", the same of the
            model as it was exported: {"label", "name", "confidence"}.
        input: of the bundle; None: none is served.
        picture: the most bytes that reading one picture may take.
    """

    verbs: Mapping[str, Function]
    ready: Callable[[], list[str]]
    metrics: Callable[[], bytes]
    predict: Callable[[NDArray[Any]], list[dict[str, Any]]]
    post: Callable[[Frame], None] | None
    events: Events
    input: InputSpec | None
    picture: int = PICTURE
