"""The command line: one module a command, each with NAME, HELP, add_arguments(parser) and run(arguments) -> exit code.

Only the module of the command that is called is imported, and what that needs it imports inside its functions.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from edgeadapt._version import __version__
from edgeadapt.errors import EdgeAdaptError

ASKING = ("status", "pause", "resume", "rollback", "mark-good", "label", "tail")
"""Those that ask a daemon that runs."""

COMMANDS = (
    *("export", "inspect", "sign", "keygen", "simulate", "prepare", "run", "bench", "demo", "doctor", "calibrate"),
    *("check-config", "config", "install", "serve", "unit", *ASKING),
)
"""In the order of their use; each is the module edgeadapt.cli.NAME, with _ for -."""

PIPE_CLOSED = 128 + signal.SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: those after the program's name; None takes the process's own.

    Returns:
        the exit code: 0, that of an EdgeAdaptError, 130 when interrupted, 141 when the reader of our output went away.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser(given).parse_args(given)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except EdgeAdaptError as error:
        _say(f"edgeadapt: error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("edgeadapt: interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes at exit
        return PIPE_CLOSED


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgeadapt", description="Keeps a PyTorch model accurate after it is deployed.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"edgeadapt {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in [given[0]] if given and given[0] in COMMANDS else COMMANDS:
        command: Any = import_module(f"edgeadapt.cli.{name.replace('-', '_')}")
        sub = commands.add_parser(command.NAME, help=command.HELP, description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


_EPILOG = "edgeadapt COMMAND --help says more. docs/exit-codes.md lists the exit codes."


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:  # nobody reads our complaints: the exit code says it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
