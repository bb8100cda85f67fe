"""How the daemon is: what it serves, how adaptation stands, where frames come from, and what happened last.

  edgeadapt status
  edgeadapt status --json | jq .guard.state

It is asked over its control socket, and answers from memory: asking writes nothing.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from edgeadapt.errors import EdgeAdaptError

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.status import Status

NAME, HELP = "status", "how the daemon is"

_WIDTH = 118


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from edgeadapt.cli.asking import add_socket

    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    add_socket(parser)


def run(arguments: argparse.Namespace) -> int:
    """Asks, and prints the answer."""
    from edgeadapt.cli.asking import client

    found = client(arguments).call("status")
    print(json.dumps(found, indent=1) if arguments.json else read(found))
    return 0


def read(found: object) -> str:
    """The answer in words.

    Raises:
        EdgeAdaptError: it is of another version, or not what a daemon says of itself.
    """
    from edgeadapt.runtime.daemon.status import VERSION

    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        hint = "use the command of the daemon's own installation, or --json"
        raise EdgeAdaptError(f"the daemon's status has version {version}, and this command reads {VERSION}", hint)
    try:
        return summary(cast("Status", found))
    except (KeyError, TypeError, ValueError, AttributeError) as reason:
        raise EdgeAdaptError(f"the daemon's status is not as it should be: {reason!r}", "use --json") from None


def summary(status: Status) -> str:
    """The status in words, without line breaks or control characters that come from elsewhere."""
    from edgeadapt.runtime.daemon.plain import one_line

    lines = []
    for name, text in _rows(status):
        head = f"{name:<12}"
        lines.append(textwrap.fill(one_line(text, 500), _WIDTH, initial_indent=head, subsequent_indent=" " * 12, break_on_hyphens=False))
    return "\n".join(lines)


def _rows(status: Status) -> Iterator[tuple[str, str]]:
    mode = status["mode"] + (f" ({status['reason']})" if status["reason"] else "")
    yield "device", f"{status['name']}, {mode}, for {_span(status['uptime_s'])}; edgeadapt {status['edgeadapt']}"
    bundle = status["bundle"]
    if bundle is None:
        yield "bundle", "none"
    else:
        yield "bundle", f"{bundle['name']} ({bundle['digest'][:12]}), {bundle['method']}" + (", on trial" if bundle["on_trial"] else "")
    yield from _adaptation(status)
    yield from _frames(status)
    yield from _means(status)
    for name, complaint in status["interfaces"].items():
        yield name, complaint or "there"
    for index, event in enumerate(status["events"]):
        moment = time.strftime("%d %b %H:%M:%S", time.localtime(event["time"]))
        yield "" if index else "events", f"{moment}  {event['kind']}: {event['text']}"


def _adaptation(status: Status) -> Iterator[tuple[str, str]]:
    guard, adaptation, compare = status["guard"], status["adaptation"], status["compare"]
    if guard is not None:
        scores = {"shift": guard["shift"], **guard["collapse"]}
        known = "".join(f", {name} {value:.3g}" for name, value in scores.items() if isinstance(value, int | float))
        yield "guard", f"{guard['state']} for {_span(guard['since_s'])}, {_count(guard['windows'], 'window')}{known}"
        if guard["last"]:
            yield "", guard["last"]
    if not adaptation["enabled"]:
        yield "adaptation", "off"
    else:
        also = [
            (adaptation["rejected"], "dropped as not finite"),
            (adaptation["paused_steps"], "not taken for want of memory"),
            (adaptation["passed"], "windows passed over"),
            (adaptation["late"], "answers late"),
        ]
        told = "".join(f", {count} {what}" for count, what in also if count)
        state = "paused by hand; " if adaptation["paused"] else ""
        yield "adaptation", f"{state}{_count(adaptation['steps'], 'step')} on {_count(adaptation['windows'], 'window')}{told}"
    if compare["frames"]:
        yield "compared", f"agrees with the model as it began on {_share(compare['agreement'])} of {_count(compare['frames'], 'frame')}"


def _frames(status: Status) -> Iterator[tuple[str, str]]:
    source, queue, predictions = status["source"], status["queue"], status["predictions"]
    last = "no frame yet" if source["last_frame_s"] is None else f"last frame {_span(source['last_frame_s'])} ago"
    alive = "" if source["live"] else f"no frames now{': ' if source['complaint'] else ''}{source['complaint']}; "
    counts = "".join(f", {kind} {count}" for kind, count in source["counts"].items() if count)
    yield "source", f"{source['type']} {source['name']}: {alive}{last}{counts}"
    yield "queue", f"{queue['length']} of {queue['limit']} frames wait, {queue['dropped']} dropped"
    pace = "" if predictions["per_second"] is None else f", {predictions['per_second']:.3g} a second"
    latency = predictions["latency_ms"]
    parts = [(latency["p50"], "half"), (latency["p95"], "95 %"), (latency["p99"], "99 %")]
    within = ", ".join(f"{what} within {value:.3g} ms" for value, what in parts if value is not None)
    bad = f" and {_count(predictions['bad'], 'bad frame')}" if predictions["bad"] else ""
    yield "predictions", f"{predictions['count']}{bad}{pace}{'; ' if within else ''}{within}"


def _means(status: Status) -> Iterator[tuple[str, str]]:
    memory, state, board = status["memory"], status["state"], status["board"]
    budget = "no budget" if memory["budget"] is None else f"budget {_bytes(memory['budget'])}"
    short = f"; level {memory['level']}: {memory['reason']}" if memory["level"] else ""
    yield "memory", f"{_bytes(memory['resident'])} held, {_bytes(memory['peak'])} at most so far, {budget}{short}"
    slots = f"active {_slot(state['active'])}{' on probation' if state['on_probation'] else ''}, last good {_slot(state['last_good'])}"
    most = "" if state["bytes_per_day"] is None else f" of {_bytes(state['bytes_per_day'])}"
    worn = f"; not written now: {state['degraded']}" if state["degraded"] else ""
    yield "state", f"generation {state['generation']}, {slots}; {_bytes(state['written_today'])}{most} written today{worn}"
    throttled = {True: "throttled", False: "not throttled", None: ""}[board["throttled"]]
    degrees = "" if board["temperature_c"] is None else f"{board['temperature_c']:.3g} °C"
    load = "" if board["load"] is None else f"load {board['load']:.3g}"
    yield "board", ", ".join(part for part in (board["model"], degrees, throttled, load) if part) or "unknown"


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{int(seconds)} s"
    minutes = int(seconds // 60)
    hours, days = minutes // 60, minutes // 1440
    return f"{minutes} min" if minutes < 60 else f"{hours} h {minutes % 60} min" if hours < 48 else f"{days} d {hours % 24} h"


def _count(count: int, thing: str) -> str:
    from edgeadapt.units import format_count

    return format_count(count, thing)


def _bytes(size: int | None) -> str:
    from edgeadapt.units import format_bytes

    return "unknown" if size is None else format_bytes(size)


def _share(share: float | None) -> str:
    return "an unknown share" if share is None else f"{100 * share:.1f} %"


def _slot(generation: int | None) -> str:
    return "none" if generation is None else str(generation)
