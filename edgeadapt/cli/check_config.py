"""Say whether the daemon's configuration is right, without starting anything.

  edgeadapt check-config
  edgeadapt check-config --config new.toml --set predict.threads=2
  edgeadapt check-config --here

Every fault is told with its file and line and how to mend it, and the exit code is then 9. Warnings, of what is allowed and hardly meant, leave it 0.

What is told depends on the files, the variables and the options alone, and is the same on every machine. With --here it is also looked at whether
this machine has what the configuration names, and this user may use it: the bundle and whether the source fits it, folders, devices, secrets' files.
What the daemon could not start with is a fault, what may come later a warning. Run that on the device, as the daemon's user.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeadapt.errors import ConfigError

if TYPE_CHECKING:
    from edgeadapt.errors import Fault

NAME, HELP = "check-config", "say whether the daemon's configuration is right"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_sources(parser)
    parser.add_argument("--here", action="store_true", help="look too for what it names on this machine")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The options that say where settings come from."""
    parser.add_argument("--config", metavar="FILE", help="the file (default: /etc/edgeadapt/edgeadapt.toml, if it is there)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting, which wins over all others; repeatable")


def run(arguments: argparse.Namespace) -> int:
    """Prints what was found."""
    from edgeadapt.runtime.daemon import config, config_here

    files: Sequence[str] = ()
    faults: Sequence[Fault] = ()
    warnings: Sequence[Fault] = ()
    try:
        loaded = config.load(arguments.config, settings=arguments.set)
        files, warnings = loaded.files, loaded.warnings
        if arguments.here:
            faults, more = config_here.look(loaded, arguments.config or config.DEFAULT_PATH)
            warnings = (*warnings, *more)
    except ConfigError as error:
        faults = error.faults
    if arguments.json:
        found = {"valid": not faults, "files": files, "faults": [one._asdict() for one in faults], "warnings": [one._asdict() for one in warnings]}
        print(json.dumps(found, indent=1))
        return ConfigError.exit_code if faults else 0
    for one in faults:
        print(one)
    for one in warnings:
        print(one._replace(key=f"warning: {one.key}"))
    if not faults:
        print("\n".join(f"{file}: fine" for file in files) or "no file, and what is set without one is fine")
    return ConfigError.exit_code if faults else 0
