"""The drift of gas sensors over 36 months: a small 1-D network trained on the first batch, and served through the later ones in the order of time.

Needs the data pack (EDGEADAPT_DATA). A method a row; each starts from its bundle and goes through batches 2 to 6, 8 and 9 without a reset and without
labels. Within a batch frames come as they are recorded, which is by gas for long stretches, or shuffled. Error is of the prediction on arrival.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._networks import data_pack
from edgeadapt.devices.sources import Frame
from edgeadapt.errors import ExportError
from edgeadapt.exporters.export import export
from edgeadapt.exporters.methods import METHODS
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.guard import Guard
from edgeadapt.runtime.stream import Stream

LATER = (2, 3, 4, 5, 6, 8, 9)
SHAPE = (8, 16)
"""Eight features of each of sixteen sensors, which are the positions."""
DEFAULT = "default"
ROWS = {"live": "", "anchored": " anchored"}


def net(classes: int = 6, width: int = 32) -> nn.Module:
    """Two convolutions over the sensors, batch normalisation, a linear classifier."""
    return nn.Sequential(
        nn.Conv1d(8, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Conv1d(width, 2 * width, 3, padding=1), nn.BatchNorm1d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(8 * width, classes),
    )  # fmt: skip


def measured(folder: Path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Frames (n, 8, 16), float32, and gases 0..5 of each batch; features as signed logarithms, standardised on the first batch."""
    with np.load(folder / "sensors" / "gas_drift_8batches.npz") as archive:
        raw = {number: (archive[f"x{number}"], archive[f"y{number}"]) for number in (1, *LATER)}
    logs = {number: np.sign(x) * np.log1p(np.abs(x)) for number, (x, _) in raw.items()}
    mean, deviation = logs[1].mean(0), logs[1].std(0).clip(1e-3)
    return {
        number: (((logs[number] - mean) / deviation).reshape(-1, 16, 8).transpose(0, 2, 1).astype(np.float32).copy(), y.astype(np.int64) - 1)
        for number, (_, y) in raw.items()
    }


def trained(x: np.ndarray, y: np.ndarray, seed: int, epochs: int = 150) -> nn.Module:
    """The network after AdamW on these frames, with a little noise on them."""
    torch.manual_seed(seed)
    model, random = net().train(), np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    for _ in range(epochs):
        order = random.permutation(len(x))
        for start in range(0, len(order) - 31, 32):
            rows = order[start : start + 32]
            frames = torch.from_numpy(x[rows] + 0.1 * random.standard_normal(x[rows].shape).astype(np.float32))
            optimiser.zero_grad()
            F.cross_entropy(model(frames), torch.from_numpy(y[rows])).backward()
            optimiser.step()
    return model.eval()


def served(path: Path, data: dict[int, tuple[np.ndarray, np.ndarray]], window: int, seed: int | None, guard: bool) -> dict[int, np.ndarray]:
    """Which frames of each later batch were wrong; a seed shuffles them within their batch."""
    with Adapter.open(path, prepared=False) as adapter:
        stream, found = Stream(adapter, window=window, guard=Guard(adapter) if guard else None), {}
        for number in LATER:
            x, y = data[number]
            order = np.arange(len(x)) if seed is None else np.random.default_rng(seed).permutation(len(x))
            answers = [one for some in stream.run(Frame(k, x[k]) for k in order) for one in some]
            found[number] = np.array([int(one.logits.argmax()) != y[k] for one, k in zip(answers, order) if one.logits is not None])
    return found


def bundles(model: nn.Module, data: tuple[np.ndarray, np.ndarray], folder: Path, methods: list[str], window: int, seed: int) -> dict[str, Path]:
    """A bundle for each method and kind of statistics that the model fits; "default" is an export that names no method, its scalars searched for."""
    found = {}
    for method in methods:
        if method == DEFAULT:
            found[method] = folder / f"{method}.edgeadapt"
            export(model, found[method], shape=SHAPE, data=data, batches=(window,), seed=seed, allow_drop=True)
            continue
        for kind, mark in ROWS.items():
            if kind not in METHODS[method].modes and not (kind == "live" and METHODS[method].modes):
                continue
            choices: dict[str, Any] = {"statistics": kind} if kind == "anchored" else {}
            if kind == "anchored" and METHODS[method].statistics != "live":
                continue
            path = folder / f"{method}{mark.replace(' ', '-')}.edgeadapt"
            try:
                export(model, path, shape=SHAPE, data=data, method=method, batches=(window,), seed=seed, allow_drop=True, **choices)
            except ExportError as reason:
                print(f"{method}{mark}: {reason.message}", file=sys.stderr)
                continue
            found[f"{method}{mark}"] = path
    return found


def main() -> None:
    """Prints a table; with --json also the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join([DEFAULT, *(name for name in METHODS if name != "cotta")]))
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3, help="trained networks, and orders of the shuffled frames")
    parser.add_argument("--guard", action="store_true", help="also rows that a guard watches")
    parser.add_argument("--json", metavar="FILE")
    choices = parser.parse_args()
    torch.set_num_threads(1)
    data = measured(data_pack())
    x, y = data[1]
    table: dict[str, dict[str, list[dict[int, np.ndarray]]]] = {}
    for seed in range(choices.seeds):
        order = np.random.default_rng(seed).permutation(len(x))
        train, rest = order[: int(0.8 * len(x))], order[int(0.8 * len(x)) :]
        model = trained(x[train], y[train], seed)
        with torch.no_grad():
            right = float((model(torch.from_numpy(x[rest])).argmax(1).numpy() == y[rest]).mean())
        print(f"seed {seed}: {100 * right:.1f} % of the held-out fifth of batch 1 is right", flush=True)
        with TemporaryDirectory() as folder:
            made = bundles(model, (x[train], y[train]), Path(folder), choices.methods.split(","), choices.window, seed)
            for row, path in made.items():
                for name, shuffled in (("recorded", None), ("shuffled", seed)):
                    for end in ("", ", guarded") if choices.guard else ("",):
                        wrong = served(path, data, choices.window, shuffled, bool(end))
                        table.setdefault(row + end, {}).setdefault(name, []).append(wrong)
    report(table, choices.json)


def report(table: dict[str, dict[str, list[dict[int, np.ndarray]]]], path: str | None) -> None:
    """Error in percent by batch and over all frames, the mean of seeds."""
    found: dict[str, Any] = {}
    for order in ("recorded", "shuffled"):
        print(f"\n{order:27}" + "".join(f"{f'batch {number}':>9}" for number in LATER) + f"{'all':>9}")
        for row, runs in table.items():
            errors = {number: 100 * float(np.mean([run[number].mean() for run in runs[order]])) for number in LATER}
            whole = [100 * float(np.concatenate(list(run.values())).mean()) for run in runs[order]]
            found.setdefault(row, {})[order] = {"batches": errors, "all": whole}
            print(f"{row:27}" + "".join(f"{errors[number]:9.1f}" for number in LATER) + f"{np.mean(whole):9.1f} ±{np.std(whole):.1f}")
    if path:
        Path(path).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
