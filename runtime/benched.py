"""A process that serves one row of the bench: frames come over standard input when it asks for them, answers go to standard output.

`edgeadapt.bench.child` starts it with a setting as JSON. What it holds is what a device holds that serves the same bundle with the same setting.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bench.setting import ADAPT, SINGLE, SOURCE, Setting
from edgeadapt.bench.wire import receive, send
from edgeadapt.bundle import Bundle
from edgeadapt.devices.sources import Frame
from edgeadapt.errors import EdgeAdaptError
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.guard import Guard
from edgeadapt.runtime.guarded import guarding_bytes
from edgeadapt.runtime.prepared import find
from edgeadapt.runtime.state import Floats
from edgeadapt.runtime.stream import Prediction, Stream


def serve(setting: Setting, take: BinaryIO, give: BinaryIO) -> None:
    """Serves until there are no more frames.

    Raises:
        EdgeAdaptError: the bundle cannot be opened with this setting.
    """

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        send(give, "progress", {"stage": stage, "done": done, "total": total, "note": note})

    roles = {ADAPT: "adapt", SINGLE: "adapt", SOURCE: "source"}.get(setting.mode, "predict")
    used: dict[str, Any] = {"roles": roles, "batches": [setting.batch], "prepared": setting.prepared}
    if setting.guard and setting.budget is not None:
        used["slack"] = guarding_bytes(Bundle.open(setting.path, verify=False).manifest)
    with Adapter.open(setting.path, setting.budget, setting.threads, prepare=progress if setting.prepare else None, **used) as adapter:
        adapter.hyper = dict(setting.hyper or {})
        guard = Guard(adapter) if setting.guard else None
        served = windows(adapter, setting, _frames(take, give), guard)  # refused here, not with the first frame
        names = adapter.memory["graphs"]
        if setting.prepare:
            send(give, "facts", {"exported": exported(adapter.bundle, names, setting)})
            return
        for window in served:
            for one in window:
                send(give, "answer", {"milliseconds": one.milliseconds, "adapted": one.adapted}, one.logits)
        memory = adapter.memory
        told = {name: memory[name] for name in ("budget", "planned", "missing", "graphs")}
        changes = [str(change) for change in adapter.changes]
        facts = {"peak_bytes": memory["peak"], "counters": adapter.stats, "memory": told, "changes": changes}
        facts |= {} if guard is None else {"verdicts": [verdict.plain() for verdict in guard.verdicts]}
    send(give, "facts", {**facts, "exported": exported(adapter.bundle, names, setting)})


def exported(bundle: Bundle, names: Sequence[str], setting: Setting) -> list[str]:
    """Of the graphs that are served those that should run as prepared for this machine, and could not be prepared."""
    if not setting.prepared:
        return []
    ready = find(bundle, setting.threads)
    known = {} if ready is None else ready.record["graphs"]
    return [name for name in names if name not in known or not known[name]["versions"]]


def _frames(take: BinaryIO, give: BinaryIO) -> Iterator[Frame]:
    index = 0
    while True:
        send(give, "next")
        message = receive(take)
        if message is None or message[2] is None:
            return
        yield Frame(index, message[2])
        index += 1


def windows(adapter: Adapter, setting: Setting, frames: Iterator[Frame], guard: Guard | None = None) -> Iterator[list[Prediction]]:
    """Predictions as a setting asks for them, in the frames' order, one list a window; what is left at the end is predicted.

    Raises:
        UsageError: the adapter cannot adapt on windows of that size.
    """
    if setting.mode in (ADAPT, SINGLE):
        return Stream(adapter, window=setting.batch, single=setting.mode == SINGLE, guard=guard).run(frames)
    answer = adapter.source if setting.mode == SOURCE else partial(adapter.predict, update_statistics=False)
    return _still(answer, setting.batch, frames)


def _still(answer: Callable[[NDArray[Any]], Floats], batch: int, frames: Iterator[Frame]) -> Iterator[list[Prediction]]:
    """Windows through a model that stays as it is, whatever batches of it are loaded."""
    waiting: list[Frame] = []
    for frame in frames:
        waiting.append(frame)
        if len(waiting) == batch:
            yield _through(answer, waiting)
            waiting = []
    if waiting:
        yield _through(answer, waiting)


def _through(answer: Callable[[NDArray[Any]], Floats], waiting: list[Frame]) -> list[Prediction]:
    begin = time.perf_counter()
    logits = answer(np.stack([frame.pixels for frame in waiting if frame.pixels is not None]))
    each = 1000 * (time.perf_counter() - begin) / len(waiting)
    return [Prediction(int(frame.id), Frame(frame.id, None), one, each, False) for frame, one in zip(waiting, logits)]


def main(arguments: list[str]) -> int:
    """Serves; what goes wrong is told to the other side."""
    # whatever else in this process prints goes to standard error
    give = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(Setting(**json.loads(arguments[0])), sys.stdin.buffer, give)
    except EdgeAdaptError as error:
        send(give, "error", {"code": error.exit_code, "message": error.message, "hint": error.hint})
        return error.exit_code
    except BrokenPipeError:  # the bench has gone
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
