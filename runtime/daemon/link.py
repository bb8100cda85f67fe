"""A connection to an MQTT broker that opens itself again, over paho-mqtt, which is loaded only here and only when it is started.

Nothing here waits for the broker: what is sent is handed to a thread of paho's, and only so much of it may be on its way at once. A client keeps its
name from start to start, so that the broker ends a connection that hangs, with its will, before it takes the next one: a will that came later would
say "offline" of a daemon that is there.
"""

from __future__ import annotations

import logging
import os
import random
import ssl
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeadapt.errors import UsageError
from edgeadapt.runtime.daemon.config import MqttConfig
from edgeadapt.runtime.daemon.plain import one_line

LOG = logging.getLogger("edgeadapt")

ON_THE_WAY = 32
"""Messages that the broker has not taken yet, at most."""

PAUSES = (1.0, 120.0)
"""Seconds before the first attempt to connect again, and at most; doubled each time, each less up to its half by chance."""

KEEPALIVE, _CONNECT, _STEADY, _SECRET = 30, 10.0, 10.0, 65535


class Link:
    """A connection to the broker of `settings`, opened by `start` and again whenever it ends.

    Args:
        settings: with a host.
        client: the client's name at the broker.
        will: topic and payload of what the broker says, retained, when the connection breaks off.
        topics: those to hear of.
        received: is told topic, payload and whether the message was retained. It and `connected` are called from paho's thread, and must not wait.
        connected: is called whenever a connection was made.
        pauses: seconds; see PAUSES.

    Attributes:
        connected: whether there is a connection now. complaint: why there is none; "" while there is.
        connections: made so far.

    Raises:
        UsageError: paho-mqtt is missing, the host is no name, or a file with a password or certificates cannot be used.
    """

    def __init__(
        self,
        settings: MqttConfig,
        client: str,
        will: tuple[str, str],
        topics: Sequence[str],
        received: Callable[[str, bytes, bool], None],
        connected: Callable[[], None],
        pauses: tuple[float, float] = PAUSES,
    ) -> None:
        self._settings, self._topics, self._pauses = settings, tuple(topics), pauses
        self._received, self._told = received, connected
        self.connected, self.complaint, self.connections = False, "not connected yet", 0
        self._fails, self._since = 0, 0.0
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, int, Any]] = []
        self._where = f"{settings.host}:{settings.port}"
        self._client = self._made(client, will)

    def start(self) -> None:
        """Connects, in a thread of its own, again and again until it can. Does not wait."""
        self._client.connect_async(self._settings.host, self._settings.port, keepalive=KEEPALIVE)
        self._client.loop_start()

    def send(self, topic: str, payload: str, qos: int = 1, retain: bool = False) -> bool:
        """Hands a message over, without waiting. False: not taken, since there is no connection, or as much is on its way as may be."""
        with self._lock:
            if not self.connected or len(self._outstanding()) >= ON_THE_WAY:
                return False
            self._waiting.append((topic, qos, self._client.publish(topic, payload, qos, retain)))
            return True

    @property
    def room(self) -> int:
        """How many messages would be taken now."""
        with self._lock:
            return ON_THE_WAY - len(self._outstanding())

    def waits(self, topic: str) -> bool:
        """Whether a message for that topic is still on its way."""
        with self._lock:
            return any(other == topic for other, _, _ in self._outstanding())

    def close(self, topic: str, payload: str, seconds: float = 2.0) -> None:
        """Leaves a last retained message, if the broker takes it in time, and ends the connection without its will."""
        until = time.monotonic() + seconds
        if self.send(topic, payload, retain=True):
            while self.connected and self.waits(topic) and time.monotonic() < until:
                time.sleep(0.01)
        ends = threading.Thread(target=self._end, name="mqtt ends", daemon=True)
        ends.start()
        ends.join(max(0.1, until - time.monotonic()))  # paho may just wait for a name to be resolved; its thread ends later and holds up nothing

    def _end(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _outstanding(self) -> list[tuple[str, int, Any]]:
        self._waiting = [one for one in self._waiting if not _gone(one[2])]
        return self._waiting

    def _made(self, name: str, will: tuple[str, str]) -> Any:
        try:
            from paho.mqtt.client import Client, MQTTv311
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError:
            raise UsageError("MQTT needs paho-mqtt of version 2, which is not installed", "pip install edgeadapt[mqtt]") from None
        settings = self._settings
        try:
            str(settings.host or "").encode("idna")
        except UnicodeError:
            raise UsageError(f"mqtt.host: {settings.host} is no name of a host", 'write a name or an address, such as "broker.local"') from None
        # a clean session: what was asked while it was away is not done later
        client: Any = Client(CallbackAPIVersion.VERSION2, name, clean_session=True, protocol=MQTTv311)
        client.will_set(*will, qos=1, retain=True)
        client.connect_timeout = _CONNECT
        client.max_queued_messages_set(2 * ON_THE_WAY)
        if settings.username is not None:
            client.username_pw_set(settings.username, None if settings.password_file is None else _secret(settings.password_file))
        if settings.tls:
            client.tls_set_context(self._trusting())
        client.on_connect, client.on_disconnect, client.on_message = self._on_connect, self._on_disconnect, self._on_message
        client.on_connect_fail = self._on_connect_fail
        return client

    def _trusting(self) -> ssl.SSLContext:
        ca = self._settings.ca
        try:
            context = ssl.create_default_context(cafile=ca)
        except OSError as reason:  # ssl.SSLError is one
            hint = "name a file with certificates in PEM that the daemon's user can read"
            raise UsageError(f"mqtt.ca: {ca}: {reason.strerror or reason}", hint) from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    def _on_connect(self, client: Any, data: object, flags: object, code: Any, properties: object) -> None:
        if code.is_failure:
            self._failed(f"the broker {self._where} refuses: {code}")
            return
        with self._lock:
            self._waiting = [one for one in self._waiting if one[1]]  # others went with the connection; those of QoS 1 are sent again by paho
            self.connected, self.complaint, self.connections, self._since = True, "", self.connections + 1, time.monotonic()
        LOG.info("mqtt: connected to %s", self._where)
        if self._topics:
            client.subscribe([(topic, 1) for topic in self._topics])
        self._told()

    def _on_disconnect(self, client: object, data: object, flags: object, code: Any, properties: object) -> None:
        was, self.connected = self.connected, False
        if not was:  # refused, and told
            self._pause()
            return
        if time.monotonic() - self._since >= _STEADY:
            self._fails = 0
        if code.is_failure:
            self._failed(f"the connection to {self._where} broke off: {code}")
            if self._fails == 4:
                LOG.warning("mqtt: connections break off soon after they were made: does another device have this one's name?")
        self._pause()

    def _on_connect_fail(self, client: object, data: object) -> None:
        reason = sys.exc_info()[1]  # paho calls this while it handles the error
        self._failed(f"{self._where} cannot be reached" + (f": {one_line(str(reason), 150)}" if reason else ""))
        self._pause()

    def _failed(self, told: str) -> None:
        if told != self.complaint:
            LOG.warning("mqtt: %s", told)
        self.complaint = told

    def _pause(self) -> None:
        first, most = self._pauses
        seconds = min(most, first * 2 ** min(self._fails, 20)) * random.uniform(0.5, 1.0)
        self._fails += 1
        self._client.reconnect_delay_set(seconds, seconds)

    def _on_message(self, client: object, data: object, message: Any) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return
        try:
            self._received(topic, bytes(message.payload), bool(message.retain))
        except Exception as reason:  # or paho's thread would end
            LOG.exception("mqtt: a message could not be taken: %r", reason)


def _gone(info: Any) -> bool:
    with suppress(ValueError, RuntimeError):
        return bool(info.is_published())
    return True  # paho did not take it, or lost it with the connection


def _secret(path: Path) -> str:
    where = f"mqtt.password_file: {path}"
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                raise UsageError(f"{where} can be read by everybody", f"chmod o= {path}")
            text = file.read(_SECRET + 1)
    except OSError as reason:
        raise UsageError(f"{where}: {(reason.strerror or str(reason)).lower()}", "name a file that the daemon's user can read") from None
    try:
        found = text.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise UsageError(f"{where} is no text in UTF-8", "write the password into it, alone") from None
    if not found or len(text) > _SECRET:
        raise UsageError(f"{where} {'is too long' if found else 'is empty'}", "write the password into it, alone")
    return found
