"""Predicted beside measured memory of whole processes: every batch of some networks, predicting only, and predicting and adapting.

  python -m benchmarks.memory --folder bundles
  python -m benchmarks.memory --folder bundles --models resnet20 resnet18 --json memory.json

Bundles are exported into the folder with random weights where they are not there yet; that takes minutes and needs torch. Predicted is the ledger of
`edgeadapt simulate` for this machine, with its floor measured here; measured is VmHWM of a process that loads the configuration within a region of
fixed size, as an adapter with a budget does, and runs each of its graphs four times.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgeadapt.bundle import Bundle
from edgeadapt.memory.ledger import Setup, ledger
from edgeadapt.memory.measured import compare, measure
from edgeadapt.memory.simulation import Choice

MODELS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "resnet20": ("resnet_cifar", (3, 32, 32), (1, 4, 16, 64)),
    "resnet56": ("resnet_cifar", (3, 32, 32), (1, 4, 16, 64)),
    "wrn40-2": ("wideresnet", (3, 32, 32), (1, 4, 16, 64)),
    "mobilenetv2": ("mobilenet_v2", (3, 224, 224), (1, 4, 16)),
    "resnet18": ("resnet18", (3, 224, 224), (1, 4, 16)),
}
"""By name: the factory in tests.zoo.named, the shape of a frame, the batches."""


def bundle_of(name: str, folder: Path) -> Bundle:
    """The bundle of a network, exported first if it is not there."""
    path = folder / f"{name}-ecotta.edgeadapt"
    if not path.exists():
        _export(name, path)
    return Bundle.open(path)


def _export(name: str, path: Path) -> None:
    import numpy as np

    from edgeadapt.bundle import InputSpec
    from edgeadapt.exporters.data import Samples
    from edgeadapt.exporters.export import export
    from tests.zoo import named
    from tests.zoo.calibrate import calibrate

    factory, shape, batches = MODELS[name]
    depth = {"depth": 56} if name == "resnet56" else {}
    model = calibrate(getattr(named, factory)(**depth), shape, batches=1, size=4)
    count = 64 if shape[1] == 32 else 16
    data = Samples(np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32), np.arange(count) % 10, InputSpec(shape))
    print(f"exporting {path.name}", file=sys.stderr)
    export(model, path, shape=shape, data=data, method="ecotta", parts=4, epochs=0, rate=5e-3, batches=batches, allow_drop=True, threads=1)


def configurations(bundle: Bundle) -> Iterator[Choice]:
    """Each batch: predicting, then every form of adapting besides."""
    for batch in bundle.manifest.batches:
        base = tuple(dict.fromkeys(("predict.b1", f"predict.b{batch}")))
        yield Choice("predict", batch, base[-1], base, True, 0, 0.0)
        for name in bundle.manifest.variants("adapt", batch):
            for prepacking in (True, False):
                yield Choice("adapt", batch, name, (*base, name), prepacking, 0, 0.0)


def rows(bundles: Sequence[Bundle], floor: int, code: int) -> Iterator[dict[str, Any]]:
    """One for each configuration, as it is measured."""
    arm = platform.machine() in ("aarch64", "arm64")
    for bundle in bundles:
        for choice in configurations(bundle):
            predicted = ledger(bundle, Setup(choice.graphs, floor, arm=arm, prepacking=choice.prepacking, started=code))
            found = measure(bundle.path, choice)
            yield {"bundle": bundle.path.stem, "words": choice.words, "lines": compare(predicted, found, floor - code), "ledger": predicted.plain()}


def show(row: dict[str, Any]) -> None:
    """Print a line: the peaks in MiB, and by how much the predicted ones are above, for the whole and the region."""
    lines = {line["name"]: line for line in row["lines"]}
    peak, region = lines["process's peak"], lines["region for tensors"]
    shares = (100 * (line["predicted"] / line["measured"] - 1) if line["measured"] else 0.0 for line in (peak, region))
    sizes = (peak["predicted"] / 2**20, peak["measured"] / 2**20)
    print(f"{row['bundle']:<20} {row['words']:<62} {sizes[0]:9.2f} {sizes[1]:9.2f} {next(shares):+7.2f} % {next(shares):+7.2f} %", flush=True)


def main() -> None:
    from edgeadapt.devices.boards import floor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where bundles are and are put")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS), help="which networks (default: all)")
    parser.add_argument("--json", type=Path, help="also write everything there")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bundles = [bundle_of(name, arguments.folder) for name in arguments.models]
    print(f"{'':83} predicted  measured   apart    region")
    found = []
    here = floor.look()
    for row in rows(bundles, here.floor, here.code):
        show(row)
        found.append(row)
    worst = [100 * (line["predicted"] / line["measured"] - 1) for row in found for line in row["lines"] if line["name"] == "process's peak"]
    print(f"{len(found)} configurations: predicted from {min(worst):+.2f} % to {max(worst):+.2f} % of what was measured")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
