"""Have the daemon take no steps of adaptation until it is told to resume; it predicts on.

  edgeadapt pause
  edgeadapt pause --reason "the lens is being cleaned"

`edgeadapt resume` ends the pause.
"""

from __future__ import annotations

import argparse

NAME, HELP = "pause", "have the daemon stop adapting, for now"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from edgeadapt.cli.asking import add_writing

    add_writing(parser)


def run(arguments: argparse.Namespace) -> int:
    """Asks for it."""
    from edgeadapt.cli.asking import write

    return write(arguments, "pause", reason=arguments.reason)
