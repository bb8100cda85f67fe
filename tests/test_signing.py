"""Signatures of bundles: what is accepted, and above all what is not."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from edgeadapt.bundle import Bundle, signing
from edgeadapt.cli.main import main
from edgeadapt.errors import BundleError, InputError, UsageError
from edgeadapt.runtime.daemon.store import Limits, Store, disk
from tests.stored import Files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pairs ours and other."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "other"):
        signing.keygen(folder / name)
    return folder


@pytest.fixture
def signed(tmp_path: Path, files: Files, keys: Path) -> Path:
    path = tmp_path / "a.edgeadapt"
    shutil.copy(files.paths["a"], path)
    assert signing.sign(path, keys / "ours.key") == tmp_path / "a.edgeadapt.sig"
    return path


def test_what_is_signed_is_accepted_by_its_key_among_others(signed: Path, keys: Path) -> None:
    for trusted in ([keys / "ours.pub"], [keys / "other.pub", keys / "ours.pub"]):
        assert signing.check(signed, trusted).digest == Bundle.open(signed).digest


def test_the_signature_is_of_the_digest_behind_a_line_that_says_so(signed: Path, keys: Path) -> None:
    """Checked with cryptography alone, as somebody else would."""
    said = json.loads(signing.beside(signed).read_text())
    key = serialization.load_pem_public_key((keys / "ours.pub").read_bytes())
    assert isinstance(key, ed25519.Ed25519PublicKey)
    key.verify(bytes.fromhex(said["signature"]), b"edgeadapt bundle signature, format 1\n" + bytes.fromhex(Bundle.open(signed).digest))
    assert said["digest"] == Bundle.open(signed).digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path, files: signing.beside(path).unlink(), "is not signed"),
        (lambda path, files: shutil.copy(files.paths["b"], path), "the signature of another bundle"),
        (lambda path, files: path.write_bytes(path.read_bytes()[:-1] + b"x"), "a.edgeadapt"),
        (lambda path, files: altered(path, digest=Bundle.open(files.paths["b"]).digest), "the signature of another bundle"),
        (lambda path, files: altered(path, signature="0" * 128), "was changed"),
        (lambda path, files: altered(path, format=2), "format 2, this reads 1"),
        (lambda path, files: altered(path, more=1), "not known"),
        (lambda path, files: altered(path, key="0" * 64), "none of those that are trusted"),
    ],
)
def test_what_is_not_right_is_refused(signed: Path, files: Files, keys: Path, change: Callable[[Path, Files], object], said: str) -> None:
    change(signed, files)
    with pytest.raises(BundleError, match=said):
        signing.check(signed, [keys / "ours.pub"])


def altered(path: Path, **values: Any) -> None:
    file = signing.beside(path)
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_another_key_is_refused_even_if_it_pretends_to_be_ours(signed: Path, keys: Path) -> None:
    ours = json.loads(signing.beside(signed).read_text())["key"]
    signing.sign(signed, keys / "other.key")
    with pytest.raises(BundleError, match="none of those that are trusted"):
        signing.check(signed, [keys / "ours.pub"])
    altered(signed, key=ours)
    with pytest.raises(BundleError, match="was changed"):
        signing.check(signed, [keys / "ours.pub"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=some.data())
def test_any_signature_file_is_refused_or_the_one_that_was_made(signed: Path, keys: Path, data: Any) -> None:
    file = signing.beside(signed)
    whole = file.read_bytes()
    torn = bytearray(whole)
    torn[data.draw(some.integers(0, len(torn) - 1))] ^= data.draw(some.integers(1, 255))
    file.write_bytes(data.draw(some.sampled_from([bytes(torn), bytes(torn[: len(torn) // 2]), data.draw(some.binary(max_size=50))])))
    changed = file.read_bytes()
    try:
        signing.check(signed, [keys / "ours.pub"])
    except BundleError:
        return
    finally:
        file.write_bytes(whole)
    assert json.loads(changed) == json.loads(whole)


def test_keys_are_made_once_and_the_private_one_is_private(tmp_path: Path) -> None:
    private, public = signing.keygen(tmp_path / "x")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert b"PRIVATE" not in public.read_bytes()
    before = private.read_bytes()
    with pytest.raises(UsageError, match="is there already"):
        signing.keygen(tmp_path / "x")
    private.unlink()
    with pytest.raises(UsageError, match="is there already"):
        signing.keygen(tmp_path / "x")
    assert not private.exists()
    assert before
    with pytest.raises(InputError, match="cannot be written"):
        signing.keygen(tmp_path / "no" / "x")


def test_what_is_no_key_is_told(signed: Path, keys: Path, tmp_path: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "curve.key").write_bytes(other.private_bytes(pem, form, serialization.NoEncryption()))
    (tmp_path / "curve.pub").write_bytes(other.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    ours = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "locked.key").write_bytes(ours.private_bytes(pem, form, serialization.BestAvailableEncryption(b"x")))
    (tmp_path / "rubbish").write_bytes(b"rubbish")
    for name, said in (("curve.key", "no private ed25519"), ("locked.key", "passphrase"), ("rubbish", "no private"), ("none", "cannot be read")):
        with pytest.raises(InputError, match=said):
            signing.sign(signed, tmp_path / name)
    with pytest.raises(InputError, match="no private"):
        signing.sign(signed, keys / "ours.pub")
    for path in (tmp_path / "curve.pub", tmp_path / "rubbish", keys / "ours.key"):
        with pytest.raises(InputError, match="no public ed25519"):
            signing.check(signed, [path])
    with pytest.raises(UsageError, match="no key to check it with"):
        signing.check(signed, [])


def test_without_cryptography_it_is_said_what_to_install(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(UsageError, match="not installed") as told:
        signing.check(signed, [keys / "ours.pub"])
    assert "edgeadapt[sign]" in told.value.hint


def test_a_store_with_keys_installs_and_starts_only_what_is_signed(signed: Path, files: Files, keys: Path, tmp_path: Path) -> None:
    limits, trusted = Limits(spare=0, boots=2), [keys / "ours.pub"]
    with Store.open(tmp_path / "state", limits, trusted) as store:
        with pytest.raises(BundleError, match="is not signed"):
            store.install(files.paths["b"])
        assert not list((tmp_path / "state").rglob("model*"))
        found = store.install(signed)
        assert signing.beside(found.path).read_bytes() == signing.beside(signed).read_bytes()
        assert store.begin_boot().bundle == found.path
        with pytest.raises(BundleError, match="is not signed"):
            store.begin_boot(files.paths["b"])
    with Store.open(tmp_path / "state", limits) as store:  # what was installed before signatures were asked for
        store.settled() if store._bundle else store.begin_boot()
        store.mark_good()
        store.install(files.paths["b"])
        assert files.names[store.begin_boot().installed.digest] == "b"
    with Store.open(tmp_path / "state", limits, trusted) as store:
        boot = store.begin_boot()
        assert files.names[boot.installed.digest] == "a"
        assert "is not signed" in boot.why
        os.unlink(signing.beside(found.path))
        assert store.install(signed).again, "which brings the signature anew"
        assert files.names[store.begin_boot().installed.digest] == "a"


def linked(signed: Path, files: Files, other: str | None) -> Path:
    """A link to a bundle with the signature beside the link; beside the bundle itself none, or that of another one."""
    link = signed.with_name("latest.edgeadapt")
    link.symlink_to(signed)
    signing.beside(signed).rename(signing.beside(link))
    if other is not None:
        theirs = Path(shutil.copy(files.paths[other], signed.with_name("other.edgeadapt")))
        signing.sign(theirs, signed.parent / "mine.key").rename(signing.beside(signed))
    return link


@pytest.mark.parametrize("other", [None, "b"])
def test_through_a_link_what_was_checked_is_what_is_copied(signed: Path, files: Files, keys: Path, tmp_path: Path, other: str | None) -> None:
    signing.keygen(tmp_path / "mine")
    link = linked(signed, files, other)
    with Store.open(tmp_path / "state", Limits(spare=0), [keys / "ours.pub"]) as store:
        found = store.install(link)
        assert signing.beside(found.path).read_bytes() == signing.beside(link).read_bytes()
        assert files.names[store.begin_boot().installed.digest] == "a"
    signing.beside(link).unlink()
    with pytest.raises(BundleError, match=r"latest\.edgeadapt is not signed: there is no latest\.edgeadapt\.sig beside it"):
        signing.check(link, [keys / "ours.pub"])


@pytest.mark.parametrize("how", ["another", "gone"])
def test_a_signature_that_changes_while_it_is_copied_installs_nothing(
    signed: Path, files: Files, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    make = disk.make

    def swapped(folder: Path, owner: disk.Owner) -> None:
        make(folder, owner)
        if how == "another":
            signing.sign(signed, keys / "other.key")
        else:
            signing.beside(signed).unlink(missing_ok=True)

    with Store.open(tmp_path / "state", Limits(spare=0), [keys / "ours.pub"]) as store:
        monkeypatch.setattr(disk, "make", swapped)
        with pytest.raises(BundleError, match=r"a\.edgeadapt\.sig (was replaced while it was copied|cannot be read: No such file)") as told:
            store.install(signed)
        assert told.value.hint == "install it again"
        assert store.read().active is None


def test_a_pipe_in_the_place_of_a_signature_or_a_key_is_not_waited_for(signed: Path, keys: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="it is not a file"):
        signing.check(signed, [tmp_path / "pipe"])
    signing.beside(signed).unlink()
    os.mkfifo(signing.beside(signed))
    with pytest.raises(BundleError, match="it is not a file"):
        signing.check(signed, [keys / "ours.pub"])


def test_from_the_command_line(signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", str(tmp_path / "mine")]) == 0
    assert "mine.key" in capsys.readouterr().out
    state = ["--state", str(tmp_path / "state")]
    assert main(["install", str(signed), "--key", str(tmp_path / "mine.pub"), *state]) == 4
    assert main(["sign", str(signed), "--key", str(tmp_path / "mine.key")]) == 0
    assert "a.edgeadapt.sig" in capsys.readouterr().out
    assert main(["install", str(signed), "--key", str(tmp_path / "mine.pub"), *state]) == 0
