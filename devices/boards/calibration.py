"""Figures measured on a machine, kept as a board profile in the user's cache folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeadapt.cache import cache_folder
from edgeadapt.devices.boards.board import Board, Calibration, Profile, read
from edgeadapt.devices.boards.probe import Machine
from edgeadapt.errors import EdgeAdaptError, InputError


def place(machine: Machine, cache: str | os.PathLike[str] | None = None) -> Path:
    """Where a machine's calibration is kept."""
    return Path(cache or cache_folder(), "boards", f"{machine.fingerprint}.toml")


def saved(machine: Machine, cache: str | os.PathLike[str] | None = None) -> Profile | None:
    """A machine's calibration; None where there is none.

    Raises:
        InputError: there is one, but it is damaged or belongs to another machine.
    """
    path = place(machine, cache)
    if not os.path.exists(path):  # also where the folder may not be entered
        return None
    profile = read(path)
    if profile.calibration is None or profile.calibration.machine != machine.fingerprint:
        raise InputError(f"{path} is no calibration of this machine", "run edgeadapt calibrate, which replaces it")
    return profile


def prepare_folder(path: Path) -> None:
    """Makes the folder that a calibration will be written to, so that a refusal comes before the measuring.

    Raises:
        EdgeAdaptError: it cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "may not be written", str(path.parent))
    except OSError as reason:
        raise _refused(path, reason) from None


def write(path: Path, board: Board, calibration: Calibration) -> None:
    """Writes a profile that `load` takes on any machine: the whole file, or nothing of it.

    Raises:
        EdgeAdaptError: the folder is missing or read-only, or the disk is full.
    """
    from edgeadapt.bundle.atomic import replacing  # numpy comes with it, and doctor must run where numpy does not load

    try:
        with replacing(path) as (file, _):
            file.write(as_toml(board, calibration).encode())
    except OSError as reason:
        raise _refused(path, reason) from None


def as_toml(board: Board, calibration: Calibration) -> str:
    """The profile's text."""
    fields: dict[str, Any] = {
        "name": board.name,
        "arch": "aarch64" if board.arm else "x86-64",
        "cores": board.cores,
        "isa": list(board.isa),
        "page": board.page,
        "total": board.total,
        "usable": board.memory,
        "unified_gpu": board.unified_gpu,
        "floor": board.floor,
        "floor_known": board.floor_known,
        "floor_from": board.floor_from,
        **({} if board.code is None else {"code": board.code}),
        "gflops": board.gflops,
        "gbps": board.gbps,
        "rates_known": board.rates_known,
        "rates_from": board.rates_from,
        "note": board.note,
    }
    lines = ["# Written by `edgeadapt calibrate`; the fields are those of any board profile (docs/boards.md).", *map(_line, fields.items())]
    return "\n".join([*lines, "", "[calibration]", *map(_line, asdict(calibration).items()), ""])


def _line(item: tuple[str, Any]) -> str:
    return f"{item[0]} = {json.dumps(item[1])}"  # JSON's numbers, booleans, lists and ASCII texts are TOML's too


def _refused(path: Path, reason: OSError) -> EdgeAdaptError:
    return EdgeAdaptError(
        f"the calibration cannot be written to {path}: {reason.strerror or reason}",
        "make room, or name a folder that can be written: XDG_CACHE_HOME=FOLDER edgeadapt calibrate, or --output FILE",
    )
