"""What leaves the daemon as text: one line of it, without characters that a terminal or a log would obey, and JSON that every reader takes."""

from __future__ import annotations

import json
import math


def one_line(text: str, longest: int) -> str:
    """The text as one line of at most so many characters: control characters and line breaks are blanks, and what is cut off is marked by "…"."""
    shown = text[: longest + 1]
    line = "".join(letter if letter.isprintable() else " " for letter in shown)
    return line if len(line) <= longest else line[: longest - 1] + "…"


def as_json(value: object) -> str:
    """JSON in ASCII, on one line. Numbers that are not finite, which JSON does not have, are null.

    Raises:
        TypeError: there is something in it that is no JSON value.
    """
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
