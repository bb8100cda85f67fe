"""Libraries that only some configurations need. They are looked for, and no more of them is loaded than the packages that a module is in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from edgeadapt.runtime.daemon.config import CameraSource, Config, FolderSource, HttpSource, ReplaySource, SerialSource, StdinSource
from edgeadapt.runtime.daemon.examine.terms import Findings, Found, Grade, Site

if TYPE_CHECKING:
    from edgeadapt.bundle import Manifest


def look(site: Site, manifest: Manifest | None) -> Findings:
    """Those that this configuration needs, or may.

    Args:
        site: see there.
        manifest: of the bundle that is served; None where there is none.
    """
    there = []
    for module, name, grade, why, fix in _needed(site.config, manifest):
        if _found(module):
            there.append(name)
        else:
            yield Found("libraries", grade, f"{name} is not installed: {why}", fix)
    if there:
        yield Found("libraries", "fine", f"{', '.join(dict.fromkeys(there))} installed, as this configuration needs")


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what it is in
        return False


def _needed(config: Config, manifest: Manifest | None) -> Iterator[tuple[str, str, Grade, str, str]]:
    """Module, name, how bad it is without, why, and how to get it."""
    source = config.source
    if isinstance(source, SerialSource):
        yield "serial", "pyserial", "fault", "serial lines cannot be read", "pip install pyserial"
    if isinstance(source, CameraSource) and str(source.device).startswith("picamera2:"):
        fix = "apt install python3-picamera2, in an environment made with --system-site-packages"
        yield "picamera2", "picamera2", "fault", "no frames can be taken of a ribbon camera", fix
    elif isinstance(source, CameraSource):
        yield "cv2", "OpenCV", "fault", "no frames can be taken of a camera", "pip install edgeadapt[camera]"
    resized = manifest is not None and manifest.input.resize is not None
    files = (isinstance(source, StdinSource) and source.format == "paths") or (isinstance(source, ReplaySource) and os.path.isdir(source.path))
    if resized or files:
        why = "images cannot be made the size that the bundle takes" if resized else "image files cannot be read"
        yield "PIL", "Pillow", "fault", why, "pip install edgeadapt[images]"
    elif isinstance(source, FolderSource | HttpSource):
        yield "PIL", "Pillow", "warning", "of the frames that come, images are refused; arrays (.npy) are taken", "pip install edgeadapt[images]"
    if config.mqtt.enabled:
        yield "paho.mqtt.enums", "paho-mqtt 2", "fault", "nothing is published, and no requests are taken", "pip install edgeadapt[mqtt]"
    if config.bundle.require_signature:
        yield "cryptography", "cryptography", "fault", "signatures cannot be checked, so that no bundle is served", "pip install edgeadapt[sign]"
