"""Prediction, a frame at a time or in small batches: the bundle on onnxruntime beside PyTorch eager, in processes of their own that take turns.

`source` is the model as it was exported, in eval mode. The other methods predict with the adapted network whose statistics follow each batch.
Without the data pack's weights: random ones change neither time nor memory. Peak memory is VmHWM of each process, with and without what the
libraries alone need.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._pairs import TORCH, make_bundle, measure, plain_side, settings_of, show, turns

HERE = Path(__file__).resolve()
FRAMES = 64


def torch_child(setting: dict[str, Any]) -> None:
    """PyTorch eager, without anything of edgeadapt in the process."""
    import torch

    from benchmarks._networks import NETWORKS

    torch.set_num_threads(setting["threads"])
    model, batch = NETWORKS[setting["model"]].random(), setting["batch"]
    if setting["method"] == "source":
        predict, now = model.to(memory_format=torch.channels_last) if "channels-last" in setting["kind"] else model, dict
    else:
        plain = plain_side(model, setting, "predict")
        predict, now = plain.predict, lambda: {name: value.numpy() for name, value in plain.state().items()}

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.concatenate([predict(part).numpy() for part in torch.from_numpy(x).split(batch)])

    turns(run, now, FRAMES)


def bundle_child(setting: dict[str, Any]) -> None:
    """The bundle, without torch in the process."""
    from edgeadapt.runtime.adapter import Adapter

    adapter, batch = Adapter.open(setting["bundle"], threads=setting["threads"]), setting["batch"]
    turns(lambda x: np.concatenate([adapter.predict(x[k : k + batch]) for k in range(0, len(x), batch)]), lambda: dict(adapter.state), FRAMES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn40-2", choices=("resnet20", "resnet56", "wrn40-2"))
    parser.add_argument("--methods", nargs="+", default=["source", "ecotta"], choices=("source", "norm", "tent", "ecotta", "side"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--parts", type=int, default=4, help="parts of the model, each with a meta network")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--torch", nargs="+", default=["plain", "lean-channels-last"], choices=TORCH, help="ways to write the PyTorch side")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    choices = parser.parse_args()
    if choices.setting:
        setting = json.loads(choices.setting)
        (bundle_child if setting["kind"] == "bundle" else torch_child)(setting)
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for method in choices.methods:
            bundle, state = make_bundle(folder, choices.model, method, choices.batch, choices.parts)
            for batch in choices.batch:
                for threads in choices.threads:
                    setting = settings_of(bundle, state, choices.model, method, batch, threads)
                    found = measure(HERE, folder, setting, choices.torch, choices.rounds)
                    title = f"{choices.model}, {method}, prediction at batch {batch}"
                    results.append({"title": title, "batch": batch, "per": FRAMES, "unit": "ms a frame", **found})
                    show(results[-1])
    if choices.json:
        choices.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
