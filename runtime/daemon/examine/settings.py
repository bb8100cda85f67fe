"""The configuration: whether it is valid, and what of it does not go with this machine or with the bundle."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeadapt.errors import Fault
from edgeadapt.runtime.daemon import config_here
from edgeadapt.runtime.daemon.config import Loaded
from edgeadapt.runtime.daemon.examine.terms import Findings, Found, Site
from edgeadapt.runtime.daemon.examine.who import belongs

if TYPE_CHECKING:
    from edgeadapt.bundle import Manifest

SUBJECT = "configuration"


def told(faults: Iterable[Fault], warnings: Iterable[Fault]) -> Findings:
    """What `edgeadapt check-config` tells, as findings."""
    for one in faults:
        yield Found(SUBJECT, "fault", one.text, one.fix)
    for one in warnings:
        yield Found(SUBJECT, "warning", one.text, one.fix)


def valid(files: Sequence[str]) -> Found:
    """That there is nothing wrong with it."""
    return Found(SUBJECT, "fine", f"{', '.join(files) or 'no file, all defaults'}: valid")


def here(site: Site, loaded: Loaded, place: str, manifest: Manifest | None) -> Findings:
    """Keys, secrets, processors and groups on this machine; and, where there is a bundle, what of the configuration does not go with it."""

    def reads(key: str, path: Path) -> bool:
        by_systemd = key in config_here.SECRETS and site.hands_over
        return by_systemd or site.who is None or site.who.may(path, os.R_OK) is not False

    for file in loaded.files:
        if site.who is not None and site.who.may(file, os.R_OK) is False:
            text = f"{file} ({belongs(file)}): {site.who.name} may not read it, so that nothing of it is done"
            yield Found(SUBJECT, "fault", text, f"sudo chmod o+r {file}; secrets belong into files of their own")
    found = [*config_here.files(site.config, reads, site.hands_over), *config_here.machine(site.config)]
    if manifest is not None:
        found += [one for one in config_here.fitting(site.config, manifest) if "Pillow" not in one.message]  # libraries are told by themselves
    yield from told(*config_here.told(found, loaded, place))
