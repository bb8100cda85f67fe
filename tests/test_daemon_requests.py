"""Requests that come as messages: each gets a response, is done once, and garbage is not done at all."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from edgeadapt.errors import EdgeAdaptError
from edgeadapt.runtime.daemon.requests import LONGEST, REMEMBERED, WAITING, Requests
from tests.broker import Device, until


def test_a_request_that_comes_twice_is_done_once():
    now, device = [0.0], Device()
    asked = Requests(device.verbs, lambda verb, response: None, clock=lambda: now[0])
    first = asked.answer("pause", b'{"transaction": 1}')
    assert asked.answer("pause", b'{"transaction": 1}') == first == '{"status":"ok","data":{"text":"pause is done"},"transaction":1}'
    assert len(device.done) == 1
    asked.answer("pause", b'{"transaction": 2}')
    asked.answer("resume", b'{"transaction": 1}')
    assert [verb for verb, _ in device.done] == ["pause", "pause", "resume"]
    for _ in range(2):
        asked.answer("mark-good", b"")
    assert len(device.done) == 5
    now[0] = REMEMBERED - 0.1
    asked.answer("pause", b'{"transaction": 1}')
    assert len(device.done) == 5
    now[0] = REMEMBERED
    asked.answer("pause", b'{"transaction": 1}')
    assert len(device.done) == 6
    for number in range(100):
        asked.answer("pause", b'{"transaction": "%d"}' % number)
    assert len(asked._answers) == 32


def test_a_failure_is_remembered_too_and_a_defect_is_no_end():
    count = []

    def broken(params: object) -> object:
        count.append(1)
        raise ValueError("inside")

    asked = Requests({"pause": broken, "resume": lambda params: 1 / 0, "status": lambda params: {"x": "y" * LONGEST}}, lambda verb, response: None)
    first = json.loads(asked.answer("pause", b'{"transaction": 1}'))
    assert first["code"] == EdgeAdaptError.exit_code
    assert "ValueError: inside" in first["error"]
    assert json.loads(asked.answer("pause", b'{"transaction": 1}')) == first
    assert len(count) == 1
    assert "ZeroDivisionError" in asked.answer("resume", b"")
    assert "is the most" in json.loads(asked.answer("status", b""))["error"]


LEAVES = some.none() | some.booleans() | some.floats() | some.text() | some.integers()
KEYS = some.sampled_from(["to", "reason", "transaction", "x"])
VALUES = some.recursive(LEAVES, lambda inner: some.lists(inner) | some.dictionaries(KEYS, inner))


@given(some.binary(max_size=300) | VALUES.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=150, deadline=None)
def test_any_payload_gets_a_response(payload):
    device = Device()
    for verb in ("rollback", "status", "nothing"):
        answer = json.loads(Requests(device.verbs, lambda verb, response: None).answer(verb, payload))
        assert answer["status"] in ("ok", "error")
        assert answer["status"] == "ok" or answer["error"]
    for _, params in device.done:
        assert params.keys() <= {"to", "reason"}


GARBAGE = ["[1]", "3", '"pause"', "null", "{", "NaN", '{"transaction": NaN}', '{"transaction": [1]}', '{"transaction": true}', "[" * 30000]


@pytest.mark.parametrize("payload", GARBAGE)
def test_garbage_is_an_error_and_is_not_done(payload):
    device = Device()
    assert json.loads(Requests(device.verbs, lambda verb, response: None).answer("pause", payload.encode()))["status"] == "error"
    assert device.done == []


def test_requests_that_wait_are_bounded():
    told: list[str] = []
    busy, go = threading.Event(), threading.Event()

    def slow(params: object) -> object:
        busy.set()
        go.wait(30)
        return {}

    asked = Requests({"pause": slow}, lambda verb, response: told.append(response))
    asked.start()
    asked.offer("pause", b"")
    assert busy.wait(30)
    for _ in range(WAITING + 3):
        asked.offer("pause", b"")
    assert len(told) == asked.refused == 3
    assert all("requests wait already" in text for text in told)
    go.set()
    until(lambda: len(told) == WAITING + 4)
    asked.close()
