"""One adaptation step: the bundle on onnxruntime beside PyTorch eager, in processes of their own that take turns.

Both run the same algorithm from the same tensors on the same batches: one forward pass, gradients with the statistics taken as constants, one
step of the optimiser. What they compute is compared at the end, so that a fast wrong step shows. Weights are random: that changes neither time
nor memory. Peak memory is VmHWM of each process, with and without what the libraries alone need.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._pairs import FORMS, TORCH, batches, make_bundle, measure, plain_side, settings_of, show, turns

HERE = Path(__file__).resolve()


def torch_child(setting: dict[str, Any]) -> None:
    """PyTorch eager, without anything of edgeadapt in the process."""
    import torch

    from benchmarks._networks import EVERY

    torch.set_num_threads(setting["threads"])
    options = {"single": True} if setting["method"] == "ecotta" else {}
    plain = plain_side(EVERY[setting["model"]].random(), setting, "adapt", **options)
    now = lambda: {name: value.numpy() for name, value in plain.state().items()}  # noqa: E731
    turns(lambda x: plain.adapt(torch.from_numpy(x)).numpy(), now, setting["batch"], setting["shape"])


def bundle_child(setting: dict[str, Any]) -> None:
    """The bundle, without torch in the process."""
    from edgeadapt.runtime.adapter import Adapter

    batches(4, setting["batch"], 0, tuple(setting["shape"]))  # before the bundle is opened: what a program takes later is not planned for
    budget = setting.get("budget")
    chosen = {"roles": ("adapt",), "batches": [setting["batch"]]} if budget else {}
    adapter = Adapter.open(setting["bundle"], budget, setting["threads"], **chosen)
    turns(adapter.adapt, lambda: dict(adapter.state), setting["batch"], setting["shape"])


def prepare(bundle: Path, threads: int, wanted: bool) -> None:
    """Have the bundle's graphs optimised for this machine, in child processes and a cache beside the bundle."""
    if wanted:
        os.environ["EDGEADAPT_CACHE"] = str(bundle.parent / "cache")
        subprocess.run([sys.executable, "-m", "edgeadapt", "prepare", str(bundle), "--threads", str(threads)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn40-2", choices=("resnet20", "resnet56", "wrn40-2", "resnet50"))
    parser.add_argument("--method", default="ecotta", choices=("tent", "ecotta", "side"))
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--parts", type=int, default=4, help="parts of the model, each with a meta network")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--torch", nargs="+", default=["plain", "lean-channels-last"], choices=TORCH, help="ways to write the PyTorch side")
    parser.add_argument("--form", nargs="+", default=[], choices=[form for form in FORMS if form], help="also bundles in these forms")
    parser.add_argument("--budget", nargs="+", default=[], help="also run the bundles inside these budgets, such as 170MB")
    parser.add_argument("--folder", type=Path, help="keep bundles and what is prepared of them here, and use those that are here")
    parser.add_argument("--prepare", action="store_true", help="prepare the bundle for this machine before")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    choices = parser.parse_args()
    if choices.setting:
        setting = json.loads(choices.setting)
        (bundle_child if setting["kind"] == "bundle" else torch_child)(setting)
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = choices.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for batch in choices.batch:
            bundle, state = make_bundle(folder, choices.model, choices.method, [batch], choices.parts)
            others = {form: make_bundle(folder, choices.model, choices.method, [batch], choices.parts, form)[0] for form in choices.form}
            for threads in choices.threads:
                setting = settings_of(bundle, state, choices.model, choices.method, batch, threads)
                for path in (bundle, *others.values()):
                    prepare(path, threads, choices.prepare)
                found = measure(HERE, folder, setting, choices.torch, choices.rounds, choices.budget, others)
                parts = f", {choices.parts} parts" if choices.method == "ecotta" else ""
                title = f"{choices.model}, {choices.method}{parts}, a step at batch {batch}"
                results.append({"title": title, "batch": batch, "per": 1, "unit": "ms a step", **found})
                show(results[-1])
    if choices.json:
        choices.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
