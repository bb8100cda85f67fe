"""What a model takes, and how frames of cameras and sensors become that, as a bundle says it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from edgeadapt.bundle.reading import Node

FITS = ("stretch", "cover")
ORDERS = ("rgb", "bgr")
MOST_SIDE = 2**14
"""Pixels of a side that images are resized to, at most."""
MOST_ELEMENTS = 2**31
"""Of a frame, and of a tensor of the state or of sums: more than any device has room for."""
USUAL = {"fit": FITS[0], "crop": False, "order": ORDERS[0], "raw": False, "hop": None}
"""Keys that a manifest leaves out where they are so."""


@dataclass(frozen=True)
class InputSpec:
    """One frame as the graphs take it, and how uint8 images and samples of sensors become it.

    Attributes:
        shape: float32 frame, channels first and without the batch.
        resize: (height, width) that uint8 frames are resized to, at least shape[1:]. None: they are not.
        mean, std: one number a channel as the model takes it; applied to images after division by 255, and to float32 frames if `raw` is set. None:
            not applied.
        fit: "stretch" (to `resize`) or "cover" (sides keep their ratio, the image becomes as small as covers `resize`).
        crop: whether what is larger than the input then is cut to it, around its centre. Images that come in the input's size stay as they are.
        order: of the channels that the model takes, "rgb" or "bgr"; images come as RGB.
        raw: whether float32 frames are values as the sensor gives them, which `mean` and `std` are applied to; else they are taken as they are.
        hop: of inputs [C,L], samples from the beginning of one window to that of the next, where single samples [C] come. None: only windows do.
    """

    shape: tuple[int, ...]
    resize: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    fit: str = FITS[0]
    crop: bool = False
    order: str = ORDERS[0]
    raw: bool = False
    hop: int | None = None


def plain_input(spec: InputSpec) -> dict[str, Any]:
    """As JSON values."""
    always: dict[str, Any] = {key: getattr(spec, key) for key in ("shape", "resize", "mean", "std")}
    found = {key: None if value is None else list(value) for key, value in always.items()}
    return found | {key: getattr(spec, key) for key, usual in USUAL.items() if getattr(spec, key) != usual}


def read_input(node: Node) -> InputSpec:
    """The input of a manifest.

    Raises:
        BundleError: a missing, unknown or wrongly typed key, or keys that contradict each other.
    """
    node.keys({"shape", "resize", "mean", "std"}, optional=set(USUAL))
    shape = node.child("shape").items(lambda size: size.integer(1))
    if not 1 <= len(shape) <= 4:
        raise node.child("shape").wrong("one to four sizes, channels first", f"{len(shape)}")
    if math.prod(shape) > MOST_ELEMENTS:
        raise node.child("shape").wrong(f"at most {MOST_ELEMENTS} elements", str(list(shape)))
    fit = node.child("fit").text("|".join(FITS)) if node.has("fit") else FITS[0]
    crop, raw = (node.child(key).truth() if node.has(key) else False for key in ("crop", "raw"))
    resize = node.child("resize").maybe(lambda found: found.items(lambda size: size.integer(1)))
    _check_sizes(node, shape, resize, fit, crop)
    mean, std = (node.child(key).maybe(lambda found: found.items(Node.number)) for key in ("mean", "std"))
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != shape[0]:
            raise node.child(key).wrong(f"{shape[0]} numbers, one a channel", f"{len(values)}")
    if std is not None and min(std) <= 0:
        raise node.child("std").wrong("numbers above 0", str(list(std)))
    order = node.child("order").text("|".join(ORDERS)) if node.has("order") else ORDERS[0]
    if order != ORDERS[0] and (len(shape) != 3 or shape[0] != 3):
        raise node.child("order").wrong("rgb for what is no image of three channels", order)
    hop = node.child("hop").integer(1) if node.has("hop") else None
    if hop is not None and len(shape) != 2:
        raise node.child("hop").wrong("none for what is no window [C,L]", str(hop))
    if raw and (resize is not None or crop):
        raise node.child("raw").wrong("false where images are resized or cut", "true")
    return InputSpec(shape, None if resize is None else (resize[0], resize[1]), mean, std, fit, crop, order, raw, hop)


def _check_sizes(node: Node, shape: tuple[int, ...], resize: tuple[int, ...] | None, fit: str, crop: bool) -> None:
    if crop and len(shape) != 3:
        raise node.child("crop").wrong("false for what is no image", "true")
    if fit == "cover" and not (crop and resize is not None):
        raise node.child("fit").wrong("stretch where nothing is resized and cut", fit)
    if resize is None:
        return
    if len(shape) != 3 or len(resize) != 2 or max(resize) > MOST_SIDE:
        raise node.child("resize").wrong(f"a height and a width, of an image, of at most {MOST_SIDE}", str(list(resize)))
    if resize != shape[1:] and not (crop and resize[0] >= shape[1] and resize[1] >= shape[2]):
        wanted = "at least " if crop else ""
        raise node.child("resize").wrong(f"{wanted}the frame's height and width {list(shape[1:])}", str(list(resize)))
