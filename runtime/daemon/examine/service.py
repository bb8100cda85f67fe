"""The daemon's unit as systemd has it. It is asked, and nothing is loaded or changed by that."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from edgeadapt.runtime.daemon.systemd import NAME

_ASKED = (
    *("LoadState", "ActiveState", "Result", "NRestarts", "UnitFileState", "FragmentPath", "DropInPaths", "NeedDaemonReload", "ExecStart"),
    *("User", "DynamicUser", "SupplementaryGroups", "MemoryMax", "WatchdogUSec", "StateDirectory", "RuntimeDirectory", "CacheDirectory"),
    *("PrivateTmp", "ProtectHome"),
)

Show = Callable[[Sequence[str]], str]
"""What `systemctl` prints when it is called with these arguments; raises OSError where that is not possible."""


def show(arguments: Sequence[str]) -> str:
    """Calls systemctl.

    Raises:
        OSError: it is not there, or does not answer.
    """
    try:
        environment = {**os.environ, "LC_ALL": "C", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}
        call = ["systemctl", *arguments]
        ended = subprocess.run(call, check=False, capture_output=True, text=True, timeout=15, env=environment)
    except subprocess.TimeoutExpired:
        raise OSError("systemctl does not answer") from None
    if ended.returncode:
        raise OSError(ended.stderr.strip() or "systemctl fails")
    return ended.stdout


@dataclass(frozen=True)
class Service:
    """What systemd says of the unit, and of its own watchdog.

    Attributes:
        told: properties of the unit by name, as `systemctl show` prints them.
        manager: the manager's own.
    """

    told: Mapping[str, str]
    manager: Mapping[str, str]

    @property
    def loaded(self) -> bool:
        """Whether there is one that can be started."""
        return self.told.get("LoadState") == "loaded"

    @property
    def groups(self) -> list[str]:
        """Names of groups that are given to the daemon."""
        return self.told.get("SupplementaryGroups", "").split()

    @cached_property
    def folders(self) -> dict[str, list[str]]:
        """Names of folders that systemd makes, by kind."""
        return {kind: self.told.get(f"{kind.capitalize()}Directory", "").split() for kind in ("state", "runtime", "cache")}

    @cached_property
    def words(self) -> list[str]:
        """The command that it starts; [] where that is not known."""
        after = self.told.get("ExecStart", "").partition("argv[]=")[2]
        return after.partition(" ; ")[0].split()

    @property
    def command(self) -> list[str]:
        """What of it comes before "serve"."""
        return self.words[: self.words.index("serve")] if "serve" in self.words else self.words[:1]

    @property
    def file(self) -> str | None:
        """The configuration's file that it names; None for the default one."""
        return self.words[at + 1] if "--config" in self.words and (at := self.words.index("--config")) + 1 < len(self.words) else None


def ask(call: Show = show) -> Service | None:
    """The unit; None where systemd cannot be asked."""
    try:
        unit = call(["show", NAME, f"--property={','.join(_ASKED)}"])
        return Service(_parsed(unit), _parsed(call(["show", "--property=RuntimeWatchdogUSec"])))
    except OSError:
        return None


def _parsed(text: str) -> dict[str, str]:
    return {name: value for name, mark, value in (line.partition("=") for line in text.splitlines()) if mark}
