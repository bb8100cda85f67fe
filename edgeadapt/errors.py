"""Every error a user can meet, with what was expected, what came and how to mend it.

The command line prints them without a traceback and exits with their `exit_code`; docs/exit-codes.md lists the codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class EdgeAdaptError(Exception):
    """Base of all errors raised for a user's input or environment.

    Args:
        message: what is wrong, naming the thing (path, key, layer, bytes) and what was expected.
        hint: how to mend it; shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.hint}" if self.hint else self.message


class UsageError(EdgeAdaptError):
    """An option or argument is wrong."""

    exit_code = 2


class InputError(EdgeAdaptError):
    """Data given to us (weights, data sets, frames) cannot be used."""

    exit_code = 3


class BundleError(EdgeAdaptError):
    """A bundle is truncated, tampered with, of an unknown format, or lacks something."""

    exit_code = 4


class BudgetError(EdgeAdaptError):
    """The configuration does not fit the memory budget."""

    exit_code = 5


class SourceError(EdgeAdaptError):
    """A source of frames cannot be opened or has ended unexpectedly."""

    exit_code = 6


class StateError(EdgeAdaptError):
    """A saved state is corrupt or belongs to another bundle."""

    exit_code = 7


class ExportError(EdgeAdaptError):
    """The model cannot be compiled into a bundle, or the bundle failed its checks."""

    exit_code = 8


class Fault(NamedTuple):
    """One thing that is wrong in a configuration.

    Attributes:
        place: the file, the environment variable or the option of the command line; "" where it is in none of them.
        line: of the file, from 1; None where it is not known, or there is no file.
        key: the dotted path, such as "http.port"; "" where the fault is of the file as a whole.
        message: what was expected and what came.
        fix: how to mend it.
    """

    place: str
    line: int | None
    key: str
    message: str
    fix: str

    @property
    def text(self) -> str:
        """All but the fix, as `FILE:LINE: key: message`."""
        place = self.place if self.line is None else f"{self.place}:{self.line}"
        return ": ".join(part for part in (place, self.key, self.message) if part)

    def __str__(self) -> str:
        return f"{self.text}\n  fix: {self.fix}" if self.fix else self.text


class ConfigError(EdgeAdaptError):
    """A configuration cannot be read or says what cannot be.

    Args:
        message: as for every error.
        hint: the same.
        faults: all that is wrong, where that is known.
    """

    exit_code = 9

    def __init__(self, message: str, hint: str = "", faults: Sequence[Fault] = ()) -> None:
        super().__init__(message, hint)
        self.faults = tuple(faults)

    @classmethod
    def of(cls, faults: Sequence[Fault]) -> ConfigError:
        """The error that tells one or more faults together."""
        head = [f"{len(faults)} faults in the configuration"] if len(faults) > 1 else []
        return cls("\n".join([*head, *map(str, faults[:-1]), faults[-1].text]), faults[-1].fix, faults)
