"""The daemon on MQTT: it tells a broker how it is, what it predicts and what happens, and does what it is asked over it. docs/mqtt.md is for users.

Four parts: `link` holds the connection, `requests` answers, `discovery` is what Home Assistant is told, and this module decides what is published and
when. That is done in `Mqtt.turn`, in a thread of its own, and nothing of the daemon waits for it.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from edgeadapt.runtime.daemon import discovery
from edgeadapt.runtime.daemon.config import MqttConfig
from edgeadapt.runtime.daemon.events import LOST, Event, Events, Subscription
from edgeadapt.runtime.daemon.link import PAUSES, Link
from edgeadapt.runtime.daemon.plain import as_json, one_line
from edgeadapt.runtime.daemon.requests import LONGEST, Requests
from edgeadapt.runtime.daemon.status import Status
from edgeadapt.runtime.daemon.verbs import PREDICTION, Function

LOG = logging.getLogger("edgeadapt")

ONLINE, STOPPED, OFFLINE = "online", "stopped", "offline"
"""What the state says: there; ended as it should; gone without a word, which the broker says then."""

HEALTH, LOOK, PREDICTIONS = 60.0, 2.0, 0.2
"""Seconds between two messages of health at most, between two looks at the status, and between two predictions at least."""

KEPT = 256
"""Events that wait for a broker; then the oldest are lost."""

_LISTENING, _SPARE, _VERB = 1024, 8, 64  # events between two turns; messages that events leave to responses; letters of a verb
_SPREAD = 3.0  # seconds within which devices announce themselves again, so that not all do at once
_SETTLED = 5.0  # after an announcement Home Assistant takes a moment to listen; then health is told again


@dataclass(frozen=True)
class Topic:
    """A topic below BASE/NAME/: who publishes there, with which quality of service, whether it is retained, and what it carries."""

    by: str
    qos: int
    retained: bool
    carries: str


TOPICS: Mapping[str, Topic] = {
    "state": Topic("device", 1, True, "`online`, `stopped` (ended as it should) or `offline` (gone; the last will)"),
    "info": Topic("device", 1, True, "`version`, `bundle`, `digest`, `method`, `classes`"),
    "health": Topic("device", 0, False, "every minute and at changes: `state`, `shift`, `paused`, `memory`, `temperature`, `per_second` and more"),
    "prediction": Topic("device", 0, False, "the newest, at most five a second: `number`, `time`, `kind`, `text`, `facts`"),
    "event": Topic("device", 1, False, "what happened: `number`, `time`, `kind`, `text`, `facts`"),
    "request/VERB": Topic("others", 1, False, "the verb's parameters, and `transaction`"),
    "response/VERB": Topic("device", 1, False, "`status`: `ok` with `data`, or `error` with `error`, `hint`, `code`; `transaction`"),
    "set/pause": Topic("others", 1, False, "`ON` pauses adaptation, `OFF` lets it go on; answered at `response/pause` and `response/resume`"),
}
"""All topics."""


class Mqtt:
    """The daemon's side of MQTT.

    Args:
        settings: enabled, with a host.
        name: the device's.
        verbs: what can be asked, by name; all but `requests.LEFT_OUT`. Called from a thread of its own.
        events: what is told of as it happens.
        status: how the daemon is; called from `turn`.
        classes: names of what the served bundle predicts, if it has some; called from `turn`.
        every: seconds between two turns.
        clock: monotonic seconds.
        pauses: seconds between attempts to connect, see `link.PAUSES`.

    Attributes:
        dropped: events that no broker took in time.

    Raises:
        UsageError: paho-mqtt is missing, the host is no name, or a file with a password or certificates cannot be used.
    """

    def __init__(
        self,
        settings: MqttConfig,
        name: str,
        verbs: Mapping[str, Function],
        events: Events,
        status: Callable[[], Status],
        classes: Callable[[], Sequence[str]] = tuple,
        *,
        every: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
        pauses: tuple[float, float] = PAUSES,
    ) -> None:
        self._settings, self._name, self._events, self._status, self._classes, self._clock = settings, name, events, status, classes, clock
        self._root = f"{settings.base}/{name}"
        self._identity = f"{settings.base}-{name}".replace("/", "-").replace(".", "_")
        self._announced_at, self._born_at = discovery.topic(settings.discovery_prefix, self._identity), f"{settings.discovery_prefix}/status"
        self._every, self._ending, self._turning = every, threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._subscription: Subscription | None = None
        self._waiting: deque[Event] = deque(maxlen=KEPT)
        self._newest: Event | None = None
        self._predicted = self._looked = self._health_next = -math.inf
        self._due: dict[str, str] = {}  # retained messages that are to be sent, by topic
        self._info = self._health = ""
        self._marks: tuple[object, ...] = ()
        self._announce_at, self._hurried, self._withdraws = math.inf, False, False  # set by other threads
        self._failed, self.dropped, self._ignored = False, 0, 0
        topics = [f"{self._root}/request/+", *([self._born_at, f"{self._root}/set/pause"] if settings.discovery else [self._announced_at])]
        self._requests = Requests(verbs, self._reply, self._hurry, clock)
        self._link = Link(settings, self._identity, (f"{self._root}/state", OFFLINE), topics, self._received, self._connected, pauses)

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._link.connected

    @property
    def complaint(self) -> str:
        """Why there is no connection; "" while there is."""
        return self._link.complaint

    def start(self) -> None:
        """Begins to connect, and to answer. Waits for nothing."""
        self._subscription = self._events.subscribe(limit=_LISTENING, without=() if self._settings.predictions else {PREDICTION})
        self._requests.start()
        self._link.start()
        self._thread = threading.Thread(target=self._work, name="mqtt", daemon=True)
        self._thread.start()

    def turn(self) -> None:
        """Publishes what is to be published now. Never waits for the broker. Its own thread calls this; others may too."""
        with self._turning:
            self._turn()

    def close(self) -> None:
        """Says that it has stopped, if there is a broker to hear it, and ends; takes five seconds at most. A second close does nothing."""
        if self._subscription is None or self._thread is None:
            return
        self._ending.set()
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._tried()  # what is left to say
        self._subscription.close()
        self._subscription = None
        self._requests.close()
        self._link.close(f"{self._root}/state", STOPPED)

    def __enter__(self) -> Mqtt:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _work(self) -> None:
        while not self._ending.wait(self._every):
            self._tried()

    def _tried(self) -> None:
        try:
            self.turn()
        except Exception as reason:  # what is told of has a defect; the next time it may go well
            if not self._failed:
                LOG.exception("mqtt: nothing could be published: %r", reason)
            self._failed = True

    def _turn(self) -> None:
        self._gather()
        if not self._link.connected:
            self._newest = None  # it would be old when it is sent
            return
        now = self._clock()
        announces = now >= self._announce_at
        if announces or self._hurried or now - self._looked >= LOOK:
            self._look(now, announces)
        if self._withdraws:
            self._due[self._announced_at], self._withdraws = "", False
        for topic, payload in list(self._due.items()):
            if not self._link.send(topic, payload, retain=True):
                return
            del self._due[topic]
        self._tell(now)

    def _gather(self) -> None:
        if self._subscription is None:
            return
        for _ in range(_LISTENING):
            event = self._subscription.take(0)
            if event is None:
                return
            if event.kind == PREDICTION:
                self._newest = event
            elif event.kind != LOST:
                self.dropped += len(self._waiting) == KEPT
                self._waiting.append(event)

    def _look(self, now: float, announces: bool) -> None:
        self._looked, self._hurried = now, False
        status = self._status()
        if announces:
            self._announce_at = math.inf
            self._due.clear()
            if self._settings.discovery:
                self._due[self._announced_at] = discovery.announcement(self._root, self._identity, self._name, status["board"]["model"])
            self._due[f"{self._root}/state"] = ONLINE
            self._info = ""
        info = as_json(info_of(status, self._classes()))
        if info != self._info:
            self._info = self._due[f"{self._root}/info"] = info
        told = health_of(status)
        marks = tuple(told[key] for key in _MARKS)
        if announces or now >= self._health_next or marks != self._marks:
            counts = {"requests": self._requests.count, "dropped": self.dropped, "connections": self._link.connections}
            self._health, self._marks = as_json({**told, "mqtt": counts}), marks
            self._health_next = now + (_SETTLED if announces and self._settings.discovery else HEALTH)

    def _tell(self, now: float) -> None:
        while self._waiting and self._link.room > _SPARE and self._link.send(f"{self._root}/event", _event(self._waiting[0])):
            self._waiting.popleft()
        if self._health and self._newly(f"{self._root}/health", self._health):
            self._health = ""
        if self._newest is not None and now - self._predicted >= PREDICTIONS and self._newly(f"{self._root}/prediction", _event(self._newest)):
            self._newest, self._predicted = None, now

    def _newly(self, topic: str, payload: str) -> bool:
        return not self._link.waits(topic) and self._link.send(topic, payload, qos=0)

    def _hurry(self) -> None:
        self._hurried = True

    def _connected(self) -> None:
        self._announce_at = -math.inf

    def _reply(self, verb: str, response: str) -> None:
        self._link.send(f"{self._root}/response/{verb}", response)

    def _received(self, topic: str, payload: bytes, retained: bool) -> None:
        if topic == self._announced_at:
            self._withdraws = bool(payload) and not self._settings.discovery and discovery.is_ours(payload, self._identity)
        elif topic == self._born_at:
            if payload == ONLINE.encode() and not retained:
                self._announce_at = self._clock() + random.uniform(0, _SPREAD)
        elif retained:  # it would be repeated whenever we connect
            if not self._ignored:
                LOG.warning("mqtt: a retained request at %s is ignored, and all others: send them without that flag", one_line(topic, 100))
            self._ignored += 1
        elif topic == f"{self._root}/set/pause":
            if payload in (discovery.ON.encode(), discovery.OFF.encode()):
                self._requests.offer("pause" if payload == discovery.ON.encode() else "resume", b"")
        else:
            verb = topic.removeprefix(f"{self._root}/request/")
            if 0 < len(verb) <= _VERB and "/" not in verb:
                self._requests.offer(verb, payload)


def info_of(status: Status, classes: Sequence[str]) -> dict[str, object]:
    """What the topic info carries; what is longer than a message may be is left out."""
    bundle = status["bundle"]
    info: dict[str, object] = {
        "version": status["edgeadapt"],
        "bundle": bundle and bundle["name"],
        "digest": bundle and bundle["digest"],
        "method": bundle and bundle["method"],
        "classes": list(classes),
    }
    return info if len(as_json(info)) <= LONGEST else {**info, "classes": []}


def health_of(status: Status) -> dict[str, object]:
    """What the topic health carries. Sizes are in bytes, times in seconds, temperature in °C."""
    guard, memory, source, predictions = status["guard"], status["memory"], status["source"], status["predictions"]
    serving = guard["state"] if guard else "serving"
    return {
        "state": serving if status["mode"] == "serving" else status["mode"],
        "mode": status["mode"],
        "reason": status["reason"],
        "uptime": round(status["uptime_s"], 1),
        "paused": status["adaptation"]["paused"],
        "steps": status["adaptation"]["steps"],
        "shift": guard and guard["shift"],
        "memory": memory["resident"],
        "memory_budget": memory["budget"],
        "memory_level": memory["level"],
        "temperature": status["board"]["temperature_c"],
        "throttled": status["board"]["throttled"],
        "per_second": predictions["per_second"],
        "predictions": predictions["count"],
        "bad": predictions["bad"],
        "queue_dropped": status["queue"]["dropped"],
        "source_live": source["live"],
        "source_complaint": source["complaint"],
        "on_probation": status["state"]["on_probation"],
    }


_MARKS = ("state", "mode", "paused", "memory_level", "source_live", "on_probation")  # health is told again when one of them changes


def _event(event: Event) -> str:
    text = as_json(event.plain())
    return text if len(text) <= LONGEST else as_json({**event.plain(), "text": one_line(event.text, 1000), "facts": {}})
