"""The token that changes over HTTP are allowed with."""

from __future__ import annotations

import os
import re
import stat
from hmac import compare_digest
from http import HTTPStatus
from pathlib import Path

from edgeadapt.errors import UsageError
from edgeadapt.runtime.daemon.web.refusals import Refusal

SHORTEST, _LONGEST = 16, 512
"""Characters of a token, at least; bytes of its file, at most."""

_MAKE = "make one: (umask 077; head -c 24 /dev/urandom | base64 > {path}), and chown it to the daemon's user"


def read_token(path: str | os.PathLike[str]) -> bytes:
    """The token in a file: one line of 16 printable characters or more, without blanks.

    Raises:
        UsageError: the file cannot be read, can be read or written by everybody, or holds no such line.
    """
    path = Path(path)
    hint = _MAKE.format(path=path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as reason:
        raise UsageError(f"http.token_file {path} cannot be read: {reason.strerror}", hint) from None
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise UsageError(f"http.token_file {path} is no file", hint)
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            raise UsageError(f"http.token_file {path} can be read or written by everybody", f"chmod o= {path}, and write a new token into it")
        held = os.read(handle, _LONGEST + 1)
    finally:
        os.close(handle)
    token = held.removesuffix(b"\n").removesuffix(b"\r")
    if not re.fullmatch(rb"[!-~]{%d,%d}" % (SHORTEST, _LONGEST), token):
        raise UsageError(f"http.token_file {path} holds no token: one line of {SHORTEST} printable characters or more, without blanks", hint)
    return token


def matches(given: str | None, token: bytes) -> bool:
    """Whether a header Authorization has the token; takes as long for a wrong one as for the right one."""
    scheme, _, rest = (given or "").partition(" ")
    return scheme.lower() == "bearer" and compare_digest(rest.strip().encode("utf-8", "surrogateescape"), token)


def check(given: str | None, token: bytes | None) -> None:
    """Lets pass who has the token.

    Raises:
        Refusal: 403 without a token at all, 401 without the right one.
    """
    if token is None:
        message = "nothing can be changed over HTTP here: the daemon has no token"
        hint = 'write token_file = "/etc/edgeadapt/token" under [http], or use the command on the device, such as edgeadapt pause'
        raise Refusal(HTTPStatus.FORBIDDEN, message, hint)
    if not matches(given, token):
        message = "this needs the daemon's token" if given is None else "this is not the daemon's token"
        hint = "send the header Authorization: Bearer TOKEN, with what the file http.token_file holds"
        raise Refusal(HTTPStatus.UNAUTHORIZED, message, hint, {"WWW-Authenticate": "Bearer"})
