"""Serve a stream of frames and adapt to it: predictions as JSON lines on stdout, a summary on stderr.

  edgeadapt run model.edgeadapt --source photos/ --budget 128MiB
  edgeadapt run model.edgeadapt --source test.npz --no-adapt --report before
  edgeadapt run model.edgeadapt --source test.npz --save state.safetensors --set rate=0.001 --report after
  camera | edgeadapt run model.edgeadapt --source - --stdin-format npy --resume --save

STREAM is a folder of images (one folder a class gives the truth), an .npz file (x: uint8 N x H x W x C or float32 N x C x H x W; perhaps y), an .npy
file (x alone), or - for standard input: one image path a line, or JSON {"path": "a.png", "label": 3}; with --stdin-format npy, arrays as
numpy.save writes them, one after another, each a frame or several; with csv or jsonl, lines of numbers, each a frame or a sample (docs/sources.md).

One line a frame, in their order: index, id, label, name, confidence, entropy (nats), ms (of its window, a frame), adapted, truth where it is known.
Segmentation has shares (of pixels, by class) instead of label and name, and error instead of truth. A frame that cannot be used has index, id and
error, and the stream goes on. Frames are taken in windows of --batch and adapted on; what is left at the end is predicted.

With --guard a guard decides what of adaptation each window gets: steps only where the stream is shifted and of several classes; what was learned is
proven before it is kept, and put back where it harms (docs/guard.md). Decisions are told at the end, and as they are made in the file of --verdicts.

With --budget only what fits is loaded, and a bundle that cannot adapt in it is refused: add --no-adapt to predict only. When memory runs short on the
way, adaptation pauses first; every such change is told when it happens and again at the end, on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt import plainfile
from edgeadapt.errors import InputError, SourceError, StateError, UsageError

if TYPE_CHECKING:
    from edgeadapt.bundle import Bundle
    from edgeadapt.report.stream import Tally
    from edgeadapt.runtime.adapter import Adapter
    from edgeadapt.runtime.guard import Guard
    from edgeadapt.runtime.phases import Verdict
    from edgeadapt.runtime.stream import Stream

NAME, HELP = "run", "serve a stream of frames and adapt to it"

_VERDICTS = 8  # of a guard, that are shown at the end
_BESIDE = ""  # --save without a path: the slots beside the bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from edgeadapt.cli.lists import count
    from edgeadapt.units import parse_bytes

    parser.add_argument("bundle", metavar="X.edgeadapt", help="the bundle")
    parser.add_argument("--source", metavar="STREAM", required=True, help="a folder of images, an .npz or .npy file, or - for standard input")
    parser.add_argument("--stdin-format", choices=("paths", "npy", "csv", "jsonl"), default="paths", help="what standard input is (default: paths)")
    parser.add_argument("--adapt", action=argparse.BooleanOptionalAction, default=True, help="adapt to the frames (default), or only predict")
    parser.add_argument("--batch", type=int, metavar="N", help="frames in a window, a batch of the bundle (default: found at export, or the largest)")
    parser.add_argument("--single", action="store_true", help="answer each frame at once; it then waits in a window that is adapted on when full")
    parser.add_argument("--every", type=count, default=1, metavar="N", help="take a step on each Nth window (default: 1)")
    parser.add_argument("--alike", type=float, metavar="DIFFERENCE", help="with --single: frames that differ less from the last join no window")
    parser.add_argument("--cap", type=float, metavar="MS", help="with --single: answer within so many milliseconds, and adapt beside the answers")
    parser.add_argument("--guard", action="store_true", help="have a guard decide, window by window, what of adaptation the stream gets")
    parser.add_argument("--verdicts", metavar="FILE", help="with --guard: append its decisions there, with their numbers, one JSON object a line")
    parser.add_argument("--budget", type=parse_bytes, metavar="SIZE", help="the most bytes the process may hold resident, such as 128MiB")
    parser.add_argument("--reserve", type=parse_bytes, metavar="SIZE", help="with --budget: give way when the system has less than this left")
    parser.add_argument("--slack", type=parse_bytes, default=0, metavar="SIZE", help="with --budget: keep that much of it free")
    parser.add_argument("--provider", default="cpu", metavar="cpu|cuda", help="what graphs run on (default: cpu)")
    parser.add_argument(
        "--prepared",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="have the graphs optimised for this machine once, before the first frame, and run those (default)",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of one operator (default: 1)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--state", metavar="PATH", help="begin with the state saved in that file, or in a folder of slots")
    start.add_argument("--resume", action="store_true", help="begin with the newest state saved beside the bundle")
    parser.add_argument("--save", nargs="?", const=_BESIDE, metavar="PATH", help="save the state at the end, to that file or else beside the bundle")
    parser.add_argument("--limit", type=count, metavar="N", help="stop after that many frames")
    parser.add_argument("--top", type=count, default=1, metavar="K", help="also print the K likeliest classes of each frame")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a scalar of the method: rate=0.001; may be repeated")
    parser.add_argument("--report", metavar="DIR", help="write report.html and report.json there")


def run(arguments: argparse.Namespace) -> int:
    """Serves the stream to its end."""
    from edgeadapt.bundle import Bundle
    from edgeadapt.devices.sources import open_source
    from edgeadapt.preprocess import unlike
    from edgeadapt.progress import Bars
    from edgeadapt.report.stream import Tally
    from edgeadapt.runtime.adapter import Adapter
    from edgeadapt.runtime.guard import Guard
    from edgeadapt.runtime.guarded import check_guarded, guarding_bytes
    from edgeadapt.runtime.hyper import Hyper
    from edgeadapt.runtime.stream import Stream, check_schedule, served_as

    settings = _settings(arguments.set)
    _check_report(arguments.report)
    if arguments.verdicts is not None and not arguments.guard:
        raise UsageError("--verdicts are those of a guard, and there is none", "add --guard, or leave --verdicts out")
    used: dict[str, Any] = {"roles": "adapt" if arguments.adapt else "predict"}
    used |= {name: getattr(arguments, name) for name in ("reserve", "prepared", "provider", "slack")}
    bundle = Bundle.open(arguments.bundle, verify=False)
    if arguments.budget is not None and arguments.batch is not None:
        used["batches"] = [arguments.batch]
    elif arguments.budget is not None and arguments.adapt and (searched := bundle.manifest.searched) is not None:
        used["batches"] = [size for size in bundle.manifest.batches if size <= searched.window]  # larger ones would not be run
    check_schedule(arguments.adapt, arguments.single, arguments.every, arguments.alike, arguments.guard, arguments.cap)
    used["answering"] = arguments.cap is not None
    if arguments.cap is not None and arguments.provider != "cpu":
        raise UsageError("--cap answers frames on the processor only", "leave out --cap, or --provider")
    if arguments.guard:
        check_guarded(bundle.manifest)
        used["slack"] += guarding_bytes(bundle.manifest) if arguments.budget is not None else 0
    served_as(bundle.manifest, arguments.adapt, arguments.batch)  # mistakes are told before anything takes long
    Hyper(bundle.manifest.hyper).with_(settings)
    _check_save(bundle, arguments.save)
    if odd := unlike(bundle.manifest):
        print(f"warning: {odd}", file=sys.stderr)
    with open_source(arguments.source, bundle.manifest, arguments.stdin_format) as source:
        with Bars() as bars:
            opened = Adapter.open(arguments.bundle, arguments.budget, arguments.threads, prepare=bars, **used)
        with opened as adapter:
            if arguments.state or arguments.resume:
                adapter.load(arguments.state)
            adapter.hyper = settings
            guard = Guard(adapter, tell=_teller(arguments.verdicts)) if arguments.guard else None
            how: dict[str, Any] = {name: getattr(arguments, name) for name in ("single", "every", "alike", "cap")}
            stream = Stream(adapter, arguments.adapt, arguments.batch, guard=guard, **how)
            tally = Tally(adapter.manifest.task.kind)
            begun = adapter.stats
            try:
                with closing(stream.run(_first(source, arguments.limit))) as answers:  # a step that goes on beside them is waited for
                    _serve(adapter, answers, tally, arguments.top)
            finally:  # also when interrupted or broken off: what was served is told and kept
                _close(adapter, tally, begun, source.name, arguments, guard, stream)
    if not tally.frames:
        raise SourceError(f"{source.name} gave no frames", "check the path, and that its files are images this machine can read")
    if tally.bad == tally.frames:
        message = f"none of the {tally.frames} frames could be used; the first: {tally.fault}"
        raise InputError(message, "give frames as the bundle takes them: see edgeadapt inspect")
    return 0


def _serve(adapter: Adapter, windows: Any, tally: Tally, top: int) -> None:
    """Prints each window as soon as it is answered."""
    from edgeadapt.report.stream import wrong
    from edgeadapt.runtime.lines import line
    from edgeadapt.runtime.stream import decide

    task = adapter.manifest.task
    for window in windows:
        lines = []
        for prediction in window:
            decision = None if prediction.logits is None else decide(prediction.logits)
            lines.append(json.dumps(line(prediction, decision, task, top)))
            if decision is None:
                tally.bad_frame(prediction.frame.fault)
            else:
                off = wrong(decision.classes, prediction.frame.truth, task.classes)
                tally.frame(off, decision.confidence, decision.entropy, prediction.milliseconds)
        tally.window(adapter.memory["resident"] or 0)
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()


def _close(
    adapter: Adapter, tally: Tally, begun: dict[str, int], source: str, arguments: argparse.Namespace, guard: Guard | None, stream: Stream
) -> None:
    """Saves what is to be saved and prints the summary."""
    from edgeadapt.report.page import write
    from edgeadapt.report.stream import summary

    if not tally.frames:
        return
    ended, memory = adapter.stats, adapter.memory
    steps, rejected = (ended[name] - begun[name] for name in ("steps", "rejected_steps"))
    rows = tally.rows(steps, rejected, memory["peak"] or 0, memory["budget"])
    if arguments.cap is not None:
        rows.append(("cap", f"{stream.late} of {tally.frames} answers took more than {arguments.cap:g} ms; {stream.passed} windows were passed over"))
    if paused := ended["paused_steps"] - begun["paused_steps"]:
        rows.append(("paused", f"{paused} steps were not taken because memory was short"))
    rows += [("" if index else "level", f"after {change}") for index, change in enumerate(adapter.changes)]
    if guard is not None:
        if arguments.save is not None:
            guard.settle()
        latest = list(guard.verdicts)[-_VERDICTS:]
        rows.append(("guard", f"{guard.phase.value} at the end; {len(guard.verdicts)} decisions" + (", the latest:" if latest else "")))
        rows += [("", str(verdict)) for verdict in latest]
    if arguments.save is not None:
        rows.append(("state", f"saved to {adapter.save(arguments.save or None)}"))
    if arguments.report is not None:
        facts = {
            "bundle": adapter.bundle.path.name,
            "digest": adapter.bundle.digest,
            "method": adapter.manifest.method.name,
            "source": source,
            "adapt": arguments.adapt,
            "steps": steps,
            "rejected_steps": rejected,
            "hyper": _used(adapter, stream.window),
            **({} if arguments.cap is None else {"cap_ms": arguments.cap, "late": stream.late, "passed_windows": stream.passed}),
            **({} if guard is None else {"guard": [verdict.plain() for verdict in guard.verdicts]}),
        }
        page, data = summary(tally, facts, memory["peak"] or 0, memory["budget"])
        rows.append(("report", str(write(arguments.report, page, data))))
    print("\n".join(f"{name:<10} {value}" for name, value in rows), file=sys.stderr)


def _teller(path: str | None) -> Callable[[Verdict], None] | None:
    """Appends decisions to a file as they are made, so that they are there whatever happens next.

    Raises:
        UsageError: it cannot be written.
    """
    if path is None:
        return None
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as reason:
        raise UsageError(f"decisions cannot be written to {path}: {reason.strerror}", "give --verdicts a file that can be made or written") from None

    failed = False

    def tell(verdict: Verdict) -> None:
        nonlocal failed
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(verdict.plain()) + "\n")
        except OSError as reason:  # the stream goes on
            if not failed:
                print(f"{path}: decisions are no longer written: {reason.strerror}", file=sys.stderr)
            failed = True

    return tell


def _first(frames: Any, limit: int | None) -> Any:
    """The first frames, without waiting for one more than is asked for."""
    from itertools import islice

    return frames if limit is None else islice(frames, limit)


def _settings(given: Sequence[str]) -> dict[str, float]:
    values = {}
    for text in given:
        name, mark, value = text.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            mark = ""
        if not mark:
            raise UsageError(f"--set {text} is not NAME=VALUE with a number", "write --set rate=0.001")
    return values


def _used(adapter: Adapter, batch: int) -> dict[str, float]:
    """The scalars that the windows were served with: those that were set, else the graph's own defaults, else the bundle's."""
    graphs = [graph for graph in adapter.manifest.graphs.values() if graph.role == "adapt"] or list(adapter.manifest.graphs.values())
    own = {name: value for graph in graphs if graph.batch == batch for name, value in graph.defaults.items()}
    return {**adapter.hyper, **own, **adapter.hyper.chosen}


def _check_save(bundle: Bundle, given: str | None) -> None:
    """Looks at where the state will go, before the stream begins.

    Raises:
        StateError: it could not be saved there.
    """
    if given is None:
        return
    path = Path(given) if given else bundle.path.with_name(bundle.path.name + ".state")
    folder = path.parent
    if given and path.is_dir():
        raise StateError(f"the state cannot be saved to {path}: it is a folder", f"name a file, such as {path / 'state.safetensors'}")
    if not folder.is_dir():
        raise StateError(f"the state cannot be saved to {path}: {folder} is no folder", f"mkdir -p {folder}, or give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StateError(f"the state cannot be saved to {path}: {folder} is read-only", "give --save a path that can be written")


def _check_report(given: str | None) -> None:
    """Looks at where the report will go, before the stream begins.

    Raises:
        UsageError: it could not be written there.
    """
    if given is None:
        return
    present = plainfile.present(Path(given))
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        why = "is read-only" if present.is_dir() else "is not a folder"
        raise UsageError(f"the report cannot be written to {given}: {present} {why}", "give --report a folder that can be made or written")
