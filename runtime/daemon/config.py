"""What the daemon can be told: the schema of edgeadapt.toml. Loads neither numpy nor onnxruntime, so that checking a file costs little.

Sizes are in bytes and times in seconds once they are read. docs/configuration.md has every key.
"""

# ruff: noqa: RUF009 -- setting, section and chosen make fields

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from edgeadapt import config
from edgeadapt.config import REQUIRED, Computed, chosen, section, setting
from edgeadapt.config.values import Choice, Duration, Either, FilePath, Flag, Integer, ListOf, Number, Size, TableOf, Text
from edgeadapt.runtime.daemon.config_checks import findings

DEFAULT_PATH = "/etc/edgeadapt/edgeadapt.toml"
"""Read where no other file is named, if it is there."""

EXAMPLE_HEAD = """The configuration of edgeadapt's daemon. Every key is here with its default, or with an example
where it has none; take out the # before a key to change it. docs/configuration.md says more.

Checked by: edgeadapt check-config
In effect: edgeadapt config show"""
"""What an example file begins with."""

MIB = 2**20

_HOST = Text(r"[A-Za-z0-9._:-]{1,253}", "a host's name or address", 'write a name or an address alone, such as "192.168.1.5"')
_PORT = Integer(1, 65535)
_TOPIC = Text(r"[A-Za-z0-9._-]{1,64}(/[A-Za-z0-9._-]{1,64}){0,7}", "a topic of letters, digits, . _ - and /", "leave out blanks, + and #")


def _host_name(environment: Mapping[str, str]) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().partition(".")[0].lower()).strip("-")
    return plain[:63].strip("-") or "device"


def _state_folder(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("STATE_DIRECTORY", "").partition(":")[0] or "/var/lib/edgeadapt")


def _socket(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("RUNTIME_DIRECTORY", "").partition(":")[0] or "/run/edgeadapt", "control.sock")


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """The bundle that is served."""

    path: Path | None = setting(FilePath(), None, "the bundle; none: the one installed in the state folder", "/opt/models/model.edgeadapt")
    require_signature: bool = setting(Flag(), False, "serve and install only bundles that one of the keys signed")
    keys: tuple[Path, ...] = setting(ListOf(FilePath()), (), "ed25519 public keys that signatures are checked with", ("/etc/edgeadapt/fleet.pub",))


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What the process may hold."""

    budget: int | None = setting(Size(16 * MIB), None, "the most bytes the whole process may hold resident; none: no bound", 128 * MIB)
    reserve: int | None = setting(
        Size(), None, "with a budget: adaptation gives way when the system has less than this left; none: a twentieth of its memory", 64 * MIB
    )
    slack: int = setting(Size(0), 4 * MIB, "with a budget: what of it is kept free for all that runs beside the model")
    picture: int = setting(Size(MIB, 1024 * MIB), 24 * MIB, "what reading one picture of a file or a request may take; larger ones are refused")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How frames are answered."""

    threads: int = setting(Integer(1, 64), 1, "threads that one operator may use")
    cap: float | None = setting(Duration(0.001, 60), None, "the longest an answer may take; with it, adaptation runs beside the answers", 0.04)
    compare: float = setting(Duration(0.01, 86400, off=True), 1.0, "how often a frame is also answered by the model as it was exported; 0: never")
    queue: int = setting(Integer(1, 65536), 64, "frames that wait at most; older ones give way and are counted")


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """How the model adapts."""

    enabled: bool = setting(Flag(), True, "adapt to the frames; false: only predict")
    guard: bool = setting(Flag(), True, "have a guard decide what of adaptation each window gets, and put back what harms")
    window: int | None = setting(Integer(1, 4096), None, "frames that are adapted on together, a batch of the bundle; none: the bundle's own", 16)
    every: int = setting(Integer(1, 10**6), 1, "1: take a step on each window; 2: on every second, and so on")
    alike: float | None = setting(
        Number(0, 1e6), None, "frames that differ less than this from the last one are answered, and not adapted on; none: all are", 0.01
    )
    set: Mapping[str, float] = setting(TableOf(Number()), {}, "scalars of the method, as edgeadapt inspect lists them", {"rate": 0.001})


@dataclass(frozen=True, kw_only=True)
class NoSource:
    """No frames, until the configuration says where from."""

    type: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class SerialSource:
    """A serial line."""

    type: ClassVar[str] = "serial"
    url: str = setting(
        Text(r"/\S+|[a-z0-9+]+://\S*", "a device's path or an address", 'write "/dev/serial/by-id/…", "socket://host:port" or "rfc2217://host:port"'),
        REQUIRED,
        "the device, best by its name in /dev/serial/by-id, or an address that pyserial opens",
        "/dev/serial/by-id/usb-Arduino_Nano-if00",
    )
    format: str = setting(Choice("frames", "csv", "jsonl"), "frames", "what comes over the line: packets with a checksum, or lines of text")
    baud: int = setting(Integer(50, 10**8), 115200, "bits a second")
    stall: float = setting(Duration(0.1, 86400), 10.0, "without a byte for so long, the line is opened again")


@dataclass(frozen=True, kw_only=True)
class CameraSource:
    """A camera."""

    type: ClassVar[str] = "camera"
    device: str | int = setting(
        Either(Integer(0, 255), Text(r"/\S+|(rtsps?|https?)://\S+|picamera2:[0-9]*", "a path, an address (rtsp, http), or picamera2:")),
        "/dev/video0",
        'a device, its number, an address, or "picamera2:" for a ribbon camera',
    )
    width: int | None = setting(Integer(1, 16384), None, "pixels across that the camera is asked for; none: as it likes", 640)
    height: int | None = setting(Integer(1, 16384), None, "pixels down that the camera is asked for; none: as it likes", 480)
    fps: float | None = setting(Number(0.01, 1000), None, "frames a second that the camera is asked for; none: as it likes", 15.0)
    stall: float = setting(Duration(0.1, 86400), 10.0, "without a frame for so long, the camera is opened again")


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """A folder that files appear in."""

    type: ClassVar[str] = "folder"
    path: Path = setting(FilePath(), REQUIRED, "the folder that files appear in", "/var/lib/frames")
    existing: bool = setting(Flag(), False, "take files too that are there when it begins")
    poll: float = setting(Duration(0.01, 86400), 0.5, "time between two looks at the folder")
    remove: bool = setting(Flag(), False, "delete files whose frames were taken")


@dataclass(frozen=True, kw_only=True)
class ReplaySource:
    """Recorded frames."""

    type: ClassVar[str] = "replay"
    path: Path = setting(FilePath(), REQUIRED, "an .npz or .npy file, or a folder of images", "/var/lib/frames/recorded.npz")
    fps: float | None = setting(Number(0.001, 10**5), None, "frames a second; none: as fast as they are taken", 10.0)
    loop: bool = setting(Flag(), False, "begin again at the end")


@dataclass(frozen=True, kw_only=True)
class StdinSource:
    """Standard input."""

    type: ClassVar[str] = "stdin"
    format: str = setting(
        Choice("paths", "npy", "csv", "jsonl"), "paths", "what it carries: paths of image files, arrays of numpy one after another, or lines of text"
    )


@dataclass(frozen=True, kw_only=True)
class HttpSource:
    """Frames that are posted to the HTTP server."""

    type: ClassVar[str] = "http"


SourceConfig = NoSource | SerialSource | CameraSource | FolderSource | ReplaySource | StdinSource | HttpSource


@dataclass(frozen=True, kw_only=True)
class StateConfig:
    """What is kept on disk."""

    folder: Path = setting(FilePath(), Computed(_state_folder, "$STATE_DIRECTORY, else /var/lib/edgeadapt"), "where it is kept", "/var/lib/edgeadapt")
    probation: float = setting(Duration(1, 7 * 86400), 600.0, "a new state is the last good one once it has served for so long")
    boots: int = setting(Integer(1, 100), 3, "starts that may fail with a new state before the last good one is taken again")
    bytes_per_day: int = setting(Size(64 * 1024), 64 * MIB, "states are saved more rarely where they would write more than this a day")
    history: int = setting(Integer(0, 10**5), 200, "entries that are kept of what happened to the state")


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """The control socket."""

    socket: Path = setting(
        FilePath(), Computed(_socket, "$RUNTIME_DIRECTORY/control.sock, else /run/edgeadapt/control.sock"), "its path", "/run/edgeadapt/control.sock"
    )
    group: str | None = setting(
        Text(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}", "a group's name"), None, "whose members may use it; none: the daemon's own group", "edgeadapt"
    )


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """The HTTP server."""

    enabled: bool = setting(Flag(), False, "serve the page, the status and the metrics")
    host: str = setting(_HOST, "127.0.0.1", 'the address it is reached at; "0.0.0.0": at all of the machine\'s')
    port: int = setting(_PORT, 8099, "its port")
    names: tuple[str, ...] = setting(
        ListOf(_HOST), (), "names with a dot that it may be asked for by, besides addresses and those of local networks", ("camera-3.example.com",)
    )
    token_file: Path | None = setting(
        FilePath(), None, "a file with the token that changes are allowed with; none: nothing can be changed over HTTP", "/etc/edgeadapt/token"
    )
    body: int = setting(Size(1024, 256 * MIB), 4 * MIB, "the largest body of a request; a budget leaves three times that free")


@dataclass(frozen=True, kw_only=True)
class MqttConfig:
    """MQTT."""

    enabled: bool = setting(Flag(), False, "publish to a broker, and take requests from it")
    host: str | None = setting(_HOST, None, "the broker; needed where this is enabled", "broker.local")
    port: int = setting(_PORT, 1883, "the broker's port; with TLS usually 8883")
    tls: bool = setting(Flag(), False, "encrypt, and check the broker's certificate")
    ca: Path | None = setting(FilePath(), None, "a file with the certificates to trust, PEM; none: the system's", "/etc/edgeadapt/ca.pem")
    username: str | None = setting(Text(r".{1,256}", "text of at most 256 characters"), None, "who we are to the broker; none: nobody", "edgeadapt")
    password_file: Path | None = setting(FilePath(), None, "a file with the password, alone", "/etc/edgeadapt/mqtt-password")
    base: str = setting(_TOPIC, "edgeadapt", "what our topics begin with; the device's name follows")
    discovery: bool = setting(Flag(), False, "announce this device to Home Assistant")
    discovery_prefix: str = setting(_TOPIC, "homeassistant", "what the topics of announcements begin with")
    predictions: bool = setting(Flag(), True, "publish predictions too")


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Metrics without HTTP."""

    textfile: Path | None = setting(
        FilePath(), None, "a file for the textfile collector of node_exporter; none: no such file", "/var/lib/prometheus/node-exporter/edgeadapt.prom"
    )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """The log."""

    level: str = setting(Choice("debug", "info", "warning", "error"), "info", "what is told at least")
    format: str = setting(Choice("auto", "text", "json"), "auto", "how it looks; auto: as standard error asks for, a terminal, the journal or else")


@dataclass(frozen=True, kw_only=True)
class FramesConfig:
    """Raw frames on disk."""

    keep: int = setting(Integer(0, 10**6), 0, "raw frames that are kept on disk, the latest; 0: none ever are")
    most: int = setting(Size(1024), 64 * MIB, "the most bytes that they take together")
    folder: Path | None = setting(FilePath(), None, 'where they are kept; none: "frames" in the state folder', "/var/lib/edgeadapt/frames")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The daemon's configuration."""

    name: str = setting(
        Text(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "a name of at most 63 small letters, digits and -", "leave out capitals, blanks, dots and _"),
        Computed(_host_name, "the host's name"),
        "the device's name, in topics, on the page and in metrics",
        "camera-3",
    )
    bundle: BundleConfig = section(BundleConfig, "The bundle that is served.")
    memory: MemoryConfig = section(MemoryConfig, "What the process may hold.")
    predict: PredictConfig = section(PredictConfig, "How frames are answered.")
    adapt: AdaptConfig = section(AdaptConfig, "How the model adapts.")
    source: SourceConfig = chosen(
        "where frames come from", "none", NoSource, SerialSource, CameraSource, FolderSource, ReplaySource, StdinSource, HttpSource
    )
    state: StateConfig = section(StateConfig, "What is learned, kept on disk.")
    control: ControlConfig = section(ControlConfig, "The socket of edgeadapt status, pause, resume and the others.")
    http: HttpConfig = section(HttpConfig, "A page, the status and the metrics over HTTP.")
    mqtt: MqttConfig = section(MqttConfig, "MQTT, for Home Assistant and others.")
    metrics: MetricsConfig = section(MetricsConfig, "Metrics where there is no HTTP.")
    log: LogConfig = section(LogConfig, "The log, on standard error.")
    frames: FramesConfig = section(FramesConfig, "Raw frames. They show what the camera saw, so none are kept unless you ask.")


Loaded = config.Loaded[Config]


def load(path: str | os.PathLike[str] | None = None, environment: Mapping[str, str] | None = None, settings: Sequence[str] = ()) -> Loaded:
    """The daemon's configuration.

    Args:
        path: the file; None: `DEFAULT_PATH`, if it is there.
        environment: variables; None: the process's own.
        settings: texts "section.key=value", as options `--set` give them.

    Raises:
        ConfigError: with all faults of all sources.
    """
    variables = os.environ if environment is None else environment
    return config.load(Config, DEFAULT_PATH if path is None else path, path is not None, variables, settings, findings)


def usable(
    path: str | os.PathLike[str] | None = None, environment: Mapping[str, str] | None = None, settings: Sequence[str] = ()
) -> tuple[Config, tuple[str, ...]]:
    """What of a configuration with faults can be used: sections with one are left out, and nothing is adapted. Also gives their names.

    Where [bundle] has a fault, or a file cannot be read at all, no bundle is served: it may have said that bundles must be signed.
    """
    variables = os.environ if environment is None else environment
    found, without, whole = config.usable(Config, DEFAULT_PATH if path is None else path, variables, settings, findings)
    bundle = found.bundle if whole and "bundle" not in without else BundleConfig(require_signature=True)
    return replace(found, adapt=replace(found.adapt, enabled=False), bundle=bundle), without


def options(source: SourceConfig) -> dict[str, Any]:
    """What the section says, by key, without what is not set: the arguments that `devices.sources.kinds` makes such a source with."""
    found = {item.name: getattr(source, item.name) for item in fields(source)}
    return {key: value for key, value in found.items() if value is not None}
