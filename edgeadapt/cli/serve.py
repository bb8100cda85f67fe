"""Serve frames of a camera, a sensor or a folder on this board, adapt to them, and keep what was learned: the daemon.

  edgeadapt serve --config /etc/edgeadapt/edgeadapt.toml
  edgeadapt serve --set source.type=folder --set source.path=/srv/frames --set bundle.path=/opt/model.edgeadapt
  edgeadapt status

It runs until SIGTERM, on which it finishes the step that goes on, saves and ends; on SIGHUP it does that and begins anew with the configuration as it
is then. A configuration or a bundle that cannot be used does not end it: it does what is left, says what is wrong (edgeadapt status), and takes no
steps. edgeadapt check-config tells faults before; edgeadapt unit prints a unit for systemd; docs/daemon.md has the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from edgeadapt.errors import ConfigError

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.config import Config

NAME, HELP = "serve", "the daemon: serve a source of frames, adapt, and keep what was learned"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--config", metavar="FILE", help="the configuration (default: /etc/edgeadapt/edgeadapt.toml, if it is there)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="one of its keys; may be repeated")


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is told to end."""
    import faulthandler
    import signal

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # or a second one would end it before it is ready for any
    from edgeadapt.runtime.daemon import logs

    faulthandler.enable()  # systemd's watchdog sends SIGABRT: the log then shows where every thread hung
    config, reason = _configured(arguments)
    looks = None if config.log.format == "auto" else config.log.format
    handler = logs.set_up(config.log.level.upper(), looks)  # type: ignore[arg-type]
    from edgeadapt.runtime.daemon.daemon import Daemon  # numpy and onnxruntime, which a wrong option does not wait for

    daemon = Daemon(config, reason, handler)
    for number, done in ((signal.SIGTERM, daemon.stop), (signal.SIGINT, daemon.stop), (signal.SIGHUP, daemon.reload)):
        signal.signal(number, _calling(done))
    ended = daemon.run()
    if ended == "reload":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what is ignored stays so in the new program
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # memory begins as it did at the start
    return 0


def _calling(done: Callable[[], None]) -> Callable[[int, FrameType | None], None]:
    return lambda number, frame: done()


def _configured(arguments: argparse.Namespace) -> tuple[Config, str]:
    """The configuration; where it has faults, what of it has none, without adaptation, and the reason."""
    from edgeadapt.runtime.daemon.config import load, usable

    try:
        return load(arguments.config, settings=arguments.set).config, ""
    except ConfigError as fault:
        print(f"edgeadapt: error: {fault}", file=sys.stderr, flush=True)
        found, without = usable(arguments.config, settings=arguments.set)
        left_out = f"; without {', '.join(without)}" if without else ""
        return found, f"the configuration has faults{left_out}: {fault.faults[0].text if fault.faults else fault.message}"
