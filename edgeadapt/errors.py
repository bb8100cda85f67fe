"""Every error a user can meet, with what was expected, what came and how to mend it.

The command line prints them without a traceback and exits with their `exit_code`; docs/exit-codes.md lists the codes.
"""

from __future__ import annotations


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
