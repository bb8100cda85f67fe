"""Standard input: its wait can be ended, and who reads on after that is in step."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.devices.sources import Source, Wanted
from edgeadapt.devices.sources.stdin import Arrays, Numbers, Paths
from tests.source_contract import Taking, until

pytestmark = pytest.mark.device

WANTED = Wanted(InputSpec((3, 8, 8)), Task("classification", 5))
SENSOR = Wanted(InputSpec((1, 3)), Task("classification", 5))
IMAGES = np.random.default_rng(3).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)

MAKE: dict[str, Callable[..., Source]] = {
    "paths": lambda file: Paths(file, WANTED),
    "npy": lambda file: Arrays(file, WANTED),
    "csv": lambda file: Numbers(file, SENSOR, "csv"),
}


class Pipe:
    """A pipe, and files at its end as the interpreter makes one of standard input."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self._files: list[io.BufferedReader] = []

    def write(self, data: bytes) -> None:
        os.write(self._write, data)

    def file(self) -> io.BufferedReader:
        self._files.append(open(self._read, "rb", closefd=False))
        return self._files[-1]

    def done(self) -> None:
        os.close(self._write)
        os.close(self._read)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.done()


def saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize("form", MAKE)
@pytest.mark.parametrize("begun", [False, True])
def test_a_stop_ends_the_wait_and_is_no_fault(pipe: Pipe, form: str, begun: bool) -> None:
    if begun:
        pipe.write(saved(IMAGES[0])[:-5] if form == "npy" else b"1,2")
    with Taking(MAKE[form](pipe.file())) as taking:
        if begun:
            until(lambda: taking.source._file.taken)  # type: ignore[attr-defined]
        begin = time.monotonic()
        taking.source.stop()
        assert taking.ended()
        assert time.monotonic() - begin < 5
        assert taking.failure is None
    assert list(taking.source) == []


def test_no_array_is_read_before_it_is_asked_for(pipe: Pipe) -> None:
    pipe.write(b"".join(saved(image) for image in IMAGES[:3]))
    with Arrays(pipe.file(), WANTED) as source:
        frames = iter(source)
        assert np.array_equal(next(frames).pixels, IMAGES[0])
        frames.close()  # type: ignore[attr-defined]
    frames = iter(Arrays(pipe.file(), WANTED))
    assert np.array_equal([next(frames).pixels for _ in range(2)], IMAGES[1:3])


def test_an_array_that_was_begun_is_read_to_its_end(pipe: Pipe) -> None:
    data = saved(IMAGES[:3])
    pipe.write(data[:-30])
    source = Arrays(pipe.file(), WANTED)
    with Taking(source) as taking:
        assert np.array_equal(taking.frame().pixels, IMAGES[0])
        assert np.array_equal(taking.frame().pixels, IMAGES[1])
        source.stop()
        assert taking.ended()
        pipe.write(data[-30:] + saved(IMAGES[3]))
        source.close()
    assert np.array_equal(next(iter(Arrays(pipe.file(), WANTED))).pixels, IMAGES[3])


@pytest.mark.parametrize("cut", [1, 5, 60, 127])
def test_so_is_one_of_which_only_a_part_of_the_head_was_there(pipe: Pipe, cut: int) -> None:
    data = saved(IMAGES[0])
    pipe.write(data[:cut])
    source = Arrays(pipe.file(), WANTED)
    with Taking(source) as taking:
        until(lambda: source._file.taken == cut)
        source.stop()
        pipe.write(data[cut:] + saved(IMAGES[3]))
        assert taking.ended()
        source.close()
    assert np.array_equal(next(iter(Arrays(pipe.file(), WANTED))).pixels, IMAGES[3])


def test_what_never_ends_does_not_hold_up_a_close(pipe: Pipe) -> None:
    pipe.write(saved(IMAGES)[:-1])
    source = Arrays(pipe.file(), WANTED)
    assert np.array_equal(next(iter(source)).pixels, IMAGES[0])
    begin = time.monotonic()
    source.close()
    source.close()
    assert time.monotonic() - begin < 5


def test_no_path_is_read_before_it_is_asked_for(pipe: Pipe) -> None:
    pipe.write(b"a.png\nb.png\nc.png\n")
    with Paths(pipe.file(), WANTED) as source:
        assert next(iter(source)).id == "a.png"
    assert next(iter(Paths(pipe.file(), WANTED))).id == "b.png"


def test_a_line_of_numbers_that_was_begun_is_read_to_its_end(pipe: Pipe) -> None:
    pipe.write(b"1,2,3\n4,5,6")
    source = Numbers(pipe.file(), SENSOR, "csv")
    with Taking(source) as taking:
        assert taking.frame().pixels.tolist() == [[1, 2, 3]]
        source.stop()
        assert taking.ended()
        pipe.write(b"7,8\n9,10,11\n")
        source.close()
    assert next(iter(Numbers(pipe.file(), SENSOR, "csv"))).pixels.tolist() == [[9, 10, 11]]


def test_numbers_are_given_as_they_come_and_the_end_ends_them(pipe: Pipe) -> None:
    source = Numbers(pipe.file(), SENSOR, "csv")
    with Taking(source) as taking:
        for number in range(3):
            pipe.write(b"%d,0,0\n" % number)
            assert taking.frame().pixels[0, 0] == number
        threading.Timer(0.05, lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), pipe._write)).start()
        assert taking.ended()
        assert taking.failure is None
