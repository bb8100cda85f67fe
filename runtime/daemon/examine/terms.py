"""What an examination finds, and what of the machine its parts ask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgeadapt.devices.boards.files import Files
from edgeadapt.runtime.daemon import systemd
from edgeadapt.runtime.daemon.config import Config
from edgeadapt.runtime.daemon.examine.service import Service
from edgeadapt.runtime.daemon.examine.who import Who

if TYPE_CHECKING:
    from edgeadapt.devices.boards.examine import Report

Grade = Literal["fine", "warning", "fault"]
"""A fault is what the daemon could not do its work with, a warning what it does less or worse with, or only later."""


@dataclass(frozen=True)
class Found:
    """One thing that was looked at.

    Attributes:
        subject: what, in a word or two.
        grade: how it is.
        text: what was found, and what that means.
        fix: how to mend it; "" where there is nothing to mend.
    """

    subject: str
    grade: Grade
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Site:
    """Where the daemon is to do its work.

    Attributes:
        config: what it will be told. report: the machine.
        files: /proc, /run and /dev.
        service: the unit, as systemd has it; None where systemd does not run this machine, or could not be asked.
        who: whose the daemon is; None where nobody is called so.
        presumed: there is no unit, and it is looked at as if there were the one that `edgeadapt unit` prints.
        file: the configuration's, where it is not the default one.
        version: systemd's; None where it is not known.
    """

    config: Config
    report: Report
    files: Files
    service: Service | None
    who: Who | None
    presumed: bool = False
    file: str | None = None
    version: int | None = None

    @property
    def option(self) -> str:
        """What commands have to be told to read the same configuration, with a blank before it."""
        return "" if self.file is None else f" --config {self.file}"

    @property
    def unit(self) -> Service | None:
        """The unit, where there is one."""
        return self.service if self.service is not None and self.service.loaded else None

    @property
    def started(self) -> bool:
        """Whether systemd starts it, by a unit that is there or is to be."""
        return self.presumed or self.unit is not None

    @property
    def hands_over(self) -> bool:
        """Whether systemd reads the secrets for it."""
        return self.started and systemd.hands_over(self.version)

    def made(self, path: str, kind: str) -> bool:
        """Whether systemd makes the folder at `path` for the daemon; `kind` is "state", "runtime" or "cache"."""
        if path != systemd.FOLDERS[kind]:
            return False
        return self.presumed if self.unit is None else "edgeadapt" in self.unit.folders[kind]


Findings = Iterator[Found]
