"""Packets on a serial line: what is sent comes back, however it is cut; what is damaged is counted as what it is, and harms no other packet."""

from __future__ import annotations

import dataclasses
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from benchmarks.serial_fuzz import fuzzed
from edgeadapt.bundle import InputSpec
from edgeadapt.devices.framing import COUNTED, END, MOST_PIXELS, Decoder, Packet, Pieces, encode, most_payload, stuffed, unstuffed
from edgeadapt.errors import InputError

pytestmark = pytest.mark.device

MOST = 600
LINE = MOST + 31  # bytes that a packet with such a payload may take on the line, but its zero
IMAGE = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


def image(number: int) -> np.ndarray:
    return IMAGE + np.uint8(number % 100)


def packet(number: int, boot: int = 0) -> bytes:
    return encode(image(number), number, boot)


def took(data: bytes, decoder: Decoder | None = None) -> tuple[list[int], dict[str, int]]:
    """The numbers of the packets in these bytes, and what is counted beside bytes and packets."""
    decoder = decoder or Decoder(MOST)
    found = [one.sequence for one in decoder.feed(data)]
    return found, {kind: count for kind, count in decoder.counts.items() if count and kind not in ("bytes", "packets")}


def raw(data: bytes) -> bytes:
    """A packet with its right checksum, whatever it says."""
    return stuffed(data + zlib.crc32(data).to_bytes(4, "little")) + END


def plain(number: int = 0) -> bytearray:
    """Header, dimensions and payload of a packet."""
    made = unstuffed(packet(number)[:-1])
    assert made is not None
    return made[:-4]


@some.composite
def arrays(draw: some.DrawFn) -> np.ndarray:
    dtype = draw(some.sampled_from([np.uint8, np.float32, np.int16]))
    fewest, most = (2, 3) if dtype == np.uint8 else (1, 4)
    dims = draw(some.lists(some.integers(1, 5), min_size=fewest, max_size=most))
    size = int(np.prod(dims)) * np.dtype(dtype).itemsize
    data = draw(some.binary(min_size=size, max_size=size) | some.sampled_from([bytes(size), b"\1" * size, b"\xff" * size]))
    return np.frombuffer(data, dtype).reshape(dims)


@given(arrays(), some.integers(0, 2**32 - 1), some.integers(0, 2**16 - 1), some.integers(-1, 2**15 - 1), some.floats(2.0**-100, 2.0**100, width=32))
def test_what_is_sent_comes_back(array, sequence, boot, label, scale):
    decoder = Decoder(array.nbytes)
    (found,) = decoder.feed(encode(array, sequence, boot, label, scale))
    assert (found.sequence, found.boot, found.label) == (sequence, boot, label)
    assert found.array.flags.writeable
    assert found.array.flags.aligned
    assert found.array.dtype == (np.uint8 if array.dtype == np.uint8 else np.float32)
    expected = array.astype(np.float32) * np.float32(scale) if array.dtype == np.int16 else array
    assert found.array.shape == array.shape
    assert found.array.tobytes() == expected.tobytes()  # NaN, too, as it is
    assert decoder.counts == {**dict.fromkeys(COUNTED, 0), "bytes": decoder.counts["bytes"], "packets": 1}


@given(some.binary(max_size=1100) | some.binary(max_size=4).map(lambda data: data * 200))
def test_stuffing_leaves_no_zero_and_takes_little(data):
    made = stuffed(data)
    assert 0 not in made
    assert len(made) <= len(data) + len(data) // 254 + 1
    assert unstuffed(made) == data
    assert unstuffed(bytearray(made)) == data


@pytest.mark.parametrize("size", [0, 1, 253, 254, 255, 508, 509, 1000])
@pytest.mark.parametrize("around", [(b"", b""), (b"\0", b""), (b"", b"\0"), (b"\0", b"\0")])
def test_stuffing_of_long_blocks(size, around):
    data = around[0] + b"\7" * size + around[1]
    assert unstuffed(stuffed(data)) == data


@pytest.mark.parametrize("data", [b"", b"\0", b"\3\1", b"\2\1\0", b"\xff" + b"\1" * 253, b"\1\1\2"])
def test_what_nothing_was_stuffed_into(data):
    assert unstuffed(data) is None


def test_the_example_of_the_description_is_right():
    text = (Path(__file__).parents[1] / "devices" / "firmware" / "README.md").read_text(encoding="utf-8")
    before, wire = (bytes.fromhex(found) for found in re.findall(r"^(?:before|on line)  +([0-9a-f ]+)$", text, re.MULTILINE))
    assert encode(np.array([[0, 7]], np.uint8), 2, boot=1, label=3) == wire
    assert unstuffed(wire[:-1]) == before


@given(some.data())
def test_any_cut_of_a_stream_gives_the_same(data):
    noise = data.draw(some.lists(some.binary(max_size=20), min_size=6, max_size=6))
    stream = b"".join(part + END + packet(number) for number, part in enumerate(noise))
    whole = Decoder(MOST)
    expected = [one.sequence for one in whole.feed(stream)]
    cuts = sorted(data.draw(some.lists(some.integers(0, len(stream)), max_size=40)))
    parts = Decoder(MOST)
    found = [one.sequence for begin, end in zip([0, *cuts], [*cuts, len(stream)]) for one in parts.feed(stream[begin:end])]
    assert found == expected == list(range(6))
    assert parts.counts == whole.counts


@given(some.lists(some.binary(max_size=300) | some.binary(max_size=300).map(lambda data: data.replace(END, b"\1")), max_size=20))
def test_noise_is_never_a_packet_and_never_kept(noise):
    decoder = Decoder(MOST)
    for part in noise:
        assert decoder.feed(part) == []
        assert decoder.held <= LINE
    *ended, last = b"".join(noise).split(END)
    bad = sum(decoder.counts[kind] for kind in ("cobs", "crc", "header", "oversize"))
    assert bad == sum(piece != b"" for piece in ended) + (len(last) > LINE)  # the last one is told before it ends
    found, _ = took(END + packet(7), decoder)
    assert found == [7]


@given(some.binary(max_size=64), some.integers(0, 255))
def test_a_changed_header_is_refused_or_is_what_it_says(junk, value):
    """With a right checksum, so that only the header's own sense can refuse it."""
    for place in range(16):
        made = plain() + junk
        made[place] = value
        decoder = Decoder(MOST)
        for found in decoder.feed(raw(bytes(made))):
            assert found.array.nbytes in (len(made) - 16 - 2 * found.array.ndim, 2 * (len(made) - 16 - 2 * found.array.ndim))
        assert decoder.counts["packets"] + decoder.counts["header"] + decoder.counts["oversize"] == 1


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, 0), (0, 2), (1, 0), (1, 4), (10, 0), (10, 1), (10, 2), (10, 4), (10, 5), (11, 1), (16, 5), (18, 0)],
)
def test_impossible_headers(place, value):
    made = plain()
    made[place] = value
    assert took(raw(bytes(made))) == ([], {"header": 1})
    assert took(stuffed(bytes(made) + b"\1\2\3\4") + END) == ([], {"header": 1})


def test_a_scale_that_makes_no_numbers_is_impossible():
    for scale in (0.0, float("inf"), float("nan"), 1e38, -1e-38):
        made = unstuffed(encode(np.ones(3, np.int16), 0)[:-1])[:-4]
        made[12:16] = np.float32(scale).tobytes()
        assert took(raw(bytes(made))) == ([], {"header": 1})
        pixels = plain()
        pixels[12:16] = np.float32(scale).tobytes()  # of an image it says nothing
        assert took(raw(bytes(pixels))) == ([0], {})
    (found,) = Decoder(MOST).feed(encode(np.array([-32768, 32767], np.int16), 0, scale=-(2.0**100)))
    assert np.isfinite(found.array).all()


def test_claims_of_a_header_take_no_memory():
    made = bytearray(unstuffed(encode(np.ones((1, 1, 1, 1), np.float32), 0)[:-1])[:-4])
    made[16:24] = b"\xff" * 8  # 65535 x 65535 x 65535 x 65535
    assert took(raw(bytes(made))) == ([], {"header": 1})


def test_every_single_bit_matters():
    wire = packet(3)
    for bit in range(8 * len(wire) - 8):
        data = bytearray(wire)
        data[bit // 8] ^= 1 << bit % 8
        decoder = Decoder(MOST)
        assert [one.sequence for one in decoder.feed(bytes(data) + packet(4))] == [4]
        assert decoder.counts["cobs"] + decoder.counts["crc"] + decoder.counts["header"] in (1, 2)  # two where it became a zero


def test_a_flipped_bit_of_the_payload_is_a_wrong_checksum():
    made = unstuffed(packet(3)[:-1])
    made[40] ^= 16
    assert took(packet(2) + stuffed(bytes(made)) + END + packet(4)) == ([2, 4], {"crc": 1, "lost": 1})


def test_torn_packets_take_no_other_with_them():
    assert took(packet(0) + packet(1)[:30] + END + packet(2)) == ([0, 2], {"cobs": 1, "lost": 1})
    for begin in range(1, 80):  # somebody who begins to listen in the middle
        found, counts = took(packet(0)[begin:] + packet(1))
        assert found == [1]
        assert sum(counts.values()) == 1
    wire = encode(np.full((1, MOST), 3, np.uint8), 1)
    ends = wire.index(b"\xff\3", 200)  # where a block ends, only the length is wrong
    assert took(packet(0) + wire[:ends] + END + packet(2)) == ([0, 2], {"header": 1, "lost": 1})


def test_zeros_fill_the_line():
    assert took(END * 5 + packet(0) + END * 70_000 + packet(1)) == ([0, 1], {})


def test_too_long_ones_are_thrown_away_as_they_come():
    small, large = encode(np.ones((1, MOST), np.uint8), 0), encode(np.ones((1, MOST + 1), np.uint8), 1)
    decoder = Decoder(MOST)
    assert took(small + large, decoder) == ([0], {"oversize": 1})
    for _ in range(100):
        assert decoder.feed(b"\7" * 1000) == []
        assert decoder.held <= LINE
    assert took(END + encode(np.ones((1, 1), np.uint8), 2), decoder) == ([2], {"oversize": 2, "lost": 1})


def test_lost_duplicates_and_late_ones():
    every = [packet(number) for number in range(200)]
    assert took(b"".join(every[number] for number in (0, 1, 5, 6))) == ([0, 1, 5, 6], {"lost": 3})
    assert took(b"".join(every[number] for number in (0, 1, 1, 2, 0, 3))) == ([0, 1, 2, 3], {"duplicates": 2})
    assert took(b"".join(every[number] for number in (0, 2, 1, 3))) == ([0, 2, 1, 3], {"reordered": 1})
    assert took(b"".join(every[number] for number in (0, 3, 1, 1, 4))) == ([0, 3, 1, 4], {"lost": 1, "reordered": 1, "duplicates": 1})
    assert took(b"".join(every[number] for number in (10, 9, 11, 9))) == ([10, 9, 11], {"reordered": 1, "duplicates": 1})  # before the first
    assert took(b"".join(every[number] for number in (0, 70, 7, 71))) == ([0, 70, 7, 71], {"lost": 68, "reordered": 1})
    assert took(b"".join(every[number] for number in (0, 100, 36))) == ([0, 100, 36], {"lost": 99, "restarts": 1})


@given(some.integers(0, 2**32 - 1), some.lists(some.integers(-63, 20), max_size=80))
def test_numbers_are_counted_as_a_list_would(first, steps):
    """Against all numbers in a plain list, those of up to 63 before the newest among them, around the wrap too."""
    decoder, came, newest, late = Decoder(MOST), [], 0, 0
    for step in [0, *steps]:
        number = newest + step
        found = [one.sequence for one in decoder.feed(encode(IMAGE, first + number))]
        assert found == ([] if number in came else [(first + number) % 2**32])
        late += number < newest and number not in came
        came.append(number)
        newest = max(newest, number)
    assert decoder.counts["lost"] == len(set(range(newest)) - set(came))
    assert decoder.counts["reordered"] == late
    assert decoder.counts["duplicates"] == len(came) - len(set(came))
    assert decoder.counts["restarts"] == 0


def test_of_older_packets_nothing_is_kept():
    decoder = Decoder(MOST)
    number = 2**32 - 500
    for step in [1] * 300 + [2] * 200 + [60_000, 1, 64, 63, 65]:
        number += step
        decoder.feed(encode(IMAGE, number))
        order = decoder._order
        assert len(order._came) + len(order._missing) <= 64
        assert all((number - known) % 2**32 < 64 for known in (*order._came, *order._missing))


def test_numbers_wrap():
    top = 2**32
    numbers = [top - 2, top - 1, 0, 3, 1, top - 1, 4]
    assert took(b"".join(encode(image(number % 50), number) for number in numbers)) == (
        [top - 2, top - 1, 0, 3, 1, 4],
        {"lost": 1, "reordered": 1, "duplicates": 1},
    )


def test_restarts():
    assert took(packet(5, 1) + packet(6, 1) + packet(0, 2) + packet(1, 2)) == ([5, 6, 0, 1], {"restarts": 1})
    assert took(packet(5, 1) + packet(0, 2) + packet(3, 2)) == ([5, 0, 3], {"restarts": 1, "lost": 2})
    # without a boot number: far back, far ahead, or numbers again with something else
    assert took(packet(500) + packet(0) + packet(1)) == ([500, 0, 1], {"restarts": 1})
    assert took(packet(0) + packet(2**16)) == ([0, 2**16], {"lost": 2**16 - 1})
    assert took(packet(0) + packet(2**16 + 1)) == ([0, 2**16 + 1], {"restarts": 1})
    again = [encode(image(50 + number), number) for number in range(4)]
    assert took(packet(0) + packet(1) + packet(2) + b"".join(again)) == ([0, 1, 2, 0, 1, 2, 3], {"restarts": 1})


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (np.zeros((2, 2)), {}),
        (np.zeros(4, np.uint8), {}),
        (np.zeros((1, 2, 2, 3), np.uint8), {}),
        (np.zeros((0, 2), np.uint8), {}),
        (np.zeros((1,) * 5, np.float32), {}),
        (np.zeros((), np.int16), {}),
        (np.zeros((1, 65536), np.uint8), {}),
        (IMAGE, {"label": 2**15}),
        (IMAGE, {"label": -2}),
        (np.zeros(3, np.int16), {"scale": 0.0}),
        (np.zeros(3, np.int16), {"scale": float("nan")}),
        (np.zeros(3, np.int16), {"scale": 1e31}),
    ],
)
def test_what_no_packet_can_hold(array, options):
    with pytest.raises(InputError):
        encode(array, 0, **options)


def test_other_orders_of_memory_and_bytes_are_sent_alike():
    across = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    (found,) = Decoder(MOST).feed(encode(across, 0))
    assert np.array_equal(found.array, across)
    swapped = across.astype(">f4")
    with pytest.raises(InputError):
        encode(swapped, 0)


def test_how_much_a_bundle_needs():
    assert most_payload(InputSpec((6, 128))) == 4096
    assert most_payload(InputSpec((6, 256))) == 4 * 6 * 256
    assert most_payload(InputSpec((3, 32, 32))) == 4 * 3 * 32 * 32
    assert most_payload(InputSpec((3, 32, 32), resize=(32, 32))) == 3 * MOST_PIXELS
    assert most_payload(InputSpec((1, 2000, 2000), resize=(2000, 2000))) == 4 * 2000 * 2000


def test_pieces_are_cut_and_bounded():
    pieces = Pieces(b"\n", 3)
    assert pieces.feed(b"ab") == []
    assert pieces.held == 2
    assert pieces.feed(b"c\n\nabcd\nx\nabc") == [b"abc", b"", None, b"x"]
    assert pieces.feed(b"d") == [None]
    assert pieces.feed(b"ef") == []
    assert pieces.held == 0
    assert pieces.feed(b"\nab\n") == [b"ab"]


def test_packets_cannot_be_changed():
    (found,) = Decoder(MOST).feed(packet(0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.label = 3
    assert isinstance(found, Packet)


@pytest.mark.parametrize("seed", range(3))
def test_every_injected_fault_is_counted_as_what_it_is(seed):
    found = fuzzed(300_000, seed)
    assert found.counted == found.injected
    assert all(found.injected.values())
    assert found.wrong == 0
    assert found.behind == 0
