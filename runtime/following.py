"""How fast and how far a guard lets statistics follow a stream: the weight of a window's statistics, and the scalars of anchored ones."""

from __future__ import annotations

from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.phases import Limits

WHOLLY = {"trust": 1.0, "late": 1.0}
"""Scalars of anchored statistics that are the stream's own wherever it is shifted."""


class Following:
    """Of one adapter. Scalars that its user has set stay as they are.

    Args:
        adapter: the adapter.
        limits: see there.
        follows: whether statistics follow the stream at all.

    Attributes:
        wholly: whether they are each window's own, whatever it is: they are not anchored.
        scalars: what the adapter is to predict with.
        renewed: windows since the beginning, or since a jump of the stream.
    """

    def __init__(self, adapter: Adapter, limits: Limits, follows: bool) -> None:
        known, chosen = adapter.manifest.hyper, adapter.hyper.chosen
        self._adapter, self._limits = adapter, limits
        self._anchored = follows and "few" in known and "few" not in chosen
        self._all = {name: value for name, value in WHOLLY.items() if self._anchored and name in known and name not in chosen}
        self._moves = follows and "mix" in known
        self.wholly = follows and "few" not in known
        self.scalars: dict[str, float] = {}
        self.renewed = 0

    def choose(self, mixed: bool, learns: bool, enough: bool) -> None:
        """The scalars from now on.

        mixed: whether windows are of many classes; learns: whether steps are taken or looked at, or their outcome is kept, on frames that come as if
        shuffled; enough: whether windows are of as many classes as statistics may follow at all, and shifted.

        Steps are no good where layers are normalised only in part by the stream's statistics: what they add is not taken out by the next layer, and
        looks there like more of a shift.
        """
        if not self._anchored:
            return
        self.scalars["few"] = 0.0 if mixed else self._limits.few if enough else self._limits.none
        for name, value in self._all.items():
            if mixed and learns:
                self.scalars[name] = value
            else:
                self.scalars.pop(name, None)

    @property
    def unmixed(self) -> bool:
        """Whether steps that were taken while statistics followed wholly are of no use now that these do not."""
        return bool(self._all) and not self._all.keys() <= self.scalars.keys()

    def rate(self, frames: int) -> dict[str, float]:
        """Of a step on so many frames where it is not the usual one: that of steps with labels, where statistics follow wholly."""
        graph = self._adapter.manifest.graphs.get(f"learn.b{frames}")
        if not self._all or self.unmixed or graph is None or "rate" not in graph.defaults or "rate" in self._adapter.hyper.chosen:
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
        """Of a window's statistics otherwise."""
        return self._adapter.hyper.chosen.get("mix", self._usual(frames)) if self._moves else 1.0

    def _usual(self, frames: int) -> float:
        manifest = self._adapter.manifest
        graph = manifest.graphs.get(f"predict.b{frames}")
        return manifest.hyper["mix"].default if graph is None else graph.defaults.get("mix", manifest.hyper["mix"].default)
