"""What a machine can enforce of a memory budget, and what is wrong with it, each with how to mend it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from edgeadapt._version import __version__
from edgeadapt.cache import cache_folder
from edgeadapt.devices.boards import Board, Profile, calibration, floor, here, probe
from edgeadapt.devices.boards.floor import Floor
from edgeadapt.devices.boards.probe import Machine, Storage
from edgeadapt.errors import InputError
from edgeadapt.units import format_bytes

OLDEST_RUNTIME = (1, 23)
"""onnxruntime that setup.cfg asks for."""

CUDA = "CUDAExecutionProvider"
"""onnxruntime's name of it."""

MEMORY_TOLD = (1, 28)
"""onnxruntime whose profiler tells memory node by node."""

VNNI = frozenset({"avx_vnni", "avx512_vnni"})
"""Instructions of x86-64 that add products of bytes in 32 bits; others of it add pairs of them in 16, as far as these go."""

LEAST_FREE = 64 << 20
"""Bytes of disk for prepared graphs and calibrations below which doctor warns."""

_CMDLINE = "/boot/firmware/cmdline.txt (one line) and reboot"


@dataclass(frozen=True)
class Ability:
    """One thing a system can do for a memory budget: what, whether this one does, and how or why not."""

    subject: str
    able: bool
    text: str


@dataclass(frozen=True)
class Problem:
    """What is wrong, how to mend it, and whether edgeadapt cannot be used with it."""

    text: str
    fix: str
    fatal: bool = False


@dataclass(frozen=True)
class Report:
    """All that doctor found.

    Attributes:
        machine: what it is and has.
        board: the profile a plan for "here" uses.
        software: versions by name; empty where it is not there.
        floor: what a process holds before any bundle, measured now.
        cache: the folder for prepared graphs and calibrations.
        calibration: date and versions of the saved calibration, or that there is none.
        abilities: what can be enforced.
        problems: what is wrong, the fatal first.
        cuda: why onnxruntime's CUDA provider does not start, "" where it does, None where onnxruntime has none.
    """

    machine: Machine
    board: Board
    software: dict[str, str]
    floor: Floor
    cache: Storage
    calibration: str
    abilities: tuple[Ability, ...]
    problems: tuple[Problem, ...]
    cuda: str | None = None

    @property
    def usable(self) -> bool:
        """Whether edgeadapt can be used here."""
        return not any(problem.fatal for problem in self.problems)


def look(
    root: str | os.PathLike[str] = "/",
    cache: str | os.PathLike[str] | None = None,
    loaded: Floor | None = None,
    start: Callable[[str], str] = floor.start,
) -> Report:
    """Examines a machine.

    Args:
        root: where /proc, /sys and /dev are.
        cache: the cache folder; the user's own where None.
        loaded: what loading onnxruntime found; None finds out in a child process.
        start: starts one of onnxruntime's providers and says why it does not.
    """
    machine = probe.look(root)
    found = floor.look() if loaded is None else loaded
    cuda = start(CUDA) if CUDA in found.providers else None
    storage = probe.storage(cache or cache_folder())
    software = {
        "edgeadapt": __version__,
        "python": found.python or sys.version.split()[0],
        "numpy": found.numpy,
        "onnxruntime": found.onnxruntime,
        "libc": _libc(),
        **{name: _installed(name) for name in ("onnx", "pyserial", "pillow")},
    }
    saved, damaged = _saved(machine, cache)
    board = here(root, cache)
    problems = [
        *_hardware(machine),
        *_software(found, software),
        *_providers(cuda),
        *_memory(machine),
        *_room(machine, board),
        *_storage(storage),
        *damaged,
        *_stale(saved, found),
    ]
    return Report(
        machine=machine,
        board=board,
        software=software,
        floor=found,
        cache=storage,
        calibration=_told(saved),
        abilities=tuple(_abilities(machine, software, cuda)),
        problems=tuple(sorted(problems, key=lambda problem: not problem.fatal)),
        cuda=cuda,
    )


def _saved(machine: Machine, cache: str | os.PathLike[str] | None) -> tuple[Profile | None, list[Problem]]:
    try:
        return calibration.saved(machine, cache), []
    except InputError as reason:
        return None, [Problem(f"the saved calibration is not used: {reason.message}", "run edgeadapt calibrate, which replaces it")]


def _told(saved: Profile | None) -> str:
    made = saved.calibration if saved else None
    if made is None:
        return "none: speeds and the floor are estimates (edgeadapt calibrate measures them)"
    return f"{made.date}, with onnxruntime {made.onnxruntime}, numpy {made.numpy}, python {made.python}"


def _stale(saved: Profile | None, loaded: Floor) -> list[Problem]:
    made = saved.calibration if saved else None
    if made is None or not loaded.onnxruntime:
        return []
    changed = [
        f"{name} {then} then, {now} now"
        for name, then, now in (("onnxruntime", made.onnxruntime, loaded.onnxruntime), ("numpy", made.numpy, loaded.numpy))
        if then != now
    ]
    return [Problem(f"the calibration is of other versions: {', '.join(changed)}", "run edgeadapt calibrate again")] if changed else []


def _hardware(machine: Machine) -> list[Problem]:
    if machine.bits == 32:
        return [
            Problem(f"this is a 32-bit userland ({machine.arch}); onnxruntime has no wheel for it", "install the 64-bit system on the card", True)
        ]
    if machine.arch not in ("aarch64", "x86-64", "unknown"):
        return [Problem(f"onnxruntime has no wheel for {machine.arch}", "use a 64-bit Arm or x86-64 machine", True)]
    if not machine.memory_total:
        return [Problem("/proc/meminfo cannot be read, so memory cannot be watched", "mount /proc; edgeadapt needs Linux", True)]
    return []


def _software(loaded: Floor, software: dict[str, str]) -> list[Problem]:
    found = []
    if loaded.error:
        found.append(
            Problem(f"onnxruntime does not work: {loaded.error}", "pip install --force-reinstall onnxruntime numpy, in this environment", True)
        )
    elif _version(loaded.onnxruntime) < OLDEST_RUNTIME:
        oldest = ".".join(map(str, OLDEST_RUNTIME))
        found.append(Problem(f"onnxruntime {loaded.onnxruntime} is too old: at least {oldest} is needed", "pip install --upgrade onnxruntime", True))
    if not software["onnx"]:
        found.append(Problem("onnx is not installed: graphs cannot be prepared for this processor", "pip install onnx"))
    if not software["pyserial"]:
        found.append(Problem("pyserial is not installed: serial sensors cannot be read", "pip install pyserial"))
    return found


def _providers(cuda: str | None) -> list[Problem]:
    if cuda:
        return [Problem(f"onnxruntime's CUDA provider does not start: {cuda}", "install the driver, CUDA and cuDNN that it asks for; or use the CPU")]
    return []


def _memory(machine: Machine) -> list[Problem]:
    found, group = [], machine.cgroup
    if group.state == "off":
        if machine.is_raspberry:
            text = "the memory cgroup is off, as Raspberry Pi OS boots: MemoryMax= of systemd and memory limits of containers are silently ignored"
            found.append(Problem(text, f"add cgroup_enable=memory cgroup_memory=1 to {_CMDLINE}"))
        elif group.disabled:
            found.append(Problem("the memory cgroup is off by the kernel's command line", "remove cgroup_disable=memory from it and reboot"))
        else:
            found.append(
                Problem(
                    "this kernel has no memory cgroup, or it is not mounted", "use a kernel with CONFIG_MEMCG and mount cgroup2 on /sys/fs/cgroup"
                )
            )
    if not machine.pressure:
        fix = f"add psi=1 to {_CMDLINE}" if machine.is_raspberry else "boot with psi=1 on the kernel's command line (CONFIG_PSI)"
        found.append(Problem("the system does not tell its memory pressure (PSI)", fix))
    if machine.address_limit is not None:
        text = (
            f"the address space of a process is limited to {format_bytes(machine.address_limit)}; mapped files count too, so loading may fail early"
        )
        found.append(Problem(text, "ulimit -v unlimited; a memory cgroup is the better limit"))
    return found


def _room(machine: Machine, board: Board) -> list[Problem]:
    if not 0 < machine.usable < board.floor:
        return []
    text = f"only {format_bytes(machine.usable)} are usable now; Python, numpy and onnxruntime alone take {format_bytes(board.floor)}"
    return [Problem(text, "end other programs, or raise the limit of the memory cgroup")]


def _storage(storage: Storage) -> list[Problem]:
    fix = "set XDG_CACHE_HOME to a folder that can be written"
    if storage.refused:
        return [Problem(f"the cache folder {storage.path} cannot be used: {storage.refused}", fix)]
    if storage.free < LEAST_FREE:
        return [Problem(f"only {format_bytes(storage.free)} are free for the cache folder {storage.path}", f"make room, or {fix}")]
    return []


def _abilities(machine: Machine, software: dict[str, str], cuda: str | None) -> list[Ability]:
    found = [_limit(machine), _pressure(machine), _overcommit(machine)]
    if machine.swaps:
        size = format_bytes(sum(swap.size for swap in machine.swaps))
        kind = "compressed memory (zram)" if all(swap.zram for swap in machine.swaps) else "a disk"
        found.append(
            Ability(
                "no swapping",
                False,
                f"{size} on {kind}: what is swapped out no longer counts as resident, and a step may stall; MemorySwapMax=0 avoids it",
            )
        )
    else:
        found.append(Ability("no swapping", True, "there is no swap: what is resident stays so"))
    if machine.gpu:
        where = "comes out of the same memory and " if machine.gpu == "jetson" else ""
        text = f"CUDA memory {where}is not counted by cgroups or as resident bytes; with --provider cuda, edgeadapt bounds and counts its own"
        found.append(Ability("GPU counted", False, text))
    if machine.gpu or cuda is not None:
        state = "starts: --provider cuda runs on the GPU" if cuda == "" else f"does not start: {cuda}"
        absent = "this onnxruntime has no CUDA provider: onnxruntime-gpu has (docs/providers.md)"
        found.append(Ability("CUDA provider", cuda == "", absent if cuda is None else state))
    glibc = software["libc"].startswith("glibc")
    found.append(
        Ability(
            "memory returned",
            glibc,
            "freed blocks go back to the system (mallopt)" if glibc else "no mallopt in this C library: freed blocks may stay resident",
        )
    )
    tells = _version(software["onnxruntime"]) >= MEMORY_TOLD
    oldest = ".".join(map(str, MEMORY_TOLD))
    told = (
        "onnxruntime's profiler tells it"
        if tells
        else f"onnxruntime's profiler does not tell it (from {oldest}): plans are checked by the process's peak"
    )
    found.append(Ability("memory per node", tells, told))
    if machine.arch == "x86-64" and machine.isa:
        exact = not VNNI.isdisjoint(machine.isa)
        text = "pairs of products end at 16 bits, as before VNNI: bundles exported with --quantize give a few other answers than on Arm or with it"
        found.append(Ability("exact 8-bit sums", exact, "by VNNI" if exact else text))
    return found


def _limit(machine: Machine) -> Ability:
    group, subject = machine.cgroup, "limit (memory cgroup)"
    if group.state == "off":
        return Ability(subject, False, "off: the kernel holds nobody to a limit")
    if group.state == "idle":
        return Ability(subject, False, "this process is in no group that is counted: a systemd unit with MemoryMax= or a container with a limit is")
    held = "" if group.current is None else f", {format_bytes(group.current)} held now"
    if group.limit is None:
        return Ability(subject, True, f"version {group.version}, on, without a limit{held}: MemoryMax= of a systemd unit sets one")
    high = f", reclaims from {format_bytes(group.high)}" if group.high is not None else ""
    return Ability(subject, True, f"version {group.version}, ends the process above {format_bytes(group.limit)}{high}{held}")


def _pressure(machine: Machine) -> Ability:
    if machine.pressure:
        return Ability("pressure (PSI)", True, "of the system" + (" and of this group" if machine.cgroup.pressure else ""))
    return Ability("pressure (PSI)", False, "not available: memory shortage of the system is seen by MemAvailable only")


def _overcommit(machine: Machine) -> Ability:
    if machine.overcommit == 2:
        return Ability("strict allocation", True, "memory that is not there is refused when it is asked for")
    text = "overcommit is on: memory that is not there is noticed when it is used, by the kernel ending a process"
    return Ability("strict allocation", False, text if machine.overcommit is not None else "unknown")


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "other"
    except (ValueError, OSError):
        return "other (musl?)"


def _installed(package: str) -> str:
    """A package's version without importing it; empty where it is not there."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        module = {"pyserial": "serial", "pillow": "PIL"}.get(package, package)
        return "unknown" if importlib.util.find_spec(module) else ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
