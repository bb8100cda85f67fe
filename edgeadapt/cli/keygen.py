"""Make a pair of keys to sign bundles with.

  edgeadapt keygen fleet

NAME.key is the private one: whoever has it can sign, so keep it off the devices. NAME.pub goes onto them. Needs pip install 'edgeadapt[sign]'.
"""

from __future__ import annotations

import argparse

NAME, HELP = "keygen", "make keys to sign bundles with"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("name", metavar="NAME", help="what the files are called, before .key and .pub")


def run(arguments: argparse.Namespace) -> int:
    """Makes the files, and says where they are."""
    from edgeadapt.bundle import signing

    private, public = signing.keygen(arguments.name)
    print(f"private key, to sign with: {private}\npublic key, for devices:   {public}")
    return 0
