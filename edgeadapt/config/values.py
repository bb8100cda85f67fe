"""What a setting's value may be: readers from TOML values to ours, and back to TOML text."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from edgeadapt.config.words import CONTROL, did_you_mean, seconds_of, size_text, time_text, told, toml
from edgeadapt.errors import UsageError
from edgeadapt.units import parse_bytes

T = TypeVar("T")


class UnfitError(Exception):
    """A value is not what a reader takes.

    Args:
        expected: what it takes.
        got: what came.
        fix: how to mend it; "" where the setting's own example says it best.

    Attributes:
        inside: the name or number of the item of the value that it is about; empty where it is the value.
    """

    inside: tuple[str | int, ...] = ()

    def __init__(self, expected: str, got: str, fix: str = "") -> None:
        super().__init__(f"expected {expected}, got {got}")
        self.expected, self.got, self.fix = expected, got, fix


class Reader(ABC, Generic[T]):
    """One kind of value.

    Attributes:
        takes: what it takes, in words that follow "expected".
    """

    takes: str

    @abstractmethod
    def read(self, value: object, base: str) -> T:
        """The value as the program holds it.

        Args:
            value: as tomllib gives it.
            base: the folder that relative paths begin at.

        Raises:
            UnfitError: it is not such a value.
        """

    def write(self, value: T) -> str:
        """The TOML text that is read as this value. What stands before an @ in an address is left out."""
        return toml(value)

    def _unfit(self, value: object, fix: str = "") -> UnfitError:
        return UnfitError(self.takes, told(value), fix)


class Text(Reader[str]):
    """A text on one line.

    Args:
        pattern: what all of it must match.
        takes: what it is, for people; needed with a pattern.
        fix: how to mend another one.
    """

    def __init__(self, pattern: str = r".+", takes: str = "text", fix: str = "") -> None:
        self._pattern, self.takes, self._fix = re.compile(pattern), takes, fix

    def read(self, value: object, base: str) -> str:
        if not isinstance(value, str) or CONTROL.search(value) or not self._pattern.fullmatch(value):
            raise self._unfit(value, self._fix)
        return value


class Choice(Reader[str]):
    """One of some words."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.takes = " or ".join(filter(None, (", ".join(map(toml, names[:-1])), toml(names[-1]))))

    def read(self, value: object, base: str) -> str:
        if value not in self.names:
            raise self._unfit(value, did_you_mean(value, self.names, toml) if isinstance(value, str) else "")
        return str(value)


class Flag(Reader[bool]):
    """true or false."""

    takes = "true or false"

    def read(self, value: object, base: str) -> bool:
        if not isinstance(value, bool):
            raise self._unfit(value, "write true or false, without quotes")
        return value


class Integer(Reader[int]):
    """A whole number of a range."""

    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = low, high
        self.takes = f"a whole number from {low} to {high}"

    def read(self, value: object, base: str) -> int:
        if type(value) is not int or not self._low <= value <= self._high:
            raise self._unfit(value, _unquoted(value))
        return value


class Number(Reader[float]):
    """A number of a range, as a float."""

    def __init__(self, low: float = -3e38, high: float = 3e38) -> None:
        self._low, self._high = low, high
        self.takes = "a number" if high == 3e38 == -low else f"a number of at least {low:g}" if high == 3e38 else f"a number from {low:g} to {high:g}"

    def read(self, value: object, base: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not self._low <= value <= self._high:
            raise self._unfit(value, _unquoted(value))
        return float(value)


class Size(Reader[int]):
    """Bytes: a whole number, or a text with a unit as in "48MiB"."""

    def __init__(self, low: int = 1, high: int = 2**39) -> None:
        self._low, self._high = low, high
        self.takes = f"a size from {size_text(low)} to {size_text(high)}"

    def read(self, value: object, base: str) -> int:
        fix = 'write a number and a unit, such as "96MiB" or "1.5GB", or bytes as a number'
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self._unfit(value, fix)
        try:
            size = 0 if value in (0, "0") else parse_bytes(value)
        except (UsageError, ValueError):  # of a number too long to be written out
            raise self._unfit(value, fix) from None
        if not self._low <= size <= self._high:
            raise self._unfit(value, f"give at least {size_text(self._low)}" if size < self._low else f"give at most {size_text(self._high)}")
        return size

    def write(self, value: int) -> str:
        return size_text(value) if value < 1024 else toml(size_text(value))


class Duration(Reader[float]):
    """Seconds: a number, or a text with a unit as in "40ms", "2.5s", "5min", "1h", "1d".

    Args:
        low, high: the range, seconds.
        off: 0 is taken too, whatever the range.
    """

    def __init__(self, low: float = 0.001, high: float = 366 * 86400.0, off: bool = False) -> None:
        self._low, self._high, self._off = low, high, off
        self.takes = f"{'0 or ' if off else ''}a time from {time_text(low)} to {time_text(high)}"

    def read(self, value: object, base: str) -> float:
        seconds = seconds_of(value)
        if seconds is None:
            raise self._unfit(value, 'write a number and one of ms, s, min, h, d, such as "40ms" or "5min", or seconds as a number')
        if not (self._low <= seconds <= self._high or (self._off and seconds == 0)):
            raise self._unfit(value, f"give at least {time_text(self._low)}" if seconds < self._low else f"give at most {time_text(self._high)}")
        return seconds

    def write(self, value: float) -> str:
        text = time_text(value)
        return "0" if value == 0 else toml(text) if seconds_of(text) == value else toml(value)


class FilePath(Reader[Path]):
    """A path of a file, folder or device. A relative one begins at the folder of the file that gives it, else where the program was started."""

    takes = "a path"

    def read(self, value: object, base: str) -> Path:
        if not isinstance(value, str) or not value or CONTROL.search(value):
            raise self._unfit(value)
        if value.startswith("~"):
            raise self._unfit(value, "write the whole path: ~ is no folder to a service")
        return Path(base, value)


class ListOf(Reader[tuple[T, ...]]):
    """A list, each entry read by another reader."""

    def __init__(self, reader: Reader[T], most: int = 64) -> None:
        self._reader, self._most = reader, most
        self.takes = f"a list of at most {most}, each {reader.takes}"

    def read(self, value: object, base: str) -> tuple[T, ...]:
        if not isinstance(value, list) or len(value) > self._most:
            raise self._unfit(value, "write it in brackets, such as " + (f"[{toml(value)}]" if isinstance(value, str) else '["a", "b"]'))
        return tuple(_inside(number, self._reader, item, base) for number, item in enumerate(value))

    def write(self, value: Sequence[T]) -> str:
        return f"[{', '.join(map(self._reader.write, value))}]"


class TableOf(Reader[Mapping[str, T]]):
    """A table with names that are free, like a pattern, each value read by another reader. Sources of settings add to it name by name."""

    def __init__(self, reader: Reader[T], pattern: str = r"[a-z][a-z0-9_]{0,63}") -> None:
        self._reader, self._pattern = reader, re.compile(pattern)
        self.takes = f"a table, each value {reader.takes}"

    def read(self, value: object, base: str) -> Mapping[str, T]:
        if not isinstance(value, dict):
            raise self._unfit(value, "write the names and values under a header of their own, or as { name = value }")
        for name in value:
            if not self._pattern.fullmatch(name):
                raise UnfitError("names of small letters, digits and _", told(name), "write the name as edgeadapt inspect lists it")
        return {name: _inside(name, self._reader, item, base) for name, item in value.items()}

    def write(self, value: Mapping[str, T]) -> str:
        return f"{{ {', '.join(self.lines(value))} }}" if value else "{}"

    def lines(self, value: Mapping[str, T]) -> list[str]:
        """`name = value` of each name."""
        return [f"{name} = {self._reader.write(item)}" for name, item in value.items()]


class Either(Reader[Any]):
    """What one of some readers takes; the first that does reads it."""

    def __init__(self, *readers: Reader[Any]) -> None:
        self._readers = readers
        self.takes = ", or ".join(reader.takes for reader in readers)

    def read(self, value: object, base: str) -> Any:
        for reader in self._readers:
            try:
                return reader.read(value, base)
            except UnfitError:
                pass
        raise self._unfit(value)


def _inside(where: str | int, reader: Reader[T], value: object, base: str) -> T:
    try:
        return reader.read(value, base)
    except UnfitError as reason:
        reason.inside = (where, *reason.inside)
        raise


def _unquoted(value: object) -> str:
    return "write the number without quotes" if isinstance(value, str) and re.fullmatch(r"-?[0-9][0-9.eE+-]{0,20}", value) else ""
