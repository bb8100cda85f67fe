"""A board for tests of `edgeadapt doctor --config`: a Raspberry Pi 5 that we do not have, with a state folder, a bundle and systemd."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from edgeadapt.bundle.reference import Chance, Reference
from edgeadapt.devices.boards import examine as machines
from edgeadapt.devices.boards.floor import Floor
from edgeadapt.runtime.daemon import config, examine, systemd
from edgeadapt.runtime.daemon.examine import Asked, Found, unit
from edgeadapt.runtime.daemon.store import Limits, Store
from tests import fakemachine as fake
from tests.shapedtoy import ShapedToy

FLOOR = Floor(
    "3.11.2", "2.4.6", "1.31.1", bare=11 << 20, with_numpy=26 << 20, with_onnxruntime=42 << 20, floor=50 << 20, providers=("CPUExecutionProvider",)
)
PROGRAM = sys.executable
WORKING = {
    "LoadState": "loaded",
    "ActiveState": "inactive",
    "Result": "success",
    "NRestarts": "0",
    "UnitFileState": "enabled",
    "NeedDaemonReload": "no",
    "User": "",
    "DynamicUser": "yes",
    "SupplementaryGroups": "",
    "MemoryMax": "infinity",
    "WatchdogUSec": "30s",
    "StateDirectory": "edgeadapt",
    "RuntimeDirectory": "edgeadapt",
    "CacheDirectory": "edgeadapt",
}


class Board:
    """A Raspberry Pi 5 with a state folder, a bundle that may adapt, and systemd, all of which a test may change."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.root = fake.pi5(place / "root")
        fake.group(self.root, "sys/fs/cgroup/edge.slice", limit=None, high=None, current=180 << 20, files=80 << 20)
        fake.group(self.root, "sys/fs/cgroup/edge.slice/edgeadapt.service", limit=None, high=None, current=60 << 20, files=10 << 20)
        self.mount("ext4")
        self.state, self.bundle = place / "state", place / "toy.edgeadapt"
        self.state.mkdir()
        looks = Reference(4, 2.0, 1.0, {"norm": Chance(0.5, 1.0)})
        ShapedToy(batches=(1, 4)).write(self.bundle, reference=looks)
        (place / "frames").mkdir()
        self.text = f'[state]\nfolder = "{self.state}"\n[source]\ntype = "folder"\npath = "{place}/frames"\n'
        self.text += f'[control]\nsocket = "{place}/control.sock"\n'
        self.told: dict[str, str] | None = None
        self.manager = "RuntimeWatchdogUSec=0\n"
        self.synchronised: bool | None = True
        self.version: int | None = 252
        self.floor = FLOOR

    @property
    def file(self) -> Path:
        path = self.place / "e.toml"
        path.write_text(self.text, encoding="utf-8")
        return path

    def mount(self, kind: str, options: str = "rw", more: str = "") -> None:
        """What the test's folder is on."""
        line = f"40 30 8:1 / {self.place} rw,noatime shared:1 - {kind} /dev/x {options}\n"
        fake.put(self.root, "proc/self/mountinfo", fake.CGROUP2.format(base="/") + "\n" + line + more)

    def install(self) -> None:
        with Store.open(self.state, Limits(spare=0), serving=False) as store:
            store.install(self.bundle)

    def unit(self, text: str | None = None, **told: str) -> None:
        """Has systemd run it, with a unit that is as printed, or another text."""
        (self.root / "run/systemd/system").mkdir(parents=True, exist_ok=True)
        path = self.place / "edgeadapt.service"
        name = told.get("User") or None
        printed = systemd.unit(config.load(self.file, {}).config, [PROGRAM], name, self.file, self.version)
        path.write_text(printed if text is None else text, encoding="utf-8")
        command = f"{{ path={PROGRAM} ; argv[]={PROGRAM} serve --config {self.file} ; ignore_errors=no ; start_time=[n/a] }}"
        self.told = {**WORKING, "FragmentPath": str(path), "ExecStart": command, **told}

    def no_unit(self) -> None:
        (self.root / "run/systemd/system").mkdir(parents=True, exist_ok=True)
        self.told = {"LoadState": "not-found", "ActiveState": "inactive"}

    def show(self, arguments: Sequence[str]) -> str:
        if self.told is None:
            raise OSError("Failed to connect to bus")
        if "edgeadapt.service" not in arguments:
            return self.manager
        return "".join(f"{name}={value}\n" for name, value in self.told.items())

    def look(self, *settings: str, environment: Mapping[str, str] | None = None) -> examine.Examined:
        report = machines.look(self.root, self.place / "cache", self.floor)
        asked = Asked(self.show, lambda: self.version, lambda: self.synchronised, environment or {})
        return examine.look(report, str(self.file), settings, self.root, asked)

    def found(self, subject: str, *settings: str) -> list[Found]:
        return [found for found in self.look(*settings).findings if found.subject == subject]

    def only(self, subject: str, *settings: str) -> Found:
        (one,) = self.found(subject, *settings)
        return one

    def worst(self, subject: str, *settings: str) -> Found:
        """Of what there is to say of it, what is worst."""
        return max(self.found(subject, *settings), key=lambda one: ["fine", "warning", "fault"].index(one.grade))


def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    """One, with no settings in the environment, and no file of the machine's own."""
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "default.toml"))
    monkeypatch.setattr(unit, "PRIVATE", ("/no/such",))  # tests are in /tmp
    for name in [name for name in os.environ if name.startswith("EDGEADAPT_") and "__" in name]:
        monkeypatch.delenv(name)
    for path in (tmp_path, *tmp_path.parents):  # as they are where others are to go through
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    return Board(tmp_path)
