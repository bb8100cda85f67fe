"""Which of a bundle's graphs fit a budget: the best that do, or a refusal that says what would."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Any, NamedTuple

from edgeadapt.bundle import Form, Manifest
from edgeadapt.errors import BudgetError, UsageError
from edgeadapt.memory import footprint
from edgeadapt.memory.ledger import ANSWERING, Ledger, Line
from edgeadapt.runtime.memory import FIRST_GRAPH, Needs, Planned, planned
from edgeadapt.units import format_bytes

SLOW = 1.15
"""How much longer than the quickest, roughly counted, a form of a step may take to make room for smaller batches and other roles."""

ROLES = ("predict", "adapt", "source", "learn")
"""In the order in which they get what room there is."""


class Item(NamedTuple):
    """A role at a batch that would be good to have. needed: what is asked for, or what the bundle is for."""

    role: str
    batch: int
    needed: bool

    def __str__(self) -> str:
        return f"{self.role} at batch {self.batch}"


@dataclass(frozen=True)
class Choice:
    """What is loaded.

    Attributes:
        plan: the graphs, and what they add.
        least: the graphs that are kept under pressure, and what they add.
        missing: what was wanted and did not fit.
        forms: how each role is run at each of its batches, by the graphs of `plan`.
        passed_over: graphs that a GPU lacks operators of, with these, where another form of the same step takes their place.
        rank: how good it is; of two choices of the same items the greater is the better.
    """

    plan: Planned
    least: Planned
    missing: tuple[str, ...]
    forms: tuple[Form, ...]
    passed_over: tuple[str, ...] = ()
    rank: tuple[Any, ...] = ()


def wanted(manifest: Manifest, roles: Collection[str] | str | None, batches: Collection[int] | None) -> list[Item]:
    """What to load, the most wanted first.

    Args:
        manifest: of the bundle.
        roles: of `ROLES`; predict is always among them, and adapt means predict where a bundle has no steps. None: all that the bundle has, of
            which predicting and adapting are needed.
        batches: that are used; 1 is always among them. None: all.

    Raises:
        UsageError: the bundle has no such role or batch.
    """
    named = {roles} if isinstance(roles, str) else None if roles is None else set(roles)
    for role in sorted((named or set()) - {"predict", "adapt"}):
        if not manifest.planned(role):
            present = [name for name in ROLES if manifest.planned(name)]
            raise UsageError(f"this bundle ({manifest.method.name}) has no graph to {role!r}", f"it has {', '.join(present)}")
    for batch in sorted(batches or ()):
        if batch not in manifest.batches:
            raise UsageError(f"this bundle has no graph for batch {batch}", f"it has {', '.join(map(str, manifest.batches))}")
    items = []
    for role in ROLES:
        if named is None or role in named or role == "predict":
            needed = named is not None or role in ("predict", "adapt")
            sizes = [batch for batch in manifest.planned(role) if batches is None or batch in batches or batch == 1]
            items += [Item(role, batch, needed) for batch in (sizes[::-1] if role == "source" else sizes)]  # a source without batch 1 is of no use
    first = Item("predict", 1, True)
    rest = [item for item in items if item != first]
    adapt = [item for item in rest if item.role == "adapt"]
    return [first, *adapt, *(item for item in rest if item.role != "adapt")]


def everything(needs: Needs, items: Iterable[Item]) -> Choice:
    """All of it, as quick as can be, in memory that grows as needed."""
    forms = tuple(_quickest(needs, item) for item in items)
    names = list(dict.fromkeys(name for form in forms for name in form.graphs))
    plan = planned(needs, names, bounded=False, answering=needs.answering)
    return Choice(plan, plan, (), forms, needs.passed_over())


def alone(manifest: Manifest, names: Iterable[str]) -> tuple[Form, ...]:
    """The forms of graphs that are each run alone."""
    graphs = [manifest.graphs[name] for name in names]
    return tuple(Form(graph.role, graph.batch, (graph.name,)) for graph in graphs if graph.role in ROLES)


def choose(needs: Needs, items: list[Item], budget: int, held: int, strict: bool = False, beyond: int = 0) -> Choice:
    """The best that fits.

    Every item that still fits is taken, in their order. A step that has other forms, leaner or in pieces, is taken in the quickest that leaves room
    for all that is needed; copies of weights that only save time are given up before that.

    Args:
        needs: the bundle's.
        items: as `wanted` gives them.
        budget: the most the process may hold resident, in bytes.
        held: what it holds already, or has promised.
        strict: everything, or nothing.
        beyond: what loading took beyond its plan when it was tried, in bytes.

    Raises:
        BudgetError: predicting does not fit, no batch of a needed role does, or with `strict` not everything does. The message has every line,
            the hint what would fit.
    """
    base = _base(items)
    best: tuple[tuple[Any, ...], Planned, dict[Item, Form]] | None = None
    orders = (items, list(dict.fromkeys([*base, *items])))
    for forms, prepacking, order in _attempts(needs, items, orders):
        plan, taken = _greedy(needs, {item: forms[item] for item in order}, budget - held - beyond, prepacking)
        if plan is None:
            continue
        covered = len({item.role for item in taken if item.needed})
        needed, rest = ([item in taken for item in items if item.needed is kind] for kind in (True, False))
        steps = [item in taken for item in _largest(items)]
        quick = all(_seconds(needs, form) <= SLOW * _seconds(needs, _quickest(needs, item)) for item, form in taken.items())
        quick = quick and (prepacking or not _on_bytes(needs, items))
        rank = (covered, steps, quick, needed, rest)  # a slow step is worth it for a larger batch, not for more to choose from
        if best is None or rank > best[0]:
            best = rank, plan, taken
        if len(taken) == len(items):
            break
    if best is None or best[0][0] != len({item.role for item in base}) or (strict and len(best[2]) < len(items)):
        raise _refusal(needs, items, budget, held, strict, beyond)
    rank, plan, taken = best
    least = [name for name in (FIRST_GRAPH, "source.b1") if name in plan.graphs]
    missing = tuple(str(item) for item in items if item not in taken)
    return Choice(plan, planned(needs, least, plan.region.prepacking), missing, tuple(taken.values()), needs.passed_over(), rank)


def _attempts(needs: Needs, items: list[Item], orders: Sequence[list[Item]]) -> Iterator[tuple[dict[Item, Form], bool, list[Item]]]:
    """Forms, whether copies of weights are kept, and the order in which items are taken; what is quicker first.

    Without their copies operators on bytes take half as long again and more, so then leaner forms are tried before.
    """
    if not _on_bytes(needs, items):
        yield from ((forms, *way) for forms in _levels(needs, items) for way in product((True, False), orders))
        return
    yield from ((forms, kept, order) for kept in (True, False) for forms in _levels(needs, items) for order in orders)


def _on_bytes(needs: Needs, items: Sequence[Item]) -> bool:
    return any(needs.on_bytes(name) for item in items for name in _quickest(needs, item).graphs)


def _largest(items: list[Item]) -> list[Item]:
    """The largest batch of each kind of step that is needed."""
    largest = {item.role: item for item in sorted(items) if item.needed and item.role in ("adapt", "learn")}
    return [largest[role] for role in ROLES if role in largest]


def _base(items: list[Item]) -> list[Item]:
    """The smallest batch of each needed role."""
    least = {item.role: item for item in sorted(items, key=lambda item: -item.batch) if item.needed}
    return [least[role] for role in ROLES if role in least]


def _greedy(needs: Needs, forms: Mapping[Item, Form], room: int, prepacking: bool) -> tuple[Planned | None, dict[Item, Form]]:
    taken: dict[Item, Form] = {}
    plan = None
    for item, form in forms.items():
        fitting = _planned(needs, [*taken.values(), form], prepacking)
        if fitting.total <= room:
            plan, taken[item] = fitting, form
        elif not taken:
            break  # without predicting one by one there is nothing
    return plan, taken


def _planned(needs: Needs, forms: Sequence[Form], prepacking: bool) -> Planned:
    names = dict.fromkeys(name for form in forms for name in form.graphs)  # steps at several batches may share their pieces
    return planned(needs, list(names), prepacking, frames=max(form.batch for form in forms), answering=needs.answering)


def _levels(needs: Needs, items: Sequence[Item]) -> Iterator[dict[Item, Form]]:
    """The form of every item, the quickest first, then those with less memory. Graphs that are not come to are not read."""
    yield {item: _quickest(needs, item) for item in items}
    ways = {item: _ways(needs, item) for item in items}
    for level in range(1, max(map(len, ways.values()))):
        yield {item: found[min(level, len(found) - 1)] for item, found in ways.items()}


def _quickest(needs: Needs, item: Item) -> Form:
    return needs.forms(item.role, item.batch)[0]


def _ways(needs: Needs, item: Item) -> list[Form]:
    """The forms of an item, the quickest first, then by time, each with less memory than those before it."""
    first, *others = needs.forms(item.role, item.batch)
    kept = [first]
    for form in sorted(others, key=lambda form: _seconds(needs, form)):
        if _bytes(needs, form) < _bytes(needs, kept[-1]):
            kept.append(form)
    return kept


def _seconds(needs: Needs, form: Form) -> float:
    """Roughly what one step takes."""
    first, *rest = (needs[name].seconds for name in form.graphs)
    return first * (form.batch // form.micro if form.micro else 1) + sum(rest)


def _bytes(needs: Needs, form: Form) -> int:
    """What of a form depends on which it is."""
    return max(needs[name].region for name in form.graphs) + footprint.sums_used(needs.bundle.manifest, form.graphs)


def _least(needs: Needs, item: Item) -> Form:
    return _ways(needs, item)[-1]


def _refusal(needs: Needs, items: list[Item], budget: int, held: int, strict: bool, beyond: int) -> BudgetError:
    """What does not fit line by line, and what would."""
    known = [Line("resident now", held, "measured", "the process, before the bundle's graphs are loaded")]
    known += [Line("beyond the plan", beyond, "measured", "taken when loading was tried")] if beyond else []
    held += beyond
    asked = items if strict else _base(items)
    first = Form("predict", 1, (FIRST_GRAPH,))
    plan, alone = (_planned(needs, forms, False) for forms in ([_least(needs, item) for item in asked], [first]))
    if not strict and len(asked) > 1 and held + alone.total > budget:
        asked, plan = asked[:1], alone
    total = held + plan.total
    ends = "".join(f"\n  {name:<17} {size:>13,} B {format_bytes(size):>9}" for name, size in (("budget", budget), ("missing", total - budget)))
    what = "all that is asked for" if strict else "to " + " and ".join(map(str, asked))
    table = Ledger((*known, *plan.ledger.lines)).table() + ends
    message = f"the bundle does not fit the budget of {format_bytes(budget)}: {what} needs {format_bytes(total)}\n{table}"
    options = [("predict only, at batch 1,", [first])]
    options += [(str(item), [first, _least(needs, item)]) for item in items if item.role in ("adapt", "learn")]
    sizes = [f"{text} needs {_rounded(held + _planned(needs, forms, False).total)}" for text, forms in options]
    sizes += [f"all of it needs {_rounded(total)}"] if strict else []
    otherwise = "export with a smaller batch" if held + alone.total > budget else 'only predict, with roles="predict" or --no-adapt'
    if needs.answering:
        otherwise += f"; or do not answer frames while a step runs (--cap), which takes {format_bytes(plan.lines()[ANSWERING])}"
    return BudgetError(message, f"give a budget that is enough: {'; '.join(sizes)}; or {otherwise}")


def _rounded(size: int) -> str:
    return f"{ceil(size / 2**20) + 1} MiB"  # what is held before differs a little from process to process
