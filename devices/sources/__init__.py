"""Where frames come from: `open_source` finds the one that a stream's name means."""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

from edgeadapt.bundle import Manifest
from edgeadapt.devices.sources.base import Frame, Source, Wanted
from edgeadapt.errors import SourceError, UsageError

__all__ = ["STDIN_FORMATS", "Frame", "Source", "Wanted", "open_source"]

STDIN_FORMATS = ("paths", "npy", "csv", "jsonl")


def open_source(stream: str, manifest: Manifest, stdin_format: str = "paths", stdin: BinaryIO | None = None) -> Source:
    """The source of that name.

    Args:
        stream: a folder of images, an .npz or .npy file, or "-" for standard input.
        manifest: of the bundle that will take the frames.
        stdin_format: "paths" (a line an image file), "npy" (arrays, one after another), "csv" or "jsonl" (a line a frame or a sample, in numbers).
        stdin: instead of the process's own.

    Raises:
        SourceError: there is no such source, or it cannot be opened.
        InputError: its frames are not what the bundle takes.
        UsageError: an unknown format.
    """
    wanted = Wanted(manifest.input, manifest.task)
    if stdin_format not in STDIN_FORMATS:
        raise UsageError(f"{stdin_format!r} is no format of standard input", f"use one of {', '.join(STDIN_FORMATS)}")
    if stream == "-":
        from edgeadapt.devices.sources.stdin import Arrays, Numbers, Paths

        file = stdin or sys.stdin.buffer
        if stdin_format in ("csv", "jsonl"):
            return Numbers(file, wanted, stdin_format)
        return Arrays(file, wanted) if stdin_format == "npy" else Paths(file, wanted)
    if os.path.isdir(stream):
        from edgeadapt.devices.sources.folder import Folder

        return Folder(stream, wanted)
    if stream.endswith((".npz", ".npy")):
        from edgeadapt.devices.sources.arrays import Archive

        return Archive(stream, wanted)
    if os.path.exists(stream):
        raise SourceError(f"{stream} is no source of frames", "give a folder of images, an .npz or .npy file, or - for standard input")
    raise SourceError(f"{stream} does not exist", "give a folder of images, an .npz or .npy file, or - for standard input")
