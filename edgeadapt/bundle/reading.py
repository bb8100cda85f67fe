"""Typed reading of JSON values, with errors that name the key's path."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from edgeadapt.errors import BundleError

T = TypeVar("T")

MOST_VALUES = 2**18
"""Of a document, counted by commas and brackets before it is read: a value of two bytes takes up to 250 once it is."""
_SAID = 300


def shortened(text: str) -> str:
    """What a file says, as long as people read it in a message."""
    return text if len(text) <= _SAID else f"{text[:_SAID]}…"


def strict(data: bytes, halves: bool = False) -> object:
    """JSON text to plain values, without the repeated keys, NaN and Infinity that Python's reader lets pass, and without halves of characters.

    halves: these may be there, as in names of files that are no UTF-8.

    Raises:
        ValueError: not such JSON, nested too deeply, or of more than `MOST_VALUES`.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands twice")
        return result

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES} values")
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        if not halves and (b"\\ud" in data or b"\\uD" in data):  # a half alone could not be printed
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return found


def parse(data: bytes, where: str, halves: bool = False) -> object:
    """As `strict`.

    Raises:
        BundleError: not such JSON.
    """
    try:
        return strict(data, halves)
    except ValueError as reason:
        raise BundleError(f"{where} is not valid JSON: {shortened(str(reason))}", "export or copy the bundle again") from None


class Node:
    """A value in a JSON document and the path that leads to it. Every reader raises BundleError naming that path."""

    def __init__(self, value: object, path: str) -> None:
        self.value = value
        self.path = path

    def wrong(self, expected: str, got: str) -> BundleError:
        """The error to raise."""
        return BundleError(f"{self.path}: expected {shortened(expected)}, got {shortened(got)}", "export the bundle again")

    def _object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.wrong("a mapping", _kind(self.value))
        return self.value

    def has(self, key: str) -> bool:
        """Whether the mapping has that key."""
        return key in self._object()

    def keys(self, required: set[str], optional: set[str] | frozenset[str] = frozenset()) -> None:
        """Refuses missing and unknown keys; a trailing underscore in the names given (`from_`) is not in the file."""
        names = {key.rstrip("_") for key in required}
        found = set(self._object())
        if missing := sorted(names - optional - found):
            raise BundleError(f"{self.path}.{missing[0]} is missing", "export the bundle again")
        if unknown := sorted(found - names - optional):
            raise BundleError(f"{self.path}.{unknown[0][:80]} is not known in this format", "export the bundle again")

    def child(self, key: str) -> Node:
        """The value of a key that must be there."""
        value = self._object()
        if key not in value:
            raise BundleError(f"{self.path}.{key} is missing", "export the bundle again")
        return Node(value[key], f"{self.path}.{key}")

    def maybe(self, read: Callable[[Node], T]) -> T | None:
        """None for null, else what `read` makes of the value."""
        return None if self.value is None else read(self)

    def text(self, pattern: str | None = None) -> str:
        """A string, wholly matching `pattern` if one is given."""
        if not isinstance(self.value, str):
            raise self.wrong("text", _kind(self.value))
        if pattern is not None and not re.fullmatch(pattern, self.value):
            raise self.wrong(f"text like {pattern}", repr(self.value[:80]))
        return self.value

    def integer(self, low: int) -> int:
        """A whole number of at least `low`."""
        if type(self.value) is not int or not low <= self.value < 2**53:
            raise self.wrong(f"a whole number of at least {low}", repr(self.value) if type(self.value) is int else _kind(self.value))
        return self.value

    def truth(self) -> bool:
        """true or false."""
        if type(self.value) is not bool:
            raise self.wrong("true or false", _kind(self.value))
        return self.value

    def share(self) -> float:
        """A share from 0 to 1."""
        value = self.number()
        if not 0.0 <= value <= 1.0:
            raise self.wrong("a share from 0 to 1", str(value))
        return value

    def number(self) -> float:
        """A number that float32 can hold, as a float."""
        if type(self.value) not in (int, float):
            raise self.wrong("a number", _kind(self.value))
        try:
            value = float(self.value)  # type: ignore[arg-type]
        except OverflowError:
            value = math.inf
        if not abs(value) < 3.4e38:
            raise self.wrong("a number that fits float32", "a larger one")
        return value

    def items(self, read: Callable[[Node], T]) -> tuple[T, ...]:
        """A list, each entry read by `read`."""
        if not isinstance(self.value, list):
            raise self.wrong("a list", _kind(self.value))
        return tuple(read(Node(item, f"{self.path}[{index}]")) for index, item in enumerate(self.value))

    def mapping(self, read: Callable[[Node], T], pattern: str) -> dict[str, T]:
        """A mapping from names like `pattern`, each value read by `read`."""
        result = {}
        for key, value in self._object().items():
            if not re.fullmatch(pattern, key):
                raise self.wrong(f"keys like {pattern}", repr(key[:80]))
            result[key] = read(Node(value, f"{self.path}.{key[:80]}"))
        return result

    def free(self) -> dict[str, Any]:
        """Any JSON mapping."""
        return self._object()


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
