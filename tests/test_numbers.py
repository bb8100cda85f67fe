"""Numbers in lines of text, read in pieces: the same as read at once, in little memory."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from edgeadapt.devices.sources import numbers

pytestmark = pytest.mark.device

AT_ONCE = numbers._at_once
COUNT = 60_000
LONG = {
    "csv": b",".join([b"1"] * COUNT),
    "blanks": b" ".join([b"-1.5e-3"] * COUNT),
    "flat": json.dumps([1] * COUNT, separators=(",", ":")).encode(),
    "floats": json.dumps([0.1 * n for n in range(COUNT)]).encode(),
    "rows": json.dumps({"x": [[1, 2, 3]] * (COUNT // 3), "label": 4}).encode(),
    "columns": json.dumps({"label": 4, "x": [list(range(COUNT // 3))] * 3, "id": "x"}).encode(),
    "single": json.dumps([[1]] * COUNT, separators=(",", ":")).encode(),
    "cubes": json.dumps({"x": np.zeros((4, 100, 150), int).tolist()}).encode(),
}


@pytest.mark.parametrize("name", LONG)
def test_long_lines_are_read_in_a_few_times_their_length(name: str) -> None:
    line = LONG[name]
    csv = not line.startswith((b"[", b"{"))
    wanted = np.array([float(part) for part in re.split(rb"[, ]", line)], np.float32) if csv else AT_ONCE(line)[0]
    tracemalloc.start()
    try:
        found = numbers.separated(line) if csv else numbers.parsed(line)[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found is not None
    assert wanted is not None
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted)
    assert peak < 6 * len(line) + 2**18  # as lists of Python's numbers it was up to thirty times


def test_the_label_of_a_long_line_is_found() -> None:
    assert numbers.parsed(LONG["rows"])[1] == numbers.parsed(LONG["columns"])[1] == 4
    assert numbers.parsed(LONG["flat"])[1] is None


@pytest.mark.parametrize(
    "line",
    [
        b"[" + b"1," * 40_000 + b"]",
        b"[" + b"1," * 40_000 + b"1",
        b"[" + b"1, " * 40_000 + b"01]",
        b"[" + b"1, " * 40_000 + b"NaN]",
        b"[" + b"1, " * 40_000 + b"1e39]",
        b"[" + b"1, " * 40_000 + b"1 1]",
        b"[" + b"1, " * 40_000 + b"true]",
        b"[[1], " + b"[1], " * 40_000 + b"[1, 2]]",
        b"[[1], " + b"[1], " * 40_000 + b"2]",
        b"[[1], " + b"[1], " * 40_000 + b"2[]]",
        b"[[1], " + b"[1], " * 40_000 + b"[]2]",
        b"[[1], " + b"[1], " * 40_000 + b"[[1]]]",
        b"[" * 80_000 + b"1" + b"]" * 80_000,
        b"[" + b"1, " * 40_000 + b"1], [1]",
        b'{"x": [' + b"1, " * 40_000 + b"1], [1]}",
        b'{"x": [' + b"1, " * 40_000 + b"1]",
        b'{"y": [' + b"1, " * 40_000 + b"1]}",
        b'{"y": {"x": [' + b"1, " * 40_000 + b"1]}}",
    ],
    ids=range(18),
)
def test_long_lines_that_are_garbled_give_nothing(line: bytes) -> None:
    assert AT_ONCE(line)[0] is None
    assert numbers.parsed(line)[0] is None


@pytest.fixture(scope="module")
def short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "_PIECE", 3)
        yield


PIECES = [*"[],0123456789-+.eE \t", "1.5", "2", "[1,2]", "],[", '{"x":', "}", '"label":1', "null"]
WORDS = some.lists(some.sampled_from(PIECES), max_size=24).map("".join)


def nested() -> some.SearchStrategy[Any]:
    value = some.one_of(some.integers(-(10**6), 10**6), some.floats(-1e30, 1e30))
    several = some.lists(value, max_size=4)
    return some.recursive(several, lambda inner: some.one_of(some.lists(inner, max_size=3), some.builds(lambda x: [x] * 2, inner)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.one_of(WORDS, nested().map(json.dumps), nested().map(lambda x: json.dumps({"label": 2, "x": x}))))
def test_in_pieces_lines_of_json_say_what_they_say_at_once(short: None, text: str) -> None:
    line = text.strip().encode()
    wanted, label = AT_ONCE(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "_at_once", lambda line: None)
        patch.setattr(numbers, "_nested", None)
        found, known = numbers.parsed(line)
    if wanted is None or not wanted.size:
        assert found is None or not found.size
    else:
        assert found is not None
        assert found.shape == wanted.shape
        assert np.array_equal(found, wanted)
        assert known == label


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.text("0123456789-+.eE,; \t", max_size=40))
def test_in_pieces_lines_of_csv_say_what_they_say_at_once(short: None, text: str) -> None:
    line = text.strip().encode()
    found = numbers.separated(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "_PIECE", 2**12)
        wanted = numbers.separated(line)
    assert (found is None) == (wanted is None)
    assert found is None or np.array_equal(found, wanted)  # type: ignore[arg-type]
