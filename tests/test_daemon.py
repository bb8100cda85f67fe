"""The daemon as a whole: frames in, answers out, what it does when asked, when it is ended, and when something is wrong."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from edgeadapt.bundle import Bundle, tensors
from edgeadapt.bundle.reference import Chance, Reference
from edgeadapt.devices.sources import Frame, Source
from edgeadapt.errors import BundleError, EdgeAdaptError, UsageError
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.checkpoint import compatible
from edgeadapt.runtime.daemon.asked import _looked_at
from edgeadapt.runtime.daemon.client import Client
from edgeadapt.runtime.daemon.config import load
from edgeadapt.runtime.daemon.daemon import Daemon
from edgeadapt.runtime.daemon.feed import MOST, Feed
from edgeadapt.runtime.daemon.metrics import Registry
from edgeadapt.runtime.daemon.notify import Heartbeats, Notifier
from edgeadapt.runtime.daemon.saving import Saving
from edgeadapt.runtime.daemon.store import Limits, Store
from edgeadapt.runtime.guard import Guard
from edgeadapt.runtime.lines import line
from edgeadapt.runtime.stream import Stream, decide
from tests.toybundle import CLASSES, SIDE, Toy

pytestmark = pytest.mark.device

WINDOW, COUNT = 4, 26
X = np.random.default_rng(5).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
NAMES = tuple(f"class {index}" for index in range(CLASSES))


def written(path: Path, **changes: Any) -> Path:
    toy = Toy(batches=(1, WINDOW))
    looks = Reference(WINDOW, 2.0, 1.0, {"norm": Chance(0.5, 1.0)})
    return toy.write(path, reference=looks, **changes)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("bundle") / "toy.edgeadapt")


def recording(path: Path) -> Path:
    """A file of all frames."""
    np.savez(path, x=X)
    return path


def with_state(folder: Path) -> Path:
    """A folder that a daemon may keep its state in."""
    (folder / "state").mkdir()
    return folder


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recording(tmp_path_factory.mktemp("frames") / "frames.npz")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return with_state(tmp_path)


def text(place: Path, bundle: Path | None, source: str = "", more: str = "") -> str:
    """A configuration."""
    path = f'path = "{bundle}"' if bundle is not None else ""
    return f"""
name = "toy-1"
[bundle]
{path}
[state]
folder = "{place}/state"
[control]
socket = "{place}/c.sock"
[source]
{source}
{more}
"""


def replay(frames: Path, more: str = "") -> str:
    return f'type = "replay"\npath = "{frames}"\n{more}'


def until(found: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What is found, as soon as there is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := found():
                return value
        except EdgeAdaptError:
            pass
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


@contextmanager
def running(place: Path, config: str, notifier: Notifier | None = None) -> Iterator[tuple[Daemon, Client]]:
    """A daemon in a thread of this process, once it serves."""
    (place / "e.toml").write_text(config)
    daemon = Daemon(load(place / "e.toml", environment={}).config, notifier=notifier)
    thread = threading.Thread(target=daemon.run)
    thread.start()
    client = Client(place / "c.sock")
    try:
        until(lambda: client.call("status")["mode"] != "starting")
        yield daemon, client
    finally:
        daemon.stop()
        thread.join(120)
        assert not thread.is_alive()


# ---------------------------------------------------------------------------------------------------------- answering


def test_steps_that_follow_each_other_so_that_no_look_falls_between_them_are_no_hung_one(place: Path) -> None:
    (place / "e.toml").write_text(text(place, None))
    daemon = Daemon(load(place / "e.toml", environment={}).config)
    now = [0.0]
    hearts = daemon._hearts = Heartbeats({"predict": 30.0, "adapt": 120.0, "store": 120.0}, clock=lambda: now[0])
    stream = SimpleNamespace(busy=True, windows=0)
    daemon.model, daemon.reports = SimpleNamespace(stream=stream, guard=None), SimpleNamespace(turn=lambda _: None)  # type: ignore[assignment]

    def look() -> None:
        daemon._turned = 0.0
        daemon._turn()

    for window in range(100):
        stream.windows, now[0] = window, 50.0 * window
        look()
        assert hearts.late() == {}
    now[0] += 121
    look()
    assert hearts.late().keys() == {"adapt"}
    stream.busy = False
    look()
    assert hearts.late() == {}


@pytest.mark.parametrize("by_label", [False, True])
def test_the_manager_waits_longer_while_a_step_goes_on(place: Path, frames: Path, by_label: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than its watchdog would: without a cap the loop cannot ping meanwhile, whoever has the step taken."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(place / "n"))
    manager.settimeout(0.1)
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.setattr("edgeadapt.runtime.daemon.notify._SHORT", 1e9)  # as if steps took longer
    said: list[str] = []
    over = threading.Event()

    def listen() -> None:
        while not over.is_set():
            with suppress(TimeoutError):
                message = manager.recv(4096).decode()
                said.extend([message] if "WATCHDOG_USEC" in message else [])

    begun, go = threading.Event(), threading.Event()

    def slow(call: Callable[..., Any]) -> Callable[..., Any]:
        def later(*given: Any, **named: Any) -> Any:
            begun.set()
            assert go.wait(120)
            return call(*given, **named)

        return later

    notifier = Notifier({"NOTIFY_SOCKET": str(place / "n")})
    listener = threading.Thread(target=listen)
    listener.start()
    with running(place, text(place, written(place / "toy.edgeadapt"), replay(frames, "fps = 50\nloop = true")), notifier) as (_, client):
        until(lambda: client.call("status")["predictions"]["count"] > WINDOW)
        monkeypatch.setattr(Guard, *(("learn", slow(Guard.learn)) if by_label else ("_served", slow(Guard._served))))
        heard = [client.call("label", label=1) for _ in range((WINDOW - 1) * by_label)]
        asks = [threading.Thread(target=lambda: client.call("label", label=1)) for _ in range(by_label)]
        try:
            for ask in asks:
                ask.start()
            assert begun.wait(30), heard
            until(lambda: said[-1] == "WATCHDOG_USEC=120000000", 30)
            before = len(said)
        finally:
            go.set()
        assert until(lambda: said[before:], 60)[0] == "WATCHDOG=1\nWATCHDOG_USEC=2000000"
        for ask in asks:
            ask.join(60)
    over.set()
    listener.join(60)
    manager.close()


def test_frames_are_answered_as_by_the_lines_of_the_readme(place: Path, bundle: Path, frames: Path) -> None:
    """The same adapter, guard and stream, and the same answers, to the bit."""
    with running(place, text(place, bundle, replay(frames, "fps = 200"))) as (daemon, client):
        told = until(lambda: client.call("status")["predictions"]["count"] == COUNT and list(daemon.seen._latest.values()))
        assert daemon.model is not None
        state = daemon.model.adapter.state
    with Adapter.open(bundle) as adapter:
        stream = Stream(adapter, single=True, guard=Guard(adapter))
        wanted = [one for (one,) in stream.run(Frame(index, pixels) for index, pixels in enumerate(X))]
        lines = [line(one, decide(one.logits), adapter.manifest.task) for one in wanted if one.logits is not None]
        assert all((value == adapter.state[name]).all() for name, value in state.items())
    timeless = [{key: value for key, value in found.line.items() if key not in ("ms", "without")} for found in told]
    assert timeless == [{key: value for key, value in found.items() if key != "ms"} for found in lines]
    assert all(np.array_equal(found.pixels, X[found.index]) for found in told)


def test_the_status_says_how_it_is(place: Path, bundle: Path, frames: Path) -> None:
    with running(place, text(place, bundle, replay(frames), "[predict]\ncompare = 0.01")) as (_, client):
        status = until(lambda: (now := client.call("status"))["predictions"]["count"] == COUNT and now)
        assert (status["version"], status["name"], status["mode"], status["reason"]) == (1, "toy-1", "serving", "")
        assert status["bundle"]["name"] == "toy.edgeadapt"
        assert len(status["bundle"]["digest"]) == 64
        assert status["guard"]["windows"] == COUNT // WINDOW
        assert status["adaptation"]["windows"] == COUNT // WINDOW
        assert status["source"]["complaint"] == "it has ended"
        assert status["source"]["last_frame_s"] < 120
        assert status["queue"] == {"length": 0, "limit": 64, "dropped": 0}
        assert 0 < status["predictions"]["latency_ms"]["p50"] <= status["predictions"]["latency_ms"]["p99"]
        assert status["compare"]["frames"] >= 1
        assert 0 <= status["compare"]["agreement"] <= 1
        assert status["memory"]["resident"] > 2**20
        assert status["state"]["degraded"] == ""
        assert status["events"]
        json.dumps(status)


def test_bad_frames_are_counted_and_the_others_answered(place: Path, bundle: Path) -> None:
    x = np.random.default_rng(0).standard_normal((9, 3, SIDE, SIDE), dtype=np.float32)
    x[[2, 5]] = np.nan
    np.savez(place / "holes.npz", x=x)
    with running(place, text(place, bundle, replay(place / "holes.npz"))) as (_, client):
        found = until(lambda: (now := client.call("status")["predictions"])["count"] == 7 and now)
        assert found["bad"] == 2


def test_a_cap_has_steps_taken_beside_the_answers(place: Path, bundle: Path, frames: Path) -> None:
    with running(place, text(place, bundle, replay(frames, "fps = 100\nloop = true"), '[predict]\ncap = "1s"')) as (daemon, client):
        status = until(lambda: (now := client.call("status"))["guard"]["windows"] >= 3 and now)
        assert status["predictions"]["count"] >= 3 * WINDOW
        assert daemon.model is not None
        assert daemon.model.adapter.answering


# --------------------------------------------------------------------------------------------------------------- verbs


def test_what_it_is_told_by_hand(place: Path, bundle: Path, frames: Path) -> None:
    with running(place, text(place, bundle, replay(frames, "fps = 100\nloop = true"))) as (_, client):
        until(lambda: client.call("status")["guard"]["windows"] >= 3)
        assert client.call("pause", reason="a visit") == {"text": "adaptation is paused"}
        status = client.call("status")
        assert status["adaptation"]["paused"]
        assert status["guard"]["state"] == "paused"
        assert status["events"][-1]["text"] == "adaptation is paused: a visit"
        assert client.call("rollback")["text"] == "it is as it started: there is no last good"
        assert "learned from" not in "".join(client.call("label", label=1)["text"] for _ in range(9)), "while it is paused"
        assert client.call("status")["guard"]["state"] == "paused"
        assert client.call("resume") == {"text": "adaptation goes on"}
        assert not client.call("status")["adaptation"]["paused"]
        assert client.call("mark-good")["text"] == "what was learned is marked good"
        state = client.call("status")["state"]
        assert state["active"] == state["last_good"] is not None
        assert not state["on_probation"]
        assert client.call("rollback", to="start")["text"] == "it is as the bundle began"
        assert client.call("status")["guard"]["state"] in ("warm-up", "observing")


def test_what_was_marked_good_is_what_a_roll_back_puts_back(place: Path, bundle: Path, frames: Path) -> None:
    with running(place, text(place, bundle, replay(frames))) as (daemon, client):
        until(lambda: client.call("status")["predictions"]["count"] == COUNT)
        assert daemon.model is not None
        begun = daemon.model.adapter.state
        assert "learned from" in [client.call("label", label=1) for _ in range(WINDOW)][-1]["text"]
        client.call("mark-good")
        marked = daemon.model.adapter.state
        for _ in range(2):
            assert client.call("rollback")["text"] == "what was marked good is put back"
        found = daemon.model.adapter.state
        learned = [name for name in begun if name.startswith(("norm.gamma", "norm.beta")) and not (begun[name] == marked[name]).all()]
        assert learned
        assert all((found[name] == marked[name]).all() for name in learned)
        assert client.call("rollback", to="start")["text"] == "it is as the bundle began"


def test_labels_are_counted_and_learned_from(place: Path, frames: Path) -> None:
    manifest = Toy(batches=(1, WINDOW)).manifest()
    path = written(place / "named.edgeadapt", task=replace(manifest.task, names=NAMES))
    with running(place, text(place, path, replay(frames))) as (daemon, client):
        until(lambda: client.call("status")["predictions"]["count"] == COUNT)
        assert daemon.model is not None
        right = daemon.seen.frame(3)
        assert right is not None
        known = str(right.line["label"])
        assert client.call("label", frame=3, label=known)["right"]
        with pytest.raises(UsageError, match="'class 99' is no class of this model"):
            client.call("label", frame=3, label="class 99")
        with pytest.raises(UsageError, match="frame 4000 is not among the latest ones"):
            client.call("label", frame=4000, label=1)
        steps, texts = daemon.model.adapter.stats["steps"], []
        least = min(daemon.model.adapter.batches["learn"])
        for index in range(least * 2):
            texts.append(client.call("label", frame=index, label=NAMES[2])["text"])
        assert daemon.model.adapter.stats["steps"] > steps
        assert any("learned from" in told for told in texts)
        assert (daemon.seen.labelled, daemon.seen.right >= 1) == (1 + 2 * least, True)


@pytest.mark.parametrize("guarded", [True, False])
def test_no_answer_waits_for_a_slow_disk(place: Path, frames: Path, guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget too: neither for what is written and synced of the state nor for the metrics."""
    slow, blocked = threading.Event(), {"write": threading.Event(), "sync": threading.Event(), "metrics": threading.Event()}
    write, sync, metrics = tensors.write, os.fsync, Registry.write_textfile

    def held(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def late(*given: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                blocked[what].set()
                assert slow.wait(120)
            return call(*given)

        return late

    config = text(place, written(place / "toy.edgeadapt"), replay(frames, "fps = 200\nloop = true"))
    config += f"""
[adapt]
guard = {str(guarded).lower()}
[memory]
budget = "4GiB"
[predict]
compare = "10ms"
[metrics]
textfile = "{place}/e.prom"
"""
    monkeypatch.setattr("edgeadapt.runtime.daemon.reports._WRITE", 0.0)
    with running(place, config) as (daemon, client):
        assert daemon.saving is not None
        assert daemon.model is not None
        until(lambda: client.call("status")["predictions"]["count"] > WINDOW)
        monkeypatch.setattr("edgeadapt.bundle.tensors.write", held("write", write))
        monkeypatch.setattr(Registry, "write_textfile", held("metrics", metrics))
        try:
            daemon.wants_save(always=True)
            assert blocked["write"].wait(60)
            assert blocked["metrics"].wait(60)
            before = client.call("status")
            until(lambda: client.call("status")["adaptation"]["windows"] > before["adaptation"]["windows"] + 3, 60)
            until(lambda: client.call("status")["compare"]["frames"] > before["compare"]["frames"] + 3, 60)
            assert daemon.saving.saved is None
            monkeypatch.setattr("edgeadapt.bundle.tensors.write", write)
        finally:
            slow.set()
        assert until(lambda: daemon.saving is not None and daemon.saving.saved, 60)
        slow.clear()
        monkeypatch.setattr(os, "fsync", held("sync", sync))
        try:
            before = client.call("status")
            daemon.wants_save(always=True)
            assert blocked["sync"].wait(60)
            until(lambda: client.call("status")["adaptation"]["windows"] > before["adaptation"]["windows"] + 3, 60)
        finally:
            slow.set()


def test_what_is_written_apart_is_what_was_there_when_it_was_copied(tmp_path: Path) -> None:
    bundle = written(tmp_path / "toy.edgeadapt")
    with Adapter.open(bundle, "4GiB", slack="1MiB") as adapter:
        guard = Guard(adapter)
        with guard.taken() as now:
            assert any(np.shares_memory(array, adapter._state.buffer) for array in now.tensors.values()), "without, no copy is made"
        before = adapter.state
        with guard.taken(apart=True) as now:
            thread = threading.Thread(target=lambda: [guard(x) for x in np.random.default_rng(3).random((4, WINDOW, 3, SIDE, SIDE), np.float32)])
            thread.start()
            thread.join(60)
            assert not thread.is_alive()
            assert all(np.array_equal(now.tensors[name], before[name]) for name in before)
            assert any(not np.array_equal(adapter.state[name], before[name]) for name in before)


def test_frames_and_events_are_told(place: Path, bundle: Path, frames: Path) -> None:
    with running(place, text(place, bundle, replay(frames, "fps = 100\nloop = true"))) as (_, client):
        until(lambda: client.call("status")["predictions"]["count"])
        found = list(client.stream("tail", predictions=True, events=False, count=3))
        assert [event["kind"] for event in found] == ["prediction"] * 3
        assert set(found[0]["facts"]) >= {"index", "id", "label", "confidence", "entropy", "ms"}
        frame = client.call("frame", frame=found[0]["facts"]["id"])
        pixels = np.frombuffer(base64.b64decode(frame["pixels"]), np.uint8).reshape(frame["shape"])
        assert np.array_equal(pixels, X[found[0]["facts"]["id"]])
        waiting = client.stream("tail", predictions=False, count=1)
        thread = threading.Timer(0.2, lambda: Client(place / "c.sock").call("pause"))
        thread.start()
        assert next(iter(waiting))["kind"] in ("guard", "paused")
        thread.join()


def test_who_tails_events_and_goes_is_noticed_while_nothing_but_predictions_happens(place: Path, bundle: Path, frames: Path) -> None:
    with running(place, text(place, bundle, replay(frames, "fps = 100\nloop = true"), "[adapt]\nenabled = false")) as (daemon, client):
        until(lambda: client.call("status")["predictions"]["count"])
        assert not daemon.events.wanted("prediction")
        with socket.socket(socket.AF_UNIX) as wire:
            wire.connect(str(place / "c.sock"))
            wire.sendall(b'{"id": 1, "method": "tail", "params": {"predictions": false}}\n')
            until(lambda: daemon.events.wanted("pause"))
            assert not daemon.events.wanted("prediction")
        until(lambda: not daemon.events.wanted("pause"), 20.0)


def test_a_server_that_cannot_listen_is_told_and_tried_again(place: Path, bundle: Path, frames: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeadapt.runtime.daemon.reports._AGAIN", 0.1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = text(place, bundle, replay(frames, "fps = 100\nloop = true"), f"[http]\nenabled = true\nport = {port}")
        with running(place, config) as (_, client):
            complaint = client.call("status")["interfaces"]["http"]
            assert f"cannot listen at 127.0.0.1, port {port}" in complaint
            time.sleep(0.5)
            told = [event["text"] for event in client.call("status")["events"] if event["kind"] == "http"]
            assert told == [complaint], "once, however often it is tried"
            taken.close()
            until(lambda: not client.call("status")["interfaces"]["http"])
            with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=30) as reply:
                assert reply.status == 200


def test_a_name_that_is_not_known_yet_holds_nothing_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "e.toml").write_text(text(place, None, more='[http]\nenabled = true\nhost = "camera.lan"'))
    found = Daemon(load(place / "e.toml", environment={}).config).reports
    go, asked = threading.Event(), []

    def slow(*given: Any, **named: Any) -> list[Any]:
        asked.append(given[0])
        assert go.wait(60)
        if len(asked) == 1:
            raise socket.gaierror("Name or service not known")
        return []

    monkeypatch.setattr("socket.getaddrinfo", slow)
    found._missing = {"http": lambda: None}
    assert not found._address_known()
    assert not found._address_known()
    assert asked == ["camera.lan"], "one asks, however often it is looked"
    go.set()
    until(lambda: len(asked) == 2 or found._address_known(), 60.0)
    until(found._address_known, 60.0)
    assert len(asked) == 2


def test_large_frames_of_floats_are_shown_as_pictures_or_in_part() -> None:
    small, window = np.zeros((3, 32, 32), np.float32), np.arange(6 * 10_000, dtype=np.float32).reshape(6, 10_000)
    assert _looked_at(small)[0] is small
    picture = np.zeros((3, 200, 300), np.float32)
    picture[0], picture[1, 0, 0], picture[2, 0, 0] = -2.0, 2.0, np.nan
    shown, every = _looked_at(picture)
    assert (shown.shape, shown.dtype, every) == ((200, 300, 3), np.uint8, 1)
    assert shown[0, 0].tolist() == [0, 255, 127]
    shown, every = _looked_at(window)
    assert np.array_equal(shown, window[:, ::every])
    assert shown.size <= 2**14


# ---------------------------------------------------------------------------------------------------------- its sources


class Given(list, Source):  # type: ignore[type-arg, misc]
    """A source of these frames."""

    name = "given"

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(("live", "keeps"), [(True, False), (False, False), (True, True)])
def test_a_live_source_gives_way_and_another_waits(live: bool, keeps: bool) -> None:
    source = Given(Frame(index, X[0]) for index in range(100))
    source.live, source.keeps = live, keeps
    live = live and not keeps
    feed = Feed(source, 5)  # type: ignore[arg-type]
    feed.start()
    if live:
        until(lambda: feed.taken == 100, 30)
    found = []
    while (frame := feed.take(5.0)) is not None:
        found.append(frame.id)
    assert found == (list(range(95, 100)) if live else list(range(100)))
    assert feed.dropped == (95 if live else 0)
    assert feed.ended
    feed.close()
    assert source.closed


def test_frames_that_wait_take_no_more_than_that_many_bytes() -> None:
    large = np.zeros((1200, 1200, 3), np.uint8)
    source = Given(Frame(index, large) for index in range(10))
    source.live = True
    feed = Feed(source, 64)  # type: ignore[arg-type]
    feed.start()
    until(lambda: feed.taken == 10, 30)
    assert len(feed) == MOST // large.nbytes == 1
    assert feed.dropped == 9
    frame = feed.take(1.0)
    assert frame is not None
    assert frame.id == 9
    feed.close()


def test_a_defect_of_a_source_does_not_end_the_daemon() -> None:
    class Broken(Given):
        def __iter__(self) -> Iterator[Frame]:
            yield Frame(0, X[0])
            raise RuntimeError("a bug")

    feed = Feed(Broken(), 5)  # type: ignore[arg-type]
    feed.start()
    assert feed.take(5.0) is not None
    assert feed.take(5.0) is None
    assert feed.ended
    assert "RuntimeError('a bug')" in feed.fault


def test_the_queue_is_as_long_as_the_source_lets_it(place: Path, bundle: Path, frames: Path) -> None:
    """Files wait in their folder, and one alone is taken out of it."""
    (place / "in").mkdir()
    for source, limit in ((f'type = "folder"\npath = "{place}/in"', 1), (replay(frames, "loop = true"), 7)):
        with running(place, text(place, bundle, source, "[predict]\nqueue = 7")) as (_, client):
            assert until(lambda: (now := client.call("status"))["source"]["live"] and now)["queue"]["limit"] == limit


def test_a_device_that_comes_later_is_waited_for(place: Path, bundle: Path) -> None:
    folder = place / "stick"
    with running(place, text(place, bundle, f'type = "folder"\npath = "{folder}"\nexisting = true\npoll = 0.02')) as (_, client):
        status = until(lambda: (now := client.call("status"))["source"]["complaint"] and now)
        assert status["mode"] == "serving"
        assert not status["source"]["live"]
        folder.mkdir()
        np.save(folder / ".a", X[0])
        os.rename(folder / ".a.npy", folder / "a.npy")
        status = until(lambda: (now := client.call("status"))["predictions"]["count"] == 1 and now)
        assert status["source"]["complaint"] == ""
        assert status["source"]["counts"]["breaks"] >= 1


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_without_a_bundle_it_can_be_asked_what_is_wrong(place: Path) -> None:
    with running(place, text(place, None)) as (_, client):
        status = client.call("status")
        assert status["mode"] == "safe"
        assert status["bundle"] is None
        assert "bundle" in status["reason"]
        with pytest.raises(UsageError, match="there is no model"):
            client.call("pause")


def test_a_damaged_bundle_is_told(place: Path, bundle: Path) -> None:
    path = place / "bad.edgeadapt"
    path.write_bytes(bundle.read_bytes()[:-100])
    with running(place, text(place, path)) as (_, client):
        status = client.call("status")
        assert (status["mode"], status["bundle"]) == ("safe", None)
        assert "bad.edgeadapt" in status["reason"]


def test_where_no_guard_can_watch_it_only_predicts(place: Path, frames: Path) -> None:
    path = Toy(batches=(1, WINDOW)).write(place / "plain.edgeadapt")
    with running(place, text(place, path, replay(frames))) as (_, client):
        status = until(lambda: (now := client.call("status"))["predictions"]["count"] == COUNT and now)
        assert status["mode"] == "safe"
        assert "no guard can watch over adaptation" in status["reason"]
        assert status["guard"] is None
        assert not status["adaptation"]["enabled"]
        with pytest.raises(UsageError, match="the model only predicts"):
            client.call("rollback")
    with running(place, text(place, path, replay(frames), "[adapt]\nguard = false")) as (daemon, client):
        status = until(lambda: (now := client.call("status"))["predictions"]["count"] == COUNT and now)
        assert status["mode"] == "serving"
        assert status["adaptation"]["steps"] == COUNT // WINDOW
        client.call("pause")
        assert daemon.model is not None
        assert daemon.model.stream.resting


def test_a_scalar_that_there_is_not_has_it_predict_only(place: Path, bundle: Path, frames: Path) -> None:
    with running(place, text(place, bundle, replay(frames), "[adapt.set]\nspeed = 3.0")) as (_, client):
        status = until(lambda: (now := client.call("status"))["predictions"]["count"] == COUNT and now)
        assert status["mode"] == "safe"
        assert "speed" in status["reason"]


def test_where_no_frame_can_be_answered_it_gives_up_and_that_start_has_failed(place: Path, bundle: Path, frames: Path) -> None:
    (place / "e.toml").write_text(text(place, bundle, replay(frames)))
    daemon = Daemon(load(place / "e.toml", environment={}).config)
    load_model = daemon._load

    def broken(*given: Any, **named: Any) -> None:
        raise BundleError("no graph runs", "export it again")

    def loaded(stack: Any) -> None:
        load_model(stack)
        assert daemon.model is not None
        daemon.model.adapter.predict = broken  # type: ignore[assignment, method-assign]

    daemon._load = loaded  # type: ignore[method-assign]
    with pytest.raises(BundleError, match="no graph runs"):
        daemon.run()
    assert daemon.seen.bad >= 10, "frames that were taken are counted"
    with Store.open(place / "state") as store:
        assert store.read().boots == 1


def test_only_predicting_proves_itself_too(place: Path, bundle: Path, frames: Path) -> None:
    config = text(place, bundle, replay(frames, "fps = 50\nloop = true"), "[adapt]\nenabled = false")
    with running(place, config.replace("[state]", '[state]\nprobation = "1s"')) as (daemon, client):
        assert client.call("status")["mode"] == "serving"
        until(lambda: daemon.store is not None and daemon.store.now.boots == 0)


def test_what_is_saved_again_and_again_is_proven_in_between(place: Path, bundle: Path) -> None:
    """Else a stream that always teaches something would never have a last good."""
    now, told, manifest = [1000.0], list[str](), Bundle.open(bundle).manifest
    with Adapter.open(bundle) as adapter, Store.open(place / "state", Limits(probation=10.0), clock=lambda: now[0]) as store:
        boot = store.begin_boot(bundle)
        saving = Saving(store, adapter.taken, manifest, nullcontext, lambda kind, text: told.append(kind), clock=lambda: now[0])

        def turn() -> None:
            saving.turn(True)
            if saving._going is not None:
                saving._going.result()

        for _ in range(50):
            saving.wanted()
            turn()
            now[0] += 1.0
        assert told.count("proven") >= 3
        assert told.count("saved") >= 3
        assert store.now.states_of(boot.installed).last_good is not None
        saving.wanted(always=True)
        now[0] += 10.0
        turn()
        assert told[-1] == "saved", "what was rolled back is not proven"
        saving.finish()


def test_a_bundle_that_nobody_signed_is_not_served_whatever_is_wrong(place: Path, bundle: Path) -> None:
    (place / "key.pub").write_text("no key")
    for folder in ("state", "nowhere/at/all"):
        config = text(place, bundle).replace("[bundle]", f'[bundle]\nrequire_signature = true\nkeys = ["{place}/key.pub"]')
        with running(place, config.replace(f"{place}/state", f"{place}/{folder}")) as (_, client):
            status = client.call("status")
            assert status["mode"] == "safe"
            assert status["bundle"] is None


def test_another_daemon_of_the_same_folder_is_refused(place: Path, bundle: Path) -> None:
    (place / "e.toml").write_text(text(place, bundle))
    daemon = Daemon(load(place / "e.toml", environment={}).config)
    with Store.open(place / "state"), pytest.raises(EdgeAdaptError, match="another daemon serves"):
        daemon.run()


def test_no_frame_is_on_the_disk_unless_asked_for_and_then_no_more_than_that(place: Path, bundle: Path, frames: Path) -> None:
    with running(place, text(place, bundle, replay(frames, "fps = 200"))) as (_, client):
        until(lambda: client.call("status")["predictions"]["count"] == COUNT)
    assert not (place / "state" / "frames").exists()
    (place / "state" / "frames").mkdir()
    (place / "state" / "frames" / "frame-000017.npz").write_bytes(b"of when more were kept")
    with running(place, text(place, bundle, replay(frames, "fps = 200"), "[frames]\nkeep = 5")) as (_, client):
        until(lambda: client.call("status")["predictions"]["count"] == COUNT)
    kept = sorted((place / "state" / "frames").iterdir())
    assert 1 <= len(kept) <= 5
    for path in kept:
        with np.load(path, allow_pickle=False) as found:
            assert (found["x"] == X).all((1, 2, 3)).any()


# ------------------------------------------------------------------------------------------------ its process and its end


class Process:
    """`edgeadapt serve` as a process of its own."""

    def __init__(self, place: Path, config: str) -> None:
        (place / "e.toml").write_text(config)
        manager = self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = place / f"n{len(list(place.iterdir()))}"
        manager.bind(str(address))
        manager.settimeout(120)
        self.client = Client(place / "c.sock")
        environment = {**os.environ, "NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "2000000"}
        command = [sys.executable, "-m", "edgeadapt", "serve", "--config", str(place / "e.toml")]
        self.run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.run.kill()
        self.run.communicate()
        self.manager.close()

    def told(self, wanted: str) -> list[str]:
        """Messages to the service manager, up to the first that says this."""
        found = []
        while not any(wanted in message for message in found):
            found.append(self.manager.recv(4096).decode())
        return found

    def end(self, number: int = signal.SIGTERM) -> str:
        self.run.send_signal(number)
        _, said = self.run.communicate(timeout=120)
        return said


def saved(place: Path, bundle: Path) -> list[Path]:
    kind = compatible(Bundle.open(bundle).manifest)[:16]
    return sorted((place / "state" / "slots" / kind).glob("*.safetensors"))


def test_it_tells_its_manager_saves_at_its_end_and_goes_on_from_there(place: Path, bundle: Path, frames: Path) -> None:
    config = text(place, bundle, replay(frames, "fps = 100\nloop = true"), "[adapt]\nguard = false")
    with Process(place, config) as daemon:
        daemon.told("READY=1")
        daemon.told("WATCHDOG=1")
        until(lambda: daemon.client.call("status")["adaptation"]["steps"] >= 3)
        said = daemon.end()
        assert "STOPPING=1" in "\n".join(daemon.told("STOPPING=1"))
        assert daemon.run.returncode == 0, said
    assert len(saved(place, bundle)) == 1, said
    with Process(place, config) as daemon:
        daemon.told("READY=1")
        status = daemon.client.call("status")
        assert status["adaptation"]["steps"] >= 3, "counters go on"
        assert any("with the active state" in event["text"] or "start 1 in a row" in event["text"] for event in status["events"])
        daemon.end()


def test_a_hangup_has_it_begin_anew_with_the_configuration_as_it_is_then(place: Path, bundle: Path, frames: Path) -> None:
    with Process(place, text(place, bundle, replay(frames, "fps = 100\nloop = true"))) as daemon:
        daemon.told("READY=1")
        assert daemon.client.call("status")["name"] == "toy-1"
        config = (place / "e.toml").read_text()
        (place / "e.toml").write_text(config.replace("toy-1", "toy-2"))
        daemon.run.send_signal(signal.SIGHUP)
        assert any("WATCHDOG_USEC=900000000" in message for message in daemon.told("RELOADING=1")), "it goes on while there is nobody to ping"
        daemon.told("READY=1")
        assert daemon.client.call("status")["name"] == "toy-2"
        (place / "e.toml").write_text(config.replace("fps = 100", "fps = -1"))
        daemon.client.call("reload")
        daemon.told("READY=1")
        status = daemon.client.call("status")
        assert status["mode"] == "safe"
        assert "source.fps" in status["reason"]
        assert status["name"] == "toy-1", "what of the configuration is right is used"
        assert status["bundle"] is not None
        assert not status["adaptation"]["enabled"]
        daemon.end()


def test_a_process_that_is_killed_goes_on_from_what_was_saved(place: Path, bundle: Path, frames: Path) -> None:
    config = text(place, bundle, replay(frames, "fps = 100\nloop = true"))
    with Process(place, config) as daemon:
        daemon.told("READY=1")
        until(lambda: daemon.client.call("status")["guard"]["windows"] >= 3)
        daemon.client.call("mark-good")
        generation = daemon.client.call("status")["state"]["last_good"]
        daemon.end(signal.SIGKILL)
    with Process(place, config) as daemon:
        daemon.told("READY=1")
        state = daemon.client.call("status")["state"]
        assert state["last_good"] == state["active"] == generation
        daemon.end()
