"""The demo's work: the same frames through the frozen model and through the adapting one, while the picture goes bad and mends again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.corruptions import corrupt
from edgeadapt.errors import UsageError
from edgeadapt.report import Quantiles, Trace

if TYPE_CHECKING:
    from edgeadapt.runtime.adapter import Adapter

CLEAN = "clean"
STAGES = (CLEAN, "gaussian_noise", "motion_blur", "brightness", "contrast", "snow", "defocus_blur", CLEAN)
"""What happens to the picture, in order; each swells from severity 1 to 5 and fades to 1."""

SCALE = "imagenet"
"""The published strengths for photographs: digits of 32 pixels hardly notice those for CIFAR."""

MIB = 2**20
RECENT = 8  # windows that "now" means


@dataclass(frozen=True)
class Window:
    """One window of frames to come: its stage (position, name), severity 0 to 5, and which test images it holds."""

    position: int
    name: str
    severity: int
    index: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Step:
    """What came of a window.

    Attributes:
        window: the window.
        image: its last frame, uint8 [H,W,3]; `truth` is what it shows, `labels` what the frozen and the adapting model read.
        wrong: how many frames each of the two read wrong.
        milliseconds: what each of the two took, a frame.
        resident: the process's resident bytes after it.
    """

    window: Window
    image: NDArray[np.uint8]
    truth: int
    labels: tuple[int, int]
    wrong: tuple[int, int]
    milliseconds: tuple[float, float]
    resident: int


def plan(frames: int, batch: int, images: int, seed: int = 0) -> list[Window]:
    """The windows of a run: as many as `frames` fill, shared evenly among the stages; test images in random order, again and again.

    Raises:
        UsageError: fewer frames than one window a stage.
    """
    each = frames // batch // len(STAGES)
    if each < 1:
        least = batch * len(STAGES)
        raise UsageError(f"{frames} frames are too few for {len(STAGES)} stages in windows of {batch}", f"give at least --frames {least}")
    random = np.random.default_rng(seed)
    count = each * len(STAGES) * batch
    order = np.concatenate([random.permutation(images) for _ in range(-(-count // images))])[:count].reshape(len(STAGES), each, batch)
    return [
        Window(position, name, 0 if name == CLEAN else severity(number, each), order[position, number])
        for position, name in enumerate(STAGES)
        for number in range(each)
    ]


def severity(number: int, count: int) -> int:
    """Of one of a stage's `count` windows: nine equal stretches, 1-2-3-4-5-4-3-2-1."""
    place = (number + 0.5) / count
    return 1 + min(4, int(9 * min(place, 1 - place) + 1e-9))


def steps(adapter: Adapter, windows: list[Window], images: NDArray[np.uint8], labels: NDArray[np.int64], seed: int = 0) -> Iterator[Step]:
    """Runs the windows, one by one."""
    done = 0
    for window in windows:
        frames, truth = images[window.index], labels[window.index]
        if window.severity:
            frames = corrupt(frames, window.name, window.severity, seed, SCALE, start=done)
        done += len(frames)
        frozen, frozen_time = _timed(adapter.source, frames)
        adapting, adapting_time = _timed(adapter.adapt, frames)
        yield Step(
            window,
            frames[-1],
            int(truth[-1]),
            (int(frozen[-1]), int(adapting[-1])),
            (int((frozen != truth).sum()), int((adapting != truth).sum())),
            (frozen_time, adapting_time),
            adapter.memory["resident"] or 0,
        )


def warm(adapter: Adapter, images: NDArray[np.uint8], batch: int) -> None:
    """Loads the graphs, so that the first window is timed like the others; the state is as it was."""
    adapter.source(images[:batch])
    adapter.adapt(images[:batch])
    adapter.reset()


def _timed(call: Any, frames: NDArray[np.uint8]) -> tuple[NDArray[np.intp], float]:
    begin = time.perf_counter()
    labels = call(frames).argmax(1)
    return labels, 1000 * (time.perf_counter() - begin) / len(frames)


@dataclass
class Count:
    """Frames, and how many of them each model read wrong."""

    frames: int = 0
    wrong: list[int] = field(default_factory=lambda: [0, 0])

    def errors(self) -> tuple[float, float]:
        """Percent wrong of the frozen and of the adapting model; 0 before the first frame."""
        total = max(self.frames, 1)
        return 100 * self.wrong[0] / total, 100 * self.wrong[1] / total


class Tally:
    """Everything that view and report show, counted as steps come in.

    Args:
        budget: the process's bound in bytes.
        frames: how many there will be.
    """

    def __init__(self, budget: int, frames: int) -> None:
        self.budget, self.planned = budget, frames
        self.all, self.stages = Count(), [Count() for _ in STAGES]
        self.recent: list[tuple[float, float]] = []  # of every window so far: the share wrong, twice
        self.errors, self.time = (Trace(), Trace()), (Trace(), Trace())
        self.milliseconds = (Quantiles(), Quantiles())
        self.memory, self.resident = Trace(), 0
        self.bands: list[tuple[str, int, int, int]] = []  # name, first frame, last frame, severity

    def add(self, step: Step) -> None:
        """Counts a step."""
        window, count = step.window, len(step.window.index)
        begin = self.all.frames
        for counter in (self.all, self.stages[window.position]):
            counter.frames += count
            for which in (0, 1):
                counter.wrong[which] += step.wrong[which]
        self.recent = [*self.recent[-63:], (step.wrong[0] / count, step.wrong[1] / count)]
        for which in (0, 1):
            self.errors[which].add(self.all.frames, 100 * step.wrong[which] / count)
            self.time[which].add(self.all.frames, step.milliseconds[which])
            self.milliseconds[which].add(step.milliseconds[which])
        self.memory.add(self.all.frames, step.resident / MIB)
        self.resident = max(self.resident, step.resident)
        last = self.bands[-1] if self.bands else None
        if last and last[0] == window.name and last[3] == window.severity:
            self.bands[-1] = (last[0], last[1], self.all.frames, last[3])
        else:
            self.bands.append((window.name, begin, self.all.frames, window.severity))

    def now(self) -> tuple[float, float]:
        """Percent wrong over the last few windows."""
        last = self.recent[-RECENT:]
        return (100 * sum(a for a, _ in last) / max(len(last), 1), 100 * sum(b for _, b in last) / max(len(last), 1))


def words(name: str) -> str:
    """A stage's name as people write it."""
    return name.replace("_", " ")
