"""The state folder on disks that are full, broken or somebody else's, with contents that are not ours; and how much is written."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from edgeadapt.bundle import Bundle
from edgeadapt.errors import StateError
from edgeadapt.runtime.daemon.store import Limits, Store, pointer
from edgeadapt.runtime.daemon.store.history import History
from edgeadapt.runtime.daemon.store.pointer import Installed, Pointer, Saved, States, _checksum, decode, encode
from edgeadapt.runtime.daemon.store.wear import Wear
from tests.child import ROOT
from tests.powercut import failing
from tests.stored import LIMITS, Daemon, Files, begun, seed_of, snapshot
from tests.toybundle import Toy

pytestmark = pytest.mark.device

DAY = 86400.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def daemon(tmp_path: Path, files: Files) -> Iterator[Daemon]:
    with begun(tmp_path / "state", files) as found:
        yield found


# ---------------------------------------------------------------------------------------------------- disks that do not write

DISK_ERRORS = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO]


@pytest.mark.parametrize("error", DISK_ERRORS)
def test_a_disk_that_cannot_be_written_is_told_and_tried_again(daemon: Daemon, files: Files, error: int) -> None:
    daemon.proven(1)
    daemon.commit(2)
    before = daemon.store.read()
    steps: list[Callable[[], object]] = [lambda: daemon.commit(3, always=True), daemon.store.mark_good, daemon.store.roll_back]
    for step in steps:
        with failing(daemon.folder, error, 0, 10**6):
            daemon.boot()
            with pytest.raises(StateError) as told:
                step()
        assert os.strerror(error) in told.value.message
        assert told.value.hint
        assert daemon.store.degraded
        assert daemon.store.now == before
        assert daemon.store.read() == before
    with failing(daemon.folder, error, 0, 10**6):
        assert daemon.boot() == ("a", 2), "it starts all the same"
        assert daemon.store.degraded
        with pytest.raises(StateError):
            daemon.store.install(files.paths["b"])
    assert daemon.commit(4, always=True) == 0.0
    assert daemon.store.degraded == ""
    assert daemon.boot() == ("a", 4)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_moment_loses_nothing(tmp_path: Path, files: Files, error: int) -> None:
    """One call after another fails, alone; what was asked for is done or not, is told, and can be asked for again."""
    verbs: dict[str, Callable[[Daemon], object]] = {
        "commit": lambda daemon: daemon.commit(3, always=True),
        "settle": lambda daemon: daemon.store.settled(),
        "roll back": lambda daemon: daemon.store.roll_back(),
        "install": lambda daemon: daemon.store.install(files.paths["b"]),
        "boot": lambda daemon: daemon.boot(),
    }
    after = {"commit": ("a", 3), "settle": ("a", 2), "roll back": ("a", 1), "install": ("b", None), "boot": ("a", 2)}
    for name, verb in verbs.items():
        for begin in range(100):
            folder = tmp_path / f"{name}{begin}"
            daemon = Daemon(folder, files)
            with daemon.store:
                daemon.store.install(files.paths["a"])
                daemon.boot()
                daemon.proven(1)
                daemon.commit(2, always=True)
                with failing(folder, error, begin, 1) as made:
                    told = refusal(lambda: verb(daemon))  # noqa: B023
                assert told is None or os.strerror(error) in told.message
                if len(made) <= begin:
                    break
                failed = made[begin].partition(" ")[0]
                found = daemon.boot()
                assert found in (("a", 2), after[name]), (name, made[begin])
                if name != "boot" and found == ("a", 2) != after[name]:
                    verb(daemon)
                    assert daemon.boot() == after[name], (name, failed)
                assert daemon.store.degraded == ""
            shutil.rmtree(folder)
        else:
            raise AssertionError(f"{name} never ended")


def refusal(call: Callable[[], object]) -> StateError | None:
    """What a call was refused with, or None."""
    try:
        call()
    except StateError as reason:
        return reason
    return None


def fill(place: Path) -> None:
    """Until there is no room."""
    with (place / "filling").open("wb", buffering=0) as file, suppress(OSError):
        for _ in range(300):
            file.write(bytes(1024))


def test_a_folder_of_somebody_else_is_told(daemon: Daemon) -> None:
    """For root nothing is forbidden, so it is somebody else who tries."""
    daemon.commit(1)
    daemon.store.close()
    if os.geteuid() == 0:
        for path in (daemon.folder, *daemon.folder.parents):
            if path.stat().st_uid == 0 and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o055)
    else:
        daemon.folder.chmod(0o500)
    before = os.geteuid()
    try:
        if before == 0:
            os.seteuid(65534)
        with Store.open(daemon.folder, LIMITS) as store:
            assert store.begin_boot().state is not None
            assert "Permission denied" in store.degraded
            with pytest.raises(StateError) as told:
                store.roll_back()
            assert "chown" in told.value.hint
        with pytest.raises(StateError, match="state folder cannot be used"):
            Store.open(daemon.folder / "new")
    finally:
        os.seteuid(before)
        daemon.folder.chmod(0o755)


@pytest.mark.parametrize("full", ["a limit on files", "a full file system"])
def test_a_full_disk_is_told_and_leaves_no_parts(tmp_path: Path, files: Files, full: str) -> None:
    """A real one where that can be made."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(place)]
    mounted = full != "a limit on files" and subprocess.run(command, capture_output=True).returncode == 0
    wide = Toy(width=1500, depth=0, batches=(1,), method="norm")  # states of 12 KB
    path = wide.write(tmp_path / "wide")
    manifest = Bundle.open(path).manifest
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with Store.open(place / "state", LIMITS) as store:
            if mounted:
                (place / "state" / "filling").write_bytes(bytes(100))
                with pytest.raises(StateError, match=r"free, and .* are needed"):
                    store.install(path)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
                with pytest.raises(StateError, match="File too large"):
                    store.install(path)
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            assert not list(place.rglob("*.tmp"))
        with Store.open(place / "state", LIMITS) as store:
            begin = store.begin_boot(path)
            assert begin.state is None
            assert store.commit(snapshot(manifest, 1).at_hand, manifest, True) == 0.0
            store.mark_good()
            if mounted:
                fill(place)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
            with pytest.raises(StateError):
                store.commit(snapshot(manifest, 2).at_hand, manifest, True)
            assert store.degraded
            assert not list(place.rglob("*.tmp"))
            assert seed_of(store.begin_boot(path).state, manifest) == 1
            if mounted:
                (place / "filling").unlink()
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            assert store.commit(snapshot(manifest, 3).at_hand, manifest, True) == 0.0
            assert store.degraded == ""
            assert seed_of(store.begin_boot(path).state, manifest) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        if mounted:
            subprocess.run(["umount", place], check=True)


def test_a_folder_that_is_missing_is_made_where_its_parent_is_there(tmp_path: Path) -> None:
    with Store.open(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    with pytest.raises(StateError, match="state folder cannot be used") as told:
        Store.open(tmp_path / "no" / "such")
    assert "StateDirectory" in told.value.hint
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError):
        Store.open(tmp_path / "file")


# --------------------------------------------------------------------------------------------------- contents that are not ours

FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
HASHES = some.text("0123456789abcdef", min_size=64, max_size=64)
SAVED = some.builds(Saved, some.sampled_from("ab"), some.integers(0, 99), HASHES)
STATES = some.builds(States, some.none() | SAVED, some.none() | SAVED)
PATHS = some.binary(max_size=9).map(lambda name: os.fsdecode(name.replace(b"\0", b"")))  # every name of a file that there can be
INSTALLED = some.builds(Installed, HASHES, HASHES, some.booleans(), PATHS)
POINTERS = some.builds(
    Pointer,
    some.integers(0, 2**50),
    some.integers(0, 9),
    some.none() | INSTALLED,
    some.none() | INSTALLED,
    some.none() | INSTALLED,
    some.dictionaries(HASHES, STATES, max_size=3),
    some.lists(some.integers(0, 2**40), max_size=30).map(tuple),
    some.integers(0, 9999),
)
JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text(max_size=5),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def signed(value: dict[str, Any]) -> bytes:
    """With the checksum that belongs to it."""
    return json.dumps({**value, "sha256": _checksum(value)}).encode()


@given(POINTERS)
def test_a_record_gives_back_what_was_written(record: Pointer) -> None:
    assert decode(encode(record), "x") == record


@given(POINTERS, some.data())
def test_a_record_with_any_byte_changed_is_noticed(record: Pointer, data: Any) -> None:
    whole = bytearray(encode(record))
    whole[data.draw(some.integers(0, len(whole) - 1))] ^= data.draw(some.integers(1, 255))
    size = data.draw(some.sampled_from([len(whole), data.draw(some.integers(0, len(whole)))]))
    try:
        assert decode(bytes(whole[:size]), "x") == record  # a blank more or less
    except StateError:
        return


CONTENTS = some.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()) | POINTERS.map(encode)


@FUZZ
@given(copies=some.lists(CONTENTS, min_size=2, max_size=2), history=some.binary(max_size=200) | some.text(max_size=99).map(str.encode))
def test_any_contents_are_refused_or_fallen_back_from(tmp_path: Path, files: Files, copies: list[bytes], history: bytes) -> None:
    folder = tmp_path / "state"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in zip(("pointer.a", "pointer.b"), copies):
        (folder / name).write_bytes(data)
    (folder / "history.jsonl").write_bytes(history)
    with Store.open(folder, LIMITS) as store:
        store.happened()
        for call in (store.read, store.begin_boot, store.undo):
            refusal(call)
        if told := refusal(lambda: store.install(files.paths["a"])):
            assert "upgrade" in told.hint
            return
        boot = store.begin_boot(files.paths["a"])
        assert store.commit(snapshot(files.manifests["a"], 1).at_hand, files.manifests["a"], True) == 0.0
        assert files.names[boot.installed.digest] == "a"
        assert all(isinstance(entry, dict) for entry in store.happened())


@FUZZ
@given(key=some.sampled_from(["generation", "boots", "active", "previous", "outside", "states", "written", "into", "format", "more"]), value=JSON)
def test_any_value_at_any_key_is_read_or_refused(key: str, value: Any) -> None:
    plain = json.loads(encode(Pointer(active=Installed("0" * 64, "1" * 64))))
    del plain["sha256"]
    try:
        decode(signed({**plain, key: value}), "x")
    except StateError:
        return


@pytest.mark.parametrize("path", ["a\0b", "\ud800", 3])
def test_a_path_that_can_be_none_is_refused(path: object) -> None:
    plain = json.loads(encode(Pointer(outside=Installed("0" * 64, "1" * 64, False, "x"))))
    del plain["sha256"]
    plain["outside"]["path"] = path
    with pytest.raises(StateError, match="is damaged"):
        decode(signed(plain), "x")


def test_a_newer_record_is_left_alone(daemon: Daemon, files: Files) -> None:
    """Also where the other copy is ours: what the newer edgeadapt wrote last counts."""
    plain = {**json.loads((daemon.folder / "pointer.a").read_text()), "format": 2}
    del plain["sha256"]
    (daemon.folder / "pointer.a").write_bytes(signed(plain))
    before = {name: (daemon.folder / name).read_bytes() for name in ("pointer.a", "pointer.b")}
    for call in (daemon.boot, daemon.store.roll_back, lambda: daemon.store.install(files.paths["b"])):
        with pytest.raises(StateError, match="format 2, this reads 1"):
            call()
    assert {name: (daemon.folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("lost", [("pointer.a",), ("pointer.b",), ("pointer.a", "pointer.b")])
def test_lost_copies_are_written_anew(daemon: Daemon, files: Files, lost: tuple[str, ...]) -> None:
    for name in lost:
        (daemon.folder / name).write_bytes(b"rubbish")
    if len(lost) == 2:
        with pytest.raises(StateError, match="damaged"):
            daemon.boot()
        daemon.store.install(files.paths["a"])
    assert daemon.boot() == ("a", None)
    for name in ("pointer.a", "pointer.b"):
        decode((daemon.folder / name).read_bytes(), name)


def test_copies_that_cannot_be_read_just_now_are_not_taken_for_lost(daemon: Daemon, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or installing would begin anew what a moment later can be read again."""
    daemon.proven(1)
    real, before = pointer._read, daemon.store.now
    broken = {"pointer.a"}

    def read(path: Path) -> bytes:
        if path.name in broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(pointer, "_read", read)
        assert daemon.store.read().generation in (before.generation, before.generation - 1)
        broken.add("pointer.b")
        for call in (lambda: daemon.store.install(files.paths["b"]), daemon.boot):
            told = refusal(call)
            assert told is not None
            assert "cannot be read: Input/output error" in told.message
    assert daemon.store.read() == before
    assert daemon.boot() == ("a", 1)


@given(some.lists(some.binary(max_size=30), max_size=12), some.integers(0, 4))
def test_a_history_of_anything_is_gone_on_with(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], most: int) -> None:
    path = tmp_path_factory.mktemp("history") / "history.jsonl"
    path.write_bytes(b"\n".join(lines))
    history = History(path, most)
    for number in range(5):
        history.add([{"number": number}])
        found = history.entries()
        assert len(found) <= most
        assert not most or found[-1] == {"number": number}
    assert sum(map(bool, path.read_bytes().split(b"\n"))) <= max(2 * most, len(b"\n".join(lines).split(b"\n")))


def test_pipes_in_the_folder_are_not_waited_for(tmp_path: Path, files: Files) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    os.mkfifo(folder / "lock")
    with pytest.raises(StateError, match=re.escape(f"{folder}/lock is not a file")) as told:
        Store.open(folder, LIMITS)
    assert f"rm -r {folder}/lock" in told.value.hint
    with Store.open(folder, LIMITS, serving=False) as store:
        store.install(files.paths["a"])
    (folder / "lock").unlink()
    (folder / "history.jsonl").unlink()
    os.mkfifo(folder / "history.jsonl")
    with Store.open(folder, LIMITS) as store:
        assert store.happened() == []
        assert files.names[store.begin_boot().installed.digest] == "a"
        assert store.degraded == f"the history cannot be written: {folder}/history.jsonl: it is not a file, remove it"
        (folder / "history.jsonl").unlink()
        store.mark_good()
        assert store.degraded == ""
        assert store.happened()


# -------------------------------------------------------------------------------------------------------------- how it wears


def test_two_that_look_at_an_hours_end_count_it_once() -> None:
    """Else the present hour begins later than now, and no record with that is read again."""
    now = [0.0]
    wear = Wear(lambda: now[0])
    wear.add(1)
    other = threading.Thread(target=lambda: wear.lately)

    class Began(float):
        """Between the first look at it and what follows from that another one looks, unless it is kept from that."""

        def __rsub__(self, time: float) -> float:
            if other.ident is None:
                other.start()
                other.join(0.5)
            return time - float(self)

    wear._began = Began(0.0)
    now[0] = 3600.0
    hours, into = wear.kept()
    other.join()
    assert wear.kept() == (hours, into) == ((0, 1), 0)
    decode(encode(Pointer(written=hours, into=into)), "x")


def test_what_is_left_is_known_while_somebody_else_settles(daemon: Daemon) -> None:
    daemon.commit(1)
    store = daemon.store

    def clock() -> float:
        store._since = None  # as `settled` has it, on another thread
        return daemon.time

    store._clock = clock
    assert store.left == LIMITS.probation
    assert store.left is None


def test_a_daemon_that_commits_all_the_time_stays_below_its_bytes_a_day(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """For three days, with restarts, by what really goes into files; whatever the wall clock says."""
    most, written = 2**20, []
    daemon = Daemon(tmp_path / "state", files, Limits(spare=0, bytes_per_day=most, probation=60.0, history=20))
    sync, now = os.fsync, [1e9]

    def synced(handle: int) -> None:
        written.append((daemon.time, os.fstat(handle).st_size))

    daemon.store.install(files.paths["a"])
    daemon.boot()
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(time, "time", lambda: now[0])
    turns, waits, commits, end = 0, 0, 0, daemon.time + 3 * DAY
    while daemon.time < end:
        now[0] -= 1000.0
        turns += 1
        if turns % 7 == 0:
            daemon.store.close()
            daemon.store = Store.open(daemon.folder, daemon.store.limits, clock=lambda: daemon.time)
            daemon.boot()
        wait = daemon.commit(commits)
        waits += wait > 60.0
        commits += not wait
        daemon.time += wait or 60.0
        daemon.store.settled()
    monkeypatch.setattr(os, "fsync", sync)
    daemon.store.close()
    assert waits
    assert commits > 20
    assert turns > 30
    for begin, _ in written:
        assert sum(size for at, size in written if begin <= at < begin + DAY) <= most
    last = [size for at, size in written if at >= end - DAY]
    assert sum(last) > most / 20, "and it is not much stricter than it says: a file system's own blocks are counted as well"


def test_what_must_be_written_is(tmp_path: Path, files: Files) -> None:
    daemon = Daemon(tmp_path / "state", files, Limits(spare=0, bytes_per_day=2**17))
    with daemon.store:
        daemon.store.install(files.paths["a"])
        daemon.boot()
        daemon.commit(1, always=True)
        daemon.store.mark_good()
        wait = daemon.commit(2)
        assert 3600 < wait <= 25 * 3600 + 1
        assert daemon.boot() == ("a", 1)
        assert daemon.commit(3, always=True) == 0.0
        daemon.store.roll_back()
        assert daemon.boot() == ("a", 1)
        assert daemon.store.written_today > 2**17
        daemon.time += 25 * 3600
        assert daemon.commit(4) == 0.0


def test_a_state_that_never_fits_is_told_so(tmp_path: Path, files: Files) -> None:
    daemon = Daemon(tmp_path / "state", files, Limits(spare=0, bytes_per_day=1000))
    with daemon.store:
        daemon.store.install(files.paths["a"])
        daemon.boot()
        assert daemon.commit(1) == float("inf")


def test_what_a_boot_a_commit_and_a_settle_cost(daemon: Daemon) -> None:
    """docs/state.md says these."""
    found = {}
    for name, step in (("boot", daemon.boot), ("commit", lambda: daemon.commit(1)), ("settle", daemon.store.mark_good)):
        before = daemon.store.written_today
        step()
        found[name] = (daemon.store.written_today - before) // 1024
    assert daemon.slot(1).stat().st_size <= 4096
    assert found == {"boot": 32, "commit": 60, "settle": 32}
    text = (ROOT / "docs" / "state.md").read_text(encoding="utf-8")
    for name, size in found.items():
        assert re.search(rf"^\| {name}.*\| {size} KiB", text, re.MULTILINE), name


@given(some.lists(some.tuples(some.floats(0, 30_000), some.integers(1, 400)), max_size=40), some.integers(400, 2000), some.integers(0, 5))
def test_no_day_has_more_than_it_may(steps: list[tuple[float, int]], most: int, restart: int) -> None:
    """Whenever it is asked, in any 24 hours, over restarts too; and who waits as long as was said need not wait longer."""
    now = [50.0]
    wear, done = Wear(lambda: now[0]), []
    for number, (pause, size) in enumerate(steps):
        now[0] += pause
        if restart and number % restart == 0:
            kept, wear = wear.kept(), Wear(lambda: now[0])
            wear.restore(*kept)
        if wait := wear.wait(size, most):
            assert wait <= 25 * 3600 + 1
            now[0] += wait
            assert wear.wait(size, most) == 0.0
        wear.add(size)
        done.append((now[0], size))
        assert sum(each for at, each in done if at > now[0] - DAY) <= wear.lately <= most
