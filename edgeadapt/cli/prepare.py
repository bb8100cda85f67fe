"""Prepare a bundle's graphs for this machine, once: onnxruntime's own optimisation for its processor, within the planned memory.

  edgeadapt prepare model.edgeadapt
  edgeadapt prepare model.edgeadapt --threads 2 --json

Every graph is optimised in a child process, put into an order of least memory, compared with the exported one, and timed beside it. What is faster
and needs at most 5 % (or 64 KiB) more memory than was planned is kept in the cache and used whenever the bundle is opened with as many threads;
everything else runs as exported.
The cache is $EDGEADAPT_CACHE, else the user's cache folder, else BUNDLE.prepared beside the bundle.
"""

from __future__ import annotations

import argparse
import json
import sys

NAME, HELP = "prepare", "optimise a bundle's graphs for this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("bundle", metavar="X.edgeadapt", help="the bundle")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of one operator, as it will be served with (default: 1)")
    parser.add_argument("--provider", default="cpu", metavar="cpu|cuda", help="only for cpu is there anything to prepare (default: cpu)")
    parser.add_argument("--cache", metavar="DIR", help="keep it there; EDGEADAPT_CACHE then names the folder to whoever serves")
    parser.add_argument("--force", action="store_true", help="prepare anew what is in the cache already")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Prepares, and prints what was decided."""
    from edgeadapt.bundle import Bundle
    from edgeadapt.errors import UsageError
    from edgeadapt.memory.cuda import is_cuda
    from edgeadapt.progress import Bars, Progress, quiet
    from edgeadapt.runtime import prepared, preparing

    if arguments.threads < 1:
        raise UsageError(f"--threads {arguments.threads} is not a number of threads", "give 1 or more")
    if is_cuda(arguments.provider):
        print("nothing was prepared: graphs are prepared for the cpu provider only, and run on cuda as exported", file=sys.stderr)
        return 0
    bundle = Bundle.open(arguments.bundle)
    with Bars() as bars:
        progress: Progress = quiet if arguments.quiet else bars
        found = preparing.make(bundle, arguments.threads, progress, arguments.cache, arguments.force)
    if arguments.json:
        json.dump({"path": str(found.folder), **found.record}, sys.stdout, indent=1)
        print()
    else:
        print(prepared.table(found.record))
        print(f"\nkept in {found.folder}")
    return 0
