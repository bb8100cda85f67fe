"""Where edgeadapt keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder for edgeadapt: $EDGEADAPT_CACHE, $XDG_CACHE_HOME/edgeadapt, or ~/.cache/edgeadapt. It need not exist.

    It is relative only where there is neither a home nor a variable.
    """
    if os.environ.get("EDGEADAPT_CACHE"):
        return Path(os.environ["EDGEADAPT_CACHE"]).absolute()
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the XDG specification has relative ones ignored
        return Path(given, "edgeadapt")
    return Path(os.path.expanduser("~"), ".cache", "edgeadapt")
