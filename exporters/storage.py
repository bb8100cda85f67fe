"""What stands between a step's state and its method: how parameters and moments are held between steps, which neither methods nor optimisers know.

`Plain` holds them as they are. `Packed` holds them in small forms, in one matrix for all parameters with rows and one for all vectors: a step reads
what the model computes with, and writes what the optimiser's increments make of what is held. There is no other copy of a parameter or a moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgeadapt.bundle.roles import GUARD
from edgeadapt.exporters.forms import MOMENTS, PARAMETERS, ParameterForm, moved, stored, unit_of
from edgeadapt.exporters.noise import uniform
from edgeadapt.exporters.optimisers import OPTIMISERS, step
from edgeadapt.exporters.packing import Pack, Place, packs_of, rows_of

Tensors = dict[str, Tensor]
State = dict[str, tuple[str, Tensor]]
"""Name → (kind, initial value)."""

COUNTER = "counter"
_SMALL_ROW, _SMALL_RANGE, _START_VECTOR = 0.1, 0.01, 1.0
_STEM, _PREFIX = "parameters", "storage."


@dataclass(frozen=True)
class Tier:
    """Forms by name: of parameters with rows, of vectors."""

    name: str
    rows: str
    vectors: str
    summary: str


TIERS = {
    "compact": Tier("compact", "split16", "whole16", "parameters in 16 bits, of which 8 are used to predict, moments in 8"),
    "tiny": Tier("tiny", "chance8", "whole16", "parameters in 8 bits, rounded by chance, moments in 8"),
}
"""The small tiers; "reference" is float32."""


@dataclass(frozen=True)
class Seen:
    """A state tensor as numbers, to be compared.

    Attributes:
        values: what is held stands for.
        gaps: from each to the next number that could be held; 0 for float32.
        weights: of each in a comparison, 0 to 1: under Adam an update's size does not tell its gradient's, which may be rounding alone.
    """

    values: Tensor
    gaps: Tensor
    weights: Tensor


class Storage(Protocol):
    """How a model's parameters and moments are held. All functions are pure."""

    def only(self, names: Mapping[str, Tensor]) -> Storage:
        """The same for some of the parameters."""
        ...

    def state(self, parameters: Tensors, optimiser: str, trains: bool) -> State:
        """What is held at the start."""
        ...

    def frozen(self) -> Tensors:
        """Tensors that reading and writing need and that never change."""
        ...

    def read(self, names: Mapping[str, Tensor], state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensors:
        """The parameters `names`, as the model computes with them."""
        ...

    def write(
        self, optimiser: str, gradients: Tensors, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """What is held after a step with these gradients, by the names of `state`; and metrics."""
        ...

    def seen(self, optimiser: str, state: Mapping[str, Tensor]) -> dict[str, Seen]:
        """The parameters and moments of a state."""
        ...


class Plain:
    """Parameters and moments as they are, float32."""

    def only(self, names: Mapping[str, Tensor]) -> Plain:
        """Nothing is kept of them."""
        return self

    def state(self, parameters: Tensors, optimiser: str, trains: bool) -> State:
        """Each tensor by its own name."""
        table: State = {name: ("parameter", value) for name, value in parameters.items()}
        moments = OPTIMISERS[optimiser].init(parameters) if trains else {}
        return table | {name: ("moment", value) for name, value in moments.items()}

    def frozen(self) -> Tensors:
        """None."""
        return {}

    def read(self, names: Mapping[str, Tensor], state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensors:
        """Themselves."""
        return {name: state[name] for name in names}

    def write(
        self, optimiser: str, gradients: Tensors, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """The optimiser's own step."""
        rule = OPTIMISERS[optimiser]
        parameters = {name: state[name].detach() for name in gradients}
        moments = {name: state[name] for name in rule.init(dict.fromkeys(parameters, torch.zeros(())))}
        values, following = step(rule, gradients, parameters, moments, hyper)
        return {**values, **following}, {}

    def seen(self, optimiser: str, state: Mapping[str, Tensor]) -> dict[str, Seen]:
        """Each as it is."""
        nothing = torch.zeros(())
        return {name: Seen(value, nothing, _confidence(state.get(f"first.{name}"))) for name, value in state.items()}


@dataclass(frozen=True)
class _Part:
    """Some blocks of a pack: the state tensor that holds their parameters, its form, its units, and a number of its own for random numbers."""

    name: str
    begin: int
    end: int
    form: ParameterForm
    unit: Tensor
    stream: int

    def of(self, matrix: Tensor) -> Tensor:
        """These blocks of a matrix of the whole pack."""
        return matrix.narrow(0, self.begin, self.end - self.begin)

    def meets(self, begin: int, end: int) -> bool:
        """Whether some of these blocks are its own."""
        return begin < self.end and self.begin < end

    @property
    def range(self) -> float:
        """The units in a 256th of its range."""
        return (self.form.high - self.form.low + 1) / 256


class Packed:
    """Parameters and moments in the forms of a tier.

    The state has for each pack `PACK.rows` and `PACK.vectors`, whole numbers, and `….unit`, one a block; for each moment M of the optimiser `M.PACK`,
    codes, and `M.PACK.scale`, one a block. Units are state, though no graph writes them: so a saved state says all that it means.

    Args:
        tier: which forms.
        parameters: float32, as they are first stored; the units follow from them.
        seed: of rounding by chance.
    """

    def __init__(self, tier: Tier, parameters: Mapping[str, Tensor], seed: int) -> None:
        self.tier, self.seed = tier, seed
        self.parameters = {name: value.detach() for name, value in parameters.items()}
        self.packs: dict[Pack, list[_Part]] = {}
        for pack in packs_of(_STEM, {name: tuple(value.shape) for name, value in self.parameters.items()}):
            largest = pack.spread({place.name: _largest(self.parameters[place.name]) for place in pack.places})
            ends = {"rows": (0, pack.divide, PARAMETERS[tier.rows]), "vectors": (pack.divide, pack.blocks, PARAMETERS[tier.vectors])}
            self.packs[pack] = [
                _Part(f"{pack.name}.{kind}", begin, end, form, unit_of(form, largest[begin:end]), 2 * len(self.packs) + (kind == "vectors"))
                for kind, (begin, end, form) in ends.items()
                if begin < end
            ]

    def only(self, names: Mapping[str, Tensor]) -> Packed:
        """With the same values and units."""
        return Packed(self.tier, {name: value for name, value in self.parameters.items() if name in names}, self.seed)

    def values(self) -> Tensors:
        """The parameters as the model computes with them at the start."""
        held = {name: value for name, (_, value) in self.state({}, "", False).items()}
        return self.read(self.parameters, held, {})

    def state(self, parameters: Tensors, optimiser: str, trains: bool) -> State:
        """What is held of the parameters that this was made with."""
        table: State = {}
        for pack, parts in self.packs.items():
            values = pack.gather(self.parameters)
            for part in parts:
                held = stored(part.form, part.of(values), part.unit)
                table |= {part.name: ("parameter", held), f"{part.name}.unit": ("parameter", part.unit)}
        if not trains:
            return table
        whole = {pack.name: torch.zeros(pack.blocks, pack.width) for pack in self.packs}
        for name, value in OPTIMISERS[optimiser].init(whole).items():
            table |= {key: ("moment", found) for key, found in self._held(optimiser, name, value, self.frozen()).items()}
        return table | ({COUNTER: ("moment", torch.zeros((), dtype=torch.int64))} if self._by_chance() else {})

    def frozen(self) -> Tensors:
        """The tables of the moments' codes."""
        return {f"{_PREFIX}{form}.{name}": value for form, found in MOMENTS.items() for name, value in found.tables().items()}

    def read(self, names: Mapping[str, Tensor], state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensors:
        """All parameters of each pack, taken apart."""
        table: Tensors = {}
        for pack, parts in self.packs.items():
            if place := pack.alone:
                table[place.name] = self._large(place, pack, parts[0], state)
                continue
            values = [part.form.value(state[part.name], state[f"{part.name}.unit"]) for part in parts]
            table |= pack.scatter(values, [part.begin for part in parts])
        return {name: table[name] for name in names}

    @staticmethod
    def _large(place: Place, pack: Pack, part: _Part, state: Mapping[str, Tensor]) -> Tensor:
        """A large parameter as the model computes with it. It is cut and rounded as whole numbers, a stretch at a time: in float32 it exists once."""
        held, unit = state[part.name], state[f"{part.name}.unit"]
        filled = place.length < place.blocks * pack.width
        if filled:
            held, unit = held.reshape(place.rows, -1), unit.reshape(place.rows, -1).narrow(1, 0, 1)  # the blocks of a row have one unit
        rows = int(held.shape[0])
        found = []
        for begin, end in pack.reads(rows) if part.form.steps > 1.0 else [(0, rows)]:
            piece = held if end - begin == rows else held.narrow(0, begin, end - begin)
            found.append(part.form.coarse(piece.narrow(1, 0, place.length) if filled else piece))
        whole = found[0] if len(found) == 1 else torch.cat(found)
        return (whole.to(unit.dtype) * (unit * part.form.steps)).reshape(place.shape)

    def write(
        self, optimiser: str, gradients: Tensors, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensors, Tensors]:
        """The optimiser's step from zero, which is the increment; then everything in its form again.

        Where every gradient is zero, as where no prediction was confident, the rate is too: parameters stay, to the bit, whatever momentum is left.
        The metric is the root mean square of the increments, in 256ths of each row's range. It is not finite where a gradient, a moment or an
        increment is not, or an increment is larger than its range: whole numbers cannot tell.
        """
        matrices = {pack: pack.gather(gradients) for pack in self.packs}
        sizes = [matrix.narrow(0, begin, end - begin).abs().sum() for pack, matrix in matrices.items() for begin, end in pack.slabs()]
        hyper = {**hyper, "rate": hyper["rate"] * (_total(sizes) > 0.0).to(hyper["rate"].dtype)}
        pieces: dict[str, list[Tensor]] = {}
        squares, largest = [], []
        for pack, parts in self.packs.items():
            for begin, end in pack.slabs():
                increments, moments = self._step(optimiser, pack, (begin, end), matrices[pack], state, tensors, hyper)
                for part in (part for part in parts if part.meets(begin, end)):
                    first, last = max(part.begin, begin), min(part.end, end)
                    before, unit = (state[name].narrow(0, first - part.begin, last - first) for name in (part.name, f"{part.name}.unit"))
                    steps = increments.narrow(0, first - begin, last - first) / unit
                    rows = (last - first, pack.width, first - part.begin)
                    noise = uniform(state[COUNTER], self.seed, part.stream, *rows) if part.form.by_chance else None
                    pieces.setdefault(part.name, []).append(moved(part.form, before, steps, noise))
                    squares.append((steps * steps).sum() * part.range**-2)
                    largest.append(steps.abs().amax() * (1.0 / part.range))
                for name, value in moments.items():
                    sizes.append(value.abs().sum())
                    for key, held in self._held(optimiser, name, value, tensors).items():
                        pieces.setdefault(key, []).append(held)
        following = {name: parts[0] if len(parts) == 1 or not parts[0].dim() else torch.cat(parts) for name, parts in pieces.items()}
        if self._by_chance():
            following[COUNTER] = state[COUNTER] + 1
        mean = _total(squares) / sum(pack.elements for pack in self.packs)
        change = torch.where(torch.stack(largest).amax() <= 256.0, mean.sqrt(), torch.full_like(mean, torch.inf))
        return following, {GUARD: change + 0.0 * _total(sizes)}

    def _step(
        self,
        optimiser: str,
        pack: Pack,
        slab: tuple[int, int],
        gradients: Tensor,
        state: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        hyper: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensors]:
        """The increments of some blocks of a pack, and their moments by the names of the state."""
        matrix, start = gradients.narrow(0, slab[0], slab[1] - slab[0]), torch.zeros((), dtype=gradients.dtype)
        found = self._moments(optimiser, pack, slab, state, tensors)
        increments, moments = OPTIMISERS[optimiser].update({pack.name: matrix}, {pack.name: start}, found, hyper)
        return increments[pack.name], moments

    def _moments(self, optimiser: str, pack: Pack, slab: tuple[int, int], state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensors:
        """The moments of some blocks of a pack, as the optimiser computes with them."""
        table: Tensors = {}
        for name in OPTIMISERS[optimiser].init({pack.name: torch.zeros(())}):
            form = self._form(optimiser, name)
            if not form:
                table[name] = state[name]
                continue
            codes, scales = (state[key].narrow(0, slab[0], slab[1] - slab[0]) for key in (name, f"{name}.scale"))
            table[name] = MOMENTS[form].values(codes, scales, _named(tensors, form))
        return table

    def seen(self, optimiser: str, state: Mapping[str, Tensor]) -> dict[str, Seen]:
        """Whole numbers times their units, codes times their scales."""
        table: dict[str, Seen] = {}
        moments: Tensors = {}
        for pack in self.packs if optimiser else ():
            moments |= self._moments(optimiser, pack, (0, pack.blocks), state, self.frozen())
        for pack, parts in self.packs.items():
            first = moments.get(f"first.{pack.name}")
            for part in parts:
                gaps = state[f"{part.name}.unit"] * torch.ones(pack.width)
                table[part.name] = Seen(state[part.name] * gaps, gaps, _confidence(None if first is None else part.of(first)))
        for name, value in moments.items():
            form = self._form(optimiser, name)
            gaps = MOMENTS[form].gaps(state[name], _named(self.frozen(), form)) * state[f"{name}.scale"].abs() if form else torch.zeros(())
            table[name] = Seen(value, gaps, torch.ones(()))
        return table

    def _held(self, optimiser: str, name: str, value: Tensor, tensors: Mapping[str, Tensor]) -> Tensors:
        """A moment as it is held, by the names of the state."""
        form = self._form(optimiser, name)
        return dict(zip((name, f"{name}.scale"), MOMENTS[form].codes(value, _named(tensors, form)), strict=True)) if form else {name: value}

    def _form(self, optimiser: str, name: str) -> str:
        """How a moment is held; "": as it is, a number for all parameters."""
        if not any(name.endswith(f".{pack.name}") for pack in self.packs):
            return ""
        return "squares8" if name.startswith(OPTIMISERS[optimiser].squares) else "signed8"

    def _by_chance(self) -> bool:
        return any(part.form.by_chance for parts in self.packs.values() for part in parts)


def _confidence(first: Tensor | None) -> Tensor:
    if first is None or not bool(first.abs().max() > 0):
        return torch.ones(())
    return first.abs() / first.abs().max()


def _total(scalars: list[Tensor]) -> Tensor:
    return torch.stack(scalars).sum()


def _named(tensors: Mapping[str, Tensor], form: str) -> Tensors:
    """The tables of a form."""
    prefix = f"{_PREFIX}{form}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _largest(value: Tensor) -> Tensor:
    """What the range of each row is made for: its largest magnitude, and no less than a tenth of the tensor's, or a row near zero could not grow.

    What is zero all over, as what is added to a model that is not to be changed yet, gets the range of new weights, one over the root of the inputs;
    a vector that of a normalisation's scale. What a warm-up hardly moved from zero gets a hundredth of that: any step would leave its range.
    """
    rows, length = rows_of(value.shape)
    largest = value.abs().reshape(rows, length).amax(1)
    whole, new = float(largest.amax()), length**-0.5 if value.dim() > 1 else _START_VECTOR
    if not whole:
        return torch.full_like(largest, new)
    return largest.clamp(min=max(_SMALL_ROW * whole, _SMALL_RANGE * new))
