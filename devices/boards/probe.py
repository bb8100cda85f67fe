"""What this machine is and has, read from /proc and /sys only."""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass

from edgeadapt.devices.boards import cgroup
from edgeadapt.devices.boards.files import Files

ARM_SETS = {"asimd": "neon", "asimddp": "dotprod", "asimdhp": "fp16", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve", "sve2": "sve2"}
"""The kernel's name of an instruction set, and the profiles'."""

X86_SETS = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
"""Instruction sets of x86-64, by the kernel's names."""

_CORES = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD04): "Cortex-A35",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD4B): "Cortex-A78C",
    (0x4E, 0x003): "Denver 2",
    (0x4E, 0x004): "Carmel",
}
_ARCHITECTURES = {0x03: "x86", 0x28: "arm", 0x3E: "x86-64", 0xB7: "aarch64"}  # e_machine of ELF
_PAGE_ENTRY = 6  # AT_PAGESZ of the auxiliary vector


@dataclass(frozen=True)
class Swap:
    """One place to swap to: its name, bytes, bytes in use, and whether it is compressed memory (zram) and not a disk."""

    name: str
    size: int
    used: int
    zram: bool


@dataclass(frozen=True)
class Machine:
    """This machine, as this process sees it.

    Attributes:
        model: the board (device tree) or the computer (DMI); empty where neither says.
        cpu: the processor.
        arch: of this process: "aarch64", "x86-64", "arm", "x86", or "unknown".
        bits: of this process, 32 or 64; 0 unknown.
        kernel: its release.
        cores: processors this process may use.
        cores_online: processors there are.
        isa: instruction sets, named as in board profiles.
        page: bytes of a page of memory.
        memory_total, memory_available: bytes the system has, and could give without swapping.
        swaps: where it may swap to.
        overcommit: 0 (heuristic), 1 (always), 2 (never); None unknown.
        address_limit: bytes of address space this process may have (ulimit -v); None for no limit.
        cgroup: the memory cgroup.
        pressure: the system tells its memory pressure (PSI).
        gpu: "jetson" (shares the memory), "nvidia", or none.
    """

    model: str
    cpu: str
    arch: str
    bits: int
    kernel: str
    cores: int
    cores_online: int
    isa: tuple[str, ...]
    page: int
    memory_total: int
    memory_available: int
    swaps: tuple[Swap, ...]
    overcommit: int | None
    address_limit: int | None
    cgroup: cgroup.Cgroup
    pressure: bool
    gpu: str

    @property
    def usable(self) -> int:
        """Bytes one process could have now: what the system has available, and no more than the memory cgroup leaves. 0 unknown."""
        room = self.cgroup.room
        return self.memory_available if room is None else min(room, self.memory_available or room)

    @property
    def fingerprint(self) -> str:
        """The same for machines whose calibration may be shared: model, processor, architecture, page size."""
        text = "\n".join((self.model, self.cpu, self.arch, str(self.page)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def is_raspberry(self) -> bool:
        """Whether its firmware is a Raspberry Pi's."""
        return "raspberry pi" in self.model.lower()


@dataclass(frozen=True)
class Storage:
    """A folder to write to: it or its nearest existing parent, free bytes for us, and why it cannot be written (empty where it can)."""

    path: str
    free: int
    refused: str


def look(root: str | os.PathLike[str] = "/") -> Machine:
    """Reads what there is; whatever is missing has the value that the attribute's description gives.

    Args:
        root: where /proc, /sys and /dev are.
    """
    files = Files(root)
    memory = files.table("proc/meminfo")
    arch, bits = _executable(files.data("proc/self/exe", 20))
    cpu, isa = _processor(files.text("proc/cpuinfo"))
    online = _count(files.line("sys/devices/system/cpu/online")) or files.text("proc/cpuinfo").count("processor\t:") or 1
    return Machine(
        model=files.line("proc/device-tree/model") or files.line("sys/firmware/devicetree/base/model") or _computer(files),
        cpu=cpu,
        arch=arch,
        bits=bits,
        kernel=files.line("proc/sys/kernel/osrelease"),
        cores=_count(_field(files.text("proc/self/status"), "Cpus_allowed_list")) or online,
        cores_online=online,
        isa=isa,
        page=_page(files.data("proc/self/auxv")) or os.sysconf("SC_PAGE_SIZE"),
        memory_total=1024 * memory.get("MemTotal", 0),
        memory_available=1024 * memory.get("MemAvailable", memory.get("MemFree", 0)),
        swaps=tuple(_swaps(files.text("proc/swaps"))),
        overcommit=files.number("proc/sys/vm/overcommit_memory"),
        address_limit=_address_limit(files.text("proc/self/limits")),
        cgroup=cgroup.look(files),
        pressure=files.text("proc/pressure/memory").startswith("some"),
        gpu=_gpu(files),
    )


def storage(folder: str | os.PathLike[str]) -> Storage:
    """Whether files can be written to a folder that may not exist yet. Nothing is written."""
    path = os.path.abspath(folder)
    place = path
    while not os.path.lexists(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        return Storage(path, 0, f"{place} is not a folder")
    try:
        state = os.statvfs(place)
    except OSError as reason:
        return Storage(path, 0, f"{place}: {reason.strerror}")
    free = state.f_bavail * state.f_frsize
    if state.f_flag & os.ST_RDONLY:
        return Storage(path, free, f"{place} is on a read-only file system")
    return Storage(path, free, "" if os.access(place, os.W_OK | os.X_OK) else f"{place} may not be written by this user")


def _executable(head: bytes) -> tuple[str, int]:
    """(architecture, bits) of an ELF file: a 32-bit userland also runs on a 64-bit kernel, which `uname` would tell about."""
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return "unknown", 0
    machine = int.from_bytes(head[18:20], "little")
    return _ARCHITECTURES.get(machine, "unknown"), {1: 32, 2: 64}.get(head[4], 0)


def _page(vector: bytes) -> int:
    for offset in range(0, len(vector) - 15, 16):
        kind, value = struct.unpack_from("<QQ", vector, offset)
        if kind == _PAGE_ENTRY and 4096 <= value <= 1 << 20:
            return int(value)
    return 0


def _processor(text: str) -> tuple[str, tuple[str, ...]]:
    flags = (_field(text, "Features") or _field(text, "flags")).split()
    isa = [name for flag, name in ARM_SETS.items() if flag in flags] or [name for name in X86_SETS if name in flags]
    try:
        part = int(_field(text, "CPU implementer"), 16), int(_field(text, "CPU part"), 16)
    except ValueError:
        return _field(text, "model name") or "unknown processor", tuple(isa)
    return _CORES.get(part, f"Arm part {part[0]:#x}/{part[1]:#x}"), tuple(isa)


def _computer(files: Files) -> str:
    vendor, product = (files.line(f"sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name"))
    return f"{vendor} {product}".strip()


def _field(text: str, name: str) -> str:
    """The first "name : value" of a text."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _count(ranges: str) -> int:
    """How many numbers "0-2,5" names; 0 where it names none."""
    total = 0
    for part in filter(None, ranges.split(",")):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            return 0
        total += int(last or first) - int(first) + 1
    return total


def _swaps(text: str) -> list[Swap]:
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 4 and fields[2].isdecimal() and fields[3].isdecimal():
            found.append(Swap(fields[0], 1024 * int(fields[2]), 1024 * int(fields[3]), "zram" in fields[0]))
    return found


def _address_limit(text: str) -> int | None:
    for line in text.splitlines():
        if line.startswith("Max address space"):
            soft = line[len("Max address space") :].split()[0:1]
            return int(soft[0]) if soft and soft[0].isdecimal() else None
    return None


def _gpu(files: Files) -> str:
    if any(name.startswith(("nvhost", "nvgpu", "nvmap")) for name in files.names("dev")) or files.exists("sys/module/nvgpu"):
        return "jetson"
    return "nvidia" if files.exists("proc/driver/nvidia/version") else ""
