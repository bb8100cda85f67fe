"""Folders that look like the /proc, /sys and /dev of boards we do not have."""

from __future__ import annotations

import struct
from pathlib import Path

A72 = "fp asimd evtstrm crc32 cpuid"
A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
ARM64, ARM32, X86_64 = (2, 0xB7), (1, 0x28), (2, 0x3E)
PI_LINE = "coherent_pool=1M cgroup_disable=memory smsc95xx.macaddr=DC:A6:32:00:00:00 console=tty1 root=PARTUUID=1-02 rootwait"
CGROUP2 = "34 23 0:29 {base} /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"


def put(root: Path, path: str, text: str | bytes) -> Path:
    """Writes a file under a fake root."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def machine(root: Path, model: str = "", elf: tuple[int, int] = ARM64, page: int = 4096, total: int = 3884256, available: int = 3500000) -> Path:
    """What every Linux has; sizes in KiB as in /proc/meminfo."""
    head = b"\x7fELF" + bytes([elf[0], 1, 1]) + bytes(9) + struct.pack("<HH", 2, elf[1])
    put(root, "proc/self/exe", head + bytes(40))
    put(root, "proc/self/auxv", struct.pack("<6Q", 16, 0x887, 6, page, 0, 0))
    put(root, "proc/self/status", "Name:\tpython3\nCpus_allowed:\tf\nCpus_allowed_list:\t0-3\n")
    put(root, "proc/self/limits", "Limit  Soft Limit  Hard Limit  Units\nMax address space         unlimited            unlimited            bytes\n")
    put(root, "proc/self/mountinfo", "23 1 179:2 / / rw,noatime shared:1 - ext4 /dev/root rw\n")
    put(root, "proc/self/cgroup", "0::/\n")
    put(root, "proc/meminfo", f"MemTotal:        {total} kB\nMemFree:          100000 kB\nMemAvailable:    {available} kB\n")
    put(root, "proc/swaps", "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n")
    put(root, "proc/cmdline", "root=/dev/sda1 ro quiet\n")
    put(root, "proc/sys/kernel/osrelease", "6.12.25+rpt-rpi-v8\n")
    put(root, "proc/sys/vm/overcommit_memory", "0\n")
    put(root, "sys/devices/system/cpu/online", "0-3\n")
    if model:
        put(root, "proc/device-tree/model", model.encode() + b"\0")
    return root


def arm(root: Path, part: int, features: str, cores: int = 4) -> Path:
    """The /proc/cpuinfo of 64-bit Arm."""
    one = f"processor\t: {{}}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {part:#x}\n\n"
    return put(root, "proc/cpuinfo", "".join(one.format(core) for core in range(cores)))


def pi4(root: Path, line: str = PI_LINE) -> Path:
    """Raspberry Pi OS on a Pi 4 of 4 GB as it boots: no memory cgroup, no PSI, a swap file."""
    arm(machine(root, "Raspberry Pi 4 Model B Rev 1.4"), 0xD08, A72)
    put(root, "proc/cmdline", line)
    put(root, "proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/var/swap                               file\t\t524272\t\t1024\t\t-2\n")
    put(root, "proc/self/cgroup", "0::/user.slice/user-1000.slice/session-3.scope\n")
    put(root, "proc/self/mountinfo", CGROUP2.format(base="/") + "\n")
    put(root, "sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n")
    return put(root, "sys/fs/cgroup/user.slice/user-1000.slice/session-3.scope/cgroup.procs", "1\n")


def pi5(root: Path) -> Path:
    """A Pi 5 with 16 KiB pages, compressed swap, the memory cgroup and PSI turned on, run by systemd with MemoryMax=256M under a slice with less."""
    arm(machine(root, "Raspberry Pi 5 Model B Rev 1.0", page=16384, total=8245696, available=7600000), 0xD0B, A76)
    put(root, "proc/cmdline", PI_LINE + " cgroup_enable=memory cgroup_memory=1 psi=1")
    put(root, "proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    put(root, "proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0   partition\t2097136\t0\t100\n")
    put(root, "proc/self/cgroup", "0::/edge.slice/edgeadapt.service\n")
    put(root, "proc/self/mountinfo", CGROUP2.format(base="/") + "\n")
    put(root, "sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")
    group(root, "sys/fs/cgroup/edge.slice", limit=200 << 20, high=None, current=180 << 20, files=80 << 20)
    return group(root, "sys/fs/cgroup/edge.slice/edgeadapt.service", limit=256 << 20, high=192 << 20, current=60 << 20, files=10 << 20)


def group(root: Path, folder: str, limit: int | None, high: int | None, current: int, files: int) -> Path:
    """A group of version 2; `files` bytes of page cache."""
    put(root, f"{folder}/memory.max", "max\n" if limit is None else f"{limit}\n")
    put(root, f"{folder}/memory.high", "max\n" if high is None else f"{high}\n")
    put(root, f"{folder}/memory.current", f"{current}\n")
    put(root, f"{folder}/memory.pressure", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    return put(root, f"{folder}/memory.stat", f"anon {current - files}\nfile {files}\ninactive_file {files - 4096}\nactive_file 4096\n")


def container(root: Path, limit: int | None = 512 << 20) -> Path:
    """A container on x86-64 with version 2: its own group is the top of what it sees, /proc/meminfo is the host's."""
    machine(root, elf=X86_64, total=65536000, available=40000000)
    put(root, "proc/cpuinfo", "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse4_2 avx f16c fma avx2\n\n" * 4)
    put(root, "proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    put(root, "proc/self/mountinfo", CGROUP2.format(base="/") + "\n")
    put(root, "sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n")
    return group(root, "sys/fs/cgroup", limit=limit, high=None, current=100 << 20, files=40 << 20)


def version1(root: Path) -> Path:
    """Docker on a host with version 1, no namespace for groups: the mount's top is the container's group under the host's name."""
    machine(root, elf=X86_64, total=16384000, available=9000000)
    put(root, "proc/cpuinfo", "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse4_2\n\n")
    put(root, "proc/self/cgroup", "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n")
    mounts = "30 29 0:30 /docker/abc /sys/fs/cgroup/memory ro,nosuid master:15 - cgroup cgroup rw,memory\n"
    put(root, "proc/self/mountinfo", "29 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n" + mounts)
    put(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    put(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{300 << 20}\n")
    return put(
        root,
        "sys/fs/cgroup/memory/memory.stat",
        f"cache 1\nhierarchical_memory_limit {1 << 30}\ntotal_inactive_file {50 << 20}\ntotal_active_file {30 << 20}\n",
    )


def jetson(root: Path) -> Path:
    """A Jetson Orin Nano: six cores of which four are allowed, its GPU in the same memory, version 2 without limits."""
    arm(machine(root, "NVIDIA Jetson Orin Nano Developer Kit", total=7802872, available=6500000), 0xD42, A76 + " uscat ilrcpc flagm", 6)
    put(root, "sys/devices/system/cpu/online", "0-5\n")
    put(root, "proc/self/status", "Name:\tpython3\nCpus_allowed_list:\t0-2,5\n")
    put(root, "dev/nvhost-ctrl-gpu", "")
    put(root, "proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    put(root, "proc/self/cgroup", "0::/\n")
    put(root, "proc/self/mountinfo", CGROUP2.format(base="/") + "\n")
    return put(root, "sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")
