"""What happens, as server-sent events: a few clients at most, none of which holds up the daemon."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http import HTTPStatus

from edgeadapt.errors import EdgeAdaptError
from edgeadapt.runtime.daemon.events import Event
from edgeadapt.runtime.daemon.plain import as_json
from edgeadapt.runtime.daemon.verbs import PREDICTION
from edgeadapt.runtime.daemon.web.gives import Gives
from edgeadapt.runtime.daemon.web.refusals import Refusal

CLIENTS = 8
"""Streams at once, at most."""

BEAT, EVERY, APART = 5.0, 1.0, 0.2
"""Seconds: between two signs of life, between two statuses, and between two predictions where only the latest are asked for."""

_STEP = 0.1


class Live:
    """Makes streams of events.

    Args:
        gives: its events, and the verb "status".
        clients: streams at once, at most.
        beat: seconds between two signs of life where nothing happens.
    """

    def __init__(self, gives: Gives, clients: int = CLIENTS, beat: float = BEAT) -> None:
        self._gives, self._beat = gives, beat
        self._places = threading.BoundedSemaphore(clients)
        self._clients = clients

    def stream(self, status: bool, predictions: bool, latest: bool) -> Iterator[bytes | None]:
        """Server-sent events of the kinds "event", "prediction" and "status", data in JSON, until it is closed. None where there is nothing to send.

        Args:
            status: whether the status is sent every second too, and at once to begin with.
            predictions: whether predictions are.
            latest: whether predictions may be left out where they come faster than a person can look.

        Raises:
            Refusal: there are enough already.
        """
        if not self._places.acquire(blocking=False):
            message = f"{self._clients} streams of events are open already"
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, "close a page, or ask for /status.json now and then", {"Retry-After": "10"})
        return _Stream(self._places, self._told(status, predictions, latest))

    def _told(self, status: bool, predictions: bool, latest: bool) -> Iterator[bytes | None]:
        with self._gives.events.subscribe(without=() if predictions else {PREDICTION}) as heard:
            yield b"retry: 1000\n\n"
            beat = now = time.monotonic()
            asked = -EVERY if status else float("inf")
            shown, held = 0.0, None
            while not heard.closed:
                event = heard.take(_STEP)
                now, sent = time.monotonic(), b""
                if event is not None and event.kind != PREDICTION:
                    sent += _one("event", event.plain(), event.number)
                elif event is not None:
                    if latest:
                        held = event
                    else:
                        sent += _prediction(event)
                if held is not None and now - shown >= APART:
                    sent += _prediction(held)
                    shown, held = now, None
                if now - asked >= EVERY:
                    sent += self._status()
                    asked = now
                if not sent and now - beat >= self._beat:
                    sent = b": alive\n\n"
                beat = now if sent else beat
                yield sent or None

    def _status(self) -> bytes:
        try:
            return _one("status", self._gives.verbs["status"]({}))
        except (EdgeAdaptError, KeyError):
            return b""


class _Stream(Iterator[bytes | None]):
    """A stream that gives its place back when it is closed, begun or not."""

    def __init__(self, places: threading.BoundedSemaphore, pieces: Iterator[bytes | None]) -> None:
        self._places, self._pieces, self._closed = places, pieces, False

    def __next__(self) -> bytes | None:
        return next(self._pieces)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._pieces.close()  # type: ignore[attr-defined]
            self._places.release()


def _prediction(event: Event) -> bytes:
    return _one("prediction", event.plain(), event.number)


def _one(kind: str, data: object, number: int | None = None) -> bytes:
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {kind}\ndata: {as_json(data)}\n\n".encode("ascii")
