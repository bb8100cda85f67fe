r"""Compile a PyTorch model, with its whole adaptation step, into a bundle. Runs on the workstation: pip install edgeadapt[export].

  edgeadapt export models:resnet20 --weights resnet20.safetensors --input 3x32x32 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 \
      --data train.npz --batch 4,16 -o resnet20.edgeadapt
  edgeadapt export net.py:sensor_net --input 6x128 --data net.py:training_set --method side -o sensor.edgeadapt
  edgeadapt export models:resnet20 --input 3x32x32 --list-cuts
  edgeadapt export models:resnet20 --input 3x32x32 --plan --board pi4-1gb --budget 96MiB
  edgeadapt export models:resnet20 --input 3x32x32 --data train.npz --quantize auto --board pi4-1gb --budget 80MiB -o resnet20.edgeadapt

MODULE:FACTORY is a function or class without required arguments that gives the model, as package.module:name or path/to/file.py:name. --data is an
.npz archive (x: uint8 N x H x W x C, or float32 as the model takes it; y: classes), a folder with a folder of images for each class, or
MODULE:FUNCTION that gives a torch Dataset: samples like those the model was trained on, of which a few thousand do.

With --budget, what of --parts, --train and --batch is not given is chosen so that adapting fits, on one thread; nothing is trained if nothing fits
(exit code 5). --plan only lists what could be chosen. docs/memory.md says in which order.

With --quantize auto so is what numbers are held in, as far as --gradient, --saved and --updates do not say it: whatever fits adapts to held-out
samples under shifts, and the best is exported. docs/quantisation.md says how.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt.cli import inputs
from edgeadapt.cli.lists import count
from edgeadapt.errors import BudgetError, ExportError, UsageError
from edgeadapt.units import format_bytes, format_count, format_shape, parse_bytes, parse_shape

if TYPE_CHECKING:
    from torch import nn

    from edgeadapt.exporters.data import Samples
    from edgeadapt.exporters.partition import Cut
    from edgeadapt.exporters.planner import Plan
    from edgeadapt.progress import Progress

NAME, HELP = "export", "compile a PyTorch model and its adaptation step into a bundle"

CHOICES = (
    "task",
    "method",
    "quantize",
    "gradient",
    "saved",
    "micro",
    "search",
    "updates",
    "parts",
    "cuts",
    "kernel",
    "width",
    "train",
    "statistics",
    "optimiser",
    "rate",
    "epochs",
    "warmup_rate",
    "warmup_batch",
    "max_drop",
    "holdout",
    "seed",
    "threads",
)
"""Options that go to the exporter as they are, where given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", metavar="MODULE:FACTORY", help="what gives the model")
    parser.add_argument("-o", "--output", metavar="X.edgeadapt", help="the bundle to write")
    given = parser.add_argument_group("model and data")
    given.add_argument("--weights", metavar="FILE", help="state dict to load: .safetensors, .pt, .pth, .bin or .ckpt")
    given.add_argument("--input", type=parse_shape, required=True, metavar="CxHxW", help="one input, channels first: 3x32x32; 6x128 for a sensor")
    given.add_argument("--data", metavar="DATA", help="source samples, for the warm-up and the checks")
    given.add_argument("--samples", type=count, metavar="N", help="use at most N of them, in equal share from every class")
    given.add_argument("--unlabelled", action="store_true", help="use no labels: the warm-up learns from the frozen model's own predictions")
    given.add_argument("--task", choices=("classification", "segmentation"), help="default: by the shape of the logits")
    given.add_argument("--classes", type=count, metavar="N", help="number of classes, to check the model and the labels against")
    given.add_argument("--names", type=_names, metavar="A,B,C", help="class names in the order of the outputs; default: a folder's")
    inputs.add_arguments(given)
    how = parser.add_argument_group("method")
    methods = "eata, sar, tent, ecotta, surgeon, rotta, cotta, side, exits, norm, lean, lame, t3a or source"
    default = "eata with anchored statistics, or side where the model has no normalisation with scale and shift"
    how.add_argument("--method", help=f"{methods} (default: {default})")
    how.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="a choice that the method alone has; may be repeated")
    how.add_argument("--parts", type=count, metavar="K", help="parts to cut the model into (default: 4)")
    how.add_argument("--cuts", type=_names, metavar="A,B,C", help="cut at these places instead; --list-cuts shows them")
    how.add_argument("--train", type=count, metavar="N", help="train only the last N parts on the device, in less memory (default: all)")
    how.add_argument("--kernel", type=int, choices=(0, 1, 3), help="of the meta networks; 0 (default): 3 for pre-activation models, else 1")
    how.add_argument("--width", type=count, metavar="N", help="of the side network (default: 64)")
    how.add_argument("--batch", type=_sizes, action="append", metavar="N", help="batch to adapt with, such as 4,16; may be repeated (default: 16)")
    follow = "normalisation follows the stream, or only as far as that has left the source, or stays as trained (default: the method's)"
    how.add_argument("--statistics", choices=("live", "anchored", "source"), help=follow)
    how.add_argument("--exact-gradient", action="store_true", help="let gradients flow through the batch's statistics: more memory")
    how.add_argument("--optimiser", choices=("sgd", "adam"), help="on the device (default: the method's)")
    how.add_argument("--micro", type=_micro, metavar="M", help="also take steps in pieces of M frames, such as 1,4; auto (default) or none")
    forms = "compute the frozen model in 8 bits, for less memory and time (default: none); auto: what measures best within --budget"
    how.add_argument("--quantize", choices=("none", "int8", "auto"), help=forms)
    how.add_argument("--gradient", choices=("float", "int8"), help="through the frozen model (default: as it is computed)")
    how.add_argument("--saved", choices=("float", "int8"), help="what a step keeps for its backward pass (default: int8 with --quantize int8)")
    tiers = "hold parameters and moments in float32 (reference, default), in 16 and 8 bits (compact) or in 8 (tiny)"
    how.add_argument("--updates", choices=("reference", "compact", "tiny"), help=tiers)
    how.add_argument("--rate", type=float, help="learning rate on the device (default: the method's, by the batch)")
    searching = "find defaults of scalars for this model, on held-out samples under shifts (default: where no --method is given)"
    how.add_argument("--search", action=argparse.BooleanOptionalAction, help=searching)
    memory = parser.add_argument_group("memory")
    memory.add_argument("--budget", type=parse_bytes, metavar="SIZE", help="the most bytes that the process on the device may hold, such as 96MiB")
    memory.add_argument("--board", metavar="KEY|FILE", help="where that is: a board's key, or a profile of your own (default: this machine)")
    memory.add_argument("--board-threads", type=count, metavar="N", help="threads of one operator that it will be served with there (default: 1)")
    memory.add_argument("--plan", action="store_true", help="list what could be chosen and what it takes, without data or training, and stop")
    warmup = parser.add_argument_group("warm-up")
    warmup.add_argument("--epochs", type=int, help="default: 10")
    warmup.add_argument("--warmup-rate", type=float, metavar="RATE", help="learning rate (default: 0.05)")
    warmup.add_argument("--warmup-batch", type=count, metavar="N", help="default: 64")
    warmup.add_argument("--holdout", type=float, metavar="SHARE", help="share of the samples to measure accuracy on (default: 0.1)")
    warmup.add_argument("--max-drop", type=float, metavar="POINTS", help="refuse a bundle that loses more clean accuracy than this (default: 5)")
    warmup.add_argument("--allow-drop", action="store_true", help="write it all the same")
    parser.add_argument("--seed", type=int, help="of all that is random (default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: all)")
    parser.add_argument("--list-cuts", action="store_true", help="print where the model can be cut, and stop")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Loads the model and the data, exports, and prints the report."""
    _need("torch", "safetensors", "PIL")
    from edgeadapt.exporters.data import load_samples
    from edgeadapt.exporters.load import load_factory, load_weights
    from edgeadapt.progress import Bars, quiet

    spec = inputs.spec(arguments)
    output = None if arguments.list_cuts or arguments.plan else _writable(arguments.output)
    given = next((name for name in ("board", "board_threads") if getattr(arguments, name) is not None), None)
    if given and arguments.budget is None and not arguments.plan:
        raise UsageError(f"--{given.replace('_', '-')} says where a budget holds, and there is none", "give --budget or --plan too")
    model = load_factory(arguments.model)
    if arguments.weights:
        load_weights(model, arguments.weights)
    if arguments.list_cuts:
        return _list_cuts(model, arguments)
    if arguments.plan:
        return _plan(model, arguments)
    assert output is not None
    classes = _classes(model, arguments)
    with Bars() as bars:
        progress: Progress = quiet if arguments.quiet else bars
        samples = None
        if arguments.data:
            samples = load_samples(
                arguments.data,
                spec,
                names=arguments.names,
                classes=classes,
                labelled=not arguments.unlabelled,
                most=arguments.samples,
                seed=arguments.seed or 0,
                progress=progress,
            )
        elif odd := inputs.given(arguments) or ("--unlabelled" if arguments.unlabelled else "--samples" if arguments.samples else ""):
            raise UsageError(f"{odd} says what the data is, and there is none", "give it with --data")
        return _export(model, samples, output, arguments, progress)


def _export(model: nn.Module, samples: Samples | None, output: Path, arguments: argparse.Namespace, progress: Progress) -> int:
    from edgeadapt.exporters.export import export

    choices = _choices(arguments)
    if arguments.budget is not None:
        choices |= _place(arguments)
    if not arguments.quiet:
        if samples is not None:
            print(f"data: {samples.summary()}", file=sys.stderr)
        if output.exists():
            print(f"{output} exists; it stays until the new bundle is whole, and is then replaced", file=sys.stderr)
    report = export(
        model,
        output,
        shape=arguments.input,
        data=samples,
        names=arguments.names or (samples.names if samples is not None else None),
        model_name=_model_name(arguments.model),
        progress=progress,
        allow_drop=arguments.allow_drop,
        **choices,
    )
    close = getattr(progress, "close", None)
    if close is not None:
        close()
    if arguments.json:
        planned = {} if report.plan is None else {"plan": report.plan.plain()}
        json.dump({"path": str(output), "file_bytes": report.size, **report.manifest, **planned}, sys.stdout, indent=1)
        print()
    else:
        print(report.table())
        print(f"\nwrote {output} ({format_bytes(report.size)})")
    return 0


def _choices(arguments: argparse.Namespace) -> dict[str, Any]:
    choices: dict[str, Any] = {name: getattr(arguments, name) for name in CHOICES if getattr(arguments, name) is not None}
    if arguments.batch:
        choices["batches"] = tuple(sorted({size for sizes in arguments.batch for size in sizes}))
    if arguments.setting:
        choices["settings"] = dict(_setting(text) for text in arguments.setting)
    return {**choices, "exact": arguments.exact_gradient}


def _setting(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not mark or not name or not value:
        raise UsageError(f"--setting {text} is not NAME=VALUE", "write --setting freeze=none")
    return name, value


def _place(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"budget": arguments.budget, "board": arguments.board, "board_threads": arguments.board_threads or 1}


def _plan(model: nn.Module, arguments: argparse.Namespace) -> int:
    from edgeadapt.exporters.export import plan_export
    from edgeadapt.progress import Bars, quiet

    if arguments.quantize == "auto":
        return _plan_numbers(model, arguments)
    with Bars() as bars:
        progress: Progress = quiet if arguments.quiet else bars
        found = plan_export(model, shape=arguments.input, progress=progress, **_place(arguments), **_choices(arguments))
    if arguments.json:
        json.dump(found.plain(), sys.stdout, indent=1)
        print()
    else:
        print(_candidates(found))
    sys.stdout.flush()
    if found.budget is not None:
        found.check()
    return 0


def _plan_numbers(model: nn.Module, arguments: argparse.Namespace) -> int:
    import dataclasses

    from edgeadapt.cli.inspect import table
    from edgeadapt.exporters.export import plan_numbers
    from edgeadapt.exporters.quantise.choose import ASSUMED
    from edgeadapt.progress import Bars, quiet

    with Bars() as bars:
        progress: Progress = quiet if arguments.quiet else bars
        found = plan_numbers(model, shape=arguments.input, progress=progress, **_place(arguments), **_choices(arguments))
    if arguments.json:
        json.dump({**dataclasses.asdict(found), "note": ASSUMED}, sys.stdout, indent=1)
        print()
    else:
        header, *rows = found.table()
        print("\n".join([found.title(), table(header, rows, left=4, words=True), ASSUMED, "which of them is best is measured with --data"]))
    sys.stdout.flush()
    if not any(row.fits for row in found.rows):
        nearest = min(row.total for row in found.rows)
        raise BudgetError(
            f"none of the numbers fits the budget of {format_bytes(found.budget)}; the nearest takes {format_bytes(nearest)}",
            f"give a budget of at least {-(-nearest // 2**20)}MiB",
        )
    return 0


def _candidates(found: Plan) -> str:
    from edgeadapt.cli.inspect import table
    from edgeadapt.memory.simulation import format_seconds

    rows = []
    for row in found.rows:
        cut = tuple("–" if value is None else str(value) for value in (row.parts, row.trained))
        weights = "prepacked" if row.prepacking else "as stored"
        times = (format_seconds(row.seconds), format_seconds(row.per_frame))
        fits, total = {None: "", True: "fits", False: "no"}[row.fits], format_bytes(row.total)
        graph = f"in pieces of {row.micro}" if row.micro else row.graph
        predicts = "frame by frame" if row.singly else ""
        rows.append((*cut, str(row.batch), graph, weights, predicts, total, *times, fits, "chosen" if row.chosen else ""))
    header = ("parts", "trained", "batch", "graph", "weights", "predicts", "memory", "a step", "a frame", "budget" if found.budget else "", "")
    where = f"{found.board}, {format_count(found.threads, 'thread')}"
    lines = [
        f"on {where}: what no other beats in memory, time, batch, parts and trained parts; times are {found.rates_known} and rough",
        table(header, rows, left=0, words=True),
        "compiled in a hurry, without leaner variants or pieces, unless it came near to being chosen: a bundle may take less, or some KiB more",
    ]
    return "\n".join([*lines, *([found.note] if found.note else []), *([found.line()] if found.row else [])])


def _need(*libraries: str) -> None:
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        named = ", ".join({"PIL": "Pillow", "torch": "PyTorch"}.get(name, name) for name in missing)
        raise ExportError(f"exporting needs {named}, not installed here", "pip install edgeadapt[export]")


def _writable(text: str | None) -> Path:
    """The output's path, looked at before the work begins."""
    if not text:
        raise UsageError("the bundle's path is missing", "give it with -o, such as -o model.edgeadapt")
    path = Path(text)
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected the path of the bundle", f"write -o {path / 'model.edgeadapt'}")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: there is no such folder to write {path.name} into", f"mkdir -p {path.parent}")
    return path


def _classes(model: nn.Module, arguments: argparse.Namespace) -> int | None:
    """Classes of the model, found by running it once; what is wrong with the model itself is for the exporter to say."""
    import torch

    try:
        with torch.no_grad():
            logits = model(torch.zeros((1, *arguments.input)))
        found = int(logits.shape[1])
    except Exception:  # a user's model raises anything; the exporter traces it and tells
        return int(arguments.classes) if arguments.classes else None
    if arguments.classes and arguments.classes != found:
        raise UsageError(
            f"the model gives logits of shape {format_shape(logits.shape[1:])}, so {found} classes, not {arguments.classes}",
            "mend --classes, or build the model with that many",
        )
    if arguments.names and len(arguments.names) != found:
        raise UsageError(f"--names gives {len(arguments.names)} names, and the model has {found} classes", "give one for each output, in order")
    return found


def _list_cuts(model: nn.Module, arguments: argparse.Namespace) -> int:
    from edgeadapt.exporters.capture import capture
    from edgeadapt.exporters.partition import candidates, partition

    captured = capture(model, arguments.input, 2)
    places = candidates(captured)
    chosen: tuple[Cut, ...] = partition(captured, arguments.parts or 4, arguments.cuts or ()).cuts if len(places) > 1 else ()
    rows = [{"name": cut.name, "shape": list(cut.shape), "ends": _role(cut, chosen)} for cut in places]
    if arguments.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return 0
    if not rows:
        print("the model cannot be cut: no single tensor carries everything; the methods norm and tent need no cuts")
        return 0
    width = max(len(cut.name) for cut in places)
    for row, cut in zip(rows, places):
        print(f"{cut.name.ljust(width)}  {format_shape(cut.shape):12}  {row['ends']}".rstrip())
    return 0


def _role(cut: Cut, chosen: tuple[Cut, ...]) -> str:
    """What a place ends in the division that `chosen` makes: the stem, a part, or nothing."""
    if cut not in chosen:
        return ""
    index = chosen.index(cut)
    return f"part {index}" if index else "stem"


def _model_name(text: str) -> str:
    """The factory as the manifest names it: of a file without its folders, which are nobody's business."""
    place, _, name = text.rpartition(":")
    return f"{Path(place).name if place.endswith('.py') else place}:{name}"


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(count(part) for part in text.split(","))


def _micro(text: str) -> str | tuple[int, ...]:
    return text if text in ("auto", "none") else _sizes(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name in it")
    if len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r} has a name twice")
    return names
