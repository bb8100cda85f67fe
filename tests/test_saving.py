"""What is on the disk after `mark-good` and `rollback`, at any moment and whatever fails; and that the answer says so."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from edgeadapt.runtime.daemon.daemon import Daemon
from edgeadapt.runtime.daemon.saving import Saving
from edgeadapt.runtime.daemon.store import Limits, Store, disk
from edgeadapt.runtime.daemon.store.pointer import Pointer, States
from edgeadapt.runtime.daemon.store.record import Record
from tests.stored import Files, seed_of, snapshot
from tests.test_daemon import recording, replay, running, text, until, with_state, written

pytestmark = pytest.mark.device

STEADY = "fps = 100\nloop = true"
PUT_BACK = "it is as it started: there is no last good"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("bundle") / "toy.edgeadapt")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recording(tmp_path_factory.mktemp("frames") / "frames.npz")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return with_state(tmp_path)


def states(daemon: Daemon) -> States:
    """Of what is served, as they are on the disk."""
    assert daemon.store is not None
    record = daemon.store.read()
    assert record.serving is not None
    return record.states_of(record.serving)


def marked(daemon: Daemon, client: Any) -> States:
    """What it has learned is marked good."""
    until(lambda: client.call("status")["guard"]["windows"] >= 3)
    assert client.call("mark-good")["text"] == "what was learned is marked good"
    found = states(daemon)
    assert found.active == found.last_good is not None
    return found


def test_what_was_marked_good_is_on_the_disk_until_what_is_put_back_is(place: Path, toy: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[Pointer] = []
    write = Record.write

    def watched(record: Record, pointer: Pointer, *events: tuple[str, str]) -> None:
        records.append(pointer)
        write(record, pointer, *events)

    with running(place, text(place, toy, replay(clip, STEADY))) as (daemon, client):
        before = marked(daemon, client)
        monkeypatch.setattr(Record, "write", watched)
        assert client.call("rollback")["text"] == PUT_BACK
        after = states(daemon)
        monkeypatch.setattr(Record, "write", write)
        assert daemon.boot is not None
        assert all(record.states_of(daemon.boot.installed).active is not None for record in records)
        assert after.active is not None
        assert after.active.generation > before.active.generation  # type: ignore[union-attr]
        assert after.last_good is None, "neither does the disk go back to what was put away"


def test_without_room_for_a_state_what_was_marked_good_stays(place: Path, toy: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("edgeadapt.runtime.daemon.saving._AGAIN", 0.1)
    with running(place, text(place, toy, replay(clip, STEADY))) as (daemon, client):
        before = marked(daemon, client)
        with monkeypatch.context() as patch:
            patch.setattr("edgeadapt.bundle.tensors.write", full)
            told = client.call("rollback")["text"]
            assert told.startswith(f"{PUT_BACK}, but not on the disk: the state cannot be saved to ")
            assert told.endswith("No space left on device")
            assert states(daemon) == before
        until(lambda: states(daemon).last_good is None)
        assert states(daemon).active not in (None, before.active), "with room again"


def test_the_start_needs_no_room_for_a_state(place: Path, toy: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with running(place, text(place, toy, replay(clip, STEADY))) as (daemon, client):
        marked(daemon, client)
        monkeypatch.setattr("edgeadapt.bundle.tensors.write", full)
        assert client.call("rollback", to="start")["text"] == "it is as the bundle began"
        assert states(daemon) == States()


def test_another_process_that_keeps_the_record_is_told(place: Path, toy: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(place, text(place, toy, replay(clip, STEADY))) as (daemon, client):
        marked(daemon, client)
        monkeypatch.setattr("edgeadapt.runtime.daemon.store.folder.PATIENCE", 0.05)
        with disk.locked(place / "state", 10.0) as mine:
            assert mine
            fault = f", but not on the disk: another process is changing what {place}/state holds"
            assert client.call("mark-good")["text"] == f"what was learned is marked good{fault}"
            assert client.call("rollback")["text"] == PUT_BACK + fault


def test_a_daemon_that_ends_says_that_nothing_is_kept(place: Path, toy: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(place, text(place, toy, replay(clip, STEADY))) as (daemon, client):
        marked(daemon, client)
        assert daemon.saving is not None
        monkeypatch.setattr(daemon.saving, "turn", lambda well: None)
        daemon.saving.finish()
        assert client.call("mark-good")["text"] == "what was learned is marked good, but not on the disk: the daemon ends just now"
        assert client.call("rollback")["text"] == f"{PUT_BACK}, but not on the disk: the daemon ends just now"


def test_what_was_put_away_is_dropped_when_what_is_put_back_can_be_saved(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever save is the first that can be written, and not by one before it."""
    now, told, manifest = [1000.0], list[str](), files.manifests["a"]
    with Store.open(tmp_path / "state", Limits(spare=0), clock=lambda: now[0]) as store:
        store.install(files.paths["a"])
        installed = store.begin_boot().installed
        saving = Saving(store, snapshot(manifest, 1).at_hand, manifest, nullcontext, lambda kind, text: told.append(kind), clock=lambda: now[0])
        saving.wanted(always=True)
        assert saving.at_once() == ""
        store.mark_good()
        good = store.now.states_of(installed)
        saving._taken = snapshot(manifest, 2).at_hand
        with monkeypatch.context() as patch:
            patch.setattr("edgeadapt.bundle.tensors.write", lambda *given: os.open(tmp_path / "none", os.O_RDONLY))
            saving.wanted(always=True, alone=True)
            assert "No such file" in saving.at_once()
        assert store.now.states_of(installed) == good
        saving.wanted()
        assert saving.at_once() == ""
        assert store.now.states_of(installed).last_good is None
        assert seed_of(store.begin_boot().state, manifest) == 2
        store.mark_good()
        saving.wanted(always=True)
        assert saving.at_once() == ""
        assert store.now.states_of(installed).last_good is not None, "once"
        saving.finish()
        assert told == ["saved", "disk", "saved", "saved"]
