"""Checkpoints of a training: one safetensors file with every tensor, and in its header, as JSON, how far it is and under which settings.

Nothing in it is code, and whoever is killed while writing leaves the checkpoint before.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from edgeadapt.bundle.atomic import replacing, temporary_prefix
from edgeadapt.errors import StateError, UsageError

KEY = "training"  # the header's only entry: with several their order in the file would be by chance


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Put a safetensors file in the place of `path`, all of it or, after a crash at any moment, none.

    Raises:
        UsageError: it cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(whole, {KEY: json.dumps(header)})
    try:
        with replacing(path) as (file, _):
            file.write(data)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written: {error.strerror or error}", "give --output a path in an existing, writable folder with room"
        ) from error


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the header that `write` was given.

    Raises:
        StateError: the file is damaged or is no such file.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise damaged(path, " ".join(str(error).split())) from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is no JSON object")
    return tensors, header


def refuse_others(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    """See that a checkpoint was made under the settings of this run.

    Raises:
        StateError: it was not; every setting that differs is named with both values.
    """
    if not isinstance(found, dict):
        raise damaged(path, "its header holds no settings")
    differ = [f"{name} is {found.get(name)!r} there, {value!r} here" for name, value in wanted.items() if found.get(name) != value]
    differ += [f"{name} is {found[name]!r} there, unknown here" for name in found if name not in wanted]
    if differ:
        raise StateError(
            f"{path}: belongs to a training with other settings: {'; '.join(differ)}",
            f"run it with those settings, give another --output, or delete {path.name} to start over",
        )


def remove_leftovers(path: Path) -> None:
    """Delete the temporary files that writers of `path` who were killed have left beside it."""
    for name in os.listdir(path.parent):
        if name.startswith(temporary_prefix(path.name)) and name.endswith(".tmp"):
            with suppress(OSError):
                (path.parent / name).unlink()


def damaged(path: Path, reason: str) -> StateError:
    """The error for a file that `write` did not write, or not so."""
    return StateError(f"{path}: not a whole checkpoint of this script: {reason}", f"delete {path.name} to start over")
