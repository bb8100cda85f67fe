"""Have the daemon put back what it had learned when that was last known to be good, or what the bundle began with.

  edgeadapt rollback
  edgeadapt rollback --to start --reason "moved to another room"

The next frames are predicted with it. Adaptation goes on from there after a while, unless it is paused.
"""

from __future__ import annotations

import argparse

NAME, HELP = "rollback", "have the daemon put back what was learned before"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from edgeadapt.cli.asking import add_writing

    parser.add_argument("--to", choices=("last-good", "start"), default="last-good", help="what is put back (default: last-good)")
    add_writing(parser)


def run(arguments: argparse.Namespace) -> int:
    """Asks for it."""
    from edgeadapt.cli.asking import write

    return write(arguments, "rollback", to=arguments.to, reason=arguments.reason)
