"""The streams of the bench by their names: which frames come when, and whose errors count.

The orders and corruptions of continual, gradual, mixed, sorted and dirichlet are those of `edgeadapt.corruptions`, frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from edgeadapt.bench.frames import CLEAN, NOISE, Samples, Stage, Stream
from edgeadapt.corruptions.catalogue import check, whole
from edgeadapt.corruptions.parameters import CORRUPTIONS
from edgeadapt.corruptions.streams import Indices, draws, grouped
from edgeadapt.errors import InputError, UsageError

AFTER = "clean after shift"
"""The domain of clean frames that come after everything else of a stream."""

OWN = "own"
PILLOWS = ("pixelate", "jpeg_compression")
"""Corruptions that Pillow makes."""
GRADUAL = (1, 2, 3, 4, 5, 4, 3, 2, 1)
DELTA = 0.1
"""Concentration of the Dirichlet draw that correlates labels in time (Yuan et al. 2023)."""

_AGAIN, _CLASS, _FRAME = 3, 4, 5  # what random numbers are for, beyond what `corruptions.streams.draws` names


@dataclass(frozen=True)
class Sizes:
    """How long streams are and what is in them.

    Attributes:
        frames: of each corruption and of each clean stretch; None takes every image once. More than there are: images come again, corrupted anew.
        step: of each of the nine steps of gradual; None takes a fifth of `frames`.
        visit: of each corruption in each round of recurring; None takes a tenth of `frames`.
        bad: of one class, of one frame repeated, or of noise; None takes a quarter of `frames`.
        rounds: of recurring.
        severity: 1..5, of all but gradual.
        corruptions: in the order of their visits.
        scale: see `edgeadapt.corruptions.corrupt`.
    """

    frames: int | None = None
    step: int | None = None
    visit: int | None = None
    bad: int | None = None
    rounds: int = 10
    severity: int = 5
    corruptions: tuple[str, ...] = CORRUPTIONS
    scale: str | None = None

    def whole(self, images: int) -> Sizes:
        """With numbers in place of None, for that many images.

        Raises:
            UsageError: a number that cannot be, or an unknown corruption.
        """
        frames = images if self.frames is None else self.frames
        parts = {"step": 5, "visit": 10, "bad": 4}
        given = {"frames": frames, "rounds": self.rounds}
        given |= {name: max(1, frames // part) if whole(frames, 1) else 1 for name, part in parts.items()}
        given |= {name: value for name in parts if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            if not whole(value, 1):
                raise UsageError(f"{name} is a whole number of 1 or more, not {value!r}", f"leave {name} out for the usual number")
        if not self.corruptions:
            raise UsageError("a bench needs at least one corruption", "leave them out for the fifteen standard ones")
        for name in self.corruptions:
            check(name, self.severity, 0, self.scale)
        if not self.severity:
            raise UsageError("severity is a whole number from 1 (mild) to 5 (severe), not 0", "the stream clean shows images as they are")
        return Sizes(**given, severity=self.severity, corruptions=tuple(self.corruptions), scale=self.scale)


def build(name: str, samples: Samples, sizes: Sizes | None = None, seed: int = 0) -> Stream:
    """A stream by its name.

    Args:
        name: one of `NAMES`.
        samples: clean frames and their labels; only images can be corrupted.
        sizes: how long; None for the usual.
        seed: orders, random corruptions, which class or frame; 0 or more.

    Raises:
        UsageError: an unknown name, a size or seed that cannot be, a stream of corruptions from frames that are no images, or one that needs Pillow.
        InputError: the labels do not suit the stream.
    """
    if name not in _STREAMS:
        raise UsageError(f"unknown stream {name!r}", f"use some of {', '.join(NAMES)}")
    if not whole(seed, 0):
        raise UsageError(f"seed is a whole number of 0 or more, not {seed!r}", "use seed=0")
    if name in CORRUPTED and not samples.images:
        rest = ", ".join(other for other in NAMES if other not in CORRUPTED)
        raise UsageError(
            f"the stream {name} corrupts images, and {samples.name} holds {samples.x.dtype} frames", f"use {rest}, or recordings of your own"
        )
    given = (sizes or Sizes()).whole(len(samples.x))
    if name in CORRUPTED and (drawn := [one for one in given.corruptions if one in PILLOWS]) and find_spec("PIL") is None:
        raise UsageError(
            f"the stream {name} has {' and '.join(drawn)} in it, made by Pillow, which is not installed",
            "pip install edgeadapt[images], or leave them out with --corruptions",
        )
    made = _STREAMS[name](samples, given, int(seed))
    return Stream(name, [samples], made.stages, made.settings, int(seed), made.order)


def own(recordings: Sequence[Samples]) -> Stream:
    """The user's own recordings one after another, each a domain, as they come. Frames whose label is negative are served and not scored.

    Raises:
        InputError: there are none, they or their labels differ in type or shape, or none has a label.
    """
    if not recordings:
        raise InputError("there are no recordings", "give at least one")
    recordings = _labelled_alike(recordings)
    first = recordings[0]
    for other in recordings[1:]:
        if other.y.shape[1:] != first.y.shape[1:]:
            each, alike = (f"labels of shape {one.y.shape[1:]}" if one.y.ndim > 1 else "one label a frame" for one in (other, first))
            raise InputError(f"{other.name} holds {each}, {first.name} {alike}", "give all recordings labels of one shape")
        if (other.x.dtype, other.x.shape[1:]) != (first.x.dtype, first.x.shape[1:]):
            raise InputError(
                f"{other.name} holds {other.x.dtype} frames of {other.x.shape[1:]}, {first.name} {first.x.dtype} of {first.x.shape[1:]}",
                "give all recordings in one type and shape",
            )
    stages, begin, names = [], 0, _distinct([one.name for one in recordings])
    for name, one in zip(names, recordings):
        known = one.y.reshape(len(one.y), -1).max(1) >= 0
        edges = np.flatnonzero(np.diff(known)) + 1
        for part in np.split(np.arange(len(one.y)), edges):
            stages.append(Stage(name, (begin + part).astype(np.int64), scored=bool(known[part[0]])))
        begin += len(one.y)
    stream = Stream(OWN, recordings, stages, {"recordings": names}, 0)
    if not stream.scored.any():
        raise InputError("none of the recordings has labels, so there is nothing to score", "save labels as y beside x")
    return stream


def _labelled_alike(recordings: Sequence[Samples]) -> list[Samples]:
    """With labels of no class in the shape of the others' where a recording has none."""
    known = [(one.y >= 0).any() for one in recordings]
    shape = next((one.y.shape[1:] for one, any_known in zip(recordings, known) if any_known), ())
    blank = np.full((), -1)  # broadcast, it takes no memory
    return [one if has else replace(one, y=np.broadcast_to(blank, (len(one.x), *shape))) for one, has in zip(recordings, known)]


@dataclass(frozen=True)
class _Plan:
    stages: list[Stage]
    settings: dict[str, Any]
    order: Indices | None = None


def _distinct(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        number = 1 + sum(other == name for other in names[: len(found)])
        found.append(name if number == 1 else f"{name} ({number})")
    return found


def _shuffled(images: int, frames: int, seed: int, stage: int) -> Indices:
    """`frames` of the images in random order; each comes again only when all have come."""
    passes = [draws(seed, stage, *((_AGAIN, number) if number else ())).permutation(images) for number in range(-(-frames // images))]
    return (np.concatenate([order + number * images for number, order in enumerate(passes)])[:frames]).astype(np.int64)


def _settings(sizes: Sizes, *names: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(sizes, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _visits(samples: Samples, sizes: Sizes, seed: int, frames: int, number: int = 0) -> list[Stage]:
    return [
        Stage(name, _shuffled(len(samples.x), frames, seed, stage), name, sizes.severity, seed, round=number)
        for stage, name in enumerate(sizes.corruptions)
    ]


_CORRUPTED = ("frames", "severity", "corruptions", "scale")


def _continual(samples: Samples, sizes: Sizes, seed: int) -> _Plan:
    return _Plan(_visits(samples, sizes, seed, sizes.frames or 1), _settings(sizes, *_CORRUPTED))


def _gradual(samples: Samples, sizes: Sizes, seed: int) -> _Plan:
    steps = [(name, severity) for name in sizes.corruptions for severity in GRADUAL]
    stages = [
        Stage(name, _shuffled(len(samples.x), sizes.step or 1, seed, number), name, severity, seed) for number, (name, severity) in enumerate(steps)
    ]
    return _Plan(stages, _settings(sizes, "step", "corruptions", "scale"))


def _recurring(samples: Samples, sizes: Sizes, seed: int) -> _Plan:
    rounds = range(sizes.rounds)  # a seed of its own for each round of each stream
    stages = [stage for r in rounds for stage in _visits(samples, sizes, seed * sizes.rounds + r, sizes.visit or 1, r)]
    return _Plan(stages, _settings(sizes, "visit", "rounds", *_CORRUPTED[1:]))


def _mixed(samples: Samples, sizes: Sizes, seed: int) -> _Plan:
    plan = _continual(samples, sizes, seed)
    order = draws(seed, len(plan.stages), 2).permutation(sum(len(stage.draw) for stage in plan.stages))
    return _Plan(plan.stages, plan.settings, order.astype(np.int64))


def _correlated(samples: Samples, sizes: Sizes, seed: int, delta: float | None) -> _Plan:
    _one_label(samples, "a stream whose labels are correlated")
    plan = _continual(samples, sizes, seed)
    stages = []
    for number, stage in enumerate(plan.stages):
        order = grouped(samples.y[stage.draw % len(samples.x)], seed, number, delta)
        stages.append(Stage(stage.domain, stage.draw[order], stage.corruption, stage.severity, seed))
    return _Plan(stages, plan.settings | ({} if delta is None else {"delta": delta}))


def _forgetting(samples: Samples, sizes: Sizes, seed: int) -> _Plan:
    plan = _continual(samples, sizes, seed)
    clean = _shuffled(len(samples.x), sizes.frames or 1, seed, len(plan.stages))
    return _Plan([Stage(CLEAN, clean), *plan.stages, Stage(AFTER, clean)], plan.settings)


def _clean(samples: Samples, sizes: Sizes, seed: int) -> _Plan:
    return _Plan([Stage(CLEAN, _shuffled(len(samples.x), sizes.frames or 1, seed, 0))], _settings(sizes, "frames"))


def _single(samples: Samples, sizes: Sizes, seed: int) -> _Plan:
    _one_label(samples, "a stream of one class")
    known = samples.y[samples.y >= 0]
    if not len(known):
        raise InputError(f"{samples.name} has no labels", "save labels as y beside x")
    chosen = draws(seed, 0, _CLASS).choice(np.unique(known))
    members = np.flatnonzero(samples.y == chosen)
    order = members[_shuffled(len(members), sizes.bad or 1, seed, 1) % len(members)].astype(np.int64)
    after = _clean(samples, sizes, seed).stages[0].draw
    return _Plan([Stage("one class", order), Stage(AFTER, after)], _settings(sizes, "frames", "bad"))


def _repeated(samples: Samples, sizes: Sizes, seed: int) -> _Plan:
    chosen = int(draws(seed, 0, _FRAME).integers(len(samples.x)))
    after = _clean(samples, sizes, seed).stages[0].draw
    frames = np.full(sizes.bad or 1, chosen, np.int64)
    return _Plan([Stage("one frame", frames, scored=False), Stage(AFTER, after)], _settings(sizes, "frames", "bad"))


def _noisy(samples: Samples, sizes: Sizes, seed: int) -> _Plan:
    after = _clean(samples, sizes, seed).stages[0].draw
    frames = np.zeros(sizes.bad or 1, np.int64)
    return _Plan([Stage(NOISE, frames, NOISE, 0, seed, scored=False), Stage(AFTER, after)], _settings(sizes, "frames", "bad"))


def _one_label(samples: Samples, what: str) -> None:
    if samples.y.ndim != 1:
        raise InputError(f"{what} needs one label a frame, and {samples.name} has labels of shape {samples.y.shape}", "leave the stream out")


_STREAMS: dict[str, Callable[[Samples, Sizes, int], _Plan]] = {
    "continual": _continual,
    "gradual": _gradual,
    "recurring": _recurring,
    "mixed": _mixed,
    "sorted": lambda samples, sizes, seed: _correlated(samples, sizes, seed, None),
    "dirichlet": lambda samples, sizes, seed: _correlated(samples, sizes, seed, DELTA),
    "forgetting": _forgetting,
    "single": _single,
    "repeated": _repeated,
    "noise": _noisy,
    "clean": _clean,
}
NAMES = tuple(_STREAMS)
"""The streams that `build` makes."""

CORRUPTED = NAMES[:7]
"""Those of them that corrupt images."""
