"""What `edgeadapt doctor --config` says of what a daemon will need here: the configuration, the state folder, the bundle and its budget."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeadapt.bundle import signing
from edgeadapt.bundle.reference import Chance, Reference
from edgeadapt.cli import main
from edgeadapt.devices.boards import examine as machines
from edgeadapt.devices.boards.files import Files
from edgeadapt.devices.boards.floor import Floor
from edgeadapt.runtime.daemon import examine
from edgeadapt.runtime.daemon.examine import Found, folder, mounts, who
from edgeadapt.runtime.daemon.store import Limits, Store
from tests import fakemachine as fake
from tests.examined import FLOOR, Board, begun
from tests.shapedtoy import ShapedToy
from tests.toybundle import Toy

pytestmark = pytest.mark.device


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    return begun(tmp_path, monkeypatch)


def grades(found: examine.Examined) -> set[str]:
    return {one.grade for one in found.findings}


# --------------------------------------------------------------------------------------------------------------------- all of it


def test_a_board_that_has_all_is_able_and_says_so(board: Board) -> None:
    board.install()
    board.text += "[memory]\nbudget = 134217728\n"
    shutil.chown(board.state, os.geteuid())
    for path in (board.state, board.place):
        path.chmod(0o777)
    board.unit(MemoryMax=str(160 << 20))
    found = board.look()
    assert grades(found) == {"fine"}, [one for one in found.findings if one.grade != "fine"]
    assert found.able
    subjects = list(dict.fromkeys(one.subject for one in found.findings))
    assert subjects == [
        *("configuration", "unit", "memory limit", "watchdog", "daemon", "state folder", "room", "bundle", "budget", "source", "libraries")
    ]
    assert not any(one.fix for one in found.findings)


def test_nothing_is_changed_made_or_left_open(board: Board) -> None:
    board.install()
    board.unit()

    def all_of_it() -> dict[str, tuple[int, int, int]]:
        paths = [path for path in sorted(board.place.rglob("*")) if not path.is_relative_to(board.root) and path.name != "e.toml"]
        return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_ctime_ns, path.lstat().st_size) for path in paths}

    board.look()
    before, handles = all_of_it(), len(os.listdir("/proc/self/fd"))
    board.look()
    assert all_of_it() == before
    assert len(os.listdir("/proc/self/fd")) == handles
    shutil.rmtree(board.state)
    board.look()
    assert not board.state.exists()


def test_a_faulty_configuration_is_told_as_check_config_tells_it(board: Board) -> None:
    board.text = '[http]\nprot = 1\nhost = "0.0.0.0"\n'
    found = board.look("predict.threads=0")
    assert [one.subject for one in found.findings] == ["configuration"] * 2
    assert found.findings[0].text.endswith("e.toml:2: http.prot: there is no such key")
    assert found.findings[0].fix == "did you mean port?"
    assert not found.able


def test_warnings_and_what_does_not_go_with_the_bundle(board: Board) -> None:
    board.install()
    board.text += '[http]\nenabled = true\nhost = "0.0.0.0"\n[adapt]\nwindow = 3\n'
    said = board.found("configuration")
    assert any(one.grade == "warning" and "http.host: everybody who reaches" in one.text for one in said)
    assert any(one.grade == "fault" and "adapt.window: this bundle cannot adapt on 3 frames" in one.text for one in said)
    assert not any(one.grade == "fine" for one in said)


def test_where_onnxruntime_does_not_load_the_rest_is_looked_at(board: Board) -> None:
    board.install()
    board.floor = Floor("3.11.2", "2.4.6", error="killed by SIGILL")
    assert board.only("bundle").grade == "warning"
    assert not board.found("budget")
    assert board.only("state folder").grade == "fine"


# ------------------------------------------------------------------------------------------------------------------ the state folder


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("ext4", "rw", ""),
        ("btrfs", "rw", ""),
        ("tmpfs", "rw", "in memory"),
        ("vfat", "rw", "has no owners"),
        ("nfs4", "rw", "over a network"),
        ("ext2", "rw", "no journal"),
        ("ext4", "rw,nobarrier", "without barriers"),
        ("strangefs", "rw", "it is not known"),
        ("overlay", "rw,lowerdir=/l,upperdir=/u", "container"),
        ("overlay", "rw,lowerdir=/l,upperdir=/mem/u", "raspi-config"),
    ],
)
def test_what_a_file_system_does_with_what_is_synced(board: Board, kind: str, options: str, told: str) -> None:
    board.mount(kind, options, "41 30 0:5 / /mem rw - tmpfs none rw\n")
    one = board.only("state folder")
    assert f"on {kind}" in one.text
    assert (one.grade, told in one.text) == ("warning" if told else "fine", True)
    assert bool(one.fix) == bool(told)


def test_the_innermost_mount_counts_and_blanks_are_read(tmp_path: Path) -> None:
    inner = tmp_path / "a b" / "c"
    inner.mkdir(parents=True)
    odd = str(tmp_path / "a b").replace(" ", "\\040")
    lines = [f"1 0 8:1 / / rw - ext4 x rw\n2 1 8:1 / {tmp_path} rw - xfs x rw\n3 1 8:1 / {tmp_path}/a rw - vfat x rw\n"]
    lines += [f"4 1 8:1 / {odd} rw - tmpfs x rw\n5 1 8:1 / {odd} rw - f2fs x rw\nbroken - line\n"]
    files = Files(fake.put(tmp_path / "root", "proc/self/mountinfo", "".join(lines)))
    found = [mounts.of(path, files) for path in ("/", tmp_path, tmp_path / "ab", inner)]
    assert [one.kind for one in found if one is not None] == ["ext4", "xfs", "xfs", "f2fs"]
    (tmp_path / "link").symlink_to(inner)
    assert mounts.of(tmp_path / "link", files) == found[3]
    assert mounts.of("/", Files(tmp_path / "none")) is None


def test_a_state_folder_that_is_not_there(board: Board) -> None:
    board.state.rmdir()
    assert "is made in" in board.only("state folder").text
    board.text = board.text.replace("/state", "/no/such/state", 1)
    one = board.only("state folder")
    assert (one.grade, "nothing can be kept" in one.text) == ("fault", True)
    (board.place / "no").write_bytes(b"")
    assert board.only("state folder").grade == "fault"
    (board.place / "file").write_bytes(b"")
    board.text = board.text.replace("/no/such/state", "/file")
    assert "is no folder" in board.only("state folder").text


def test_a_state_folder_of_which_others_own_a_part(board: Board) -> None:
    board.install()
    assert board.only("state folder").grade == "fine"
    if os.geteuid() != 0:
        return  # nobody else can give files away
    os.chown(board.state, 54321, 54321)
    one = board.worst("state folder")
    assert one.grade == "warning"
    assert "belong to user root" in one.text
    assert one.fix == f"sudo chown -R --reference={board.state}/ {board.state}/"
    for path in board.state.rglob("*"):
        os.chown(path, 54321, 54321)
    assert board.only("state folder").grade == "fine"


def test_a_unit_and_a_state_folder_of_ones_own(board: Board) -> None:
    board.state.chmod(0o755)
    board.unit()
    one = board.worst("state folder")
    assert one.grade == "fault"
    assert "the user that systemd makes may not write there" in one.text
    assert "--user NAME" in one.fix
    board.state.chmod(0o777)
    assert board.worst("state folder").grade == "fine"


def test_room(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    board.install()
    assert "saving takes up to" in board.only("room").text
    free = [0]

    def storage(path: object) -> Any:
        return SimpleNamespace(free=free[0], refused="")

    monkeypatch.setattr(folder, "storage", storage)
    assert board.worst("room").grade == "fault"
    assert "it is not kept" in board.worst("room").text
    free[0] = 8 << 20
    assert board.only("room").grade == "warning"
    assert "not for another bundle" in board.only("room").text
    free[0] = 40 << 20
    assert board.only("room").grade == "fine"
    board.text += "[frames]\nkeep = 10\n"
    assert "they may leave no room" in board.worst("room").text
    assert board.worst("room", "frames.most=1048576").grade == "fine"
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=100, f_favail=0, f_bavail=10**6, f_frsize=4096, f_flag=0))
    assert "inodes" in board.worst("room").text


def test_frames_that_go_meanwhile(board: Board) -> None:
    board.install()
    board.text += "[frames]\nkeep = 10\nmost = 1048576\n"
    kept = board.state / "frames"
    kept.mkdir()
    (kept / "frame-1.npz").symlink_to(kept / "gone")
    assert board.worst("room").grade == "fine"


# ------------------------------------------------------------------------------------------------------------ the bundle and its budget


def test_no_bundle(board: Board) -> None:
    one = board.only("bundle")
    assert (one.grade, one.fix) == ("fault", f"sudo edgeadapt install model.edgeadapt --config {board.file}")
    assert not board.look().able
    board.state.rmdir()
    assert board.only("bundle").grade == "fault"
    assert not board.found("budget")


def test_an_installed_bundle_is_told_and_checked_wholly(board: Board) -> None:
    board.install()
    one = board.only("bundle")
    assert one.grade == "fine"
    assert "on trial" in one.text
    (path,) = (board.state / "bundles").rglob("*.edgeadapt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    one = board.only("bundle")
    assert (one.grade, one.text.endswith("no frame is answered")) == ("fault", True)
    for name in ("pointer.a", "pointer.b"):
        (board.state / name).write_bytes(b"rubbish\n")
    assert "which one is installed cannot be read" in board.only("bundle").text


def test_a_damaged_bundle_with_one_before_it(board: Board) -> None:
    board.install()
    Toy(width=5, depth=0, batches=(1,), method="norm").write(board.bundle)
    with Store.open(board.state, Limits(spare=0, probation=0.0)) as store:
        store.begin_boot()
        store.settled()
        store.install(board.bundle)
        digest = store.now.active.digest if store.now.active else ""
    (board.state / "bundles" / digest[:16] / "model.edgeadapt").unlink()
    one = board.only("bundle")
    assert one.grade == "warning"
    assert "begins with the one before" in one.text


def test_starts_that_did_not_prove_themselves(board: Board) -> None:
    board.install()
    with Store.open(board.state, Limits(spare=0)) as store:
        for _ in range(2):
            store.begin_boot()
    assert "2 starts in a row did not prove themselves; after 3" in board.worst("bundle").text


def test_signatures(board: Board) -> None:
    signing.keygen(board.place / "fleet")
    board.install()
    board.text += f'[bundle]\nrequire_signature = true\nkeys = ["{board.place}/fleet.pub"]\n'
    one = board.only("bundle")
    assert (one.grade, "is not signed" in one.text) == ("fault", True)
    shutil.rmtree(board.state)
    board.state.mkdir()
    signing.sign(board.bundle, board.place / "fleet.key")
    with Store.open(board.state, Limits(spare=0), [board.place / "fleet.pub"], serving=False) as store:
        store.install(board.bundle)
    assert "signed by a key that is trusted" in board.only("bundle").text


def test_a_bundle_that_the_configuration_names(board: Board) -> None:
    board.text += f'[bundle]\npath = "{board.bundle}"\n'
    assert "as bundle.path names it" in board.only("bundle").text
    signing.keygen(board.place / "fleet")
    signed = ["bundle.require_signature=true", f"bundle.keys=['{board.place}/fleet.pub']"]
    assert (board.only("bundle", *signed).grade, "is not signed" in board.only("bundle", *signed).text) == ("fault", True)
    board.bundle.chmod(0o600)
    board.unit()
    one = board.worst("bundle")
    assert (one.grade, "may not read it" in one.text) == ("fault", True)
    board.bundle.unlink()
    assert board.only("bundle").grade == "fault"


def takes(found: Found) -> int:
    """MiB by the plan, rounded up."""
    match = re.search(r"takes ([0-9.]+) MiB by the plan", found.text)
    assert match is not None, found
    return math.ceil(float(match[1]))


def test_the_budget_counts_what_is_beside_the_model(board: Board) -> None:
    board.install()
    free = board.only("budget")
    assert "nothing bounds it" in free.text
    assert "adapt at batch 4 takes" in free.text
    enough = f"memory.budget={takes(free) + 1}MiB"
    assert board.only("budget", enough).grade == "fine"
    more = board.only("budget", enough, "http.enabled=true", "mqtt.enabled=true", "mqtt.host=x")
    assert takes(more) > takes(free) + 8, "what HTTP and MQTT take is the budget's as well"
    assert more.grade == "fault"
    assert f"more than memory.budget ({takes(free) + 1} MiB)" in more.text
    assert "edgeadapt simulate" in more.fix


def test_a_budget_that_is_only_enough_to_predict(board: Board) -> None:
    ShapedToy(width=64, depth=3, batches=(1, 256)).write(board.bundle, reference=Reference(256, 2.0, 1.0, {"norm": Chance(0.5, 1.0)}))
    board.install()
    predicting = takes(board.only("budget", "adapt.enabled=false"))
    found = [board.only("budget", f"memory.budget={size}MiB") for size in (predicting - 8, predicting + 2, 512)]
    assert [one.grade for one in found] == ["fault", "fault", "fine"]
    assert "not even predicting fits" in found[0].text
    assert "the daemon would only predict, as it was exported" in found[1].text
    assert board.only("budget", f"memory.budget={predicting + 2}MiB", "adapt.enabled=false").grade == "fine"


def test_a_budget_that_this_machine_has_not(board: Board) -> None:
    board.install()
    one = board.only("budget", "memory.budget=64GiB")
    assert (one.grade, "that are usable now" in one.text) == ("warning", True)


# ------------------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def doctor(board: Board, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    look = machines.look
    monkeypatch.setattr(machines, "look", lambda: look(board.root, board.place / "cache", FLOOR))

    def run(*arguments: str) -> tuple[int, str]:
        code = main.main(["doctor", *arguments])
        return code, capsys.readouterr().out

    return run


def test_the_command(board: Board, doctor: Callable[..., tuple[int, str]]) -> None:
    code, text = doctor("--config", str(board.file))
    assert code == 1
    assert f"what the daemon needs, by {board.file}" in text
    assert "  !   bundle         none is installed" in text
    assert text.rstrip().endswith("the daemon could not do its work here until what is marked ! is mended")
    assert all(len(line) <= 118 and line == line.rstrip() for line in text.splitlines() if str(board.place) not in line)
    board.install()
    code, text = doctor("--config", str(board.file))
    assert code == 0
    assert "  ok  bundle" in text
    assert "could not do its work" not in text
    code, text = doctor("--config", str(board.file), "--set", "memory.budget=32MiB")
    assert code == 1


def test_as_json(board: Board, doctor: Callable[..., tuple[int, str]]) -> None:
    code, text = doctor("--json", "--config", str(board.file))
    found = json.loads(text)["daemon"]
    assert code == 1
    assert found["able"] is False
    assert found["config"] == str(board.file)
    (bundle,) = [one for one in found["findings"] if one["subject"] == "bundle"]
    assert bundle["grade"] == "fault"
    assert bundle["text"].startswith("none is installed")
    assert bundle["fix"].startswith("sudo edgeadapt install")


def test_by_itself_where_the_file_is_there(board: Board, doctor: Callable[..., tuple[int, str]]) -> None:
    assert "what the daemon needs" not in doctor()[1]
    assert json.loads(doctor("--json")[1])["daemon"] is None
    (board.place / "default.toml").write_text(board.text)
    code, text = doctor()
    assert (code, "what the daemon needs" in text) == (1, True)
    assert "sudo edgeadapt install model.edgeadapt\n" in text
    code, text = doctor("--no-config")
    assert (code, "what the daemon needs" in text) == (0, False)
    assert main.main(["doctor", "--no-config", "--config", "x"]) == 2
    code, text = doctor("--config", str(board.place / "none.toml"))
    assert (code, "  !   configuration" in text) == (1, True)


def test_the_mode_of_what_belongs_to_somebody_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"")
    path.chmod(0o640)
    assert who.belongs(path).endswith(f", {stat.filemode(path.stat().st_mode)}")
    assert who.belongs(tmp_path / "none") == "unknown"
