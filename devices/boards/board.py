"""What the planner and the simulator must know of a board, and the TOML files that say it.

A profile is data somebody may write by hand, so every field is checked and a mistake is told with the file, the field and what was expected.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeadapt.errors import InputError, UsageError
from edgeadapt.units import format_bytes, parse_bytes

KNOWN = ("measured", "estimated")
"""How a figure came about."""

LARGEST_FILE = 1 << 16
"""Bytes of a profile; more is no profile."""


@dataclass(frozen=True)
class Board:
    """A board, or this machine, as a plan sees it.

    Attributes:
        key: what `load` takes.
        name: for people.
        memory: bytes one process can use under the vendor's Linux, everything the system itself holds taken off.
        page: bytes of a page of memory.
        cores: processors.
        arm: 64-bit Arm, else x86-64.
        isa: instruction sets that matter to kernels, by the names of docs/boards.md.
        floor: resident bytes of a process with Python, numpy, onnxruntime and one trivial session that ran.
        floor_known: "measured" or "estimated".
        gflops: 1e9 float32 operations a second of one core in a 3×3 convolution of onnxruntime (a multiply-add is two).
        gbps: 1e9 bytes a second, read plus written, of a large copy on one core.
        rates_known: of gflops and gbps, "measured" or "estimated".
        unified_gpu: a GPU lives in the same memory.
        note: what one should know of it.
        total: bytes of memory Linux reports (MemTotal).
        floor_from, rates_from: where the figures come from.
        code: of the floor, bytes of onnxruntime's code that an adapter with a budget gives back; None where that was not measured.
    """

    key: str
    name: str
    memory: int
    page: int
    cores: int
    arm: bool
    isa: tuple[str, ...]
    floor: int
    floor_known: str
    gflops: float
    gbps: float
    rates_known: str
    unified_gpu: bool
    note: str
    total: int
    floor_from: str = ""
    rates_from: str = ""
    code: int | None = None


@dataclass(frozen=True)
class Size:
    """One memory size of a board: its name ("4gb"; empty where there is only one), MemTotal, usable bytes, and the cores of boards sold with it."""

    name: str
    total: int
    usable: int
    cores: int


@dataclass(frozen=True)
class Calibration:
    """How and where the figures of a saved profile were measured.

    Attributes:
        machine: fingerprint of the machine, as `probe.Machine.fingerprint`.
        date: when, UTC, ISO 8601.
        edgeadapt, python, numpy, onnxruntime: versions then.
        threads: of the figures for all cores.
        gflops_all: like Board.gflops, on all cores.
        matmul, matmul_all: 1e9 float32 operations a second of a matrix product of onnxruntime, on one core and on all.
    """

    machine: str
    date: str
    edgeadapt: str
    python: str
    numpy: str
    onnxruntime: str
    threads: int
    gflops_all: float
    matmul: float
    matmul_all: float


@dataclass(frozen=True)
class Profile:
    """A profile file.

    Attributes:
        board: the board, with its smallest memory.
        sizes: memory sizes sold, from the smallest.
        models: parts of the device tree's model by which a machine is recognised.
        calibration: where the file was written by `edgeadapt calibrate`.
    """

    board: Board
    sizes: tuple[Size, ...]
    models: tuple[str, ...] = ()
    calibration: Calibration | None = None

    def boards(self) -> list[Board]:
        """The board with each of its memory sizes, keys as pi4-1gb, pi4-2gb; the plain key where there is one size."""
        return [
            replace(
                self.board,
                key=f"{self.board.key}-{size.name}" if size.name else self.board.key,
                name=f"{self.board.name}, {size.name[:-2]} {size.name[-2:].upper()}" if size.name else self.board.name,
                total=size.total,
                memory=size.usable,
                cores=size.cores,
            )
            for size in self.sizes
        ]


def read(path: str | os.PathLike[str]) -> Profile:
    """Reads and checks a profile.

    Raises:
        UsageError: the file is not there.
        InputError: it cannot be read, or a field is missing, unknown or wrong.
    """
    where = Path(path)
    try:
        with where.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UsageError(
            f"there is no board profile {where}", "give the path of a profile, or a board's key: edgeadapt doctor --boards lists them"
        ) from None
    except OSError as reason:
        raise InputError(
            f"{where} cannot be read: {reason.strerror or reason}", "give a board profile, a TOML file; docs/boards.md says how to write one"
        ) from None
    if len(data) > LARGEST_FILE:
        raise InputError(f"{where} is no board profile: more than {format_bytes(LARGEST_FILE)}", _HINT)
    return _parse(where, data)


_HINT = "docs/boards.md has an example of a profile"


def _parse(where: Path, data: bytes) -> Profile:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as reason:
        raise InputError(f"{where} is not TOML: {reason}", _HINT) from None
    table = _Table(where, content)
    cores = table.count("cores")
    sizes = _sizes(table, cores)
    floor = table.size("floor")
    board = Board(
        key=where.stem,
        name=table.text("name"),
        total=sizes[0].total,
        memory=sizes[0].usable,
        page=table.page(),
        cores=sizes[0].cores,
        arm=table.choice("arch", ("aarch64", "x86-64")) == "aarch64",
        isa=table.words("isa"),
        floor=floor,
        floor_known=table.choice("floor_known", KNOWN),
        floor_from=table.text("floor_from", longest=400, empty=""),
        gflops=table.rate("gflops"),
        gbps=table.rate("gbps"),
        rates_known=table.choice("rates_known", KNOWN),
        rates_from=table.text("rates_from", longest=400, empty=""),
        code=table.size("code", zero=True) if "code" in content else None,
        unified_gpu=table.flag("unified_gpu"),
        note=table.text("note", longest=1000, empty=""),
    )
    if board.code is not None and board.code >= floor:
        raise table.wrong("code", f"less than the floor of {format_bytes(floor)}", format_bytes(board.code))
    if floor >= board.memory:
        raise table.wrong("floor", f"less than the usable memory of {format_bytes(board.memory)}", format_bytes(floor))
    models = table.words("models", word=r"\S.{2,99}") if "models" in content else ()
    calibration = _calibration(table.inner("calibration")) if "calibration" in content else None
    table.done()
    return Profile(board, sizes, models, calibration)


def _sizes(table: _Table, cores: int) -> tuple[Size, ...]:
    if "sizes" not in table.content:
        return (Size("", *_memory(table), cores),)
    every = table.inner("sizes")
    if not every.content:
        raise table.wrong("sizes", "a table for each memory size, as [sizes.4gb]", "none")
    found = []
    for name in every.content:
        if not re.fullmatch(r"[0-9]+[mg]b", name):
            raise every.wrong(name, "a size's name such as 512mb or 4gb", repr(name))
        inner = every.inner(name)
        found.append(Size(name, *_memory(inner), inner.count("cores") if "cores" in inner.content else cores))
        inner.done()
    return tuple(sorted(found, key=lambda size: size.total))


def _memory(table: _Table) -> tuple[int, int]:
    total, usable = table.size("total"), table.size("usable")
    if usable > total:
        raise table.wrong("usable", f"at most the total of {format_bytes(total)}", format_bytes(usable))
    return total, usable


def _calibration(table: _Table) -> Calibration:
    result = Calibration(
        machine=table.text("machine"),
        date=table.text("date"),
        edgeadapt=table.text("edgeadapt"),
        python=table.text("python"),
        numpy=table.text("numpy"),
        onnxruntime=table.text("onnxruntime"),
        threads=table.count("threads"),
        gflops_all=table.rate("gflops_all"),
        matmul=table.rate("matmul"),
        matmul_all=table.rate("matmul_all"),
    )
    table.done()
    return result


class _Table:
    """A TOML table whose fields are asked for one by one; `done` refuses those nobody asked for."""

    def __init__(self, where: Path, content: Mapping[str, Any], prefix: str = "") -> None:
        self.content = content
        self._where, self._prefix, self._asked = where, prefix, set[str]()

    def wrong(self, name: str, expected: str, got: str) -> InputError:
        """The error for a field."""
        return InputError(f"{self._where}: {self._prefix}{name}: expected {expected}, got {got}", _HINT)

    def _value(self, name: str, expected: str) -> Any:
        self._asked.add(name)
        if name not in self.content:
            raise self.wrong(name, expected, "nothing (the field is missing)")
        return self.content[name]

    def inner(self, name: str) -> _Table:
        """A table in this one."""
        value = self._value(name, "a table")
        if not isinstance(value, dict):
            raise self.wrong(name, "a table", repr(value))
        return _Table(self._where, value, f"{self._prefix}{name}.")

    def text(self, name: str, longest: int = 100, empty: str | None = None) -> str:
        """A text; with `empty`, one that may be missing or empty."""
        if empty is not None and not self.content.get(name, ""):
            self._asked.add(name)
            return empty
        value = self._value(name, "a text")
        if not isinstance(value, str) or not 0 < len(value.strip()) <= longest:
            raise self.wrong(name, f"a text of at most {longest} characters", repr(value))
        return value.strip()

    def words(self, name: str, word: str = r"[a-z0-9][a-z0-9._-]{0,39}") -> tuple[str, ...]:
        """A list of texts without blanks, or as the pattern says."""
        value = self._value(name, "a list of texts")
        if not isinstance(value, list) or not all(isinstance(item, str) and re.fullmatch(word, item) for item in value):
            raise self.wrong(name, 'a list of texts such as ["neon", "dotprod"]', repr(value))
        return tuple(value)

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """One of some texts."""
        expected = " or ".join(f'"{choice}"' for choice in choices)
        value = self._value(name, expected)
        if value not in choices:
            raise self.wrong(name, expected, repr(value))
        return str(value)

    def flag(self, name: str) -> bool:
        """true or false."""
        value = self._value(name, "true or false")
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", repr(value))
        return value

    def size(self, name: str, zero: bool = False) -> int:
        """Bytes: a whole number, or a text with a unit; zero: or nothing."""
        expected = 'a size such as "906MiB", or bytes'
        value = self._value(name, expected)
        if zero and value == 0 and type(value) is int:
            return 0
        try:
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise self.wrong(name, expected, repr(value))
            size = parse_bytes(value)
        except UsageError:
            raise self.wrong(name, expected, repr(value)) from None
        if size > 1 << 50:
            raise self.wrong(name, "less than 1 PiB", repr(value))
        return size

    def page(self) -> int:
        """The page size."""
        size = self.size("page")
        if size & (size - 1) or not 4096 <= size <= 65536:
            raise self.wrong("page", "4KiB, 16KiB or another power of two up to 64KiB", repr(self.content["page"]))
        return size

    def count(self, name: str) -> int:
        """A whole number from 1."""
        value = self._value(name, "a whole number")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4096:
            raise self.wrong(name, "a whole number from 1 to 4096", repr(value))
        return value

    def rate(self, name: str) -> float:
        """A positive number."""
        value = self._value(name, "a positive number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and 0 < value <= 1e6):
            raise self.wrong(name, "a positive number up to 1e6", repr(value))
        return float(value)

    def done(self) -> None:
        """Refuses fields that are not known."""
        for name in self.content:
            if name not in self._asked:
                near = difflib.get_close_matches(name, self._asked, 1)
                raise InputError(
                    f"{self._where}: {self._prefix}{name}: there is no such field", f"did you mean {near[0]}? " + _HINT if near else _HINT
                )
