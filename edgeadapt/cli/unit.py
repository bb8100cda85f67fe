"""A unit that has systemd run the daemon of this installation: what it may use follows from the configuration, all else is closed.

  edgeadapt unit | sudo tee /etc/systemd/system/edgeadapt.service
  sudo systemctl daemon-reload
  sudo systemctl enable --now edgeadapt

Print it again when the configuration's source, memory budget, network or paths change, and after an upgrade of the system: newer versions of systemd
can do more. docs/systemd.md explains it.
"""

from __future__ import annotations

import argparse
import os
import sys

from edgeadapt.cli.check_config import add_sources

NAME, HELP = "unit", "a unit for systemd that runs the daemon"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_sources(parser)
    parser.add_argument("--user", metavar="NAME", help="who runs it (default: a user that systemd makes)")
    parser.add_argument("--executable", metavar="PATH", help="the program (default: that of this installation)")


def run(arguments: argparse.Namespace) -> int:
    """Prints it."""
    from edgeadapt.runtime.daemon import config, systemd

    if arguments.set:
        from edgeadapt.errors import UsageError

        raise UsageError("a unit reads files, and --set would be forgotten", "write it into the configuration's file")
    loaded = config.load(arguments.config)
    command, version = program() if arguments.executable is None else [arguments.executable], systemd.version()
    print(systemd.unit(loaded.config, command, arguments.user, arguments.config, version), end="")
    own = systemd.secrets(loaded.config)
    if own and not systemd.hands_over(version):
        names = " and ".join(map(str, own.values()))
        print(f"note: {systemd.keeps_back(version)}: the daemon's user must be able to read {names}", file=sys.stderr)
    return 0


def program() -> list[str]:
    """What begins this installation's program."""
    beside = os.path.join(os.path.dirname(sys.executable), "edgeadapt")
    return [beside] if os.access(beside, os.X_OK) else [sys.executable, "-m", "edgeadapt"]
