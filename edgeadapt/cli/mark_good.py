"""Have the daemon take what it has learned, as it is now, for good.

  edgeadapt mark-good --reason "checked by hand on Monday"

From then on nothing that it does by itself goes back behind that.
"""

from __future__ import annotations

import argparse

NAME, HELP = "mark-good", "have the daemon take what it has learned for good"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from edgeadapt.cli.asking import add_writing

    add_writing(parser)


def run(arguments: argparse.Namespace) -> int:
    """Asks for it."""
    from edgeadapt.cli.asking import write

    return write(arguments, "mark-good", reason=arguments.reason)
