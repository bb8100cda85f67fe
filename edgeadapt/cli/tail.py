"""What happens on the daemon, as it happens: events and predictions as JSON lines on stdout, until you interrupt it.

  edgeadapt tail
  edgeadapt tail --events
  edgeadapt tail --predictions --count 100 | jq .facts.label

Each line has number, time (Unix, seconds), kind, text and facts. A reader that is too slow loses the oldest; a line of kind "lost" says how many.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from itertools import islice

NAME, HELP = "tail", "what happens on the daemon, as it happens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from edgeadapt.cli.asking import add_socket

    parser.add_argument("--events", action="store_true", help="events only, unless --predictions is given too")
    parser.add_argument("--predictions", action="store_true", help="predictions only, unless --events is given too")
    parser.add_argument("--count", type=_positive, metavar="N", help="end after so many lines")
    add_socket(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints lines as they come."""
    from edgeadapt.cli.asking import client

    both = arguments.events == arguments.predictions
    wanted = {"events": both or arguments.events, "predictions": both or arguments.predictions, "count": arguments.count}
    with closing(client(arguments).stream("tail", **wanted)) as events:
        for event in islice(events, arguments.count):
            sys.stdout.write(json.dumps(event) + "\n")
            sys.stdout.flush()
    return 0


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
