"""Kills the whole daemon with SIGKILL at random moments, starts it again each time, and looks at what it goes on with.

    ./dev bench killed_daemon --times 200 --seed 0
    ./dev bench killed_daemon --times 0 --full 5            # only a disk that fills up; needs root

`edgeadapt serve` adapts to frames that drift and are posted all the time, is marked good and rolled back by hand, and gets other bundles by
`edgeadapt install`. It is killed while it starts, while a file is written, while one of these goes on, while it ends, or whenever. After each kill
the state folder is looked at from outside, and after each start the daemon is:

- the record can be read, and is no older than the last one that the daemon told of: nothing that was acknowledged is lost;
- the states that it names are whole. Each step of the model adds one to all that is learned, so that of two moments in one file would show;
- the start takes what it should by that record: the newest, or after three that did not last the next, and counts so;
- what the daemon then holds in memory, as it saves it before any frame has come, is what was on the disk, to the bit;
- a daemon that lasted is no failed start.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._served import ROOT, Feeder, Served, free_port, web
from edgeadapt.bundle import Bundle
from edgeadapt.bundle.reference import Chance, Reference
from edgeadapt.errors import EdgeAdaptError
from edgeadapt.runtime.checkpoint import compatible, opened
from edgeadapt.runtime.daemon.store.pointer import Installed, Pair, Pointer, Saved, States
from tests.toybundle import SIDE, Toy, _Build

WIDTH, WINDOW = 2000, 4
BOOTS = 3
MOMENTS = {"start": 3, "write": 6, "mark-good": 4, "rollback": 3, "install": 3, "end": 2, "lasted": 2, "whenever": 3}
"""When it is killed, and how often among all."""


class _Counted(_Build):
    def update(self, name: str, gradient: str, moment: str | None) -> None:
        for each in filter(None, (name, moment)):
            self("Add", f"state.{each}", self.const(1.0), to=f"new.{each}")


class Counting(Toy):
    """A model whose steps add one to every number that they learn."""

    def builder(self, *arguments: Any) -> _Build:
        """What builds one graph."""
        return _Counted(self, *arguments)


def bundles(folder: Path) -> list[Path]:
    """Two that take the same states."""
    toy, looks = Counting(WIDTH, 0, (1, WINDOW)), Reference(WINDOW, 2.0, 1.0, {"norm": Chance(0.5, 1.0)})
    return [toy.write(folder / f"{name}.edgeadapt", reference=looks, producer=f"edgeadapt {name}") for name in ("one", "other")]


def drifting(seed: int) -> Iterator[NDArray[np.uint8]]:
    """Windows of frames that get darker and brighter again."""
    rng, number = np.random.default_rng(seed), 0
    while True:
        number += 1
        yield np.clip(rng.normal(128 + 90 * np.sin(number / 40), 40, (WINDOW, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


@dataclass
class Rig:
    """A state folder and what is known of it.

    Attributes:
        folder: where it and all else is. guard: whether a guard watches. told: the last state that a daemon told of, in this round.
        wrong: all that was not as it should be. starts: seconds of each start. seen: what happened how often.
    """

    folder: Path
    bundles: list[Path]
    guard: bool = False
    told: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.state = self.folder / "state"
        self.state.mkdir(parents=True, exist_ok=True)
        self.port, self.manifest = free_port(), Bundle.open(self.bundles[0], verify=False).manifest
        with Bundle.open(self.bundles[0]).stored_state() as start:
            self.start = {spec.name: np.array(start[spec.name]) for spec in self.manifest.state}
        self.config = (
            f'name = "killed"\n[source]\ntype = "http"\n[predict]\ncompare = 0\n[adapt]\nguard = {str(self.guard).lower()}\n'
            f'[state]\nfolder = "{self.state}"\nprobation = "1s"\nboots = {BOOTS}\nbytes_per_day = "512GiB"\n{web(self.folder, self.port)}'
        )
        self.install(self.bundles[0])

    def install(self, bundle: Path, wait: bool = True) -> subprocess.Popen[bytes]:
        """As `edgeadapt install`."""
        command = [sys.executable, "-m", "edgeadapt", "install", str(bundle), "--state", str(self.state)]
        found = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if wait and found.wait():
            raise SystemExit("the bundle cannot be installed")
        return found

    def served(self) -> Served:
        """The daemon, started."""
        return Served(self.folder, self.config, {"EDGEADAPT_CACHE": str(self.folder / "cache")})

    def record(self) -> Pointer:
        """As it is on the disk."""
        return Pair(self.state).read()

    def states(self, record: Pointer) -> States:
        """Of the bundle that the record names."""
        assert record.serving is not None
        return record.states_of(record.serving)

    def slot(self, slot: str) -> Path:
        """A state's file."""
        return self.state / "slots" / compatible(self.manifest)[:16] / f"{slot}.safetensors"

    def tensors(self, saved: Saved | None, what: str) -> dict[str, NDArray[Any]]:
        """What a state holds, the bundle's own start for None; that it is whole, and of one moment, is looked at."""
        if saved is None:
            return self.start
        try:
            with opened(self.slot(saved.slot), self.manifest) as found:
                values = {name: np.array(found.tensors[name]) for name in found.tensors}
                if found.sha256 != saved.sha256 and found.generation <= saved.generation:
                    self.wrong.append(f"{what}: slot {saved.slot} holds generation {found.generation}, the record says {saved.generation}")
        except EdgeAdaptError as fault:
            self.wrong.append(f"{what}: {fault.message}")
            return {}
        if not self.guard:  # which puts parts of it back
            counts = {float(number) for name, value in values.items() for number in np.unique(value - self.start[name]) if self._counted(name)}
            if len(counts) != 1:
                self.wrong.append(f"{what}: a mixture of {sorted(counts)} steps")
        return values

    def _counted(self, name: str) -> bool:
        return name.endswith((".gamma", ".beta", ".m"))

    def hear(self, daemon: Served) -> dict[str, Any]:
        """The daemon's status, and remembers what it tells of the disk."""
        status = daemon.status()
        if status["mode"] == "serving":
            self.told = status["state"]
        return status


def expected(record: Pointer) -> tuple[str, Saved | None, int, str]:
    """What the next start takes by a record: its name, the state, the how manieth it is, and the bundle's digest. All that it names is whole."""
    assert record.serving is not None
    states = record.states_of(record.serving)
    ways: list[tuple[str, Saved | None, Installed]] = []
    if states.active is not None:
        ways.append(("newest", states.active, record.serving))
        if states.last_good not in (None, states.active):
            ways.append(("last good", states.last_good, record.serving))
    ways.append(("start", None, record.serving))
    if record.previous is not None:
        good = record.states_of(record.previous).last_good
        ways += [("previous bundle", good, record.previous)] if good is not None else []
        ways.append(("previous bundle's start", None, record.previous))
    passed = record.boots >= BOOTS and len(ways) > 1
    name, saved, bundle = ways[1 if passed else 0]
    return name, saved, 1 if passed else record.boots + 1, bundle.digest


def digest(values: dict[str, NDArray[Any]]) -> str:
    """Of all the bytes."""
    return hashlib.sha256(b"".join(name.encode() + values[name].tobytes() for name in sorted(values))).hexdigest()


def one_round(rig: Rig, number: int, moment: str, rng: random.Random) -> None:
    """Starts it, looks at what it goes on with, has it work, kills it, and looks at what it has left."""
    what, before = f"round {number}, {moment}", rig.record()
    name, saved, attempt, bundle = expected(before)
    held = rig.tensors(saved, what)
    rig.told = {}
    with rig.served() as daemon:
        if moment == "start":
            time.sleep(rng.uniform(0.0, 1.1 * (rig.starts[-1] if rig.starts else 1.0)))
            daemon.kill()
            return look(rig, what, before, moment)
        status = daemon.ready()
        rig.starts.append(time.monotonic() - daemon.begun)
        if status["mode"] != "serving" or status["bundle"]["digest"] != bundle:
            rig.wrong.append(f"{what}: it does not serve what it should: {status['mode']} {status['reason']} {status['bundle']}")
        begun = [event["text"] for event in status["events"] if event["kind"] == "start"]
        if begun != [f"with the {name}, start {attempt} in a row"]:
            rig.wrong.append(f"{what}: started {begun}, and not with the {name}, start {attempt} in a row")
        rig.seen[f"started with the {name}"] += 1
        if held and rng.random() < 0.5:
            same(rig, daemon, held, what)
        feeder = Feeder(rig.port, drifting(number), 0.005)
        rig.seen["with a guard" if rig.guard else "without a guard"] += 1
        work(rig, daemon, moment, rng)
        daemon.kill()
        feeder.stop()
    look(rig, what, before, moment)


def same(rig: Rig, daemon: Served, held: dict[str, NDArray[Any]], what: str) -> None:
    """See that what it holds is what was on the disk; as no frame has come yet, it saves what it holds."""
    told: Any = daemon.client.call("mark-good")
    now = rig.states(rig.record())
    if told["text"] != "what was learned is marked good" or now.active is None or now.active != now.last_good:
        rig.wrong.append(f"{what}: it could not be marked good: {told['text']}")
    elif digest(rig.tensors(now.active, what)) != digest(held):
        rig.wrong.append(f"{what}: what it serves is not what was on the disk")
    rig.seen["held in memory what was on the disk, to the bit"] += 1


def work(rig: Rig, daemon: Served, moment: str, rng: random.Random) -> None:
    """Has it learn, and comes back at the moment at which it is to be killed."""
    rig.hear(daemon)
    daemon.until(lambda status: status["predictions"]["count"] >= 2 * WINDOW)
    for _ in range(rng.randrange(4)):  # more to be lost
        with suppress(EdgeAdaptError):  # another bundle may be installed
            daemon.client.call(rng.choice(["mark-good", "mark-good", "rollback", "pause", "resume"]))
        rig.hear(daemon)
    with suppress(EdgeAdaptError):
        daemon.client.call("resume")
    rig.hear(daemon)
    if moment in ("mark-good", "rollback"):
        threading.Thread(target=_asking, args=(daemon, moment), daemon=True).start()
        time.sleep(rng.uniform(0.0, 0.05))
    elif moment == "install":
        begun = time.monotonic()
        installing = rig.install(rng.choice(rig.bundles), wait=False)
        while installing.poll() is None and time.monotonic() - begun < rng.uniform(0.2, 1.5):
            with suppress(EdgeAdaptError):
                daemon.client.call("mark-good")
                rig.hear(daemon)
        if rng.random() < 0.5:
            installing.kill()
        daemon.kill()
        installing.wait()
    elif moment == "write":
        threading.Thread(target=_asking, args=(daemon, "mark-good"), daemon=True).start()
        end = time.monotonic() + 2
        folders = (rig.state, rig.slot("a").parent)
        while time.monotonic() < end and not any(path.suffix == ".tmp" for folder in folders if folder.is_dir() for path in folder.iterdir()):
            time.sleep(0.0001)
        time.sleep(rng.choice((0.0, 0.0, rng.uniform(0.0, 0.004))))
    elif moment == "end":
        daemon.run.terminate()
        time.sleep(rng.uniform(0.0, 0.3))
    elif moment == "lasted":
        until = time.monotonic() + 30
        while rig.record().boots and time.monotonic() < until:
            time.sleep(0.05)
        rig.hear(daemon)
    else:
        time.sleep(rng.uniform(0.0, 1.5))
        rig.hear(daemon)


def _asking(daemon: Served, verb: str) -> None:
    with suppress(EdgeAdaptError):
        daemon.client.call(verb)


def look(rig: Rig, what: str, before: Pointer, moment: str) -> None:
    """At what is left."""
    rig.seen[f"killed: {moment}"] += 1
    record = rig.record()
    states = rig.states(record)
    for saved in (states.active, states.last_good):
        rig.tensors(saved, what)
    told = rig.told
    if record.generation < max(before.generation, told.get("generation", 0)):
        rig.wrong.append(f"{what}: the record is of generation {record.generation}, and {told or before} was told")
    elif told and record.generation == told["generation"]:
        left = [None if saved is None else saved.generation for saved in (states.active, states.last_good)]
        if left != [told["active"], told["last_good"]]:
            rig.wrong.append(f"{what}: active and last good are {left}, and {told} was told")
    elif told and moment in ("mark-good", "write", "whenever", "lasted", "end") and None not in (told["active"], told["last_good"]):
        for key, now in (("active", states.active), ("last_good", states.last_good)):  # nothing was put back since
            if now is None or (not rig.guard and now.generation < told[key]):
                rig.wrong.append(f"{what}: {key} is {now}, and {told} was told")
    if moment == "lasted" and record.boots:
        rig.wrong.append(f"{what}: it lasted, and {record.boots} starts count as failed")
    if moment == "start" and record.boots not in (before.boots, before.boots + 1, 1):
        rig.wrong.append(f"{what}: {record.boots} starts count as failed, after {before.boots} before it")


# --------------------------------------------------------------------------------------------------------------- a full disk


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of 48 MiB; None where none can be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(folder)], capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(place: Path) -> None:
    """Until there is no room."""
    with (place / "filling").open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def full_round(rig: Rig, number: int, rng: random.Random) -> None:
    """The disk fills up while it serves; it is killed, started on the full disk, and has room again."""
    what = f"full disk {number}"
    with rig.served() as daemon:
        daemon.ready()
        feeder = Feeder(rig.port, drifting(number), 0.005)
        daemon.until(lambda status: status["predictions"]["count"] >= 2 * WINDOW)
        daemon.client.call("mark-good")
        time.sleep(rng.uniform(0.0, 0.5))
        fill(rig.folder)
        answers_on(rig, daemon, what)
        before = rig.record()
        daemon.kill()
        feeder.stop()
    name, saved, _, _ = expected(before)
    rig.tensors(saved, what)
    with rig.served() as daemon:
        status = daemon.ready()
        active = status["state"]["active"]
        if status["mode"] != "serving" or active != (None if saved is None else saved.generation):
            rig.wrong.append(f"{what}: started on the full disk with {active}, and not with the {name}: {status['mode']} {status['reason']}")
        if not status["state"]["degraded"]:
            rig.wrong.append(f"{what}: started on the full disk, and does not say so")
        feeder = Feeder(rig.port, drifting(number), 0.005)
        answers_on(rig, daemon, what)
        (rig.folder / "filling").unlink()
        told: Any = daemon.client.call("mark-good")
        if told["text"] != "what was learned is marked good" or daemon.status()["state"]["degraded"]:
            rig.wrong.append(f"{what}: with room again: {told['text']} {daemon.status()['state']}")
        daemon.kill()
        feeder.stop()
    now = rig.states(rig.record())
    if now.active is None or now.active != now.last_good:
        rig.wrong.append(f"{what}: what was saved with room again is not there")
    rig.tensors(now.active, what)


def answers_on(rig: Rig, daemon: Served, what: str) -> None:
    """See that it answers, learns, and says that nothing is kept."""
    before = daemon.until(lambda status: status["predictions"]["count"] >= WINDOW and status)
    told: Any = daemon.client.call("mark-good")
    if "not on the disk" not in told["text"]:
        rig.wrong.append(f"{what}: on a full disk it says: {told['text']}")
    after = daemon.until(lambda status: status["predictions"]["count"] >= before["predictions"]["count"] + 10 * WINDOW and status)
    if "No space left" not in after["state"]["degraded"] or after["adaptation"]["steps"] <= before["adaptation"]["steps"]:
        rig.wrong.append(f"{what}: on a full disk it says {after['state']['degraded']!r} after {after['adaptation']['steps']} steps")
    rig.seen["answered and learned on a full disk, and said so"] += 1


# ---------------------------------------------------------------------------------------------------------------------- all


def killed(times: int, full: int, seed: int, folder: Path, only: str | None = None) -> dict[str, Any]:
    """Runs it; all that was seen. Every fourth kill is of a daemon with a guard, in a folder of its own."""
    made, rng, begun = bundles(folder), random.Random(seed), time.monotonic()
    rigs = [Rig(folder / "plain", made), Rig(folder / "guarded", made, guard=True)] if times else []
    for number in range(times):
        rig = rigs[number % 4 == 3]
        one_round(rig, number, only or rng.choices(list(MOMENTS), list(MOMENTS.values()))[0], rng)
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {times}", end="", file=sys.stderr)
    if full:
        with small_disk(folder / "disk") as place:
            if place is None:
                full = 0
            else:
                rigs.append(Rig(place, made))
                for number in range(full):
                    full_round(rigs[-1], number, rng)
    starts = sorted(second for rig in rigs for second in rig.starts)
    seen = sum((rig.seen for rig in rigs), Counter())
    return {
        "killed": times, "full disks": full, "seconds": round(time.monotonic() - begun, 1),
        "a start takes": round(starts[len(starts) // 2], 2) if starts else None,
        "seen": dict(sorted(seen.items())), "wrong": [each for rig in rigs for each in rig.wrong],
    }  # fmt: skip


def main() -> int:
    """The command line; 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200, metavar="N", help="kills (default: %(default)s)")
    parser.add_argument("--full", type=int, default=5, metavar="N", help="disks that fill up, as root (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(MOMENTS), help="always at this moment")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there too")
    choices = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="killed-"))
    found = killed(choices.times, choices.full, choices.seed, folder, choices.only)
    text = json.dumps(found, indent=1)
    print(text)
    if choices.json is not None:
        choices.json.write_text(text + "\n", encoding="utf-8")
    if found["wrong"]:
        print(f"what is left is in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
