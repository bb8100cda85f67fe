"""The model that a daemon serves, opened as any program would: an adapter, a guard over it, and the stream that both serve."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt.bundle import Bundle
from edgeadapt.errors import EdgeAdaptError
from edgeadapt.progress import Progress
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.guard import Guard
from edgeadapt.runtime.guarded import guarding_bytes
from edgeadapt.runtime.phases import Verdict
from edgeadapt.runtime.stream import Stream

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.config import Config

LOG = logging.getLogger("edgeadapt")


@dataclass(frozen=True, eq=False)
class Model:
    """What serves. guard: None where nothing is adapted, or as its user wants it. reason: why it serves less than was asked for; "" where not."""

    adapter: Adapter
    guard: Guard | None
    stream: Stream
    adapts: bool
    reason: str = ""

    def close(self) -> None:
        """Lets go of it."""
        self.adapter.close()


def opened(path: Path, state: Path | None, config: Config, tell: Callable[[Verdict], None], progress: Progress) -> Model:
    """A bundle as a configuration wants it served; where that is not possible only predicting, with the reason.

    Args:
        path: the bundle. state: a saved state to go on from; None: its own start.
        config: the daemon's.
        tell: told of the guard's decisions.
        progress: told how preparing its graphs goes on.

    Raises:
        EdgeAdaptError: it cannot even predict.
    """
    manifest = Bundle.open(path, verify=False).manifest
    reason = ""
    if config.adapt.enabled and config.adapt.guard and manifest.reference is None:
        reason = "the bundle does not say what its source looks like, so that no guard can watch over adaptation: export it with --data"
    elif config.adapt.enabled:
        try:
            return _adapting(path, state, config, tell, progress)
        except EdgeAdaptError as fault:
            reason = fault.message
            LOG.error("%s only predicts: %s", path.name, fault)
    return _predicting(path, state, config, progress, reason)


def _adapting(path: Path, state: Path | None, config: Config, tell: Callable[[Verdict], None], progress: Progress) -> Model:
    manifest = Bundle.open(path, verify=False).manifest
    slack = config.memory.slack + (guarding_bytes(manifest) if config.adapt.guard else 0)
    window = config.adapt.window or (None if manifest.searched is None else manifest.searched.window)
    batches = None if window is None or config.memory.budget is None else [size for size in manifest.batches if size <= window]
    adapter = _adapter(path, config, progress, slack, batches=batches, answering=config.predict.cap is not None)
    try:
        adapter.hyper = config.adapt.set
        guard = Guard(adapter, tell=tell) if config.adapt.guard else None
        if state is not None:
            if guard is None:
                adapter.load(state)
            else:
                guard.load(state)
            adapter.hyper = config.adapt.set  # a saved state has those of its time
        cap = None if config.predict.cap is None else 1000 * config.predict.cap
        how: dict[str, Any] = {"every": config.adapt.every, "alike": config.adapt.alike, "cap": cap}
        return Model(adapter, guard, Stream(adapter, window=config.adapt.window, single=True, guard=guard, **how), True)
    except BaseException:
        adapter.close()
        raise


def _predicting(path: Path, state: Path | None, config: Config, progress: Progress, reason: str) -> Model:
    adapter = _adapter(path, config, progress, config.memory.slack, roles=("predict", *(("source",) if config.predict.compare else ())), batches=[1])
    try:
        if state is not None:
            adapter.load(state)
        return Model(adapter, None, Stream(adapter, adapt=False, window=1, single=True), False, reason)
    except BaseException:
        adapter.close()
        raise


def _adapter(path: Path, config: Config, progress: Progress, slack: int, **how: Any) -> Adapter:
    memory = config.memory
    within: dict[str, Any] = {} if memory.budget is None else {"reserve": memory.reserve, "slack": slack}
    return Adapter.open(path, memory.budget, config.predict.threads, verify=False, prepare=progress, **within, **how)
