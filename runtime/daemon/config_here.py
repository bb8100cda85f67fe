"""Whether this machine has what a configuration names, and this user may use it. Starts and changes nothing, opens no device."""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edgeadapt import plainfile
from edgeadapt.config import Finding, in_order, placed
from edgeadapt.errors import EdgeAdaptError, Fault
from edgeadapt.runtime.daemon import systemd
from edgeadapt.runtime.daemon.config import CameraSource, Config, FolderSource, Loaded, ReplaySource, SerialSource, StdinSource

if TYPE_CHECKING:
    from edgeadapt.bundle import Manifest


def look(loaded: Loaded, place: str) -> tuple[list[Fault], list[Fault]]:
    """Faults, with which the daemon could not start here, and warnings.

    Args:
        loaded: the configuration.
        place: told where a finding is of no key that was given.
    """
    return told((found for part in (_bundle, files, _folders, _source, machine) for found in part(loaded.config)), loaded, place)


def told(found: Iterable[Finding], loaded: Loaded, place: str) -> tuple[list[Fault], list[Fault]]:
    """Findings as faults and warnings, each where its key was given, else at `place`."""
    faults: list[Fault] = []
    warnings: list[Fault] = []
    for one in found:
        (faults if one.fatal else warnings).append(placed(one, loaded.origins, place))
    return in_order(faults, loaded.files), in_order(warnings, loaded.files)


def _bundle(config: Config) -> Iterator[Finding]:
    """Of a bundle that is named; the one that is installed was looked at when it was."""
    from edgeadapt.bundle import Bundle

    if config.bundle.path is None:
        return
    try:
        manifest = Bundle.open(config.bundle.path, verify=False).manifest
    except EdgeAdaptError as reason:
        yield Finding(("bundle.path",), reason.message, reason.hint)
        return
    yield from fitting(config, manifest)


def fitting(config: Config, manifest: Manifest) -> Iterator[Finding]:
    """What of a configuration does not go with the bundle that is served."""
    from edgeadapt.runtime.hyper import Hyper

    for name, value in config.adapt.set.items():
        try:
            Hyper(manifest.hyper).checked(name, value)
        except EdgeAdaptError as reason:
            yield Finding((f"adapt.set.{name}",), reason.message, reason.hint)
    yield from _frames(config, manifest.input.shape)
    if not config.adapt.enabled:
        return
    sizes = manifest.planned("adapt")
    if not sizes:
        yield Finding(("adapt.enabled", "bundle.path"), "this bundle cannot adapt: it only predicts", "write enabled = false", fatal=False)
    elif config.adapt.window not in (None, *sizes):
        message = f"this bundle cannot adapt on {config.adapt.window} frames at a time"
        yield Finding(("adapt.window",), message, f"write window = {' or '.join(map(str, reversed(sizes)))}")
    if config.adapt.guard and sizes and manifest.reference is None:
        message = "a guard compares frames with the source, and this bundle does not say what that looks like"
        yield Finding(("adapt.guard", "bundle.path"), message, "export it with --data, or write guard = false", fatal=False)


def _frames(config: Config, shape: tuple[int, ...]) -> Iterator[Finding]:
    """Whether frames of the source can be those of the bundle."""
    from edgeadapt.units import format_shape

    source = config.source
    pictures = isinstance(source, CameraSource) or (isinstance(source, StdinSource) and source.format == "paths")
    pictures = pictures or (isinstance(source, ReplaySource) and source.path.is_dir())
    if pictures and not (len(shape) == 3 and shape[0] in (1, 3)):
        message = f'a source of type "{source.type}" gives images of 1 or 3 channels, and one frame of this bundle is {format_shape(shape)}'
        yield Finding(("source.type", "bundle.path"), message, "take another source, or another bundle")
    if pictures and not isinstance(source, CameraSource) and find_spec("PIL") is None:
        yield Finding(("source.type",), "reading image files needs Pillow", "pip install edgeadapt[images]")


SECRETS = ("http.token_file", "mqtt.password_file")
"""Keys of files that systemd reads for the daemon."""


def files(
    config: Config, reads: Callable[[str, Path], bool] = lambda key, path: os.access(path, os.R_OK), handed: bool | None = None
) -> Iterator[Finding]:
    """Keys and secrets: whether they are there, can be read, and are what the daemon takes.

    Args:
        config: see there.
        reads: whether the daemon can read a file, of the key of the configuration and the path.
        handed: systemd hands secrets over, in copies with a mode of their own; None: who knows.
    """
    used = systemd.secrets(config)
    plain = {f"bundle.keys[{number}]": path for number, path in enumerate(config.bundle.keys)}
    secrets = {"http.token_file": config.http.token_file, "mqtt.password_file": config.mqtt.password_file}
    for key, path in {**plain, "mqtt.ca": config.mqtt.ca, **secrets}.items():
        if path is None:
            continue
        keys = (key.partition("[")[0],)
        try:
            status = path.stat()
        except OSError as reason:
            yield Finding(keys, f"{path}: {(reason.strerror or str(reason)).lower()}", "make the file, or name another")
            continue
        if not stat.S_ISREG(status.st_mode) or not reads(key.partition("[")[0], path):
            yield Finding(keys, f"{path} is no file that this user can read", "run this as the daemon's user; chown and chmod let that one read it")
        elif not status.st_size:
            yield Finding(keys, f"{path} is empty", "write what it is for into it")
        elif key in SECRETS and status.st_mode & stat.S_IROTH:
            refused = ": the daemon refuses it, unless systemd hands it a copy" if key in used and handed is None else ""
            message = f"{path} holds a secret and can be read by everybody{refused}"
            yield Finding(keys, message, f"chmod o= {path}, and write a new one into it", fatal=key in used and handed is False)
        elif key == "http.token_file" and os.access(path, os.R_OK) and not (handed and status.st_mode & stat.S_IWOTH):
            yield from _token(path, key in used)


def _token(path: Path, used: bool) -> Iterator[Finding]:
    from edgeadapt.runtime.daemon.web.token import read_token

    try:
        read_token(path)
    except EdgeAdaptError as reason:
        yield Finding(("http.token_file",), reason.message.removeprefix("http.token_file "), reason.hint, fatal=used)


def _folders(config: Config) -> Iterator[Finding]:
    yield from _writable("state.folder", config.state.folder)
    yield from _writable("control.socket", config.control.socket.parent)
    if config.metrics.textfile is not None:
        yield from _writable("metrics.textfile", config.metrics.textfile.parent)
    if config.frames.keep:
        yield from _writable("frames.folder", config.frames.folder or config.state.folder)


def _writable(key: str, folder: Path) -> Iterator[Finding]:
    present = plainfile.present(folder)
    if not present.is_dir():
        yield Finding((key,), f"{folder} cannot be made: {present} is no folder", "name another")
    elif not os.access(present, os.W_OK | os.X_OK):
        what = "cannot be written" if present == folder else f"is not there and cannot be made in {present}"
        yield Finding((key,), f"{folder} {what} by this user", "run this as the daemon's user; systemd makes the folders of a service")


def _source(config: Config) -> Iterator[Finding]:
    source = config.source
    later = "plug it in, or check the name"
    if isinstance(source, SerialSource) and source.url.startswith("/") and not os.path.exists(source.url):
        yield Finding(("source.url",), f"{source.url} is not there now", later, fatal=False)
    if isinstance(source, CameraSource):
        device = f"/dev/video{source.device}" if isinstance(source.device, int) else source.device
        if device.startswith("/") and not os.path.exists(device):
            yield Finding(("source.device", "source.type"), f"{device} is not there now", later, fatal=False)
        module, fix = ("picamera2", "apt install python3-picamera2") if device.startswith("picamera2:") else ("cv2", "pip install edgeadapt[camera]")
        if find_spec(module) is None:
            yield Finding(("source.device", "source.type"), f"this camera needs the module {module}, which is not installed", fix)
    if isinstance(source, FolderSource) and not source.path.is_dir():
        yield Finding(("source.path",), f"{source.path} is no folder now", "make it, or check the path", fatal=False)
    if isinstance(source, ReplaySource) and not source.path.exists():
        yield Finding(("source.path",), f"{source.path} is not there", "give an .npz or .npy file, or a folder of images")


def machine(config: Config) -> Iterator[Finding]:
    """Processors, and the group of the control socket."""
    cores = len(os.sched_getaffinity(0))
    if config.predict.threads > cores:
        message = f"{config.predict.threads} threads are more than the {cores} processors here"
        yield Finding(("predict.threads",), message, f"give at most {cores}", fatal=False)
    if config.control.group is not None:
        try:
            grp.getgrnam(config.control.group)
        except KeyError:
            fix = f"groupadd --system {config.control.group}, or name another"
            yield Finding(("control.group",), f"there is no group {config.control.group} here", fix)
