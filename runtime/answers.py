"""Frames answered while a step runs: a second session of the first graph, and the state that it reads as it was last made known."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import Manifest
from edgeadapt.preprocess import batch_of, convert
from edgeadapt.runtime.engine import Engine
from edgeadapt.runtime.memory import FIRST_GRAPH
from edgeadapt.runtime.state import Array, FlatState, Floats


class Answers:
    """Answers frames one by one, by a state of its own. Safe to use from several threads; what it computes with it shares with nobody.

    Args:
        manifest: of the bundle.
        seen: the values that its state begins with.

    Attributes:
        state: what the first graph reads and writes; for an engine that `use` is given. hyper: the scalars that were made known with it.
    """

    def __init__(self, manifest: Manifest, seen: Mapping[str, Array]) -> None:
        graph = manifest.graphs[FIRST_GRAPH]
        specs = [spec for spec in manifest.state if spec.name in {*graph.reads, *graph.writes}]
        self.state = FlatState(specs, {FIRST_GRAPH: graph}, {spec.name: seen[spec.name] for spec in specs})
        self._manifest, self._lock = manifest, threading.Lock()
        self._engine: Engine | None = None
        self.hyper: dict[str, float] = {}

    def __call__(self, x: NDArray[Any], hyper: Mapping[str, float]) -> tuple[Floats, int, int] | None:
        """Logits of frames, how many these are, and how many of them hold NaN or infinite values; None while there is no session.

        hyper: values of scalars; those that were made known go before them.

        Raises:
            InputError, BundleError, BudgetError: as `Adapter.predict`.
        """
        frames, single = batch_of(x, self._manifest.input)
        with self._lock:
            if self._engine is None:
                return None
            logits, bad = np.full((len(frames), *self._engine.output_shape()), np.nan, np.float32), 0
            for index, frame in enumerate(frames):
                if frame.dtype != np.uint8 and not np.isfinite(frame).all():
                    bad += 1
                    continue
                convert(frames[index : index + 1], self._manifest.input, self._engine.frames(1))
                logits[index] = self._engine.run(FIRST_GRAPH, {**hyper, **self.hyper, "mix": 0.0}, commit=False).logits[0]
        return logits[0] if single else logits, len(frames), bad

    def publish(self, seen: Mapping[str, Array], hyper: Mapping[str, float]) -> None:
        """Makes a state known, and scalars that go with it: what comes now is answered by them."""
        with self._lock:
            self.state.replace({name: seen[name] for name in self.state.seen()})
            self.hyper = dict(hyper)

    def use(self, engine: Engine | None) -> None:
        """Goes on with another session over its state, or lets go of the one that it has."""
        with self._lock:
            self._engine = engine
