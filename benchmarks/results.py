"""All methods on all streams, by `edgeadapt bench`, as a page: docs/results.md and docs/results.json.

Needs the data pack (EDGEADAPT_DATA). For each model some benches: the shipped default with a guard on every stream, several seeds; on those of all
classes also without one; on longer streams where one frame in two hundred would be half a point; every other method on every stream; CoTTA on one;
frames answered one by one; the default within a quarter of the memory of fine-tuning everything in PyTorch; of the other methods that fit there the
best, with as many seeds, on streams of all classes; for models that did not see them, the JPEG images as a shift that nobody made here. The page is
written after every stream: what is on it, made with the same arguments, is not made again (`--again` makes it), and what was interrupted goes on
where it was. So it may be made in several goes. Of one model the bundles are exported once, in `--output`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import full_step
from benchmarks._networks import NETWORKS, SHAPE, data_pack
from edgeadapt.bench.report import GUARDED, STILL, text
from edgeadapt.bench.streams import NAMES
from edgeadapt.errors import BudgetError
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
"""Streams of one part or two, where a frame is half a point: with five times as many frames where the claim is judged."""
DEFAULT = ("eata", "side")
"""Methods that the default is of, by the kind of model: its rows are called so."""


@dataclass(frozen=True)
class Bench:
    """What is measured: its name, its methods, its streams, and other arguments of `edgeadapt bench`."""

    name: str
    methods: str
    streams: Sequence[str]
    arguments: tuple[str, ...]


def benches(choices: argparse.Namespace, full: int, jpeg: Path | None) -> list[Bench]:
    """Those of a model that fine-tuning takes so many bytes of."""
    frames, few = (_frames(choices, share) for share in (1, 4))
    seeds = ("--seeds", str(choices.seeds))
    found = [
        Bench("guarded", "default", [name for name in NAMES if name not in LONGER], ("--guarded-only", *seeds, *frames)),
        Bench("longer", "default", LONGER, ("--guarded-only", *seeds, "--frames", str(5 * choices.frames))),
        Bench("kept", "default", KEPT, ("--guard", *seeds, *frames)),
        Bench("default", "default", NAMES, ("--guard", *frames)),
        Bench("single", "default", ("continual", "mixed", "sorted"), ("--guarded-only", "--single", *frames)),
        Bench("quarter", "default", KEPT, ("--guarded-only", "--budget", str(full // 4), *seeds, *frames)),
        Bench("methods", OTHERS, NAMES, frames),
        Bench("cotta", "cotta", ("continual",), few),
    ]
    if jpeg is not None:
        found.append(Bench("jpeg", f"default,{OTHERS}", ("own",), ("--own", str(jpeg), "--guard")))
    return found


def _frames(choices: argparse.Namespace, share: int = 1) -> tuple[str, str]:
    """Arguments for that share of the usual frames, and a window at least."""
    return "--frames", str(max(64, choices.frames // share))


def prepared(choices: argparse.Namespace, model: str) -> tuple[Path, Path, Path | None]:
    """Files of scored images, of source samples, and of JPEG images where the model is scored on test images."""
    pack, network, folder = Pack(data_pack()), NETWORKS[model], Path(choices.output)
    folder.mkdir(parents=True, exist_ok=True)
    x, y = pack.images(network.scored)
    scored = _saved(folder / f"{network.scored}-{choices.images}.npz", x[: choices.images], y[: choices.images])
    source = _drawn(folder / f"source-{choices.source}.npz", *pack.images("cifar_train20k"), choices.source)
    if network.scored != "cifar_test1000":
        return scored, source, None
    return scored, source, _drawn(folder / f"jpeg-shuffled-{choices.jpeg}.npz", *pack.images(JPEG), choices.jpeg)


def _drawn(path: Path, x: np.ndarray, y: np.ndarray, count: int) -> Path:
    """So many of them in random order: the first ones of a file that is sorted are of a class or two."""
    order = np.random.default_rng(0).permutation(len(x))[:count]
    return _saved(path, x[order], y[order])


def _saved(path: Path, x: np.ndarray, y: np.ndarray) -> Path:
    if not path.is_file():
        unfinished = path.with_suffix(".part.npz")
        np.savez(unfinished, x=x, y=y)
        unfinished.replace(path)
    return path


def run(choices: argparse.Namespace, model: str, bench: Bench, stream: str, scored: Path, source: Path) -> dict[str, Any]:
    """What a page shows of one stream of a bench; what the bench prints is in a file in the folder of the model."""
    network, folder = NETWORKS[model], Path(choices.output).resolve() / model
    folder.mkdir(parents=True, exist_ok=True)
    shape = "x".join(map(str, SHAPE))
    given = ["--model", f"benchmarks._networks:{FACTORIES[model]}", "--weights", str(data_pack() / "weights" / f"{network.weights}.safetensors")]
    given += ["--input", shape, "--source", str(source.resolve()), "--epochs", str(choices.epochs), "--methods", bench.methods]
    given += [f"--mean={','.join(map(str, network.mean))}", f"--std={','.join(map(str, network.std))}"]
    given += [] if "--own" in bench.arguments else ["--data", str(scored.resolve())]
    command = [sys.executable, "-m", "edgeadapt", "bench", *given, "--batch", str(choices.batch), "--streams", stream, *bench.arguments]
    with open(folder / f"{bench.name}.{stream}.txt", "w", encoding="utf-8") as log:
        done = subprocess.run([*command, "--output", str(folder)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode == BudgetError.exit_code and "--budget" in bench.arguments:
        asked = Path(log.name).read_text(encoding="utf-8").rpartition("adapt at batch ")[2].partition(";")[0]
        print(f"{model} {bench.name} {stream}: does not fit", flush=True)
        return {"settings": {}, "digests": {}, "cells": [], "refused": f"Adapting at batch {asked}, and does not fit."}
    if done.returncode:
        raise SystemExit(f"{model} {bench.name} {stream} ended with {done.returncode}: see {log.name}")
    print(f"{model} {bench.name} {stream}: done", flush=True)
    found = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    names = ("row", "peak_bytes", "batch", "seeds", "frames", "scored", "error", "difference", "worse", "kept", "slope", "forgetting", "ece")
    cells = [{name: cell[name] for name in names if cell.get(name) is not None} for cell in found["cells"]]
    costs = {cost["row"]: {name: cost[name] for name in ("ms_p50", "ms_p95")} for cost in found["costs"]}
    return {"settings": found["settings"], "digests": found["digests"], "cells": [cell | costs[cell["row"]] for cell in cells]}


def fitting(folder: Path, batch: int, budget: int) -> dict[str, bool]:
    """Of each bundle in a folder but the default's, by its method, whether it fits a budget at a batch, in whichever of its variants."""
    found = {}
    for path in sorted(folder.glob("*.edgeadapt")):
        command = [sys.executable, "-m", "edgeadapt", "simulate", str(path), "--batch", str(batch), "--budget", str(budget), "--json"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False, text=True)
        if done.returncode not in (0, BudgetError.exit_code):
            raise SystemExit(f"{path} cannot be simulated: {done.stderr}")
        found[path.stem] = done.returncode == 0
    found.pop("default", None)
    return found


class Page:
    """The page's two files, which several models, and several processes, write to."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._file = folder, folder / "results.json"

    def known(self) -> dict[str, Any]:
        """What is there: by model the facts `full`, and by bench and stream what `run` found."""
        found: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        return found

    def has(self, model: str, bench: Bench, stream: str, asked: Sequence[str]) -> bool:
        """Whether a stream is there, made with these arguments."""
        return self.known().get(model, {}).get(bench.name, {}).get(stream, {}).get("arguments") == list(asked)

    def put(self, model: str, name: str, found: Any, stream: str | None = None) -> None:
        """Adds one stream of a bench, or another fact of a model."""
        lock = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = self.known()
            facts = known.setdefault(model, {})
            if stream is None:
                facts[name] = found
            else:
                facts.setdefault(name, {})[stream] = found
            for path, content in ((self._file, json.dumps(known, indent=1) + "\n"), (self._folder / "results.md", page(known))):
                unfinished = path.with_suffix(".part")
                unfinished.write_text(content, encoding="utf-8")
                unfinished.replace(path)
        finally:
            os.close(lock)


def page(known: Mapping[str, Any]) -> str:
    """All models as markdown."""
    lines = ["# Results", "", __doc__.split("\n\n")[0].replace("\n", " "), ""]
    lines += [
        "Made by `./dev bench results`. Error in percent, ± half its 95 % interval over images (paired where rows are compared);",
        "[results.json](results.json) has every figure and setting. Streams and rows are those of [the bench](bench.md); `default` is what an export",
        "without `--method` is. Never compare figures of two batch sizes, and none of these with those of CIFAR-10-C: corruptions are made here.",
        "",
    ]
    for model, groups in known.items():
        lines += [f"## {model}", "", *_claims(groups), *_all(groups), *_best(groups), *_apart(groups), *_costs(groups)]
    return "\n".join(lines).rstrip() + "\n"


def _settings(group: Mapping[str, Any]) -> str:
    """Of one bench, in words: what is the same for all its streams."""
    settings = next(iter(group.values()))["settings"]
    told = [f"{name}: {settings[name]}" for name in ("data", "batch", "severity", "seeds", "budget") if settings.get(name, "none") != "none"]
    digests = {tuple(sorted(made["digests"].items())) for made in group.values()}
    bundles = next(iter(digests))
    if len(digests) > 1:
        told.append(f"bundles of {len(digests)} exports")
    elif len(bundles) == 1:
        told.append(f"bundle {bundles[0][1][:12]}")
    return "; ".join(told) + "."


def _cells(groups: Mapping[str, Any], name: str) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Of one bench, by row and stream."""
    return {(cell["row"], stream): cell for stream, made in groups.get(name, {}).items() for cell in made["cells"]}


def _rows(groups: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, dict[str, Mapping[str, Any]]]]:
    """Rows of a table: their names, and cells by stream; methods without those rows that the default has too."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name in names:
        for (row, stream), cell in _cells(groups, name).items():
            shown = _shown(name, row)
            if shown is not None:
                found.setdefault(shown, {})[stream] = cell
    return list(found.items())


def _shown(group: str, row: str) -> str | None:
    """What a row is called, None where it is left out: frozen models and first states are the default's."""
    if group not in ("methods", "cotta"):
        base, comma, rest = row.partition(",")
        named = ("default",) if group == "jpeg" else DEFAULT  # beside the other methods it is called so by the bench
        return f"**default**{comma}{rest}" if base in named and not row.endswith(STILL) else row
    return None if row.startswith("source") or row.endswith(STILL) else row


def _table(rows: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]) -> list[str]:
    """Errors of rows, each a name and cells by stream."""
    streams = list(dict.fromkeys(stream for _, cells in rows for stream in cells))
    lines = ["| | " + " | ".join(streams) + " |", "|---|" + "---:|" * len(streams)]
    for row, cells in rows:
        lines.append(f"| {row} | " + " | ".join(text(cells.get(stream, {}).get("error")) for stream in streams) + " |")
    return lines


def _claims(groups: Mapping[str, Any]) -> list[str]:
    """Of the guarded default, stream by stream: points worse than not adapting, what it keeps of the gain, and whether that is what is promised."""
    judged = {stream: cell for name in ("guarded", "longer") for (_, stream), cell in _cells(groups, name).items() if "worse" in cell}
    if not judged:
        return []
    kept = {stream: cell["kept"] for (_, stream), cell in _cells(groups, "kept").items() if cell.get("kept")}
    errors = {key: cell["error"] for name in ("guarded", "longer") for key, cell in _cells(groups, name).items()}
    free = {stream: cell["error"] for (row, stream), cell in _cells(groups, "kept").items() if row in DEFAULT}
    lines = ["### With a guard, against not adapting", "", *(_settings(groups[name]) for name in ("guarded", "longer") if name in groups), ""]
    lines += ["| stream | frames scored | source | step 0 | unguarded | guarded | points worse than the better | kept of the gain, % | |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---|"]
    for stream, cell in judged.items():
        share = kept.get(stream)
        sure = {name: 100 * end for name, end in share.items()} if share and None not in share.values() else None  # else chance
        wrong = cell["worse"]["value"] > ALLOWED or (stream in KEPT and sure is not None and sure["value"] < 100 * SHARE)
        still = [text(errors.get((row, stream))) for row in ("source", STILL)]
        line = [stream, str(cell["scored"]), *still, text(free.get(stream)), text(cell["error"]), text(cell["worse"], sign=True), text(sure, 0)]
        lines.append("| " + " | ".join([*line, "**not as promised**" if wrong else "as promised"]) + " |")
    slope = next((cell["slope"] for cell in judged.values() if cell.get("slope")), None)
    lines += ["", "Worse than the better of source and step 0, frame by frame. What is kept is of the gain without a guard, on the same frames;"]
    lines += ["– where that is not measured, or is nothing for certain."]
    lines += [f"The error changes by {text(slope, 2, sign=True)} points from one round of the recurring stream to the next."] if slope else []
    return [*lines, ""]


def _all(groups: Mapping[str, Any]) -> list[str]:
    """Every method on every stream, one seed."""
    rows = _rows(groups, ("default", "methods", "cotta"))
    if not rows:
        return []
    return ["### All methods", "", *(_settings(groups[name]) for name in ("default",) if name in groups), "", *_table(rows), ""]


def best_other(groups: Mapping[str, Any], stream: str) -> str | None:
    """The best other method of a stream that fits into a quarter of fine-tuning's memory, by one seed; None where none was measured."""
    cells = {row: cell for (row, where), cell in _cells(groups, "methods").items() if where == stream and _shown("methods", row)}
    fit = [row for row in cells if groups.get("fits", {}).get(row, True)]
    return min(fit, key=lambda row: float(cells[row]["error"]["value"]), default=None)


def _best(groups: Mapping[str, Any]) -> list[str]:
    """The default beside the best of the others that fit into a quarter of fine-tuning's memory, on streams of all classes.

    By the same seeds, several where the other has them. Judged is the default in that memory too, where that was measured.
    """
    guarded = {
        name: {stream: cell for (row, stream), cell in _cells(groups, name).items() if GUARDED in row} for name in ("default", "guarded", "quarter")
    }
    lines = ["| stream | seeds | default, guarded | within a quarter too | the best other method that fits a quarter of fine-tuning's memory | |"]
    lines += ["|---|---:|---:|---:|---:|---|"]
    for stream in KEPT:
        best = best_other(groups, stream)
        more = _cells(groups, "rivals").get((best or "", stream))
        mine, other = guarded["guarded" if more else "default"].get(stream), more or _cells(groups, "methods").get((best or "", stream))
        if mine is None or other is None:
            continue
        held = guarded["quarter"].get(stream)
        held = held if held and held["seeds"] == mine["seeds"] else None
        judged = max(cell["error"]["value"] for cell in (mine, held) if cell)
        verdict = "best, or within 0.3" if judged <= other["error"]["value"] + 0.3 else "**not the best**"
        errors = [text(cell["error"]) if cell else "–" for cell in (mine, held, other)]
        lines.append(f"| {stream} | {len(mine['seeds'])} | {' | '.join(errors)} ({best}) | {verdict} |")
    apart = [row for row, fit in groups.get("fits", {}).items() if not fit]
    return [*lines, "", *([f"Do not fit: {', '.join(apart)}.", ""] if apart else [])] if len(lines) > 2 else []


def _costs(groups: Mapping[str, Any]) -> list[str]:
    """Memory and time of all rows, beside fine-tuning everything."""
    full = groups["full"]
    lines = ["### What it takes", "", f"Fine-tuning everything in PyTorch at batch {full['batch']} takes {format_bytes(full['bytes'])}."]
    lines += ["Peak resident memory of the whole process with its quickest step, and milliseconds a frame on a machine that was not idle.", ""]
    lines += ["| | memory | of fine-tuning, % | p50 | p95 |", "|---|---:|---:|---:|---:|"]
    for shown, cells in _rows(groups, ("default", "methods", "cotta")):
        peak = max(cell["peak_bytes"] for cell in cells.values())
        times = [float(np.median([cell[name] for cell in cells.values()])) for name in ("ms_p50", "ms_p95")]
        lines.append(f"| {shown} | {format_bytes(peak)} | {100 * peak / full['bytes']:.0f} | {times[0]:.1f} | {times[1]:.1f} |")
    return [*lines, ""]


def _apart(groups: Mapping[str, Any]) -> list[str]:
    """Frames one by one, within a quarter of the memory, and the JPEG images."""
    lines: list[str] = []
    titles = (("single", "One frame at a time"), ("quarter", "Within a quarter of the memory of fine-tuning"), ("jpeg", "JPEG images, quality 75"))
    for name, title in titles:
        rows = _rows(groups, (name,))
        refused = list(dict.fromkeys(made["refused"] for made in groups.get(name, {}).values() if "refused" in made))
        lines += [f"### {title}", "", *refused, ""] if refused else []
        lines += [f"### {title}", "", _settings(groups[name]), "", *_table(rows), ""] if rows else []
        if name == "quarter" and rows:
            held = max(cell["peak_bytes"] for row, cells in rows if GUARDED in row for cell in cells.values())
            lines += [f"The guarded default held {format_bytes(held)} at most.", ""]
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
    parser.add_argument("--seeds", type=int, default=3, help="of the guarded default")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time; times are only worth something with one")
    parser.add_argument("--only", nargs="+", help="names of benches, such as default methods")
    parser.add_argument("--streams", nargs="+", help="names of streams: several processes, each with an --output of its own, may share out the work")
    parser.add_argument("--again", action="store_true", help="also what is on the page already")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page is")
    choices = parser.parse_args(words)
    written = Page(choices.docs)
    with ThreadPoolExecutor(choices.jobs) as pool:
        for done in [pool.submit(_model, choices, model, written) for model in choices.models]:
            done.result()
    print(f"wrote {choices.docs / 'results.md'}")


def _model(choices: argparse.Namespace, model: str, written: Page) -> None:
    """All of one model that is not on the page."""
    scored, source, jpeg = prepared(choices, model)
    full = written.known().get(model, {}).get("full")
    if full is None or full["batch"] != choices.batch:
        full = full_step.measured(model, choices.batch)
        written.put(model, "full", full)
    for bench in benches(choices, full["bytes"], jpeg):
        for stream in bench.streams:
            if _made(choices, model, bench, stream, written, scored, source) and bench.name == "methods":
                written.put(model, "fits", fitting(Path(choices.output) / model / "bundles", choices.batch, full["bytes"] // 4))
    for stream in KEPT:
        best = best_other(written.known()[model], stream)
        if best is not None:
            arguments = ("--seeds", str(choices.seeds), *_frames(choices))
            _made(choices, model, Bench("rivals", best, (stream,), arguments), stream, written, scored, source)


def _made(choices: argparse.Namespace, model: str, bench: Bench, stream: str, written: Page, scored: Path, source: Path) -> bool:
    """Runs one stream of a bench where it is asked for and not on the page; whether it was run."""
    if (choices.only and bench.name not in choices.only) or (choices.streams and stream not in choices.streams):
        return False
    asked = [bench.methods, *(Path(one).name for one in bench.arguments)]
    if not choices.again and written.has(model, bench, stream, asked):
        return False
    written.put(model, bench.name, {"arguments": asked, **run(choices, model, bench, stream, scored, source)}, stream)
    return True


if __name__ == "__main__":
    main()
