"""Install a bundle for the daemon: copied beside the one that is there, checked wholly, and on trial until it has served well.

  edgeadapt install model.edgeadapt
  edgeadapt install model.edgeadapt --state /srv/edgeadapt --key fleet.pub
  edgeadapt install --undo

The daemon serves it from its next start on (systemctl restart edgeadapt). If it does not prove itself the daemon goes back to the one before by
itself. With --key only a bundle that one of these keys has signed is taken.
"""

from __future__ import annotations

import argparse
from pathlib import Path

NAME, HELP = "install", "install a bundle for the daemon"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("bundle", metavar="X.edgeadapt", nargs="?", help="the bundle")
    parser.add_argument("--state", metavar="FOLDER", default="/var/lib/edgeadapt", help="the daemon's state folder (default: %(default)s)")
    parser.add_argument("--key", metavar="FILE.pub", action="append", default=[], type=Path, help="a public key that may have signed it; repeatable")
    parser.add_argument("--undo", action="store_true", help="put the bundle before back")


def run(arguments: argparse.Namespace) -> int:
    """Installs, and says what the next start begins with."""
    from edgeadapt.errors import UsageError
    from edgeadapt.runtime.daemon.store import Store

    if arguments.undo == (arguments.bundle is not None):
        raise UsageError("give either a bundle or --undo", "edgeadapt install model.edgeadapt")
    with Store.open(arguments.state, keys=arguments.key, serving=False) as store:
        if arguments.undo:
            print(f"the next start is with the bundle before again, {store.undo().digest[:12]}")
            return 0
        found = store.install(arguments.bundle)
    digest = found.installed.digest[:12]
    if found.again:
        print(f"{digest} is installed already, in {found.path}")
        return 0
    print(f"installed {digest} in {found.path}, on trial from the next start on: systemctl restart edgeadapt")
    print("it goes on from what was learned" if found.goes_on else "it begins as it was exported: what was learned was for another model")
    print(f"to go back to {found.before[:12]}: edgeadapt install --undo" if found.before else "there is no bundle before it to go back to")
    return 0
