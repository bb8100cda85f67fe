"""Prepares a bundle's graphs for this machine: the child process, which starts one more for each graph, so that little memory is held at once.

`edgeadapt.runtime.prepared` starts it. It prints its progress as lines of JSON: [stage, done, total, note].
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgeadapt.bundle import Bundle, atomic
from edgeadapt.errors import BudgetError, BundleError, EdgeAdaptError
from edgeadapt.memory.graph import OWN
from edgeadapt.runtime import prepared


def prepare(bundle: Bundle, wanted: dict[str, Any], cache: Path, force: bool, names: Sequence[str], base: Path | None = None) -> None:
    """Makes an entry of the cache, whole or not at all. Others that want the same wait for it, and then use it.

    A sound entry that lacks some of the graphs is copied, and those are added.

    Args:
        bundle: the bundle.
        wanted: what the entry is for, as `prepared.key` says.
        cache: the folder of entries.
        force: make all of it anew even if there is a sound one.
        names: of the graphs.
        base: another folder of entries; where `cache` has none, the one there is copied.

    Raises:
        EdgeAdaptError: the cache cannot be written.
    """
    name = prepared.entry_name(wanted)
    with _alone(cache / f"{name}.lock"):
        before: prepared.Prepared | None = None
        if not force:
            with suppress(BundleError, OSError):
                before = prepared.load(cache / name, bundle, wanted)
            if before is not None and not before.lacks(names):
                return
        if not force and before is None and base is not None:
            with suppress(BundleError, OSError):
                before = prepared.load(base / name, bundle, wanted)
        for stale in cache.glob(f".{name}.*"):  # of makers that were killed
            shutil.rmtree(stale, ignore_errors=True)
        folder = cache / f".{name}.{os.urandom(6).hex()}"
        folder.mkdir()
        try:
            _fill(bundle, wanted, folder, before, names)
            _publish(folder, cache / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Waits until no other process makes the same entry."""
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(bundle: Bundle, wanted: dict[str, Any], folder: Path, before: prepared.Prepared | None, names: Sequence[str]) -> None:
    begun = time.monotonic()
    kept: dict[str, Any] = {} if before is None else before.record["graphs"]
    names = list(names) if before is None else before.lacks(names)
    _need_room(folder / "room", 4 * bundle.weights_size + 16 * 2**20 + (0 if before is None else before.own_bytes))
    if before is not None:
        for file in before.record["files"]:
            shutil.copyfile(before.folder / file, folder / file)
    (folder / OWN).touch()
    (folder / prepared.BUNDLE).touch()
    results: dict[str, Any] = {}
    for index, name in enumerate(names):
        _say("preparing", index, len(names), name)
        results[name] = _graph(bundle, name, folder, wanted["threads"])
        if "tries" in results[name]:
            results[name]["tries"] += kept.get(name, {}).get("tries", 0)
    _say("preparing", len(names), len(names))
    files = sorted(path.name for path in folder.iterdir() if path.name != prepared.BUNDLE)
    peak = max((result.pop("peak_of_preparing", 0) for result in results.values()), default=0)
    earlier: dict[str, Any] = {"seconds": 0.0, "peak_of_preparing": 0} if before is None else before.record
    record = {
        "format": prepared.FORMAT,
        "key": wanted,
        "bundle": bundle.path.name,
        "seconds": round(time.monotonic() - begun + earlier["seconds"], 1),
        "peak_of_preparing": max(peak, earlier["peak_of_preparing"]),
        "own_bytes": (folder / OWN).stat().st_size,
        "graphs": {**kept, **results},
        "files": prepared.describe(folder, files),
    }
    (folder / prepared.RECORD).write_text(json.dumps(record, indent=1))


def _need_room(path: Path, size: int) -> None:
    """Raises OSError now if the disk has not as many bytes: a writer that is stopped half-way does not always say why."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    finally:
        path.unlink(missing_ok=True)


def _graph(bundle: Bundle, name: str, folder: Path, threads: int) -> dict[str, Any]:
    """What came of one graph; one that cannot be prepared runs as exported."""
    command = [sys.executable, "-m", "edgeadapt.runtime.prepare_graph", "--bundle", str(bundle.path), "--digest", bundle.digest]
    command += ["--graph", name, "--folder", str(folder), "--threads", str(threads)]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        said, complained = child.communicate()
    except BaseException:
        child.kill()
        child.wait()
        raise
    last = (said.strip() or complained.strip()).rpartition("\n")[2]
    if child.returncode == 0:
        found: dict[str, Any] = json.loads(last)
        return found
    if child.returncode == os.EX_IOERR:
        raise EdgeAdaptError(f"the cache cannot be written: {last}", "free disk space, or give another folder with --cache or EDGEADAPT_CACHE")
    for half in folder.glob(f"{name}.*"):
        shutil.rmtree(half) if half.is_dir() else half.unlink()
    why = f"its process was ended by signal {-child.returncode}" if child.returncode < 0 else last or f"exit code {child.returncode}"
    found = {"runs": "emitted", "why": f"it could not be prepared: {why}", "planned_bytes": bundle.manifest.graphs[name].peak_bytes, "versions": {}}
    if child.returncode < 0 or child.returncode == BudgetError.exit_code:
        found["tries"] = 1  # it may go better another time
    return found


def _publish(folder: Path, entry: Path) -> None:
    """Makes the finished folder the entry; what was there before goes."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    atomic.sync_folder(folder)
    old = folder.with_name(f"{folder.name}.old")
    if entry.is_dir():
        entry.rename(old)
    folder.rename(entry)
    atomic.sync_folder(entry.parent)
    shutil.rmtree(old, ignore_errors=True)


def _say(stage: str, done: int, total: int, note: str = "") -> None:
    print(json.dumps([stage, done, total, note]), flush=True)


def end_with_parent(number: signal.Signals) -> None:
    """Has this process be sent a signal when the one that started it ends."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG


def _give_way() -> None:
    """Where memory runs out, the system ends this process and its children before those that serve."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")


def main(arguments: Sequence[str] | None = None) -> int:
    """The child process."""
    parser = argparse.ArgumentParser()
    for option in ("bundle", "key", "cache", "graphs"):
        parser.add_argument(f"--{option}", required=True)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--base", type=Path)
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is unfinished is removed
    try:
        bundle, wanted = Bundle.open(given.bundle, verify=False), json.loads(given.key)
        if bundle.digest != wanted["bundle"]:
            raise BundleError(f"{given.bundle} was replaced", "open it again")
        _give_way()
        end_with_parent(signal.SIGTERM)
        prepare(bundle, wanted, Path(given.cache), given.force, given.graphs.split(","), given.base)
    except EdgeAdaptError as error:
        print(error.message)
        return error.exit_code
    except OSError as error:
        print(f"{given.cache} cannot be written: {error.strerror or error}")
        return os.EX_IOERR
    return 0


if __name__ == "__main__":
    sys.exit(main())
