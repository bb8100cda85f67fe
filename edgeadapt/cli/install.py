"""Install a bundle for the daemon: copied beside the one that is there, checked wholly, and on trial until it has served well.

  edgeadapt install model.edgeadapt
  edgeadapt install model.edgeadapt --config /etc/edgeadapt/edgeadapt.toml
  edgeadapt install model.edgeadapt --state /srv/edgeadapt --key fleet.pub
  edgeadapt install --undo

Where to, and which keys must have signed it, is what the daemon's configuration says (state.folder, bundle.require_signature, bundle.keys); --state
and --key win over it. The daemon serves the bundle from its next start on (systemctl restart edgeadapt). If it does not prove itself the daemon goes
back to the one before by itself. Run as root, what is written belongs to whom the state folder belongs to.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgeadapt.cli.check_config import add_sources

NAME, HELP = "install", "install a bundle for the daemon"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("bundle", metavar="X.edgeadapt", nargs="?", help="the bundle")
    add_sources(parser)
    parser.add_argument("--state", metavar="FOLDER", help="the daemon's state folder (default: as configured)")
    text = "a public key that may have signed it; repeatable (default: as configured)"
    parser.add_argument("--key", metavar="FILE.pub", action="append", default=[], type=Path, help=text)
    parser.add_argument("--undo", action="store_true", help="put the bundle before back")


def run(arguments: argparse.Namespace) -> int:
    """Installs, and says what the next start begins with."""
    from edgeadapt.errors import UsageError
    from edgeadapt.runtime.daemon.config import load
    from edgeadapt.runtime.daemon.store import Limits, Store

    if arguments.undo == (arguments.bundle is not None):
        raise UsageError("give either a bundle or --undo", "edgeadapt install model.edgeadapt")
    config = load(arguments.config, settings=arguments.set).config
    keys = arguments.key or (config.bundle.keys if config.bundle.require_signature else ())
    folder = config.state.folder if arguments.state is None else arguments.state
    with Store.open(folder, Limits(history=config.state.history), keys, serving=False) as store:
        if arguments.undo:
            print(f"the next start is with the bundle before again, {store.undo().digest[:12]}")
            _served_instead(config.bundle.path)
            return 0
        found = store.install(arguments.bundle)
    digest = found.installed.digest[:12]
    if found.again:
        print(f"{digest} is installed already, in {found.path}")
        _served_instead(config.bundle.path)
        return 0
    print(f"installed {digest} in {found.path}, on trial from the next start on: systemctl restart edgeadapt")
    print("it goes on from what was learned" if found.goes_on else "it begins as it was exported: what was learned was for another model")
    print(f"to go back to {found.before[:12]}: edgeadapt install --undo" if found.before else "there is no bundle before it to go back to")
    _served_instead(config.bundle.path)
    return 0


def _served_instead(path: Path | None) -> None:
    if path is not None:
        print(f"the configuration names another bundle, {path}, which is served instead: take bundle.path out of it")
