"""In which line of a TOML text each key stands: tomllib does not say.

The text is read a second time, by a scanner that knows where keys, strings and brackets begin and end, and nothing of values. It trusts the parser: a
text that is no TOML is never given to it, and where the keys that it saw are not those that were parsed, it has no lines at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Path = tuple[str | int, ...]
"""Names of tables and keys from the outermost, and numbers from 0 in lists."""

MOST = 20_000
"""Places that are kept; a text with more has no lines."""

_SPACE = re.compile(r"[ \t\n]*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}\n#]*")
_ENDS = {
    '"""': re.compile(r'\\.|"{3,5}', re.DOTALL),
    "'''": re.compile(r"'{3,5}"),
    '"': re.compile(r'\\.|"'),
    "'": re.compile(r"'"),
}


class Lines(Mapping[Path, int]):
    """The line, from 1, of every table, key and list's item of a parsed text. That of a table is its header's, or its first mention's."""

    def __init__(self, text: str, document: Mapping[str, Any], loads: Callable[[str], dict[str, Any]]) -> None:
        """Scans the text.

        Args:
            text: the TOML text.
            document: what it was parsed to.
            loads: the parser, for names in quotes.
        """
        try:
            found = _Scanner(text.replace("\r\n", "\n"), loads).lines()
            parsed = set(_paths(document, ()))
        except (_LostError, RecursionError, ValueError, KeyError, IndexError):
            found, parsed = {}, set()
        self._lines: dict[Path, int] = found if found.keys() == parsed else {}

    def __getitem__(self, path: Path) -> int:
        return self._lines[path]

    def __iter__(self) -> Iterator[Path]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def near(self, path: Path) -> int | None:
        """The line of that place, else of the nearest table or list around it; None where there is none."""
        return next((self._lines[path[:size]] for size in range(len(path), 0, -1) if path[:size] in self._lines), None)


class _LostError(Exception):
    """The scanner met what it does not understand, or more than it keeps."""


class _Scanner:
    def __init__(self, text: str, loads: Callable[[str], dict[str, Any]]) -> None:
        self._text, self._loads = text, loads
        self._at = self._counted = 0
        self._line = 1
        self._lines: dict[Path, int] = {}
        self._arrays: dict[Path, int] = {}  # of tables: the number of the last one

    def lines(self) -> dict[Path, int]:
        table: Path = ()
        while self._skip() < len(self._text):
            if self._text.startswith("[", self._at):
                table = self._header()
            else:
                self._pair(table)
        return self._lines

    def _skip(self) -> int:
        """Over blanks, ends of lines and comments."""
        while True:
            self._at = _match(_SPACE, self._text, self._at)
            if not self._text.startswith("#", self._at):
                return self._at
            end = self._text.find("\n", self._at)
            self._at = len(self._text) if end < 0 else end

    def _expect(self, token: str) -> None:
        if not self._text.startswith(token, self._skip()):
            raise _LostError
        self._at += len(token)

    def _note(self, path: Path, line: int, again: bool = False) -> None:
        if len(self._lines) >= MOST:
            raise _LostError
        self._lines[path] = line if again else self._lines.get(path, line)

    def _here(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _header(self) -> Path:
        line, many = self._here(), self._text.startswith("[[", self._at)
        self._at += 2 if many else 1
        names = self._names()
        self._expect("]]" if many else "]")
        path: Path = ()
        for name in names[:-1]:
            path = self._last((*path, name))
            self._note(path, line)
        path = (*path, names[-1])
        if not many:
            self._note(path, line, again=True)
            return path
        self._note(path, line)
        self._arrays[path] = self._arrays.get(path, -1) + 1
        path = self._last(path)
        self._note(path, line)
        return path

    def _last(self, path: Path) -> Path:
        return (*path, self._arrays[path]) if path in self._arrays else path

    def _pair(self, table: Path) -> None:
        line = self._here()
        path = table
        for name in self._names():
            path = (*path, name)
            self._note(path, line)
        self._expect("=")
        self._value(path)

    def _names(self) -> list[str]:
        names: list[str] = []
        while True:
            self._skip()
            begin = self._at
            if self._text[begin] in "\"'":
                self._string(self._text[begin])
                names += self._loads(f"{self._text[begin : self._at]} = 0")
            else:
                self._at = _match(_BARE, self._text, begin)
                names.append(self._text[begin : self._at])
            self._skip()
            if not self._text.startswith(".", self._at):
                return names
            self._at += 1

    def _value(self, path: Path) -> None:
        self._skip()
        first = self._text[self._at]
        if first in "\"'":
            self._string(first * 3 if self._text.startswith(first * 3, self._at) else first)
        elif first == "[":
            self._list(path)
        elif first == "{":
            self._inline(path)
        else:
            self._at = _match(_SCALAR, self._text, self._at)

    def _string(self, quotes: str) -> None:
        self._at += len(quotes)
        for end in _ENDS[quotes].finditer(self._text, self._at):
            if not end[0].startswith("\\"):
                self._at = end.end()
                return
        raise _LostError

    def _list(self, path: Path) -> None:
        self._at += 1
        number = 0
        while not self._text.startswith("]", self._skip()):
            self._note((*path, number), self._here())
            self._value((*path, number))
            number += 1
            self._comma("]")
        self._at += 1

    def _inline(self, path: Path) -> None:
        self._at += 1
        while not self._text.startswith("}", self._skip()):
            self._pair(path)
            self._comma("}")
        self._at += 1

    def _comma(self, closing: str) -> None:
        if self._text.startswith(",", self._skip()):
            self._at += 1
        elif not self._text.startswith(closing, self._at):
            raise _LostError


def _match(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    if match is None:
        raise _LostError
    return match.end()


def _paths(value: object, path: Path) -> Iterator[Path]:
    inner: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from _paths(item, (*path, key))
