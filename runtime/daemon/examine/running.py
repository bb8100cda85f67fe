"""Whether a daemon runs, and what it says of itself."""

from __future__ import annotations

import os

from edgeadapt import plainfile
from edgeadapt.errors import EdgeAdaptError
from edgeadapt.runtime.daemon.client import Client
from edgeadapt.runtime.daemon.examine.terms import Findings, Found, Site
from edgeadapt.runtime.daemon.examine.who import belongs
from edgeadapt.runtime.daemon.plain import one_line

SUBJECT = "daemon"
_PATIENCE = 5.0


def look(site: Site) -> tuple[bool, list[Found]]:
    """Whether one runs, by its control socket, and what there is to say of it."""
    path = site.config.control.socket
    active = site.unit is not None and site.unit.told.get("ActiveState") == "active"
    if not os.path.lexists(path):
        return active, list(_absent(site, active))
    try:
        status = Client(path, timeout=_PATIENCE).call("status")
    except EdgeAdaptError as reason:
        if reason.message.startswith("no daemon listens"):
            return active, list(_absent(site, active))
        return True, [Found(SUBJECT, "warning", one_line(reason.message, 300), reason.hint)]
    return True, list(_told(status if isinstance(status, dict) else {}))


def _absent(site: Site, active: bool) -> Findings:
    path = site.config.control.socket
    if active:
        text = f"the unit runs, and nothing answers at {path}: its configuration is another one, or it is just starting"
        yield Found(SUBJECT, "warning", text, "journalctl -u edgeadapt says what it does")
        return
    folder, who = path.parent, site.who
    present = plainfile.present(folder)
    if who is not None and not site.made(str(folder), "runtime") and who.may(present, os.W_OK | os.X_OK) is False:
        text = f"none runs, and {who.name} may not make {path}, since {present} is {belongs(present)}: it ends as soon as it starts"
        yield Found(SUBJECT, "fault", text, "install the unit, for which systemd makes /run/edgeadapt; or name another path (control.socket)")
        return
    yield Found(SUBJECT, "fine", f"none runs now (nothing answers at {path})")


def _span(seconds: float) -> str:
    """How long, to one unit: "40 s", "5 min", "3 h", "12 d"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _told(status: dict[str, object]) -> Findings:
    mode, reason = str(status.get("mode")), one_line(str(status.get("reason") or ""), 300)
    seconds = status.get("uptime_s")
    hours = f" for {_span(seconds)}" if isinstance(seconds, int | float) else ""
    if mode == "safe":
        yield Found(SUBJECT, "warning", f"runs{hours}, and does less than was asked for: {reason}", "edgeadapt status says more")
    else:
        yield Found(SUBJECT, "fine", f"runs{hours}: {mode}{f' ({reason})' if reason and mode != 'serving' else ''}")
    interfaces = status.get("interfaces")
    for name, complaint in interfaces.items() if isinstance(interfaces, dict) else ():
        if complaint:
            text = f"is not there over {one_line(str(name), 20)}: {one_line(str(complaint), 300)}"
            yield Found(SUBJECT, "warning", text, "edgeadapt status says more")
    state, source = status.get("state"), status.get("source")
    if isinstance(state, dict) and state.get("degraded"):
        yield Found(SUBJECT, "warning", f"writes nothing to the disk now: {one_line(str(state['degraded']), 300)}", "edgeadapt status says more")
    if mode != "starting" and isinstance(source, dict) and source.get("complaint") and not source.get("live"):
        yield Found(SUBJECT, "warning", f"gets no frames now: {one_line(str(source['complaint']), 300)}", "edgeadapt status says more")
