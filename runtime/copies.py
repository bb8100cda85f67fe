"""Pages of the copies of weights that onnxruntime maps for a session of a prepared graph: only those of the graph that runs stay resident.

Sessions never run at once, but each maps the copies for itself, and the system counts the pages of each mapping. They are clean, and in the page
cache: to give them back and to find them again takes 1 to 2 ms for 7 MB on a workstation.
"""

from __future__ import annotations

import os

from edgeadapt.runtime.mappings import give_back

Ranges = frozenset[tuple[int, int]]


def mapped(path: str) -> Ranges:
    """Addresses, from and to, at which this process has mapped a file."""
    found, wanted = set(), os.fsencode(path)
    with open("/proc/self/maps", "rb") as file:
        for line in file:
            fields = line.split(None, 5)
            if len(fields) == 6 and fields[5].rstrip(b"\n") == wanted:
                begin, end = (int(number, 16) for number in fields[0].split(b"-"))
                found.add((begin, end))
    return frozenset(found)


class Copies:
    """Of the sessions of an engine. Nothing of it is safe to use once they have gone."""

    def __init__(self) -> None:
        self._ranges: dict[str, Ranges] = {}
        self._last = ""

    def loaded(self, name: str, ranges: Ranges) -> None:
        """A session of that graph was made, which has mapped these addresses for good."""
        if ranges:
            self._ranges[name] = ranges

    def running(self, name: str) -> None:
        """A run of that graph begins: pages of the graph that ran before it are given back."""
        if name != self._last:
            for begin, end in self._ranges.get(self._last, ()):
                give_back(begin, end)
            self._last = name
