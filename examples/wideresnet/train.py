r"""WideResNet-40-2 trained with AugMix and its consistency loss (Hendrycks et al., ICLR 2020): a network to measure adaptation on.

Such a network is robust by training, so what adaptation adds on top is harder to come by than with an ordinary one. In this folder:

    pip install "edgeadapt[export]"
    python train.py --data train.npz -o wrn40_2.safetensors            # x: uint8 N x 32 x 32 x 3, y: classes 0, 1, …
    edgeadapt export wideresnet.py:wrn40_2 --weights wrn40_2.safetensors --input 3x32x32 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 \
        --data train.npz -o wrn40_2.edgeadapt

Without --data the images are those of the data pack that EDGEADAPT_DATA names: 20 000 of CIFAR-10's training images, and 2 000 others to measure
accuracy on. The factory `wrn40_2` has 10 classes; for another number write one of your own that returns WideResNet(40, 2, classes).

A training that ends early, for whatever reason, goes on when the same command is given again, from a checkpoint beside the output that is written
once a minute and after every epoch. On the CPU of the same machine, with as many threads, it then gives the same weights, to the last bit, as
without the interruption; --limit-minutes stops it by itself. A checkpoint of other settings or images is refused. When all is done, it can be
deleted.

One step of 128 images (384 views) takes 2.9 GB and about 5.5 s on two cores in float32; with --precision bfloat16, where the processor computes in
it, 2.1 GB and 2.3 s. Augmenting takes 0.2 s more. A GPU is used where there is one, and some processes then augment ahead of it: an H100 takes
26 ms a step in either precision, and 5 s for an epoch of 20 000 images. PyTorch lets it compute float32 convolutions in TF32.

| file | |
|---|---|
| `train.py` | the command |
| `training.py` | loss, steps, epochs |
| `augmix.py`, `prefetch.py` | augmentation, and processes that do it ahead |
| `wideresnet.py` | the network |
| `images.py`, `checkpoint.py` | what is read, what is saved |
"""

from __future__ import annotations

# What takes long to import is imported by `main`: the processes that augment import this file as well.
import argparse
import math
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt.errors import EdgeAdaptError, UsageError

if TYPE_CHECKING:
    import torch

NEEDED = {"torch": "PyTorch", "safetensors": "safetensors", "PIL": "Pillow"}
SUFFIX = ".safetensors"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", metavar="DATA", help="an .npz archive with x and y, or a folder of images for each class; default: the data pack")
    made.add_argument("--holdout", type=float, default=0.1, metavar="SHARE", help="share of --data that accuracy is measured on (default: 0.1)")
    made.add_argument("-o", "--output", type=Path, default=Path("wrn40_2.safetensors"), help="the weights to write (default: wrn40_2.safetensors)")
    made.add_argument("--epochs", type=_count, default=100, help="default: 100")
    made.add_argument("--batch", type=_count, default=128, help="images a step (default: 128)")
    made.add_argument("--rate", type=float, default=0.1, help="learning rate at the start (default: 0.1)")
    made.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    made.add_argument("--depth", type=_count, default=40, help="layers of the network, 6n+4 (default: 40)")
    made.add_argument("--widen", type=_count, default=2, help="how many times wider than a plain residual network (default: 2)")
    made.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of convolutions (default: float32)")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU where there is one")
    made.add_argument("--threads", type=_count, metavar="N", help="torch's threads (default: all)")
    made.add_argument("--workers", type=int, metavar="N", help="processes that augment ahead (default: none on the CPU, up to 8 beside a GPU)")
    made.add_argument("--save-seconds", type=float, default=60.0, metavar="S", help="time between checkpoints; 0: after every step (default: 60)")
    made.add_argument("--limit-minutes", type=float, default=math.inf, metavar="M", help="stop after this time, with a checkpoint")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        its exit code: 0, also when --limit-minutes ended it; that of an EdgeAdaptError; 130 when interrupted.
    """
    try:
        return _train(parser().parse_args(arguments))
    except EdgeAdaptError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace) -> int:
    _check(options)
    missing = [name for module, name in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise UsageError(f"training needs {', '.join(missing)}, not installed here", 'pip install "edgeadapt[export]"')
    import checkpoint
    import torch
    from images import find, identity
    from training import Pace, Settings, Trainer, run

    from edgeadapt.progress import Bars

    if options.threads:
        torch.set_num_threads(options.threads)
    device = _device(options.device)
    data, held = find(options.data, options.holdout, options.seed)
    assert data.y is not None  # find gives no others
    same = {name: getattr(options, name) for name in ("depth", "widen", "epochs", "batch", "rate", "seed", "precision")}
    trainer = Trainer(Settings(classes=int(data.y.max()) + 1, images=identity(data), **same), data, device)
    output: Path = options.output
    path = output.with_suffix(f".checkpoint{SUFFIX}")
    checkpoint.remove_leftovers(path)
    _say(f"{data.summary()}; {len(held):,} held out; {trainer.machine()}")
    if path.exists():
        before = trainer.read(path)
        _say(f"going on from {path}: {trainer.epoch} of {options.epochs} epochs and {trainer.step} steps done")
        if before != trainer.machine():
            _say(f"note: it was written with {before}; the weights will not be the same to the last bit as without the interruption")
    workers = options.workers if options.workers is not None else min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    pace = Pace(workers, options.save_seconds, 60 * options.limit_minutes)
    with Bars() as progress:
        finished = run(trainer, data, held, path, pace, _say, progress)
    if not finished:
        _say(f"stopped after {options.limit_minutes:g} minutes; the same command goes on from {path}")
        return 0
    trainer.write_weights(output)
    _say(f"{output}: {sum(value.numel() for value in trainer.net.parameters()):,} parameters, held-out {trainer.history[-1][1]:.2f} %")
    return 0


def _check(options: argparse.Namespace) -> None:
    """What can be wrong about options by themselves.

    Raises:
        UsageError: one of them is.
    """
    wrong: list[tuple[bool, str, Any, str]] = [
        (not 0 < options.holdout < 1, "holdout", options.holdout, "give a share above 0 and below 1, such as 0.1"),
        (not 0 < options.rate < math.inf, "rate", options.rate, "give a number above 0, such as 0.1"),
        (not 0 <= options.seed < 2**32, "seed", options.seed, "give a whole number of 0..4294967295"),
        (options.depth < 10 or options.depth % 6 != 4, "depth", options.depth, "give 6n+4 layers: 10, 16, 22, 28, 34, 40, …"),
        (options.workers is not None and not 0 <= options.workers <= 64, "workers", options.workers, "give a whole number of 0..64"),
        (not options.save_seconds >= 0, "save-seconds", options.save_seconds, "give a number of seconds, 0 for a checkpoint after every step"),
        (not options.limit_minutes > 0, "limit-minutes", options.limit_minutes, "give a number of minutes above 0"),
        (options.output.suffix != SUFFIX, "output", options.output, f"weights are written as safetensors: let its name end with {SUFFIX}"),
        (not options.output.parent.is_dir(), "output", options.output, f"there is no folder {options.output.parent}: make it, or name another"),
    ]
    for is_wrong, name, value, hint in wrong:
        if is_wrong:
            raise UsageError(f"--{name} {value} cannot be used", hint)


def _device(name: str) -> torch.device:
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UsageError(f"--device cuda: PyTorch {torch.__version__} finds no GPU", "give --device cpu, or install PyTorch with CUDA and a driver")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
