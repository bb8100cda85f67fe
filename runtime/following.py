"""How fast and how far a guard lets statistics follow a stream: the weight of a window's statistics, and the scalars of anchored ones."""

from __future__ import annotations

import math

from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.phases import Limits
from edgeadapt.runtime.pressure import Level

WHOLLY = {"trust": 1.0, "late": 1.0}
"""Scalars of anchored statistics that are the stream's own wherever it is shifted."""
_MOSTLY = 0.4  # the weight of a window's statistics from which its frames are normalised mostly by their own
_LESS = 0.75  # of `own`, with these: what steps learn makes up for some of what a frame's own statistics do


def together(adapter: Adapter, role: str, frames: int) -> bool:
    """Whether so many frames are served in one run now: that graph is loaded, and memory is not short."""
    return adapter.level == 0 and frames in adapter.batches[role]


class Following:
    """Of one adapter. Scalars that its user has set stay as they are.

    Args:
        adapter: the adapter.
        limits: see there.
        follows: whether statistics follow the stream at all.

    Attributes:
        live: whether they are each window's own, whatever it is: they are not anchored.
        scalars: what the adapter is to predict with.
        renewed: windows since the beginning, or since a jump of the stream.
        passes: frames of each pass in which the window that is served is predicted.
        prompt: whether frames are normalised by statistics that are mostly of their own window, where memory is not short.
    """

    def __init__(self, adapter: Adapter, limits: Limits, follows: bool) -> None:
        known = adapter.manifest.hyper
        self._adapter, self._limits = adapter, limits
        self._anchored = follows and "few" in known
        self._moves = follows and "mix" in known
        self.live = follows and "few" not in known
        self.scalars: dict[str, float] = {}
        self.renewed = 0
        self.passes: list[int] = []
        self.prompt = True

    def serves(self, frames: int, usable: int, ahead: bool) -> None:
        """A window of so many frames is served now, some of which may be of no use, and which were answered before or not."""
        self.passes = self._split(usable, self._adapter.level < Level.PREDICT)
        self.prompt = not ahead and self.weight(max(self._split(frames, True), default=1)) >= _MOSTLY

    def _split(self, frames: int, large: bool) -> list[int]:
        """The passes in which so many are predicted, in those batches that are loaded or one by one."""
        found = []
        for size in (*(self._adapter.batches["predict"] if large else ()), 1):
            count, frames = divmod(frames, size)
            found += count * [size]
        return found

    def choose(self, mixed: bool, wholly: bool, enough: bool) -> None:
        """The scalars from now on.

        mixed: whether windows are of many classes; wholly: whether statistics are to follow wholly then, for steps and for what these have made;
        enough: whether windows are of as many classes as statistics may follow at all, and shifted.

        Steps are no good where layers are normalised only in part by the stream's statistics: what they add is not taken out by the next layer, and
        looks there like more of a shift.
        """
        chosen = self._adapter.hyper.chosen
        if not self._anchored or "few" in chosen:
            self.scalars = {}
            return
        self.scalars = {"few": 0.0 if mixed else self._limits.few if enough else self._limits.none}
        if mixed and wholly and self.may_whole:
            self.scalars.update(WHOLLY)
            known = self._adapter.manifest.hyper
            if "own" in known and "own" not in chosen:
                self.scalars["own"] = _LESS * known["own"].default

    @property
    def may_whole(self) -> bool:
        """Whether statistics are anchored, are those of the frames that they normalise, and their user leaves it to the guard how far they follow.

        Those of frames that came before may be of another shift, and following them wholly costs more than steps gain.
        """
        return self._anchored and self.prompt and not (WHOLLY.keys() | {"few"}) & self._adapter.hyper.chosen.keys()

    def apart(self, spread: float, runs: float) -> str:
        """Why statistics may not follow wholly, even for what was learned so, where a window and the latest frames have these scores, or ""."""
        if not self.may_whole:
            return "statistics follow as their user says" if self.prompt else "frames are normalised by windows before their own"
        if spread < self._limits.mixed:
            return "windows are of few classes"
        return "classes come in runs" if runs >= 2 * self._limits.runs else ""

    def belong(self, wholly: bool) -> None:
        """The model is now one that belongs with statistics that follow wholly, or not."""
        if not wholly:
            self.scalars = {name: value for name, value in self.scalars.items() if name == "few"}

    @property
    def whole(self) -> bool:
        """Whether anchored statistics follow wholly now."""
        return WHOLLY.keys() <= self.scalars.keys()

    def rate(self, frames: int) -> dict[str, float]:
        """Of a step on so many frames where it is not the usual one: that of steps with labels, where statistics follow wholly."""
        graph = self._adapter.manifest.graphs.get(f"learn.b{frames}")
        if not self.whole or graph is None or "rate" not in graph.defaults or "rate" in self._adapter.hyper.chosen:
            return {}
        return {"rate": graph.defaults["rate"]}

    @property
    def may_mix(self) -> bool:
        """Whether the weight of a window's statistics is to be chosen."""
        return self._moves and "mix" not in self._adapter.hyper.chosen

    def mixing(self, frames: int, since: int | None = None) -> dict[str, float]:
        """The weight of a window's statistics, while there is reason to follow it faster than usual: at the beginning and after a jump of the stream.

        The frames since then count as they are many, and what was there before as so many frames as `Limits.before` says. since: windows; None:
        `renewed`.
        """
        if not self.may_mix or (usual := self._usual(frames)) >= 1.0:
            return {}
        since = self.renewed if since is None else since
        return {"mix": max(usual, frames / (self._limits.before + frames * (since + 1)))}

    def weight(self, frames: int) -> float:
        """Otherwise, of the statistics of a pass of so many."""
        return self._adapter.hyper.chosen.get("mix", self._usual(frames)) if self._moves else 1.0

    @property
    def remains(self) -> float:
        """The share of statistics before that is left when the window that is served was predicted, by the usual weights."""
        return math.prod(1.0 - self.weight(size) for size in self.passes)

    def stand_for(self, frames: int) -> int:
        """Frames that statistics stand for, where they follow passes of so many: those of a moving average vary as the mean of so many does."""
        mix = self.weight(frames)
        return round(frames * (2.0 - mix) / max(mix, 1e-3))

    def _usual(self, frames: int) -> float:
        manifest = self._adapter.manifest
        graph = manifest.graphs.get(f"predict.b{frames}")
        return manifest.hyper["mix"].default if graph is None else graph.defaults.get("mix", manifest.hyper["mix"].default)
