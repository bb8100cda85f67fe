"""What a daemon tells of itself: its status, its metrics, and over which of HTTP and MQTT."""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeadapt._version import __version__
from edgeadapt.devices.boards import vitals
from edgeadapt.errors import EdgeAdaptError
from edgeadapt.runtime import checkpoint
from edgeadapt.runtime.daemon import status as told
from edgeadapt.runtime.memory import peak, resident
from edgeadapt.units import format_bytes

if TYPE_CHECKING:
    from edgeadapt.runtime.daemon.daemon import Daemon
    from edgeadapt.runtime.daemon.mqtt import Mqtt

LOG = logging.getLogger("edgeadapt")

_LOOK, _WRITE = 5.0, 15.0  # seconds between two looks at the board, and between two writes of the textfile
_AGAIN = 30.0  # seconds until an interface that could not begin is tried again
_PATIENCE = 2.0  # seconds that a write is waited for at the end
_EVENTS = 20


class Reports:
    """Of one daemon; for any thread."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._vitals, self._model = vitals.Vitals(None, None, None), ""
        self._looked = self._written = -math.inf
        self._tried = time.monotonic()
        self._missing: dict[str, Callable[[], None]] = {}
        self._faults: dict[str, str] = {}
        self._broker: Mqtt | None = None
        self._named: bool | None = None  # None: it is not asked; False: just now
        self._steps = 0
        self._failed = False
        self._writing: threading.Thread | None = None

    def start(self, stack: ExitStack) -> None:
        """Has metrics ask, and begins to serve HTTP and MQTT where they are enabled; they end with the stack."""
        from edgeadapt.devices.boards.probe import look

        daemon, measures = self._daemon, self._daemon.measures
        self._model = look().model
        measures.resident.read(resident)
        measures.budget.read(lambda: daemon.config.memory.budget)
        measures.temperature.read(lambda: self._vitals.temperature)
        measures.throttled.read(lambda: self._vitals.throttled)
        measures.drift.read(self._shift)
        measures.checkpoint.read(lambda: None if daemon.saving is None else daemon.saving.saved)
        measures.frame_errors.read_all(self._errors)
        measures.used.read_all(self._used)
        stack.callback(self._written_out)
        self._missing = {"http": lambda: self._web(stack), "mqtt": lambda: self._mqtt(stack)}
        self._try_missing()

    def _address_known(self) -> bool:
        """Whether the server's name leads to an address by now. It is asked for by a thread of its own: a resolver may take its time."""
        if "http" not in self._missing or self._named is True:
            self._named = None
            return True
        if self._named is None:
            self._named = False
            threading.Thread(target=self._ask_name, name="http name", daemon=True).start()
        return False

    def _ask_name(self) -> None:
        http = self._daemon.config.http
        try:
            socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self._named = True
        except OSError:
            self._tried, self._named = time.monotonic(), None

    def _try_missing(self) -> None:
        """Begins what has not begun yet: an address may come later, and so may a file."""
        for name, begin in list(self._missing.items()):
            try:
                begin()
            except (EdgeAdaptError, OSError) as fault:
                told = str(fault).splitlines()[0]
                if told != self._faults.get(name):
                    LOG.error("%s", fault)
                    self._daemon.events.tell(name, told)
                self._faults[name] = told
            else:
                del self._missing[name]
                if self._faults.pop(name, ""):
                    self._daemon.events.tell(name, "it has begun")

    def _shift(self) -> float | None:
        guard = None if self._daemon.model is None else self._daemon.model.guard
        return None if guard is None or guard.scores is None else guard.scores.shift

    def _web(self, stack: ExitStack) -> None:
        if not self._daemon.config.http.enabled:
            return
        from edgeadapt.runtime.daemon.answering import gives
        from edgeadapt.runtime.daemon.web.server import Web

        stack.enter_context(Web(self._daemon.config.http, gives(self._daemon)))

    def _mqtt(self, stack: ExitStack) -> None:
        config = self._daemon.config
        if not config.mqtt.enabled:
            return
        from edgeadapt.runtime.daemon.mqtt import Mqtt

        self._broker = Mqtt(config.mqtt, config.name, self._daemon.asked.verbs, self._daemon.events, self.status, self._classes)
        stack.enter_context(self._broker)

    def turn(self, now: float) -> None:
        """To be called in every turn of the daemon's loop."""
        daemon = self._daemon
        daemon.measures.enter(self._state())
        self.count()
        if daemon.feed is not None:
            daemon.feed.look(now)
        if now - self._looked >= _LOOK:
            self._looked = now
            self._vitals = vitals.look()
            daemon.tell_manager(self.sentence())
        if self._missing and now - self._tried >= _AGAIN and self._address_known():
            self._tried = now
            self._try_missing()
        path = daemon.config.metrics.textfile
        if path is not None and now - self._written >= _WRITE and (self._writing is None or not self._writing.is_alive()):
            self._written = now  # by a thread of its own: the disk may take its time
            self._writing = threading.Thread(target=self._write, args=(path,), name="metrics", daemon=True)
            self._writing.start()

    def _write(self, path: Path) -> None:
        try:
            self._daemon.measures.registry.write_textfile(path)
            self._failed = False
        except (EdgeAdaptError, OSError) as fault:
            if not self._failed:
                LOG.warning("metrics cannot be written to %s: %s", path, fault)
            self._failed = True

    def _written_out(self) -> None:
        if self._writing is not None:
            self._writing.join(_PATIENCE)

    def count(self) -> None:
        """Counts the steps since it was last called."""
        model = self._daemon.model
        if model is None or not model.adapts:
            return
        steps = model.adapter.stats["steps"]
        if steps > self._steps:
            self._daemon.measures.updates.add(steps - self._steps, outcome="taken")
            if model.guard is None:
                self._daemon.wants_save()
        self._steps = steps

    def _state(self) -> str:
        daemon = self._daemon
        if daemon.mode != "serving":
            return daemon.mode
        guard = None if daemon.model is None else daemon.model.guard
        return "predicting" if guard is None else guard.phase.value

    def sentence(self) -> str:
        """How it is, in one line."""
        daemon = self._daemon
        if daemon.why_safe:
            return f"{daemon.mode}: {daemon.why_safe}"
        held, budget = resident() or 0, daemon.config.memory.budget
        memory = format_bytes(held) + ("" if budget is None else f" of {format_bytes(budget)}")
        complaint = self.source()["complaint"]
        return f"{self._state()}, {daemon.seen.count} frames answered, {memory}" + (f"; {complaint}" if complaint else "")

    # ------------------------------------------------------------------------------------------------------------ status

    def status(self) -> told.Status:
        """See there."""
        daemon = self._daemon
        return {
            "version": told.VERSION,
            "name": daemon.config.name,
            "edgeadapt": __version__,
            "uptime_s": time.monotonic() - daemon.begun,
            "mode": daemon.mode,
            "reason": daemon.why_safe,
            "bundle": self._bundle(),
            "guard": self._guard(),
            "adaptation": self._adaptation(),
            "source": self.source(),
            "queue": self._queue(),
            "predictions": daemon.seen.predictions(),
            "compare": daemon.seen.compare_status(),
            "memory": self._memory(),
            "state": self._kept(),
            "board": {
                "model": self._model,
                "temperature_c": self._vitals.temperature,
                "throttled": self._vitals.throttled,
                "load": self._vitals.load,
            },
            "interfaces": self._interfaces(),
            "events": [{"time": event.time, "kind": event.kind, "text": event.text} for event in daemon.events.latest(_EVENTS)],
            "classes": list(self._classes()) or None,
        }

    def _interfaces(self) -> dict[str, str]:
        config, broker = self._daemon.config, self._broker
        mqtt = self._faults.get("mqtt", "") if broker is None else broker.complaint
        return {**({"http": self._faults.get("http", "")} if config.http.enabled else {}), **({"mqtt": mqtt} if config.mqtt.enabled else {})}

    def _classes(self) -> tuple[str, ...]:
        model = self._daemon.model
        return () if model is None else model.adapter.manifest.task.names or ()

    def _bundle(self) -> told.BundleStatus | None:
        daemon, model = self._daemon, self._daemon.model
        if model is None:
            return None
        bundle = model.adapter.bundle
        return {
            "name": bundle.path.name,
            "digest": bundle.digest,
            "method": bundle.manifest.method.name,
            "compatible": checkpoint.compatible(bundle.manifest),
            "on_trial": daemon.boot is not None and daemon.boot.installed.trial,
        }

    def _guard(self) -> told.GuardStatus | None:
        guard = None if self._daemon.model is None else self._daemon.model.guard
        if guard is None:
            return None
        scores: dict[str, float] = {} if guard.scores is None else guard.scores.plain()
        last = list(guard.verdicts)[-1:]
        collapse: told.CollapseStatus = {
            "spread": scores.get("spread"),
            "entropy": scores.get("entropy"),
            "runs": scores.get("runs"),
            "agreement": scores.get("agreement"),
            "kept": scores.get("kept"),
            "moved": scores.get("moved"),
        }
        return {
            "state": guard.phase.value,
            "since_s": time.monotonic() - guard.changed,
            "windows": guard.windows,
            "shift": scores.get("shift"),
            "collapse": collapse,
            "last": str(last[0]) if last else "",
        }

    def _adaptation(self) -> told.AdaptationStatus:
        daemon, model = self._daemon, self._daemon.model
        stats: dict[str, int] = {} if model is None else model.adapter.stats
        stream = None if model is None else model.stream
        return {
            "enabled": model is not None and model.adapts,
            "paused": daemon.asked.paused,
            "steps": stats.get("steps", 0),
            "rejected": stats.get("rejected_steps", 0),
            "paused_steps": stats.get("paused_steps", 0),
            "windows": 0 if stream is None else stream.windows,
            "passed": 0 if stream is None else stream.passed,
            "late": 0 if stream is None else stream.late,
        }

    def source(self) -> told.SourceStatus:
        """See there."""
        daemon = self._daemon
        kind, feed = daemon.config.source.type, daemon.feed
        if feed is None:
            return {"type": kind, "name": "", "live": False, "complaint": daemon.why_safe, "last_frame_s": None, "counts": {}}
        source = feed.source
        complaint = feed.complaint
        last = feed.last
        return {
            "type": kind,
            "name": source.name,
            "live": not complaint,
            "complaint": complaint,
            "last_frame_s": None if last is None else time.monotonic() - last,
            "counts": dict(source.counts),
        }

    def _queue(self) -> told.QueueStatus:
        feed = self._daemon.feed
        if feed is None:
            return {"length": 0, "limit": self._daemon.config.predict.queue, "dropped": 0}
        return {"length": len(feed), "limit": feed.size, "dropped": feed.dropped}

    def _memory(self) -> told.MemoryStatus:
        model, budget = self._daemon.model, self._daemon.config.memory.budget
        if model is None:
            return {"resident": resident(), "peak": peak(), "budget": budget, "level": 0, "reason": "", "lines": {}}
        found: dict[str, Any] = model.adapter.memory
        known = {"resident", "peak", "budget", "planned", "level", "reason", "graphs", "missing", "passed_over"}
        lines = {name: int(value) for name, value in found.items() if name not in known and isinstance(value, (int, float))}
        return {
            "resident": found["resident"],
            "peak": found["peak"],
            "budget": budget,
            "level": found["level"],
            "reason": found["reason"],
            "lines": lines,
        }

    def _kept(self) -> told.StateStatus:
        daemon = self._daemon
        store, most = daemon.store, daemon.config.state.bytes_per_day
        if store is None or daemon.boot is None:
            degraded = "the state folder cannot be used" if store is None else store.degraded
            nothing: told.StateStatus = {
                "generation": 0, "active": None, "last_good": None, "on_probation": False, "written_today": 0, "bytes_per_day": most,
                "degraded": degraded,
            }  # fmt: skip
            return nothing
        states = store.now.states_of(daemon.boot.installed)
        return {
            "generation": store.now.generation,
            "active": None if states.active is None else states.active.generation,
            "last_good": None if states.last_good is None else states.last_good.generation,
            "on_probation": store.on_probation,
            "written_today": store.written_today,
            "bytes_per_day": most,
            "degraded": store.degraded,
        }

    # ----------------------------------------------------------------------------------------------------------- metrics

    def _errors(self) -> dict[tuple[str, ...], float]:
        feed, kind = self._daemon.feed, self._daemon.config.source.type
        counts = {} if feed is None else dict(feed.source.counts)
        counts |= {"bad": self._daemon.seen.bad, "queue": 0 if feed is None else feed.dropped}
        return {(kind, name): float(count) for name, count in counts.items()}

    def _used(self) -> dict[tuple[str, ...], float]:
        return {(name,): float(size) for name, size in self._memory()["lines"].items()}
