"""What a service's SystemCallFilter= and MemoryDenyWriteExecute= do, put on this process by hand: tests have no systemd that runs.

Run as a program: its first argument is a file of names of system calls that are allowed; then a real bundle predicts and adapts.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import platform
import re
import struct
import sys
from collections.abc import Collection
from pathlib import Path

_LOAD, _EQUAL, _SET, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_NUMBER, _THIRD = 0, 32  # where a filter finds the call's number and its third argument
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
HEADERS = (f"/usr/include/{platform.machine()}-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")


def numbers() -> dict[str, int]:
    """The numbers of this machine's system calls, by the kernel's headers; empty without them."""
    for path in map(Path, HEADERS):
        if path.is_file() and platform.machine() in ("x86_64", "aarch64"):
            found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)\b", path.read_text(encoding="utf-8"), re.MULTILINE)
            return {name: int(number) for name, number in found}
    return {}


def shut(allowed: Collection[str]) -> None:
    """From now on only these calls are allowed, and no memory that can be both written and executed."""
    known = numbers()
    program = [_step(_LOAD, _NUMBER)]
    for name in ("mprotect", "pkey_mprotect"):
        program += [_step(_EQUAL, known[name], 0, 4), _step(_LOAD, _THIRD), _step(_SET, mmap.PROT_EXEC, 0, 1), _step(_RETURN, _REFUSE)]
        program += [_step(_LOAD, _NUMBER)]
    both = mmap.PROT_WRITE | mmap.PROT_EXEC
    program += [_step(_EQUAL, known["mmap"], 0, 5), _step(_LOAD, _THIRD), _step(_AND, both), _step(_EQUAL, both, 0, 1), _step(_RETURN, _REFUSE)]
    program += [_step(_LOAD, _NUMBER)]
    for name in sorted(allowed & known.keys()):
        program += [_step(_EQUAL, known[name], 0, 1), _step(_RETURN, _ALLOW)]
    program.append(_step(_RETURN, _REFUSE))
    libc = ctypes.CDLL(None, use_errno=True)
    held = ctypes.create_string_buffer(b"".join(program))
    head = struct.pack("HxxxxxxP", len(program), ctypes.addressof(held))
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, head, 0, 0):
        raise OSError(ctypes.get_errno(), "no filter")


def _step(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("HBBI", code, true, false, value)


def refused() -> dict[str, bool]:
    """Whether what has to be refused is."""

    def fails(call: object) -> bool:
        try:
            call()  # type: ignore[operator]
        except PermissionError:
            return True
        return False

    import os

    everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    return {
        "memory": fails(lambda: mmap.mmap(-1, mmap.PAGESIZE, prot=everything)),
        "privileged": fails(lambda: os.setgroups([])),
        "priority": not fails(lambda: os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0))),
    }


def main() -> None:
    shut(set(Path(sys.argv[1]).read_text(encoding="utf-8").split()))
    import numpy as np

    import edgeadapt.demo
    from edgeadapt import Adapter

    with Adapter.open(Path(edgeadapt.demo.__file__).with_name("digits.edgeadapt")) as adapter:
        frames = np.zeros((max(adapter.batches["adapt"]), *adapter.manifest.input.shape), np.float32)
        adapter.adapt(frames)
        answer = adapter.predict(frames)
        print(json.dumps({**refused(), "finite": bool(np.isfinite(answer).all()), "steps": adapter.stats["steps"]}))


if __name__ == "__main__":
    main()
