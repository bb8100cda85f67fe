"""`edgeadapt install`: where to and what must be signed by the daemon's configuration, and whose is what it writes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from edgeadapt.bundle import Bundle, signing
from edgeadapt.cli.main import main
from edgeadapt.errors import ConfigError
from edgeadapt.runtime.daemon import config
from edgeadapt.runtime.daemon.store import Store, disk
from edgeadapt.runtime.daemon.store.folder import _locked
from tests.stored import LIMITS, Daemon, Files

pytestmark = pytest.mark.device

SOMEBODY = (54321, 54322)
"""A user and a group that are not ours."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No settings in the environment, and no file of the machine's own."""
    for name in [name for name in os.environ if name.startswith("EDGEADAPT_") and "__" in name]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "default.toml"))
    return tmp_path


def installed(folder: Path) -> list[str]:
    """The bundles in a state folder, by the beginning of their digests."""
    return sorted(path.name for path in (folder / "bundles").iterdir()) if (folder / "bundles").is_dir() else []


def name_of(path: Path) -> str:
    return Bundle.open(path).digest[:16]


# ------------------------------------------------------------------------------------------------------------- by the configuration


def test_the_state_folder_is_the_configured_one(place: Path, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "default.toml").write_text('state.folder = "by default"\n')
    (place / "e.toml").write_text('state.folder = "named"\n')
    assert main(["install", str(files.paths["a"])]) == 0
    assert installed(place / "by default") == [name_of(files.paths["a"])]
    assert main(["install", str(files.paths["b"]), "--config", str(place / "e.toml")]) == 0
    assert installed(place / "named") == [name_of(files.paths["b"])]
    assert main(["install", str(files.paths["c"]), "--config", str(place / "e.toml"), "--state", str(place / "given")]) == 0
    assert installed(place / "given") == [name_of(files.paths["c"])]
    assert main(["install", str(files.paths["c"]), "--set", f"state.folder={place / 'set'}"]) == 0
    assert installed(place / "set") == [name_of(files.paths["c"])]
    assert len(installed(place / "by default")) == len(installed(place / "named")) == 1
    assert main(["install", "--undo", "--config", str(place / "e.toml")]) == 7
    assert "served instead" not in capsys.readouterr().out


def test_bundles_must_be_signed_where_the_configuration_says_so(place: Path, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Path(shutil.copy(files.paths["a"], place / "a.edgeadapt"))
    for name in ("ours", "theirs"):
        signing.keygen(place / name)
    (place / "default.toml").write_text('state.folder = "state"\n[bundle]\nrequire_signature = true\nkeys = ["ours.pub"]\n')
    assert main(["install", str(bundle)]) == 4
    assert "is not signed" in capsys.readouterr().err
    signing.sign(bundle, place / "theirs.key")
    assert main(["install", str(bundle)]) == 4
    assert main(["install", str(bundle), "--key", str(place / "theirs.pub")]) == 0, "what is given wins"
    signing.beside(bundle).unlink()
    signing.sign(bundle, place / "ours.key")
    shutil.rmtree(place / "state")
    assert main(["install", str(bundle)]) == 0
    assert signing.beside(place / "state/bundles" / name_of(bundle) / "model.edgeadapt").is_file()
    (place / "default.toml").write_text('state.folder = "other"\n[bundle]\nkeys = ["ours.pub"]\n')
    signing.beside(bundle).unlink()
    assert main(["install", str(bundle)]) == 0, "keys alone ask for no signature, as the daemon has it"


@pytest.mark.parametrize("text", ["state.foldr = 'x'", "[bundle]\nrequire_signature = true", "= 1"])
def test_a_faulty_configuration_installs_nothing(place: Path, files: Files, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (place / "default.toml").write_text(text)
    assert main(["install", str(files.paths["a"]), "--state", str(place / "state")]) == ConfigError.exit_code
    said = capsys.readouterr().err
    assert said.startswith(f"edgeadapt: error: {place}/default.toml")
    assert "  fix: " in said
    assert not (place / "state").exists()
    assert main(["install", str(files.paths["a"]), "--config", str(place / "none.toml")]) == ConfigError.exit_code


def test_another_bundle_that_is_served_is_told(place: Path, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "default.toml").write_text('state.folder = "state"\nbundle.path = "mine.edgeadapt"\n')
    for arguments in ([str(files.paths["a"])], [str(files.paths["a"])], [str(files.paths["b"])], ["--undo"]):
        assert main(["install", *arguments]) == 0
        assert f"names another bundle, {place}/mine.edgeadapt, which is served instead" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------- whose it is


@pytest.fixture
def theirs(place: Path) -> Path:
    """A state folder of somebody else, where we may make one: only root may."""
    folder = place / "state"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, *SOMEBODY)
    return folder


def whose() -> tuple[int, int]:
    """The user and group that all that is written there should belong to."""
    return SOMEBODY if os.geteuid() == 0 else (os.geteuid(), os.getegid())


def owners(folder: Path) -> dict[tuple[int, int], list[str]]:
    """What is in a folder, by whose it is."""
    found: dict[tuple[int, int], list[str]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.setdefault((status.st_uid, status.st_gid), []).append(str(path.relative_to(folder)))
    return found


def test_what_root_installs_belongs_to_whom_the_folder_belongs(theirs: Path, files: Files, capfd: pytest.CaptureFixture[str]) -> None:
    state = ["--state", str(theirs)]
    for arguments in ([str(files.paths["a"])], [str(files.paths["b"])], ["--undo"], [str(files.paths["c"])]):
        before = os.umask(0o077)
        try:
            assert main(["install", *arguments, *state]) == 0
        finally:
            os.umask(before)
        found = owners(theirs)
        assert set(found) == {whose()}, found
    assert {"bundles", "history.jsonl", "lock", "pointer.a", "pointer.b"} <= set(found[whose()])
    assert capfd.readouterr().err == ""


def test_a_signature_too(place: Path, theirs: Path, files: Files) -> None:
    bundle = Path(shutil.copy(files.paths["a"], place / "a.edgeadapt"))
    signing.sign(bundle, signing.keygen(place / "fleet")[0])
    assert main(["install", str(bundle), "--state", str(theirs), "--key", str(place / "fleet.pub")]) == 0
    assert set(owners(theirs)) == {whose()}
    assert len(list(theirs.rglob("*.sig"))) == 1


def test_their_daemon_removes_what_root_installed(theirs: Path, files: Files, place: Path) -> None:
    for name in ("a", "b"):
        assert main(["install", str(files.paths[name]), "--state", str(theirs)]) == 0
    first, third = name_of(files.paths["a"]), Path(shutil.copy(files.paths["c"], place / "c.edgeadapt"))
    if os.geteuid() == 0:
        for path in (place, *place.parents):
            if path.stat().st_uid == 0 and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o055)
        os.setegid(SOMEBODY[1])
        os.seteuid(SOMEBODY[0])
    try:
        daemon = Daemon(theirs, files)
        with daemon.store:
            assert daemon.boot()[0] == "b"
            daemon.proven(1)
            daemon.store.install(third)
            daemon.boot()
            assert daemon.store.degraded == ""
        assert first not in installed(theirs)
        assert len(installed(theirs)) == 2
    finally:
        os.seteuid(os.getuid())
        os.setegid(os.getgid())


def test_what_a_daemon_of_root_writes_is_theirs_as_well(theirs: Path, files: Files) -> None:
    daemon = Daemon(theirs, files)
    with daemon.store:
        daemon.store.install(files.paths["a"])
        daemon.boot()
        daemon.proven(1)
        daemon.commit(2)
    assert set(owners(theirs)) == {whose()}
    assert len(list((theirs / "slots").rglob("*.safetensors"))) == 2


def test_only_what_was_written_is_given_and_no_link_is_followed(place: Path, theirs: Path, files: Files) -> None:
    """Who owns the folder may have put links there; and what root wrote elsewhere, or before, is not theirs."""
    targets = [place / "history target", place / "lock target"]
    for target in targets:
        target.write_text("precious\n")
        target.chmod(0o644)
    (theirs / "history.jsonl").symlink_to(targets[0])
    (theirs / "lock").symlink_to(targets[1])
    (theirs / "note").write_text("of the administrator\n")
    (place / "elsewhere").mkdir()
    (theirs / "bundles").symlink_to(place / "elsewhere")
    before = {path: path.lstat() for path in (*targets, theirs / "note", theirs / "history.jsonl", place / "elsewhere")}
    assert main(["install", str(files.paths["a"]), "--state", str(theirs)]) == 0
    for path, status in before.items():
        assert (path.lstat().st_uid, path.lstat().st_gid) == (status.st_uid, status.st_gid), path
    assert all(target.read_text() == "precious\n" for target in targets)
    with Store.open(theirs, LIMITS, serving=False) as store:
        assert store.read().active is not None
    with pytest.raises(OSError, match="symbolic links"):
        _locked(theirs, disk.Owner(theirs))


def test_a_link_is_given_itself_and_not_what_it_points_to(place: Path, theirs: Path) -> None:
    (place / "target").write_text("x")
    (place / "link").symlink_to(place / "target")
    before = (place / "target").stat()
    disk.Owner(theirs).take(place / "link")
    assert ((place / "target").stat().st_uid, (place / "target").stat().st_gid) == (before.st_uid, before.st_gid)
    if os.geteuid() == 0:
        assert ((place / "link").lstat().st_uid, (place / "link").lstat().st_gid) == SOMEBODY


def test_a_file_system_that_knows_no_owners_is_told_and_does_no_harm(
    theirs: Path, files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*given: object, **named: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refused)
    monkeypatch.setattr(os, "chown", refused)
    assert main(["install", str(files.paths["a"]), "--state", str(theirs)]) == 0
    assert installed(theirs) == [name_of(files.paths["a"])]
    assert ("cannot be given to user 54321" in caplog.text) == (os.geteuid() == 0)
