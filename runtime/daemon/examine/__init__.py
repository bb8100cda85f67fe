"""What the daemon will need on this board, looked at before it is started, or beside it. Nothing is started, opened for use, written or changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeadapt.devices.boards.files import Files
from edgeadapt.errors import ConfigError
from edgeadapt.runtime.daemon import config as configured
from edgeadapt.runtime.daemon import systemd
from edgeadapt.runtime.daemon.examine import clock, folder, libraries, running, service, settings, source, unit
from edgeadapt.runtime.daemon.examine.terms import Found, Grade, Site

if TYPE_CHECKING:
    from edgeadapt.bundle import Bundle
    from edgeadapt.devices.boards.examine import Report
    from edgeadapt.runtime.daemon.config import Loaded

__all__ = ["Examined", "Found", "Grade", "look"]


@dataclass(frozen=True)
class Examined:
    """All that was found.

    Attributes:
        config: the configuration's file, as it was named.
        findings: in the order of what they are about.
    """

    config: str
    findings: tuple[Found, ...]

    @property
    def able(self) -> bool:
        """Whether the daemon could do its work here."""
        return all(found.grade != "fault" for found in self.findings)


@dataclass(frozen=True)
class Asked:
    """How the system is asked, so that tests can answer: systemctl, systemd's version, the clock, and the environment's variables; None: our own."""

    show: service.Show = service.show
    version: Callable[[], int | None] = systemd.version
    synchronised: Callable[[], bool | None] = clock.synchronised
    environment: Mapping[str, str] | None = None


def look(
    report: Report,
    path: str | None = None,
    given: Sequence[str] = (),
    root: str | os.PathLike[str] = "/",
    asked: Asked | None = None,
) -> Examined:
    """Examines a configuration's needs on this machine.

    Args:
        report: of the machine, as `devices.boards.examine.look` gives it.
        path: the configuration's file; None: the default one.
        given: settings, as options `--set` give them.
        root: where /proc, /run and /dev are looked up for what is not named by the configuration.
        asked: see there.
    """
    how = asked or Asked()
    place = path or configured.DEFAULT_PATH
    try:
        loaded = configured.load(path, how.environment, given)
    except ConfigError as error:
        return Examined(place, tuple(settings.told(error.faults, ())))
    files = Files(root)
    booted = files.is_folder("run/systemd/system")
    known = service.ask(how.show) if booted else None
    config = loaded.config
    version = how.version() if booted else None
    site = Site(config, report, files, known, unit.user(known, config), unit.presumed(known, config), path, version)
    return Examined(place, tuple(_found(site, loaded, place, booted, how)))


def _found(site: Site, loaded: Loaded, place: str, booted: bool, how: Asked) -> Iterator[Found]:
    runs, ran = running.look(site)
    served: list[Found] = []
    bundle = _bundle(site, served)
    manifest = None if bundle is None else bundle.manifest
    said = [*settings.told((), loaded.warnings), *settings.here(site, loaded, place, manifest)]
    if not any(one.grade == "fault" for one in said):
        yield settings.valid(loaded.files)
    yield from said
    yield from unit.look(site, booted, place)
    yield from ran
    yield from folder.look(site)
    yield from _room(site, bundle)
    yield from served
    if bundle is not None:
        from edgeadapt.runtime.daemon.examine import budget

        yield from budget.look(site, bundle, runs)
    yield from source.look(site)
    yield from libraries.look(site, manifest)
    yield from clock.look(site, how.synchronised())


def _bundle(site: Site, found: list[Found]) -> Bundle | None:
    if site.report.floor.error:  # numpy or onnxruntime do not load, which is told above, and may end who tries
        found.append(Found("bundle", "warning", "not looked at, since onnxruntime does not work here", "mend that first"))
        return None
    from edgeadapt.runtime.daemon.examine import bundle

    return bundle.look(site, found)


def _room(site: Site, bundle: Bundle | None) -> Iterator[Found]:
    if site.report.floor.error or not os.access(site.config.state.folder.parent, os.X_OK):
        return
    from edgeadapt.runtime.daemon.examine.bundle import sizes
    from edgeadapt.runtime.daemon.store import Limits

    yield from folder.room(site, *sizes(bundle), Limits().spare)
