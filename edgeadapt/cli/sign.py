"""Sign a bundle, so that devices can be told to take only bundles of yours.

  edgeadapt keygen fleet
  edgeadapt sign model.edgeadapt --key fleet.key
  edgeadapt install model.edgeadapt --key fleet.pub

The signature, ed25519 over the bundle's digest, is written to model.edgeadapt.sig; keep both together. Needs pip install 'edgeadapt[sign]'.
"""

from __future__ import annotations

import argparse

NAME, HELP = "sign", "sign a bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("bundle", metavar="X.edgeadapt", help="the bundle")
    parser.add_argument("--key", metavar="FILE.key", required=True, help="the private key, PEM, as edgeadapt keygen makes it")


def run(arguments: argparse.Namespace) -> int:
    """Signs, and says where the signature is."""
    from edgeadapt.bundle import signing

    print(f"signed: {signing.sign(arguments.bundle, arguments.key)}")
    return 0
