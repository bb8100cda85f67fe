"""Pages of onnxruntime's own library: what only its start and the making of sessions touch need not stay resident.

The library is 20 MB and more of code. A process that made one session has most of what it will ever touch of it mapped, and runs of graphs need less
than half of that. The rest is given back: it stays in the page cache as long as the system has room, and comes from there, or from the file, if it is
needed after all. Libraries of others are left alone, as nobody here can tell what their programs will do next.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import NamedTuple

import onnxruntime

_DONTNEED = 4
_FOLDER = os.fsencode(os.path.realpath(os.path.dirname(onnxruntime.__file__))) + b"/"


class _Mapping(NamedTuple):
    """Addresses of a file's mapping, its permissions, and how many bytes of it are resident and are the process's own, not the file's."""

    begin: int
    end: int
    permissions: bytes
    resident: int
    own: int


def _mappings(root: str) -> Iterator[_Mapping]:
    """Those of the library itself, without its providers for other processors."""
    try:
        with open(os.path.join(root, "proc/self/smaps"), "rb") as file:
            ours, begin, end, permissions, held = False, 0, 0, b"", 0
            for line in file:
                name, *fields = line.split(None, 5)
                if not name.endswith(b":"):
                    path = fields[4].strip() if len(fields) == 5 else b""
                    file_name = path.rsplit(b"/", 1)[-1]
                    ours = path.startswith(_FOLDER) and b".so" in file_name and b"providers" not in file_name
                    if ours:
                        begin, end = (int(number, 16) for number in name.split(b"-"))
                        permissions = fields[0]
                elif ours and name == b"Rss:":
                    held = int(fields[0]) * 1024
                elif ours and name == b"Anonymous:":
                    yield _Mapping(begin, end, permissions, held, int(fields[0]) * 1024)
    except OSError:  # no Linux
        return


_LOADED = frozenset((item.begin, item.end) for item in _mappings("/"))
"""Addresses that the library had when it was imported. Python never unloads a module, so they stay its own: another thread may be loading or
unloading a library meanwhile, and what lies at other addresses could be that one's data by the time the system is asked."""


def give_back(root: str = "/") -> int:
    """Gives pages of onnxruntime's code and constants back that no one has written to; bytes that were resident of them. Costs some milliseconds.

    root: the folder that `proc` lies in.
    """
    given = 0
    for item in list(_mappings(root)):
        clean = item.resident and not item.own and item.permissions in (b"r-xp", b"r--p") and (item.begin, item.end) in _LOADED
        if clean and not ctypes.CDLL(None).madvise(ctypes.c_void_p(item.begin), ctypes.c_size_t(item.end - item.begin), _DONTNEED):
            given += item.resident  # where memory is locked, the system refuses
    return given


def held(root: str = "/") -> int:
    """Resident bytes of onnxruntime's library that come from its file."""
    return sum(item.resident - item.own for item in _mappings(root))
