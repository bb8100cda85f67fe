"""What happened, in memory: the latest events, and whoever wants to hear of new ones without holding up those who tell them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType

KEPT, WAITING = 200, 256
"""Events that are remembered, and that wait for one subscriber, at most."""

LOST = "lost"
"""Kind of the event that tells a subscriber how many it was too slow for, in `facts["count"]`."""


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        number: counts all that is told, from 1 on. time: in seconds of Unix time. monotonic: in seconds of `time.monotonic`.
        kind: one of a few words, such as "rolled back".
        text: what a person reads.
        facts: the same for programs, in JSON values.
    """

    number: int
    time: float
    monotonic: float
    kind: str
    text: str
    facts: Mapping[str, object] = field(default_factory=dict)

    def plain(self) -> dict[str, object]:
        """As JSON values, without `monotonic`, which means nothing to others."""
        return {"number": self.number, "time": round(self.time, 3), "kind": self.kind, "text": self.text, "facts": dict(self.facts)}


class Subscription:
    """What one subscriber has not yet taken. Made by `Events.subscribe`; for one thread that takes.

    Attributes:
        lost: events that it was too slow for, so far.
    """

    def __init__(self, events: Events, kinds: frozenset[str] | None, without: frozenset[str], limit: int) -> None:
        self._events, self._kinds, self._without, self._waiting = events, kinds, without, deque[Event](maxlen=limit)
        self._filled = threading.Condition()
        self._missed, self._closed = 0, False
        self.lost = 0

    def wants(self, kind: str) -> bool:
        """Whether it takes events of that kind."""
        return (self._kinds is None or kind in self._kinds) and kind not in self._without

    def offer(self, event: Event) -> None:
        """Puts an event last; where there is no room the first is lost. Never waits for who takes."""
        with self._filled:
            if self._closed:
                return
            if len(self._waiting) == self._waiting.maxlen:
                self._missed, self.lost = self._missed + 1, self.lost + 1
            self._waiting.append(event)
            self._filled.notify()

    def take(self, seconds: float | None = None) -> Event | None:
        """The next event; first one of kind "lost" where some were. None after so many seconds without one (None: never), or when it is closed."""
        with self._filled:
            self._filled.wait_for(lambda: self._waiting or self._closed, seconds)
            if not self._waiting:
                return None
            if self._missed:
                missed, self._missed, after = self._missed, 0, self._waiting[0]
                text = f"{missed} events came faster than they were taken and are lost"
                return Event(after.number - 1, after.time, after.monotonic, LOST, text, {"count": missed})
            return self._waiting.popleft()

    def each(self, seconds: float = 0.5) -> Iterator[Event | None]:
        """The events as they come, and None whenever there was none for so many seconds, until it is closed; closes it at the end."""
        with self:
            while not self.closed:
                yield self.take(seconds)

    @property
    def closed(self) -> bool:
        """Whether nothing will come any more, and all that came was taken."""
        with self._filled:
            return self._closed and not self._waiting

    def close(self) -> None:
        """Nothing more is offered; who waits in `take` goes on. A second close does nothing."""
        self._events.forget(self)
        with self._filled:
            self._closed = True
            self._filled.notify_all()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Events:
    """The latest events, and their subscribers. For any thread; nobody who tells something waits for those who listen.

    Args:
        kept: events that are remembered.
        wall, clock: seconds of Unix time, and monotonic ones.
    """

    def __init__(self, kept: int = KEPT, wall: Callable[[], float] = time.time, clock: Callable[[], float] = time.monotonic) -> None:
        self._kept: deque[Event] = deque(maxlen=kept)
        self._subscribers: tuple[Subscription, ...] = ()
        self._lock = threading.Lock()
        self._number, self._wall, self._clock = 0, wall, clock

    def tell(self, kind: str, text: str, facts: Mapping[str, object] | None = None) -> Event:
        """Something happened: it is remembered, and told to those who want its kind."""
        return self._told(kind, text, facts, True)

    def pass_on(self, kind: str, text: str, facts: Mapping[str, object] | None = None) -> Event:
        """The same for what comes so often that it is not remembered, such as predictions. Ask `wanted` first whether it is worth the work."""
        return self._told(kind, text, facts, False)

    def wanted(self, kind: str) -> bool:
        """Whether a subscriber wants events of that kind now."""
        return any(subscriber.wants(kind) for subscriber in self._subscribers)

    def latest(self, count: int | None = None) -> list[Event]:
        """The latest events that are remembered, at most so many, the oldest first."""
        with self._lock:
            kept = list(self._kept)
        return kept if count is None else kept[max(0, len(kept) - count) :]

    def subscribe(self, kinds: Collection[str] | None = None, limit: int = WAITING, without: Collection[str] = ()) -> Subscription:
        """All that is told from now on, or what of it is of these kinds, and of none of those in `without`.

        At most `limit` events (1 or more) wait; then the oldest are lost.
        """
        subscription = Subscription(self, None if kinds is None else frozenset(kinds), frozenset(without), max(1, limit))
        with self._lock:
            self._subscribers = (*self._subscribers, subscription)
        return subscription

    def forget(self, subscription: Subscription) -> None:
        """It is offered nothing more; `Subscription.close` calls this."""
        with self._lock:
            self._subscribers = tuple(other for other in self._subscribers if other is not subscription)

    def close(self) -> None:
        """Closes every subscription, so that those who wait for events go on."""
        for subscription in self._subscribers:
            subscription.close()

    def _told(self, kind: str, text: str, facts: Mapping[str, object] | None, keep: bool) -> Event:
        with self._lock:  # offered under it too, so that all hear of events in their order
            self._number += 1
            event = Event(self._number, self._wall(), self._clock(), kind, text, dict(facts or {}))
            if keep:
                self._kept.append(event)
            for subscriber in self._subscribers:
                if subscriber.wants(kind):
                    subscriber.offer(event)
        return event
