"""The state folder: whether it is there, whose it is, what it is on, and how much room there is."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from edgeadapt import plainfile
from edgeadapt.devices.boards.probe import storage
from edgeadapt.runtime.daemon.examine import mounts
from edgeadapt.runtime.daemon.examine.terms import Findings, Found, Site
from edgeadapt.runtime.daemon.examine.who import belongs, user_name
from edgeadapt.units import format_bytes

SUBJECT, ROOM = "state folder", "room"
_OURS = ("bundles", "slots", "pointer.a", "pointer.b", "history.jsonl", "lock")
SMALL = 2**20
"""Bytes for the record, the history and blocks that are not full."""


def look(site: Site) -> Findings:
    """What there is to say of it, but for the room."""
    folder = site.config.state.folder
    try:
        status = os.stat(folder)
    except PermissionError:
        yield Found(SUBJECT, "warning", f"{folder}: you may not look into it, so that what is in it is not known", "sudo edgeadapt doctor")
        return
    except OSError as reason:
        yield _missing(site, folder, reason)
        return
    if not stat.S_ISDIR(status.st_mode):
        yield Found(SUBJECT, "fault", f"{folder} is no folder: nothing can be kept", "remove it, or name another (state.folder)")
        return
    if not os.access(folder, os.R_OK | os.X_OK) and not (site.who is not None and site.who.ours):
        yield Found(SUBJECT, "warning", f"{folder}: you may not look into it, so that what is in it is not known", "sudo edgeadapt doctor")
    yield from _usable(site, folder, status)
    yield from _others(site, folder, status)


def _missing(site: Site, folder: Path, reason: OSError) -> Found:
    if site.made(str(folder), "state"):
        return Found(SUBJECT, "fine", f"{folder} is not there yet: systemd makes it at the first start")
    parent = folder.parent
    if not os.path.isdir(parent):
        text = f"{folder} is not there and is not made, since {parent} is not there either ({(reason.strerror or str(reason)).lower()})"
        return Found(SUBJECT, "fault", f"{text}: nothing can be kept", f"sudo mkdir -p {folder}, and give it to the daemon's user")
    if site.who is not None and site.who.may(parent, os.W_OK | os.X_OK) is False:
        text = f"{folder} is not there, and {site.who.name} may not make it in {parent} ({belongs(parent)}): nothing can be kept"
        return Found(SUBJECT, "fault", text, _give(site, folder, True))
    return Found(SUBJECT, "fine", f"{folder} is not there yet: it is made in {parent}")


def _usable(site: Site, folder: Path, status: os.stat_result) -> Iterator[Found]:
    mount = mounts.of(folder, site.files)
    where = f"{folder}, on {mount.kind}" if mount is not None else str(folder)
    if storage(folder).refused.endswith("read-only file system"):
        fix = "mount it so that it can be written (mount -o remount,rw); a card that turns read-only by itself is failing"
        yield Found(SUBJECT, "fault", f"{where}, which is read-only now: what is learned is gone at the next start", fix)
        return
    who = site.who
    if who is not None and not site.made(str(folder), "state") and who.may(folder, os.R_OK | os.W_OK | os.X_OK) is False:
        text = f"{where} ({belongs(folder)}): {who.name} may not write there, so that what is learned is gone at the next start"
        yield Found(SUBJECT, "fault", text, _give(site, folder, False))
        return
    why, fix = ("", "") if mount is None else mounts.doubt(mount, site.files)
    if why:
        yield Found(SUBJECT, "warning", f"{where}, {why}", fix)
    else:
        kept = " which keeps what is synced;" if mount is not None else ""
        yield Found(SUBJECT, "fine", f"{where},{kept} it belongs to user {user_name(status.st_uid)}")


def _give(site: Site, folder: Path, absent: bool) -> str:
    if site.who is not None and site.who.uid is None:
        return "leave state.folder out, so that systemd makes it; or print the unit with --user NAME, of whom the folder is"
    name = "$USER" if site.who is None else site.who.login
    make = f"sudo mkdir -p {folder} && " if absent else ""
    return f"{make}sudo chown -R {name} {folder}"


def _others(site: Site, folder: Path, status: os.stat_result) -> Iterator[Found]:
    """Of what is in it and belongs to others than the folder: the daemon could not replace or remove that."""
    if status.st_uid == 0 and site.made(str(folder), "state"):
        return  # systemd gives all of it to the daemon's user at the first start
    strange = []
    for path in _inside(folder):
        try:
            owner = path.lstat().st_uid
        except OSError:
            continue
        if owner != status.st_uid:
            strange.append((path, owner))
    if strange:
        path, owner = strange[0]
        rest = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        text = f"{path}{rest} in it belong to user {user_name(owner)}: the daemon may not be able to change or remove that"
        yield Found(SUBJECT, "warning", text, f"sudo chown -R --reference={folder}/ {folder}/")


def _inside(folder: Path) -> Iterator[Path]:
    for name in _OURS:
        if os.path.lexists(folder / name):
            yield folder / name
            for path, folders, files in os.walk(folder / name):
                yield from (Path(path, inner) for inner in sorted([*folders, *files]))


def room(site: Site, state: int, bundle: int, spare: int) -> Findings:
    """Whether the disk has what the store needs.

    Args:
        site: see there.
        state: bytes of a learned state. bundle: bytes of the bundle.
        spare: bytes that installing one leaves free.
    """
    folder = site.config.state.folder
    found = storage(folder)
    try:
        inodes = os.statvfs(plainfile.present(folder))
    except OSError:
        return
    saving, another = 3 * state + SMALL, bundle + spare
    has = f"{format_bytes(found.free)} are free for {folder}"
    if inodes.f_files and not inodes.f_favail:
        yield Found(ROOM, "fault", f"no more files can be made on the disk of {folder} (inodes): nothing can be kept", "remove files there: df -i")
    elif found.free < saving:
        fix = f"free {format_bytes(saving - found.free)}: the log of the system is often large (journalctl --vacuum-size=50M)"
        yield Found(ROOM, "fault", f"{has}, and saving what is learned takes up to {format_bytes(saving)}: it is not kept", fix)
    elif found.free < another:
        text = f"{has}: enough to save what is learned, and not for another bundle, which takes {format_bytes(another)}"
        yield Found(ROOM, "warning", text, f"free {format_bytes(another - found.free)} before you install one")
    else:
        yield Found(ROOM, "fine", f"{has}; saving takes up to {format_bytes(saving)}, another bundle {format_bytes(another)}")
    frames = site.config.frames
    if frames.keep:
        place = frames.folder or folder / "frames"
        if storage(place).free + _kept(place) < frames.most + another:
            text = f"frames are kept in {place}, up to {format_bytes(frames.most)} of them, and {format_bytes(storage(place).free)} are free"
            fix = "give a smaller frames.most, or another frames.folder"
            yield Found(ROOM, "warning", f"{text}: they may leave no room for what is learned", fix)


def _kept(place: Path) -> int:
    """Bytes of frames that are there; the daemon may remove some meanwhile."""
    size = 0
    for path in place.glob("frame-*.npz") if os.access(place, os.R_OK | os.X_OK) else ():
        with suppress(OSError):
            size += path.stat().st_size
    return size
