"""What this machine is, what it can enforce, and what is wrong with it.

  edgeadapt doctor
  edgeadapt doctor --config /etc/edgeadapt/edgeadapt.toml
  edgeadapt doctor --json | jq .problems
  edgeadapt doctor --boards

Reads /proc and /sys and starts child processes that load onnxruntime; changes nothing. With --config, and by itself where there is the daemon's file,
it also looks at what the daemon will need: configuration, unit, state folder, bundle, budget, source, libraries. It opens no device and starts no
daemon. The exit code is 1 where edgeadapt cannot be used here, or the daemon could not do its work.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgeadapt.cli.check_config import add_sources
from edgeadapt.errors import UsageError

if TYPE_CHECKING:
    from edgeadapt.devices.boards.examine import Report
    from edgeadapt.runtime.daemon.examine import Examined

NAME, HELP = "doctor", "what this machine can enforce, and what is wrong with it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--boards", action="store_true", help="list the board profiles that are shipped, and nothing else")
    add_sources(parser)
    parser.add_argument("--no-config", action="store_true", help="look at the machine alone")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report."""
    if arguments.boards:
        print(json.dumps(_boards(), indent=1) if arguments.json else _board_table())
        return 0
    from edgeadapt.devices.boards import examine

    named = arguments.config is not None or bool(arguments.set)
    if arguments.no_config and named:
        raise UsageError("--no-config looks at no configuration", "leave it out, or --config and --set")
    report, daemon = examine.look(), None
    if not arguments.no_config:
        from edgeadapt.runtime.daemon import config
        from edgeadapt.runtime.daemon import examine as needs

        if named or os.path.lexists(config.DEFAULT_PATH):
            daemon = needs.look(report, arguments.config, arguments.set)
    if arguments.json:
        json.dump(as_json(report, daemon), sys.stdout, indent=1)
        print()
    else:
        print(summary(report, daemon))
    return 0 if report.usable and (daemon is None or daemon.able) else 1


def as_json(report: Report, daemon: Examined | None = None) -> dict[str, Any]:
    """The report as plain data, with `usable`; and what the daemon needs, with `able`, where that was looked at."""
    needs = None if daemon is None else {**asdict(daemon), "able": daemon.able}
    return {**asdict(report), "usable": report.usable, "daemon": needs}


def summary(report: Report, daemon: Examined | None = None) -> str:
    """The report in words, and what the daemon needs, where that was looked at."""
    from edgeadapt.units import format_bytes

    machine, board, floor, software = report.machine, report.board, report.floor, report.software
    absent = [name for name in ("dotprod", "fp16", "i8mm") if board.arm and name not in machine.isa]
    without = f"; without {', '.join(absent)}" if absent else ""
    swaps = ", ".join(f"{swap.name} {format_bytes(swap.size)} ({format_bytes(swap.used)} used)" for swap in machine.swaps) or "no swap"
    measured = f"{format_bytes(floor.floor)} measured now" if floor.floor else "not measured"
    facts = [
        ("machine", f"{machine.model or 'unknown model'}; profile {board.key}"),
        ("system", f"Linux {machine.kernel}, {machine.arch}, {machine.bits}-bit"),
        (
            "processor",
            f"{machine.cpu}, {machine.cores} of {machine.cores_online} cores; {' '.join(machine.isa) or 'no instruction sets known'}{without}",
        ),
        (
            "memory",
            f"{format_bytes(machine.memory_total)}, {format_bytes(machine.usable)} usable now; pages of {format_bytes(machine.page)}; {swaps}",
        ),
        ("floor", f"{measured}, {format_bytes(board.floor)} in plans ({board.floor_known}): Python, numpy, onnxruntime and a trivial session"),
        ("software", ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in software.items())),
        ("providers", ", ".join(name.removesuffix("ExecutionProvider") for name in floor.providers) or "none"),
        ("calibration", report.calibration),
        ("cache", f"{report.cache.path}, {format_bytes(report.cache.free)} free"),
    ]
    parts = ["\n".join(_wrapped(f"{name:<12}", text) for name, text in facts)]
    width = max(len(ability.subject) for ability in report.abilities)
    lines = [_wrapped(f"  {'yes' if ability.able else 'no':<4}{ability.subject:<{width}}  ", ability.text) for ability in report.abilities]
    parts.append("\n".join(["what can be enforced or seen here", *lines]))
    lines = []
    for problem in report.problems:
        lines += [_wrapped("  ! " if problem.fatal else "  - ", problem.text), _wrapped("      fix: ", problem.fix)]
    parts.append("\n".join(["problems", *lines]) if lines else "no problems")
    if daemon is not None:
        parts.append(_needs(daemon))
    if not report.usable:
        parts.append("edgeadapt cannot be used here until the problems marked ! are mended")
    elif daemon is not None and not daemon.able:
        parts.append("the daemon could not do its work here until what is marked ! is mended")
    return "\n\n".join(parts)


_MARKS = {"fine": "ok", "warning": "-", "fault": "!"}


def _needs(daemon: Examined) -> str:
    width, lines = max(len(found.subject) for found in daemon.findings), []
    for found in daemon.findings:
        lines.append(_wrapped(f"  {_MARKS[found.grade]:<4}{found.subject:<{width}}  ", found.text))
        if found.fix:
            lines.append(_wrapped(f"{'':<{width + 8}}fix: ", found.fix))
    return "\n".join([f"what the daemon needs, by {daemon.config}", *lines])


def _wrapped(head: str, text: str, width: int = 118) -> str:
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False, break_on_hyphens=False)


def _boards() -> list[dict[str, Any]]:
    from edgeadapt.devices.boards import keys, load

    return [asdict(load(key)) for key in keys()]


def _board_table() -> str:
    from edgeadapt.cli.inspect import table
    from edgeadapt.units import format_bytes

    header: Sequence[str] = ("key", "board", "total", "usable", "page", "cores", "floor", "GFLOP/s", "GB/s", "instruction sets")
    rows = [
        (
            entry["key"],
            entry["name"],
            format_bytes(entry["total"]),
            format_bytes(entry["memory"]),
            format_bytes(entry["page"]),
            str(entry["cores"]),
            f"{entry['floor'] / 1e6:.1f} MB",
            f"{entry['gflops']:g}",
            f"{entry['gbps']:g}",
            " ".join(entry["isa"]),
        )
        for entry in _boards()
    ]
    return table(header, rows, left=2, words=True)
