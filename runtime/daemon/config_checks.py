"""What no single key of the daemon's configuration shows: keys that need each other, or that are hardly meant together."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edgeadapt.config import Finding
from edgeadapt.config.words import size_text

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.config import Config

FLOOR = 48 * 2**20
"""Bytes that Python, numpy and onnxruntime hold before a model is loaded, about."""

LONGEST_SOCKET = 107
"""Bytes of the path of a unix socket."""


def findings(config: Config, given: Callable[[str], bool]) -> Iterator[Finding]:
    """Faults and warnings of a configuration; `given` says of a dotted key whether somebody set it."""
    for look in (_bundle, _memory, _adapt, _source, _places, _http, _mqtt):
        yield from look(config, given)


def is_loopback(host: str) -> bool:
    """Whether only this machine can be reached at, or reach, that name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _bundle(config: Config, given: Callable[[str], bool]) -> Iterator[Finding]:
    bundle = config.bundle
    if bundle.require_signature and not bundle.keys:
        keys = ("bundle.require_signature", "bundle.keys")
        yield Finding(keys, "signatures are required, and there is no key to check them with", 'write keys = ["/etc/edgeadapt/fleet.pub"]')


def _memory(config: Config, given: Callable[[str], bool]) -> Iterator[Finding]:
    memory = config.memory
    if memory.budget is None:
        if memory.reserve is not None:
            keys = ("memory.reserve", "memory.budget")
            yield Finding(keys, "does nothing without a budget", "give a budget too, or leave it out", fatal=False)
    elif memory.slack >= memory.budget:
        message = f"expected less than the budget of {size_text(memory.budget)}, got {size_text(memory.slack)}"
        yield Finding(("memory.slack", "memory.budget"), message, "give less, or a larger budget")
    elif given("memory.picture") and memory.picture >= memory.budget:
        message = f"expected less than the budget of {size_text(memory.budget)}, got {size_text(memory.picture)}"
        yield Finding(("memory.picture", "memory.budget"), message, "give less, or a larger budget")
    elif memory.budget - memory.slack < FLOOR:
        message = f"leaves less than the {size_text(FLOOR)} that Python, numpy and onnxruntime take before a model is loaded"
        yield Finding(("memory.budget", "memory.slack"), message, "edgeadapt simulate says what a bundle needs", fatal=False)


def _adapt(config: Config, given: Callable[[str], bool]) -> Iterator[Finding]:
    if config.adapt.enabled:
        return
    for key in ("guard", "window", "every", "alike", "set"):
        if given(f"adapt.{key}") and getattr(config.adapt, key) not in (False, {}):
            yield Finding((f"adapt.{key}", "adapt.enabled"), "does nothing where adapt.enabled is false", "take it out, or adapt", fatal=False)


def _source(config: Config, given: Callable[[str], bool]) -> Iterator[Finding]:
    source = config.source
    url = str(getattr(source, "url", ""))
    if match := re.fullmatch(r"(socket|rfc2217)://(.*@)?\[?([^/?\]]*?)\]?(:[0-9]+)?([/?].*)?", url):
        if not is_loopback(match[3]):
            message = f"{match[1]}:// is neither encrypted nor does it ask who is there"
            yield Finding(("source.url",), message, "use it in a network that you trust", fatal=False)
    elif re.match(r"/dev/tty(USB|ACM)[0-9]", url):
        message = f"{url} may be another device after the next start"
        yield Finding(("source.url",), message, "take its name in /dev/serial/by-id", fatal=False)
    if (getattr(source, "width", None) is None) != (getattr(source, "height", None) is None):
        yield Finding(("source.width", "source.height"), "a camera is asked for a width and a height, or for neither", "give both")
    if source.type == "camera" and "://" in str(getattr(source, "device", "")):
        for key in ("width", "height", "fps"):
            if given(f"source.{key}"):
                message = "a camera with an address cannot be asked for it"
                yield Finding((f"source.{key}", "source.device"), message, "take it out, and set it at the camera")
    if getattr(source, "loop", False) and getattr(source, "fps", None) is None:
        message = "frames are replayed without end as fast as they are taken, which keeps a processor busy"
        yield Finding(("source.loop", "source.fps"), message, "write fps = 10", fatal=False)
    if source.type == "http" and not config.http.enabled:
        yield Finding(("source.type", "http.enabled"), "frames come over HTTP, which is not enabled", "write enabled = true under [http]")
    elif source.type == "http" and config.http.token_file is None:
        message = "frames come over HTTP, which takes none without a token"
        yield Finding(("source.type", "http.token_file"), message, 'write token_file = "/etc/edgeadapt/token" under [http]')


def _places(config: Config, given: Callable[[str], bool]) -> Iterator[Finding]:
    length = len(os.fsencode(config.control.socket))
    if length > LONGEST_SOCKET:
        message = f"expected a path of at most {LONGEST_SOCKET} bytes, got {length}"
        yield Finding(("control.socket",), message, "take a shorter one, such as /run/edgeadapt/control.sock")
    textfile = config.metrics.textfile
    if textfile is not None and textfile.suffix != ".prom":
        yield Finding(("metrics.textfile",), f"node_exporter reads files that end in .prom, not {textfile.name}", "write edgeadapt.prom", fatal=False)


def _http(config: Config, given: Callable[[str], bool]) -> Iterator[Finding]:
    http = config.http
    if http.enabled and not is_loopback(http.host):
        message = "everybody who reaches this machine can see the page, the status and the metrics"
        fix = 'write host = "127.0.0.1" and reach it through a tunnel or a proxy with TLS, or use it in a network that you trust'
        yield Finding(("http.host", "http.enabled"), message, fix, fatal=False)


def _mqtt(config: Config, given: Callable[[str], bool]) -> Iterator[Finding]:
    mqtt = config.mqtt
    if mqtt.enabled and mqtt.host is None:
        yield Finding(("mqtt.enabled", "mqtt.host"), "MQTT is enabled, and there is no broker", 'write host = "broker.local" under [mqtt]')
    if mqtt.password_file is not None and mqtt.username is None:
        yield Finding(("mqtt.password_file", "mqtt.username"), "a password is of somebody", "give a username too")
    if mqtt.ca is not None and not mqtt.tls:
        yield Finding(("mqtt.ca", "mqtt.tls"), "certificates are for TLS, and this is not encrypted", "write tls = true")
    if not mqtt.enabled or mqtt.host is None:
        return
    if mqtt.password_file is not None and not mqtt.tls and not is_loopback(mqtt.host):
        message = "the password goes over the network as it stands"
        yield Finding(("mqtt.password_file", "mqtt.tls"), message, "write tls = true, and port = 8883", fatal=False)
    if mqtt.tls and mqtt.port == 1883:
        yield Finding(("mqtt.tls", "mqtt.port"), "1883 is the port of brokers without TLS", "write port = 8883", fatal=False)
