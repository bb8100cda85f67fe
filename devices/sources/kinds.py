"""The kinds of sources by the names that a configuration has for them. What a kind needs is loaded when one is made."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from edgeadapt.devices.sources.base import Source, Wanted
from edgeadapt.errors import UsageError


def _camera(options: Mapping[str, Any], wanted: Wanted) -> Source:
    from edgeadapt.devices.sources.camera import Camera

    return _made("camera", Camera, options, wanted=wanted)


def _folder(options: Mapping[str, Any], wanted: Wanted) -> Source:
    from edgeadapt.devices.sources.watch import Watch

    return _made("folder", Watch, options, wanted=wanted)


def _http(options: Mapping[str, Any], wanted: Wanted) -> Source:
    from edgeadapt.devices.sources.posted import Posted

    return _made("http", Posted, options, name="http")


def _none(options: Mapping[str, Any], wanted: Wanted) -> Source:
    from edgeadapt.devices.sources.posted import Posted

    return _made("none", Posted, options, name="none", size=1)


def _replay(options: Mapping[str, Any], wanted: Wanted) -> Source:
    from edgeadapt.devices.sources.replay import Replay

    return _made("replay", Replay, options, wanted=wanted)


def _serial(options: Mapping[str, Any], wanted: Wanted) -> Source:
    from edgeadapt.devices.sources.serial import Serial

    return _made("serial", Serial, options, wanted=wanted)


def _stdin(options: Mapping[str, Any], wanted: Wanted) -> Source:
    return _made("stdin", _from_stdin, options, wanted=wanted)


def _from_stdin(wanted: Wanted, format: str = "paths") -> Source:
    from edgeadapt.devices.sources import STDIN_FORMATS
    from edgeadapt.devices.sources.stdin import Arrays, Numbers, Paths

    if format not in STDIN_FORMATS:
        raise UsageError(f"{format!r} is no format of standard input", f"use one of {', '.join(STDIN_FORMATS)}")
    if format in ("paths", "npy"):
        return (Paths if format == "paths" else Arrays)(sys.stdin.buffer, wanted)
    return Numbers(sys.stdin.buffer, wanted, format)


KINDS: dict[str, Callable[[Mapping[str, Any], Wanted], Source]] = {
    "camera": _camera,
    "folder": _folder,
    "http": _http,
    "none": _none,
    "replay": _replay,
    "serial": _serial,
    "stdin": _stdin,
}
"""What makes a source of each kind, from the arguments of its class by name (of "stdin" only `format`) and what the bundle takes.

Raises what the class does, and UsageError where an argument is unknown or missing. "folder" watches one, "http" takes what is `put`, and from "none"
nothing comes.
"""


def _made(kind: str, make: Callable[..., Source], options: Mapping[str, Any], **fixed: Any) -> Source:
    parameters = {name: one for name, one in inspect.signature(make).parameters.items() if name not in fixed}
    takes = f"it takes {', '.join(parameters) or 'none'}"
    for name in options:
        if name not in parameters:
            raise UsageError(f"a source of the kind {kind} has no option {name!r}", takes)
    for name, one in parameters.items():
        if one.default is one.empty and name not in options:
            raise UsageError(f"a source of the kind {kind} needs the option {name!r}", takes)
    return make(**options, **fixed)
