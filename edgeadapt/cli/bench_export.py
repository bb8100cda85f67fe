"""The bundles of a bench made from a model: one for each method, kept in the bench's folder and made again only where something has changed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt.cli import inputs
from edgeadapt.cli.lists import listed
from edgeadapt.errors import BundleError, ExportError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from edgeadapt.exporters.data import Samples
    from edgeadapt.progress import Progress

ALL, DEFAULT = "all", "default"
"""Every method but yardsticks, and what an export is that names none."""
YARDSTICKS = ("cotta",)
"""Methods that `all` leaves out: they are there to compare with, and take hundreds of times a device's memory and time."""
_GIVEN = ("weights", "source", "input", *inputs.NAMES, "methods", "epochs", "setting")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what to export."""
    from edgeadapt.units import parse_shape

    made = parser.add_argument_group("bundles made for the bench (needs edgeadapt[export])")
    made.add_argument("--model", metavar="MODULE:FACTORY", help="instead of bundles: what gives the model, as for edgeadapt export")
    made.add_argument("--weights", metavar="FILE", help="its state dict")
    made.add_argument("--input", type=parse_shape, metavar="CxHxW", help="one input of it")
    made.add_argument("--source", metavar="DATA", help="samples that it was trained on, for warm-up and calibration: never those of --data")
    inputs.add_arguments(made)
    which = f"default is what an export without a method is (default: all, which is without {', '.join(YARDSTICKS)})"
    made.add_argument("--methods", type=listed, metavar="A,B,...|all", help=which)
    made.add_argument("--epochs", type=int, metavar="N", help="of warm-ups (default: 10)")
    made.add_argument("--setting", action="append", default=[], metavar="METHOD.NAME=VALUE", help="a choice that one method alone has")


def bundles(arguments: argparse.Namespace) -> list[str]:
    """Paths of the bundles to bench: those named, or made now.

    Raises:
        UsageError: neither or both are given, or an option that goes with the other.
        EdgeAdaptError: the model or its data cannot be used; no method fits.
    """
    if arguments.model is None:
        odd = next((name for name in _GIVEN if getattr(arguments, name)), None)
        if odd:
            raise UsageError(f"--{odd} says how bundles are made from a model, and there is none", "give --model, or leave it out")
        if not arguments.bundles:
            raise UsageError("there is nothing to bench", "name bundles, or give --model")
        return list(arguments.bundles)
    if arguments.bundles:
        raise UsageError("bundles are named, and --model would make others", "give the one or the other")
    if arguments.input is None:
        raise UsageError("--model needs the shape of one input", "give --input, such as 3x32x32")
    return _made(arguments)


def _made(arguments: argparse.Namespace) -> list[str]:
    from edgeadapt.exporters.data import load_samples
    from edgeadapt.exporters.load import load_factory, load_weights
    from edgeadapt.exporters.methods import METHODS
    from edgeadapt.progress import Bars

    named = list(arguments.methods or [ALL])
    unknown = next((name for name in named if name not in (ALL, DEFAULT, *METHODS)), None)
    if unknown:
        raise UsageError(f"unknown method {unknown!r}", f"use all, or some of {', '.join((DEFAULT, *METHODS))}")
    methods = list(dict.fromkeys(one for name in named for one in (_usual(METHODS) if name == ALL else [name])))
    settings = _settings(arguments.setting, methods)
    spec = inputs.spec(arguments)
    model = load_factory(arguments.model)
    if arguments.weights:
        load_weights(model, arguments.weights)
    folder = Path(arguments.output) / "bundles"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise UsageError(f"bundles cannot be written to {folder}: {reason.strerror}", "give --output a folder that can be made or written") from None
    batches = tuple(sorted(set(arguments.batch or (64,))))
    with Bars() as bars:
        samples = load_samples(arguments.source, spec, progress=bars) if arguments.source else None
        work = _Work(model, _model_digest(model, arguments.model), samples, tuple(arguments.input), spec, folder, batches, bars, arguments.fresh)
        warmed = {method for method in methods if method != DEFAULT and METHODS[method].warms_up}
        found = {method: work.bundle(method, arguments.epochs if method in warmed else None, settings.get(method, {})) for method in methods}
    for method, (_, why) in found.items():
        if why:
            print(f"{method} is left out: {why}", file=sys.stderr)
    paths = [str(path) for path, _ in found.values() if path is not None]
    if not paths:
        raise ExportError("none of the methods fits this model", "see the reasons above")
    return paths


def _usual(methods: Any) -> list[str]:
    return [DEFAULT, *(name for name in methods if name not in YARDSTICKS)]


class _Work:
    """What bundles are made of."""

    def __init__(
        self,
        model: nn.Module,
        digest: str,
        samples: Samples | None,
        shape: tuple[int, ...],
        spec: Any,
        folder: Path,
        batches: tuple[int, ...],
        bars: Progress,
        fresh: bool,
    ) -> None:
        self.model, self.samples, self.shape, self.spec, self.folder, self.batches, self.bars = model, samples, shape, spec, folder, batches, bars
        self.fresh = fresh
        data = None if samples is None else _samples_digest(samples)
        self.facts = {"model": digest, "data": data, "shape": shape, "input": repr(spec)}

    def bundle(self, method: str, epochs: int | None, settings: dict[str, str]) -> tuple[Path | None, str]:
        """The path of a method's bundle; or None, and why the model has none."""
        from edgeadapt._version import __version__
        from edgeadapt.bundle.atomic import replacing
        from edgeadapt.bundle.digest import sha256
        from edgeadapt.exporters.export import export

        path, note = self.folder / f"{method}.edgeadapt", self.folder / f"{method}.json"
        choices: dict[str, Any] = {"batches": self.batches, **({"epochs": epochs} if epochs else {})}
        choices |= {} if method == DEFAULT else {"method": method}
        choices |= {"settings": settings} if settings else {}
        key = sha256(json.dumps({**self.facts, **choices, "version": __version__}, sort_keys=True, default=str).encode()).hexdigest()
        known = {} if self.fresh else _read(note)
        if known.get("key") == key and known.get("bundle") and known["bundle"] == _digest(path):
            return path, ""
        pixels = {name: getattr(self.spec, name) for name in inputs.NAMES} | {"resize": self.spec.resize or False}
        data = {"data": self.samples} if self.samples is not None else pixels
        try:
            export(self.model, path, shape=self.shape, progress=self.bars, allow_drop=True, model_name=type(self.model).__name__, **data, **choices)
        except ExportError as reason:  # not kept: it may be for want of memory or of room on a disk
            return None, reason.message
        with replacing(note) as (file, _):
            file.write(json.dumps({"key": key, "bundle": _digest(path)}).encode())
        return path, ""


def _digest(path: Path) -> str | None:
    """The digest of a whole bundle; None if there is none, or not a whole one."""
    from edgeadapt.bundle import Bundle

    try:
        return Bundle.open(path).digest
    except BundleError:
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _model_digest(model: nn.Module, factory: str) -> str:
    """Of its tensors, its layers, the file that makes it and computes with it, and torch."""
    import torch

    from edgeadapt.bundle.digest import sha256
    from edgeadapt.exporters.load import weights_sha256

    return sha256(f"{weights_sha256(model)} {torch.__version__} {model!r}\n".encode() + _source(factory)).hexdigest()


def _source(factory: str) -> bytes:
    """The file of a factory's module; nothing where it has none."""
    place = factory.rpartition(":")[0]
    file = place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None)
    try:
        return Path(file).read_bytes() if file else b""
    except OSError:
        return b""


def _samples_digest(samples: Samples) -> str:
    from edgeadapt.bundle.digest import sha256

    return sha256(samples.x.tobytes() + (b"" if samples.y is None else samples.y.tobytes())).hexdigest()


def _settings(given: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for text in given:
        place, mark, value = text.partition("=")
        method, dot, name = place.partition(".")
        if not mark or not dot or not name or not value:
            raise UsageError(f"--setting {text} is not METHOD.NAME=VALUE", "write --setting ecotta.anchor=start")
        if method not in methods:
            raise UsageError(f"--setting {text} is of a method that is not benched", f"the methods are {', '.join(methods)}")
        found.setdefault(method, {})[name] = value
    return found
