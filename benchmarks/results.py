"""All methods on all streams, by `edgeadapt bench`, as a page: docs/results.md and docs/results.json.

Needs the data pack (EDGEADAPT_DATA). For each model some benches, each in a process of its own, `--jobs` at a time: the shipped default with and
without a guard on every stream; the same on longer streams where one frame in two hundred would be half a point; every other method on every
stream; CoTTA on one; frames answered one by one; the default within a quarter of the memory of fine-tuning everything in PyTorch; for models that
did not see them, the JPEG images as a shift that nobody made here. What was interrupted goes on where it was. The page is written anew from all
models that are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import full_step
from benchmarks._networks import NETWORKS, SHAPE, data_pack
from edgeadapt.bench.report import GUARDED, text
from edgeadapt.units import format_bytes
from tests.zoo.data import Pack

ROOT = Path(__file__).resolve().parents[1]
JPEG = "cifar_test10k_jpeg"
FACTORIES = {"resnet20": "resnet20", "resnet56": "resnet56", "wrn40-2": "wrn40_2"}
OTHERS = "norm,lean,lame,t3a,tent,eata,sar,rotta,ecotta,side,surgeon,exits"
ALLOWED, SHARE = 0.5, 0.8
"""Points that a guarded row may be worse than not adapting, and the share of the gain that it has to keep where streams are of all classes."""
KEPT = ("continual", "gradual", "recurring", "mixed")
LONGER = ("clean", "single", "repeated", "noise")
"""Streams of one part or two, where a frame is half a point: run with five times as many besides."""


@dataclass(frozen=True)
class Bench:
    """One run of `edgeadapt bench`: its folder's name, its methods and its other arguments."""

    name: str
    methods: str
    arguments: tuple[str, ...]


def benches(choices: argparse.Namespace, full: int, jpeg: Path | None) -> list[Bench]:
    """Those of a model that fine-tuning takes so many bytes of."""
    frames, few = str(choices.frames), str(max(64, choices.frames // 4))
    found = [
        Bench("default", "default", ("--streams", "all", "--guard", "--seeds", str(choices.seeds), "--frames", frames)),
        Bench("longer", "default", ("--streams", ",".join(LONGER), "--guard", "--seeds", str(choices.seeds), "--frames", str(5 * choices.frames))),
        Bench("methods", OTHERS, ("--streams", "all", "--frames", frames)),
        Bench("single", "default", ("--streams", "continual,mixed,sorted", "--guard", "--single", "--batch", "16", "--frames", frames)),
        Bench("quarter", "default", ("--streams", ",".join(KEPT), "--guard", "--budget", str(full // 4), "--frames", frames)),
        Bench("cotta", "cotta", ("--streams", "continual", "--frames", few)),
    ]
    if jpeg is not None:
        found.append(Bench("jpeg", f"default,{OTHERS}", ("--own", str(jpeg), "--streams", "own", "--guard")))
    return found


def prepared(choices: argparse.Namespace, model: str) -> tuple[Path, Path, Path | None]:
    """Files of scored images, of source samples, and of JPEG images where the model is scored on test images."""
    pack, network, folder = Pack(data_pack()), NETWORKS[model], Path(choices.output)
    folder.mkdir(parents=True, exist_ok=True)
    x, y = pack.images(network.scored)
    scored = _saved(folder / f"{network.scored}-{choices.images}.npz", x[: choices.images], y[: choices.images])
    x, y = pack.images("cifar_train20k")
    order = np.random.default_rng(0).permutation(len(x))[: choices.source]
    source = _saved(folder / f"source-{choices.source}.npz", x[order], y[order])
    if network.scored != "cifar_test1000":
        return scored, source, None
    x, y = pack.images(JPEG)
    return scored, source, _saved(folder / f"jpeg-{choices.jpeg}.npz", x[: choices.jpeg], y[: choices.jpeg])


def _full(choices: argparse.Namespace, model: str) -> dict[str, Any]:
    path = Path(choices.output) / model / f"full-b{choices.batch}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(full_step.measured(model, choices.batch)), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def _saved(path: Path, x: np.ndarray, y: np.ndarray) -> Path:
    if not path.is_file():
        unfinished = path.with_suffix(".part.npz")
        np.savez(unfinished, x=x, y=y)
        unfinished.replace(path)
    return path


def run(choices: argparse.Namespace, model: str, bench: Bench, scored: Path, source: Path) -> Path:
    """Its folder; what it prints is in a file there."""
    network, folder = NETWORKS[model], Path(choices.output).resolve() / model / bench.name
    folder.mkdir(parents=True, exist_ok=True)
    shape = "x".join(map(str, SHAPE))
    given = ["--model", f"benchmarks._networks:{FACTORIES[model]}", "--weights", str(data_pack() / "weights" / f"{network.weights}.safetensors")]
    given += ["--input", shape, "--source", str(source.resolve()), "--epochs", str(choices.epochs), "--methods", bench.methods]
    given += [f"--mean={','.join(map(str, network.mean))}", f"--std={','.join(map(str, network.std))}"]
    given += [] if "--own" in bench.arguments else ["--data", str(scored.resolve())]
    command = [sys.executable, "-m", "edgeadapt", "bench", *given, "--batch", str(choices.batch), *bench.arguments, "--output", str(folder)]
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"{model} {bench.name} ended with {done.returncode}: see {folder / 'log.txt'}")
    print(f"{model} {bench.name}: done", flush=True)
    return folder


def gathered(folder: Path) -> dict[str, Any]:
    """What a page shows of one bench."""
    found = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    names = ("row", "stream", "peak_bytes", "batch", "seeds", "frames", "scored", "error", "difference", "worse", "kept", "slope", "ece")
    cells = [{name: cell[name] for name in names if cell.get(name) is not None} for cell in found["cells"]]
    return {"settings": found["settings"], "cells": cells, "costs": found["costs"]}


def page(known: Mapping[str, Any]) -> str:
    """All models as markdown."""
    lines = ["# Results", "", __doc__.split("\n\n")[0].replace("\n", " "), ""]
    lines += [
        "Made by `./dev bench results`. Error in percent, ± half its 95 % interval over images (paired where rows are compared);",
        "`docs/results.json` has every figure and setting. Streams and rows are those of [the bench](bench.md); `default` is what an export without",
        "`--method` is. Never compare figures of two batch sizes, and none of these with those of CIFAR-10-C: corruptions are made here.",
        "",
    ]
    for model, groups in known.items():
        lines += [f"## {model}", "", *_sizes(groups), "", *_table(_rows(groups)), "", *_claims(groups), *_costs(groups), *_apart(groups)]
    return "\n".join(lines).rstrip() + "\n"


def _sizes(groups: Mapping[str, Any]) -> Iterator[str]:
    settings = next(groups[name]["settings"] for name in ("default", *groups) if "settings" in groups.get(name, {}))
    yield "; ".join(f"{name}: {settings[name]}" for name in ("data", "batch", "streams", "severity", "seeds") if name in settings) + "."


def _cells(group: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(cell["row"], cell["stream"]): cell for cell in group["cells"]}


def _rows(groups: Mapping[str, Any]) -> list[tuple[str, dict[str, Mapping[str, Any]]]]:
    """Rows of the large table: their names, and cells by stream; methods without those rows that the default has too."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name in ("default", "methods", "cotta"):
        for (row, stream), cell in _cells(groups[name]).items() if name in groups else ():
            shown = _shown(name, row)
            if shown is not None:
                found.setdefault(shown, {})[stream] = cell
    return list(found.items())


def _shown(group: str, row: str) -> str | None:
    """What a row is called, None where it is left out: frozen models and first states are the default's."""
    if group == "default":
        names = {"eata": "**default**", f"eata{GUARDED}": "**default, guarded**", "side": "**default**", f"side{GUARDED}": "**default, guarded**"}
        return names.get(row, row)
    return None if row.startswith("source") or row.endswith("step 0") else row


def _table(rows: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]) -> list[str]:
    """Errors of rows, each a name and cells by stream."""
    streams = list(dict.fromkeys(stream for _, cells in rows for stream in cells))
    lines = ["| | " + " | ".join(streams) + " |", "|---|" + "---:|" * len(streams)]
    for row, cells in rows:
        lines.append(f"| {row} | " + " | ".join(text(cells.get(stream, {}).get("error")) for stream in streams) + " |")
    return lines


def _claims(groups: Mapping[str, Any]) -> list[str]:
    """Of the guarded default, stream by stream: points worse than not adapting, what it keeps of the gain, and whether that is what is promised."""
    cells = {
        cell["stream"] + (f", {cell['scored'] // len(cell['seeds'])} frames" if name == "longer" else ""): cell
        for name in ("default", "longer")
        for cell in (groups[name]["cells"] if name in groups else ())
        if "worse" in cell
    }
    if not cells:
        return []
    lines = ["### The default with a guard, against not adapting", ""]
    lines += ["| stream | points worse | kept of the gain, % | |", "|---|---:|---:|---|"]
    for stream, cell in cells.items():
        worse, kept = cell["worse"], cell.get("kept")
        share = {name: 100 * end for name, end in kept.items()} if kept and None not in kept.values() else None  # else nothing is gained for certain
        wrong = worse["value"] > ALLOWED or (stream in KEPT and kept is not None and kept["value"] < SHARE)
        lines.append(f"| {stream} | {text(worse, sign=True)} | {text(share, 0)} | {'**not as promised**' if wrong else 'as promised'} |")
    slope = next((cell["slope"] for cell in cells.values() if cell.get("slope")), None)
    lines += ["", f"Its error changes by {text(slope, 2, sign=True)} points from one round of the recurring stream to the next."] if slope else []
    return [*lines, ""]


def _costs(groups: Mapping[str, Any]) -> list[str]:
    """Memory and time of all rows, beside fine-tuning everything."""
    full = groups["full"]
    lines = ["### What it takes", "", f"Fine-tuning everything in PyTorch at batch {full['batch']} takes {format_bytes(full['bytes'])}."]
    lines += ["Peak resident memory of the whole process with its quickest step, and milliseconds a frame on a machine that was not idle.", ""]
    lines += ["| | memory | of fine-tuning, % | p50 | p95 |", "|---|---:|---:|---:|---:|"]
    for name in ("default", "methods", "cotta"):
        for cost in groups[name]["costs"] if name in groups else ():
            shown = _shown(name, cost["row"])
            if shown is not None:
                peak = cost["peak_bytes"]
                lines.append(f"| {shown} | {format_bytes(peak)} | {100 * peak / full['bytes']:.0f} | {cost['ms_p50']:.1f} | {cost['ms_p95']:.1f} |")
    return [*lines, ""]


def _apart(groups: Mapping[str, Any]) -> list[str]:
    """Frames one by one, within a quarter of the memory, and the JPEG images."""
    lines: list[str] = []
    titles = (("single", "One frame at a time"), ("quarter", "Within a quarter of the memory of fine-tuning"), ("jpeg", "JPEG images, quality 75"))
    for name, title in titles:
        found: dict[str, dict[str, Mapping[str, Any]]] = {}
        for (row, stream), cell in _cells(groups[name]).items() if name in groups else ():
            found.setdefault(row, {})[stream] = cell
        lines += [f"### {title}", "", *_table(list(found.items())), ""] if found else []
        if name == "quarter" and found:
            held = max(cell["peak_bytes"] for cell in groups[name]["cells"] if GUARDED in cell["row"])
            lines += [f"Given {groups[name]['settings']['budget']}; the guarded default held {format_bytes(held)} at most.", ""]
    return lines


def main(words: Sequence[str] | None = None) -> None:
    """Runs what is not there yet, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(ROOT / ".cache" / "results"), help="folder for bundles and runs")
    parser.add_argument("--models", nargs="+", default=["wrn40-2", "resnet56"], choices=list(FACTORIES))
    parser.add_argument("--images", type=int, default=2000, help="that streams are made of, at most")
    parser.add_argument("--frames", type=int, default=200, help="of each corruption")
    parser.add_argument("--jpeg", type=int, default=2000, help="JPEG images")
    parser.add_argument("--source", type=int, default=8000, help="source samples")
    parser.add_argument("--epochs", type=int, default=5, help="of warm-ups")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5, help="of the default")
    parser.add_argument("--jobs", type=int, default=2, help="benches at a time; times are only worth something with one")
    parser.add_argument("--only", nargs="+", help="names of benches, such as default methods")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page goes")
    choices = parser.parse_args(words)
    path = choices.docs / "results.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    work = []
    for model in choices.models:
        scored, source, jpeg = prepared(choices, model)
        known.setdefault(model, {})["full"] = full = _full(choices, model)
        found = benches(choices, full["bytes"], jpeg)
        work += [(model, bench, scored, source) for bench in found if not choices.only or bench.name in choices.only]
    with ThreadPoolExecutor(choices.jobs) as pool:
        folders = list(pool.map(lambda item: run(choices, *item), work))
    for (model, bench, *_), folder in zip(work, folders, strict=True):
        known[model][bench.name] = gathered(folder)
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    (choices.docs / "results.md").write_text(page(known), encoding="utf-8")
    print(f"wrote {choices.docs / 'results.md'}")


if __name__ == "__main__":
    main()
