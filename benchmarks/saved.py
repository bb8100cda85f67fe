"""What a step keeps for its backward pass, by method: planned live peak of its graphs, and its time beside tent's, in turns in one process.

Weights and calibration samples are the data pack's (EDGEADAPT_DATA). Graphs are those of a bundle, from source samples to onnxruntime.

    python benchmarks/saved.py --model resnet20 --batch 64 tent surgeon surgeon:scope=full,prune=none surgeon:scope=full side exits
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._networks import CLASSES, EVERY, NETWORKS, SHAPE, data_pack
from benchmarks.cifar_stream import source_samples
from edgeadapt.exporters.beginning import started
from edgeadapt.exporters.capture import Captured, capture
from edgeadapt.exporters.compile import Compiled, PlacedWeights, compile_program
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.methods import METHODS, Method, Setup
from edgeadapt.exporters.options import Options
from edgeadapt.exporters.programs import build
from edgeadapt.exporters.schedules import Schedules
from tests.zoo.data import Pack

CALIBRATION = 8


def method_of(captured: Captured, name: str, settings: dict[str, str], batches: list[torch.Tensor]) -> Method:
    """A method over the model, calibrated."""
    method = METHODS[name](captured, Setup(CLASSES, settings=settings))
    if method.calibrates:
        method.calibrate(batches, {**method.backbone.tensors, **method.frozen()}, method.backbone.source_statistics())
    return method


def compiled_of(captured: Captured, text: str, batches: list[torch.Tensor], effort: float) -> list[Compiled]:
    """The adaptation step of "METHOD:NAME=VALUE,…", its variants last; `saved` is no setting but the option."""
    name, _, rest = text.partition(":")
    settings = dict(item.split("=") for item in rest.split(",") if item)
    saved = settings.pop("saved", None)
    options = Options.of({"method": name, "batches": (captured.batch,), "settings": settings, "saved": saved})
    program = build(started(options, method_of(captured, name, settings, batches)), "adapt", captured.batch, batches[0])
    return compile_program(program, PlacedWeights(), Schedules(effort))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="METHOD or METHOD:NAME=VALUE,…; saved=int8 among them is the option; times are beside the first's")
    parser.add_argument("--model", choices=list(NETWORKS), default="resnet20")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--effort", type=float, default=1.0, help="of the search for an order; less is quicker")
    choices = parser.parse_args()
    torch.set_num_threads(1)
    pack, count = Pack(data_pack()), choices.batch
    data = source_samples(pack, choices.model, 10 * -(-CALIBRATION * count // 10), 0)
    batches = [torch.from_numpy(data.tensor(range(k * count, (k + 1) * count))) for k in range(CALIBRATION)]
    captured = capture(EVERY[choices.model].trained(pack.folder), SHAPE, count)
    made: dict[str, Any] = {}
    for text in choices.what:
        forms = compiled_of(captured, text, batches, choices.effort)
        example = forms[0].program.example
        session = open_session(forms[0].model, forms[0].graph.constants, 1)
        feeds = {entry.name: example[entry.name].numpy() for entry in session.get_inputs()}
        peaks = {form.variant or "quickest": form.peak / 2**20 for form in forms}
        made[text] = (session, feeds, peaks, [])
        print(f"{text:36}" + "  ".join(f"{name} {peak:.1f} MiB" for name, peak in peaks.items()), flush=True)
    for turn in range(choices.turns + 1):
        for session, feeds, _, seconds in made.values():
            start = time.perf_counter()
            session.run(None, feeds)
            if turn:
                seconds.append(time.perf_counter() - start)
    first = made[choices.what[0]][3]
    print(f"\n{choices.model}, batch {count}, medians of {choices.turns} turns, one thread")
    for text, (_, _, _, seconds) in made.items():
        ratio = statistics.median(one / other for one, other in zip(seconds, first, strict=True))
        print(f"{text:36}{1000 * statistics.median(seconds):8.0f} ms  {ratio:.2f} of {choices.what[0]}")


if __name__ == "__main__":
    main()
