"""The daemon's configuration as it stands, or a file to begin with.

  edgeadapt config show
  edgeadapt config show --config new.toml --set predict.threads=2
  edgeadapt config example > /etc/edgeadapt/edgeadapt.toml

`show` prints every key, with its value and where that comes from: a file and line, a variable, the command line, or the default. `example` prints
every key with its default and what it is for, all of them commented out.
"""

from __future__ import annotations

import argparse
import json

from edgeadapt.cli.check_config import add_sources

NAME, HELP = "config", "show the daemon's configuration, or an example"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    what = parser.add_subparsers(metavar="show|example", required=True, dest="what")
    show = what.add_parser("show", help="the configuration and where each value comes from")
    add_sources(show)
    show.add_argument("--json", action="store_true", help="print it as JSON, in bytes and seconds")
    what.add_parser("example", help="a file with every key, explained")


def run(arguments: argparse.Namespace) -> int:
    """Prints it."""
    from edgeadapt.config import effective, example, shown
    from edgeadapt.runtime.daemon import config

    if arguments.what == "example":
        print(example(config.Config, config.EXAMPLE_HEAD), end="")
        return 0
    loaded = config.load(arguments.config, settings=arguments.set)
    print(json.dumps(effective(loaded), indent=1) + "\n" if arguments.json else shown(loaded), end="")
    return 0
