"""What each interface of the daemon adds to its memory: the same bundle and the same frames, with one of them on at a time.

    ./dev bench interfaces resnet20.edgeadapt --rounds 3

Each row is a process of its own, `edgeadapt serve` with a budget that is ample, looked at once it has answered so many frames. Rows take turns.
What is resident is what a budget counts; private is what nobody else on the machine shares. The last column is what the daemon takes off a budget
for it (runtime/daemon/model.py). Needs OpenCV, Pillow, paho-mqtt, cryptography and mosquitto for the rows that are about them.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import tty
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._served import ROOT, TOKEN, Served, free_port, web
from edgeadapt.bundle import Bundle, WeightsFile, write_bundle
from edgeadapt.devices.framing import encode
from edgeadapt.runtime.daemon.config import load
from edgeadapt.runtime.daemon.model import beside

KINDS = ("resident", "private", "PSS")
RATE = 40


@dataclasses.dataclass
class Place:
    """Where all is: the bundle, frames as arrays, as pictures and as a video, keys."""

    folder: Path
    bundle: Path
    frames: Any
    port: int = dataclasses.field(default_factory=free_port)

    def replay(self) -> str:
        """Frames from an array."""
        path = self.folder / "frames.npz"
        if not path.exists():
            np.savez(path, x=self.frames)
        return f'type = "replay"\npath = "{path}"\nfps = {RATE}\nloop = true'

    def pictures(self) -> str:
        """The same from image files of 640 x 480."""
        from PIL import Image

        place = self.folder / "pictures"
        if not place.exists():
            place.mkdir()
            for number, frame in enumerate(self.frames[:64]):
                Image.fromarray(frame).resize((640, 480)).save(place / f"{number:03}.jpg", quality=90)
        return f'type = "replay"\npath = "{place}"\nfps = {RATE}\nloop = true'

    def video(self) -> str:
        """The same from a video of 1280 x 720."""
        import cv2

        path = self.folder / "video.avi"
        if not path.exists():
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), RATE, (1280, 720))
            for number in range(1500):
                writer.write(cv2.resize(self.frames[number % len(self.frames)], (1280, 720)))
            writer.release()
        return f'type = "camera"\ndevice = "{path}"'

    def signed(self) -> str:
        """Keys, and the bundle signed with one."""
        if not (self.folder / "fleet.pub").exists():
            for command in (["keygen", "fleet"], ["sign", str(self.bundle), "--key", "fleet.key"]):
                whole, environment = [sys.executable, "-m", "edgeadapt", *command], {**os.environ, "PYTHONPATH": str(ROOT)}
                subprocess.run(whole, cwd=self.folder, check=True, stdout=subprocess.DEVNULL, env=environment)
        return f'require_signature = true\nkeys = ["{self.folder}/fleet.pub"]'


@dataclasses.dataclass(frozen=True)
class Row:
    """One configuration. source, bundle, more: sections of it, or what is added to them. beside: what goes on meanwhile, entered with the daemon."""

    name: str
    source: Callable[[Place], str] = Place.replay
    bundle: Callable[[Place], str] = lambda place: ""
    more: Callable[[Place], str] = lambda place: ""
    beside: tuple[Callable[[Place, Served], Any], ...] = ()


@contextmanager
def doing(turn: Callable[[], object], pause: float) -> Iterator[None]:
    """Has a thread do that again and again."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(pause):
            with suppress(Exception):  # the daemon is gone
                turn()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(10)


@contextmanager
def asked(place: Place, daemon: Served) -> Iterator[None]:
    """Somebody has `edgeadapt tail` open and asks for the status."""
    events = daemon.client.stream("tail")
    with doing(daemon.status, 1.0), doing(lambda: next(events), 0.0):
        yield


@contextmanager
def watched(place: Place, daemon: Served) -> Iterator[None]:
    """What the page does: it listens, and asks for a picture twice a second."""
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=10)
    connection.request("GET", "/events?status=1&latest=1")
    answer = connection.getresponse()

    def picture() -> None:
        asking = http.client.HTTPConnection("127.0.0.1", place.port, timeout=10)
        asking.request("GET", "/frame.png")
        asking.getresponse().read()
        asking.close()

    try:
        with doing(answer.readline, 0.0), doing(picture, 0.5):
            yield
    finally:
        connection.close()


def posting(kind: str) -> Callable[[Place, Served], Any]:
    """Somebody who posts the frames, as arrays or as pictures."""

    @contextmanager
    def posted(place: Place, daemon: Served) -> Iterator[None]:
        from PIL import Image

        connection, numbers = http.client.HTTPConnection("127.0.0.1", place.port, timeout=10), iter(range(10**9))

        def turn() -> None:
            body, frame = io.BytesIO(), place.frames[next(numbers) % len(place.frames)]
            np.save(body, frame) if kind == "npy" else Image.fromarray(frame).resize((640, 480)).save(body, "JPEG")
            connection.request("POST", "/frames", body.getvalue(), {"Authorization": f"Bearer {TOKEN}"})
            connection.getresponse().read()

        with doing(turn, 1 / RATE):
            yield
        connection.close()

    return posted


def serial(place: Place) -> str:
    """A line whose other end `sending` has."""
    return f'type = "serial"\nurl = "{place.folder}/tty"\nbaud = 4000000'


@contextmanager
def sending(place: Place, daemon: Served) -> Iterator[None]:
    """Somebody who sends the frames over the line."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    tty.setraw(ours)
    (place.folder / "tty").unlink(missing_ok=True)
    (place.folder / "tty").symlink_to(os.ttyname(theirs))
    numbers = iter(range(10**9))

    def turn() -> None:
        number = next(numbers)
        data = memoryview(encode(place.frames[number % len(place.frames)], number, boot=1))
        while data:
            data = data[os.write(ours, data) :]

    with doing(turn, 1 / RATE):
        yield
    os.close(ours)
    os.close(theirs)


def over_http(place: Place) -> str:
    """HTTP on."""
    return web(place.folder, place.port)


def rows(broker: int | None) -> list[Row]:
    """All of them; without a broker none of MQTT."""

    def mqtt(place: Place) -> str:
        return "" if broker is None else f'[mqtt]\nenabled = true\nhost = "127.0.0.1"\nport = {broker}\ndiscovery = true'

    found = [
        Row("nothing, frames from an array"),
        Row("control socket: tail, and status each second", beside=(asked,)),
        Row("frames over a serial line", serial, beside=(sending,)),
        Row("HTTP, nobody there", more=over_http),
        Row("HTTP, the page watched", more=over_http, beside=(watched,)),
        Row("HTTP, frames posted as arrays", lambda place: 'type = "http"', more=over_http, beside=(posting("npy"),)),
        Row("HTTP, frames posted as JPEG, 640 x 480", lambda place: 'type = "http"', more=over_http, beside=(posting("jpeg"),)),
        Row("pictures from files, JPEG, 640 x 480", Place.pictures),
        Row("camera: OpenCV, video of 1280 x 720", Place.video),
        Row("signatures", bundle=Place.signed),
    ]
    if broker is not None:
        found.insert(7, Row("MQTT", more=mqtt))
    everything = Row(
        "all: camera, signatures, HTTP watched, MQTT, tail",
        Place.video, Place.signed, lambda place: f"{over_http(place)}\n{mqtt(place)}", (asked, watched),
    )  # fmt: skip
    return [*found, everything]


def config(place: Place, row: Row, state: Path) -> str:
    """The text of it."""
    return (
        f'name = "interfaces"\n[bundle]\npath = "{place.bundle}"\n{row.bundle(place)}\n[memory]\nbudget = "512MiB"\n'
        f'[source]\n{row.source(place)}\n[state]\nfolder = "{state}"\n{row.more(place)}\n'
    )


def held(process: int) -> dict[str, int]:
    """Bytes of a process, by kind."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    return {"resident": sizes["Rss"], "private": sizes["Private_Clean"] + sizes["Private_Dirty"], "PSS": sizes["Pss"]}


def measured(place: Place, row: Row, frames: int) -> dict[str, int]:
    """What it holds once it has answered so many frames."""
    with tempfile.TemporaryDirectory(dir=place.folder) as state, ExitStack() as stack:
        begin = [each for each in row.beside if each is sending]
        with suppress(FileNotFoundError):
            (place.folder / "log").unlink()
        for each in begin:
            stack.enter_context(each(place, None))  # type: ignore[arg-type]
        cache = os.environ.get("EDGEADAPT_CACHE") or str(place.folder / "cache")
        daemon = stack.enter_context(Served(place.folder, config(place, row, Path(state)), {"EDGEADAPT_CACHE": cache}))
        status = daemon.ready(900)
        if status["mode"] != "serving":
            raise SystemExit(f"{row.name}: {status['reason']}")
        for each in row.beside:
            if each not in begin:
                stack.enter_context(each(place, daemon))
        try:
            daemon.until(lambda status: status["predictions"]["count"] >= frames, 120)
            return held(daemon.run.pid)
        finally:
            daemon.kill()  # before those who wait for what it says


def taken_off(place: Place, row: Row) -> int:
    """Bytes that the daemon takes off a budget for what is beside the model, but for the slack."""
    path = place.folder / "looked-at.toml"
    path.write_text(config(place, row, place.folder))
    found = load(path, environment={}).config
    return beside(found, Bundle.open(place.bundle, verify=False).manifest) - found.memory.slack


def table(place: Place, found: dict[str, list[dict[str, int]]], all_rows: list[Row]) -> list[dict[str, Any]]:
    """Medians, and what each is above the first row."""
    lines = []
    for row in all_rows:
        middle = {kind: int(statistics.median(one[kind] for one in found[row.name])) for kind in KINDS}
        lines.append({"name": row.name, **middle, "taken off": taken_off(place, row)})
    for line in lines:
        line["more"] = {kind: line[kind] - lines[0][kind] for kind in KINDS}
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle of small pictures, exported with --data")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="processes a row (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=300, metavar="N", help="frames before it is looked at (default: %(default)s)")
    parser.add_argument("--only", help="rows whose names have this in them, beside the first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    choices = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="interfaces-") as name, ExitStack() as stack:
        folder = Path(name)
        shape = Bundle.open(choices.bundle).manifest.input.shape
        frames = np.random.default_rng(0).integers(0, 256, (256, *shape[1:], shape[0]), dtype=np.uint8)
        place = Place(folder, resizing(choices.bundle, folder / choices.bundle.name), frames)
        all_rows = rows(_broker(stack, folder))
        if choices.only:
            all_rows = [row for index, row in enumerate(all_rows) if not index or choices.only in row.name]
        found: dict[str, list[dict[str, int]]] = {row.name: [] for row in all_rows}
        for _ in range(choices.rounds):
            for row in all_rows:
                found[row.name].append(measured(place, row, choices.frames))
                print(f"{row.name}: {found[row.name][-1]['resident'] / 2**20:.1f} MiB resident", file=sys.stderr, flush=True)
        lines = table(place, found, all_rows)
    print(f"{choices.bundle.name}, MiB, medians of {choices.rounds}{'':24}{'more than the first row':>54}")
    print(f"{'':50}{'resident':>10}{'private':>10}{'PSS':>8}{'resident':>12}{'private':>10}{'PSS':>8}{'off a budget':>14}")
    for line in lines:
        own = "".join(f"{line[kind] / 2**20:{width}.1f}" for kind, width in zip(KINDS, (10, 10, 8)))
        more = "".join(f"{line['more'][kind] / 2**20:{width}.1f}" for kind, width in zip(KINDS, (12, 10, 8)))
        print(f"{line['name']:<50}{own}{more}{line['taken off'] / 2**20:14.1f}")
    if choices.json is not None:
        choices.json.write_text(json.dumps({"rows": lines, "runs": found}, indent=1) + "\n", encoding="utf-8")


def resizing(bundle: Path, path: Path) -> Path:
    """A copy of a bundle that takes pictures of any size; its signature may be put beside it."""
    found = Bundle.open(bundle)
    with zipfile.ZipFile(bundle) as archive:
        weights, graphs = WeightsFile(), {name: archive.read(spec.path) for name, spec in found.manifest.graphs.items()}
        weights.add(np.frombuffer(archive.read("weights.bin"), np.uint8))
    shape = found.manifest.input.shape
    manifest = dataclasses.replace(found.manifest, input=dataclasses.replace(found.manifest.input, resize=(shape[1], shape[2])), members={})
    write_bundle(path, manifest, weights, graphs, found.initial_state())
    return path


def _broker(stack: ExitStack, folder: Path) -> int | None:
    """The port of a broker of our own; None where there is no mosquitto, or no paho."""
    from _pytest.outcomes import Failed

    try:
        from tests.broker import Broker

        broker = Broker(folder)
        broker.start()
    except (ImportError, OSError, Failed) as reason:
        print(f"without MQTT: {reason}", file=sys.stderr)
        return None
    stack.callback(broker.stop)
    return broker.port


if __name__ == "__main__":
    main()
