"""Why a request is not done, as HTTP says it: a status, and the same error that the control socket gives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus

from edgeadapt.errors import EdgeAdaptError, InputError, SourceError, UsageError
from edgeadapt.runtime.daemon.plain import one_line


class Refusal(UsageError):
    """A request that is not done for what it is as HTTP.

    Args:
        status: of the reply.
        message, hint: as for every error.
        headers: more of the reply's headers.
    """

    def __init__(self, status: HTTPStatus, message: str, hint: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, hint)
        self.status, self.headers = status, dict(headers or {})


def status_of(error: EdgeAdaptError) -> HTTPStatus:
    """400 where what was sent is wrong, 409 where it cannot be done as the daemon is now."""
    if isinstance(error, Refusal):
        return error.status
    return HTTPStatus.BAD_REQUEST if isinstance(error, UsageError | InputError | SourceError) else HTTPStatus.CONFLICT


def plain(error: EdgeAdaptError) -> dict[str, object]:
    """{"error": {"code", "name", "message", "hint"}}: the exit code, the error's name, what is wrong and how to mend it."""
    name = re.sub("[^A-Za-z]", "", error.status.phrase) if isinstance(error, Refusal) else type(error).__name__
    told = {"code": error.exit_code, "name": name, "message": one_line(error.message, 1000), "hint": one_line(error.hint, 1000)}
    return {"error": told}
