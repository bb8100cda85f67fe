"""Tell the daemon of what class a frame is.

  edgeadapt label 4711 cat
  edgeadapt label --latest 3

FRAME is the id that `edgeadapt tail` shows, CLASS a class's number or name. The daemon knows the latest frames only.
"""

from __future__ import annotations

import argparse

from edgeadapt.errors import UsageError

NAME, HELP = "label", "tell the daemon of what class a frame is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from edgeadapt.cli.asking import add_writing

    parser.add_argument("frame", metavar="FRAME", nargs="?", help="the frame's id")
    parser.add_argument("label", metavar="CLASS", help="the class's number or name")
    parser.add_argument("--latest", action="store_true", help="the latest frame, instead of FRAME")
    add_writing(parser, why=False)


def run(arguments: argparse.Namespace) -> int:
    """Tells it."""
    from edgeadapt.cli.asking import number_or_text, write

    if (arguments.frame is None) != arguments.latest:
        raise UsageError("which frame is meant is said twice" if arguments.latest else "no frame is named", "give FRAME or --latest")
    frame = None if arguments.latest else number_or_text(arguments.frame)
    return write(arguments, "label", frame=frame, label=number_or_text(arguments.label))
