"""TOML files: read within bounds, parsed, and what is wrong with one told with its line."""

from __future__ import annotations

import os
import re
import stat
import sys
from typing import Any

from edgeadapt.config.words import told

LARGEST_FILE = 1 << 20
"""Bytes of a configuration file; more is none."""


class UnreadableError(Exception):
    """A file that is no TOML text.

    Args:
        message: what is wrong with it.
        fix: how to mend it.
        line: from 1; None where that is not known.
    """

    def __init__(self, message: str, fix: str, line: int | None = None) -> None:
        super().__init__(message)
        self.fix, self.line = fix, line


def parse(text: str) -> dict[str, Any]:
    """TOML text as tomllib reads it.

    Raises:
        UnreadableError: it is none; with the line and, in words, the column.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UnreadableError("this is no TOML that can be read: too many brackets in one another", "leave brackets out") from None
    except ValueError as reason:  # a number of too many digits is no TOMLDecodeError
        raise _syntax(str(reason), text) from None


def _syntax(reason: str, text: str) -> UnreadableError:
    what, _, where = reason.partition(" (at ")
    what = what.partition(";")[0][:200]
    text = text.replace("\r\n", "\n")
    line, column = None, None
    if match := re.match(r"line ([0-9]+), column ([0-9]+)\)", where):
        line, column = int(match[1]), int(match[2])
    elif where:  # "end of document)"
        line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
    at = "" if column is None else f" in column {column}"
    return UnreadableError(f"this is no TOML{at}: {what[:1].lower()}{what[1:]}", _syntax_fix(text, line), line)


def _syntax_fix(text: str, line: int | None) -> str:
    written = "" if line is None else text.split("\n")[line - 1]
    if text.startswith("\ufeff"):
        return "save the file as UTF-8 without a byte order mark"
    if match := re.match(r"\s*[A-Za-z0-9_.-]+\s*=\s*([A-Za-z/~][^\s\"'#]*)", written):
        word = {"True": "true", "False": "false", "yes": "true", "no": "false", "on": "true", "off": "false"}.get(match[1], told(match[1]))
        return f"write {word}: text stands in quotes, and true and false are written small"
    if re.match(r"\s*[A-Za-z0-9_.-]+\s*=\s*[0-9.]+[A-Za-z]", written):
        return 'write a number with a unit in quotes, such as "48MiB" or "5min"'
    if re.match(r"\s*[A-Za-z0-9_.-]+\s*:", written):
        return "write key = value, with = and not :"
    return 'write key = value on a line of its own, texts in "quotes", under a [section]; no key or section stands twice'


def read(place: str) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: it is no regular file of UTF-8 and at most `LARGEST_FILE` bytes, or may not be read.
    """
    fix = "give a TOML file that this user can read"
    try:
        with open(place, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)) as file:  # a pipe would wait for ever
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableError("expected a file, got a folder, device or pipe", fix)
            data = file.read(LARGEST_FILE + 1) if status.st_size <= LARGEST_FILE else b""
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as reason:
        raise UnreadableError(f"cannot be read: {getattr(reason, 'strerror', None) or reason}", fix) from None
    if max(status.st_size, len(data)) > LARGEST_FILE:
        raise UnreadableError(f"expected at most {LARGEST_FILE} bytes, got more", "check the path: this is no configuration")
    try:
        return data.decode()
    except UnicodeDecodeError as reason:
        line = data.count(b"\n", 0, reason.start) + 1
        raise UnreadableError(f"expected UTF-8, got the byte 0x{data[reason.start]:02x}", "save the file as UTF-8", line) from None
