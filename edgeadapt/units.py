"""Bytes, shapes and numbers of things as people write them."""

from __future__ import annotations

import re

from edgeadapt.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str | int) -> int:
    """`"128MiB"`, `"1.5 GB"` or a number of bytes, as bytes (at least 1).

    Raises:
        UsageError: not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*", str(text))
        if not match or match[2].lower() not in _UNITS:
            raise UsageError(f"{text!r} is not a size in bytes", "write a number and a unit: 96MiB, 1.5GB or 100663296")
        size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise UsageError(f"{text!r} is not a positive size in bytes", "give at least 1 byte")
    return size


def format_bytes(size: float) -> str:
    """Bytes with a binary unit and three significant digits: `"12.3 MiB"`."""
    sign, size = ("-" if size < 0 else ""), abs(size)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            break
        size /= 1024
    else:
        unit = "GiB"
    return f"{sign}{size:.0f} B" if unit == "B" else f"{sign}{size:.3g} {unit}" if size < 1000 else f"{sign}{size:.0f} {unit}"


def format_count(count: int, thing: str) -> str:
    """`"1 thread"`, `"2 threads"`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def parse_shape(text: str) -> tuple[int, ...]:
    """`"3x32x32"` as (3, 32, 32): one to four positive sizes, channels first, without the batch.

    Raises:
        UsageError: not a shape.
    """
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){0,3}", text):
        raise UsageError(f"{text!r} is not an input shape", "write channels first and no batch: 3x32x32, or 6x128 for a sensor window")
    return tuple(int(part) for part in text.split("x"))


def format_shape(shape: tuple[int, ...] | list[int]) -> str:
    """(3, 32, 32) as `"3x32x32"`; a scalar as `"scalar"`."""
    return "x".join(str(size) for size in shape) or "scalar"
