"""Frames and samples from a serial line, or from whatever pyserial takes for one: a device file, socket://, rfc2217://, loop://."""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from edgeadapt.devices.framing import Decoder, Packet, most_payload
from edgeadapt.devices.sources.base import Frame, Source, Wanted
from edgeadapt.devices.sources.lines import FORMATS as TEXTS
from edgeadapt.devices.sources.lines import WRONG, Lines
from edgeadapt.errors import InputError, SourceError, UsageError
from edgeadapt.preprocess import batch_of

LOG = logging.getLogger("edgeadapt")

FORMATS = ("frames", *TEXTS)

_WAIT = 0.1  # seconds; pyserial's network ports take 0.3 more to close, and a stop is to take half a second
_BREAKS = (OSError, ValueError, termios.error)  # what pyserial raises where a device is gone or cannot do what is asked
_CHUNK = 65536  # bytes to read at once, at most
_HERE = re.compile(r"localhost|::1|127(\.\d{1,3}){3}")
_HINTS = {
    errno.ENOENT: "plug it in; ls -l /dev/serial/by-id names those that are there",
    errno.EACCES: "allow it: sudo usermod -aG dialout $USER, then log in again",
    errno.EAGAIN: "another program reads it: end that",
}
_UNREAD = ("cobs", "crc", "header", "oversize", "duplicates")  # of what `Decoder` counts
_warned: set[str] = set()


class Serial(Source):
    """A serial line. Its device is opened when it is iterated, and read until that breaks or somebody stops it.

    Args:
        url: the device, best by a name that stays its own, /dev/serial/by-id/...; or a URL that pyserial knows. Networks see what goes over them.
        wanted: what the bundle takes.
        format: "frames" (packets of `edgeadapt.devices.framing`), "csv" or "jsonl" (`edgeadapt.devices.sources.lines`).
        baud: bits a second; network lines and USB devices may not care.
        stall: seconds without a byte after which the line counts as broken.

    Raises:
        UsageError: an unknown format or scheme, or a number that cannot be.
    """

    live = True

    def __init__(self, url: str, wanted: Wanted, format: str = "frames", baud: int = 115200, stall: float = 10.0) -> None:
        if format not in FORMATS:
            raise UsageError(f"{format!r} is no format of a serial line", f"use one of {', '.join(FORMATS)}")
        if baud < 1 or not stall > 0:
            raise UsageError(f"{url} at {baud} baud, stalled after {stall} s, cannot be read", "give numbers above 0")
        self.name, self._baud, self._stall = url, baud, stall
        self._taken: _Packets | Lines = _Packets(wanted) if format == "frames" else Lines(wanted, format, midway=True)
        self.right, self.wrong = (("packets",), _UNREAD) if format == "frames" else (("lines",), WRONG)
        self.advice = f'see that its other end sends "{format}"' + ("" if "://" in url else f" at {baud} baud")
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._port: Any = None
        self._number: int | None = None  # of the port's file
        self._failed: Exception | None = None
        try:
            with suppress(OSError):  # hwgrep:// looks for its device here, which may come later
                self._unopened()
        except ValueError as reason:
            raise UsageError(f"{url} is no serial line: {reason}", "give a device's path, socket://host:port or rfc2217://host:port") from None
        if _far(url) and url not in _warned:
            _warned.add(url)
            LOG.warning("%s is neither encrypted nor authenticated: whoever is between here and there can read and write frames", url)

    @property
    def counts(self) -> Mapping[str, int]:
        """Of "frames" as `Decoder` counts, of text as `Lines` does."""
        return dict(self._taken.counts)

    def __iter__(self) -> Iterator[Frame]:
        try:
            self._open()
            heard = time.monotonic()
            while not self._stopped.is_set():
                data = self._read()
                now = time.monotonic()
                if data:
                    heard = now
                    yield from self._taken.feed(data)
                elif now - heard >= self._stall:
                    raise SourceError(f"{self.name} has sent nothing for {self._stall:g} s", "look at what is at its other end, and its cable")
        finally:
            self._release()

    def _unopened(self) -> Any:
        import serial  # here only: 1 MB that other sources do not need

        return serial.serial_for_url(self.name, do_not_open=True, baudrate=self._baud, timeout=_WAIT, exclusive=True)

    def _open(self) -> None:
        """Opens the port in a thread of its own: a host that does not answer takes seconds, which a stop does not wait for."""
        if self._stopped.is_set():
            return
        thread = threading.Thread(target=self._opening, name=f"opens {self.name}", daemon=True)
        thread.start()
        while thread.is_alive() and not self._stopped.is_set():
            thread.join(_WAIT)
        if isinstance(self._failed, _BREAKS):
            raise self._broken("cannot be opened", self._failed)
        if self._failed is not None:
            raise self._failed

    def _opening(self) -> None:
        port = None
        try:
            port = self._unopened()
            port.open()
            number = _number(port)
            if number is not None:
                port.timeout = 0  # `select` waits
        except Exception as reason:  # is raised where the source is iterated
            self._failed = reason
            if port is not None:
                _close(port)
            return
        with self._lock:
            if not self._stopped.is_set():
                self._port, self._number = port, number
                return
        _close(port)

    def _read(self) -> bytes:
        """What has come, after a short wait at most. Not by pyserial's `read_until`, nor by its sockets' `in_waiting`, which take byte by byte."""
        with self._lock:
            if self._stopped.is_set():
                return b""
            try:
                if self._number is None:
                    return bytes(self._port.read(max(1, min(self._port.in_waiting, _CHUNK))))
                return bytes(self._port.read(_CHUNK)) if select.select([self._number], [], [], _WAIT)[0] else b""
            except _BREAKS as reason:
                raise self._broken("broke off", reason) from None

    def _broken(self, what: str, reason: Exception) -> SourceError:
        number = reason.args[0] if reason.args and isinstance(reason.args[0], int) else None
        why = str(reason) if number is None else os.strerror(number)
        return SourceError(f"{self.name} {what}: {why}", _HINTS.get(number or 0, "check its cable and its power"))

    def stop(self) -> None:
        """Ends the iteration within half a second, whether it waits for its device or for a byte."""
        self._stopped.set()

    def close(self) -> None:
        """Stops, and lets go of the device."""
        self.stop()
        self._release()

    def _release(self) -> None:
        with self._lock:
            port, self._port = self._port, None
        if port is not None:
            _close(port)


class _Packets:
    """Frames out of packets."""

    def __init__(self, wanted: Wanted) -> None:
        self._spec = wanted.input
        self._decoder = Decoder(most_payload(wanted.input))
        self.counts = self._decoder.counts

    def feed(self, data: bytes) -> list[Frame]:
        return [self._frame(packet) for packet in self._decoder.feed(data)]

    def _frame(self, packet: Packet) -> Frame:
        truth = packet.label if packet.label >= 0 else None
        try:
            frames, _ = batch_of(packet.array, self._spec)
            if len(frames) > 1:
                raise InputError(f"one packet holds {len(frames)} frames", "send each in a packet of its own")
        except InputError as reason:
            return Frame(packet.sequence, None, truth, reason.message)
        return Frame(packet.sequence, frames[0], truth)


def _number(port: Any) -> int | None:
    try:
        return int(port.fileno())
    except OSError:  # a port that is no file
        return None


def _close(port: Any) -> None:
    """Closes it; also a socket whose other end is gone, which pyserial leaves to the garbage collector."""
    left = getattr(port, "_socket", None)
    with suppress(OSError, termios.error):  # it is gone
        port.close()
    if left is not None:
        left.close()


def _far(url: str) -> bool:
    """Whether it goes over a network, and not only this machine's own."""
    if not url.lower().startswith(("rfc2217://", "socket://")):
        return False
    from urllib.parse import urlsplit  # pyserial has loaded it for these

    try:
        return not _HERE.fullmatch(urlsplit(url).hostname or "")
    except ValueError:
        return True
