"""The checks between the parts of a manifest, each of which was read by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from edgeadapt.bundle.checked import UNCHECKED, unchecked_of
from edgeadapt.bundle.reading import Node
from edgeadapt.bundle.roles import GUARD, ROLES, STEPS, SUMS, UPDATE
from edgeadapt.bundle.searched import FACTORS

if TYPE_CHECKING:
    from edgeadapt.bundle.manifest import Manifest

T = TypeVar("T")
PASSING = ("statistic", "memory")
"""Kinds of state that a prediction may change."""


def agree(manifest: Manifest, root: Node) -> None:
    """Refuses a manifest whose parts contradict each other.

    Raises:
        BundleError: they do; the message names the place.
    """

    def check(known: Callable[[T], bool], values: Iterable[T], node: Node, expected: str) -> None:
        for value in values:
            if not known(value):
                raise node.wrong(expected, repr(value))

    kinds = {spec.name: spec.kind for spec in manifest.state}
    whole = {spec.name for spec in manifest.state if spec.dtype != "float32"}
    if len(kinds) != len(manifest.state):
        raise root.child("state").wrong("every name once", "a name twice")
    if 1 not in manifest.batches or list(manifest.batches) != sorted(set(manifest.batches)):
        raise root.child("batches").wrong("rising batch sizes, 1 among them", str(list(manifest.batches)))
    if manifest.reference is not None:
        follow = frozenset(manifest.statistics.layers if manifest.statistics.mode == "live" else ())
        node = root.child("reference").child("layers")
        check(follow.__contains__, manifest.reference.layers, node, "layers whose statistics follow the stream")
    graphs, batches = root.child("graphs"), frozenset(manifest.batches)
    for name, graph in manifest.graphs.items():
        node = graphs.child(name)
        if name != graph.name:
            raise node.wrong(f"the name {graph.name}, as its role, batch and variant say", name)
        if graph.variant and f"{graph.role}.b{graph.batch}" not in manifest.graphs:
            raise node.wrong(f"a graph {graph.role}.b{graph.batch}, which it is a variant of", "none")
        if graph.path != f"graphs/{name}.onnx":
            raise node.child("path").wrong(f"graphs/{name}.onnx", repr(graph.path))
        if graph.role in ROLES and graph.batch not in batches:
            raise node.child("batch").wrong(f"one of {list(manifest.batches)}", str(graph.batch))
        check(manifest.hyper.__contains__, graph.hyper, node.child("hyper"), "names that stand in hyper")
        check(frozenset(graph.hyper).__contains__, graph.defaults, node.child("defaults"), "names that stand in this graph's hyper")
        check(kinds.__contains__, graph.reads, node.child("reads"), "names that stand in state")
        check(kinds.__contains__, graph.writes, node.child("writes"), "names that stand in state")
        check(lambda value: re.fullmatch("[a-z][a-z0-9_]*", value) is not None, graph.metrics, node.child("metrics"), "lower-case words")
        if whole.intersection(graph.writes) and GUARD not in graph.metrics:
            raise node.child("metrics").wrong(f"{GUARD}, in a graph that writes whole numbers", ", ".join(graph.metrics) or "none")
        if graph.role == "source":
            check(lambda value: kinds[value] == "statistic", graph.writes, node.child("writes"), "only statistics, in a source graph")
        if graph.role == "predict":
            check(lambda value: kinds[value] in PASSING, graph.writes, node.child("writes"), "only statistics and memory, in a predict graph")
    _agree_pieces(manifest, root)
    for name, tensors in unchecked_of(manifest.selfcheck).items():
        check(kinds.__contains__, tensors, root.child("selfcheck").child(name).child(UNCHECKED), "names that stand in state")
    if manifest.choice is not None:
        _agree_choice(manifest, root.child("choice").child("rows"))
    if manifest.searched is not None:
        _agree_searched(manifest, root.child("searched").child("rows"))
    if "predict.b1" not in manifest.graphs:
        raise graphs.wrong("a graph predict.b1", ", ".join(manifest.graphs) or "none")
    if "source.b1" not in manifest.graphs:
        raise graphs.wrong("a graph source.b1", ", ".join(manifest.graphs))


def _agree_choice(manifest: Manifest, rows: Node) -> None:
    """The numbers that were chosen are those that the bundle has."""
    found, codes = (manifest.choice.chosen if manifest.choice is not None else None), manifest.quantisation
    if found is None:
        return
    if found.quantize != ("none" if codes is None else codes.form):
        raise rows.wrong("the chosen row to say what quantisation says", found.quantize)
    if found.updates not in ("none", manifest.method.options.get("updates", "reference")):
        raise rows.wrong("the chosen row to hold parameters as the method's options say", found.updates)
    if codes is not None:
        told, had = (found.gradient, found.saved), (codes.gradient, codes.saved)
        if told != had and (told, had[0]) != (("int8", codes.saved), "float"):  # float32 where no convolution lets gradients pass in 8 bits
            raise rows.wrong("the chosen row to say what quantisation says", " ".join(told))
    if found.batch not in manifest.batches:
        raise rows.wrong(f"the chosen row to be for one of the batches {list(manifest.batches)}", str(found.batch))


def _agree_pieces(manifest: Manifest, root: Node) -> None:
    """The checks of graphs for steps in pieces: what they add up is what the whole step computes."""
    graphs, known = root.child("graphs"), {spec.name for spec in manifest.sums}
    planned = {role: manifest.planned(role) for role in STEPS}
    if len(known) != len(manifest.sums):
        raise root.child("sums").wrong("every name once", "a name twice")
    for name, graph in manifest.graphs.items():
        node, (role, _, kind) = graphs.child(name), graph.role.partition("-")
        if bool(graph.sums) != bool(kind) or not known.issuperset(graph.sums):
            raise node.wrong("names of sums, in a graph of a step in pieces" if kind else "no sums, in a graph that is run alone", repr(graph.sums))
        if not kind:
            continue
        if graph.variant:
            raise node.child("variant").wrong("none, in a graph of a step in pieces", graph.variant)
        if manifest.statistics.mode == "live":
            raise node.wrong("no steps in pieces where statistics follow the stream", name)
        if kind == "update":
            whole = [other for other in manifest.graphs.values() if other.role == role]
            if graph.batch or any(set(graph.writes) != set(other.writes) or set(graph.metrics) != set(other.metrics) for other in whole):
                raise node.wrong(f"batch 0, and what the {role} graphs write and tell", f"batch {graph.batch}, {graph.writes}, {graph.metrics}")
            others = [other for other in manifest.graphs.values() if other.role == role + SUMS]
            if not others or any(set(other.sums) != set(graph.sums) for other in others):
                raise node.wrong(f"graphs {role}{SUMS} of the same sums", f"{len(others)} graphs")
        elif role + UPDATE not in manifest.graphs:
            raise node.wrong(f"a graph {role}{UPDATE}, which ends the step", "none")
        elif graph.writes or graph.metrics:
            raise node.wrong("no new state and no metrics in a graph of sums", f"{graph.writes}, {graph.metrics}")
        elif not any(size % graph.batch == 0 and size > graph.batch for size in planned[role]):
            raise node.child("batch").wrong(f"a part of a batch of {role}", str(graph.batch))


def _agree_searched(manifest: Manifest, node: Node) -> None:
    """Scalars and batches that were tried are the bundle's, and scalars that were chosen are its defaults."""
    assert manifest.searched is not None
    sizes = manifest.planned("adapt") or manifest.planned("predict")
    for row in manifest.searched.rows:
        unknown = next((name for name in row.scalars if name not in manifest.hyper), None)
        if unknown is not None:
            raise node.wrong("names that stand in hyper", repr(unknown))
        if row.batch not in sizes:
            raise node.wrong("batches that windows can have", str(row.batch))
    for name, value in manifest.searched.chosen.scalars.items():
        if name not in FACTORS and manifest.hyper[name].default != value:
            raise node.wrong(f"{manifest.hyper[name].default:g} for {name}, its default, where that is chosen", f"{value:g}")
