"""The state folder: what is started with, what is kept beside it, and who may change it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from edgeadapt.bundle import Bundle
from edgeadapt.cli.main import main
from edgeadapt.errors import BundleError, StateError
from edgeadapt.runtime import checkpoint
from edgeadapt.runtime.daemon.store import Limits, Store, disk, moves
from edgeadapt.runtime.daemon.store.pointer import Installed, Pair, Pointer, Saved, decode, encode
from tests.child import ROOT, environment
from tests.stored import LIMITS, Daemon, Files, begun, seed_of, snapshot
from tests.toybundle import Toy

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def daemon(tmp_path: Path, files: Files) -> Iterator[Daemon]:
    with begun(tmp_path / "state", files) as found:
        yield found


# ------------------------------------------------------------------------------------------------------------ what is where


def test_the_folder_is_laid_out_by_digests(daemon: Daemon, files: Files) -> None:
    daemon.proven(1)
    daemon.commit(2)
    bundle = Bundle.open(files.paths["a"])
    kind = checkpoint.compatible(bundle.manifest)
    found = {str(path.relative_to(daemon.folder)) for path in daemon.folder.rglob("*") if path.is_file()}
    slots = {f"slots/{kind[:16]}/{slot}.safetensors" for slot in "ab"}
    assert found == {f"bundles/{bundle.digest[:16]}/model.edgeadapt", *slots, "pointer.a", "pointer.b", "history.jsonl", "lock"}
    installed = daemon.folder / f"bundles/{bundle.digest[:16]}/model.edgeadapt"
    assert installed.read_bytes() == files.paths["a"].read_bytes()
    pointers = [json.loads((daemon.folder / name).read_text()) for name in ("pointer.a", "pointer.b")]
    newest = max(pointers, key=lambda pointer: pointer["generation"])
    assert {pointer["generation"] for pointer in pointers} == {newest["generation"], newest["generation"] - 1}
    assert newest["active"] == {"digest": bundle.digest, "compatible": kind, "trial": False, "path": ""}
    states = newest["states"][kind]
    for which, seed in (("active", 2), ("last_good", 1)):
        saved = checkpoint.read(daemon.slot(seed), bundle.manifest)
        assert states[which] == {"slot": daemon.slot(seed).stem, "generation": saved.generation, "sha256": saved.sha256}


def test_generations_rise_with_every_change(daemon: Daemon, files: Files) -> None:
    seen = [daemon.store.now.generation]
    steps = [lambda: daemon.proven(1), lambda: daemon.commit(2), daemon.store.roll_back, lambda: daemon.store.install(files.paths["b"]), daemon.boot]
    for step in steps:
        step()
        assert daemon.store.now.generation > seen[-1]
        seen.append(daemon.store.now.generation)
    assert daemon.store.read().generation == seen[-1]


def test_history_says_what_happened_and_stays_short(tmp_path: Path, files: Files) -> None:
    daemon = Daemon(tmp_path / "state", files, Limits(spare=0, history=10))
    with daemon.store:
        daemon.store.install(files.paths["a"])
        daemon.boot()
        daemon.commit(1)
        daemon.store.mark_good()
        daemon.commit(2)
        daemon.store.roll_back()
        assert daemon.events() == ["installed", "boot", "committed", "marked good", "committed", "rolled back"]
        entry = daemon.store.happened()[-1]
        assert entry["generation"] == daemon.store.now.generation
        assert "last good" in entry["text"]
        most = 0
        for _ in range(60):
            daemon.boot()
            most = max(most, len((daemon.folder / "history.jsonl").read_text().splitlines()))
            assert len(daemon.store.happened()) <= 10
        assert most == 20


# ---------------------------------------------------------------------------------------------------- what is started with


def test_what_was_committed_is_started_with_and_proves_itself(daemon: Daemon) -> None:
    assert daemon.commit(1) == 0.0
    assert daemon.store.on_probation
    assert daemon.store.left == LIMITS.probation
    assert daemon.boot() == ("a", 1)
    daemon.time += LIMITS.probation - 1
    assert daemon.store.left == 1.0
    daemon.time += 1
    assert daemon.store.settled()
    assert daemon.store.left is None
    assert not daemon.store.on_probation
    before = daemon.store.now
    assert not daemon.store.settled(), "nothing is written for what is known"
    assert daemon.store.now == before
    assert daemon.boots(20) == [("a", 1)] * LIMITS.boots + [("a", None)] * 17


def test_a_start_that_never_proves_itself_is_given_up_step_by_step(daemon: Daemon, files: Files) -> None:
    daemon.proven(1)
    daemon.commit(9)
    daemon.store.install(files.paths["b"])
    assert daemon.boot() == ("b", None)
    daemon.proven(2)
    daemon.commit(3)
    expected = [("b", 3), ("b", 2), ("b", None), ("a", 1), ("a", None)]
    for start in expected:
        assert daemon.boots(LIMITS.boots) == [start] * LIMITS.boots
    assert daemon.boots(5) == [("a", None)] * 5
    assert daemon.events().count("gave up") == len(expected) - 1
    assert daemon.store.now.previous is None, "what was given up is not gone back to"


def test_a_boot_says_what_it_chose_and_why(daemon: Daemon) -> None:
    daemon.proven(1)
    daemon.commit(2)
    found = [daemon.store.begin_boot() for _ in range(LIMITS.boots + 1)]
    assert [boot.attempt for boot in found] == [1, 2, 3, 1]
    assert [boot.choice for boot in found] == [moves.NEWEST] * 3 + [moves.LAST_GOOD]
    assert [boot.why for boot in found[:3]] == [""] * 3
    assert found[3].why == "3 starts in a row did not prove themselves, so the newest is passed over"
    assert found[3].state == daemon.slot(1)


def test_what_a_start_that_proved_itself_began_with_is_the_last_good(daemon: Daemon) -> None:
    """Also where that is not what was newest."""
    daemon.proven(1)
    daemon.commit(2)
    daemon.boots(LIMITS.boots + 1)
    daemon.time += LIMITS.probation
    assert daemon.store.settled()
    assert daemon.boots(LIMITS.boots) == [("a", 1)] * LIMITS.boots
    assert daemon.boot() == ("a", None), "what was given up does not come again"


def test_an_end_in_order_is_no_failure(daemon: Daemon) -> None:
    daemon.commit(1)
    for _ in range(3 * LIMITS.boots):
        assert daemon.boot() == ("a", 1)
        daemon.store.stopped()
    daemon.time += LIMITS.probation
    daemon.store.settled()
    before = daemon.store.now
    daemon.store.stopped()
    assert daemon.store.now == before, "nothing is written where nothing is to be taken back"


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [spoil, lambda path: path.write_bytes(b""), Path.unlink])
def test_what_is_damaged_is_passed_over_at_once(daemon: Daemon, files: Files, damage: Callable[[Path], object]) -> None:
    daemon.proven(1)
    daemon.store.install(files.paths["b"])
    daemon.boot()
    daemon.proven(2)
    daemon.commit(3)
    damage(daemon.slot(3))
    assert daemon.boot() == ("b", 2)
    daemon.commit(4)
    assert daemon.boot() == ("b", 4)
    damage(daemon.slot(4))
    damage(daemon.slot(2))
    assert daemon.boot() == ("b", None)
    damage(daemon.store.begin_boot().bundle)
    found = daemon.store.begin_boot()
    assert found.choice == moves.PREVIOUS
    assert "bundle" in found.why or "cannot" in found.why
    assert seed_of(found.state, files.manifests["a"]) == 1
    damage(found.bundle)
    with pytest.raises(StateError, match="nothing can be started with"):
        daemon.boot()
    daemon.store.install(files.paths["a"])
    assert daemon.boot() == ("a", 1), "what was learned is still there"


def test_what_was_given_up_is_better_than_nothing(daemon: Daemon, files: Files) -> None:
    daemon.store.install(files.paths["b"])
    assert daemon.boots(LIMITS.boots) == [("b", None)] * LIMITS.boots
    spoil(daemon.folder / "bundles" / daemon.store.now.previous.digest[:16] / "model.edgeadapt")  # type: ignore[union-attr]
    found = daemon.store.begin_boot()
    assert files.names[found.installed.digest] == "b"
    assert found.attempt == LIMITS.boots + 1
    assert "the start is passed over" in found.why


def test_a_state_that_no_adapter_would_take_is_passed_over(daemon: Daemon, files: Files) -> None:
    """Whole and recorded, but not finite, or without some of its tensors."""
    daemon.proven(1)
    manifest = files.manifests["a"]
    name = manifest.state[0].name
    for odd in ({name: np.full(manifest.state[0].shape, np.nan, np.float32)}, None):
        state = snapshot(manifest, 2)
        tensors = {**state.tensors, **odd} if odd else {key: value for key, value in state.tensors.items() if key != name}
        daemon.store.commit(replace(state, tensors=tensors).at_hand, manifest, True)
        assert daemon.boot() == ("a", 1)


def test_a_bundle_in_the_place_of_another_is_passed_over(daemon: Daemon, files: Files) -> None:
    daemon.store.install(files.paths["b"])
    shutil.copy(files.paths["c"], daemon.store.begin_boot().bundle)
    found = daemon.store.begin_boot()
    assert files.names[found.installed.digest] == "a"
    assert "another bundle" in found.why


def test_a_state_of_another_time_is_not_taken(daemon: Daemon) -> None:
    """An older file in the slot, as a backup might bring it: whole, and not what is recorded."""
    daemon.proven(1)
    daemon.commit(2)
    older = daemon.slot(2).read_bytes()
    daemon.commit(3, always=True)
    daemon.slot(3).write_bytes(older)
    assert daemon.boot() == ("a", 1)


def test_nothing_installed_is_told(tmp_path: Path) -> None:
    with Store.open(tmp_path / "state") as store, pytest.raises(StateError, match="no bundle is installed") as told:
        store.begin_boot()
    assert "edgeadapt install" in told.value.hint


# ------------------------------------------------------------------------------------------------------- commits by hand


def test_commits_take_turns_and_never_touch_the_last_good(daemon: Daemon) -> None:
    daemon.proven(1)
    good = daemon.slot(1)
    before = good.read_bytes()
    for seed in (2, 3, 4):
        daemon.commit(seed, always=True)
        assert daemon.slot(seed) != good
        assert good.read_bytes() == before
    daemon.time += LIMITS.probation
    daemon.store.settled()
    daemon.commit(5)
    assert daemon.slot(5) == good
    assert daemon.slot(4) != good


def test_what_is_on_probation_is_not_replaced_before_its_time(daemon: Daemon) -> None:
    daemon.commit(1)
    daemon.time += 100
    assert daemon.commit(2) == LIMITS.probation - 100
    assert daemon.boot() == ("a", 1)
    daemon.time += LIMITS.probation
    assert daemon.commit(2) == 0.0, "where nobody says that it proved itself, when that time is over"


def test_roll_back_goes_to_the_last_good_and_then_to_the_start(daemon: Daemon) -> None:
    daemon.proven(1)
    daemon.commit(2)
    daemon.store.roll_back()
    assert not daemon.store.on_probation
    assert daemon.boot() == ("a", 1)
    daemon.store.roll_back()
    assert daemon.boot() == ("a", None)
    daemon.proven(3)
    daemon.commit(4)
    daemon.store.roll_back(to_start=True)
    assert daemon.boot() == ("a", None)
    daemon.store.stopped()
    daemon.commit(5)
    assert daemon.boots(LIMITS.boots) == [("a", 5)] * LIMITS.boots
    assert daemon.boot() == ("a", None), "what was gone back behind does not come again"


def test_mark_good_does_not_wait(daemon: Daemon) -> None:
    daemon.commit(1)
    daemon.store.mark_good()
    assert not daemon.store.on_probation
    assert daemon.commit(2) == 0.0
    daemon.store.roll_back()
    assert daemon.boot() == ("a", 1)


def test_a_state_of_another_bundle_is_refused(daemon: Daemon, files: Files) -> None:
    manifest = files.manifests["b"]
    with pytest.raises(StateError, match="not of the bundle that is served"):
        daemon.store.commit(snapshot(manifest, 1).at_hand, manifest)
    assert daemon.store.degraded == ""


def test_verbs_before_a_start_are_refused(tmp_path: Path, files: Files) -> None:
    with Store.open(tmp_path / "state") as store:
        store.install(files.paths["a"])
        for call in (store.settled, store.mark_good, store.roll_back):
            with pytest.raises(StateError, match="nothing was started yet"):
                call()


# --------------------------------------------------------------------------------------------------------------- bundles


def test_a_bundle_that_did_not_prove_itself_is_not_kept(daemon: Daemon, files: Files) -> None:
    daemon.store.install(files.paths["b"])
    daemon.boot()
    daemon.store.install(files.paths["c"])
    assert files.names[daemon.store.now.previous.digest] == "a"  # type: ignore[union-attr]
    daemon.boot()
    digests = {Bundle.open(files.paths[name]).digest[:16] for name in "ac"}
    assert {path.name for path in (daemon.folder / "bundles").iterdir()} == digests


def test_undo_puts_the_bundle_before_back(daemon: Daemon, files: Files) -> None:
    daemon.proven(1)
    daemon.commit(2)
    daemon.store.install(files.paths["b"])
    assert daemon.boot() == ("b", None)
    assert files.names[daemon.store.undo().digest] == "a"
    assert daemon.boot() == ("a", 1)
    with pytest.raises(StateError, match="no bundle to go back to"):
        daemon.store.undo()


def test_installing_the_same_again_changes_nothing_and_mends(daemon: Daemon, files: Files) -> None:
    before = daemon.store.now
    found = daemon.store.install(files.paths["a"])
    assert found.again
    assert daemon.store.now == before
    spoil(found.path)
    assert daemon.store.install(files.paths["a"]).again
    assert daemon.boot() == ("a", None)


def test_what_was_learned_goes_on_with_a_bundle_that_takes_it(daemon: Daemon, files: Files) -> None:
    assert not daemon.store.install(files.paths["b"]).goes_on
    daemon.boot()
    daemon.proven(1)
    found = daemon.store.install(files.paths["c"])
    assert found.goes_on
    assert files.names[found.before] == "b"
    assert daemon.boot() == ("c", 1)


def test_a_damaged_bundle_is_not_installed(daemon: Daemon, files: Files, tmp_path: Path) -> None:
    shutil.copy(files.paths["b"], tmp_path / "b")
    spoil(tmp_path / "b")
    before = sorted(daemon.folder.rglob("*"))
    with pytest.raises(BundleError):
        daemon.store.install(tmp_path / "b")
    assert sorted(daemon.folder.rglob("*")) == before


def test_a_bundle_that_changes_while_it_is_copied_is_not_installed(daemon: Daemon, files: Files, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copy(files.paths["b"], tmp_path / "b")
    make = disk.make

    def swapped(folder: Path, owner: disk.Owner) -> None:
        make(folder, owner)
        shutil.copy(files.paths["c"], tmp_path / "b")

    monkeypatch.setattr(disk, "make", swapped)
    with pytest.raises(BundleError, match="replaced while it was copied"):
        daemon.store.install(tmp_path / "b")
    assert daemon.boot() == ("a", None)


def test_room_is_looked_at_first(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Daemon(tmp_path / "state", files, Limits(spare=2**20))
    size = files.paths["a"].stat().st_size
    with daemon.store:
        monkeypatch.setattr(disk, "free", lambda path: 2**20 + size - 1)
        with pytest.raises(StateError, match=r"free, and .* are needed"):
            daemon.store.install(files.paths["a"])
        assert not list(daemon.folder.rglob("model*"))
        monkeypatch.setattr(disk, "free", lambda path: 2**20 + size)
        daemon.store.install(files.paths["a"])


def test_a_bundle_outside_is_served_from_where_it_is(daemon: Daemon, files: Files) -> None:
    """With states of its own and no bundle before it; what is installed stays."""
    daemon.proven(1)

    def outside() -> tuple[Path, int | None]:
        found = daemon.store.begin_boot(files.paths["b"])
        return found.bundle, seed_of(found.state, files.manifests["b"])

    assert outside() == (files.paths["b"], None)
    daemon.proven(2)
    assert outside() == (files.paths["b"], 2)
    for _ in range(9):
        found = outside()
    assert found == (files.paths["b"], None)
    assert daemon.boot() == ("a", 1)
    with pytest.raises(BundleError):
        daemon.store.begin_boot(files.paths["b"].with_name("none"))


def test_what_crashes_left_is_removed_where_nothing_was_ever_installed(tmp_path: Path, files: Files) -> None:
    folder, manifest = tmp_path / "state", files.manifests["b"]
    with Store.open(folder, LIMITS) as store:
        store.begin_boot(files.paths["b"])
        store.commit(snapshot(manifest, 1).at_hand, manifest, True)
    (slot,) = (folder / "slots").rglob("*.safetensors")
    left = [folder / ".pointer.a.0123456789ab.tmp", folder / ".history.jsonl.0123456789ab.tmp", slot.with_name(f".{slot.name}.0123456789ab.tmp")]
    (folder / "slots" / ("0" * 16)).mkdir()
    for path in (*left, folder / ".note.tmp"):
        path.write_bytes(b"half of it")
    with Store.open(folder, LIMITS) as store:
        found = store.begin_boot(files.paths["b"])
        assert seed_of(found.state, manifest) == 1
    assert not any(path.exists() for path in left)
    assert not (folder / "slots" / ("0" * 16)).exists()
    assert (folder / ".note.tmp").exists(), "which is not ours"


def test_a_bundle_is_installed_beside_a_daemon_that_serves(daemon: Daemon, files: Files) -> None:
    """By another process; what the daemon does meanwhile is of the bundle that it serves, and that stays in place."""
    daemon.store.install(files.paths["b"])
    daemon.boot()
    serving = daemon.store.begin_boot().bundle
    with Store.open(daemon.folder, LIMITS, serving=False) as other:
        other.install(files.paths["c"])
    daemon.time += LIMITS.probation
    assert serving.is_file(), "though it did not prove itself"
    assert not daemon.store.settled()
    assert daemon.commit(1) == 0.0
    assert files.names[daemon.store.now.active.digest] == "c"  # type: ignore[union-attr]
    with pytest.raises(StateError, match="is not what is installed"):
        daemon.store.mark_good()
    assert daemon.boot() == ("c", 1), "which takes the same states"
    assert not serving.exists()


def test_what_is_installed_meanwhile_twice_takes_no_states_of_the_first(daemon: Daemon, files: Files, tmp_path: Path) -> None:
    with Store.open(daemon.folder, LIMITS, serving=False) as other:
        other.install(files.paths["b"])
        other.undo()
        other.install(Toy(6, 0, (1,), "norm").write(tmp_path / "d"))
    daemon.commit(1)
    with Store.open(daemon.folder, LIMITS, serving=False) as other:
        other._record.write(Pointer(active=other.read().active))
    with pytest.raises(StateError, match="not installed any more"):
        daemon.commit(2, always=True)


# ----------------------------------------------------------------------------------------------------------------- locks


def test_two_daemons_never_share_a_folder(daemon: Daemon) -> None:
    with pytest.raises(StateError, match="another daemon serves"):
        Store.open(daemon.folder)
    daemon.store.close()
    with Store.open(daemon.folder):
        pass


def test_a_daemon_that_is_killed_keeps_nobody_out(tmp_path: Path) -> None:
    code = "import sys, time; from edgeadapt.runtime.daemon.store import Store; s = Store.open(sys.argv[1]); print('open', flush=True)"
    command = [sys.executable, "-c", f"{code}; time.sleep(60)", str(tmp_path / "s")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(StateError, match="another daemon"):
            Store.open(tmp_path / "s")
        child.send_signal(signal.SIGKILL)
        child.wait()
    Store.open(tmp_path / "s").close()


def test_who_changes_the_record_is_waited_for_or_not(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit and what has proved itself can wait; what somebody asks for waits, and says so in the end."""
    monkeypatch.setattr("edgeadapt.runtime.daemon.store.folder.PATIENCE", 0.05)
    daemon.boot()
    daemon.time += LIMITS.probation
    with disk.locked(daemon.folder, 0.0) as mine:
        assert mine
        assert daemon.commit(1) > 0
        assert not daemon.store.settled()
        assert daemon.store.left == 0.0
        with pytest.raises(StateError, match="another process is changing"):
            daemon.commit(1, always=True)
        with pytest.raises(StateError, match="another process is changing"):
            daemon.store.mark_good()
    assert daemon.store.degraded == ""
    assert daemon.commit(1) == 0.0


def test_no_file_stays_open(daemon: Daemon, files: Files) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        daemon.boot()
        daemon.commit(1, always=True)
        daemon.store.mark_good()
        daemon.store.install(files.paths["b"])
        daemon.store.undo()
        with pytest.raises(StateError):
            Store.open(daemon.folder)
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------------------------------------------------- killed, and by hand


def test_twenty_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "power_cut.py"), "--rounds", "20", "--longest", "0.15", "--folder", str(tmp_path)]
    run = subprocess.run([*command, "--json", str(tmp_path / "found.json")], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["lost"] == []
    assert found["rounds"] == 20
    assert sum(found["cut during"].values()) == 20


def test_install_from_the_command_line(tmp_path: Path, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state", str(tmp_path / "state")]
    assert main(["install", str(files.paths["a"]), *state]) == 0
    assert "there is no bundle before it" in capsys.readouterr().out
    assert main(["install", str(files.paths["a"]), *state]) == 0
    assert "installed already" in capsys.readouterr().out
    daemon = Daemon(tmp_path / "state", files)
    with daemon.store:
        daemon.boot()
        daemon.proven(1)
    assert main(["install", str(files.paths["b"]), *state]) == 0
    assert "edgeadapt install --undo" in capsys.readouterr().out
    assert main(["install", "--undo", *state]) == 0
    assert main(["install", "--undo", *state]) == 7
    assert main(["install", str(files.paths["b"]), *state]) == 0
    assert main(["install", str(files.paths["c"]), *state]) == 0
    assert len(list((tmp_path / "state" / "bundles").iterdir())) == 2, "no daemon serves, so what is not used goes at once"
    assert main(["install", "--undo", *state]) == 0
    assert main(["install", *state]) == 2
    assert main(["install", str(tmp_path / "none"), *state]) == 4
    assert not (tmp_path / "state" / "bundles" / Bundle.open(files.paths["b"]).digest[:16]).exists()


# ------------------------------------------------------------------------------------------------------ records without a disk


@given(some.data())
def test_any_order_of_steps_keeps_the_last_good_apart(data: Any) -> None:
    """The next state never goes where the last good is, nothing is named that was not saved, and a start is always found."""
    known = {name: Installed(digit * 64, kind * 64) for name, digit, kind in (("a", "a", "0"), ("b", "b", "1"), ("c", "c", "1"))}
    pointer, slots = Pointer(), {}
    serving: Installed | None = None
    saved: Saved | None = None
    for generation in range(data.draw(some.integers(1, 25))):
        step = data.draw(some.sampled_from(["install", "boot", "commit", "settle", "roll back", "undo"]))
        if step == "install":
            pointer = moves.installed(pointer, known[data.draw(some.sampled_from("abc"))])
        elif step == "undo" and pointer.previous is not None:
            _, pointer = moves.undone(pointer)
        elif step == "boot" and pointer.active is not None:
            boots = pointer.boots
            begun = moves.begun(pointer, 2, lambda bundle: "", lambda bundle, it: it if slots[bundle.compatible, it.slot] == it else None)
            pointer, serving, saved = begun.pointer, begun.bundle, begun.saved
            assert pointer.boots in (1, boots + 1)
            assert pointer.active is not None
            assert pointer.active.digest == serving.digest
            assert pointer.states_of(serving).active == saved
        elif serving is not None and pointer.active is not None and serving.digest == pointer.active.digest:
            states = pointer.states_of(serving)
            if step == "commit":
                slot = moves.slot_for(states)
                assert states.last_good is None or states.last_good.slot != slot
                saved = slots[serving.compatible, slot] = Saved(slot, generation, f"{generation:064x}")
                pointer = moves.committed(pointer, serving, saved)
            elif step == "settle":
                pointer = moves.settled(pointer, serving, saved)
                assert pointer.boots == 0
                assert not pointer.active.trial  # type: ignore[union-attr]
            elif step == "roll back":
                pointer = moves.rolled_back(pointer, serving, data.draw(some.booleans()))
                saved = pointer.states_of(serving).active
                assert saved in (None, states.last_good)
        assert set(pointer.states) <= {bundle.compatible for bundle in moves.bundles(pointer)}
        assert decode(encode(pointer), "x") == pointer


def test_pairs_write_the_older_copy(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.write(Pointer(1))
    assert {path.name for path in tmp_path.iterdir()} == {"pointer.a", "pointer.b"}
    for generation in range(2, 6):
        pair.write(Pointer(generation))
        assert {decode(path.read_bytes(), "x").generation for path in tmp_path.iterdir()} == {generation - 1, generation}
        assert pair.read().generation == generation
