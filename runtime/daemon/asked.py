"""What a daemon does when it is asked: its verbs, for the control socket, HTTP and MQTT alike. Called from any thread, several at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import Task
from edgeadapt.errors import StateError, UsageError
from edgeadapt.preprocess import staged
from edgeadapt.runtime.daemon import verbs as known
from edgeadapt.runtime.daemon.model import Model
from edgeadapt.runtime.daemon.seen import Answered
from edgeadapt.runtime.phases import Phase
from edgeadapt.runtime.state import Floats

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.daemon import Daemon

LOG = logging.getLogger("edgeadapt")

PUT_BACK = {
    "good": "the last good is put back",
    "marked": "what was marked good is put back",
    "start": "it is as it started: there is no last good",
}
"""What a roll-back says, by what is behind."""

_VALUES = 2**14  # of a frame that are shown as they are
_IDLE = 0.5  # seconds without an event after which it is seen whether who asked is still there


class Asked:
    """Of one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon, self._lock = daemon, threading.Lock()
        self._labelled: list[tuple[Floats, int]] = []
        self.verbs: dict[str, known.Function] = {
            "status": lambda given: daemon.reports.status(),
            "pause": self.pause,
            "resume": self.resume,
            "rollback": self.roll_back,
            "mark-good": self.mark_good,
            "label": self.label,
            "tail": self.tail,
            "reload": self.reload,
            "frame": self.frame,
        }

    def model(self, adapting: bool = True) -> Model:
        """The model.

        Raises:
            UsageError: there is none, or it does not adapt.
        """
        found = self._daemon.model
        if found is None:
            raise UsageError(f"there is no model: {self._daemon.why_safe}", "mend that, and restart or reload the daemon")
        if adapting and not found.adapts:
            why = found.reason or "the configuration says so: adapt.enabled = false"
            raise UsageError(f"the model only predicts: {why}", "mend that, and restart or reload the daemon")
        return found

    def _done(self, kind: str, text: str, given: Mapping[str, object]) -> dict[str, object]:
        why = given.get("reason")
        self._daemon.events.tell(kind, text + (f": {why}" if why else ""))
        return {"text": text}

    def pause(self, given: Mapping[str, object]) -> dict[str, object]:
        """No steps until `resume`."""
        model = self.model()
        if model.guard is not None:
            model.guard.pause()
        model.stream.resting = True
        return self._done("paused", "adaptation is paused", given)

    def resume(self, given: Mapping[str, object]) -> dict[str, object]:
        """Steps may be taken again."""
        model = self.model()
        model.stream.resting = False
        if model.guard is not None:
            model.guard.resume()
        return self._done("resumed", "adaptation goes on", given)

    def roll_back(self, given: Mapping[str, object]) -> dict[str, object]:
        """The last good is put back, or what the bundle began with."""
        model, to_start = self.model(), given.get("to") == "start"
        if model.guard is None:
            model.adapter.reset()
            text = "it is as the bundle began: without a guard there is no last good"
        elif to_start:
            model.guard.reset()
            text = "it is as the bundle began"
        else:
            model.guard.roll_back()
            text = PUT_BACK[model.guard.behind]
        fault = self._put_back(model.guard is None or to_start, model.guard is None or model.guard.behind != "good")
        return self._done("rolled back", text + _not_kept(fault), given)

    def _put_back(self, start: bool, alone: bool) -> str:
        """Has the disk go on from what was put back: the bundle's own start, or what is saved now. Gives why it does not; "" where it does.

        alone: neither may it go back to what was put away, once what was put back is there.
        """
        saving, store, fault = self._daemon.saving, self._daemon.store, ""
        if saving is None or store is None:
            return ""
        if start:
            try:
                store.roll_back(to_start=True)
            except StateError as reason:
                LOG.warning("%s", reason)
                fault = reason.message
        saving.wanted(always=True, alone=alone)
        return fault if start else saving.at_once()

    def mark_good(self, given: Mapping[str, object]) -> dict[str, object]:
        """What was learned is good: it is what is gone back to from now on, also by the next start."""
        daemon, model = self._daemon, self.model()
        if model.guard is not None:
            model.guard.mark_good()
        text = "what was learned is marked good"
        if daemon.saving is not None and daemon.store is not None:
            daemon.wants_save(always=True)
            fault = daemon.saving.at_once()
            if not fault:
                try:
                    daemon.store.mark_good()
                except StateError as reason:
                    fault = reason.message
            text += _not_kept(fault)
        return self._done("marked good", text, given)

    def label(self, given: Mapping[str, object]) -> dict[str, object]:
        """Somebody says of what class a frame is: it counts how often that was known, and is learned from where the bundle can."""
        daemon, model = self._daemon, self.model(adapting=False)
        task = model.adapter.manifest.task
        if task.kind != "classification":
            raise UsageError("this model says a class for every place of a frame, not one for all of it", "label frames of models that classify")
        frame, label = self._frame(given), _class(given["label"], task)
        right = frame.line.get("label") == label
        daemon.seen.label(right)
        shown = task.names[label] if task.names is not None else str(label)
        text = f"frame {frame.id} is {shown}, " + ("as predicted" if right else f"not {frame.line.get('name') or frame.line['label']}")
        daemon.events.tell("label", text, {"frame": frame.id, "label": label, "predicted": frame.line.get("label")})
        return {"text": text + self._learned(model, frame, label), "right": right}

    def _learned(self, model: Model, frame: Answered, label: int) -> str:
        """Learns from labels once there are as many as a step takes; says what came of it."""
        sizes = model.adapter.batches["learn"]
        if not model.adapts or not sizes or model.guard is None or self.paused:
            return ""
        size = min(sizes)
        with self._lock:
            self._labelled.append((staged(frame.pixels, model.adapter.manifest.input)[0], label))
            if len(self._labelled) < size:
                return f"; {size - len(self._labelled)} more labels are learned from together"
            taken, self._labelled = self._labelled[:size], self._labelled[size:]
        x, y = np.stack([pixels for pixels, _ in taken]), np.array([known for _, known in taken])
        with self._daemon.stepping():
            steps = model.guard.learn(x, y)
        return f"; learned from {size} labels" if steps else f"; {size} labels could not be learned from now"

    def tail(self, given: Mapping[str, object]) -> Iterator[object]:
        """What happens, as it happens."""
        events, predictions = given.get("events", True), given.get("predictions", True)
        count = given.get("count")
        return self._tail(bool(events), bool(predictions), count if isinstance(count, int) else None)

    def _tail(self, events: bool, predictions: bool, count: int | None) -> Iterator[object]:
        told = 0
        kinds, without = None if events else {known.PREDICTION}, set() if predictions else {known.PREDICTION}
        for event in self._daemon.events.subscribe(kinds, without=without).each(_IDLE):
            yield None if event is None else event.plain()
            told += event is not None
            if count is not None and told >= count:
                return

    def reload(self, given: Mapping[str, object]) -> dict[str, object]:
        """The configuration is read again."""
        self._daemon.reload()
        return self._done("reload", "the configuration is read again", given)

    def frame(self, given: Mapping[str, object]) -> dict[str, object]:
        """A frame's picture, or its values."""
        from base64 import b64encode

        frame = self._frame(given)
        head = {"id": frame.id, "index": frame.index, "prediction": dict(frame.line)}
        pixels, every = _looked_at(frame.pixels)
        if pixels.dtype != np.uint8:
            return {**head, "values": pixels.tolist(), "every": every}
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        return {**head, "shape": list(pixels.shape), "pixels": b64encode(pixels.tobytes()).decode()}

    def _frame(self, given: Mapping[str, object]) -> Answered:
        name: Any = given.get("frame")
        found = self._daemon.seen.frame(name)
        if found is None:
            which = "no frame was answered yet" if name is None else f"frame {name!r} is not among the latest ones"
            raise UsageError(which, "edgeadapt tail --predictions shows the ids of frames as they come")
        return found

    @property
    def paused(self) -> bool:
        """Whether adaptation is paused by hand."""
        model = self._daemon.model
        return model is not None and (model.stream.resting or (model.guard is not None and model.guard.phase is Phase.PAUSED))


def _not_kept(fault: str) -> str:
    return f", but not on the disk: {fault}" if fault else ""


def _looked_at(values: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """A frame as it is shown: many floats of a picture [1|3,H,W] in 8 bits [H,W,1|3] from the least to the most, of others every so many a row."""
    if values.dtype == np.uint8 or values.size <= _VALUES:
        return values, 1
    if values.ndim == 3 and values.shape[0] in (1, 3):
        finite = np.nan_to_num(values, posinf=0.0, neginf=0.0)
        low = finite.min()
        return np.moveaxis((finite - low) * (255 / max(finite.max() - low, 1e-12)), 0, -1).astype(np.uint8), 1
    every = -(-values.size // _VALUES)
    return values[..., ::every], every


def _class(value: object, task: Task) -> int:
    if isinstance(value, str) and task.names is not None and value in task.names:
        return task.names.index(value)
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if isinstance(number, int) and 0 <= number < task.classes:
        return number
    names = f" or a name: {', '.join(task.names[:8])}{', …' if len(task.names) > 8 else ''}" if task.names is not None else ""
    raise UsageError(f"{value!r} is no class of this model", f"give a number from 0 to {task.classes - 1}{names}")
