"""What Home Assistant is told of a device, so that it shows up there by itself: one retained message that announces all its entities.

The form is the device-based one of its MQTT integration (Home Assistant 2024.12 and later): a message at PREFIX/device/ID/config with what the
entities share, and under "components" each of them. An empty message there removes the device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from edgeadapt._version import __version__
from edgeadapt.runtime.daemon.plain import as_json

ON, OFF = "ON", "OFF"
"""What the switch sends: adaptation is to pause, or to go on."""

_ORIGIN = "edgeadapt"
_MEASURED = {"state_class": "measurement"}
_DIAGNOSTIC = {**_MEASURED, "entity_category": "diagnostic"}


def topic(prefix: str, identity: str) -> str:
    """Where the device with that identity is announced."""
    return f"{prefix}/device/{identity}/config"


def announcement(root: str, identity: str, name: str, model: str) -> str:
    """The message, JSON.

    Args:
        root: what the device's own topics begin with, without a / at the end.
        identity: of the device, the same for ever: letters, digits, _ and -.
        name: what people call it.
        model: of the board; "" where it is not known.
    """
    device = {"identifiers": [identity], "name": name, "manufacturer": _ORIGIN, "model": model or "edgeadapt device", "sw_version": __version__}
    available = "{{ 'online' if value == 'online' else 'offline' }}"  # "stopped" is offline too
    shared = {
        "device": device,
        "origin": {"name": _ORIGIN, "sw_version": __version__},
        "availability": [{"topic": f"{root}/state", "value_template": available}],
        "qos": 1,
    }
    parts = {key: {"unique_id": f"{identity}-{key}", **part} for key, part in entities(root).items()}
    return as_json({**shared, "components": parts})


def entities(root: str) -> dict[str, dict[str, object]]:
    """The entities by a short name; topics begin with `root`."""
    health = f"{root}/health"

    def sensor(name: str, value: str, **more: object) -> dict[str, object]:
        return {"platform": "sensor", "name": name, "state_topic": health, "value_template": f"{{{{ value_json.{value} }}}}", **more}

    def button(name: str, verb: str, icon: str) -> dict[str, object]:
        return {
            "platform": "button",
            "name": name,
            "command_topic": f"{root}/request/{verb}",
            "payload_press": "{}",
            "entity_category": "config",
            "icon": icon,
        }

    return {
        "state": sensor("State", "state", icon="mdi:state-machine"),
        "prediction": {
            "platform": "sensor",
            "name": "Prediction",
            "state_topic": f"{root}/prediction",
            "value_template": "{{ value_json.text[:255] }}",
            "qos": 0,
            "icon": "mdi:tag-outline",
        },
        "shift": sensor("Shift", "shift", suggested_display_precision=2, icon="mdi:chart-bell-curve", **_MEASURED),
        "memory": sensor("Memory", "memory", device_class="data_size", unit_of_measurement="B", suggested_unit_of_measurement="MiB", **_DIAGNOSTIC),
        "temperature": sensor("Temperature", "temperature", device_class="temperature", unit_of_measurement="°C", **_DIAGNOSTIC),
        "pace": sensor("Frames per second", "per_second", unit_of_measurement="frames/s", suggested_display_precision=1, **_DIAGNOSTIC),
        "rollback": button("Roll back", "rollback", "mdi:backup-restore"),
        "mark-good": button("Mark good", "mark-good", "mdi:check-decagram-outline"),
        "pause": {
            "platform": "switch",
            "name": "Pause adaptation",
            "command_topic": f"{root}/set/pause",
            "payload_on": ON,
            "payload_off": OFF,
            "state_topic": health,
            "value_template": "{{ 'ON' if value_json.paused else 'OFF' }}",
            "state_on": ON,
            "state_off": OFF,
            "entity_category": "config",
            "icon": "mdi:pause-circle-outline",
        },
    }


def is_ours(payload: bytes, identity: str) -> bool:
    """Whether a retained message at `topic` is an announcement of that device by this program, and so may be taken back."""
    try:
        told = json.loads(payload)
    except (ValueError, RecursionError):
        return False
    if not isinstance(told, Mapping):
        return False
    origin, device = told.get("origin"), told.get("device")
    if not isinstance(origin, Mapping) or not isinstance(device, Mapping):
        return False
    return origin.get("name") == _ORIGIN and device.get("identifiers") == [identity]
