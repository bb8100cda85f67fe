"""Values, keys, sizes and times as people read and write them in TOML and in messages."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that neither a setting nor a message may hold."""

_LONGEST = 80  # characters of a value that a message repeats
_SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_TIMES = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def toml(value: object) -> str:
    """A text, number, true or false, path, or list or table of these, as TOML on one line; anything else as JSON would tell it.

    What stands before an @ in an address ("rtsp://name:password@host") is left out.
    """
    if isinstance(value, str | Path):
        return json.dumps(without_login(str(value)), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < 2**64 else f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{dotted((name,))} = {toml(item)}' for name, item in value.items())} }}" if value else "{}"
    return str(value)


def told(value: object) -> str:
    """A value for a message: short, on one line, and with nothing that a terminal takes for a command."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list) and (len(value) > 4 or any(isinstance(item, dict | list) for item in value)):
        return f"a list of {len(value)}"
    text = toml(value)
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return printable(text)


def printable(text: str) -> str:
    """The text with control characters, and bytes of file names that are no UTF-8, written as escapes."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def without_login(text: str) -> str:
    """An address without what stands before its @."""
    begin, end = text.find("://"), text.rfind("@")
    return f"{text[: begin + 3]}…{text[end:]}" if 0 <= begin < end else text


def dotted(path: Sequence[str | int]) -> str:
    """A key's path as TOML writes it, numbers of list items in brackets; long names are cut."""
    parts = [f"[{part}]" if isinstance(part, int) else part if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", part) else told(part) for part in path]
    return ".".join(parts).replace(".[", "[")


def did_you_mean(name: str, names: Sequence[str], shown: Callable[[str], str] = str) -> str:
    """`did you mean "serial"?`, or "" where no name is near. Capital letters and - for _ are no difference."""
    plain = {known.lower().replace("-", "_"): known for known in names}
    near = difflib.get_close_matches(name.lower().replace("-", "_")[:_LONGEST], plain, 1)
    return f"did you mean {shown(plain[near[0]])}?" if near else ""


def size_text(size: int) -> str:
    """Bytes in the largest unit that divides them: "48MiB", "1000"."""
    return next((f"{size // unit}{name}" for name, unit in _SIZES if size and size % unit == 0), str(size))


def time_text(seconds: float) -> str:
    """Seconds in the largest unit that they are a whole number of: "10min", "40ms"; others as a decimal number of seconds: "2.5s"."""
    for name in ("d", "h", "min", "s"):
        if seconds >= _TIMES[name] and seconds % _TIMES[name] == 0:
            return f"{seconds / _TIMES[name]:.0f}{name}"
    return f"{seconds * 1000:g}ms" if 0 < seconds < 1 else f"{seconds:g}s"


def seconds_of(value: object) -> float | None:
    """A number of seconds, or a text such as "40ms", as seconds; None where it is neither."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if -1e15 < value < 1e15 else None
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?(ms|s|min|h|d)", value) if isinstance(value, str) else None
    if match is None:
        return None
    number = float(match[1])
    return number / 1000 if match[2] == "ms" else number * _TIMES[match[2]]  # divided, so that "9ms" is 0.009
