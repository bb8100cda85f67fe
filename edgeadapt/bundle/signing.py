"""Signatures of bundles: ed25519, in a file of their own beside the bundle, so that a device takes only what its owner has signed.

What is signed is the bundle's digest, which covers all of its bytes, behind a line that says what it is a signature of: it can pass for nothing else.
Needs the package cryptography, loaded when it is used (pip install edgeadapt[sign]).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt import plainfile
from edgeadapt.bundle import atomic
from edgeadapt.bundle.container import Bundle
from edgeadapt.bundle.digest import sha256
from edgeadapt.bundle.reading import Node, parse
from edgeadapt.errors import BundleError, InputError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FORMAT = 1
ENDING = ".sig"
_PREFIX = b"edgeadapt bundle signature, format 1\n"
_LARGEST = 64 * 2**10


def beside(path: str | os.PathLike[str]) -> Path:
    """Where the signature of a bundle is."""
    return Path(f"{os.fspath(path)}{ENDING}")


def keygen(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Makes a pair of keys: a private one in `path`.key, which only its owner can read, and the public one in `path`.pub, both PEM.

    Raises:
        UsageError: one is there already, or cryptography is not installed.
        InputError: they cannot be written.
    """
    serialization, ed25519 = _cryptography()
    private, public = Path(f"{os.fspath(path)}.key"), Path(f"{os.fspath(path)}.pub")
    if found := [file for file in (private, public) if os.path.lexists(file)]:
        raise UsageError(f"{found[0]} is there already", "take another name: a key that was used is not to be lost")
    made = ed25519.Ed25519PrivateKey.generate()
    secret = made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    known = made.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for file, data, mode in ((private, secret, 0o600), (public, known, 0o644)):
        try:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as open_file:
                open_file.write(data)
        except OSError as reason:
            raise InputError(f"{file} cannot be written: {reason.strerror}", "name a file in a folder that can be written") from None
    return private, public


def sign(bundle_path: str | os.PathLike[str], private_key_path: str | os.PathLike[str]) -> Path:
    """Signs a bundle, every byte of which is checked first; gives the signature's file, beside the bundle.

    Raises:
        BundleError: the bundle is missing or damaged.
        InputError: the key cannot be used, or the signature not be written.
        UsageError: cryptography is not installed.
    """
    key = _private(Path(private_key_path))
    bundle = Bundle.open(bundle_path)
    plain = {"format": FORMAT, "digest": bundle.digest, "key": _name(key.public_key()), "signature": key.sign(_message(bundle.digest)).hex()}
    path = beside(bundle_path)
    try:
        with atomic.replacing(path) as (file, _):
            file.write((json.dumps(plain, indent=1) + "\n").encode())
    except OSError as reason:
        raise InputError(f"{path} cannot be written: {reason.strerror}", "sign the bundle in a folder that can be written") from None
    return path


def check(bundle_path: str | os.PathLike[str], keys: Sequence[str | os.PathLike[str]]) -> Bundle:
    """Opens a bundle, every byte checked, that one of these keys has signed.

    Args:
        bundle_path: the bundle; its signature is beside it.
        keys: files of public keys, PEM.

    Raises:
        BundleError: the bundle is missing or damaged, is not signed, or none of the keys has signed it.
        InputError: a key cannot be used.
        UsageError: there are no keys, or cryptography is not installed.
    """
    if not keys:
        raise UsageError("a signature is asked for, and there is no key to check it with", "name a public key, as edgeadapt keygen makes them")
    public = [_public(Path(path)) for path in keys]
    bundle = Bundle.open(bundle_path)
    path = beside(bundle_path)
    name, signature = _read(path, bundle)
    for key in public:
        if _name(key) == name:
            _verify(key, signature, bundle, path)
            return bundle
    known = ", ".join(_name(key) for key in public)
    raise BundleError(f"{bundle_path} is signed by the key {name}, which is none of those that are trusted here: {known}", _FIX)


_FIX = "sign it with the key that belongs to one of these: edgeadapt sign model.edgeadapt --key NAME.key"


def _read(path: Path, bundle: Bundle) -> tuple[str, bytes]:
    """The name of the key, and its signature."""
    try:
        with plainfile.opened(path) as file:
            data = file.read(_LARGEST)
    except FileNotFoundError:
        raise BundleError(f"{str(path).removesuffix(ENDING)} is not signed: there is no {path.name} beside it", _FIX) from None
    except OSError as reason:
        raise BundleError(f"{path} cannot be read: {reason.strerror}", "check its permissions") from None
    form, digest, name, signature = _parsed(data, path)
    if form != FORMAT:
        raise BundleError(f"{path} has signature format {form}, this reads {FORMAT}", "upgrade edgeadapt on this machine")
    if digest != bundle.digest:
        raise BundleError(f"{path} is the signature of another bundle ({digest[:12]}, this one is {bundle.digest[:12]})", _FIX)
    return name, bytes.fromhex(signature)


def _parsed(data: bytes, path: Path) -> tuple[int, str, str, str]:
    """Format, digest, key and signature; of another format nothing but that."""
    try:
        node = Node(parse(data, str(path)), str(path))
        if (form := node.child("format").integer(1)) != FORMAT:
            return form, "", "", ""
        node.keys({"format", "digest", "key", "signature"})
        return form, node.child("digest").text("[0-9a-f]{64}"), node.child("key").text("[0-9a-f]{64}"), node.child("signature").text("[0-9a-f]{128}")
    except BundleError as fault:
        raise BundleError(fault.message, _FIX) from None


def _verify(key: Ed25519PublicKey, signature: bytes, bundle: Bundle, path: Path) -> None:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, _message(bundle.digest))
    except InvalidSignature:
        raise BundleError(f"{path} is no signature of {bundle.path.name}: it was changed", _FIX) from None


def _message(digest: str) -> bytes:
    return _PREFIX + bytes.fromhex(digest)


def _name(key: Ed25519PublicKey) -> str:
    return sha256(key.public_bytes_raw()).hexdigest()


def _private(path: Path) -> Ed25519PrivateKey:
    serialization, ed25519 = _cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        key = serialization.load_pem_private_key(_pem(path), None)
    except TypeError:
        raise InputError(f"{path} is encrypted with a passphrase", "decrypt it first: openssl pkey -in KEY -out PLAIN") from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"{path} is no private ed25519 key in PEM", "make one with edgeadapt keygen")
    return key


def _public(path: Path) -> Ed25519PublicKey:
    serialization, ed25519 = _cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        key = serialization.load_pem_public_key(_pem(path))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise InputError(f"{path} is no public ed25519 key in PEM", "take the .pub file that edgeadapt keygen has made")
    return key


def _pem(path: Path) -> bytes:
    try:
        with plainfile.opened(path) as file:
            return file.read(_LARGEST)
    except OSError as reason:
        raise InputError(f"{path} cannot be read: {reason.strerror}", "check the path and its permissions") from None


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UsageError("signatures need the package cryptography, which is not installed", "pip install 'edgeadapt[sign]'") from None
    return serialization, ed25519
