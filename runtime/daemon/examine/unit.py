"""The daemon's unit: whether it is there and is the one for this configuration, and whether what it asks of systemd works here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgeadapt.errors import EdgeAdaptError
from edgeadapt.runtime.daemon import systemd
from edgeadapt.runtime.daemon.config import Config
from edgeadapt.runtime.daemon.examine import who
from edgeadapt.runtime.daemon.examine.service import Service
from edgeadapt.runtime.daemon.examine.terms import Findings, Found, Site
from edgeadapt.units import format_bytes

SUBJECT = "unit"
PRIVATE = ("/tmp", "/var/tmp")
"""Folders of which a service has its own."""

_SHOWN = 3


def presumed(service: Service | None, config: Config) -> bool:
    """Whether it is looked at as if there were a unit: systemd runs this machine and has none yet, and the state is to be where units have it."""
    return service is not None and service.told.get("LoadState") == "not-found" and str(config.state.folder) == systemd.FOLDERS["state"]


def user(service: Service | None, config: Config) -> who.Who | None:
    """Whose the daemon is: the unit's user where there is a unit, or is to be; else who asks. None where the unit's user is not there."""
    if presumed(service, config):
        return who.made(systemd.groups(config))
    if service is None or not service.loaded:
        return who.ourselves()
    if service.told.get("DynamicUser") == "yes":
        return who.made(service.groups)
    return who.named(service.told.get("User") or "root", service.groups)


def look(site: Site, booted: bool, file: str) -> Findings:
    """What there is to say of it.

    Args:
        site: see there.
        booted: systemd runs this machine.
        file: the configuration's.
    """
    service = site.service
    if not booted:
        text = "systemd does not run this system: something else has to start edgeadapt serve, and to start it again where it ends or hangs"
        yield Found(SUBJECT, "warning", text, "have what starts programs here do so")
    elif service is None:
        yield Found(SUBJECT, "warning", "systemd cannot be asked about it (systemctl show)", "sudo edgeadapt doctor")
    elif service.told.get("LoadState") == "not-found":
        text = "none is installed: the daemon is not started by itself, nor again when it ends"
        text += "; what follows is as if there were the one that edgeadapt unit prints" if site.presumed else ""
        yield Found(SUBJECT, "warning", text, _printed(site))
        if site.presumed:
            yield from _hidden(site)
            yield from _secrets(site)
    elif not service.loaded:
        text = f"{systemd.NAME} cannot be loaded ({service.told.get('LoadState')}): the daemon is not started"
        yield Found(SUBJECT, "fault", text, f"systemctl status {systemd.NAME} says why; or print it anew: {_printed(site)}")
    else:
        yield from _state(site, service)
        yield from _hidden(site)
        yield from _secrets(site)
        yield from _program(site, service)
        yield from _same(site, service, file)
        yield from _means(site, service)


def _state(site: Site, service: Service) -> Findings:
    told = service.told
    name = told.get("User") or "root"
    if site.who is None:
        text = f"it runs as user {name}, whom there is not: the daemon is not started"
        yield Found(SUBJECT, "fault", text, f"sudo useradd --system {name}; or print it without --user")
    if told.get("NeedDaemonReload") == "yes":
        yield Found(SUBJECT, "warning", "its file was changed, and systemd has the old one", "sudo systemctl daemon-reload")
    again, state = told.get("NRestarts", "0"), told.get("ActiveState", "")
    if state == "failed":
        text = f"it has failed ({told.get('Result')}), and is not started again"
        yield Found(SUBJECT, "fault", text, "journalctl -u edgeadapt says why; sudo systemctl start edgeadapt")
    elif state == "activating" and again not in ("", "0"):
        text = f"the daemon ends again and again, {again} times until now ({told.get('Result')})"
        yield Found(SUBJECT, "warning", text, "journalctl -u edgeadapt says why")
    if told.get("UnitFileState") not in ("enabled", "enabled-runtime"):
        yield Found(SUBJECT, "warning", "it is not enabled: the daemon does not start with the board", "sudo systemctl enable edgeadapt")
    if site.who is not None:
        whose = site.who.name if site.who.uid is not None else "a user that systemd makes"
        yield Found(SUBJECT, "fine", f"{told.get('FragmentPath') or systemd.NAME}, {state or 'inactive'}, runs as {whose}")


def _printed(site: Site) -> str:
    name = site.service.told.get("User") if site.service is not None and site.service.told.get("DynamicUser") != "yes" else ""
    own = f" --user {name}" if name else ""
    return f"edgeadapt unit{own}{site.option} | sudo tee /etc/systemd/system/{systemd.NAME}; sudo systemctl daemon-reload"


def _hidden(site: Site) -> Findings:
    """What is in a folder of which the service has one of its own, or which it does not see."""
    told = {} if site.unit is None else site.unit.told
    private = PRIVATE if told.get("PrivateTmp") != "no" else ()
    homes = systemd.HOMES if told.get("ProtectHome") == "yes" else ()
    read, made = _read(site), _made(site.config)
    for key, path in [*read, *made]:
        own = [folder for folder in private if path.is_relative_to(folder)]
        closed = [folder for folder in homes if path.is_relative_to(folder)]
        if own:
            means = "it does not see that" if (key, path) in read else "nobody else sees what it makes there"
            text = f"{key}, {path}, is in {own[0]}, of which the service has one of its own (PrivateTmp): {means}"
            yield Found(SUBJECT, "fault", text, "put it elsewhere, such as in /srv or /var/lib")
        elif closed:
            text = f"{key}, {path}, is in {closed[0]}, which the service does not see (ProtectHome)"
            yield Found(SUBJECT, "fault", text, f"put it elsewhere, such as in /srv or /var/lib; or {_printed(site)}")


def _read(site: Site) -> list[tuple[str, Path]]:
    """What the daemon uses of what others put there, by the key of the configuration."""
    config = site.config
    named = [("bundle.path", config.bundle.path), ("source.path", getattr(config.source, "path", None)), ("state.folder", config.state.folder)]
    named += [("bundle.keys", path) for path in config.bundle.keys if config.bundle.require_signature]
    named += [("mqtt.ca", config.mqtt.ca)] if config.mqtt.enabled else []
    named += [] if site.hands_over else systemd.secrets(config).items()
    return [(key, path) for key, path in named if path is not None]


def _made(config: Config) -> list[tuple[str, Path]]:
    """What it makes for others."""
    named = [("control.socket", config.control.socket), ("metrics.textfile", config.metrics.textfile)]
    named += [("frames.folder", config.frames.folder)] if config.frames.keep else []
    return [(key, path) for key, path in named if path is not None]


def _secrets(site: Site) -> Findings:
    """Those that systemd is too old to hand over."""
    paths, who = list(systemd.secrets(site.config).values()), site.who
    if site.hands_over or not paths:
        return
    names = " ".join(map(str, paths))
    text = f"{systemd.keeps_back(site.version)}: the daemon's user reads {names} itself"
    if who is not None and any(who.may(path, os.R_OK) is False for path in paths):
        fix = f"sudo chown {who.login} {names}" if who.login else "print the unit with --user NAME, of whom the files are"
        yield Found(SUBJECT, "warning", f"{text}, and may not", fix)
    else:
        yield Found(SUBJECT, "fine", text)


def _program(site: Site, service: Service) -> Findings:
    program = service.command[0] if service.command else ""
    if not program:
        return
    if not os.access(program, os.X_OK):
        yield Found(SUBJECT, "fault", f"it starts {program}, which is not there or no program: the daemon is not started", _printed(site))
    elif os.path.realpath(os.path.dirname(program)) != os.path.realpath(os.path.dirname(sys.executable)):
        text = f"it starts {program}, and this is another installation ({sys.executable}): libraries were looked for here, not there"
        yield Found(SUBJECT, "warning", text, f"{program} doctor{site.option}")


def _same(site: Site, service: Service, file: str) -> Findings:
    from edgeadapt.runtime.daemon.config import DEFAULT_PATH

    reads = service.file or DEFAULT_PATH
    if os.path.abspath(reads) != os.path.abspath(file):
        text = f"it starts the daemon with {reads}, and this is about {file}"
        yield Found(SUBJECT, "warning", text, f"edgeadapt doctor --config {reads}; or print the unit again: edgeadapt unit --config {file}")
        return
    try:
        has = _lines(Path(service.told.get("FragmentPath") or "").read_text(encoding="utf-8"))
        name = next((line.partition("=")[2] for line in has if line.startswith("User=")), None)
        wanted = _lines(systemd.unit(site.config, service.command, name, service.file, site.version))
    except (OSError, ValueError, EdgeAdaptError):
        return
    lacking, beyond = ([line for line in one if line not in other] for one, other in ((wanted, has), (has, wanted)))
    if lacking or beyond:
        parts = [f"{what} {_some(some)}" for what, some in (("lacks", lacking), ("has", beyond)) if some]
        text = f"it is not what edgeadapt unit prints for this configuration: it {' and '.join(parts)}"
        yield Found(SUBJECT, "warning", text, f"{_printed(site)}; changes of your own go into a drop-in")


def _lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if "=" in line and not line.startswith(("#", ";", "ExecStart=", "Description=", "Documentation="))]


def _some(lines: list[str]) -> str:
    rest = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return ", ".join(lines[:_SHOWN]) + rest


def _means(site: Site, service: Service) -> Findings:
    told, group = service.told, site.report.machine.cgroup
    most = told.get("MemoryMax", "")
    if most.isdecimal():
        bound = format_bytes(int(most))
        if group.state == "off":
            text = f"MemoryMax={bound} of the unit is ignored: the memory cgroup is off. The daemon keeps to its budget by itself alone"
            yield Found("memory limit", "warning", text, "see the problems above")
        else:
            yield Found("memory limit", "fine", f"the kernel ends the daemon above {bound} (MemoryMax of the unit)")
    watch = told.get("WatchdogUSec", "")
    board = service.manager.get("RuntimeWatchdogUSec", "")
    if watch in ("", "0", "infinity"):
        text = "the unit has none: a daemon that hangs is not started again"
        yield Found("watchdog", "warning", text, _printed(site))
        return
    text = f"a daemon that hangs for {watch} is started again"
    if site.files.exists("dev/watchdog"):
        used = board not in ("", "0", "infinity")
        text += f"; a board that hangs, after {board}" if used else "; a board that hangs is not (RuntimeWatchdogSec= in /etc/systemd/system.conf)"
    yield Found("watchdog", "fine", text)
