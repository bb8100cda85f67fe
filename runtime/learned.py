"""What steps alone change in an adapter: as it is now, the last good of it, what was laid by, and what the model started as."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from edgeadapt.errors import StateError
from edgeadapt.runtime.adapter import Adapter
from edgeadapt.runtime.kept import Copy, Kept
from edgeadapt.runtime.scores import distance
from edgeadapt.runtime.state import Floats


@contextmanager
def unchanged(adapter: Adapter, names: Collection[str]) -> Iterator[None]:
    """Has these tensors as they are, whatever is done within."""
    held = adapter.tensors(names)
    try:
        yield
    finally:
        adapter.put(held)


class Learned:
    """Of one adapter. Where it differs from the bundle's, as after a load, it is taken for what the model started as, until `go_on` says more.

    Args:
        adapter: the adapter.
        names: of the tensors.

    Attributes:
        names: see above. boxed: those that `away` looks at: parameters, where all are float32.
        good: what was proven last and is in use; None: nothing. laid_by: what was proven and is not in use, or to be proven anew; never both.
        taken_up: whether what is in the adapter began with what is laid by.
        unproven: whether there were steps since the last good, or since the start.
        wholly: whether what is in the adapter was learned while statistics followed wholly. It belongs with such statistics: what was added to
            scale and shift is only then taken out again by the next layer's.
    """

    def __init__(self, adapter: Adapter, names: Sequence[str]) -> None:
        self.names = list(names)
        parameters = [spec for spec in adapter.manifest.state if spec.name in self.names and spec.kind == "parameter"]
        self.boxed = [spec.name for spec in parameters] if all(spec.dtype == "float32" for spec in parameters) else []
        self.good: Copy | None = None
        self.laid_by: Copy | None = None
        self.unproven, self.wholly, self.taken_up = False, False, False
        self._adapter = adapter
        self._base: Copy | None = None
        self._start_here()

    def _start_here(self) -> None:
        """What there is is what the model started as; nothing is held of it where that is what the bundle began with."""
        self._base = None  # before there is another
        self._base = self._copy() if self.away() != 0 else None

    def _copy(self) -> Copy:
        return Copy(self._adapter.tensors(self.names), self.wholly)

    @contextmanager
    def _started(self) -> Iterator[Mapping[str, Floats]]:
        if self._base is not None:
            yield self._base.tensors
            return
        with self._adapter.bundle.stored_state() as stored:
            yield stored

    @property
    def behind(self) -> str:
        """What is put back: "good", the last good; else what the model started as: "marked", which was learned, or "start", as the bundle began."""
        return "good" if self.good is not None else "start" if self._base is None else "marked"

    def begin(self) -> None:
        """Puts the tensors as the model started, whatever is said of them here."""
        with self._started() as start:
            self._adapter.put({name: start[name] for name in self.names})

    def away(self) -> float:
        """How far parameters are from where they started; where they are not float32 NaN, or 0 where they are there."""
        with self._started() as start:
            now = self._adapter.tensors(self.names)
            if all((now[name] == start[name]).all() for name in now):
                return 0.0
            return distance({name: now[name] for name in self.boxed}, start) if self.boxed else math.nan

    def draw_back(self, share: float) -> None:
        """Leaves parameters this share of the way from where they started; one after the other, so that little is held beside them."""
        with self._started() as start:
            for name in self.boxed:
                now = self._adapter.tensors([name])[name]
                self._adapter.put({name: start[name] + (now - start[name]) * np.float32(share)})

    @property
    def in_use(self) -> bool:
        """Whether what is in the adapter may be other than what the model started as."""
        return self.unproven or self.good is not None

    @property
    def any(self) -> bool:
        """Whether it may be other than what the bundle began with."""
        return self.in_use or self._base is not None

    def stepped(self, wholly: bool) -> None:
        """There was a step, while statistics followed wholly or not."""
        self.unproven, self.wholly = True, self.wholly or wholly

    def keep(self) -> None:
        """What there is is the last good from now on."""
        self.good = self.laid_by = None  # before there is another
        self.good, self.unproven, self.taken_up = self._copy(), False, False

    def keep_as_start(self) -> None:
        """What there is is what the model started as from now on."""
        self.good = self.laid_by = None
        self._start_here()
        self.unproven, self.taken_up = False, False

    def put_back(self) -> None:
        """Puts the last good back, or what the model started as."""
        if self.good is None:
            self.begin()
        else:
            self._adapter.put(self.good.tensors)
        kept = self.good or self._base
        self.unproven, self.wholly, self.taken_up = False, kept is not None and kept.wholly, False

    def lay_by(self) -> None:
        """The last good is laid by: what the model started as is what is put back from now on."""
        self.laid_by, self.good = self.good or self.laid_by, None

    def take_up(self) -> None:
        """Puts what was laid by in use again: it is to be proven anew, and stays laid by until it is."""
        assert self.laid_by is not None
        self._adapter.put(self.laid_by.tensors)
        self.unproven, self.wholly, self.taken_up = True, self.laid_by.wholly, True

    def drop(self) -> None:
        """Nothing but what the model started as is left to be put back."""
        self.good = self.laid_by = None

    def reset(self) -> None:
        """The whole state was put back to the bundle's."""
        self.good = self.laid_by = self._base = None
        self.unproven, self.wholly, self.taken_up = False, False, False

    # ------------------------------------------------------------------------------------------------------- across restarts

    @contextmanager
    def proven(self) -> Iterator[tuple[Kept, Mapping[str, Floats]]]:
        """What is to be kept of it, steps that are not yet proven left out; with the tensors that are then to stand where the adapter's are."""
        if self.good is not None:
            yield Kept(True, self.good.wholly, self._base), self.good.tensors if self.unproven else {}
            return
        known = Kept(False, self._base is not None and self._base.wholly, None, self.laid_by)
        if not self.unproven:
            yield known, {}
            return
        with self._started() as start:
            yield known, {name: start[name] for name in self.names}

    def check(self, kept: Kept) -> None:
        """See that what was kept can be gone on with.

        Raises:
            StateError: steps of the bundle that it was kept of change other tensors.
        """
        for copy in (kept.start, kept.laid_by):
            if copy is not None and set(copy.tensors) != set(self.names):
                raise StateError("the state was learned by steps that change other tensors", "load it into the bundle it was saved from")

    def go_on(self, kept: Kept | None) -> None:
        """The adapter's state was put in place, and this is what was kept of it; with None it is what the model started as."""
        self.reset()
        if kept is None or not kept.proven:
            self.wholly = kept is not None and kept.wholly
            self._start_here()
            self.laid_by = None if kept is None else kept.laid_by
        else:
            self._base, self.wholly = kept.start, kept.wholly
            self.good = self._copy()
