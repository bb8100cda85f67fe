"""Kills a process that keeps state, at random moments, and looks each time at what is left: what was last committed, or what was being committed?

By default the process gets SIGKILL. With --image it writes to an ext4 file system of its own, in a file, and that is shut down without flushing
anything, as a power cut does it; this needs root and a loop device. It also tells what each thing done costs in bytes, as the block device counts.

A round is: start, then commit, settle, roll back and install as fast as it goes, until the cut; then a look by another process.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from edgeadapt.bundle import Bundle, Manifest, WeightsFile, write_bundle  # noqa: E402
from edgeadapt.runtime.checkpoint import Snapshot, read  # noqa: E402
from edgeadapt.runtime.daemon.store import Limits, Store  # noqa: E402

LIMITS = Limits(probation=0.0, boots=10**6, history=20, spare=0)
SHUTDOWN, NO_FLUSH = 0x8004587D, 2  # FS_IOC_SHUTDOWN, FS_SHUTDOWN_FLAGS_NOLOGFLUSH


def other_bundle(path: Path, folder: Path) -> Path:
    """The same model as by another producer, hence another bundle that takes the same states."""
    bundle = Bundle.open(path)
    with zipfile.ZipFile(path) as archive:
        weights, graphs = WeightsFile(), {name: archive.read(spec.path) for name, spec in bundle.manifest.graphs.items()}
        weights.add(np.frombuffer(archive.read("weights.bin"), np.uint8))
    manifest = dataclasses.replace(bundle.manifest, producer="power cut", members={})
    write_bundle(folder / "other.edgeadapt", manifest, weights, graphs, bundle.initial_state())
    return folder / "other.edgeadapt"


def snapshot(manifest: Manifest, seed: int) -> Snapshot:
    """A state that all of it is told by its seed."""
    rng = np.random.default_rng(seed)
    tensors = {spec.name: rng.integers(-9, 9, spec.shape).astype(spec.dtype) for spec in manifest.state}
    return Snapshot(tensors, {"frames": seed}, {})


def work(folder: Path, bundles: list[Path], seed: int, out: int) -> None:
    """Does things until it is killed, and tells before each what is to come of it, and after it that it has returned."""

    def tell(*what: Any) -> None:
        os.write(out, (json.dumps(what) + "\n").encode())

    rng, made = random.Random(seed), 1000 * seed
    manifest = Bundle.open(bundles[0], verify=False).manifest
    with Store.open(folder, LIMITS) as store:
        tell("boot", None)
        store.begin_boot()
        seeds = {} if store.now.serving is None else {saved: saved_seed(store, saved.slot, manifest) for saved in slots_of(store)}
        tell("done")
        while True:
            states = store.now.states_of(store.now.active)  # type: ignore[arg-type]
            verb = rng.choice(["commit"] * 6 + ["settle"] * 3 + ["roll back", "install"])
            made += 1
            if verb == "commit":
                tell(verb, made)
                store.commit(snapshot(manifest, made).at_hand, manifest, True)
                seeds[store.now.states_of(store.now.active).active] = made  # type: ignore[arg-type]
            elif verb == "settle":
                tell(verb, seeds.get(states.active))
                store.settled()
            elif verb == "roll back":
                tell(verb, seeds.get(states.last_good) if states.active != states.last_good else None)
                store.roll_back()
            else:
                tell(verb, seeds.get(states.active))
                store.install(bundles[rng.randrange(2)])
                store.begin_boot()
            tell("done")


def slots_of(store: Store) -> list[Any]:
    """The states that are named."""
    states = store.now.states_of(store.now.active)  # type: ignore[arg-type]
    return [saved for saved in (states.active, states.last_good) if saved is not None]


def saved_seed(store: Store, slot: str, manifest: Manifest) -> int | None:
    """The seed of what is in a slot; a state that is not wholly of one raises."""
    (path,) = store.folder.glob(f"slots/*/{slot}.safetensors")
    found = read(path, manifest)
    seed = found.counters["frames"]
    wanted = snapshot(manifest, seed).tensors
    if any((found.tensors[name] != value).any() for name, value in wanted.items()):
        raise SystemExit(f"{path} is a mixture")
    return seed


def looked_at(folder: Path, manifest: Manifest) -> int | None:
    """What is started with now: the seed of its state."""
    with Store.open(folder, LIMITS) as store:
        boot = store.begin_boot()
        return None if boot.state is None else saved_seed(store, boot.state.stem, manifest)


def one_round(folder: Path, bundles: list[Path], seed: int, before: int | None, longest: float, cut: Any) -> tuple[list[int | None], str, int]:
    """Works, and is cut; gives what may be left: what was acknowledged last, or what was being done. And which that was, and how many were done."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        try:
            work(folder, bundles, seed, theirs)
        except BaseException as reason:  # told to nobody: its disk is gone
            if not isinstance(reason, Exception) or cut is kill:
                sys.excepthook(type(reason), reason, reason.__traceback__)
        os._exit(1)
    os.close(theirs)
    select.select([ours], [], [], 60)  # until it has begun
    time.sleep(random.Random(seed).uniform(0.0, longest))
    cut(child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    text = b""
    while piece := os.read(ours, 65536):
        text += piece
    os.close(ours)
    told = [json.loads(line) for line in text.split(b"\n")[:-1]]
    sure, may, doing, done = before, before, "nothing", 0
    for entry in told:
        if entry[0] == "done":
            sure, doing, done = may, "nothing", done + 1
        else:
            doing = entry[0]
            may = before if doing == "boot" else entry[1]
    return [sure, may], doing, done


def kill(child: int) -> None:
    """SIGKILL."""
    os.kill(child, signal.SIGKILL)


class Image:
    """An ext4 file system in a file."""

    def __init__(self, folder: Path, size: int = 64 * 2**20) -> None:
        self.file, self.place = folder / "image", folder / "mounted"
        self.place.mkdir()
        with self.file.open("wb") as file:
            file.truncate(size)
        subprocess.run(["mkfs.ext4", "-q", str(self.file)], check=True)
        self.mount()

    def mount(self) -> None:
        """After a cut this plays back its journal."""
        subprocess.run(["mount", "-o", "loop", str(self.file), str(self.place)], check=True)

    def unmount(self) -> None:
        """It may be busy for a moment."""
        for _ in range(100):
            if subprocess.run(["umount", str(self.place)], check=False, capture_output=True).returncode == 0:
                return
            time.sleep(0.05)
        raise SystemExit(f"{self.place} cannot be unmounted")

    def cut(self, child: int) -> None:
        """The power goes: what was not synced is lost."""
        handle = os.open(self.place, os.O_RDONLY)
        fcntl.ioctl(handle, SHUTDOWN, struct.pack("I", NO_FLUSH))
        os.close(handle)

    @property
    def written(self) -> int:
        """Bytes that its block device was given to write."""
        os.sync()
        device = os.stat(self.place).st_dev
        return 512 * int(Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()[6])


@contextmanager
def place_for(choices: argparse.Namespace) -> Iterator[tuple[Path, Image | None]]:
    """The state folder, and the file system that it is on."""
    with tempfile.TemporaryDirectory(dir=choices.folder) as made:
        if not choices.image:
            yield Path(made) / "state", None
            return
        image = Image(Path(made))
        try:
            yield image.place / "state", image
        finally:
            image.unmount()


def costs(folder: Path, image: Image, bundle: Path) -> dict[str, int]:
    """Bytes at the block device of each thing done, the median of nine; its journal is among them."""
    manifest = Bundle.open(bundle, verify=False).manifest
    found: dict[str, list[int]] = {"boot": [], "commit": [], "settle": [], "roll back": []}
    with Store.open(folder, LIMITS) as store:
        store.begin_boot()
        for seed in range(9):
            for name, call in (
                ("commit", lambda seed=seed: store.commit(snapshot(manifest, seed).at_hand, manifest, True)),
                ("settle", store.settled),
                ("boot", store.begin_boot),
                ("roll back", store.roll_back),
            ):
                before, ours = image.written, store.written_today
                call()
                found[name].append(image.written - before)
                found.setdefault(f"{name}, as counted", []).append(store.written_today - ours)
    return {name: sorted(values)[len(values) // 2] for name, values in found.items()}


def main() -> None:
    """Prints a summary; ends with 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, metavar="N", help="cuts (default: %(default)s)")
    parser.add_argument("--longest", type=float, default=0.3, metavar="S", help="seconds until a cut, at most (default: %(default)s)")
    parser.add_argument("--image", action="store_true", help="cut the power of an ext4 file system instead of killing; needs root")
    parser.add_argument("--bundle", type=Path, default=ROOT / "edgeadapt/demo/digits.edgeadapt", help="the bundle (default: that of the demo)")
    parser.add_argument("--folder", type=Path, help="where all is done (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there too")
    choices = parser.parse_args()
    summary: dict[str, Any] = {"rounds": choices.rounds, "cut during": Counter(), "done": 0, "kept what was being done": 0, "lost": []}
    with place_for(choices) as (folder, image), tempfile.TemporaryDirectory(dir=choices.folder) as beside:
        bundles = [choices.bundle, other_bundle(choices.bundle, Path(beside))]
        with Store.open(folder, LIMITS, serving=False) as store:
            store.install(bundles[0])
        manifest = Bundle.open(choices.bundle, verify=False).manifest
        if image is not None:
            summary["bytes"] = costs(folder, image, choices.bundle)
        last = looked_at(folder, manifest)
        for number in range(choices.rounds):
            may, doing, done = one_round(folder, bundles, 1 + number, last, choices.longest, kill if image is None else image.cut)
            if image is not None:
                image.unmount()
                image.mount()
            last = looked_at(folder, manifest)
            summary["cut during"][doing] += 1
            summary["done"] += done
            if last not in may:
                summary["lost"].append({"round": number, "during": doing, "found": last, "expected": may})
            elif may[0] != may[1] and last == may[1]:
                summary["kept what was being done"] += 1
    print(json.dumps(summary, indent=1))
    if choices.json is not None:
        choices.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(summary["lost"]))


if __name__ == "__main__":
    main()
