"""The options that say what a model takes and how frames become it; for every command that exports."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from edgeadapt.cli.lists import count, numbers

if TYPE_CHECKING:
    from edgeadapt.bundle import InputSpec

NAMES = ("mean", "std", "resize", "fit", "crop", "order", "raw", "hop")


def add_arguments(group: Any) -> None:
    """Options of `NAMES`, all left out by default."""
    from edgeadapt.units import parse_shape

    group.add_argument("--mean", type=numbers, metavar="R,G,B", help="mean of pixels in 0..1 that the model expects subtracted")
    group.add_argument("--std", type=numbers, metavar="R,G,B", help="deviation that it expects them divided by")
    group.add_argument("--resize", type=parse_shape, metavar="HxW", help="resize images to that size, here and on the device")
    group.add_argument("--fit", choices=("stretch", "cover"), help="how: to that very size (default), or until they cover it, and cut what is over")
    group.add_argument("--crop", action="store_true", help="cut images that are larger than the input to it, around their centre")
    group.add_argument("--order", choices=("rgb", "bgr"), help="of the model's channels (default: rgb)")
    group.add_argument("--raw", action="store_true", help="float32 frames are values as the sensor gives them: scale them by --mean and --std too")
    group.add_argument("--hop", type=count, metavar="N", help="of inputs CxL: take samples, and make a window of them every N")


def given(arguments: argparse.Namespace) -> str:
    """The first of the options that was given, as it is written; "" if none was."""
    return next((f"--{name}" for name in NAMES if getattr(arguments, name)), "")


def spec(arguments: argparse.Namespace) -> InputSpec:
    """The input that `--input` and these options say.

    Raises:
        UsageError: they do not fit each other.
    """
    from edgeadapt.exporters.data import spec_for

    chosen = {name: getattr(arguments, name) for name in NAMES if getattr(arguments, name)}
    return spec_for(arguments.input, **chosen)

