"""Measure what adaptation does for a model on your own data: streams that drift, with and without adapting, each figure with its interval.

  edgeadapt bench model.edgeadapt --data test.npz
  edgeadapt bench tent.edgeadapt ecotta.edgeadapt --data test.npz --streams all --batch 4,16 --seeds 5 --output bench
  edgeadapt bench --model net.py:model --weights net.pt --input 3x32x32 --source train.npz --methods all --data test.npz
  edgeadapt bench model.edgeadapt --own monday.npz tuesday.npz wednesday.npz
  edgeadapt bench model.edgeadapt --data test.npz --streams forgetting,noise --frames 500 --corruptions fog,snow --budget 128MiB

Data is an .npz file (x: uint8 N x H x W x C, or float32 N x the model's input; y: labels) or a folder of images with one folder a class. It must be
data that the model was not trained on. Streams are made of it: clean, continual, gradual, recurring, mixed, sorted, dirichlet, forgetting, single,
repeated, noise. own is your recordings (--own) in their order, each a domain. docs/bench.md says what each is and what every figure means.

With --model instead of bundles, one bundle a method is made in DIR/bundles first; a method that the model does not fit is left out, and told.

Rows: source (the frozen model as it was), step 0 (the bundle before it has adapted, not adapting), and every bundle adapting, with --guard also
watched by a guard. Each row serves each stream in a process of its own. Results are kept run by run in DIR/runs: after an interruption the same
command goes on where it was. DIR/bench.html and DIR/bench.json have all figures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt.cli import bench_export
from edgeadapt.cli.lists import listed
from edgeadapt.errors import InputError, UsageError

if TYPE_CHECKING:
    from edgeadapt.bench.frames import Samples, Stream
    from edgeadapt.bench.record import Record
    from edgeadapt.bench.report import Run
    from edgeadapt.bench.setting import Setting
    from edgeadapt.bench.streams import Sizes
    from edgeadapt.bundle import Bundle
    from edgeadapt.cli.bench_rows import Line

NAME, HELP = "bench", "measure on your own data what adaptation does"

USUAL = ("continual", "mixed", "forgetting")
"""Streams that are run where none are named, for images; frames that are no images have only `clean`, and recordings are `own`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from edgeadapt.units import parse_bytes

    parser.add_argument("bundles", nargs="*", metavar="X.edgeadapt", help="bundles of one model, each with the method that it was exported with")
    parser.add_argument("--data", metavar="FILE|DIR", help="clean frames with labels, from which streams are made")
    parser.add_argument("--own", nargs="+", default=[], metavar="FILE|DIR", help="your own recordings, in their order: the stream own")
    parser.add_argument("--streams", type=listed, metavar="A,B,...|all", help=f"(default: {','.join(USUAL)}, and own with --own)")
    parser.add_argument("--batch", type=_numbers, metavar="N[,N...]", help="frames in a window (default: the largest that all bundles adapt on)")
    parser.add_argument("--guard", action="store_true", help="also rows that a guard watches, for bundles that say what their source looks like")
    parser.add_argument("--guarded-only", action="store_true", help="rows that adapt have a guard, all of them: half the time of --guard")
    parser.add_argument("--single", action="store_true", help="also rows that answer each frame at once, and adapt when a window is full")
    parser.add_argument("--seeds", type=_seeds, default=[0], metavar="COUNT|A,B,...", help="how many, or which ones (default: 1, the seed 0)")
    parser.add_argument("--frames", type=int, metavar="N", help="frames of each corruption and each clean stretch (default: every image once)")
    parser.add_argument("--severity", type=int, default=5, metavar="1..5", help="of corruptions (default: 5)")
    parser.add_argument("--corruptions", type=listed, metavar="A,B,...", help="in their order (default: the fifteen common ones)")
    parser.add_argument("--scale", choices=("cifar", "imagenet"), help="whose strengths of corruptions (default: by the size of the images)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="of the stream recurring (default: 10)")
    parser.add_argument("--budget", type=parse_bytes, metavar="SIZE", help="the most bytes the serving process may hold, such as 128MiB")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of one operator (default: 1)")
    parser.add_argument(
        "--prepared",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="have the graphs optimised for this machine once, and run those (default)",
    )
    parser.add_argument("--output", default="bench", metavar="DIR", help="where results go (default: bench)")
    parser.add_argument("--fresh", action="store_true", help="run again what is there already")
    bench_export.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs what is not there yet, and reports."""
    from edgeadapt.bench import page, report, scores
    from edgeadapt.bench.setting import ADAPT, SINGLE
    from edgeadapt.cli.bench_rows import rows
    from edgeadapt.cli.inspect import table

    bundles = _bundles(bench_export.bundles(arguments))
    batches = _batches(bundles, arguments.batch)
    lines = rows(bundles, arguments.single, arguments.guard or arguments.guarded_only, not arguments.guarded_only)
    data, own = _data(arguments, bundles[0])
    streams = _streams(arguments, data, own)
    told = _settings(arguments, bundles, batches, [*([data] if data else []), *own], streams)
    print("\n".join(f"{name:<12} {value}" for name, value in told.items()) + "\n", flush=True)
    runs = list(_all(arguments, lines, batches, streams))
    told["graphs"] = _graphs(arguments, [one.record for one in runs])
    found: dict[str, Any] = {
        "bundles": [bundle.path.name for bundle in bundles],
        "digests": {bundle.path.name: bundle.digest for bundle in bundles},
        "settings": told,
        "adapting": [line.name for line in lines if line.mode in (ADAPT, SINGLE)],
        "draws": scores.DRAWS,
        **report.summarise(runs, lines[0].name),
    }
    written = report.write(arguments.output, page.page_of(found), found)
    for batch in batches:
        print(f"batch {batch}: error in percent and half its 95 % interval; memory of the process; ms a frame")
        print(table(*report.table(found, batch), left=1) + "\n")
        if (watched := report.guarded(found, batch)) is not None:
            print("with a guard, against not adapting (the better of source and step 0), and of the gain without a guard")
            print(table(*watched, left=1) + "\n")
    print(f"report       {written}")
    return 0


def _all(arguments: argparse.Namespace, lines: Sequence[Line], batches: Sequence[int], streams: Sequence[Stream]) -> Iterator[Run]:
    """Every run, from its file or made now."""
    from edgeadapt.bench import record
    from edgeadapt.bench.report import Run
    from edgeadapt.devices.boards.energy import Energy
    from edgeadapt.progress import Bars

    folder = Path(arguments.output) / "runs"
    wanted = []
    for stream in streams:
        for batch in batches:
            for line in lines:
                setting = _setting(arguments, line, batch)
                name, key = _place(line, stream, batch, setting)
                done = None if arguments.fresh else record.read(folder, name, key)
                wanted.append(_Wanted(line, stream, batch, setting, name, key, done))
    terminal, number = sys.stderr.isatty(), 0
    with Bars() as bars, Energy() as energy:
        wanted = [replace(one, done=None) if one.done and energy.kind and not one.done.facts["energy_from"] else one for one in wanted]
        exported = _check(arguments, [one.setting for one in wanted if one.done is None or one.done.facts.get("exported")], bars)
        wanted = [replace(one, done=None) if one.done and _differs(one.done, exported.get(repr(one.setting))) else one for one in wanted]
        for stream, group in groupby(wanted, key=lambda one: one.stream):
            with stream.kept():
                for one in group:
                    number += 1
                    what = f"{one.line.name} on {stream.name}, batch {one.batch}, seed {stream.seed} ({number}/{len(wanted)})"
                    found = one.done or _made(one, energy, bars if terminal else None, what)
                    if one.done is None:
                        record.write(folder, one.name, found)
                    yield Run(one.line.name, stream.name, one.batch, found)


def _differs(done: Record, exported: Sequence[str] | None) -> bool:
    """Whether other graphs run as exported now than did then; None: it was not looked at."""
    return exported is not None and sorted(done.facts.get("exported", ())) != sorted(exported)


@dataclass(frozen=True)
class _Wanted:
    """A run, and its record if there is one already."""

    line: Line
    stream: Stream
    batch: int
    setting: Setting
    name: str
    key: str
    done: Record | None


def _made(wanted: _Wanted, energy: Any, progress: Any, what: str) -> Record:
    from edgeadapt.bench import runner
    from edgeadapt.bench.child import Child
    from edgeadapt.bench.record import Record
    from edgeadapt.progress import quiet

    line, stream, begin = wanted.line, wanted.stream, time.monotonic()
    meter = energy.joules if energy.kind else None
    figures, columns = runner.run(Child(wanted.setting), stream, line.bundle.manifest.task.classes, meter, progress or quiet, what)
    facts = {
        "row": line.name,
        "stream": stream.name,
        "seed": stream.seed,
        "sizes": stream.settings,
        "domains": list(stream.domains),
        "bundle": line.bundle.path.name,
        "digest": line.bundle.digest,
        "setting": wanted.setting.told(),
        "energy_from": energy.kind or None,
        **figures,
    }
    found = Record(wanted.key, facts, columns)
    if progress is None:
        error = f"error {100 * found.outcome().wrong.mean():.1f} %" if figures["scored_frames"] else "nothing scored"
        print(f"{what}: {error}, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return found


def _check(arguments: argparse.Namespace, settings: Sequence[Setting], bars: Any) -> dict[str, list[str]]:
    """Opens every bundle once in every way that it will be served, so that what does not fit is told before anything takes long.

    Returns:
        by the setting's `repr` the graphs that could not be prepared.
    """
    from edgeadapt.bench.child import prepare
    from edgeadapt.bench.report import HTML

    folder = Path(arguments.output)
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        if (folder / HTML).is_dir():
            raise IsADirectoryError(21, f"{HTML} in it is a folder")
    except OSError as reason:
        raise UsageError(f"results cannot be written to {folder}: {reason.strerror}", "give --output a folder that can be made or written") from None
    found = {name: list(prepare(one, bars).get("exported", ())) for name, one in {repr(one): one for one in settings}.items()}
    if odd := sorted({name for names in found.values() for name in names}):
        said = f"graphs that could not be optimised for this machine run as exported: {', '.join(odd)}"
        print(f"{said}\n  fix: edgeadapt prepare BUNDLE says why; EDGEADAPT_CACHE names another folder", file=sys.stderr)
    return found


def _setting(arguments: argparse.Namespace, line: Line, batch: int) -> Setting:
    from edgeadapt.bench.setting import Setting

    return Setting(str(line.bundle.path), line.mode, batch, arguments.budget, arguments.threads, arguments.prepared, guard=line.guard)


def _place(line: Line, stream: Stream, batch: int, setting: Setting) -> tuple[str, str]:
    """Name and key of a run's files. The machine and its onnxruntime are part of the key: times and memory are theirs."""
    from edgeadapt.bench.record import key_of

    key = key_of(stream.key, {**setting.told(), "digest": line.bundle.digest, **_machine()})
    name = "".join(letter if letter.isalnum() else "-" for letter in line.name)[-40:]
    return f"{name}.{stream.name}.b{batch}.s{stream.seed}.{key[:12]}", key


@cache
def _machine() -> dict[str, str]:
    from edgeadapt.devices.boards import probe
    from edgeadapt.runtime.prepared import version

    return {"machine": probe.look().fingerprint, "onnxruntime": version()}


def _bundles(paths: Sequence[str]) -> list[Bundle]:
    """Opened and checked against each other."""
    from edgeadapt.bundle import Bundle

    found = [Bundle.open(path) for path in paths]
    if len({bundle.path for bundle in found}) < len(found):
        raise UsageError("a bundle is named twice", "name each bundle once")
    first = found[0].manifest
    for bundle in found[1:]:
        manifest = bundle.manifest
        if (manifest.task.kind, manifest.task.classes, manifest.input) != (first.task.kind, first.task.classes, first.input):
            raise UsageError(
                f"{bundle.path.name} and {found[0].path.name} are not of one model: they differ in task or input", "bench them one after the other"
            )
    return found


def _batches(bundles: Sequence[Bundle], given: Sequence[int] | None) -> list[int]:
    from edgeadapt.runtime.stream import served_as

    planned = [set(bundle.manifest.planned("adapt") or bundle.manifest.planned("predict")) for bundle in bundles]
    common = set.intersection(*planned)
    if given is None:
        if not common:
            sizes = "; ".join(f"{bundle.path.name}: {', '.join(map(str, sorted(sizes)))}" for bundle, sizes in zip(bundles, planned))
            raise UsageError(f"these bundles have no batch in common ({sizes})", "export them with one batch, or bench them one after the other")
        return [max(common)]
    for batch in given:
        for bundle in bundles:
            try:
                served_as(bundle.manifest, True, batch)
            except UsageError as reason:
                hint = f"use --batch {','.join(map(str, sorted(common)))}, or export with another batch" if common else reason.hint
                raise UsageError(f"{bundle.path.name}: {reason.message}", hint) from None
    return list(dict.fromkeys(given))


def _data(arguments: argparse.Namespace, bundle: Bundle) -> tuple[Samples | None, list[Samples]]:
    if arguments.data is None and not arguments.own:
        raise UsageError("there is nothing to run on", "give --data with clean labelled frames, or --own with recordings")
    data = None if arguments.data is None else _samples(arguments.data, bundle)
    if data is not None and (data.y < 0).all():
        raise UsageError(f"{arguments.data} has no labels, so nothing could be scored", "save labels as y beside x, or give one folder a class")
    return data, [_samples(path, bundle) for path in arguments.own]


def _samples(path: str, bundle: Bundle) -> Samples:
    from edgeadapt.bench.frames import Samples
    from edgeadapt.devices.sources import open_source
    from edgeadapt.devices.sources.gather import gather

    task = bundle.manifest.task
    with open_source(path, bundle.manifest) as source:
        x, y, faults = gather(source, bundle.manifest.input)
    if task.kind == "classification" and y.max() >= task.classes:
        hint = "number classes from 0, as in training"
        raise InputError(f"{path} has the label {y.max()}, and the model has classes 0 to {task.classes - 1}", hint)
    if faults:
        print(f"{path}: {len(faults)} frames cannot be used and are left out; the first: {faults[0]}", file=sys.stderr)
    return Samples(x, y, Path(path).stem or str(path))


def _streams(arguments: argparse.Namespace, data: Samples | None, own: Sequence[Samples]) -> list[Stream]:
    from edgeadapt.bench import streams

    known = (*streams.NAMES, streams.OWN)
    names: Sequence[str] = arguments.streams or [
        *((USUAL if data.images else ["clean"]) if data is not None else []),
        *([streams.OWN] if own else []),
    ]
    if list(names) == ["all"]:
        fit = [] if data is None else [name for name in streams.NAMES if data.images or name not in streams.CORRUPTED]
        names = [*fit, *([streams.OWN] if own else [])]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown stream {name!r}", f"use all, or some of {', '.join(known)}")
        if name == streams.OWN and not own:
            raise UsageError("the stream own needs recordings", "give --own FILE [FILE ...]")
        if name != streams.OWN and data is None:
            raise UsageError(f"the stream {name} is made of clean frames", "give --data")
    found = []
    for name in dict.fromkeys(names):
        if name == streams.OWN:
            found.append(streams.own(own))
        elif data is not None:
            found += [streams.build(name, data, _sizes(arguments), seed) for seed in arguments.seeds]
    return found


def _sizes(arguments: argparse.Namespace) -> Sizes:
    from edgeadapt.bench.streams import Sizes
    from edgeadapt.corruptions import CORRUPTIONS

    names = tuple(arguments.corruptions or CORRUPTIONS)
    return Sizes(arguments.frames, rounds=arguments.rounds, severity=arguments.severity, corruptions=names, scale=arguments.scale)


def _settings(
    arguments: argparse.Namespace, bundles: Sequence[Bundle], batches: Sequence[int], samples: Sequence[Samples], streams: Sequence[Stream]
) -> dict[str, str]:
    """All that the figures depend on, in words."""
    import platform

    import numpy as np

    from edgeadapt._version import __version__
    from edgeadapt.bench.streams import OWN
    from edgeadapt.devices.boards import probe
    from edgeadapt.runtime.prepared import version
    from edgeadapt.units import format_bytes

    machine = probe.look()
    seeded = any(stream.name != OWN for stream in streams)
    corrupted = any("severity" in stream.settings for stream in streams)
    sizes = _sizes(arguments)
    found = {"bundles": "; ".join(f"{bundle.path.name} ({bundle.manifest.method.name}, {bundle.digest[:12]})" for bundle in bundles)}
    found["data"] = "; ".join(f"{one.name} ({len(one.x)} frames, {one.digest[:12]})" for one in samples)
    lengths = {stream.name: len(stream) for stream in streams}
    found["streams"] = ", ".join(f"{name} ({length} frames)" for name, length in lengths.items())
    if seeded:
        found["seeds"] = ", ".join(map(str, arguments.seeds))
    if corrupted:
        found["severity"] = str(arguments.severity)
        found["corruptions"] = ", ".join(sizes.corruptions)
    found["batch"] = ", ".join(map(str, batches))
    found["budget"] = format_bytes(arguments.budget) if arguments.budget else "none"
    found["graphs"] = _graphs(arguments, [])
    found["machine"] = f"{machine.model or machine.cpu}, {machine.arch}"
    libraries = f"onnxruntime {version()}, numpy {np.__version__}"
    found["versions"] = f"edgeadapt {__version__}, {libraries}, Python {platform.python_version()}"
    return found


def _graphs(arguments: argparse.Namespace, records: Sequence[Record]) -> str:
    """How graphs run, as far as records of runs tell."""
    if not arguments.prepared:
        return f"as exported, threads {arguments.threads}"
    pairs = {f"{name} of {record.facts['bundle']}": None for record in records for name in record.facts.get("exported", ())}
    return f"optimised for this machine, threads {arguments.threads}{'; as exported: ' if pairs else ''}{', '.join(pairs)}"


def _numbers(text: str) -> list[int]:
    parts = listed(text)
    if not parts or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers above 0, such as 1,16")
    return [int(part) for part in parts]


def _seeds(text: str) -> list[int]:
    parts = listed(text)
    if not parts or not all(part.isascii() and part.isdigit() for part in parts) or ("," not in text and int(text) < 1):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of seeds, such as 5, nor a list of them, such as 0,1,2")
    return list(range(int(text))) if "," not in text else list(dict.fromkeys(int(part) for part in parts))
