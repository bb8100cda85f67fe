"""The clock. The daemon needs none; certificates do."""

from __future__ import annotations

import ctypes

from edgeadapt.runtime.daemon.examine.terms import Findings, Found, Site

_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


def look(site: Site, synchronised: bool | None) -> Findings:
    """Whether the clock is right, where that matters: a broker's certificate is for a time."""
    mqtt = site.config.mqtt
    if not (mqtt.enabled and mqtt.tls) or synchronised is None:
        return
    if synchronised:
        yield Found("clock", "fine", "synchronised")
        return
    text = f"not synchronised: while it is wrong, the certificate of {mqtt.host} may seem to be of another time, and MQTT is refused"
    yield Found("clock", "warning", text, "sudo timedatectl set-ntp true; a board without a network needs a clock with a battery")


def synchronised() -> bool | None:
    """Whether the kernel holds its clock to be right; None where that is not known. Asks, and changes nothing."""
    try:
        asked = ctypes.create_string_buffer(512)  # struct timex with modes 0, and room
        state = ctypes.CDLL(None).adjtimex(asked)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else bool(state != _UNSYNCHRONISED)
