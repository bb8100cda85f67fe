"""Counts and lists as options of the command line take them, their parts divided by commas."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A whole number above 0.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def listed(text: str) -> list[str]:
    """The parts that are not empty, without blanks around them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> tuple[float, ...]:
    """Numbers.

    Raises:
        ArgumentTypeError: a part is none.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.5,0.5,0.5") from None
