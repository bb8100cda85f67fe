"""The daemon's unit for systemd: the file beside this, made fit for an installation and what its configuration uses."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from edgeadapt.errors import UsageError
from edgeadapt.runtime.daemon.config import CameraSource, Config, FolderSource, HttpSource, ReplaySource, SerialSource
from edgeadapt.runtime.daemon.config_checks import is_loopback

NAME = "edgeadapt.service"
"""The unit's name, and the file's."""

MIB = 2**20
LEAST = 32 * MIB
"""Bytes, at least, that the service's hard bound lies above the budget: files that were read count there too, and a child that prepares graphs."""

FOLDERS = {"state": "/var/lib/edgeadapt", "runtime": "/run/edgeadapt", "cache": "/var/cache/edgeadapt"}
"""That systemd makes for the unit, by kind."""

BACK_OFF = 254
"""The first version of systemd that can wait longer from start to start."""

HANDS_OVER = 247
"""The first version of systemd that reads secrets for a service and hands them over."""

HOMES = ("/home", "/root", "/run/user")
"""Folders that ProtectHome=yes hides."""

_LINES = ("ttyUSB", "ttyACM", "ttyAMA", "ttyS", "ttyTHS")
_CREDENTIALS = f"/run/credentials/{NAME}"  # %d would be shorter, and systemd 249 does not know it


def unit(
    config: Config, command: Sequence[str], user: str | None = None, file: str | os.PathLike[str] | None = None, version: int | None = None
) -> str:
    """The unit, as text.

    Args:
        config: what the service will be told; what it is not allowed follows from that. Print a new unit when it changes.
        command: what begins the program, an absolute path first.
        user: whose it is; None: one that systemd makes.
        file: the configuration's file; None: the default one.
        version: systemd's; None: not known, so that what every version from 247 on has is used, and no more. Older ones hand no secrets over: the
            daemon's user has to be able to read those itself.

    Raises:
        UsageError: the command or the file is no absolute path, or the user no name.
    """
    if not command or not os.path.isabs(command[0]):
        raise UsageError(f"a unit needs an absolute path to the program, got {command[0] if command else 'none'}", "give --executable /…/edgeadapt")
    if user is not None and not re.fullmatch(r"[a-z_][a-z0-9_-]{0,30}", user):
        raise UsageError(f"{user!r} is no name of a user", "make one with: sudo useradd --system edgeadapt")
    words = [*command, "serve", *([] if file is None else ["--config", os.path.abspath(file)])]
    text = (files(__package__) / NAME).read_text(encoding="utf-8")
    text = re.sub(r"(?m)^ExecStart=.*$", lambda _: "ExecStart=" + " ".join(_quoted(word) for word in words), text)
    if user is not None:
        text = text.replace("DynamicUser=yes\n", "").replace("RemoveIPC=yes\n", "")  # what else that user runs would lose what it shares
    serial, camera, network = _devices(config)
    if serial or camera:
        text = text.replace("PrivateDevices=yes\n", "")
    if network is not None:
        text = text.replace("PrivateNetwork=yes\n", "")
        text = text.replace("RestrictAddressFamilies=AF_UNIX\n", "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n")
        if network:
            text = text.replace("IPAddressDeny=any\n", "")
    own = [] if hands_over(version) else [str(path) for path in secrets(config).values()]
    read = [command[0], *_read(config), *own, *([] if file is None else [os.path.abspath(file)])]
    if any(_inside(path, home) for path in read for home in HOMES):
        text = text.replace("ProtectHome=yes\n", "ProtectHome=read-only\n")
    if config.metrics.textfile is not None:
        text = text.replace("UMask=0027\n", "UMask=0022\n")  # node_exporter reads it as another user
    parts: dict[str, Iterable[str]] = {
        "unit": _unit(serial, camera, network),
        "restart": ["RestartSteps=14", "RestartMaxDelaySec=60"] if version is not None and version >= BACK_OFF else [],
        "environment": _secrets(config) if hands_over(version) else [],
        "user": _user(config, user),
        "memory": _memory(config),
        "devices": _allowed(serial, camera),
        "network": ["IPAddressAllow=localhost"] if network is False else [],
        "calls": ["SystemCallFilter=@chown"] if config.control.group else [],  # its socket is given to that group
        "paths": _written(config),
    }
    for name, lines in parts.items():
        text = text.replace(f"#: {name}\n", "".join(f"{line}\n" for line in lines))
    return text


def version() -> int | None:
    """That of this machine's systemd; None where there is none."""
    try:
        told = subprocess.run(["systemctl", "--version"], check=False, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"systemd (\d+)", told)
    return None if found is None else int(found[1])


def _devices(config: Config) -> tuple[bool, bool, bool | None]:
    """Whether it uses serial lines, cameras; and the network: None not at all, False only this machine, True others."""
    source, hosts = config.source, []
    serial = isinstance(source, SerialSource) and source.url.startswith("/")
    camera = isinstance(source, CameraSource) and "://" not in str(source.device)
    if isinstance(source, SerialSource | CameraSource) and not serial and not camera:
        hosts.append("0.0.0.0")  # an address; whose does not matter much
    if config.http.enabled or isinstance(source, HttpSource):
        hosts.append(config.http.host)
    if config.mqtt.enabled and config.mqtt.host is not None:
        hosts.append(config.mqtt.host)
    return serial, camera, not all(is_loopback(host) for host in hosts) if hosts else None


def _unit(serial: bool, camera: bool, network: bool | None) -> Iterator[str]:
    if network:
        yield "Wants=network-online.target"
        yield "After=network-online.target"
    modules = [*(("usbserial", "cdc_acm") if serial else ()), *(("uvcvideo",) if camera else ())]
    if modules:  # a kind of device that the kernel does not know yet when the service starts would stay forbidden
        names = " ".join(f"modprobe@{module}.service" for module in modules)
        yield f"Wants={names}"
        yield f"After={names}"


def keeps_back(version: int | None) -> str:
    """What to say of one that does not hand secrets over."""
    return f"systemd {version} hands no secrets over, as it does from {HANDS_OVER} on"


def hands_over(version: int | None) -> bool:
    """Whether a systemd of that version reads the secrets for the daemon; one of which it is not known counts as new."""
    return version is None or version >= HANDS_OVER


def secrets(config: Config) -> dict[str, Path]:
    """Files with secrets that the daemon uses, by their keys in the configuration."""
    used = {"mqtt.password_file": config.mqtt.enabled and config.mqtt.password_file}
    used["http.token_file"] = config.http.enabled and config.http.token_file
    return {key: path for key, path in used.items() if path}


def _secrets(config: Config) -> Iterator[str]:
    for key, path in secrets(config).items():
        name = {"mqtt.password_file": "mqtt-password", "http.token_file": "http-token"}[key]
        yield f"LoadCredential={name}:{_plain(path)}"
        yield f"Environment=EDGEADAPT_{key.replace('.', '__').upper()}={_CREDENTIALS}/{name}"


def groups(config: Config) -> list[str]:
    """Groups that the unit gives to the daemon, for its devices and its control socket."""
    serial, camera, _ = _devices(config)
    control = [config.control.group] if config.control.group else []
    return [*(["dialout"] if serial else []), *(["video"] if camera else []), *control]


def _user(config: Config, user: str | None) -> Iterator[str]:
    if user is not None:
        yield f"User={user}"
    if names := groups(config):
        yield f"SupplementaryGroups={' '.join(names)}"


def _memory(config: Config) -> Iterator[str]:
    budget = config.memory.budget
    if budget is not None:
        above = max(LEAST, budget // 4)
        yield f"MemoryHigh={budget + above // 2}"
        yield f"MemoryMax={budget + above}"


def _allowed(serial: bool, camera: bool) -> Iterator[str]:
    if not serial and not camera:
        return
    yield "DevicePolicy=closed"
    for kind in [*(_LINES if serial else ()), *(("video4linux", "media", "dma_heap") if camera else ())]:
        yield f"DeviceAllow=char-{kind} rw"


def _read(config: Config) -> list[str]:
    source = config.source
    paths = [config.bundle.path, *config.bundle.keys, config.mqtt.ca]
    if isinstance(source, FolderSource | ReplaySource):
        paths.append(source.path)
    return [str(path) for path in [*paths, *_places(config)] if path is not None]


def _places(config: Config) -> list[Path]:
    """Folders that it writes to, besides those that systemd makes."""
    source = config.source
    found = [config.state.folder, config.control.socket.parent]
    if config.metrics.textfile is not None:
        found.append(config.metrics.textfile.parent)
    if config.frames.keep and config.frames.folder is not None:
        found.append(config.frames.folder)
    if isinstance(source, FolderSource) and source.remove:
        found.append(source.path)
    return list(dict.fromkeys(path for path in found if not any(_inside(path, one) for one in FOLDERS.values())))


def _written(config: Config) -> list[str]:
    return [f"ReadWritePaths=-{_plain(path)}" for path in _places(config)]  # -: one that is missing is the daemon's to complain of


def _inside(path: str | os.PathLike[str], folder: str) -> bool:
    return os.path.commonpath([os.path.abspath(path), folder]) == folder


def _plain(path: Path) -> str:
    text = str(path)
    if not re.fullmatch(r"[^\s\"'\\:]+", text):
        raise UsageError(f"{text!r} cannot stand in a unit", "take a path without blanks, quotes, colons and backslashes")
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    if not word.isprintable():
        raise UsageError(f"{word!r} cannot stand in a unit", "take a path of letters that can be printed")
    escaped = word.replace("%", "%%").replace("$", "$$").replace("\\", "\\\\").replace('"', '\\"')
    return escaped if re.fullmatch(r"[A-Za-z0-9_./%$@:+,=-]+", escaped) else f'"{escaped}"'
