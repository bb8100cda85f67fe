"""The continual stream of the fifteen CIFAR-10 corruptions: bundles on onnxruntime, with --reference beside plain PyTorch on the same batches.

Needs the data pack (EDGEADAPT_DATA). The ResNets are scored on test1000, WideResNet-40-2 on holdout10k; warm-up and statistics come from train20k.
Error is of the prediction from the forward pass on arrival, one step a batch, no reset, no knowledge of the corruptions' boundaries. Bundles,
corrupted images and results are kept in the folder --cache, and what is there already is not computed again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._networks import NETWORKS, SHAPE, data_pack
from edgeadapt.bundle import InputSpec
from edgeadapt.corruptions.parameters import CORRUPTIONS
from edgeadapt.corruptions.streams import continual
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.export import export
from edgeadapt.exporters.methods import METHODS as KINDS
from edgeadapt.exporters.options import calibration_rows
from edgeadapt.progress import Bars
from edgeadapt.runtime.adapter import Adapter
from tests.reference import Adaptation, Side, fixed, twin
from tests.zoo.data import Pack

EVERY = ("source", "norm", "tent", "ecotta", "side", "side-live", "surgeon", "exits", "exits-live")
TWINNED = ("source", "norm", "tent", "ecotta", "side", "side-live")
"""Methods that plain PyTorch is run beside."""
ADAPTING = ("tent", "ecotta", "side", "surgeon", "exits")
WARMED = ("ecotta", "exits")
OWN_TEXTURES = ("frost",)


@dataclass(frozen=True)
class Stream:
    """Corrupted images (count, n, 32, 32, 3) and their labels (count, n), corruption by corruption in the order of their visits."""

    x: np.ndarray
    y: np.ndarray

    def batches(self, size: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(number of the corruption, images, labels), whole batches only."""
        for k in range(len(self.x)):
            for start in range(0, self.x.shape[1] - size + 1, size):
                yield k, self.x[k, start : start + size], self.y[k, start : start + size]


def stream(cache: Path, pack: Pack, name: str, images: int, severity: int, seed: int) -> Stream:
    """The stream over the first `images` images of a set, from the cache if it is there."""
    path = cache / f"stream-{name}-{images}-severity{severity}-seed{seed}.npz"
    if not path.is_file():
        x, y = pack.images(name)
        x, y = x[:images], y[:images]
        print(f"corrupting {len(x)} images in {len(CORRUPTIONS)} ways", flush=True)
        parts = list(continual(x, y, severity=severity, batch=len(x), seed=seed))
        unfinished = path.with_suffix(".part.npz")
        np.savez(unfinished, x=np.stack([part.x for part in parts]), y=np.stack([part.y for part in parts]))
        unfinished.replace(path)
    with np.load(path) as archive:
        return Stream(archive["x"], archive["y"])


def source_samples(pack: Pack, model: str, count: int, seed: int) -> Samples:
    """The first images of train20k in a random order, equally many of each class."""
    x, y = pack.images("cifar_train20k")
    random = np.random.default_rng(seed)
    chosen = np.concatenate([random.permutation(np.flatnonzero(y == label))[: count // 10] for label in range(10)])
    chosen = random.permutation(chosen)
    network = NETWORKS[model]
    return Samples(np.ascontiguousarray(x[chosen]), y[chosen], InputSpec(SHAPE, None, network.mean, network.std))


def bundle_of(choices: argparse.Namespace, pack: Pack, model: str, method: str) -> Path:
    """The bundle of a model and method, exported unless the cache holds it."""
    kind, _, mode = method.partition("-")
    warm = f"-w{choices.warm_up_images}x{choices.epochs}" if kind in WARMED else f"-w{choices.warm_up_images}"
    trained = f"-train{choices.train}" if _partly(choices, kind) else ""
    tier = f"-{choices.updates}" if choices.updates != "reference" and kind in ADAPTING else ""
    small = _in_codes(choices, kind)
    own = {name: value for name, value in (item.split("=") for item in choices.setting) if name in KINDS[kind].settings}
    codes = "".join(f"-{name}-{value}" for name, value in {**small, **own}.items())
    path = Path(choices.cache) / f"{model}-{method}-b{choices.batch}{warm}{trained}{tier}{codes}-seed{choices.seed}.edgeadapt"
    if path.is_file() and not choices.fresh:
        return path
    data = source_samples(pack, model, choices.warm_up_images, choices.seed)
    options: dict[str, Any] = {"method": kind, "batches": (choices.batch,), "seed": choices.seed}
    options |= {"epochs": choices.epochs} if kind in WARMED else {}
    options |= {"settings": own} if own else {}
    options |= {"train": choices.train} if trained else {}
    options |= {"updates": choices.updates} if tier else {}
    options |= small
    options |= {"statistics": mode or None, "threads": choices.threads, "allow_drop": True}
    with Bars() as bars:
        export(NETWORKS[model].trained(pack.folder), path, shape=SHAPE, data=data, model_name=model, progress=bars, **options)
    return path


def _partly(choices: argparse.Namespace, kind: str) -> bool:
    return bool(choices.train) and kind in ADAPTING


def _in_codes(choices: argparse.Namespace, kind: str) -> dict[str, str]:
    """What of a bundle is to be in 8 bits, as options of the export, where the method has a use for it."""
    given = {"quantize": choices.quantize} if choices.quantize != "none" else {}
    if kind in ADAPTING:
        given |= {name: value for name, value in (("gradient", choices.gradient), ("saved", choices.saved)) if value}
    return given


def plain_of(choices: argparse.Namespace, pack: Pack, model: str, adapter: Adapter, overrides: dict[str, float]) -> Adaptation:
    """The plain implementation, from the bundle's initial state."""
    manifest = adapter.manifest.to_json()
    known = {name: value for name, value in overrides.items() if name in manifest["hyper"]}
    network = NETWORKS[model].trained(pack.folder)
    plain = twin(network, manifest, adapter.bundle.initial_state(), choices.batch, frozen=fixed(adapter.bundle), **known)
    if isinstance(plain, Side):  # the scaling of the taps is no state: measured anew, on the samples that the exporter used
        data = source_samples(pack, model, choices.warm_up_images, choices.seed)
        kept, _ = data.split(0.1, choices.seed)
        rows = calibration_rows(kept, min(64, len(kept)), choices.seed)
        plain.calibrate([torch.from_numpy(data.tensor(chosen)) for chosen in rows])
    return plain


def as_input(x: np.ndarray, spec: InputSpec) -> torch.Tensor:
    """uint8 (N, H, W, C) to float32 (N, C, H, W), independently of `edgeadapt.preprocess`."""
    scaled = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(spec.mean).view(1, 3, 1, 1)) / torch.tensor(spec.std).view(1, 3, 1, 1)


def run(choices: argparse.Namespace, pack: Pack, given: Stream, model: str, method: str) -> dict[str, Any]:
    """One model and method over the stream: errors of each corruption in percent, and how far the two implementations agree."""
    path = bundle_of(choices, pack, model, method)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    overrides = dict(item.split("=") for item in choices.set)
    overrides = {name: float(value) for name, value in overrides.items()}
    label = "-".join([path.stem, f"n{choices.images}", f"severity{choices.severity}", *choices.set])
    kept = Path(choices.cache) / f"result-{label}.json"
    if kept.is_file() and not choices.fresh:
        result = json.loads(kept.read_text(encoding="utf-8"))
        if result["bundle"] == digest and (not choices.reference or "plain" in result):
            return result
    adapter = Adapter.open(path, threads=choices.threads)
    for name, value in overrides.items():
        if name in adapter.hyper:
            adapter.hyper[name] = value
    plain = plain_of(choices, pack, model, adapter, overrides) if choices.reference else None
    count = len(CORRUPTIONS)
    frames, wrong, plain_wrong, same = np.zeros(count), np.zeros(count), np.zeros(count), np.zeros(count)
    seconds, plain_seconds = 0.0, 0.0
    for k, x, y in given.batches(choices.batch):
        start = time.perf_counter()
        guess = adapter.adapt(x).argmax(1)
        seconds += time.perf_counter() - start
        frames[k] += len(y)
        wrong[k] += int((guess != y).sum())
        if plain is not None:
            start = time.perf_counter()
            other = plain.adapt(as_input(x, adapter.manifest.input)).numpy().argmax(1)
            plain_seconds += time.perf_counter() - start
            plain_wrong[k] += int((other != y).sum())
            same[k] += int((guess == other).sum())
    error = 100 * wrong / frames
    result = {"model": model, "method": method, "bundle": digest, "batch": choices.batch, "frames": int(frames[0]), "severity": choices.severity}
    result |= {"codes": _in_codes(choices, method.partition("-")[0])}
    result |= {"seed": choices.seed, "error": dict(zip(CORRUPTIONS, error.tolist())), "mean": float(error.mean()), "seconds": seconds}
    result |= {"hyper": {**scalars_of(adapter, choices.batch), **overrides}, "warmup": adapter.manifest.warmup, "stats": adapter.stats}
    if plain is not None:
        other_error = 100 * plain_wrong / frames
        result["plain"] = {"error": dict(zip(CORRUPTIONS, other_error.tolist())), "mean": float(other_error.mean()), "seconds": plain_seconds}
        result["plain"] |= {"agreement": float(100 * same.sum() / frames.sum()), "difference": float(error.mean() - other_error.mean())}
        result["plain"]["apart"] = apart(adapter, plain)
    adapter.close()
    kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def scalars_of(adapter: Adapter, batch: int) -> dict[str, float]:
    """What the step used."""
    manifest = adapter.manifest
    graph = manifest.graphs.get(f"adapt.b{batch}") or manifest.graphs[f"predict.b{batch}"]
    return {name: spec.default for name, spec in manifest.hyper.items()} | graph.defaults


def apart(adapter: Adapter, plain: Adaptation) -> float:
    """The distance of all parameters at the end, against their way since the start; of the statistics where nothing is trained."""
    state, start, other = adapter.state, adapter.bundle.initial_state(), plain.state()
    names = list(plain.trained) or list(state)
    difference = sum(float(((state[name] - other[name].numpy()) ** 2).sum()) for name in names)
    way = sum(float(((state[name] - start[name]) ** 2).sum()) for name in names)
    return (difference / way) ** 0.5 if way else difference**0.5


def show(results: list[dict[str, Any]]) -> None:
    """Print a table for each model."""
    for model in dict.fromkeys(result["model"] for result in results):
        mine = [result for result in results if result["model"] == model]
        first = mine[0]
        setting = f"severity {first['severity']}, batch {first['batch']}, {first['frames']} images a corruption, seed {first['seed']}"
        setting += "".join(f", {name} {value}" for name, value in max((result.get("codes", {}) for result in mine), key=len).items())
        print(f"\n{model}: error in percent, {setting}")
        print(f"{'':20}" + "".join(f"{result['method']:>11}" for result in mine))
        for name in CORRUPTIONS:
            print(f"{name + ('*' if name in OWN_TEXTURES else ''):20}" + "".join(f"{result['error'][name]:11.2f}" for result in mine))
        rows = [("mean", lambda result: f"{result['mean']:.2f}")]
        if any("plain" in result for result in mine):
            rows += [
                ("mean, PyTorch", lambda result: f"{result['plain']['mean']:.2f}" if "plain" in result else ""),
                ("difference, points", lambda result: f"{result['plain']['difference']:+.3f}" if "plain" in result else ""),
                ("same predictions, %", lambda result: f"{result['plain']['agreement']:.3f}" if "plain" in result else ""),
                ("states apart", lambda result: f"{result['plain']['apart']:.1e}" if "plain" in result else ""),
            ]
        for title, text in rows:
            print(f"{title:20}" + "".join(f"{text(result):>11}" for result in mine))
    print("* made with our own textures, so not to be compared with published figures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="folder for bundles, corrupted images and results")
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", default=list(TWINNED), choices=EVERY)
    parser.add_argument("--batch", type=int, default=64, help="frames in a batch, such as 200, 64, 16, 4 or 1")
    parser.add_argument("--train", type=int, help="train only the last so many parts on the stream, where the method has parts")
    parser.add_argument("--updates", choices=("reference", "compact", "tiny"), default="reference", help="how parameters and moments are held")
    parser.add_argument("--quantize", choices=("none", "int8"), default="none", help="what the frozen model is computed in")
    parser.add_argument("--gradient", choices=("float", "int8"), help="what gradients pass the frozen model in; int8 where it is computed in it")
    parser.add_argument("--saved", choices=("float", "int8"), help="what a step keeps for its backward pass; int8 where the frozen model is in it")
    parser.add_argument("--images", type=int, default=1000, help="images of each corruption; what fills no batch is left out")
    parser.add_argument("--severity", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10, help="of the warm-up")
    parser.add_argument("--warm-up-images", type=int, default=20000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="scalars of the step, such as rate=0.005")
    parser.add_argument("--setting", nargs="*", default=[], metavar="NAME=VALUE", help="choices of a method's own, such as scope=full")
    parser.add_argument("--reference", action="store_true", help="also run plain PyTorch, and compare")
    parser.add_argument("--fresh", action="store_true", help="export and run again whatever the cache holds")
    parser.add_argument("--json", type=Path, help="write all results here")
    choices = parser.parse_args()
    if choices.reference and set(choices.methods) - set(TWINNED):
        parser.error(f"plain PyTorch is run beside {', '.join(TWINNED)}")
    if choices.reference and choices.updates != "reference":
        parser.error("plain PyTorch holds parameters in float32: --reference goes with --updates reference")
    if choices.reference and (choices.quantize != "none" or choices.saved == "int8"):
        parser.error("plain PyTorch computes in float32 throughout: --reference goes with --quantize none and without --saved int8")
    if choices.gradient == "int8" and choices.quantize == "none":
        parser.error("gradients in 8 bits are of convolutions in 8 bits: --gradient int8 goes with --quantize int8")
    torch.set_num_threads(choices.threads)
    Path(choices.cache).mkdir(parents=True, exist_ok=True)
    pack = Pack(data_pack())
    results = []
    for model in choices.models:
        available = len(pack.images(NETWORKS[model].scored)[0])
        if choices.batch > min(choices.images, available):
            raise SystemExit(f"--batch {choices.batch} is more than there are images of each corruption: {min(choices.images, available)}")
        given = stream(Path(choices.cache), pack, NETWORKS[model].scored, min(choices.images, available), choices.severity, choices.seed)
        for method in choices.methods:
            results.append(run(choices, pack, given, model, method))
            print(f"{model} {method}: {results[-1]['mean']:.2f} % in {results[-1]['seconds']:.0f} s", flush=True)
            if choices.json:
                choices.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
