"""Which steps can be taken in pieces: the micro-batches worth having are compiled, and each is checked against the whole step that it stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from onnxruntime import InferenceSession
from torch import Tensor

from edgeadapt.bundle.roles import STEPS
from edgeadapt.errors import ExportError
from edgeadapt.exporters.compile import Compiled, Lowered, PlacedWeights, lowered, named_refusals, scheduled
from edgeadapt.exporters.emit import to_onnx
from edgeadapt.exporters.execution import open_session
from edgeadapt.exporters.ir import Array
from edgeadapt.exporters.micro import Sums, check_in_place, update_of
from edgeadapt.exporters.options import divides
from edgeadapt.exporters.programs import Program
from edgeadapt.exporters.schedules import WORTH, Schedules
from edgeadapt.exporters.selfcheck import Difference, compare_at, examples, refuse
from edgeadapt.memory.footprint import sums_bytes

SHARE = 4
"""The larger micro-batch that is offered by itself is at most this part of its batch; the smaller one is a single frame."""

Made = Callable[[str, int], Sums]
"""The sums' program of a step's role over so many frames."""


@dataclass
class Pieces:
    """Graphs for steps in pieces, how far each is from PyTorch, and why those that were tried and are not there were left out, by their names."""

    compiled: list[Compiled] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def suited(batch: int) -> list[int]:
    """The micro-batches that are tried for a batch, the larger first."""
    divisors = [size for size in range(1, batch // SHARE + 1) if batch % size == 0]
    return sorted({*divisors[-1:], *([1] if batch > 1 else [])}, reverse=True)


def cut_steps(
    compiled: Sequence[Compiled],
    made: Made,
    sizes: Sequence[int] | None,
    weights: PlacedWeights,
    schedules: Schedules | None = None,
    known: Lowered | None = None,
    checked: bool = True,
) -> Pieces:
    """Compile and check micro-batches for the steps that were compiled.

    One that cannot be compiled, or whose runs together are not the whole step, as where a layer looks at several frames at once, is left out.

    Args:
        compiled: the bundle's graphs, each step with its variants.
        made: gives the programs.
        sizes: the micro-batches; None: those of `suited` that save memory: of the tensors and the sums together, a tenth of what the leanest form
            before takes.
        weights: the bundle's.
        schedules: found before, and kept.
        known: graphs lowered before, and kept.
        checked: whether they are run beside PyTorch; without, the differences are none.
    """
    cutter = _Cutter(made, sizes, weights, schedules or Schedules(), {} if known is None else known, checked)
    for role in STEPS:
        whole: dict[int, list[Compiled]] = {}
        for item in compiled:
            if item.program.role == role:
                whole.setdefault(item.program.batch, []).append(item)
        cutter.cut(role, whole)
    return cutter.found


@dataclass
class _Cutter:
    """What `cut_steps` was given, and what it has found."""

    made: Made
    sizes: Sequence[int] | None
    weights: PlacedWeights
    schedules: Schedules
    known: Lowered
    checked: bool
    found: Pieces = field(default_factory=Pieces)

    def cut(self, role: str, whole: Mapping[int, Sequence[Compiled]]) -> None:
        """The micro-batches of a role's steps, which are given by their batch with their variants."""
        least = {batch: min(item.region for item in forms) for batch, forms in whole.items()}
        tried = {size for batch in whole for size in (suited(batch) if self.sizes is None else self.sizes)}
        update: Compiled | None = None
        differences: list[Difference] = []
        for size in sorted(tried, reverse=True):
            served = [batch for batch in whole if divides(size, batch)]
            if not served:
                continue
            try:
                program = self.made(role, size)
                sums = self.make(program)
                check_in_place(sums.graph, sums.sums)
                ending = update or self.make(update_of(program))
                need = max(sums.region, ending.region) + sums_bytes(sums.sums.values())
                worth = [batch for batch in served if size in suited(batch) and need <= WORTH * least[batch]]
                if self.sizes is None and not worth:
                    continue
                compared = [_compare(whole[batch][0], sums, ending) for batch in served if self.checked]
            except ExportError as reason:
                self.found.left_out[f"{role}-sums.b{size}"] = reason.message
                continue
            for batch in worth:
                least[batch] = need
            update = ending
            differences += compared
            self.keep(sums, compared)
        if update is not None:
            self.keep(update, differences)

    def make(self, program: Program) -> Compiled:
        """The graph of a program, its weights not in the bundle's yet: it may not be kept."""
        key = program.role, program.batch
        if key not in self.known:
            self.known[key] = lowered(program)
        (only,) = scheduled(program, self.known[key].copy(), PlacedWeights(), self.schedules)
        return only

    def keep(self, item: Compiled, differences: Sequence[Difference]) -> None:
        """Have a graph in the bundle, with the worst of its differences."""
        self.found.compiled.append(_kept(item, self.weights))
        if differences:
            self.found.differences.append(dataclasses.replace(reduce(Difference.or_worse, differences), graph=item.name))


def _kept(item: Compiled, weights: PlacedWeights) -> Compiled:
    return dataclasses.replace(item, model=to_onnx(item.graph, weights))


def _compare(whole: Compiled, sums: Compiled, update: Compiled) -> Difference:
    """How far a step in pieces is from what PyTorch makes of the whole batch; what is over tolerance is refused.

    Raises:
        ExportError: it is, or a graph cannot be run.
    """
    with named_refusals():
        sessions = [open_session(item.model, item.graph.constants) for item in (sums, update)]
    worst: Difference | None = None
    for example in examples(whole):
        with named_refusals():
            got = in_pieces(sessions[0], sessions[1], example, sums.program.batch)
        found = compare_at(whole, example, got)
        worst = found if worst is None else worst.or_worse(found)
    assert worst is not None
    worst = dataclasses.replace(worst, graph=f"{sums.name} at batch {whole.program.batch}")
    refuse(worst)
    return worst


def in_pieces(sums: InferenceSession, update: InferenceSession, example: Mapping[str, Tensor], size: int) -> dict[str, Array]:
    """What onnxruntime makes of a step's inputs in runs over `size` frames: the outputs of the whole step by name."""
    given = {name: value.numpy() for name, value in example.items()}
    names = {entry.name: entry.shape for entry in sums.get_inputs()}
    held = {name: np.zeros(shape, np.float32) for name, shape in names.items() if name.startswith("sum.")}
    logits = []
    for begin in range(0, len(given["x"]), size):
        part = {name: given[name][begin : begin + size] for name in ("x", "y") if name in names}
        feeds = {**{name: given[name] for name in names if name.startswith(("state.", "hyper."))}, **part, **held}
        found = _run(sums, feeds)
        logits.append(found.pop("logits"))
        held = {f"sum.{name.removeprefix('added.')}": value for name, value in found.items()}
    wanted = {entry.name for entry in update.get_inputs()}
    ended = _run(update, {name: value for name, value in {**given, **held}.items() if name in wanted})
    return {"logits": np.concatenate(logits), **ended}


def _run(session: InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))
