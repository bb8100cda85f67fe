"""What fine-tuning a whole network in PyTorch takes: peak resident memory of a process that does a few steps, and of the libraries before them.

    ./dev bench full_step --model wrn40-2 --batch 64

All parameters learn, by SGD with momentum from labels, and batch normalisation from its batches: what "full fine-tuning" is where its memory is a
yardstick. Weights are random: that does not change memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._turns import peak_bytes

STEPS = 4


def measured(model: str, batch: int) -> dict[str, Any]:
    """In a process of its own: `bytes` resident at the peak, and `before`, with the libraries and the network loaded.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--model", model, "--batch", str(batch), "--child"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"fine-tuning {model} ended with {done.returncode}")
    return json.loads(done.stdout)


def child(model: str, batch: int) -> None:
    """A few steps, and what they took as one JSON line."""
    import torch

    from benchmarks._networks import CLASSES, EVERY

    torch.set_num_threads(1)
    network = EVERY[model].random().train()
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    before = peak_bytes()
    for step in range(STEPS):
        torch.manual_seed(step)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(torch.randn(batch, *EVERY[model].shape)), torch.randint(CLASSES, (batch,))).backward()
        optimiser.step()
    print(json.dumps({"model": model, "batch": batch, "bytes": peak_bytes(), "before": before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn40-2", choices=("resnet20", "resnet56", "wrn40-2", "resnet50"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    choices = parser.parse_args()
    if choices.child:
        child(choices.model, choices.batch)
        return
    found = measured(choices.model, choices.batch)
    peak, before = found["bytes"] / 2**20, found["before"] / 2**20
    print(f"{choices.model}, batch {choices.batch}: {peak:.0f} MiB at the peak, {before:.0f} of them before the first step")


if __name__ == "__main__":
    main()
