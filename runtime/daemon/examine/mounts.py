"""The file system that something is on, and what it does with what is synced, read from /proc."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from edgeadapt.devices.boards.files import Files

KEEPING = {"ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "jfs", "nilfs2", "ubifs"}
IN_MEMORY = {"tmpfs", "ramfs"}
FOREIGN = {"vfat", "msdos", "exfat", "ntfs", "ntfs3", "fuseblk", "hfsplus"}
REMOTE = {"nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "fuse.sshfs", "fuse.glusterfs"}
_NO_BARRIER = {"nobarrier", "barrier=0", "barrier=none"}


@dataclass(frozen=True)
class Mount:
    """A file system: where, of what type, with what options."""

    point: str
    kind: str
    options: frozenset[str]


def of(path: str | os.PathLike[str], files: Files) -> Mount | None:
    """The one that a path is on; None where that is not known."""
    place, best = os.path.realpath(path), None
    for line in files.text("proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(), right.split()
        if len(before) < 6 or not after:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before[4])
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best.point)):  # of several at one place the last is on top
            best = Mount(point, after[0], frozenset({*before[5].split(","), *(after[2].split(",") if len(after) > 2 else ())}))
    return best


def doubt(mount: Mount, files: Files) -> tuple[str, str]:
    """Why what is written there may not outlive a power cut, and what to do; ("", "") where it does."""
    move = "put it on a disk or a card with ext4 (state.folder)"
    if mount.kind in IN_MEMORY:
        return "which is in memory: whatever is learned, and every bundle that is installed, is gone when the power goes", move
    if mount.kind == "overlay":
        upper = next((option.partition("=")[2] for option in mount.options if option.startswith("upperdir=")), "")
        below = of(upper, files) if upper else None
        if below is not None and below.kind in IN_MEMORY:
            text = "whose changes are in memory (raspi-config's overlay file system): what is learned and installed is gone when the power goes"
            return text, "mount a partition of its own there, which the overlay leaves alone"
        return "whose changes go with the container, if this is one, or are in memory", "mount a volume or a partition there"
    if mount.kind in FOREIGN:
        text = "which has no owners, and does not rename at once and for good: a power cut may leave neither the old record nor the new one"
        return text, move
    if mount.kind in REMOTE:
        return "which is reached over a network: locks and renames cannot be relied on there, nor that it is there at the start", move
    if mount.kind == "ext2":
        return "which has no journal: a power cut may damage folders", "tune2fs -j makes it ext3, or put it on ext4 (state.folder)"
    if mount.options & _NO_BARRIER:
        return "mounted without barriers: a power cut may lose what was synced", "take nobarrier out of /etc/fstab"
    if mount.kind not in KEEPING:
        return "of which it is not known whether it keeps what was synced when the power goes", move
    return "", ""
