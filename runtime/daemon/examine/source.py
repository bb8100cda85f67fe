"""Where frames come from: devices and folders, and whether the daemon's user may use them. No device is opened."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from edgeadapt.runtime.daemon.config import CameraSource, FolderSource, NoSource, ReplaySource, SerialSource, StdinSource
from edgeadapt.runtime.daemon.examine.terms import Findings, Found, Site
from edgeadapt.runtime.daemon.examine.who import belongs, group_name

SUBJECT = "source"


def look(site: Site) -> Findings:
    """The configured one."""
    source = site.config.source
    if isinstance(source, NoSource):
        yield Found(SUBJECT, "warning", "none is configured: no frames come", 'write type = "camera", "serial", "folder" or another under [source]')
    elif isinstance(source, SerialSource):
        yield from _serial(site, source.url)
    elif isinstance(source, CameraSource):
        yield from _camera(site, source.device)
    elif isinstance(source, FolderSource):
        yield from _folder(site, source)
    elif isinstance(source, ReplaySource):
        yield from _recorded(site, source.path)
    elif isinstance(source, StdinSource) and site.started:
        yield Found(SUBJECT, "warning", "standard input of a service is empty: no frames come", "take another source, or pipe into edgeadapt serve")
    else:
        yield Found(SUBJECT, "fine", f"{source.type}, which needs no device")


def _serial(site: Site, url: str) -> Findings:
    if not url.startswith("/"):
        yield Found(SUBJECT, "fine", "a serial line over the network, which is not asked here")
        return
    absent = "it is plugged in, or its name is right: ls -l /dev/serial/by-id"
    yield from _device(site, Path(url), "dialout", absent)
    name = os.path.basename(os.path.realpath(url))
    console = [line.split()[0] for line in site.files.text("proc/consoles").splitlines() if line.split()]
    if name in console or f"console={name}," in f"{site.files.line('proc/cmdline').replace(' ', ',')},":
        text = f"{url} is the system's console too: messages of the kernel and a login come between the frames"
        fix = "raspi-config, Interface Options, Serial Port: no login shell over it; elsewhere take console= out of the kernel's command line"
        yield Found(SUBJECT, "warning", text, fix)


def _camera(site: Site, device: str | int) -> Findings:
    if "://" in str(device):
        yield Found(SUBJECT, "fine", "a camera over the network, which is not asked here")
    elif str(device).startswith("picamera2:"):
        nodes = [name for name in site.files.names("dev") if re.fullmatch(r"media\d+", name)]
        if nodes:
            yield from _device(site, Path("/dev", nodes[0]), "video", "the ribbon is in")
        else:
            text = "the kernel sees no ribbon camera now (/dev/media*): no frames come until it does"
            yield Found(SUBJECT, "warning", text, "check the ribbon; rpicam-hello --list-cameras says what is found")
    else:
        absent = "it is plugged in, or its name is right: v4l2-ctl --list-devices"
        yield from _device(site, Path(f"/dev/video{device}" if isinstance(device, int) else device), "video", absent)


def _device(site: Site, path: Path, group: str, absent: str) -> Findings:
    try:
        status = path.stat()
    except OSError:
        yield Found(SUBJECT, "warning", f"{path} is not there now: no frames come until it is", f"see that {absent}")
        return
    if not stat.S_ISCHR(status.st_mode):
        if group == "video" and stat.S_ISREG(status.st_mode):
            yield Found(SUBJECT, "fine", f"{path}, a file with a video")
        else:
            yield Found(SUBJECT, "fault", f"{path} is no device: nothing can be read of it", "name the device, such as one of /dev/serial/by-id")
        return
    who = site.who
    if who is None or who.may(path, os.R_OK | os.W_OK) is not False:
        yield Found(SUBJECT, "fine", f"{path} ({belongs(path)})")
        return
    has = group_name(status.st_gid)
    text = f"{path} ({belongs(path)}): {who.name} may not open it, so that no frames come"
    if status.st_mode & 0o060 != 0o060 or status.st_gid == 0:
        yield Found(SUBJECT, "fault", text, f'a rule of udev gives it to the group {group}: GROUP="{group}", MODE="0660"')
    elif who.ours:
        yield Found(SUBJECT, "fault", text, f"sudo usermod -aG {has} {who.login}, then log in again")
    elif has == group:
        yield Found(SUBJECT, "fault", text, f"print the unit again, which then asks for the group {group} (edgeadapt unit), and daemon-reload")
    else:
        yield Found(SUBJECT, "fault", text, f"sudo systemctl edit edgeadapt: [Service], SupplementaryGroups={has}")


def _folder(site: Site, source: FolderSource) -> Findings:
    path, who = source.path, site.who
    if not os.path.isdir(path):
        yield Found(SUBJECT, "warning", f"{path} is no folder now: no frames come until it is", f"sudo mkdir -p {path}")
        return
    reading = os.R_OK | os.X_OK
    if who is not None and who.may(path, reading) is False:
        yield Found(SUBJECT, "fault", f"{path} ({belongs(path)}): {who.name} may not read it, so that no frames come", f"chmod o+rx {path}")
    elif who is not None and source.remove and who.may(path, reading | os.W_OK) is False:
        text = f"{path} ({belongs(path)}): {who.name} may not remove files there, which source.remove asks for"
        give = f"sudo chown {who.login} {path}" if who.login else "print the unit with --user NAME, of whom the folder is"
        yield Found(SUBJECT, "fault", text, f"{give}; or leave source.remove out")
    else:
        yield Found(SUBJECT, "fine", f"the folder {path}")


def _recorded(site: Site, path: Path) -> Findings:
    if not os.path.exists(path):
        yield Found(SUBJECT, "fault", f"{path} is not there: there is nothing to replay", "give an .npz or .npy file, or a folder of images")
    elif site.who is not None and site.who.may(path, os.R_OK) is False:
        yield Found(SUBJECT, "fault", f"{path} ({belongs(path)}): {site.who.name} may not read it", f"chmod o+r {path}")
    else:
        yield Found(SUBJECT, "fine", str(path))
