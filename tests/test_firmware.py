"""The sender for microcontrollers, built here by a C and a C++ compiler, against the receiver; the package cobs checks how both stuff bytes."""

from __future__ import annotations

import os
import pty
import shutil
import struct
import subprocess
import threading
import tty
from pathlib import Path
from typing import Any

import cobs.cobs
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as some

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.devices.framing import Decoder, encode, stuffed, unstuffed
from edgeadapt.devices.sources import Wanted
from edgeadapt.devices.sources.serial import Serial

LIBRARY = Path(__file__).parents[1] / "devices" / "firmware" / "EdgeAdaptFrame"
ARDUINO = Path(__file__).parent / "arduino"
STRICT = ["-O1", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror", f"-I{LIBRARY / 'src'}", f"-I{ARDUINO}"]
KINDS = {np.dtype(np.uint8): 1, np.dtype(np.float32): 2, np.dtype(np.int16): 3}
BUILDS = {"c99": ["gcc", "-std=c99", "-x", "c"], "c11": ["gcc", "-std=c11", "-x", "c"], "c++11": ["g++", "-std=c++11", "-x", "c++"]}


def built(folder: Path, compiler: list[str], source: str, *more: str) -> str:
    assert shutil.which(compiler[0]), f"there is no {compiler[0]}: apt-get install gcc g++ (./dev test does it where it may)"
    program = str(folder / "program")
    run = subprocess.run([*compiler, *STRICT, *more, str(ARDUINO / source), "-o", program, "-lm"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return program


@pytest.fixture(scope="module", params=BUILDS)
def sender(request, tmp_path_factory) -> str:
    return built(tmp_path_factory.mktemp("build"), BUILDS[request.param], "frames.c")


def request(array: np.ndarray, label: int = -1, scale: float = 1.0, then: int = 0, **changed: Any) -> bytes:
    """What tests/arduino/frames.c reads."""
    kind, dims = changed.get("kind", KINDS[array.dtype]), changed.get("dims", array.shape)
    return struct.pack(f"<BhfB{len(dims)}HBI", kind, label, scale, len(dims), *dims, then, array.nbytes) + array.tobytes()


def sent(sender: str, requests: bytes, boot: int = 0) -> tuple[bytes, str]:
    run = subprocess.run([sender, str(boot)], input=requests, capture_output=True, check=True)
    return run.stdout, run.stderr.decode()


def examples() -> list[tuple[np.ndarray, int, float]]:
    rng = np.random.default_rng(0)
    made: list[tuple[np.ndarray, int, float]] = []
    for size in (1, 2, 200, 228, *range(229, 240), 253, 254, 255, 256, 480, *range(483, 490), 508, 509, 700, 2000):  # around ends of blocks
        made += [(np.full((1, size), 7, np.uint8), size, 1.0), (rng.integers(0, 3, (size, 1)).astype(np.uint8), -1, 1.0)]
    made += [(np.zeros((size, 2, 3), np.uint8), 0, 1.0) for size in (1, 50)]
    made += [(rng.standard_normal((2,) * ndim).astype(np.float32), 32767, 1.0) for ndim in range(1, 5)]
    made += [(rng.integers(-32768, 32768, (3, size)).astype(np.int16), -1, -0.25) for size in (1, 128)]
    return made


def test_it_sends_what_python_sends(sender):
    every = examples()
    wire, complaints = sent(sender, b"".join(request(*one) for one in every), boot=0xABCD)
    assert not complaints
    expected = b"\0" + b"".join(encode(array, number, 0xABCD, label, scale) for number, (array, label, scale) in enumerate(every))
    assert wire == expected
    decoder = Decoder(1 << 14)
    assert [packet.sequence for packet in decoder.feed(wire)] == list(range(len(every)))
    assert decoder.counts["lost"] == 0


def test_what_no_packet_can_be_is_refused_and_nothing_is_sent(sender):
    pixels, short = np.ones((2, 3), np.uint8), np.ones(3, np.int16)
    wrong = [request(pixels, kind=kind) for kind in (0, 4)] + [request(pixels, dims=dims) for dims in ((6,), (1, 1, 2, 3), ())]
    wrong += [request(pixels, dims=(0, 3)), request(short, dims=(65535,) * 4)]
    wrong += [request(short, scale=float(scale)) for scale in ("0", "nan", "inf", "-inf", "7.8e-31", "1.3e30")]
    wire, complaints = sent(sender, b"".join(wrong))
    assert complaints.split("\n")[:-1] == ["refused"] * len(wrong)
    assert wire == b"\0"


def test_packets_that_are_given_up_or_not_whole_cost_only_themselves(sender):
    array = np.arange(600, dtype=np.uint8).reshape(30, 20)
    requests = [request(array), request(array, then=1), request(array, label=1), request(array, then=2), request(array, label=2)]
    wire, complaints = sent(sender, b"".join(requests))
    assert complaints == "not whole\n"
    decoder = Decoder(array.nbytes)
    assert [(packet.sequence, packet.label) for packet in decoder.feed(wire)] == [(0, -1), (2, 1), (4, 2)]
    assert decoder.counts["lost"] == 2
    assert decoder.counts["cobs"] + decoder.counts["header"] + decoder.counts["crc"] == 2


def test_what_is_too_much_of_a_payload_is_left_out(sender):
    pixels, short, numbers = np.arange(6, dtype=np.uint8).reshape(2, 3), np.arange(1, 4, dtype=np.int16), np.arange(1, 4, dtype=np.float32)
    requests = [request(pixels, dims=(2, 2))] * 2 + [request(short, dims=(2,))] * 2 + [request(numbers, dims=(2,))] * 2  # by bytes and by values
    wire, complaints = sent(sender, b"".join(requests))
    assert not complaints
    found = [packet.array.tolist() for packet in Decoder(100).feed(wire)]
    assert found == [[[0, 1], [2, 3]]] * 2 + [[1, 2]] * 4


class Wire:
    """A pseudo-terminal that a program writes to."""

    def __init__(self) -> None:
        self.end, self._device = pty.openpty()
        tty.setraw(self._device)
        self.url = os.ttyname(self._device)

    def close(self) -> None:
        os.close(self.end)
        os.close(self._device)


def read_from(program: list[str], source: Serial, wire: Wire, requests: bytes, count: int) -> list[Any]:
    """Its frames; the program starts when the line is open, as what comes before that is thrown away."""
    done = threading.Event()

    def idle() -> None:
        while not source.counts["bytes"] and not done.wait(0.005):
            os.write(wire.end, b"\0")
        if not done.is_set():
            subprocess.run(program, input=requests, stdout=wire.end, check=True)

    thread = threading.Thread(target=idle)
    thread.start()
    frames = iter(source)
    try:
        return [next(frames) for _ in range(count)]
    finally:
        done.set()
        thread.join(60)


def test_it_is_understood_over_a_terminal(sender):
    spec, wire = InputSpec((3, 40)), Wire()
    windows = np.random.default_rng(1).integers(-2000, 2000, (50, 3, 40)).astype(np.int16)
    requests = b"".join(request(window, number % 5, 0.125) for number, window in enumerate(windows))
    try:
        with Serial(wire.url, Wanted(spec, Task("classification", 5))) as source:
            found = read_from([sender, "3"], source, wire, requests, 50)
            assert np.array_equal([frame.pixels for frame in found], windows.astype(np.float32) * np.float32(0.125))
            assert [(frame.id, frame.truth) for frame in found] == [(number, number % 5) for number in range(50)]
            assert source.counts["lost"] == source.counts["cobs"] == source.counts["crc"] == source.counts["header"] == 0
    finally:
        wire.close()


@pytest.mark.parametrize("standard", ["c++11", "c++17"])
def test_the_sketch_sends_windows(standard, tmp_path):
    sketch = LIBRARY / "examples" / "Window" / "Window.ino"
    program = built(tmp_path, ["g++", f"-std={standard}"], "run.cpp", f'-DSKETCH="{sketch}"')
    wire = Wire()
    try:
        with Serial(wire.url, Wanted(InputSpec((3, 128)), Task("classification", 5))) as source:
            found = read_from([program], source, wire, b"", 3)
    finally:
        wire.close()
    assert [frame.id for frame in found] == [0, 1, 2]
    for frame in found:
        assert frame.fault == ""
        assert np.abs(frame.pixels).max() == pytest.approx(9.81, abs=0.2)  # the shim's pins swing by one g
        assert np.abs(np.diff(frame.pixels)).max() < 5.0  # from one sample to the next they go a little


def test_the_library_says_what_it_is():
    lines = (LIBRARY / "library.properties").read_text(encoding="utf-8").splitlines()
    properties = dict(line.split("=", 1) for line in lines)
    assert properties.keys() >= {"name", "version", "author", "maintainer", "sentence", "paragraph", "category", "url", "architectures", "includes"}
    assert properties["name"] == LIBRARY.name
    assert (LIBRARY / "src" / properties["includes"]).is_file()


@example(b"\1" * 254)
@example(b"\1" * 508)
@example(b"\1" * 254 + b"\0")
@example(b"\0" + b"\1" * 254)
@given(some.binary(max_size=800) | some.binary(max_size=3).map(lambda data: data * 300))
def test_stuffing_is_that_of_the_package_cobs(data):
    assert stuffed(data) == cobs.cobs.encode(data)
    assert unstuffed(cobs.cobs.encode(data)) == data


@given(some.binary(min_size=1, max_size=400).map(lambda data: data.replace(b"\0", b"\xff")) | some.binary(max_size=60))
def test_what_cannot_be_unstuffed_is_what_the_package_cobs_refuses(data):
    try:
        expected = cobs.cobs.decode(data) if data else None
    except cobs.cobs.DecodeError:
        expected = None
    assert unstuffed(data) == expected
