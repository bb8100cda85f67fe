"""Boards as data: `keys` lists those shipped, `load` gives one or a profile of your own, `here` is this machine."""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeadapt.devices.boards import calibration, probe
from edgeadapt.devices.boards.board import Board, Calibration, Profile, Size, read
from edgeadapt.errors import InputError, UsageError
from edgeadapt.units import format_bytes

__all__ = ["HERE", "Board", "Calibration", "Profile", "Size", "here", "keys", "load", "profile_of", "read"]

HERE = "here"
"""The key of this machine."""

_FOLDER = Path(__file__).parent
_GENERIC = {"aarch64": "aarch64", "arm": "aarch64"}
# A process's pages of 16 and 64 KiB instead of 4: counted over the mappings of a running session on x86-64 (Python 3.11, onnxruntime 1.31).
_PAGE_FACTOR = {4096: 1.0, 8192: 1.02, 16384: 1.04, 32768: 1.1, 65536: 1.17}


_CALIBRATED = ("floor", "floor_known", "floor_from", "code", "gflops", "gbps", "rates_known", "rates_from")


def keys() -> list[str]:
    """The boards shipped, one key a memory size."""
    return [board.key for profile in _shipped() for board in profile.boards()]


def load(key_or_path: str | os.PathLike[str], memory: int | None = None) -> Board:
    """A board.

    Args:
        key_or_path: a key of `keys()`; a board's key without the size, which is its smallest; "here" for this machine; or the path of a profile
            (anything with a slash or ending in .toml).
        memory: usable bytes, instead of the profile's.

    Raises:
        UsageError: no such board or file, or the memory is less than the floor.
        InputError: the profile has a mistake; the message names file, field and what was expected.
    """
    text = os.fspath(key_or_path)
    if "/" in text or text.endswith(".toml"):
        return _with(read(text).board, memory)
    key = text.lower()
    if key == HERE:
        return _with(here(), memory)
    for profile in _shipped():
        for board in profile.boards():
            if key in (board.key, profile.board.key):  # sizes come from the smallest
                return _with(board, memory)
    known = [HERE, *keys()]
    near = difflib.get_close_matches(key, known, 3, 0.4)
    raise UsageError(
        f"there is no board {text!r}", f"{'did you mean ' + ' or '.join(near) + '? ' if near else ''}known: {', '.join(known)}; or give a path"
    )


def here(root: str | os.PathLike[str] = "/", cache: str | os.PathLike[str] | None = None) -> Board:
    """This machine: what it is and has now, the rest from a calibration of it, or else from the profile it is recognised by.

    `key` is that of the profile without a size. `memory` is what the system and the memory cgroup would let one process have now.
    A saved calibration that is damaged counts as none; `edgeadapt doctor` reports it.

    Args:
        root: where /proc and /sys are.
        cache: the cache folder; the user's own where None.
    """
    machine = probe.look(root)
    board = profile_of(machine).board
    floor = round(board.floor * _page_factor(machine.page) / _page_factor(board.page))
    known: dict[str, Any] = {"floor": floor, "floor_known": "estimated"}
    try:
        saved = calibration.saved(machine, cache)
    except InputError:
        saved = None
    if saved is not None:
        known = {name: getattr(saved.board, name) for name in _CALIBRATED}
    return replace(
        board,
        name=machine.model or machine.cpu,
        memory=machine.usable or board.memory,
        total=machine.memory_total or board.total,
        page=machine.page,
        cores=machine.cores,
        isa=machine.isa,
        unified_gpu=machine.gpu == "jetson" or (board.unified_gpu and machine.gpu != "nvidia"),
        **known,
    )


def profile_of(machine: probe.Machine) -> Profile:
    """The shipped profile that a machine is recognised by, or else the generic one of its processor."""
    profiles, model = _shipped(), machine.model.lower()
    parts = [(len(part), k) for k, profile in enumerate(profiles) for part in profile.models if part.lower() in model]
    if parts:
        return profiles[max(parts)[1]]
    return next(profile for profile in profiles if profile.board.key == _GENERIC.get(machine.arch, "x86-64"))


def _shipped() -> list[Profile]:
    return [read(path) for path in sorted(_FOLDER.glob("*.toml"))]


def _with(board: Board, memory: int | None) -> Board:
    if memory is None:
        return board
    if memory <= board.floor:
        raise UsageError(
            f"{format_bytes(memory)} of memory is not enough for {board.name}: Python, numpy and onnxruntime alone take {format_bytes(board.floor)}",
            "give more memory",
        )
    return replace(board, memory=memory, total=max(memory, board.total))


def _page_factor(page: int) -> float:
    return _PAGE_FACTOR.get(page, max(_PAGE_FACTOR.values()))
