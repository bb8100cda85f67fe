"""Pages of onnxruntime's own library: what only its start and the making of sessions touch need not stay resident.

The library is 20 MB and more of code. A process that made one session has most of what it will ever touch of it mapped, and runs of graphs need less
than half of that. The rest is given back: it stays in the page cache as long as the system has room, and comes from there, or from the file, if it is
needed after all. Libraries of others are left alone, as nobody here can tell what their programs will do next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import onnxruntime

from edgeadapt.runtime import mappings
from edgeadapt.runtime.mappings import Mapping

_FOLDER = os.path.realpath(os.path.dirname(onnxruntime.__file__)) + "/"


def _mappings(root: str) -> Iterator[Mapping]:
    """Those of the library itself, without its providers for other processors."""
    for item in mappings.mappings(root):
        name = item.path.rsplit("/", 1)[-1]
        if item.path.startswith(_FOLDER) and ".so" in name and "providers" not in name:
            yield item


_LOADED = frozenset((item.begin, item.end) for item in _mappings("/"))
"""Addresses that the library had when it was imported. Python never unloads a module, so they stay its own: another thread may be loading or
unloading a library meanwhile, and what lies at other addresses could be that one's data by the time the system is asked."""


def give_back(root: str = "/") -> int:
    """Gives pages of onnxruntime's code and constants back that no one has written to; bytes that were resident of them. Costs some milliseconds.

    root: the folder that `proc` lies in.
    """
    given = 0
    for item in list(_mappings(root)):
        clean = item.resident and not item.own and item.permissions in ("r-xp", "r--p") and (item.begin, item.end) in _LOADED
        if clean and mappings.give_back(item.begin, item.end):
            given += item.resident  # where memory is locked, the system refuses
    return given


def held(root: str = "/") -> int:
    """Resident bytes of onnxruntime's library that come from its file."""
    return sum(item.resident - item.own for item in _mappings(root))
