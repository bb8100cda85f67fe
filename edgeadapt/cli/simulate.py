"""What a bundle would take on a board, before it runs there: does it fit, line by line, what else would, and what stands at the peak.

  edgeadapt simulate model.edgeadapt --board pi4-1gb --budget 128MiB
  edgeadapt simulate model.edgeadapt --role predict --batch 1 --json
  edgeadapt simulate model.edgeadapt --plot memory.html
  edgeadapt simulate model.edgeadapt --measure
  edgeadapt simulate model.edgeadapt --board orin-nano-8gb --provider cuda --budget 3GiB

The memory is that of the whole process at its peak, as the operating system counts it, once it has predicted and adapted. Lines are counted from the
bundle, measured on models made for it, or estimated. Times are rough. Nothing is run, except with --measure, which runs the configuration in a
child process on this machine and prints what was measured beside what was predicted. Exit code 5: it does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeadapt.memory.curve import Curve
    from edgeadapt.memory.simulation import BoardLike, Simulation
    from edgeadapt.terminal import Style

NAME, HELP = "simulate", "say what a bundle takes on a board"

_COLUMNS, _ROWS, _SHOWN = 72, 7, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from edgeadapt.units import parse_bytes

    parser.add_argument("bundle", metavar="X.edgeadapt", help="the bundle")
    parser.add_argument("--board", metavar="KEY|FILE", help="a board's key, or a profile of your own (default: this machine)")
    parser.add_argument("--budget", type=parse_bytes, metavar="SIZE", help="the most bytes the process may hold, such as 96MiB")
    parser.add_argument("--role", choices=("adapt", "predict", "learn"), help="what is done (default: adapt if the bundle can)")
    parser.add_argument("--batch", type=int, metavar="N", help="frames in a step (default: the role's largest)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of one operator (default: 1)")
    parser.add_argument("--provider", default="cpu", metavar="cpu|cuda", help="what graphs run on (default: cpu)")
    parser.add_argument("--slack", type=parse_bytes, default=0, metavar="SIZE", help="keep that much of the memory free for the program around it")
    parser.add_argument("--answering", action="store_true", help="answer frames while a step runs, as edgeadapt run --cap does")
    parser.add_argument("--plot", metavar="FILE.html|DIR", help="also write the curves as a page; into a folder: report.html and report.json")
    parser.add_argument(
        "--prepared",
        action=argparse.BooleanOptionalAction,
        help="the graphs as edgeadapt prepare made them for this machine (default: if there are any, where the board is this machine)",
    )
    parser.add_argument("--measure", action="store_true", help="also run it, in a child process")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the answer."""
    from edgeadapt.bundle import Bundle
    from edgeadapt.devices import boards
    from edgeadapt.errors import UsageError
    from edgeadapt.memory.measured import compare, measure
    from edgeadapt.memory.simulation import simulate

    if arguments.threads < 1:
        raise UsageError(f"--threads {arguments.threads} is not a number of threads", "give 1 or more")
    bundle = Bundle.open(arguments.bundle)
    board = boards.load(arguments.board or boards.HERE)
    if arguments.measure and arguments.provider != "cpu":
        raise UsageError("--measure runs on the processor only", "leave it out, or --provider")
    if arguments.measure and arguments.answering:
        raise UsageError("--measure runs one thing after the other", "leave it out, or --answering")
    ready = None
    if arguments.provider == "cpu" and arguments.prepared is not False and (arguments.board in (None, boards.HERE) or arguments.prepared):
        from edgeadapt.runtime.prepared import find

        ready = find(bundle, arguments.threads)
        if ready is None and arguments.prepared:
            raise UsageError(f"{bundle.path.name} was not prepared for this machine and {arguments.threads} threads", "run edgeadapt prepare first")
    asked = (arguments.role, arguments.batch, arguments.budget, arguments.threads)
    found = simulate(bundle, board, *asked, prepared=ready, provider=arguments.provider, slack=arguments.slack, answering=arguments.answering)
    measured = None
    if arguments.measure:
        from edgeadapt.devices.boards import floor

        seen = floor.look()
        ran = measure(bundle.path, found.choice, found.threads, prepared=found.with_prepared)
        measured = compare(found.ledger, ran, seen.floor - seen.code)
    if arguments.plot:
        _plot(arguments.plot, found)
    if arguments.json:
        json.dump({**found.plain(), **({"measured": measured} if measured else {})}, sys.stdout, indent=1)
        print()
    else:
        from edgeadapt.terminal import style_of

        print(text(found, board, style_of(sys.stdout), measured))
    sys.stdout.flush()
    found.check()
    return 0


def text(found: Simulation, board: BoardLike, style: Style, measured: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The answer as text."""
    from edgeadapt.units import format_bytes, format_count

    lines = f"memory of the process at its peak\n{found.ledger.table()}"
    if found.fits is False:  # the error that follows has the lines
        lines = f"memory of the process at its peak: {format_bytes(found.ledger.total)}"
    where = "" if found.provider == "cpu" else f", on its GPU ({found.provider})"
    parts = [f"{found.bundle} on {found.board}: {found.choice.words}, {format_count(found.threads, 'thread')}{where}", lines]
    if found.budget is not None and found.margin is not None:
        verdict = "fits, with" if found.fits else "does not fit:"
        parts[-1] += (
            f"\n  budget {format_bytes(found.budget)}: {verdict} {format_bytes(abs(found.margin))} {'to spare' if found.fits else 'too much'}"
        )
    if found.ledger.total > board.memory or (found.budget or 0) > board.memory:
        parts[-1] += f"\n  one process can use {format_bytes(board.memory)} of this board's memory"
    if found.passed_over:
        parts.append(f"not used, because the GPU lacks operators of theirs: {', '.join(found.passed_over)}")
    if found.on_processor:
        parts.append(f"with nodes that run on the processor, because the GPU lacks them: {', '.join(found.on_processor)}")
    parts.append(_choices(found))
    if measured:
        parts.append(_compared(measured))
    parts += [_curve(curve, style) for curve in found.curves[:1]]
    return "\n\n".join(parts)


def _choices(found: Simulation) -> str:
    from edgeadapt.cli.inspect import table
    from edgeadapt.units import format_bytes

    rows = []
    for choice in found.choices:
        fits = {None: "", True: "fits", False: "no"}[choice.fits]
        mark = "best" if choice.best else ""
        form = "prepared" if choice.prepared else "exported"
        prepacked = "prepacked" if choice.prepacking else "as stored"
        prepacked = "on the GPU" if found.provider == "cuda" else prepacked
        piece, time = str(choice.micro or ""), (found.time(choice.seconds), found.time(choice.per_frame))
        frames = (str(choice.batch), str(choice.predicts), piece)
        rows.append((choice.graph, choice.role, *frames, form, prepacked, format_bytes(choice.total), *time, fits, mark))
    measures = ("memory", "a step", "a frame", "budget" if found.budget else "", "")
    header = ("graph", "role", "batch", "predicts", "in pieces of", "form", "weights", *measures)
    body = table(header, rows, left=2, words=True)
    return f"configurations that no other beats in memory, time and batch; times are {found.times}\n{body}"


def _curve(curve: Curve, style: Style) -> str:
    from edgeadapt.cli.inspect import table
    from edgeadapt.units import format_bytes, format_shape

    if not curve.points:
        return f"{curve.graph}: no nodes"
    head = f"{curve.graph}: {format_bytes(curve.most)} in use at {curve.where}"
    rows = [
        (item.tensor, format_shape(item.shape) if item.shape else "", format_bytes(item.bytes), item.op, item.place)
        for item in curve.standing[:_SHOWN]
    ]
    rest = curve.standing[_SHOWN:]
    if rest:
        rows.append((f"{len(rest)} more", "", format_bytes(sum(item.bytes for item in rest)), "", ""))
    standing = table(("held there", "shape", "size", "made by", "module"), rows, left=1, words=True)
    return "\n".join([head, *chart(curve.points, style), standing])


def chart(points: Sequence[int], style: Style, columns: int = _COLUMNS, rows: int = _ROWS) -> list[str]:
    """Bytes along the nodes as columns of characters, the largest of its stretch each, with the scale at the left."""
    from edgeadapt.memory.curve import thinned
    from edgeadapt.units import format_bytes

    top = max(points)
    steps = " ▁▂▃▄▅▆▇█" if style.blocks else "  ..::||#"
    heights = [round(value / max(top, 1) * rows * 8) for value in thinned(points, columns)]
    lines = []
    for row in range(rows, 0, -1):
        label = format_bytes(top) if row == rows else "0 B" if row == 1 else ""
        bars = "".join(steps[min(max(height - (row - 1) * 8, 0), 8)] for height in heights)
        lines.append(f"  {label:>9} {style.paint('│' if style.blocks else '|', 'soft')}{style.paint(bars, 'with')}".rstrip())
    return lines


def _compared(measured: Sequence[Mapping[str, Any]]) -> str:
    from edgeadapt.cli.inspect import table

    rows = [(line["name"], f"{line['predicted']:,}", f"{line['measured']:,}", _apart(line["predicted"], line["measured"])) for line in measured]
    body = table(("line", "predicted", "measured", "apart"), rows, left=1)
    return f"predicted beside measured, in a child process on this machine, bytes\n{body}"


def _apart(predicted: int, measured: int) -> str:
    return f"{100 * (predicted / measured - 1):+.1f} %" if measured else "–"


def _plot(target: str, found: Simulation) -> None:
    from pathlib import Path

    from edgeadapt.errors import UsageError
    from edgeadapt.report import memory, page

    if not target.endswith(".html"):
        page.write(target, memory.page_of(found), found.plain())
        return
    try:
        Path(target).write_text(page.render(memory.page_of(found)), encoding="utf-8")
    except OSError as reason:
        raise UsageError(f"{target} cannot be written: {reason.strerror}", "give a file in a folder that is there") from None
