"""What a bundle predicts, and how it adapts, on another onnxruntime or processor: outputs recorded in one place and compared in another.

`record BUNDLE FILE` runs a bundle on images of the data pack (EDGEADAPT_DATA) and writes them and all that came out to FILE (.npz), and how far it is
moved by noise in the last bits of its input. `compare BUNDLE FILE` runs the same bundle on the same images wherever it is, without the pack and
without torch, prints how far it is from what was recorded, and fails where that is more than `ROOM` times what the noise does, and than `LEAST`.
Both take the graphs as exported, as `edgeadapt prepare` makes them here, or as onnxruntime optimises them at one level, be that faster or not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnxruntime

from edgeadapt.bundle import Bundle
from edgeadapt.bundle.digest import sha256
from edgeadapt.corruptions import corrupt
from edgeadapt.memory.graph import OWN
from edgeadapt.preprocess import prepare
from edgeadapt.runtime import loading, preparing
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.choice import wanted
from edgeadapt.runtime.prepared import BUNDLE, Prepared

FORMS = ("exported", "prepared", "extended", "all")
STORED = "statistics stored and measured here"
NOISE, ROOM = 1e-6, 2.0
"""Of inputs, against their values; and how many times what it does may be between two runtimes."""
LEAST = {"largest": 1e-3, "rms": 1e-3, "changed": 1.0, "way": 1e-2, "means": 1e-3, "variances": 1e-3}
"""What is allowed in any case: of logits, predictions in percent, the way of what is trained, statistics."""
AFTER = 4
"""Batches that are predicted after the steps, with the state as it then is."""

Array = Any
Outputs = dict[str, Array]


@contextmanager
def opened(path: Path, form: str) -> Iterator[Adapter]:
    """An adapter over a bundle's graphs in a form of `FORMS`."""
    with tempfile.TemporaryDirectory(prefix="edgeadapt-runtimes-") as folder:
        bundle = Bundle.open(path)
        items = [item for item in wanted(bundle.manifest, None, None) if item.role != "learn"]
        names = [f"{item.role}.b{item.batch}" for item in items]
        ready = None
        if form == "prepared":
            ready = preparing.make(bundle, cache=folder, names=names)
            runs = {name: ready.record["graphs"][name]["runs"] for name in names}
            print("prepared: " + ", ".join(f"{name} {level}" for name, level in runs.items()), flush=True)
        elif form != "exported":
            ready = optimised(bundle, names, form, Path(folder))
        with Adapter(bundle, loading.everything(bundle, items, loading.Terms(1), ready), None, 1) as adapter:
            yield adapter


def optimised(bundle: Bundle, names: Sequence[str], level: str, folder: Path) -> Prepared:
    """Every graph as onnxruntime makes it at a level; `prepare` keeps those alone that are faster here."""
    from edgeadapt.runtime import prepare_optimise

    (folder / OWN).touch()
    (folder / BUNDLE).touch()
    graphs = {}
    for name in names:
        place = folder / name
        place.mkdir()
        made = prepare_optimise.optimise(bundle, name, level, place, 1).prepared
        data = prepare_optimise.adopt(made, folder)
        graphs[name] = replace(made, model=folder / made.model.name, folder=str(folder), digest=sha256(data).hexdigest())
    own = (folder / OWN).stat().st_size
    return Prepared(folder, {name: replace(graph, own_bytes=own) for name, graph in graphs.items()}, own, {})


def outputs(adapter: Adapter, frames: dict[str, Array], source: Array | None, batch: int, steps: int, after: bool = True) -> Outputs:
    """Logits of every pass, and the state after the steps. Each pass begins at the bundle's initial state.

    Args:
        adapter: over the bundle.
        frames: images by name; those of the last name are adapted to.
        source: images that the statistics are measured on; None where none follow the stream.
        batch: frames that are given at a time.
        steps: how often it adapts.
        after: whether the state after the steps is looked at too.
    """
    found: Outputs = {}

    def through(name: str, x: Array, run: Callable[[Array], Array]) -> None:
        print(f"… {name}", file=sys.stderr, flush=True)
        found[name] = np.concatenate([run(x[start : start + batch]) for start in range(0, len(x), batch)])

    for name, x in frames.items():
        through(f"source: {name}", x, adapter.source)
        adapter.reset()
        through(f"predict: {name}", x, adapter.predict)
    name, x = list(frames.items())[-1]
    adapter.reset()
    if steps:
        through(f"adapt: {name}", x[: steps * batch], adapter.adapt)
    if steps and after:
        through(f"after the steps: {name}", x[: AFTER * batch], lambda given: adapter.predict(given, update_statistics=False))
        found |= {f"state.{key}": value for key, value in adapter.state.items()}
    if source is not None:
        found |= {f"measured.{key}": value for key, value in measured(adapter, source, batch).items()}
    return found


def noisy(x: Array | None, adapter: Adapter) -> Array | None:
    """Images as the model takes them, other in their last bits."""
    if x is None:
        return None
    given = prepare(x, adapter.manifest.input)
    return (given * (1 + NOISE * np.random.default_rng(0).standard_normal(given.shape))).astype(np.float32)


def measured(adapter: Adapter, source: Array, batch: int) -> Outputs:
    """The statistics of source images: means over their batches, each normalised with its own, as the exporter measures them."""
    adapter.reset()
    before = adapter.hyper.chosen
    adapter.hyper["mix"] = 1.0
    names = [state.name for state in adapter.manifest.state if state.kind == "statistic"]
    sums = {name: np.zeros((), np.float64) for name in names}
    for start in range(0, len(source), batch):
        adapter.predict(source[start : start + batch])
        state = adapter.state
        sums = {name: total + state[name] for name, total in sums.items()}
    adapter.hyper.restore(before)
    return {name: (total / (len(source) // batch)).astype(np.float32) for name, total in sums.items()}


def here() -> dict[str, str]:
    """Where this runs."""
    return {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__, "machine": platform.machine(), "python": platform.python_version()}


def images(choices: argparse.Namespace, batch: int) -> tuple[dict[str, Array], Array]:
    """Clean and corrupted test images, and source images, out of the data pack."""
    from tests.zoo.data import Pack

    pack = Pack(Path(os.environ.get("EDGEADAPT_DATA", "")))
    x = pack.images(choices.images)[0][: choices.count // batch * batch]
    shifted = corrupt(x, choices.corruption, choices.severity, 0)
    source = pack.images("cifar_train20k")[0][: choices.batches * batch]
    return {"clean": x, f"{choices.corruption} {choices.severity}": shifted}, source


def record(choices: argparse.Namespace) -> None:
    """Write frames and outputs."""
    with opened(choices.bundle, choices.graphs) as adapter:
        batch = max(adapter.manifest.batches)
        frames, source = images(choices, batch)
        kept = source if any(state.kind == "statistic" for state in adapter.manifest.state) else None
        steps = choices.steps if adapter.manifest.planned("adapt") else 0
        found = outputs(adapter, frames, kept, batch, steps)
        moved = outputs(adapter, {name: noisy(x, adapter) for name, x in frames.items()}, noisy(kept, adapter), batch, steps)
        noise = rows(found, moved, adapter)
        about = {**here(), "graphs": choices.graphs, "bundle": adapter.bundle.digest, "batch": batch, "steps": steps}
        about |= {"frames": list(frames), "noise": noise}
    given = {f"frames.{name}": x for name, x in frames.items()} | ({} if kept is None else {"source": kept})
    np.savez_compressed(choices.file, about=np.array(json.dumps(about)), **given, **{f"out.{name}": value for name, value in found.items()})
    print(f"{choices.bundle.name}: what noise of {NOISE:g} in the input does")
    show(noise)


def compare(choices: argparse.Namespace) -> None:
    """Run and print how far it is from what was recorded."""
    with np.load(choices.file) as kept:
        about = json.loads(str(kept["about"]))
        arrays = {name: kept[name] for name in kept.files if name != "about"}
    with opened(choices.bundle, choices.graphs) as adapter:
        if adapter.bundle.digest != about["bundle"]:
            raise SystemExit(f"{choices.bundle} is not the bundle that {choices.file} was recorded of")
        batch = about["batch"]
        whole = {name: arrays[f"frames.{name}"] for name in about["frames"]}
        frames = {name: x[: choices.count // batch * batch] for name, x in whole.items()} if choices.count else whole
        steps = min(about["steps"], len(next(iter(frames.values()))) // batch)
        found = outputs(adapter, frames, arrays.get("source"), batch, steps, steps == about["steps"])
        recorded = {name.removeprefix("out."): value for name, value in arrays.items() if name.startswith("out.")}
        result = [judged(row, about["noise"]) for row in rows(recorded, found, adapter)]
    mine = {**here(), "graphs": choices.graphs}
    told, ours = (", ".join(f"{key} {table[key]}" for key in ("machine", "onnxruntime", "graphs")) for table in (about, mine))
    print(f"{choices.bundle.name}: {ours}; against {told}")
    show(result)
    if choices.json:
        choices.json.write_text(json.dumps({"here": mine, "recorded": about, "rows": result}, indent=1) + "\n", encoding="utf-8")
    if any(row["beyond"] for row in result):
        raise SystemExit("beyond the tolerance")


def judged(row: dict[str, Any], noise: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row with what of it is further off than rounding may move it; that of the same role which noise moved most decides."""
    alike = [other for other in noise if other["pass"].partition(":")[0] == row["pass"].partition(":")[0]]
    allowed = {key: max(least, ROOM * max((other[key] for other in alike if key in other), default=0.0)) for key, least in LEAST.items()}
    return {**row, "beyond": [key for key, most in allowed.items() if row["pass"] != STORED and not row.get(key, 0.0) <= most]}


def rows(recorded: Outputs, found: Outputs, adapter: Adapter) -> list[dict[str, Any]]:
    """How far two are apart, pass by pass."""
    table = []
    for name, got in found.items():
        if name.startswith(("state.", "measured.")) or name not in recorded:
            continue
        want = recorded[name][: len(got)]
        difference = np.abs(got - want)
        confident = np.sort(want, 1)[:, -1] - np.sort(want, 1)[:, -2]
        other = got.argmax(1) != want.argmax(1)
        row = {"pass": name, "frames": len(got), "changed": float(100 * other.mean()), "largest": float(difference.max() / np.abs(want).max())}
        row |= {"rms": float(np.sqrt(np.mean(difference**2)) / np.sqrt(np.mean(want**2)))}
        row |= {"margin": float(confident[other].max() / np.abs(want).max()) if other.any() else 0.0}
        table.append(row)
    start = adapter.bundle.initial_state()
    for kind in ("parameter", "statistic"):
        names = [state.name for state in adapter.manifest.state if state.kind == kind and f"state.{state.name}" in found]
        names = [name for name in names if f"state.{name}" in recorded and not name.endswith(".unit")]
        if names:
            want, got, way = (_values(names, values) for values in (_after(recorded), _after(found), start))
            table.append({"pass": f"{kind}s after the steps", "way": float(np.linalg.norm(got - want) / max(np.linalg.norm(want - way), 1e-12))})
    seen = {name.removeprefix("measured."): value for name, value in found.items() if name.startswith("measured.")}
    if seen:
        table.append({"pass": STORED, **_statistics(start, seen)})
    if seen and f"measured.{next(iter(seen))}" in recorded:
        table.append({"pass": "statistics measured there and here", **_statistics({name: recorded[f"measured.{name}"] for name in seen}, seen)})
    return table


def _after(table: Outputs) -> Outputs:
    return {name.removeprefix("state."): value for name, value in table.items() if name.startswith("state.")}


def _values(names: Sequence[str], state: Outputs) -> Array:
    """Tensors of a state as one vector: whole numbers as what they stand for, in the mean of their units."""
    return np.concatenate([np.ravel(state[name]) * np.mean(state.get(f"{name}.unit", 1.0), dtype=np.float64) for name in names])


def _statistics(want: Outputs, got: Outputs) -> dict[str, float]:
    """Means apart, in deviations of their channel, and variances, as ratios less one: the root mean square over all channels, and the largest."""
    means = [name for name in got if name.endswith(".mean")]
    deviations = {name: np.sqrt(np.maximum(want[name.removesuffix("mean") + "variance"], 1e-12)) for name in means}
    apart = np.concatenate([(got[name] - want[name]) / deviations[name] for name in means])
    others = [name for name in got if name.endswith(".variance")]
    ratio = np.concatenate([(got[name] + 1e-6) / (want[name] + 1e-6) - 1 for name in others])
    found = {"means": float(np.sqrt(np.mean(apart**2))), "farthest mean": float(np.abs(apart).max())}
    return found | {"variances": float(np.sqrt(np.mean(ratio**2))), "farthest variance": float(np.abs(ratio).max())}


def show(table: list[dict[str, Any]]) -> None:
    """Print rows."""
    for row in table:
        figures = [f"{row['frames']} frames  changed {row['changed']:.2f} %"] if "frames" in row else []
        figures += [f"{key} {value:.1e}" for key, value in row.items() if key not in ("pass", "frames", "changed", "beyond")]
        print(f"{row['pass']:38} {'  '.join(figures)}" + "".join(f"  {key} BEYOND TOLERANCE" for key in row.get("beyond", ())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    for name, does in (("record", record), ("compare", compare)):
        mode = modes.add_parser(name)
        mode.set_defaults(does=does)
        mode.add_argument("bundle", type=Path)
        mode.add_argument("file", type=Path, help="of what is recorded")
        mode.add_argument("--graphs", choices=FORMS, default="exported", help="as exported, prepared for this machine, or all optimised at one level")
    recording, comparing = modes.choices["record"], modes.choices["compare"]
    recording.add_argument("--images", default="cifar_test1000", help="set of the pack")
    recording.add_argument("--count", type=int, default=256, help="images; what fills no batch is left out")
    recording.add_argument("--corruption", default="gaussian_noise")
    recording.add_argument("--severity", type=int, default=5)
    recording.add_argument("--steps", type=int, default=16)
    recording.add_argument("--batches", type=int, default=8, help="of source images, that statistics are measured on")
    comparing.add_argument("--count", type=int, help="only so many of the images, where it is slow")
    comparing.add_argument("--json", type=Path, help="write all figures here")
    choices = parser.parse_args()
    choices.does(choices)


if __name__ == "__main__":
    main()
