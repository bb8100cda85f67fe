"""What the HTTP server is given of a daemon: frames that are answered without the stream knowing, and whether all is well."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources import Frame
from edgeadapt.preprocess import batch_of
from edgeadapt.runtime.daemon.web.gives import Gives
from edgeadapt.runtime.lines import line
from edgeadapt.runtime.pressure import Level
from edgeadapt.runtime.stream import Prediction, decide

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.daemon import Daemon


def gives(daemon: Daemon) -> Gives:
    """All that it is given."""
    spec: InputSpec | None = None if daemon.model is None else daemon.model.adapter.manifest.input
    post = daemon.post if daemon.config.source.type == "http" else None
    render = daemon.measures.registry.render
    picture = daemon.config.memory.picture
    return Gives(daemon.asked.verbs, lambda: ready(daemon), render, lambda x: predict(daemon, x), post, daemon.events, spec, picture)


def ready(daemon: Daemon) -> list[str]:
    """Reasons why it is not; none: it is."""
    found = [daemon.why_safe] if daemon.why_safe else []
    complaint = daemon.reports.source()["complaint"]
    if complaint and complaint not in found:
        found.append(complaint)
    model = daemon.model
    if model is not None and model.adapter.level >= Level.PREDICT:
        found.append(f"memory is short: {model.adapter.memory['reason']}")
    return found


_numbers = itertools.count()


def predict(daemon: Daemon, x: NDArray[Any]) -> list[dict[str, Any]]:
    """Answers of frames uint8 [N,H,W,C] or float32 [N,*input.shape] by the model as it stands, which stays so.

    Raises:
        UsageError: there is no model.
        InputError: as `Adapter.predict`.
    """
    model = daemon.asked.model(adapting=False)
    frames, _ = batch_of(x, model.adapter.manifest.input)
    found = []
    for frame in frames:  # one by one, so that those of the stream have their turns between
        begun = time.perf_counter()
        if model.adapter.answering:
            logits = model.adapter.answer(frame)
        else:
            scalars = {} if model.guard is None else model.guard.scalars
            logits = model.adapter.predict(frame, update_statistics=False, **scalars)
        number = next(_numbers)
        answer = Prediction(number, Frame(number, None), logits, 1000 * (time.perf_counter() - begun), False)
        found.append(line(answer, decide(logits), model.adapter.manifest.task))
    return found
