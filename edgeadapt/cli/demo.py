"""Watch a model adapt: handwritten digits, while the camera's picture goes bad and mends again.

  edgeadapt demo
  edgeadapt demo --fast --batch --report demo

Test images run through noise, blur, glare, haze, snow and bad focus. The same frames are read by the model as it was trained and by the one that
adapts, in one process under one memory budget. At the end: a table, and a page with the whole course.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeadapt.demo.loop import Tally, Window
    from edgeadapt.runtime.adapter import Adapter

NAME, HELP = "demo", "watch a small model adapt to a picture that goes bad"
FRAMES, FAST, BUDGET = 25_600, 5_120, 128 * 2**20
SPEED = 1024  # frames a second at most in the moving view, so that one can watch it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from edgeadapt.units import parse_bytes

    parser.add_argument("--frames", type=int, metavar="N", help=f"about how many frames to read (default: {FRAMES})")
    parser.add_argument("--fast", action="store_true", help=f"only {FAST} frames")
    parser.add_argument("--budget", type=parse_bytes, default=BUDGET, metavar="SIZE", help="of the whole process (default: 128MiB)")
    parser.add_argument("--no-color", action="store_true", help="no colours, as NO_COLOR=1 does too")
    parser.add_argument("--batch", action="store_true", help="one line a stage in place of the moving view")
    parser.add_argument("--report", metavar="DIR", help="where report.html and report.json go (default: a new temporary folder)")


def run(arguments: argparse.Namespace) -> int:
    """Shows the demo."""
    import tempfile

    from edgeadapt.demo import digits, report, view
    from edgeadapt.demo.loop import Tally, plan, warm
    from edgeadapt.report import write
    from edgeadapt.runtime.adapter import Adapter
    from edgeadapt.terminal import is_live, style_of

    images, labels = digits.testing()
    with Adapter.open(digits.BUNDLE, arguments.budget, roles=("adapt", "source"), batches=[16]) as adapter:
        batch = adapter.manifest.planned("adapt")[0]
        windows = plan(arguments.frames or (FAST if arguments.fast else FRAMES), batch, len(images))
        tally = Tally(arguments.budget, len(windows) * batch)
        style = style_of(sys.stdout, not arguments.no_color)
        moving = not arguments.batch and is_live(sys.stdout, view.COLUMNS, view.ROWS)
        warm(adapter, images, batch)
        try:
            (_watch if moving else _list)(adapter, windows, (images, labels), tally, style)
        finally:  # interrupted: what was seen so far
            if tally.all.frames:
                print("\n" + "\n".join(view.table(tally, style)))
        page, data = report.page(tally, facts(adapter, batch))
        print(f"report    {write(arguments.report or tempfile.mkdtemp(prefix='edgeadapt-demo-'), page, data)}")
    return 0


def facts(adapter: Adapter, batch: int) -> dict[str, Any]:
    """What the report says about the model and the run."""
    manifest, stats = adapter.manifest, adapter.stats
    return {
        "bundle": adapter.bundle.path.name,
        "digest": adapter.bundle.digest,
        "model": manifest.model.name,
        "parameters": manifest.model.parameters,
        "method": manifest.method.name,
        "batch": batch,
        "steps": stats["steps"] - 1,  # less the one that warmed up
        "rejected_steps": stats["rejected_steps"],
        "peak_bytes": adapter.memory["peak"] or 0,
    }


def _watch(adapter: Adapter, windows: list[Window], data: tuple[Any, Any], tally: Tally, style: Any) -> None:
    """Runs the windows and draws them in place."""
    import time

    from edgeadapt.demo import view
    from edgeadapt.demo.loop import steps
    from edgeadapt.terminal import Screen

    manifest, begin = adapter.manifest, time.monotonic()
    title = f"edgeadapt demo: {manifest.model.parameters:,} parameters, {manifest.method.name}, no labels"
    with Screen(sys.stdout) as screen:
        for step in steps(adapter, windows, *data):
            tally.add(step)
            if screen.due() or tally.all.frames == tally.planned:
                screen.draw(view.live(step, tally, style, title))
                # only here: windows that follow each other are timed as a busy device runs them
                time.sleep(max(0.0, begin + tally.all.frames / SPEED - time.monotonic()))


def _list(adapter: Adapter, windows: list[Window], data: tuple[Any, Any], tally: Tally, style: Any) -> None:
    """Runs the windows and prints a line when a stage is over."""
    from edgeadapt.demo import view
    from edgeadapt.demo.loop import steps

    for number, step in enumerate(steps(adapter, windows, *data)):
        tally.add(step)
        position = step.window.position
        if number + 1 == len(windows) or windows[number + 1].position != position:
            print(view.stage_line(position, tally), flush=True)
