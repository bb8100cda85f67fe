"""Files that are mapped into this process: where, what of them is resident, and how pages are given back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import NamedTuple

_DONTNEED = 4


class Mapping(NamedTuple):
    """A mapping: its addresses, permissions and file, how many bytes of it are resident, and how many of these are the process's own."""

    begin: int
    end: int
    permissions: str
    path: str
    resident: int
    own: int


def mappings(root: str = "/") -> Iterator[Mapping]:
    """Those of this process; none where the system does not tell. root: the folder that `proc` lies in."""
    begin = end = resident = 0
    permissions = path = ""
    try:
        with open(os.path.join(root, "proc/self/smaps"), encoding="utf-8", errors="replace") as file:
            for line in file:
                name, *words = line.split(None, 5)
                if not name.endswith(":"):
                    begin, end = (int(text, 16) for text in name.split("-"))
                    permissions, path = words[0], words[4].strip() if len(words) > 4 else ""
                elif name == "Rss:":
                    resident = int(words[0]) * 1024
                elif name == "Anonymous:":
                    yield Mapping(begin, end, permissions, path, resident, int(words[0]) * 1024)
    except OSError:
        return


def give_back(begin: int, end: int) -> bool:
    """Has the system forget pages of a mapped file that nobody has written to; they are found in the file again. Whether it did."""
    return not ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)
