"""Have the daemon go on adapting after a pause.

  edgeadapt resume
  edgeadapt resume --reason "the lens is clean"

Where there was no pause, nothing changes.
"""

from __future__ import annotations

import argparse

NAME, HELP = "resume", "have the daemon go on adapting"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from edgeadapt.cli.asking import add_writing

    add_writing(parser)


def run(arguments: argparse.Namespace) -> int:
    """Asks for it."""
    from edgeadapt.cli.asking import write

    return write(arguments, "resume", reason=arguments.reason)
