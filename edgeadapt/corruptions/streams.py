"""Test streams as data: which frames come in which order under which corruption, one batch at a time.

The protocols are those of continual test-time adaptation: continual (Wang et al. 2022), gradual (same), recurring, mixed, and correlated in time
(Gong et al. 2022; Yuan et al. 2023). Only the batch at hand is corrupted. A frame's pixels depend on the stream's seed, the corruption, the severity
and the image's index, never on the order or the batch size, so that two streams of one seed can be compared frame by frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.corruptions.catalogue import check, check_images, corrupt_at, whole
from edgeadapt.corruptions.kernels import Bytes
from edgeadapt.corruptions.parameters import CORRUPTIONS
from edgeadapt.errors import InputError, UsageError

Indices = NDArray[np.int64]
_GRADUAL = (1, 2, 3, 4, 5, 4, 3, 2, 1)
_CLEAN = "clean"


@dataclass(frozen=True, eq=False)
class Batch:
    """Frames that arrive together.

    Attributes:
        x: uint8 (n, H, W, C); n is the stream's batch size, less at the end of a domain.
        y: the labels of these frames, in the type and trailing shape of the stream's labels.
        domain: name of the corruption, "clean", or "mixed" where frames of several come together.
        index: int64 (n,), each frame's place in the images given.
        severity: 0 for clean frames, else 1..5.
        domains: the domain of each frame; all equal `domain` but in a mixed stream.
    """

    x: Bytes
    y: NDArray[Any]
    domain: str
    index: Indices
    severity: int
    domains: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    images: Bytes
    labels: NDArray[Any]
    names: tuple[str, ...]
    batch: int
    scale: str | None
    frames: int

    def serve(self, name: str, severity: int, seed: int, order: Indices) -> Iterator[Batch]:
        for first in range(0, len(order), self.batch):
            index = order[first : first + self.batch]
            yield Batch(self.corrupted(name, severity, seed, index), self.labels[index], name, index, _level(name, severity), (name,) * len(index))

    def corrupted(self, name: str, severity: int, seed: int, index: Indices) -> Bytes:
        if name == _CLEAN:
            return self.images[index]
        return corrupt_at(self.images[index], name, severity, seed, self.scale, index.tolist())

    def shuffled(self, seed: int, stage: int) -> Indices:
        return draws(seed, stage).permutation(len(self.images))[: self.frames].astype(np.int64)


def continual(
    images: Bytes,
    labels: NDArray[Any],
    names: Sequence[str] = CORRUPTIONS,
    severity: int = 5,
    batch: int = 64,
    seed: int = 0,
    per_corruption: int | None = None,
    scale: str | None = None,
) -> Iterator[Batch]:
    """One corruption after another, the images of each in a random order of its own.

    Args:
        images: uint8 (N, H, W, C).
        labels: (N, …), any integers.
        names: corruptions in the order of their visits; "clean" stands for the images as they are.
        severity: 1..5.
        batch: frames in a batch; a batch never spans two corruptions.
        seed: orders and random corruptions.
        per_corruption: frames of each corruption, at most N; None takes all. For more than N give the images repeated: every copy is corrupted anew.
        scale: see `corrupt`.

    Raises:
        UsageError, InputError: at the call, not at the first batch.
    """
    source = _source(images, labels, names, (severity,), batch, seed, per_corruption, scale)
    return _chain(source, ((name, severity, seed, source.shuffled(seed, k)) for k, name in enumerate(source.names)))


def gradual(
    images: Bytes,
    labels: NDArray[Any],
    names: Sequence[str] = CORRUPTIONS,
    batch: int = 64,
    seed: int = 0,
    per_corruption: int | None = None,
    scale: str | None = None,
) -> Iterator[Batch]:
    """Each corruption swells and fades, severities 1-2-3-4-5-4-3-2-1; `per_corruption` frames at each of the nine steps. Else as `continual`."""
    source = _source(images, labels, names, _GRADUAL, batch, seed, per_corruption, scale)
    steps = [(name, severity) for name in source.names for severity in _GRADUAL]
    return _chain(source, ((name, severity, seed, source.shuffled(seed, k)) for k, (name, severity) in enumerate(steps)))


def recurring(
    images: Bytes,
    labels: NDArray[Any],
    rounds: int = 10,
    names: Sequence[str] = CORRUPTIONS,
    severity: int = 5,
    batch: int = 64,
    seed: int = 0,
    per_corruption: int | None = None,
    scale: str | None = None,
) -> Iterator[Batch]:
    """`continual`, `rounds` times over: round r is the continual stream of seed + r, with new orders and new random draws."""
    if not whole(rounds, 1):
        raise UsageError(f"rounds is how often the corruptions are visited, 1 or more, not {rounds!r}", "use rounds=10 for the usual setting")
    source = _source(images, labels, names, (severity,), batch, seed, per_corruption, scale)
    stages = ((name, severity, seed + r, source.shuffled(seed + r, k)) for r in range(rounds) for k, name in enumerate(source.names))
    return _chain(source, stages)


def mixed(
    images: Bytes,
    labels: NDArray[Any],
    names: Sequence[str] = CORRUPTIONS,
    severity: int = 5,
    batch: int = 64,
    seed: int = 0,
    per_corruption: int | None = None,
    scale: str | None = None,
) -> Iterator[Batch]:
    """The frames of all corruptions shuffled together; `Batch.domains` says which frame is of which. Else as `continual`."""
    source = _source(images, labels, names, (severity,), batch, seed, per_corruption, scale)
    return _mixed(source, severity, seed)


def correlated(
    images: Bytes,
    labels: NDArray[Any],
    names: Sequence[str] = CORRUPTIONS,
    severity: int = 5,
    batch: int = 64,
    seed: int = 0,
    per_corruption: int | None = None,
    scale: str | None = None,
    delta: float | None = None,
    slots: int | None = None,
) -> Iterator[Batch]:
    """Frames near in time tend to share their label; corruptions one after another as in `continual`.

    Args:
        labels: integers (N,).
        delta: None sorts the frames of a corruption by label. A number spreads each class over time slots by a Dirichlet(delta) draw; a slot's frames
            come class by class in random order. Small (0.1, the usual setting) is strongly correlated; large fills every slot with every class.
        slots: number of time slots; None takes the number of classes present.
    """
    source = _source(images, labels, names, (severity,), batch, seed, per_corruption, scale)
    if source.labels.ndim != 1:
        raise InputError(f"a correlated stream needs one label a frame, got labels of shape {source.labels.shape}", "give integers of shape (N,)")
    if delta is not None and not 0 < delta < float("inf"):
        raise UsageError(f"delta is the concentration of a Dirichlet distribution, above 0, not {delta!r}", "use delta=0.1, or None to sort by label")
    if slots is not None and not whole(slots, 1):
        raise UsageError(f"slots is a number of time slots, 1 or more, not {slots!r}", "use None for as many as there are classes")
    return _chain(source, ((name, severity, seed, _grouped(source, seed, k, delta, slots)) for k, name in enumerate(source.names)))


def _grouped(source: _Source, seed: int, stage: int, delta: float | None, slots: int | None) -> Indices:
    order = source.shuffled(seed, stage)
    return order[grouped(source.labels[order], seed, stage, delta, slots)]


def grouped(labels: NDArray[Any], seed: int, stage: int, delta: float | None = None, slots: int | None = None) -> Indices:
    """Places of labels (n,) in an order in which equal ones come together: sorted, or spread over time slots, as `correlated` describes.

    Args:
        labels: of the frames as they would come.
        seed: the stream's.
        stage: which of its domains they are.
        delta: see `correlated`.
        slots: see `correlated`.

    Returns:
        int64 (n,), each place once.
    """
    if delta is None:
        return np.argsort(labels, kind="stable")
    rng = draws(seed, stage, 1)
    classes = np.unique(labels)
    count = slots or len(classes)
    parts: list[list[Indices]] = [[] for _ in range(count)]
    for label in classes:
        mine = np.flatnonzero(labels == label)
        cuts = np.rint(np.cumsum(rng.dirichlet(np.full(count, delta)))[:-1] * len(mine)).astype(int)
        for slot, part in zip(parts, np.split(mine, cuts), strict=True):
            slot.append(part)
    return np.concatenate([slot[k] for slot in parts for k in rng.permutation(len(slot))])


def _mixed(source: _Source, severity: int, seed: int) -> Iterator[Batch]:
    index = np.concatenate([source.shuffled(seed, k) for k in range(len(source.names))])
    which = np.repeat(np.arange(len(source.names)), source.frames)
    order = draws(seed, len(source.names), 2).permutation(len(index))
    for first in range(0, len(order), source.batch):
        take = order[first : first + source.batch]
        x = source.images[index[take]]
        for k in np.unique(which[take]):
            mine = which[take] == k
            x[mine] = source.corrupted(source.names[k], severity, seed, index[take][mine])
        yield Batch(x, source.labels[index[take]], "mixed", index[take], severity, tuple(source.names[k] for k in which[take]))


def _chain(source: _Source, stages: Iterable[tuple[str, int, int, Indices]]) -> Iterator[Batch]:
    for name, severity, seed, order in stages:
        yield from source.serve(name, severity, seed, order)


def _source(
    images: Bytes,
    labels: NDArray[Any],
    names: Sequence[str],
    severities: Iterable[int],
    batch: int,
    seed: int,
    per_corruption: int | None,
    scale: str | None,
) -> _Source:
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        for severity in severities:
            check("fog" if name == _CLEAN else name, severity, seed, scale)
    if not names:
        raise UsageError("a stream needs at least one corruption", "leave names out for the fifteen standard ones")
    check_images(images)
    if images.ndim != 4 or len(images) == 0:
        raise InputError(f"a stream needs images of shape (N, H, W, C) with N of 1 or more, got {images.shape}", "one image becomes image[None]")
    labels = np.asarray(labels)
    if labels.ndim == 0 or len(labels) != len(images):
        raise InputError(f"{len(images)} images came with labels of shape {labels.shape}", "give one label for each image")
    if not whole(batch, 1):
        raise UsageError(f"batch is a number of frames, 1 or more, not {batch!r}", "use batch=64")
    frames = len(images) if per_corruption is None else per_corruption
    if not whole(frames, 1) or frames > len(images):
        raise UsageError(
            f"per_corruption is 1 to the number of images ({len(images)}), not {frames!r}",
            "repeat the images for a longer stream; each copy is corrupted anew",
        )
    return _Source(images, labels, names, int(batch), scale, int(frames))


def _level(name: str, severity: int) -> int:
    return 0 if name == _CLEAN else severity


def draws(seed: int, *key: int) -> np.random.Generator:
    """The random numbers of a stream's order: a function of its arguments alone. (stage) orders a domain, (stage, 1) groups it, (stages, 2) mixes."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(int(seed), spawn_key=key)))
