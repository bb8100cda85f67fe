"""Graphs bound to memory: what one run needs is prepared once, so that a run costs little more than onnxruntime's own time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeadapt.bundle import Bundle, GraphSpec
from edgeadapt.bundle.roles import GUARD
from edgeadapt.errors import BudgetError
from edgeadapt.memory.graph import OWN
from edgeadapt.runtime import providers
from edgeadapt.runtime import session as sessions
from edgeadapt.runtime.copies import Copies, mapped
from edgeadapt.runtime.prepared import Prepared
from edgeadapt.runtime.state import FlatState, Floats, Sums


def rehearse(path: str | os.PathLike[str]) -> None:
    """Opens a bundle and loads every graph of it as an adapter would, but runs none.

    Raises:
        BundleError: it cannot be opened, or a graph cannot be loaded.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    engine = Engine(bundle, FlatState(manifest.state, manifest.graphs, bundle.initial_state()), 1)
    for name in manifest.graphs:
        engine.prepare(name)


class Outcome(NamedTuple):
    """One run's results.

    Attributes:
        logits: float32 [B,C,...]; the engine's memory, valid until its next run.
        metrics: the graph's scalars by name.
        finite: whether the new state, what it was made of, and the loss were finite; if not, the state is as it was.
    """

    logits: Floats
    metrics: dict[str, float]
    finite: bool


class Engine:
    """The graphs of a bundle over one state. Not thread-safe: one run at a time.

    Sessions are made when a graph is first run. All graphs share the buffers for frames, labels and logits, sized for the largest batch.

    Args:
        bundle: the bundle.
        state: its state, which runs read and, committed, swap.
        threads: onnxruntime's threads for one operator.
        names: the graphs that will be run; None for all of the bundle.
        prepared: graphs of it to run instead of the exported ones; None for none.
        planned: a plan was made for those, so that the exported ones may not take their place.
        limits: on a GPU, of what the session of each graph may take of its memory, 0 for no limit; None: on the CPU.
        shared: another engine of the same graphs, prepared or not, whose mapping of the weights this one uses too.

    Raises:
        Unprepared: with `planned`, what was prepared has gone. So may `prepare`.
        EdgeAdaptError: with `limits`, the GPU's provider does not start.
    """

    def __init__(
        self,
        bundle: Bundle,
        state: FlatState,
        threads: int,
        names: Iterable[str] | None = None,
        prepared: Prepared | None = None,
        planned: bool = False,
        limits: Mapping[str, int] | None = None,
        shared: Engine | None = None,
    ) -> None:
        if limits is not None:
            providers.start()
        self._bundle, self._state, self._threads = bundle, state, threads
        self._planned, self._limits = planned, limits
        self._fresh = limits is not None
        self._prepared, own = sessions.usable(bundle, prepared, planned)
        self._weights: sessions.Weights = sessions.Weights(bundle, own) if shared is None else shared._weights
        self._graphs: dict[str, _Graph] = {}
        self._copies = Copies()
        graphs = bundle.manifest.graphs
        self._batch = max(graphs[name].batch for name in (graphs if names is None else names))
        self._frames = np.zeros((self._batch, *bundle.manifest.input.shape), np.float32)
        self._logits = np.zeros((0, 0), np.float32)
        self._labels = np.zeros(0, np.int64)
        self._sums = Sums(bundle.manifest, graphs if names is None else names)
        self._values: dict[tuple[str, int], Any] = {}
        self._initial: dict[str, Any] = {}

    def frames(self, batch: int) -> Floats:
        """The memory [batch,*input.shape] that the next run of a graph of that batch takes its frames from."""
        return self._frames[:batch]

    @property
    def sums(self) -> Floats:
        """The memory of what a step in pieces adds up; empty if no graph is run that does."""
        return self._sums.buffer

    def prepare(self, name: str) -> None:
        """Loads a graph before it is first run.

        Raises:
            BundleError: it cannot be loaded.
        """
        self._graph(name)

    def settle(self) -> None:
        """Binds the graphs that are loaded to all sets of the state, so that no later run takes more memory than the first."""
        if self._fresh:
            return
        state = self._state
        now = tuple(state.parity)
        for graph in self._graphs.values():
            for parity in product(*(range(len(group.sets)) for group in state.groups)):
                state.parity[:] = parity
                graph.binding(state.parity)
        state.parity[:] = now

    def rehearsed(self, names: Iterable[str]) -> bool:
        """Whether a run of each of these graphs, on whatever lies in their inputs, goes through. The state is as it was."""
        try:
            for name in names:
                self.run(name, {}, commit=False)
        except BudgetError:
            return False
        return True

    def labels(self, name: str) -> NDArray[np.int64]:
        """The memory that a learn graph takes its labels from: int64 [B], or [B,...] as the logits without their classes."""
        batch = self._graph(name).spec.batch  # first, as it makes the buffer
        return self._labels[:batch]

    def label_shape(self) -> tuple[int, ...]:
        """The shape of one frame's labels: that of its logits without their classes."""
        return self.output_shape()[1:]

    def output_shape(self) -> tuple[int, ...]:
        """The shape of one frame's logits."""
        return self._graph("predict.b1").logits.shape[1:]

    def begin(self) -> None:
        """Begins a step in pieces: what another left of the sums, finite or not, is gone."""
        self._sums.buffer[...] = 0.0

    def run(self, name: str, hyper: Mapping[str, float], commit: bool = True) -> Outcome:
        """Runs a graph on what `frames` (and `labels`) hold.

        Args:
            name: the graph. One of role source reads the initial state and never writes; one that takes some of a step's frames writes sums alone,
                and the one that ends such a step takes no frames and gives no logits.
            hyper: values for the scalars it takes; those not given have the graph's own default, else the manifest's.
            commit: make the new state the current one if it is finite, and the loss too.

        Raises:
            BundleError: the graph cannot be loaded or run; the state is as it was.
            BudgetError: memory ran out; the state is as it was.
        """
        graph, state = self._graph(name), self._state
        self._copies.running(name)
        for index, (key, default) in enumerate(graph.defaults.items()):
            graph.hyper[index] = hyper.get(key, default)
        try:
            binding = graph.binding(state.parity)
            graph.session.run_with_iobinding(binding)
            if self._fresh:
                binding.synchronize_outputs()
        except Exception as reason:  # RuntimeError today, but the type has changed between releases
            raise sessions.failure(f"graph {name} failed", reason) from None
        metrics = dict(zip(graph.spec.metrics, graph.metrics.tolist())) if graph.spec.metrics else {}
        if not commit or graph.spec.role == "source":
            return Outcome(graph.logits, metrics, True)
        written = state.written[name]
        finite = math.isfinite(metrics.get("loss", 0.0)) and math.isfinite(metrics.get(GUARD, 0.0)) and state.finite(written)
        if finite:
            state.swap(written)
        return Outcome(graph.logits, metrics, finite)

    def _graph(self, name: str) -> _Graph:
        graph = self._graphs.get(name)
        if graph is None:
            limit = None if self._limits is None else self._limits[name]
            ready = self._prepared.get(name)
            file = os.path.join(ready.folder, OWN) if ready is not None and ready.bytes else ""
            before = mapped(file) if file else frozenset()
            session = sessions.load(self._bundle, name, self._threads, self._weights, ready, self._planned, limit)
            self._copies.loaded(name, mapped(file) - before if file else before)
            graph = self._graphs[name] = self._assemble(session, name)
        return graph

    def _assemble(self, session: Any, name: str) -> _Graph:
        spec, state = self._bundle.manifest.graphs[name], self._state
        defaults = {key: spec.defaults.get(key, self._bundle.manifest.hyper[key].default) for key in spec.hyper}
        held = {key: onnxruntime.OrtValue.ortvalue_from_numpy(self._sums.view(key)) for key in spec.sums}
        if not spec.batch:
            return _Graph(session, spec, defaults, {}, self._logits[:0], state.touched[name], self._state_value, held, self._fresh)
        shape = sessions.output_shape(session)[1:]
        if not self._logits.size:
            self._logits = np.zeros((self._batch, *shape), np.float32)
        if self._logits.shape[1:] != shape:
            raise sessions.wrong(f"{self._bundle.path}: graph {name}: output logits", f"{list(self._logits.shape[1:])} a frame", str(list(shape)))
        fixed: dict[str, NDArray[Any]] = {"x": self.frames(spec.batch)}
        if spec.role.startswith("learn"):
            if not self._labels.size:
                self._labels = np.zeros((self._batch, *sessions.label_shape(session)[1:]), np.int64)
            fixed["y"] = self._labels[: spec.batch]
        touched, value = ((), self._source_value) if spec.role == "source" else (state.touched[name], self._state_value)
        return _Graph(session, spec, defaults, fixed, self._logits[: spec.batch], touched, value, held, self._fresh)

    def _state_value(self, name: str, following: bool) -> Any:
        """A tensor's current or following set as onnxruntime sees it, without a copy."""
        sets = self._state.views(name)
        index = self._state.current_set(name) ^ following
        if (name, index) not in self._values:
            self._values[name, index] = onnxruntime.OrtValue.ortvalue_from_numpy(sets[index])
        return self._values[name, index]

    def _source_value(self, name: str, following: bool) -> Any:
        """The initial tensor, read from the bundle when a source graph first needs one; what the graph would write is not kept."""
        if following:
            return None
        if name not in self._initial:
            wanted = {key for graph in self._bundle.manifest.graphs.values() if graph.role == "source" for key in graph.reads}
            with self._bundle.stored_state() as found:
                self._initial = {key: onnxruntime.OrtValue.ortvalue_from_numpy(found[key]) for key in wanted}
        return self._initial[name]


class _Graph:
    """A session, its scalars, and its bindings: one for every combination of current sets that it has met.

    fresh: a binding is good for one run. On a GPU, onnxruntime copies what is bound when it is bound, and would not see what is written to it later.
    """

    def __init__(
        self,
        session: Any,
        spec: GraphSpec,
        defaults: Mapping[str, float],
        fixed: Mapping[str, NDArray[Any]],
        logits: Floats,
        touched: tuple[int, ...],
        value: Callable[[str, bool], Any],
        sums: Mapping[str, Any],
        fresh: bool = False,
    ) -> None:
        self._fresh = fresh
        self.session, self.spec, self.defaults, self.logits = session, spec, defaults, logits
        self.hyper = np.zeros(len(spec.hyper), np.float32)
        self.metrics = np.zeros(len(spec.metrics), np.float32)
        self._touched, self._value = touched, value
        scalars = {f"hyper.{name}": self.hyper[index : index + 1].reshape(()) for index, name in enumerate(spec.hyper)}
        results = {f"metric.{name}": self.metrics[index : index + 1].reshape(()) for index, name in enumerate(spec.metrics)}
        results |= {"logits": logits} if spec.batch else {}
        self._inputs = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in {**fixed, **scalars}.items()}
        self._outputs = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in results.items()}
        self._inputs |= {f"sum.{name}": sums[name] for name in spec.sums}
        self._outputs |= {f"added.{name}": sums[name] for name in spec.sums if spec.batch}  # in place: nothing else reads them
        self._bindings: dict[tuple[int, ...], Any] = {}

    def binding(self, parity: list[int]) -> Any:
        """The binding for the sets that are current."""
        if self._fresh:
            return self._bind()
        key = tuple(parity[index] for index in self._touched)
        found = self._bindings.get(key)
        if found is None:
            found = self._bindings[key] = self._bind()
        return found

    def _bind(self) -> Any:
        binding = self.session.io_binding()
        inputs = {**self._inputs, **{f"state.{name}": self._value(name, False) for name in self.spec.reads}}
        outputs = {**self._outputs, **{f"new.{name}": self._value(name, True) for name in self.spec.writes}}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            if value is not None:
                binding.bind_ortvalue_output(name, value)
        if self._fresh:
            binding.synchronize_inputs()
        return binding
