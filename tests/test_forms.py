"""Small forms of parameters and moments: every form passes one suite, and each check of it fails on the faulty form that it is there for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from edgeadapt.exporters import forms
from edgeadapt.exporters.codes import FLOOR, codes
from edgeadapt.exporters.forms import MOMENTS, PARAMETERS, MomentForm, ParameterForm, by_chance, moved, stored, unit_of
from edgeadapt.exporters.noise import uniform
from edgeadapt.exporters.packing import NARROWEST, WIDEST, Pack, packs_of

Move = Callable[[ParameterForm, Tensor, Tensor, Tensor | None], Tensor]
Round = Callable[[Tensor, Tensor], Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise(rows: int, columns: int, step: int = 0, stream: int = 0, seed: int = 0) -> Tensor:
    return uniform(torch.tensor(step), seed, stream, rows, columns)


# ----------------------------------------------------------------------------------------------------------- parameters


def truncated(form: ParameterForm, before: Tensor, increment: Tensor, _: Tensor | None) -> Tensor:
    """As C converts: toward zero, and the whole sum at once."""
    return (before.float() + increment).clamp(form.low, form.high).trunc().to(form.dtype)


def wrapped(form: ParameterForm, before: Tensor, increment: Tensor, given: Tensor | None) -> Tensor:
    """A cast alone."""
    step = increment.round() if given is None else by_chance(increment, given)
    return (before.long() + step.long()).to(form.dtype)


def rerandomised(form: ParameterForm, before: Tensor, increment: Tensor, given: Tensor | None) -> Tensor:
    """The scale made anew from the row's largest, and the whole row rounded by chance again."""
    values = before.float() + increment
    values = values / values.abs().amax(1, keepdim=True) * form.high
    return by_chance(values, noise(*values.shape) if given is None else given).clamp(form.low, form.high).to(form.dtype)


def ends_hold(form: ParameterForm, move: Move) -> None:
    """What goes beyond either end stays at it, and can come back."""
    ends = torch.tensor([[form.low, form.high, form.low + 1, form.high - 1, 0, 0, 0, 0]]).to(form.dtype)
    away = torch.tensor([[-5.0, 5.0, -1e6, 1e6, 1e9, -1e9, 3e38, -3e38]])
    after = move(form, ends, away, noise(1, 8) if form.by_chance else None)
    assert after[0].tolist() == [form.low, form.high, form.low, form.high, form.high, form.low, form.high, form.low]
    assert move(form, after, -2.0 * away.sign(), noise(1, 8) if form.by_chance else None)[0, 0] == form.low + 2


def nothing_moves_nothing(form: ParameterForm, move: Move) -> None:
    """A zero increment leaves every bit, also of rows beside one that moves."""
    before = (draw(4, 64) * form.high / 4).round().to(form.dtype)
    increment = torch.zeros(4, 64)
    increment[1, 3] = 3.0
    after = move(form, before, increment, noise(4, 64) if form.by_chance else None)
    still = increment == 0
    assert torch.equal(after[still], before[still])
    assert after[1, 3] != before[1, 3]


def steps_are_even(form: ParameterForm, move: Move) -> None:
    """A small step moves as far toward zero as away from it, in the mean of many."""
    before = torch.full((200, 64), 40, dtype=form.dtype)
    for size in (0.3, 0.75):
        means = []
        for direction in (1, -1):
            given = [noise(200, 64, k) if form.by_chance else None for k in range(2)]
            both = [move(form, sign * before, direction * size * sign * torch.ones(200, 64), given[k]) for k, sign in enumerate((1, -1))]
            means.append(float(torch.cat(both).double().abs().mean()) - 40)
        away, toward = means[0], -means[1]
        assert abs(away - toward) < 0.02, (size, away, toward)
        assert abs(away - (size if form.by_chance else round(size))) < 0.02


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_form_of_parameters_passes_the_suite(name: str) -> None:
    form = PARAMETERS[name]
    for check in (ends_hold, nothing_moves_nothing, steps_are_even):
        check(form, moved)
    values = draw(6, 64)
    unit = unit_of(form, values.abs().amax(1, keepdim=True))
    held = stored(form, values, unit)
    seen = form.value(held, unit)
    assert held.dtype == form.dtype
    step = unit * (256 if name == "split16" else 1)
    assert ((seen - values).abs() <= step * 0.501 + unit * 0.501).all(), "half a step of what the model sees"
    assert (held.float() * unit - values).abs().max() <= 0.501 * unit.max()
    assert torch.equal(form.value(stored(form, seen, unit), unit), seen), "what was seen is stored and seen again as it is"
    assert held.float().abs().max() <= form.high / forms.HEADROOM + 1, "room for twice the largest"
    assert not form.value(stored(form, torch.zeros(2, 8), torch.ones(2, 1)), torch.ones(2, 1)).any(), "zero is zero"


@pytest.mark.parametrize(
    ("check", "faulty"),
    [(steps_are_even, truncated), (ends_hold, wrapped), (nothing_moves_nothing, rerandomised)],
)
@pytest.mark.parametrize("name", PARAMETERS)
def test_the_suite_finds_faulty_forms(name: str, check: Callable[[ParameterForm, Move], None], faulty: Move) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check(PARAMETERS[name], faulty)


def test_the_upper_byte_of_sixteen_bits_is_rounded_and_kept_in_range() -> None:
    form, one = PARAMETERS["split16"], torch.ones(1, 1) / 256
    given = torch.tensor([[-32768, -32641, -32640, -129, -128, -127, 0, 127, 128, 383, 384, 32639, 32640, 32767]], dtype=torch.int16)
    want = [min(max((int(value) + 128) >> 8, -128), 127) for value in given[0]]
    assert form.value(given, one)[0].tolist() == want
    assert form.value(given, one)[0, -1] == 127, "the byte does not overflow"


def test_steps_too_small_to_be_seen_add_up() -> None:
    form = PARAMETERS["split16"]
    unit = unit_of(form, torch.ones(1, 1))
    held = torch.zeros(1, 8, dtype=torch.int16)
    for _ in range(300):
        held = moved(form, held, torch.full((1, 8), 1.2), None)
    assert torch.allclose(form.value(held, unit), 256 * unit)


# ------------------------------------------------------------------------------------------------------- rounding by chance


def half_up(values: Tensor, given: Tensor) -> Tensor:
    return (values + 0.5).floor()


def toward_zero(values: Tensor, given: Tensor) -> Tensor:
    """Up or down by chance, but of the magnitude, cast as C does."""
    return (values + given).trunc()


def unbiased(rule: Round) -> None:
    """Means are right, and of many sums of ten steps as many lie in each place as chance says (chi-square, 99.9 %)."""
    for share in (-1.75, -0.5, -0.03, 0.003, 0.25, 0.5, 2.9):
        counts = torch.zeros(3)
        for step in range(20):
            got = rule(torch.full((500, 64), share), noise(500, 64, step))
            low = int(np.floor(share))
            counts += torch.tensor([float((got == low + k).sum()) for k in (0, 1)] + [float(((got < low) | (got > low + 1)).sum())])
        total, up = float(counts.sum()), share - np.floor(share)
        assert counts[2] == 0
        expected = np.array([total * (1 - up), total * up])
        chi = float(((counts[:2].numpy() - expected) ** 2 / expected).sum())
        assert chi < 10.83, (share, chi)


def test_rounding_by_chance_has_the_right_mean() -> None:
    unbiased(by_chance)
    whole = torch.arange(-4.0, 5.0).repeat(1000, 1)
    assert torch.equal(by_chance(whole, noise(1000, 9)), whole)


@pytest.mark.parametrize("faulty", [half_up, toward_zero])
def test_other_rounding_has_not(faulty: Round) -> None:
    with pytest.raises(AssertionError):
        unbiased(faulty)


def test_steps_below_a_unit_add_up_by_chance_and_never_to_the_nearest() -> None:
    form = PARAMETERS["chance8"]
    chance, nearest = (torch.zeros(100, 64, dtype=torch.int8) for _ in range(2))
    for step in range(200):
        increment = torch.full((100, 64), 0.06)
        chance = moved(form, chance, increment, noise(100, 64, step))
        nearest = moved(form, nearest, increment, None)
    assert abs(float(chance.float().mean()) - 12.0) < 0.2
    assert abs(float(chance.float().std()) - (200 * 0.06 * 0.94) ** 0.5) < 0.2
    assert not nearest.any()


# --------------------------------------------------------------------------------------------------------- random numbers


def independent(made: Callable[[int, int, int], Tensor]) -> None:
    """Evenly spread (chi-square over 256 places, 99.9 %), and no neighbour, step, stream or seed knows another's."""
    one = made(0, 0, 0)
    counts = torch.histc(one, 256, 0.0, 1.0)
    chi = float(((counts - one.numel() / 256) ** 2 / (one.numel() / 256)).sum())
    assert chi < 331, chi
    assert 0.0 <= float(one.min()) <= float(one.max()) < 1.0
    limit = 5 / one.numel() ** 0.5
    pairs = [(one[:, 1:], one[:, :-1]), (one[1:], one[:-1]), (one[1:, 1:], one[:-1, :-1]), (one[:, 8:], one[:, :-8])]
    pairs += [(one, made(*other)) for other in ((1, 0, 0), (2, 0, 0), (256, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1))]
    for left, right in pairs:
        for a in (left, left * left, (left * 16) % 1):
            assert abs(float(torch.corrcoef(torch.stack([a.flatten(), right.flatten()]))[0, 1])) < limit


def linear(step: int, stream: int, seed: int) -> Tensor:
    """A congruence of the place, as one might write in a hurry."""
    place = torch.arange(512).unsqueeze(1) * 65539 + torch.arange(256) * 16807
    return ((place + step * 48271 + stream * 69621 + seed) % 2**31).float() / 2**31


def test_random_numbers_are_even_and_independent() -> None:
    independent(lambda step, stream, seed: noise(512, 256, step, stream, seed))
    with pytest.raises(AssertionError):
        independent(linear)


def test_random_numbers_are_of_the_step_and_the_place_alone() -> None:
    assert torch.equal(noise(64, 32, 7, 3, 1), noise(64, 32, 7, 3, 1))
    assert torch.equal(noise(64, 32, 7)[:10, :8], noise(10, 8, 7))
    far = noise(64, 32, 2**40 + 5)
    assert torch.equal(far, noise(64, 32, (2**40 + 5) % 2**31)), "beyond 31 bits they begin again"
    assert len(torch.unique(torch.stack([noise(4, 8, step).flatten() for step in range(100)]))) > 3190


# ---------------------------------------------------------------------------------------------------------------- moments


def slow(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The nearest of a table, by looking at all of it."""
    return np.abs(table[None, :].astype(np.float64) - values.reshape(-1, 1).astype(np.float64)).argmin(1)


def right_table(table: np.ndarray) -> None:
    assert table.shape == (256,)
    assert (np.diff(table) > 0).all()
    assert 0.0 in table
    assert 1.0 in table
    assert np.isfinite(table).all()


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_that_of_dynamic_quantisation(signed: bool) -> None:
    found = codes(signed).values
    right_table(found)
    positive = found[found > 0]
    assert positive[0] == pytest.approx(5.5e-7 if signed else 3.25e-7)
    assert np.diff(found).max() == pytest.approx(0.0140625 if signed else 0.00703125, abs=1e-6)
    assert found[0] == pytest.approx(-0.99296875 if signed else 0.0)


def test_a_table_that_is_built_wrong_is_found() -> None:
    wrong = [10.0 ** (level - 6) * (np.linspace(0.1, 1, 2**level + 1)[1:]) for level in range(7)]  # edges instead of centres
    table = np.sort(np.concatenate([-np.concatenate(wrong), [0.0], np.concatenate(wrong), [1.0]]))
    with pytest.raises(AssertionError):
        right_table(table)


def numbers(signed: bool) -> Tensor:
    """Of all magnitudes, one block's largest among them negative."""
    random = np.random.default_rng(3)
    values = 10 ** random.uniform(-8, 0, (64, 256)) * (np.sign(random.standard_normal((64, 256))) if signed else 1)
    values[0] = 0.0
    values[1, 1:] = 0.0
    values[2, 5] = -3.0 if signed else 3.0
    values[3] *= 1e-12
    values[4] *= 1e12
    return torch.from_numpy(values.astype(np.float32))


def comes_back(form: MomentForm, values: Tensor) -> None:
    """What is read and stored again keeps its bits, codes and scales; the largest of a block is read as it was."""
    tables = form.tables()
    held, scales = form.codes(values, tables)
    again, same = form.codes(form.values(held, scales, tables), tables)
    assert torch.equal(again, held)
    assert torch.equal(same, scales)
    place = values.abs().argmax(1, keepdim=True)
    assert torch.equal(form.values(held, scales, tables).gather(1, place), values.gather(1, place))


@dataclasses.dataclass(frozen=True)
class Unsigned:
    """The scale is the largest magnitude, without its sign."""

    inner: MomentForm

    def tables(self) -> Mapping[str, Tensor]:
        return self.inner.tables()

    def values(self, codes: Tensor, scales: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        return self.inner.values(codes, scales, tables)

    def gaps(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        return self.inner.gaps(codes, tables)

    def codes(self, values: Tensor, tables: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        scales = values.abs().amax(1, keepdim=True)
        table = tables["values"].numpy()
        shares = (values / scales.clamp(min=1e-30)).numpy()
        return torch.from_numpy(slow(shares, table).astype(np.uint8)).reshape(values.shape), scales


@pytest.mark.parametrize(("name", "signed"), [("signed8", True), ("squares8", False)])
def test_every_form_of_moments_passes_the_suite(name: str, signed: bool) -> None:
    form, values = MOMENTS[name], numbers(signed)
    tables, table = form.tables(), codes(signed).values
    held, scales = form.codes(values, tables)
    assert held.dtype == torch.uint8
    comes_back(form, values)
    shares = torch.where(scales == 0, torch.zeros(()), values / scales)
    best = np.abs(table[slow(shares.numpy(), table)].astype(np.float64) - shares.numpy().ravel())
    ours = np.abs(table[held.numpy().ravel()].astype(np.float64) - shares.numpy().ravel())
    assert (ours <= best + 1e-7).all(), "the nearest, ties aside"
    gaps = form.gaps(held, tables).numpy().ravel()
    assert (ours <= 0.5001 * gaps + 1e-7).all()
    assert not form.values(*form.codes(torch.zeros(2, 64), tables), tables).any(), "zeros are zeros"
    for odd in (float("nan"), float("inf"), -float("inf"), 3e38, 1e-42):
        strange = values[:2].clone()
        strange[1, 0] = odd
        form.codes(strange, tables)  # a lookup out of its table would raise


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_at_every_middle(signed: bool) -> None:
    form, found = MOMENTS["signed8" if signed else "squares8"], codes(signed)
    edges = found.middles[:-1]
    around = [np.nextafter(edges, 0, dtype=np.float32), np.nextafter(edges, 2, dtype=np.float32)]
    shares = np.concatenate([*around, (np.arange(1025) / 1024) ** 4, [1.0]])
    shares = np.concatenate([-shares[:-1], shares]) if signed else shares
    held, _ = form.codes(torch.from_numpy(shares.astype(np.float32))[None], form.tables())
    best = np.abs(found.values[slow(shares, found.values)].astype(np.float64) - shares)
    ours = np.abs(found.values[held[0].numpy()].astype(np.float64) - shares)
    assert (ours <= best + 1e-7).all()


def test_a_negative_block_maximum_needs_the_sign_in_its_scale() -> None:
    with pytest.raises(AssertionError):
        comes_back(Unsigned(MOMENTS["signed8"]), numbers(True))


def test_blocks_of_rows_are_not_mixed() -> None:
    """A row a million times smaller than its neighbour keeps its values; blocks that run on from row to row lose them."""
    rows = torch.stack([draw(40, seed=1) * 10.0 ** (-7 * (k % 2)) for k in range(8)])
    form = MOMENTS["signed8"]

    def worst(blocks: Tensor, back: Callable[[Tensor], Tensor]) -> float:
        got = back(form.values(*form.codes(blocks, form.tables()), form.tables()))
        return float(((got - rows).norm(dim=1) / rows.norm(dim=1)).max())

    (pack,) = packs_of("p", {"w": rows.shape})
    good = worst(pack.gather({"w": rows}), lambda matrix: pack.scatter([matrix], [0])["w"])
    flat = worst(rows.reshape(-1, 64), lambda matrix: matrix.reshape(8, 40))
    assert good < 0.05
    assert flat > 0.5


def exploding(tables: Mapping[str, Tensor]) -> float:
    """Adam's step where a small gradient was once, beside a large one, and is no more: in rates."""
    first, second = MOMENTS["signed8"], MOMENTS["squares8"]
    gradient = torch.zeros(1, 64)
    gradient[0, 0], gradient[0, 1] = 100.0, 100.0 * 3e-4
    m = first.values(*first.codes(0.1 * gradient, first.tables()), first.tables())
    v = second.values(*second.codes(0.001 * gradient**2, second.tables()), tables)
    assert m[0, 1] != 0
    m, v = 0.9 * m, 0.999 * v
    return float((m[0, 1] / (1 - 0.9**2)).abs() / ((v[0, 1] / (1 - 0.999**2)).sqrt() + 1e-6))


def test_a_second_moment_of_zero_beside_a_first_that_is_not_does_not_explode() -> None:
    good = MOMENTS["squares8"].tables()
    bare = {**good, "values": torch.from_numpy(codes(False).values)}
    assert 0 < FLOOR < codes(False).middles[0]
    assert exploding(good) < 3
    assert exploding(bare) > 1000


# ---------------------------------------------------------------------------------------------------------------- packing

SHAPES = {"a": (16, 16, 1, 1), "bias": (16,), "b": (64, 27), "scale": (), "c": (5, 3, 3, 3), "long": (2, 1000)}


def test_tensors_come_out_as_they_went_in() -> None:
    values = {name: draw(*shape, seed=k) for k, (name, shape) in enumerate(SHAPES.items())}
    (pack,) = packs_of("p", SHAPES)
    matrix = pack.gather(values)
    assert matrix.shape == (pack.blocks, pack.width)
    assert NARROWEST <= pack.width <= WIDEST
    assert pack.elements == sum(value.numel() for value in values.values())
    pieces = [matrix[: pack.divide], matrix[pack.divide :]]
    back = pack.scatter(pieces, [0, pack.divide])
    assert back.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(back[name], value), name
    assert {place.name for place in pack.places if place.first >= pack.divide} == {"bias", "scale"}


def test_packs_are_bounded_and_keep_every_tensor() -> None:
    shapes = {f"w{k}": (100, 120) for k in range(12)} | {"huge": (500, 400), "b": (7,)}
    packs = packs_of("p", shapes)
    assert [place.name for pack in packs for place in pack.places] == list(shapes)
    assert [pack.name for pack in packs] == [f"p.{k}" for k in range(len(packs))]
    assert all(pack.elements <= 65536 or len(pack.places) == 1 for pack in packs)


@pytest.mark.parametrize(
    ("shapes", "width"), [({"a": (8, 64)}, 64), ({"a": (8, 300)}, 150), ({"a": (8, 16), "b": (8, 32)}, 16), ({"a": (3, 1000)}, 250)]
)
def test_blocks_are_as_wide_as_rows_allow(shapes: dict[str, tuple[int, ...]], width: int) -> None:
    (pack,) = packs_of("p", shapes)
    assert isinstance(pack, Pack)
    assert pack.width == width
