"""What the commands share that ask a running daemon."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.client import Client


def add_socket(parser: argparse.ArgumentParser) -> None:
    """The option --socket."""
    text = "the daemon's control socket (default: $EDGEADAPT_CONTROL__SOCKET, else /run/edgeadapt/control.sock)"
    parser.add_argument("--socket", metavar="PATH", help=text)


def add_writing(parser: argparse.ArgumentParser, why: bool = True) -> None:
    """The options of commands that change something: --reason, --json, --socket."""
    if why:
        parser.add_argument("--reason", metavar="TEXT", help="why, for the daemon's log")
    parser.add_argument("--json", action="store_true", help="print the daemon's answer as JSON")
    add_socket(parser)


def client(arguments: argparse.Namespace) -> Client:
    """The daemon that is meant.

    Raises:
        UsageError: the path cannot be a socket's.
    """
    from edgeadapt.runtime.daemon.client import Client

    return Client(arguments.socket)


def write(arguments: argparse.Namespace, verb: str, **params: object) -> int:
    """Has a verb done that changes something, and prints what came of it."""
    from edgeadapt.runtime.daemon.plain import one_line

    found = client(arguments).call(verb, **params)
    if arguments.json or not isinstance(found, dict):
        print(json.dumps(found))
    else:
        print(one_line(str(found.get("text", "done")), 1000))
    return 0


def number_or_text(text: str) -> int | str:
    """A whole number as one, everything else as it is: "3" is 3, "03" and "three" are texts."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 and str(int(text)) == text else text
