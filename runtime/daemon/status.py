"""What a daemon says of itself: the result of the verb "status", version 1. JSON values all, so that other programs can read it.

Sizes are in bytes, times in seconds, but for latencies, which are in milliseconds, as their names say. None stands for what is not known, or not
there. New keys may be added without a new version; a key that goes, or means something else, makes one.
"""

from __future__ import annotations

from typing import Literal, TypedDict

VERSION = 1


class BundleStatus(TypedDict):
    """The bundle that is served.

    Attributes:
        name: its file's. digest: of its content. method: how it adapts.
        compatible: the digest of what a state must fit to be loaded into it.
        on_trial: whether it is new, and not yet known to serve as well as the one before.
    """

    name: str
    digest: str
    method: str
    compatible: str
    on_trial: bool


class CollapseStatus(TypedDict):
    """The scores by which a collapse of the predictions is seen, of the last window; see `runtime.scores.Scores`."""

    spread: float | None
    entropy: float | None
    runs: float | None
    agreement: float | None
    kept: float | None
    moved: float | None


class GuardStatus(TypedDict):
    """The guard.

    Attributes:
        state: the value of its `Phase`. since_s: how long it has been in it. windows: it has served.
        shift: how far the stream is from the source, 0 to 1. collapse: the other scores. last: its last decision, in words; "" before the first.
    """

    state: str
    since_s: float
    windows: int
    shift: float | None
    collapse: CollapseStatus
    last: str


class AdaptationStatus(TypedDict):
    """Adaptation since the daemon started.

    Attributes:
        enabled: whether the bundle adapts at all, as configured. paused: by hand.
        steps, rejected, paused_steps: taken, dropped because they were not finite, not taken because memory was short.
        windows, passed, late: whole ones; those passed over to answer in time; answers that took longer than they may.
    """

    enabled: bool
    paused: bool
    steps: int
    rejected: int
    paused_steps: int
    windows: int
    passed: int
    late: int


class SourceStatus(TypedDict):
    """Where frames come from.

    Attributes:
        type: as in the configuration. name: as a person would call it. live: whether frames come now.
        complaint: why they do not; "" while they do. last_frame_s: how long ago the last one came. counts: what came beside frames, by kind.
    """

    type: str
    name: str
    live: bool
    complaint: str
    last_frame_s: float | None
    counts: dict[str, int]


class QueueStatus(TypedDict):
    """Frames that wait to be answered: how many, at most how many, and how many were dropped for newer ones."""

    length: int
    limit: int
    dropped: int


class Latency(TypedDict):
    """Of the latest predictions: half, 95 and 99 of a hundred took no longer than this, in milliseconds."""

    p50: float | None
    p95: float | None
    p99: float | None


class PredictionsStatus(TypedDict):
    """Predictions: how many, on how many more frames there could be none, how many come in a second now, and how long one takes."""

    count: int
    bad: int
    per_second: float | None
    latency_ms: Latency


class CompareStatus(TypedDict):
    """The model beside the one that it started as: on how many frames, and on what share of them both predict the same."""

    frames: int
    agreement: float | None


class MemoryStatus(TypedDict):
    """Memory of the process.

    Attributes:
        resident, peak, budget: now, at most so far, allowed. lines: of the plan, by name.
        level: 0 normal, 1 adaptation paused, 2 caches released, 3 predicting only. reason: why it is not 0, else "".
    """

    resident: int | None
    peak: int | None
    budget: int | None
    level: int
    reason: str
    lines: dict[str, int]


class StateStatus(TypedDict):
    """What was learned, as it is kept on the disk.

    Attributes:
        generation: counts what was written. active, last_good: generations; None before there is one.
        on_probation: whether what is active is not proven yet.
        written_today, bytes_per_day: in the latest 24 hours or a little more, and the most that may be.
        degraded: why nothing is written now; "" while it is.
    """

    generation: int
    active: int | None
    last_good: int | None
    on_probation: bool
    written_today: int
    bytes_per_day: int | None
    degraded: str


class BoardStatus(TypedDict):
    """The board: its model, temperature in °C, whether it runs slower than it could, and the load average of the last minute."""

    model: str
    temperature_c: float | None
    throttled: bool | None
    load: float | None


class EventStatus(TypedDict):
    """An event: when, in seconds of Unix time, its kind, and what it says."""

    time: float
    kind: str
    text: str


class Status(TypedDict):
    """A daemon, as it is now.

    Attributes:
        version: of this dictionary. name: the device's. edgeadapt: the version that runs. uptime_s: since it started.
        mode: "starting" while the model is made ready, "serving", "safe" where less is done than was asked for, "stopping".
        reason: why it is not serving, or less than was asked for; else "".
        guard: None without one. source, queue, predictions, compare, memory, state, board: see there.
        interfaces: of HTTP and MQTT, where they are enabled, why they are not there now; "" where they are.
        events: the latest twenty, the oldest first. classes: their names, in the order of their numbers; None where they have none.
    """

    version: int
    name: str
    edgeadapt: str
    uptime_s: float
    mode: Literal["starting", "serving", "safe", "stopping"]
    reason: str
    bundle: BundleStatus | None
    guard: GuardStatus | None
    adaptation: AdaptationStatus
    source: SourceStatus
    queue: QueueStatus
    predictions: PredictionsStatus
    compare: CompareStatus
    memory: MemoryStatus
    state: StateStatus
    board: BoardStatus
    interfaces: dict[str, str]
    events: list[EventStatus]
    classes: list[str] | None
