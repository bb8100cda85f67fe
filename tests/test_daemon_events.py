"""What is remembered, who hears of it, and how the log looks."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as some

from edgeadapt.runtime.daemon import logs
from edgeadapt.runtime.daemon.events import LOST, Event, Events
from edgeadapt.runtime.daemon.logs import LogHandler, looks_of, set_up
from edgeadapt.runtime.daemon.plain import as_json

pytestmark = pytest.mark.device


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def texts(events: list[Event]) -> list[str]:
    return [event.text for event in events]


# ---------------------------------------------------------------------------------------------------------------------- events


def test_the_latest_events_are_remembered():
    clock = Clock()
    events = Events(3, lambda: 1.7e9 + 0.00049, clock)
    assert events.latest() == []
    told = [events.tell("rolled back", f"event {index}", {"window": index}) for index in range(5)]
    assert [event.number for event in told] == [1, 2, 3, 4, 5]
    assert events.latest() == told[2:]
    assert events.latest(2) == told[3:]
    assert events.latest(0) == []
    assert events.latest(10) == told[2:]
    assert told[0].monotonic == 100.0
    assert told[4].plain() == {"number": 5, "time": 1.7e9, "kind": "rolled back", "text": "event 4", "facts": {"window": 4}}


def test_what_is_only_passed_on_is_not_remembered_and_made_only_where_it_is_wanted():
    events = Events()
    assert not events.wanted("prediction")
    events.tell("a", "first")
    with events.subscribe(["prediction"]) as predictions, events.subscribe() as everything:
        assert events.wanted("prediction")
        events.pass_on("prediction", "3", {"label": 3})
        events.tell("a", "second")
        assert predictions.take(0).facts == {"label": 3}
        assert predictions.take(0) is None
        assert [everything.take(0).text, everything.take(0).text] == ["3", "second"]
    assert not events.wanted("prediction")
    assert texts(events.latest()) == ["first", "second"]
    with events.subscribe(limit=1, without=["prediction"]) as others:
        events.tell("a", "third")
        assert not events.wanted("prediction")
        events.pass_on("prediction", "4")
        assert (others.take(0).text, others.take(0), others.lost) == ("third", None, 0)


def test_who_is_too_slow_loses_the_oldest_and_is_told_how_many():
    events = Events(1)
    with events.subscribe(limit=3) as slow, events.subscribe(limit=100) as other:
        for index in range(10):
            events.tell("a", str(index))
        assert slow.lost == 7
        first = slow.take(0)
        assert (first.kind, first.number, first.facts) == (LOST, 7, {"count": 7})
        assert [slow.take(0).text for _ in range(3)] == ["7", "8", "9"]
        assert slow.take(0) is None
        for index in range(4):
            events.tell("a", str(index))
        assert slow.take(0).facts == {"count": 1}
        assert slow.lost == 8
        assert [other.take(0).text for _ in range(10)] == [str(index) for index in range(10)]
        assert other.lost == 0


@given(some.lists(some.integers(0, 5) | some.none(), max_size=60), some.integers(1, 8))
def test_every_event_comes_in_order_or_is_counted_as_lost(steps, limit):
    events = Events(4)
    told = heard = lost = last = 0
    with events.subscribe(limit=limit) as subscription:
        for step in [*steps, *[None] * (limit + 1)]:
            for _ in range(step or 0):
                told = events.tell("a", "").number
            if step is not None:
                continue
            if (event := subscription.take(0)) is not None:
                assert event.number > last
                last = event.number
                heard += event.kind != LOST
                lost += event.facts["count"] if event.kind == LOST else 0
        assert subscription.take(0) is None
        assert subscription.lost == lost
    assert heard + lost == told
    assert len(events.latest()) == min(told, 4)


def test_who_waits_goes_on_when_something_comes_and_when_all_is_closed():
    events = Events()
    subscription = events.subscribe()
    heard: list[str | None] = []

    def listen() -> None:
        heard.extend(None if event is None else event.text for event in subscription.each(60))

    thread = threading.Thread(target=listen)
    thread.start()
    events.tell("a", "first")
    events.tell("a", "second")
    while len(heard) < 2 and thread.is_alive():
        time.sleep(0.001)
    time.sleep(0.02)  # it most likely waits now
    events.close()
    events.tell("a", "third")
    thread.join(30)
    assert not thread.is_alive()
    assert [text for text in heard if text is not None] == ["first", "second"]
    assert subscription.take() is None
    assert subscription.closed
    subscription.close()


def test_there_is_nothing_now_and_then_so_that_who_listens_can_look_around():
    events = Events()
    each = events.subscribe().each(0.001)
    assert [next(each), next(each)] == [None, None]
    events.tell("a", "first")
    assert next(each).text == "first"
    each.close()
    assert not events.wanted("a")


def test_events_from_many_threads_reach_all_in_one_order():
    events = Events(10)
    subscriptions = [events.subscribe(limit=5000) for _ in range(2)]

    def tell() -> None:
        for _ in range(500):
            events.tell("a", "")

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for subscription in subscriptions:
        assert [subscription.take(0).number for _ in range(2000)] == list(range(1, 2001))
        subscription.close()


# ------------------------------------------------------------------------------------------------------------------------- log


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The root logger and ours are as they were, afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("edgeadapt")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield ours
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


class Log:
    """A handler of its own, with a clock that does not go by itself."""

    def __init__(self, looks: logs.Looks) -> None:
        self.stream, self.clock = io.StringIO(), Clock()
        self.handler = LogHandler(self.stream, looks, self.clock)

    def log(self, level: int, text: str, *facts: object, trace: bool = False) -> None:
        try:
            raise OSError("it was pulled out")
        except OSError as reason:
            info = (OSError, reason, reason.__traceback__) if trace else None
            self.handler.handle(logging.LogRecord("edgeadapt", level, __file__, 1, text, facts, info))

    def lines(self) -> list[str]:
        found = self.stream.getvalue().splitlines()
        self.stream.seek(0)
        self.stream.truncate()
        return found


def test_the_journal_gets_priorities_on_every_line():
    log = Log("journal")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL, 25, 5):
        log.log(level, "level %d", level)
    assert log.lines() == ["<7>level 10", "<6>level 20", "<4>level 30", "<3>level 40", "<2>level 50", "<6>level 25", "<7>level 5"]
    log.log(logging.ERROR, "two\nlines", trace=True)
    found = log.lines()
    assert found[:2] == ["<3>two lines", "<3>Traceback (most recent call last):"]
    assert found[-1] == "<3>OSError: it was pulled out"
    assert all(line.startswith("<3>") for line in found)


def test_everything_else_gets_json_lines():
    log = Log("json")
    log.log(logging.WARNING, 'a "frame"\nof \x1b[31m%s', "é\ud800")
    line = json.loads(log.lines()[0])
    assert line["time"].endswith("+00:00")
    assert {**line, "time": ""} == {"time": "", "level": "warning", "logger": "edgeadapt", "text": 'a "frame" of  [31mé '}
    log.log(logging.ERROR, "broken", trace=True)
    assert json.loads(log.lines()[0])["trace"].endswith("OSError: it was pulled out")


def test_a_person_gets_the_time_and_the_level():
    log = Log("text")
    log.log(logging.WARNING, "the %s stalled", "camera")
    (line,) = log.lines()
    assert line[2] == line[5] == ":"
    assert line[8:] == " warning  the camera stalled"


def test_a_message_that_comes_again_and_again_is_counted_each_minute():
    log = Log("journal")
    for second in range(150):
        log.log(logging.WARNING, "%s", "no frames")
        if second == 10:
            log.log(logging.ERROR, "no frames")  # more than a warning: another message
        log.clock.now += 1
    assert log.lines() == ["<4>no frames", "<3>no frames", "<4>no frames (59 more times in 60 s)", "<4>no frames (60 more times in 60 s)"]
    log.clock.now += 30
    log.handler.tell_repeated()
    assert log.lines() == ["<4>no frames (30 more times in 60 s)"]
    log.clock.now += 60
    log.handler.tell_repeated()
    assert log.lines() == []
    log.log(logging.WARNING, "no frames")
    assert log.lines() == ["<4>no frames"]


def test_an_open_count_is_told_by_the_next_message_and_at_the_end():
    log = Log("journal")
    for _ in range(3):
        log.log(logging.INFO, "a")
    log.clock.now += 61
    log.log(logging.INFO, "b")
    assert log.lines() == ["<6>a", "<6>a (2 more times in 61 s)", "<6>b"]
    log.log(logging.INFO, "b")
    log.clock.now += 5
    log.handler.close()
    assert log.lines() == ["<6>b (1 more time in 5 s)"]


def test_different_messages_do_not_make_it_grow_and_none_is_lost():
    log = Log("journal")
    log.log(logging.INFO, "first")
    log.log(logging.INFO, "first")
    for index in range(1000):
        log.log(logging.INFO, "%d", index)
    assert len(log.handler._seen) == logs.REMEMBERED
    found = log.lines()
    assert len(found) == 1002
    assert "<6>first (1 more time in 1 s)" in found


def test_a_log_that_cannot_be_written_harms_nobody():
    log = Log("text")
    log.log(logging.INFO, "%d frames", "no number")
    log.stream.close()
    log.log(logging.INFO, "frames")
    log.log(logging.INFO, "frames")
    log.handler.tell_repeated()
    log.clock.now += 61
    log.handler.tell_repeated()
    log.log(logging.INFO, "others")
    log.log(logging.INFO, "others")
    log.handler.close()
    assert log.handler.lost == 5


def test_letters_that_the_stream_cannot_take_are_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    LogHandler(stream, "journal").handle(logging.LogRecord("edgeadapt", logging.INFO, "", 1, "61 °C", (), None))
    assert raw.getvalue() == b"<6>61 \\xb0C\n"


def test_how_it_looks_is_told_by_where_it_goes(tmp_path):
    with open(tmp_path / "log", "w") as file:
        found = os.fstat(file.fileno())
        name = f"{found.st_dev}:{found.st_ino}"
        assert looks_of(file, {"JOURNAL_STREAM": name}) == "journal"
        assert looks_of(file, {"JOURNAL_STREAM": name + "1"}) == "json"  # it is not the journal's any more
        assert looks_of(file, {"JOURNAL_STREAM": "nonsense"}) == "json"
        assert looks_of(file, {}) == "json"
    master, slave = pty.openpty()
    with open(master, "rb", buffering=0), open(slave, "w") as terminal:
        assert looks_of(terminal, {"JOURNAL_STREAM": name}) == "text"
    assert looks_of(io.StringIO(), {}) == "json"
    assert looks_of(terminal, {}) == "json"  # closed


def test_setting_up_again_takes_the_place_of_what_was_set_up(logger):
    first, second = io.StringIO(), io.StringIO()
    count = len(logging.getLogger().handlers)
    set_up("INFO", "journal", first)
    logger.info("one")
    logger.debug("two")
    set_up("DEBUG", stream=second, environ={})
    assert len(logging.getLogger().handlers) == count + 1
    logger.debug("three")
    logging.getLogger("another.library").info("chatter")
    logging.getLogger("another.library").warning("four")
    assert first.getvalue() == "<6>one\n"
    assert [json.loads(line)["text"] for line in second.getvalue().splitlines()] == ["three", "four"]


def test_standard_error_is_where_it_goes(logger, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    set_up(looks="text")
    logger.warning("here")
    assert stream.getvalue().endswith(" warning  here\n")


# ------------------------------------------------------------------------------------------------------------------------ JSON

VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_what_leaves_is_json_on_one_line(value):
    def finite(found: object) -> object:
        if isinstance(found, list):
            return [finite(inner) for inner in found]
        if isinstance(found, dict):
            return {key: finite(inner) for key, inner in found.items()}
        return None if isinstance(found, float) and found - found != 0 else found

    def refused(name: str) -> None:
        raise AssertionError(name)

    text = as_json(value)
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text, parse_constant=refused) == finite(value)


def test_what_is_no_json_is_refused():
    with pytest.raises(TypeError):
        as_json({"a": {1, 2}})
