"""Has a bundle's graphs prepared for this machine, in a child process, where the cache does not have them yet."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from edgeadapt.bundle import Bundle
from edgeadapt.errors import BundleError, EdgeAdaptError, UsageError
from edgeadapt.progress import Progress, quiet
from edgeadapt.runtime.prepared import LOG, Prepared, entry_name, find, key, load, places

Cache = str | os.PathLike[str] | None


def ensure(
    bundle: Bundle, threads: int = 1, progress: Progress = quiet, cache: Cache = None, force: bool = False, names: Collection[str] | None = None
) -> Prepared | None:
    """What was prepared; what is missing of it is made first. That takes seconds to minutes.

    Never an error: where it cannot be made, one line in the log says why, and the graphs run as exported.

    Args:
        bundle: the bundle.
        threads: of one operator.
        progress: told how far it is.
        cache: the cache's folder; None for the usual places.
        force: make it anew.
        names: the graphs that will run; None for all of the bundle.
    """
    try:
        return make(bundle, threads, progress, cache, force, names)
    except (EdgeAdaptError, OSError) as reason:
        LOG.warning("%s: what is not prepared runs as exported: %s", bundle.path.name, getattr(reason, "message", reason))
        return find(bundle, threads, cache)


def make(
    bundle: Bundle, threads: int = 1, progress: Progress = quiet, cache: Cache = None, force: bool = False, names: Collection[str] | None = None
) -> Prepared:
    """As `ensure`, for who wants to know why not.

    Raises:
        UsageError: there is no folder that can be written.
        EdgeAdaptError: the child process failed.
    """
    asked = list(bundle.manifest.graphs if names is None else names)
    found = None if force else find(bundle, threads, cache)
    if found is not None and not found.lacks(asked):
        return found
    folder, wanted = _writable(bundle, cache).absolute(), key(bundle, threads)
    _run_child(bundle, wanted, folder, None if found is None else found.folder.parent, force, asked, progress)
    try:
        return load(folder / entry_name(wanted), bundle, wanted)
    except (BundleError, OSError) as reason:
        raise EdgeAdaptError(f"what was prepared in {folder} cannot be used: {getattr(reason, 'message', reason)}") from None


def _run_child(
    bundle: Bundle, wanted: dict[str, Any], folder: Path, base: Path | None, force: bool, names: Collection[str], progress: Progress
) -> None:
    import subprocess

    command = [sys.executable, "-m", "edgeadapt.runtime.prepare", "--bundle", str(bundle.path), "--key", json.dumps(wanted)]
    command += ["--cache", str(folder), "--graphs", ",".join(names), *(["--force"] if force else [])]
    command += [] if base is None or base == folder else ["--base", str(base)]
    said: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment(), cwd="/"
    ) as child:
        try:
            for line in child.stdout or ():
                step = _step(line)
                if step is None:
                    said = [*said[-20:], line.rstrip()]
                else:
                    progress(*step)
            code = child.wait()
        except BaseException:  # interrupted: the child and its unfinished folder go too
            child.terminate()
            raise
    if code:
        why = f"it was ended by signal {-code}" if code < 0 else "\n".join(line for line in said if line) or f"exit code {code}"
        raise EdgeAdaptError(f"preparing failed: {why}", "free memory or disk space, or serve the graphs as exported")


def _step(line: str) -> tuple[str, int, int, str] | None:
    """A line of progress: a JSON list."""
    try:
        stage, done, total, note = json.loads(line)
    except (ValueError, TypeError):
        return None
    return str(stage), int(done), int(total), str(note)


def environment() -> dict[str, str]:
    """For a child process that finds the same packages, whatever its folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(os.path.abspath(path) for path in sys.path))}


def _writable(bundle: Bundle, cache: Cache) -> Path:
    tried = []
    for folder in places(bundle, cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            tried.append(f"{folder} cannot be made ({reason.strerror})")
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        tried.append(f"{folder} is read-only")
    raise UsageError(f"there is no place for prepared graphs: {'; '.join(tried)}", "give one with --cache or EDGEADAPT_CACHE")
