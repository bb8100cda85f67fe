"""How a serial line's decoder bears what a line does: noise, torn, doubled, swapped, damaged and too long packets, gaps and restarts in one stream.

What was put in is compared with what was counted, packet by packet and fault by fault; where that is noise, a slow and plain reader says what it is.
It also tells how many bytes after a fault the next packet begins to be read, and how fast. Ends with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from edgeadapt.devices.framing import Decoder, Packet, encode, stuffed, unstuffed  # noqa: E402

MOST = 1500  # bytes of payload
LONGEST = MOST + 60  # bytes of a packet on the line; none of the stream comes near that
FAULTS = ("cobs", "crc", "header", "oversize", "lost", "duplicates", "reordered", "restarts")
EVENTS = {"good": 50, "noise": 6, "cut": 6, "head": 3, "double": 6, "swap": 6, "crc": 6, "version": 2, "long": 1, "gap": 3, "idle": 4}
EVENTS |= {"boot": 0.2, "leap": 0.2}


@dataclass
class Outcome:
    """What became of a stream.

    Attributes:
        injected, counted: by kind, as in `Decoder.counts`.
        packets: that were to come.
        wrong: packets that came otherwise than they were sent, or did not come, or were not sent.
        behind: the most bytes from a fault that a zero ended to where the next packet began to be read.
        swallowed: the same of packets that broke off without a zero, which take the next with them.
        size, seconds: of the stream, and what reading it took.
    """

    injected: dict[str, int]
    counted: dict[str, int]
    packets: int
    wrong: int
    behind: int
    swallowed: list[int]
    size: int
    seconds: float


@dataclass
class _Made:
    """A stream in the making."""

    rng: np.random.Generator
    units: list[tuple[str, bytes]] = field(default_factory=list)  # "good", "quiet", "ended" (a fault and its zero), "open" (without), "taken" by that
    expected: list[tuple[int, int, int]] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    boot: int = 0
    number: int = 0
    first: int | None = None  # of this boot that came
    recent: dict[int, bytes] = field(default_factory=dict)  # of this boot that came
    size: int = 0

    def add(self, kind: str, data: bytes) -> None:
        self.units.append((kind, data))
        self.size += len(data)

    def array(self) -> Any:
        kind = self.rng.integers(4)
        if kind == 0:
            return self.rng.integers(0, 256, (int(self.rng.integers(1, 16)), int(self.rng.integers(1, 16)), 3)).astype(np.uint8)
        if kind == 1:
            return self.rng.standard_normal((3, int(self.rng.integers(1, 60)))).astype(np.float32)
        if kind == 2:
            return self.rng.integers(-300, 300, (6, int(self.rng.integers(1, 60)))).astype(np.int16)
        return self.rng.integers(1, 256, (1, int(self.rng.integers(200, 700)))).astype(np.uint8)  # blocks of 254

    def wire(self) -> tuple[bytes, int, int]:
        """The next packet, its number, and a hash of what must come of it."""
        array, number = self.array(), self.number
        self.number += 1
        return encode(array, number, self.boot, int(self.rng.integers(-1, 9)), 0.5), number, zlib.crc32(_taken(array).tobytes())

    def come(self, sent: tuple[bytes, int, int]) -> None:
        """A packet that must come."""
        data, number, content = sent
        if self.recent and number < max(self.recent):
            self.injected["reordered"] += 1
        self.first = number if self.first is None else self.first
        self.recent[number] = data
        self.expected.append((self.boot, number % 2**32, content))
        self.add("good", data)

    def bad(self, piece: bytes, kind: str = "ended") -> None:
        """Bytes without a zero, and a zero."""
        self.injected[plainly(piece)] += 1
        self.add(kind, piece + b"\0")

    def ended(self) -> None:
        """The numbers of this start of the sender are all."""
        if self.first is not None:
            self.injected["lost"] += max(self.recent) - self.first + 1 - len(self.recent)


def _taken(array: Any) -> Any:
    return array.astype(np.float32) * np.float32(0.5) if array.dtype == np.int16 else array


def plainly(piece: bytes) -> str:
    """What is wrong with a piece between two zeros, byte by byte."""
    if len(piece) > LONGEST:
        return "oversize"
    data, at = b"", 0
    while at < len(piece):
        code = piece[at]
        if at + code > len(piece):
            return "cobs"
        data += piece[at + 1 : at + code]
        at += code
        if code < 255 and at < len(piece):
            data += b"\0"
    if len(data) < 22:
        return "header"
    version, kind, _, _, _, ndim, reserved = struct.unpack_from("<BBHIhBB", data)
    if version != 1 or kind not in (1, 2, 3) or not 1 <= ndim <= 4 or reserved or (kind == 1 and ndim in (1, 4)) or len(data) < 20 + 2 * ndim:
        return "header"
    size = (1, 4, 2)[kind - 1]
    for dim in struct.unpack_from(f"<{ndim}H", data, 16):
        size *= dim
    if not size or 16 + 2 * ndim + size + 4 != len(data):
        return "header"
    return "crc" if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little") else "none"


def stream(size: int, seed: int) -> _Made:
    """A stream of about that many bytes, and what must be made of it."""
    made = _Made(np.random.default_rng(seed))
    rng = made.rng
    names, weights = list(EVENTS), np.array(list(EVENTS.values())) / sum(EVENTS.values())
    made.number, made.boot = 2**32 - 500, int(rng.integers(2**16))  # the numbers wrap soon
    made.come(made.wire())
    while made.size < size:
        _event(made, names[rng.choice(len(names), p=weights)])
    made.come(made.wire())
    made.ended()
    return made


def _event(made: _Made, event: str) -> None:
    rng = made.rng
    if event == "noise":
        noise = rng.integers(0, 256, int(rng.integers(1, 400))).astype(np.uint8).tobytes()
        for piece in filter(None, noise.split(b"\0")):
            made.bad(piece)
    elif event == "cut":  # bytes are missing, the zero is not among them
        data, _, _ = made.wire()
        first, last = sorted(rng.integers(1, len(data) - 1, 2).tolist())
        made.bad(data[:first] + data[last + 1 : -1])
    elif event == "head":  # the packet breaks off, and the next follows at once
        head, _, _ = made.wire()
        head = head[: int(rng.integers(1, len(head) - 1))]
        made.add("open", head)
        after, _, _ = made.wire()
        made.injected[plainly(head + after[:-1])] += 1
        made.add("taken", after)
    elif event == "double":
        near = [number for number in made.recent if max(made.recent) - number < 60]
        made.injected["duplicates"] += 1
        made.add("quiet", made.recent[near[int(rng.integers(len(near)))]])
    elif event == "swap":
        parts = [made.wire() for _ in range(int(rng.integers(2, 6)))]
        for part in rng.permutation(len(parts)).tolist():
            made.come(parts[part])
    elif event in ("crc", "version"):
        data, _, _ = made.wire()
        changed = unstuffed(data[:-1]) or bytearray()
        place = 0 if event == "version" else int(rng.integers(24, len(changed)))
        changed[place] ^= 1 << int(rng.integers(8))
        if event == "version":
            changed[-4:] = zlib.crc32(changed[:-4]).to_bytes(4, "little")
        made.bad(stuffed(bytes(changed)))
    elif event == "long":
        array = rng.integers(1, 256, (1, int(rng.integers(2 * MOST, 6 * MOST)))).astype(np.uint8)
        made.bad(encode(array, made.number, made.boot)[:-1])
        made.number += 1
    elif event == "gap":
        made.number += int(rng.integers(1, 100))
        made.come(made.wire())
    elif event in ("boot", "leap"):
        made.ended()
        made.injected["restarts"] += 1
        made.boot = (made.boot + (event == "boot")) % 2**16
        made.number = int(rng.integers(2**32)) if event == "boot" else max(made.recent) + int(rng.integers(10**6, 10**9))
        made.first, made.recent = None, {}
        made.come(made.wire())
    elif event == "idle":
        made.add("quiet", bytes(int(rng.integers(1, 30))))
    else:
        made.come(made.wire())


def chunks(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """The data in parts as a line gives them, from single bytes to 4 KiB."""
    at = 0
    while at < len(data):
        size = int(2 ** rng.uniform(0, 12))
        yield data[at : at + size]
        at += size


def fuzzed(size: int, seed: int) -> Outcome:
    """Makes a stream and reads it."""
    made = stream(size, seed)
    data = b"".join(part for _, part in made.units)
    parts = list(chunks(data, np.random.default_rng(seed + 1)))
    decoder, came = Decoder(MOST), []
    begun = time.perf_counter()
    for part in parts:
        came += decoder.feed(part)
    seconds = time.perf_counter() - begun
    found = [_seen(packet) for packet in came]
    wrong = sum(one != other for one, other in zip(found, made.expected)) + abs(len(found) - len(made.expected))
    behind, swallowed = _distances(made.units)
    counted = {kind: decoder.counts[kind] for kind in FAULTS}
    return Outcome({kind: made.injected[kind] for kind in FAULTS}, counted, len(made.expected), wrong, behind, swallowed, len(data), seconds)


def _seen(packet: Packet) -> tuple[int, int, int]:
    return packet.boot, packet.sequence, zlib.crc32(packet.array.tobytes())


def _distances(units: list[tuple[str, bytes]]) -> tuple[int, list[int]]:
    """Bytes from the end of each fault to the beginning of the next packet that came: the most where a zero ended it, and all where none did."""
    decoder = Decoder(MOST)
    after: str | None = None
    passed, behind, swallowed = 0, 0, []
    for kind, data in units:
        came = decoder.feed(data)
        if kind in ("ended", "open"):
            after, passed = kind, 0
        elif came and after is not None:
            if after == "open":
                swallowed.append(passed)
            else:
                behind = max(behind, passed)
            after = None
        elif kind != "quiet":
            passed += len(data)
    return behind, swallowed


def main() -> int:
    """Prints a table; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000_000, help="bytes of the stream (default: ten million)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    choices = parser.parse_args()
    found = fuzzed(choices.size, choices.seed)
    print(f"{found.size} bytes, {found.packets} packets of which {found.wrong} came wrongly or not at all\n{'':<12}{'injected':>10}{'counted':>10}")
    for kind in FAULTS:
        same = "" if found.injected[kind] == found.counted[kind] else "   differs"
        print(f"{kind:<12}{found.injected[kind]:>10}{found.counted[kind]:>10}{same}")
    print(f"\nin step again {found.behind} bytes after a fault that a zero ends, at most")
    if found.swallowed:
        taken = np.array(found.swallowed)
        print(f"after packets that broke off: one packet later, {taken.mean():.0f} bytes in the mean, {taken.max()} at most, {len(taken)} times")
    print(f"{found.size / 1e6 / found.seconds:.1f} MB/s")
    if choices.json:
        choices.json.write_text(json.dumps(vars(found), indent=1) + "\n", encoding="utf-8")
    return int(found.wrong != 0 or found.behind != 0 or found.injected != found.counted)


if __name__ == "__main__":
    sys.exit(main())
