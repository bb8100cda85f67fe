"""Numbers in lines of text, from a serial line or standard input: frames, samples that become windows, and what is counted of other lines."""

from __future__ import annotations

import io
import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.devices.sources import Wanted, open_source
from edgeadapt.devices.sources.lines import COUNTED, Lines
from edgeadapt.errors import SourceError
from tests.toybundle import SIDE, Toy

pytestmark = pytest.mark.device

TASK = Task("classification", 3, ("rest", "walk", "run"))
SENSOR = Wanted(InputSpec((2, 4), hop=2), TASK)
WHOLE = Wanted(InputSpec((2, 4)), TASK)
VECTOR = Wanted(InputSpec((3,)), TASK)


def read(text: bytes, wanted: Wanted = VECTOR, form: str = "csv", midway: bool = False) -> tuple[list[object], dict[str, int]]:
    """Pixels as lists, with their truth where there is one, and what is counted but bytes."""
    lines = Lines(wanted, form, midway)
    found = [*lines.feed(text), *lines.end()]
    assert lines.counts.keys() == set(COUNTED)
    assert all(frame.pixels.dtype == np.float32 and frame.pixels.shape == wanted.input.shape and not frame.fault for frame in found)
    assert [frame.id for frame in found] == list(range(len(found)))
    plain = [frame.pixels.tolist() if frame.truth is None else (frame.pixels.tolist(), frame.truth) for frame in found]
    return plain, {kind: count for kind, count in lines.counts.items() if count and kind != "bytes"}


@pytest.mark.parametrize("line", ["1,-2.5,3e2", "1;-2.5;3e2", "1\t-2.5\t3e2", "1 -2.5 3e2", " 1 ,  -2.5 , +3E+2 ,", "1,-2.5,300\r", "1., -2.50, 3e2"])
def test_numbers_as_boards_print_them(line):
    assert read(line.encode() + b"\n") == ([[1.0, -2.5, 300.0]], {"lines": 1})


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("1,2", "sizes"),
        ("1,2,3,4", "sizes"),
        ("1,,3", "numbers"),
        ("1,2,nan", "numbers"),
        ("1,inf,3", "numbers"),
        ("1,2,1e39", "numbers"),
        ("1,2,1_0", "numbers"),
        ("1,2,0x3", "numbers"),
        ("1,2.3.4,5", "numbers"),
        ("1,2,٣", "numbers"),
        ("Booting...", "numbers"),
        (",", "numbers"),
        ("1," * 2000, "long"),
    ],
)
def test_garbled_lines_are_counted_and_no_frames(line, kind):
    assert read(f"a,b,c\n1,2,3\n{line}\n\n \n4,5,6\n".encode()) == ([[1, 2, 3], [4, 5, 6]], {"lines": 2, kind: 1})


def test_one_heading_is_no_error_wherever_it_stands():
    assert read(b"x,y,z\n1,2,3\n") == ([[1, 2, 3]], {"lines": 1})
    assert read(b"1,2,3\nx,y,z\n1,2,3\nx,y,z\n") == ([[1, 2, 3]] * 2, {"lines": 2, "numbers": 1})
    assert read(b"x,y,z\n[1, 2, 3]\n", form="jsonl") == ([[1, 2, 3]], {"lines": 1, "numbers": 1})


def test_a_line_that_may_be_cut_is_left_out():
    assert read(b"5,2,3\n1,2,3\n", midway=True) == ([[1, 2, 3]], {"lines": 1})
    assert read(b"5" * 10_000 + b"\n1,2,3\n", midway=True) == ([[1, 2, 3]], {"lines": 1})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[1, 2.5, -3]", [[1, 2.5, -3]]),
        ('{"x": [1, 2, 3]}', [[1, 2, 3]]),
        ('{"x": [1, 2, 3], "label": 2, "at": "noon"}', [([1, 2, 3], 2)]),
        ('{"label": "walk", "x": [1, 2, 3]}', [([1, 2, 3], 1)]),
        ('{"x": [1, 2, 3], "label": "fly"}', [[1, 2, 3]]),
        ('{"x": [1, 2, 3], "label": 3}', [[1, 2, 3]]),
        ('{"x": [1, 2, 3], "label": true}', [[1, 2, 3]]),
    ],
)
def test_json(line, expected):
    assert read(line.encode(), form="jsonl") == (expected, {"lines": 1})


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("[1, 2]", "sizes"),
        ("[[1, 2, 3]]", "sizes"),
        ("[[[[1, 2, 3]]]]", "sizes"),
        ("[]", "sizes"),
        ("[[]]", "sizes"),
        ('{"y": [1, 2, 3]}', "numbers"),
        ('{"x": {"x": [1, 2, 3]}}', "numbers"),
        ("1", "numbers"),
        ("null", "numbers"),
        ("[1, 2, null]", "numbers"),
        ('[1, 2, "3"]', "numbers"),
        ("[1, 2, true]", "numbers"),
        ("[1, 2, NaN]", "numbers"),
        ("[1, 2, -Infinity]", "numbers"),
        ("[1, 2, 1e39]", "numbers"),
        ("[1, 2, 1" + "0" * 400 + "]", "numbers"),
        ("[1, [2], 3]", "numbers"),
        ("[[1], [2, 3]]", "numbers"),
        ("[[1], 2]", "numbers"),
        ("[[[[[1, 2, 3]]]]]", "numbers"),
        ("[" * 500, "numbers"),
        ('{"x": [1, 2, 3]', "numbers"),
        ("\xff\xfe", "numbers"),
    ],
)
def test_garbled_json(line, kind):
    assert read(line.encode("latin-1") + b"\n[1, 2, 3]\n", form="jsonl") == ([[1, 2, 3]], {"lines": 1, kind: 1})


def test_json_of_any_depth():
    lines = Lines(Wanted(InputSpec((3, 100, 100)), TASK), "jsonl")
    assert lines.feed(b"[" * 500_000 + b"\n" + b'{"x":' * 100_000 + b"\n") == []
    assert lines.counts["numbers"] == 2


def test_a_whole_frame_may_be_flat_or_not():
    frame = np.arange(8).reshape(2, 4)
    flat, nested = json.dumps(frame.ravel().tolist()), json.dumps(frame.tolist())
    for wanted in (WHOLE, SENSOR):
        assert read(f"{flat}\n{nested}\n".encode(), wanted, "jsonl") == ([frame.tolist()] * 2, {"lines": 2})
        assert read(flat[1:-1].encode(), wanted) == ([frame.tolist()], {"lines": 1})
    assert read(b"1,2\n", WHOLE) == ([], {"sizes": 1})  # this bundle says nothing of samples


def samples(*numbers: int) -> bytes:
    return b"".join(b"%d,%d\n" % (number, -number) for number in numbers)


def window(first: int) -> list[list[int]]:
    return [[first + at for at in range(4)], [-first - at for at in range(4)]]


def test_samples_become_windows():
    assert read(samples(*range(9)), SENSOR) == ([window(0), window(2), window(4)], {"lines": 9})
    several = json.dumps([[number, -number] for number in range(9)])
    assert read(several.encode(), SENSOR, "jsonl") == ([window(0), window(2), window(4)], {"lines": 1})


def test_no_window_goes_across_a_gap():
    assert read(b"x,y\n" + samples(0, 1, 2) + b"3,x\n" + samples(4, 5, 6, 7), SENSOR) == ([window(4)], {"lines": 7, "numbers": 1})


def test_the_truth_of_a_window_is_that_of_all_its_samples():
    labels = [0, 0, 0, 0, 1, 1, 1, 1, None, None, None, None, 2, 2, 2, 2]
    lines = [json.dumps({"x": [number, -number], **({} if label is None else {"label": label})}) for number, label in enumerate(labels)]
    found, _ = read("\n".join(lines).encode(), SENSOR, "jsonl")
    assert found == [(window(0), 0), window(2), (window(4), 1), window(6), window(8), window(10), (window(12), 2)]
    together = [json.dumps({"x": [[number, -number] for number in range(4)], "label": 1})] * 2
    assert read("\n".join(together).encode(), Wanted(InputSpec((2, 4), hop=4), TASK), "jsonl")[0] == [(window(0), 1)] * 2


def texts() -> some.SearchStrategy[bytes]:
    scalars = some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=3)
    values = some.recursive(scalars, lambda inner: some.lists(inner, max_size=4))
    objects = values | some.dictionaries(some.sampled_from(["x", "label", "y"]), values)
    numbers = some.lists(some.integers(-9, 9) | some.floats(), max_size=9).map(lambda row: ",".join(map(str, row)).encode())
    return some.binary(max_size=40) | objects.map(lambda value: json.dumps(value).encode()) | numbers


@given(some.lists(texts(), max_size=12), some.sampled_from(["csv", "jsonl"]), some.sampled_from([SENSOR, WHOLE, VECTOR]), some.data())
def test_any_bytes_are_frames_or_counted_however_they_are_cut(lines, form, wanted, data):
    text = b"\n".join(lines) + b"\n"
    whole, parts = Lines(wanted, form), Lines(wanted, form)
    expected = whole.feed(text)
    cuts = sorted(data.draw(some.lists(some.integers(0, len(text)), max_size=20)))
    found = [frame for begin, end in zip([0, *cuts], [*cuts, len(text)]) for frame in parts.feed(text[begin:end])]
    assert [frame.pixels.tolist() for frame in found] == [frame.pixels.tolist() for frame in expected]
    assert parts.counts == whole.counts
    assert all(np.isfinite(frame.pixels).all() for frame in found)


def test_a_line_without_an_end_is_not_kept():
    lines = Lines(VECTOR, "csv")
    for _ in range(200):
        assert lines.feed(b"1,2,3," * 100) == []
        assert lines.held < 2000
    assert lines.counts["long"] == 1
    assert [frame.pixels.tolist() for frame in lines.feed(b"\n1,2,3\n")] == [[1, 2, 3]]


def test_lines_of_standard_input(caplog):
    manifest = Toy().manifest()
    frame = np.arange(3 * SIDE * SIDE, dtype=np.float32)
    text = ",".join(str(number) for number in frame.tolist())
    with open_source("-", manifest, "csv", io.BytesIO(f"{text}\nx\n1,2\n\n{text}".encode())) as source:
        found = list(source)
    assert np.array_equal([one.pixels for one in found], [frame.reshape(3, SIDE, SIDE)] * 2)
    assert source.counts["sizes"] == 1
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "lines of stdin were left out: 1 hold more or fewer than a frame; 2 were used"
    ]
    line = json.dumps({"x": frame.reshape(3, SIDE, SIDE).tolist(), "label": "class 2"})
    (one,) = open_source("-", manifest, "jsonl", io.BytesIO(line.encode()))
    assert one.truth == 2
    assert np.array_equal(one.pixels, frame.reshape(3, SIDE, SIDE))


def test_standard_input_without_a_usable_line_is_refused():
    for form, text in (("csv", b"x\n1,2\n"), ("jsonl", b"x\n")):
        with pytest.raises(SourceError, match="no line of stdin could be used"):
            list(open_source("-", Toy().manifest(), form, io.BytesIO(text)))
    assert list(open_source("-", Toy().manifest(), "csv", io.BytesIO(b""))) == []
