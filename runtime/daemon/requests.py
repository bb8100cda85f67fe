"""Requests that come as messages: what they ask, what is answered, and that a message which comes twice is done once.

A request names a verb by its topic; its payload is a mapping of the verb's parameters in JSON, or nothing. It may hold "transaction" besides, a text
or a whole number, which the response repeats. One with the same verb and payload, transaction included, as one that was answered less than a minute
ago is answered from memory.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

from edgeadapt.errors import EdgeAdaptError, UsageError
from edgeadapt.runtime.daemon import verbs as known
from edgeadapt.runtime.daemon.plain import as_json, one_line

LOG = logging.getLogger("edgeadapt")

LONGEST, WAITING = 2**16, 32
"""Bytes of a request and of a response, and requests that wait, at most."""

REMEMBERED, _ANSWERS, _TRANSACTION = 60.0, 32, 128
"""Seconds that an answer is remembered."""

LEFT_OUT = frozenset({"tail", "frame"})
"""Verbs that cannot be asked this way: events and predictions have topics of their own, and pictures stay on the device."""


class Requests:
    """Answers requests one after the other, in a thread of its own.

    Args:
        verbs: functions by name.
        reply: is given the verb and its response, JSON.
        done: is called after a verb that writes.
        clock: monotonic seconds.

    Attributes:
        count, refused: requests that were answered, and those that were not even taken.
    """

    def __init__(
        self,
        verbs: Mapping[str, known.Function],
        reply: Callable[[str, str], None],
        done: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._verbs = {name: function for name, function in verbs.items() if name not in LEFT_OUT}
        self._reply, self._done, self._clock = reply, done, clock
        self._asked: queue.Queue[tuple[str, bytes] | None] = queue.Queue(WAITING)
        self._answers: OrderedDict[tuple[str, bytes], tuple[float, str]] = OrderedDict()
        self._thread: threading.Thread | None = None
        self.count = self.refused = 0

    def start(self) -> None:
        """Begins to answer."""
        self._thread = threading.Thread(target=self._work, name="mqtt requests", daemon=True)
        self._thread.start()

    def close(self, seconds: float = 2.0) -> None:
        """Takes no more; waits so long for what is being done. May be called by a verb."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        while True:
            try:
                self._asked.put_nowait(None)
                break
            except queue.Full:
                try:
                    self._asked.get_nowait()
                except queue.Empty:
                    continue
        if thread is not threading.current_thread():
            thread.join(seconds)

    def offer(self, verb: str, payload: bytes) -> None:
        """Takes a request; never waits."""
        try:
            self._asked.put_nowait((verb, payload[: LONGEST + 1]))
        except queue.Full:
            self.refused += 1
            self._reply(verb, _response(_failure(EdgeAdaptError(f"{WAITING} requests wait already", "ask again later")), None))

    def answer(self, verb: str, payload: bytes) -> str:
        """The response to a request, as JSON; does what is asked unless it was, less than a minute ago."""
        transaction: str | int | None = None
        try:
            given = _mapping(verb, payload)
            transaction = _transaction(given.pop("transaction", None))
            key = (verb, payload)
            if transaction is not None and (found := self._remembered(key)) is not None:
                return found
            name = known.find(verb, self._verbs)
            result = self._verbs[name](known.checked(name, given))
            if isinstance(result, Iterator):
                raise UsageError(f"{name} gives many values, which is not possible here", "edgeadapt tail")
            response = _response({"status": "ok", "data": result}, transaction)
            if len(response) > LONGEST:
                raise EdgeAdaptError(f"what {name} gives has {len(response)} bytes, and {LONGEST} is the most", "ask over the control socket")
        except EdgeAdaptError as error:
            response = _response(_failure(error), transaction)
        except Exception as reason:
            LOG.exception("mqtt: what was asked for has a defect: %r", reason)
            told = one_line(f"{type(reason).__name__}: {reason}", 300)
            defect = EdgeAdaptError(f"the daemon has a defect: {told}", "its log has more: journalctl -u edgeadapt")
            response = _response(_failure(defect), transaction)
        if transaction is not None:
            self._answers[verb, payload] = self._clock(), response
            if len(self._answers) > _ANSWERS:
                self._answers.popitem(last=False)
        return response

    def _remembered(self, key: tuple[str, bytes]) -> str | None:
        for other in [other for other, (then, _) in self._answers.items() if self._clock() - then >= REMEMBERED]:
            del self._answers[other]
        found = self._answers.get(key)
        return None if found is None else found[1]

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            verb, payload = asked
            writes = verb in known.VERBS and known.VERBS[verb].writes
            if writes:
                LOG.info("mqtt: %s: %s", verb, one_line(payload[:200].decode("utf-8", "replace"), 200))
            self._reply(verb, self.answer(verb, payload))
            self.count += 1
            if writes:
                self._done()


def _mapping(verb: str, payload: bytes) -> dict[str, object]:
    example = 'send a mapping of its parameters, such as {"transaction": 1}, or nothing'
    if len(payload) > LONGEST:
        raise UsageError(f"{one_line(verb, 60)}: a request is longer than {LONGEST} bytes", "send less")
    if not payload.strip():
        return {}
    try:
        given = json.loads(payload.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as reason:
        raise UsageError(f"{one_line(verb, 60)}: a request is not JSON: {one_line(str(reason), 200)}", example) from None
    if not isinstance(given, dict):
        raise UsageError(f"{one_line(verb, 60)}: a request is JSON, but no mapping", example)
    return given


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _transaction(value: object) -> str | int | None:
    if value is None or (isinstance(value, str) and len(value) <= _TRANSACTION):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    raise UsageError(f"transaction is neither a text of at most {_TRANSACTION} characters nor a whole number", "give one, or leave it out")


def _failure(error: EdgeAdaptError) -> dict[str, object]:
    return {"status": "error", "error": error.message, "hint": error.hint, "code": error.exit_code}


def _response(told: dict[str, object], transaction: str | int | None) -> str:
    return as_json(told if transaction is None else {**told, "transaction": transaction})
