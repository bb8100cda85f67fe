"""The model that a daemon serves, opened as any program would: an adapter, a guard over it, and the stream that both serve."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt.bundle import Bundle, InputSpec, Manifest
from edgeadapt.devices.sources import fitting
from edgeadapt.errors import BundleError, EdgeAdaptError, StateError
from edgeadapt.progress import Progress
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.daemon import feed, seen, web
from edgeadapt.runtime.guard import Guard
from edgeadapt.runtime.guarded import guarding_bytes, saving_bytes
from edgeadapt.runtime.phases import Verdict
from edgeadapt.runtime.stream import Stream

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.config import Config

LOG = logging.getLogger("edgeadapt")

HTTP, MQTT, CAMERA, PICTURES = 5 * 2**20, 6 * 2**20, 36 * 2**20, 5 * 2**20
"""Bytes that HTTP, MQTT, OpenCV with 1280 x 720, and Pillow add to the process; measured (`./dev bench interfaces`, MiB): 1.5, 1.8, 35.8 at most, but
for the frames that are held, which are counted apart, and 4.8."""


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


def opened(
    path: Path, state: Path | None, config: Config, tell: Callable[[Verdict], None], progress: Progress, digest: str | None = None
) -> Model:
    """A bundle as a configuration wants it served; where that is not possible only predicting, by the model as it was exported, with the reason.

    Args:
        path: the bundle; every byte of it was checked. state: a saved state to go on from; None: its own start.
        digest: of what was checked.
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
            return _same(_adapting(path, manifest, state, config, tell, progress), digest)
        except (EdgeAdaptError, MemoryError) as fault:
            reason = fault.message if isinstance(fault, EdgeAdaptError) else "there is not enough memory to adapt"
            LOG.error("%s only predicts: %s", path.name, fault)
    return _same(_predicting(path, manifest, config, progress, reason), digest)


def _same(found: Model, digest: str | None) -> Model:
    """See that it is the bundle that was checked, and not one that has taken its place since."""
    if digest is not None and found.adapter.bundle.digest != digest:
        found.close()
        raise BundleError(f"{found.adapter.bundle.path} was replaced while it was opened", "restart the daemon")
    return found


def _adapting(
    path: Path, manifest: Manifest, state: Path | None, config: Config, tell: Callable[[Verdict], None], progress: Progress
) -> Model:
    slack = beside(config, manifest, adapts=True)
    window = config.adapt.window or (None if manifest.searched is None else manifest.searched.window)
    batches = None if window is None or config.memory.budget is None else [size for size in manifest.batches if size <= window]
    adapter = _adapter(path, config, progress, slack, batches=batches, answering=config.predict.cap is not None)
    try:
        adapter.hyper = config.adapt.set
        guard = Guard(adapter, tell=tell) if config.adapt.guard else None
        if state is not None:
            try:
                adapter.load(state) if guard is None else guard.load(state)
            except StateError as fault:  # the store has checked it: it is of other steps than this bundle's
                LOG.error("it begins with the bundle's own start: %s", fault)
            adapter.hyper.restore(dict(config.adapt.set))  # a saved state has those of its time
        cap = None if config.predict.cap is None else 1000 * config.predict.cap
        how: dict[str, Any] = {"every": config.adapt.every, "alike": config.adapt.alike, "cap": cap}
        return Model(adapter, guard, Stream(adapter, window=config.adapt.window, single=True, guard=guard, **how), True)
    except BaseException:
        adapter.close()
        raise


def _predicting(path: Path, manifest: Manifest, config: Config, progress: Progress, reason: str) -> Model:
    """By the model as it was exported: what was learned belongs with statistics that follow."""
    adapter = _adapter(path, config, progress, beside(config, manifest), roles="predict", batches=[1])
    try:
        return Model(adapter, None, Stream(adapter, adapt=False, window=1, single=True), False, reason)
    except BaseException:
        adapter.close()
        raise


def beside(config: Config, manifest: Manifest, adapts: bool = False) -> int:
    """Bytes that the daemon takes beside the model, and that a budget must leave.

    They are for frames that wait and are remembered, for what is being saved, for the guard where it adapts, and for libraries that are only loaded
    where they are used.
    """
    spec = manifest.input
    frame = 4 * math.prod(spec.shape) if spec.resize is None and not spec.crop else seen.MOST
    waiting = min(feed.MOST, config.predict.queue * frame) + min(seen.MOST, seen.LATEST * frame)
    camera = CAMERA if config.source.type == "camera" else 0
    waiting += saving_bytes(manifest) * config.adapt.enabled
    guarding = guarding_bytes(manifest) if adapts and config.adapt.guard else 0
    interfaces = _http(config) + MQTT * config.mqtt.enabled
    return config.memory.slack + waiting + guarding + _pictures(config, spec) + camera + interfaces


def _http(config: Config) -> int:
    """Bytes of the server, of bodies that are held at once, and of the frames of one."""
    return HTTP + (web.BODIES + 1) * config.http.body if config.http.enabled else 0


def _pictures(config: Config, spec: InputSpec) -> int:
    """Bytes of Pillow, and of one picture that is read, where these are used."""
    if len(spec.shape) != 3 or spec.raw:
        return 0
    source, fits = config.source, spec.resize is not None or spec.crop
    files = {
        "folder": spec.shape[0] in (1, 3) or fits,
        "http": True,
        "replay": fits or not str(getattr(source, "path", "")).endswith((".npz", ".npy")),
        "stdin": getattr(source, "format", "") == "paths" or (fits and getattr(source, "format", "") == "npy"),
    }
    if files.get(source.type, False) or config.http.enabled:
        return PICTURES + fitting.largest(spec, config.memory.picture)
    return PICTURES if spec.resize is not None else 0


def _adapter(path: Path, config: Config, progress: Progress, slack: int, **how: Any) -> Adapter:
    memory = config.memory
    within: dict[str, Any] = {} if memory.budget is None else {"reserve": memory.reserve, "slack": slack}
    return Adapter.open(path, memory.budget, config.predict.threads, verify=False, prepare=progress, **within, **how)
