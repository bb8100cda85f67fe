"""What a bundle would take on a board: does it fit, line by line, which of its configurations would, and what stands at the peak. Nothing is run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from edgeadapt.bundle import Bundle
from edgeadapt.errors import BudgetError, UsageError
from edgeadapt.memory import costs, cuda, quantised
from edgeadapt.memory.curve import Curve, curve
from edgeadapt.memory.ledger import FIRST, Ledger, PreparedLike, Setup, layout, ledger, used
from edgeadapt.units import format_bytes

ROLES = ("predict", "adapt", "learn")


class BoardLike(Protocol):
    """What is needed of a board; `edgeadapt.devices.boards` has them."""

    @property
    def key(self) -> str:
        """Its short name."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def memory(self) -> int:
        """Bytes that one process can use."""
        ...

    @property
    def page(self) -> int:
        """Bytes of a page."""
        ...

    @property
    def arm(self) -> bool:
        """64-bit Arm, else x86-64."""
        ...

    @property
    def floor(self) -> int:
        """Resident bytes of Python with numpy, onnxruntime and one trivial session."""
        ...

    @property
    def floor_known(self) -> str:
        """How: "measured" or "estimated"."""
        ...

    @property
    def code(self) -> int | None:
        """Of the floor, bytes of onnxruntime's code that an adapter with a budget gives back; None where that was not measured."""
        ...

    @property
    def gflops(self) -> float:
        """1e9 float32 operations a second of one core."""
        ...

    @property
    def gbps(self) -> float:
        """1e9 bytes a second."""
        ...

    @property
    def rates_known(self) -> str:
        """How the two are known."""
        ...

    @property
    def unified_gpu(self) -> bool:
        """A GPU takes its memory from the board's own. Asked only of the CUDA provider."""
        ...


@dataclass(frozen=True)
class Choice:
    """A configuration of a bundle.

    Attributes:
        role: "predict"; "adapt" and "learn" predict too.
        batch: frames in a step.
        graph: the graph of a step: a lean variant has a name of its own.
        graphs: all that are loaded for it.
        prepacking: whether onnxruntime keeps rearranged copies of weights.
        total: the process's peak, bytes.
        seconds: of a step, roughly.
        fits: whether the peak is within the limit; None without one.
        best: the one to take among those that fit.
        prepared: whether the step runs as `edgeadapt prepare` made it.
        micro: frames of a piece, where the step is taken in pieces: each is a run of `graph`, and the last of `graphs` ends the step. 0: it is not.
        singly: whether predictions are made frame by frame, for want of room for the graph that takes a whole batch.
    """

    role: str
    batch: int
    graph: str
    graphs: tuple[str, ...]
    prepacking: bool
    total: int
    seconds: float
    fits: bool | None = None
    best: bool = False
    prepared: bool = False
    micro: int = 0
    singly: bool = False

    @property
    def per_frame(self) -> float:
        """Seconds a frame."""
        return self.seconds / self.batch

    @property
    def predicts(self) -> int:
        """Frames that are predicted at once, at most."""
        return max((int(name.rpartition(".b")[2]) for name in self.graphs if name.startswith("predict.b")), default=1)

    @property
    def words(self) -> str:
        """In words: "adapt at batch 16 (adapt.b16.lean, without prepacked weights)", "adapt at batch 16 (in pieces of 4)"."""
        form = [f"in pieces of {self.micro}"] if self.micro else [self.graph] if self.graph != f"{self.role}.b{self.batch}" else []
        extra = [*form, *(["prepared"] if self.prepared else []), *([] if self.prepacking else ["without prepacked weights"])]
        extra += ["predicting frame by frame"] if self.singly else []
        return f"{self.role} at batch {self.batch}" + (f" ({', '.join(extra)})" if extra else "")


@dataclass(frozen=True)
class Simulation:
    """The answer.

    Attributes:
        bundle, digest: the file's name and the bundle's digest.
        board: name of the board; key its short one.
        choice: the configuration asked about, its ledger beside it.
        threads: of one operator.
        budget: bytes, or None; `fits` and `margin` are None then.
        choices: those that no other of the bundle's configurations beats in batch, memory and time a frame at once, least memory first.
        curves: of the graphs of a step and of prediction, the step's first.
        rates_known: how the board's rates, and so the times, are known.
        provider: onnxruntime's, "cpu" or "cuda". Of "cuda" no times are known: they order the choices as the processor's would, and are not told.
        passed_over: variants that are not used because the provider lacks operators of theirs and another has none such, with the operators.
        on_processor: graphs of which nodes run on the processor because the provider lacks them, with the operators.
        with_prepared: whether prepared graphs were counted where there are such.
    """

    bundle: str
    digest: str
    board: str
    key: str
    memory: int
    threads: int
    budget: int | None
    choice: Choice
    ledger: Ledger
    choices: tuple[Choice, ...]
    curves: tuple[Curve, ...]
    rates_known: str
    provider: str = "cpu"
    passed_over: tuple[str, ...] = ()
    on_processor: tuple[str, ...] = ()
    with_prepared: bool = False

    @property
    def fits(self) -> bool | None:
        """Whether the configuration is within the budget."""
        return self.choice.fits

    @property
    def margin(self) -> int | None:
        """Bytes left of the budget; negative where it does not fit."""
        return None if self.budget is None else self.budget - self.ledger.total

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{
                key: getattr(self, key)
                for key in ("bundle", "digest", "board", "key", "memory", "threads", "budget", "fits", "margin", "rates_known")
            },
            **{key: getattr(self, key) for key in ("provider", "passed_over", "on_processor")},
            "choice": self._told(self.choice),
            "ledger": self.ledger.plain(),
            "choices": [self._told(choice) for choice in self.choices],
            "curves": [item.plain() for item in self.curves],
        }

    def time(self, seconds: float) -> str:
        """A duration in words, where one is known."""
        return format_seconds(seconds) if self.provider == "cpu" else "–"

    @property
    def times(self) -> str:
        """How times are known, in a sentence's end."""
        return f"{self.rates_known} and rough" if self.provider == "cpu" else "not known for a GPU"

    def _told(self, choice: Choice) -> dict[str, Any]:
        return {**asdict(choice), **({} if self.provider == "cpu" else {"seconds": None})}

    def check(self) -> None:
        """Whether it fits.

        Raises:
            BudgetError: it does not; the message has every line, the hint the nearest configurations that do.
        """
        if self.budget is None or self.fits:
            return
        total, budget = format_bytes(self.ledger.total), format_bytes(self.budget)
        more = format_bytes(self.ledger.total - self.budget)
        raise BudgetError(f"{self.choice.words} needs {total}, {more} more than the budget of {budget}:\n{self.ledger.table()}", self._nearest())

    def _nearest(self) -> str:
        fitting = [choice for choice in self.choices if choice.fits]
        if not fitting:
            least = min(self.choices, key=lambda choice: choice.total)
            return f"nothing in this bundle fits; the least is {least.words} with {format_bytes(least.total)}"
        near = [max((c for c in fitting if c.role == role), key=_rank, default=None) for role in (self.choice.role, *_others(self.choice.role))]
        named = [f"{choice.words} with {format_bytes(choice.total)}" for choice in near if choice]
        return f"what fits: {'; '.join(named)}"


def _others(role: str) -> list[str]:
    return [other for other in ("adapt", "predict", "learn") if other != role]


def _rank(choice: Choice) -> tuple[int, float, bool]:
    return choice.batch, -choice.seconds, not choice.singly


def simulate(
    bundle: Bundle,
    board: BoardLike,
    role: str | None = None,
    batch: int | None = None,
    budget: int | None = None,
    threads: int = 1,
    prepared: PreparedLike | None = None,
    provider: str = "cpu",
    slack: int = 0,
    answering: bool = False,
) -> Simulation:
    """What a configuration of a bundle takes on a board.

    A role and batch may have several forms: leaner graphs of the same step, the step in pieces, and onnxruntime's copies of weights left out. The
    quickest that fits is taken, as an adapter with that budget would.

    Args:
        bundle: the bundle.
        board: where it would run.
        role: "predict", "adapt" or "learn"; None: adapt if the bundle can.
        batch: None: the largest of that role.
        budget: the most bytes that the process may hold; None: no limit.
        threads: that one operator may use.
        prepared: what was prepared of the bundle for that machine and number of threads; None: the graphs as exported.
        provider: onnxruntime's: "cpu", or "cuda", whose memory counts where the board's GPU has none of its own.
        slack: bytes kept free for the program around it.
        answering: frames are answered while a step runs.

    Raises:
        UsageError: the bundle has no graph of that role and batch, there is no such provider, or it cannot answer while a step runs.
        BundleError: it is damaged.
    """
    asked = (bundle, board, role, batch, budget, threads)
    if answering and cuda.is_cuda(provider):
        raise UsageError("frames are answered while a step runs on the processor only", "leave out one of the two")
    found = _simulated(*asked, prepared, provider, slack, answering)
    if prepared is None or found.fits is not False:
        return found
    plain = _simulated(*asked, None, provider, slack, answering)  # an adapter serves the exported graphs where only they fit
    return plain if plain.fits else found


def _simulated(
    bundle: Bundle,
    board: BoardLike,
    role: str | None,
    batch: int | None,
    budget: int | None,
    threads: int,
    prepared: PreparedLike | None,
    provider: str,
    slack: int,
    answering: bool,
) -> Simulation:
    manifest = bundle.manifest
    role = role or ("adapt" if manifest.planned("adapt") else "predict")
    sizes = manifest.planned(role)
    if role not in ROLES or not sizes:
        raise UsageError(f"this bundle ({manifest.method.name}) has no graph to {role}", f"it can {', '.join(_roles(bundle))}")
    if batch is not None and batch not in sizes:
        raise UsageError(f"this bundle cannot {role} with batch {batch}", f"it has {', '.join(map(str, sorted(sizes)))}")
    batch = batch or sizes[0]
    device = cuda.Device(board.unified_gpu) if cuda.is_cuda(provider) else None
    here: dict[str, Any] = {"threads": threads, "page": board.page, "arm": board.arm, "started": board.code, "answering": answering}
    base = Setup((), board.floor, board.floor_known, prepared=prepared, device=device, slack=slack, **here)
    missing = {name: cuda.lacking(layout(bundle, name, base.machine).graph, manifest.opset) for name in manifest.graphs} if device else {}
    passed = _passed_over(bundle, missing)
    shown = [name for name in _roles(bundle) if name != "learn" or role == "learn"]
    pace = _pace(bundle, board, base)
    found = [_limited(choice, budget) for name in shown for choice in _choices(bundle, board, base, name, passed, pace)]
    forms = [choice for choice in found if choice.role == role and choice.batch == batch]
    forms.sort(key=lambda choice: (choice.seconds, choice.singly, choice.total))
    asked = next((choice for choice in forms if choice.fits is not False), min(forms, key=lambda choice: choice.total))
    lines = ledger(bundle, replace(base, graphs=asked.graphs, prepacking=asked.prepacking, frames=asked.batch))
    steps = dict.fromkeys([asked.graph, *(name for name in asked.graphs if name != FIRST)])
    curves = (curve(name, item.graph, item.plan) for name in steps for item in (layout(bundle, name, base.machine, prepared),))
    return Simulation(
        bundle.path.name,
        bundle.digest,
        board.name,
        board.key,
        board.memory,
        threads,
        budget,
        asked,
        lines,
        _front(found, role),
        tuple(curves),
        board.rates_known if prepared is None else f"{board.rates_known}, or measured when a graph was prepared,",
        provider,
        tuple(_with(name, missing) for name in passed),
        tuple(_with(name, missing) for name in used(asked.graphs) if missing.get(name)),
        prepared is not None,
    )


def _passed_over(bundle: Bundle, missing: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The variants that are not used because another runs wholly on the GPU."""
    specs = bundle.manifest.graphs.values() if missing else ()
    steps = dict.fromkeys((spec.role, spec.batch) for spec in specs)
    return tuple(name for role, batch in steps for name in cuda.fitting(bundle.manifest.forms(role, batch), missing)[1])


def _with(name: str, missing: Mapping[str, tuple[str, ...]]) -> str:
    return f"{name} ({', '.join(missing[name])})"


def _roles(bundle: Bundle) -> list[str]:
    return [role for role in ROLES if bundle.manifest.planned(role)]


def _choices(
    bundle: Bundle, board: BoardLike, base: Setup, role: str, passed: Sequence[str], pace: Mapping[str, float]
) -> Iterator[Choice]:
    manifest, ready = bundle.manifest, base.prepared
    for form in (form for batch in reversed(manifest.planned(role)) for form in manifest.forms(role, batch)):
        if not set(passed).isdisjoint(form.graphs):
            continue
        times = [pace.get(name) or pace[""] * _seconds(bundle, board, base, name) for name in form.graphs]
        time = times[0] * (form.batch // form.micro if form.micro else 1) + sum(times[1:])
        made = ready is not None and form.graphs[0] in ready.graphs
        slower = UNPACKED_BYTES if _on_bytes(bundle, base, form.graphs) else UNPACKED
        beside = f"predict.b{form.micro or form.batch}"
        for singly in (False, True) if beside in manifest.graphs and beside not in (FIRST, *form.graphs) else (False,):
            graphs = tuple(dict.fromkeys((FIRST, *([beside] if beside in manifest.graphs and not singly else []), *form.graphs)))
            totals = [ledger(bundle, replace(base, graphs=graphs, prepacking=kept, frames=form.batch)).total for kept in (True, False)]
            first = Choice(role, form.batch, form.graphs[0], graphs, True, totals[0], time, prepared=made, micro=form.micro, singly=singly)
            yield first
            if totals[1] < (1 - WORTH) * totals[0]:
                yield replace(first, prepacking=False, total=totals[1], seconds=time * slower)


def _on_bytes(bundle: Bundle, base: Setup, names: Iterable[str]) -> bool:
    return any(quantised.copied(layout(bundle, name, base.machine, base.prepared).graph) for name in names)


def _pace(bundle: Bundle, board: BoardLike, base: Setup) -> dict[str, float]:
    """Seconds of the graphs that were timed when they were prepared, and as "" how much longer they took than is estimated."""
    found = {} if base.prepared is None else dict(base.prepared.seconds)
    ratios = sorted(seconds / _seconds(bundle, board, base, name) for name, seconds in found.items())
    return {**found, "": ratios[len(ratios) // 2] if ratios else 1.0}


def _seconds(bundle: Bundle, board: BoardLike, base: Setup, name: str) -> float:
    return costs.seconds(layout(bundle, name, base.machine, base.prepared).graph, board.gflops, board.gbps, base.threads)


WORTH = 0.005
"""Share of the memory that must be saved for a configuration without prepacked weights to be listed."""

UNPACKED = 1.04
"""How much longer a step takes without prepacked weights: 3 to 4 % measured on a WideResNet-40-2."""

UNPACKED_BYTES = 2.0
"""The same where convolutions work on bytes: 1.5 to 3 measured, more where images are small."""


def format_seconds(value: float) -> str:
    """A duration in milliseconds, or from one second on in seconds."""
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _limited(choice: Choice, budget: int | None) -> Choice:
    return choice if budget is None else replace(choice, fits=choice.total <= budget)


def _front(found: Sequence[Choice], role: str) -> tuple[Choice, ...]:
    """Those that no other of their role beats, the best of those that fit marked."""

    def beats(one: Choice, other: Choice) -> bool:
        mine, its = ((choice.total, choice.per_frame, -choice.batch, choice.singly) for choice in (one, other))
        return one.role == other.role and mine != its and all(a <= b for a, b in zip(mine, its))

    kept = [choice for choice in found if not any(beats(other, choice) for other in found)]
    fitting = [choice for choice in kept if choice.fits is not False]
    order = [role, *_others(role)]
    best = max(fitting, key=lambda choice: (-order.index(choice.role), *_rank(choice)), default=None)
    marked = [replace(choice, best=choice is best) for choice in kept]
    return tuple(sorted(marked, key=lambda choice: (ROLES.index(choice.role), choice.total)))
