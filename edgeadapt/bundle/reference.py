"""What a model's own data look like to it, measured at export: what a guard on the device compares its stream with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from edgeadapt.bundle.reading import Node

FRAMES = 64
"""Of the windows that D² is told for, however many were measured."""
EPS = 1e-5
"""Added to variances where D² is measured, at export and on the device."""


@dataclass(frozen=True)
class Chance:
    """How far the channel means of a window of source frames lie from the source's, by its frames alone; see `exporters.blending` for D².

    Attributes:
        mixed: D² of a window of frames drawn at random.
        alike: D² of a window of as many frames that are predicted alike, such as of one class; at least `mixed`.
    """

    mixed: float
    alike: float


@dataclass(frozen=True)
class Reference:
    """A model on windows of its source data, normalised by the source's statistics.

    Attributes:
        window: frames that `classes` is of: 64, or all where there were fewer.
        classes: exponential of the entropy of a window's mean prediction: how many classes it is spread over.
        entropy: mean entropy of its predictions in nats.
        layers: for every normalisation layer whose statistics follow the stream.
    """

    window: int
    classes: float
    entropy: float
    layers: dict[str, Chance]


def read_reference(node: Node) -> Reference:
    """A reference as JSON values, checked.

    Raises:
        BundleError: a key is missing, unknown, wrongly typed or out of range.
    """
    node.keys({field.name for field in dataclasses.fields(Reference)})
    numbers = {key: _least(node.child(key), least) for key, least in (("classes", 1.0), ("entropy", 0.0))}
    return Reference(node.child("window").integer(1), layers=node.child("layers").mapping(_chance, r"[!-~]{1,256}"), **numbers)


def _chance(node: Node) -> Chance:
    node.keys({"mixed", "alike"})
    mixed = _least(node.child("mixed"), 0.0)
    return Chance(mixed, _least(node.child("alike"), mixed))


def _least(node: Node, least: float) -> float:
    found = node.number()
    if found < least:
        raise node.wrong(f"a number of at least {least:g}", f"{found:g}")
    return found
