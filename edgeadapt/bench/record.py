"""What came of a run, as two files: NAME.json with everything that is one number or a word, NAME.npz with a value a frame.

Both are written whole or not at all, the .json last and with the hash of the other; a run counts as done only where both are as they were written.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bench.scores import Outcome
from edgeadapt.bundle.atomic import replacing
from edgeadapt.bundle.digest import sha256
from edgeadapt.errors import UsageError

FORMAT = 1
COLUMNS: dict[str, Any] = {
    "wrong": np.float32,
    "confidence": np.float32,
    "milliseconds": np.float32,
    "adapted": np.bool_,
    "index": np.int64,
    "domain": np.int16,
    "severity": np.int8,
    "round": np.int16,
    "scored": np.bool_,
}
"""Of each frame: 0, 1 or a share of pixels (NaN without truth); probability of the chosen class (NaN where it is not finite); time, a frame of its
window; whether its window changed the model; and its place in the stream as `frames.Stream` has it."""


@dataclass(frozen=True, eq=False)
class Record:
    """A run.

    Attributes:
        key: what it is the result of; see `key_of`.
        facts: JSON values: what was run, and figures of the whole run. "domains" names the stream's, "seed" is the stream's.
        columns: the arrays of `COLUMNS`, each (F,).
    """

    key: str
    facts: Mapping[str, Any]
    columns: Mapping[str, NDArray[Any]]

    def outcome(self) -> Outcome:
        """The scored frames."""
        kept = self.columns["scored"] & np.isfinite(self.columns["wrong"])
        whole = {name: self.columns[name][kept].astype(np.int64) for name in ("index", "domain", "round")}
        share = {name: self.columns[name][kept].astype(np.float64) for name in ("wrong", "confidence")}
        return Outcome(**share, **whole, seed=np.full(int(kept.sum()), self.facts["seed"]), domains=tuple(self.facts["domains"]))


def key_of(stream: str, settings: Mapping[str, Any]) -> str:
    """SHA-256 in hex that names a run before it is made.

    Args:
        stream: the stream's key, in which its seed is.
        settings: JSON values: the bundle's digest and everything else that could change the result.
    """
    return sha256(json.dumps([FORMAT, stream, dict(settings)], sort_keys=True).encode()).hexdigest()


def write(folder: str | os.PathLike[str], name: str, record: Record) -> Path:
    """Writes a run's two files into a folder, which is made if it is not there.

    Returns:
        the .json file.

    Raises:
        UsageError: they cannot be written.
    """
    target = Path(folder)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {column: record.columns[column].astype(kind) for column, kind in COLUMNS.items()}
    np.savez_compressed(buffer, **arrays)
    data = buffer.getvalue()
    told = {"key": record.key, "frames": sha256(data).hexdigest(), "facts": dict(record.facts)}
    text = json.dumps({"sha256": _hash(told), **told}, indent=1) + "\n"
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path, content in ((target / f"{name}.npz", data), (target / f"{name}.json", text.encode())):
            with replacing(path) as (file, _):
                file.write(content)
    except OSError as reason:
        raise UsageError(f"results cannot be written to {target}: {reason.strerror}", "give a folder that can be written, with room on it") from None
    return target / f"{name}.json"


def read(folder: str | os.PathLike[str], name: str, key: str) -> Record | None:
    """A run that was written; None where there is none of that key, or where a file is damaged or cut short."""
    try:
        told = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
        if told["key"] != key or told.pop("sha256") != _hash(told):
            return None
        data = (Path(folder) / f"{name}.npz").read_bytes()
        if sha256(data).hexdigest() != told["frames"]:
            return None
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            columns = {column: file[column] for column in COLUMNS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Record(key, told["facts"], columns)


def _hash(told: Mapping[str, Any]) -> str:
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
