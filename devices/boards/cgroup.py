"""What the kernel's memory cgroup does for this process, version 1 and 2, read from /proc and /sys only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from edgeadapt.devices.boards.files import Files

_NO_LIMIT = 1 << 60  # version 1 writes "none" as the largest multiple of a page below 2**63


@dataclass(frozen=True)
class Cgroup:
    """The memory controller, seen from this process.

    Attributes:
        version: 1 or 2; 0 where there is no cgroup at all.
        state: "on" (it counts this process), "idle" (the kernel has it, but no group with it holds this process), "off" (the kernel runs without it).
        disabled: it is off because the kernel's command line says so.
        limit: bytes above which the kernel ends a process of the group (the least of all groups above it too); None for no limit.
        high: bytes above which the kernel slows the group down and reclaims; None for none.
        current: bytes the group holds, page cache included; None where nobody counts.
        room: bytes the group may still take, files that can be dropped taken off; None without a limit.
        pressure: the group tells its memory pressure (PSI).
        path: the group's folder.
    """

    version: int
    state: str
    disabled: bool = False
    limit: int | None = None
    high: int | None = None
    current: int | None = None
    room: int | None = None
    pressure: bool = False
    path: str = ""


def look(files: Files) -> Cgroup:
    """The memory cgroup of the process that /proc/self is."""
    groups = dict(_groups(files))
    mounts = list(_mounts(files))
    disabled = _disabled(files.text("proc/cmdline"))
    for kind, options, top, base in mounts:
        if kind == "cgroup" and "memory" in options and "memory" in groups:
            return _first(files, *_folder(files, top, base, groups["memory"]))
    for kind, _, top, base in mounts:
        if kind == "cgroup2":
            if "memory" in files.text(f"{top}/cgroup.controllers").split():
                return _second(files, *_folder(files, top, base, groups.get("", "/")))
            return Cgroup(2, "off", disabled)
    return Cgroup(1 if mounts else 0, "off", disabled)


def _first(files: Files, top: str, folder: str) -> Cgroup:
    current = files.number(f"{folder}/memory.usage_in_bytes")
    if current is None:
        return Cgroup(1, "idle", path=f"/{folder}")
    stat = files.table(f"{folder}/memory.stat")
    limits = [stat.get("hierarchical_memory_limit"), files.number(f"{folder}/memory.limit_in_bytes")]
    limit = min((value for value in limits if value is not None and value < _NO_LIMIT), default=None)
    reclaimable = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    room = None if limit is None else max(0, limit - max(0, current - reclaimable))
    return Cgroup(1, "on", limit=limit, current=current, room=room, path=f"/{folder}")


def _second(files: Files, top: str, folder: str) -> Cgroup:
    current = files.number(f"{folder}/memory.current")
    if current is None:
        return Cgroup(2, "idle", path=f"/{folder}")
    limits, highs, rooms = [], [], []
    for group in _upwards(top, folder):
        limit, high, held = (files.number(f"{group}/memory.{name}") for name in ("max", "high", "current"))
        highs += [high] if high is not None else []
        if limit is not None:
            stat = files.table(f"{group}/memory.stat")
            limits.append(limit)
            rooms.append(max(0, limit - max(0, (held or 0) - stat.get("inactive_file", 0) - stat.get("active_file", 0))))
    return Cgroup(
        2,
        "on",
        limit=min(limits, default=None),
        high=min(highs, default=None),
        current=current,
        room=min(rooms, default=None),
        pressure=files.text(f"{folder}/memory.pressure").startswith("some"),
        path=f"/{folder}",
    )


def _upwards(top: str, folder: str) -> Iterator[str]:
    while True:
        yield folder
        if folder == top or "/" not in folder:
            return
        folder = folder.rsplit("/", 1)[0]


def _groups(files: Files) -> Iterator[tuple[str, str]]:
    """(controller, path); version 2's controller is the empty text."""
    for line in files.text("proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            for controller in parts[1].split(","):
                yield controller, parts[2]


def _mounts(files: Files) -> Iterator[tuple[str, list[str], str, str]]:
    """(type, options of the file system, where it is mounted, which of its folders is), paths without the leading slash."""
    for line in files.text("proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) >= 5 and len(kind) >= 3 and kind[0] in ("cgroup", "cgroup2"):
            base, top = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text) for text in fields[3:5])
            yield kind[0], kind[2].split(","), top.strip("/"), base


def _folder(files: Files, top: str, base: str, path: str) -> tuple[str, str]:
    """The mount, and in it the group's folder: a container may see its group as the mount's top under the host's name, or outside of it."""
    if base != "/":
        path = path[len(base) :] if path == base or path.startswith(f"{base}/") else ""
    parts = [] if ".." in path.split("/") else [part for part in path.split("/") if part]
    while parts and not files.is_folder("/".join((top, *parts))):
        parts.pop()
    return top, "/".join((top, *parts))


def _disabled(line: str) -> bool:
    """Whether the kernel's command line leaves the memory cgroup off: the last word on it counts."""
    result = False
    for word in line.split():
        name, _, value = word.partition("=")
        if name in ("cgroup_disable", "cgroup_enable") and "memory" in value.split(","):
            result = name == "cgroup_disable"
    return result
