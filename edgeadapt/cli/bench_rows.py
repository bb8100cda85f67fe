"""The rows of a bench: which bundles serve, how, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeadapt.bench.report import GUARDED, STILL
from edgeadapt.bench.setting import ADAPT, INITIAL, SINGLE, SOURCE
from edgeadapt.bundle import Bundle
from edgeadapt.bundle.digest import sha256
from edgeadapt.memory.graph import read


@dataclass(frozen=True)
class Line:
    """A row of the bench: its name, the bundle that serves it, the mode in which it does, and whether a guard watches it."""

    name: str
    bundle: Bundle
    mode: str
    guard: bool = False


def rows(bundles: Sequence[Bundle], single: bool = False, guard: bool = False, free: bool = True) -> list[Line]:
    """The rows of a bench: frozen models, each once, then every bundle before and while it adapts.

    Args:
        bundles: of one model, or of several.
        single: also rows that answer frame by frame.
        guard: also rows that a guard watches.
        free: also rows that adapt and that no guard watches.

    Raises:
        UsageError: with `guard`, a bundle does not say what its source looks like.
    """
    models = {_frozen(bundle): bundle for bundle in reversed(bundles)}  # of each model the first bundle
    frozen = [bundle for bundle in bundles if bundle in models.values()]
    adapting = [bundle for bundle in bundles if bundle.manifest.method.name != "source"]
    methods = [bundle.manifest.method.name for bundle in adapting]
    files = {bundle.path: bundle.path.stem for bundle in bundles}
    usual = files | {bundle.path: method for method, bundle in zip(methods, adapting) if methods.count(method) == 1}
    paths = {path: str(path) for path in files}
    numbers = {path: f"{number}: {name}" for number, (path, name) in enumerate(files.items(), 1)}
    for sources, names in ((files, usual), (paths, paths), (numbers, numbers)):
        found = _named(frozen, [sources[bundle.path] for bundle in frozen], adapting, [names[bundle.path] for bundle in adapting], single, guard)
        found = [line for line in found if free or line.guard or line.mode not in (ADAPT, SINGLE)]
        if len({line.name for line in found}) == len(found):
            break
    return found


def _named(
    frozen: Sequence[Bundle], sources: Sequence[str], adapting: Sequence[Bundle], names: Sequence[str], single: bool, guard: bool
) -> list[Line]:
    """The rows of frozen models and of bundles that adapt, which are called so."""
    found = [Line(f"source of {name}" if number else "source", bundle, SOURCE) for number, (name, bundle) in enumerate(zip(sources, frozen))]
    for name, bundle in zip(names, adapting):
        if any(graph.writes for graph in bundle.manifest.graphs.values()):  # others are always at their first state
            found.append(Line(STILL if len(names) == 1 else f"{name}, {STILL}", bundle, INITIAL))
    for name, bundle in zip(names, adapting):
        modes = {"": ADAPT, **({", one by one": SINGLE} if single else {})}
        found += [Line(name + how, bundle, mode) for how, mode in modes.items()]
        found += [Line(name + how + GUARDED, bundle, mode, True) for how, mode in modes.items() if guard]
    return found


def _frozen(bundle: Bundle) -> str:
    """SHA-256 in hex of the frozen model: its operators in their order, and what its tensors hold, wherever in the bundle's file they lie."""
    graph = bundle.graph("source.b1")
    with bundle.mapped() as file:
        places = [(tensor, file[tensor.offset : tensor.offset + tensor.length]) for tensor in graph.external]
        held = sorted(f"{tensor.kind} {tensor.shape} {sha256(data).hexdigest()}" for tensor, data in places)
        del places
    operators = [node.op for node in read(graph.data, "source.b1").nodes]
    return sha256("\n".join([*operators, *held]).encode()).hexdigest()
