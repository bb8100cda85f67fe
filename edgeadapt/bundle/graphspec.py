"""What a bundle says of each of its graphs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from edgeadapt.bundle.reading import Node
from edgeadapt.bundle.roles import PIECES, ROLES, UPDATE, VARIANTS

FIGURES = 1
"""Rules of the counting by which graphs' figures are made. Figures by other rules are passed over, and the graph is read."""
OPTIONAL = {"sums", "figures"}
"""Keys of a graph that are not there where there is nothing in them."""
NAME = r"[!-~]{1,256}"
"""Of tensors: printable ASCII without blanks, as they become names inside the graphs."""


@dataclass(frozen=True)
class Figures:
    """What a plan must know of a graph, so that it need not be read; made by `edgeadapt.memory.figures`.

    rules: of the counting; see `FIGURES`.
    edges, attributes, initialisers: their numbers.
    inside, beside: bytes of the copies of its weights that loading makes, in the region and beside it.
    exact: whether its region is counted to the byte; else it is estimated.
    seconds: of a run, roughly; only the ratio of two says anything.
    """

    rules: int
    edges: int
    attributes: int
    initialisers: int
    inside: int
    beside: int
    exact: bool
    seconds: float


@dataclass(frozen=True)
class GraphSpec:
    """One static graph: its member, role and batch, and the names it takes and gives.

    role, batch: of a step in pieces the graph "adapt-sums" takes `batch` frames, a part of a step's, and "adapt-update" none: its batch is 0.

    nodes: their number. peak_bytes: planned peak of live tensors. region_bytes: the one region of memory in which a run goes through.
    defaults: scalars whose best value depends on the batch; they go before the manifest's own defaults.
    variant: "" for the quickest form of a step; "lean" and "least" compute the same, bit for bit, in less memory and more time.
    sums: that are added to, or that a step in pieces ends with.
    figures: for plans; None: the graph must be read for them.
    """

    path: str
    role: str
    batch: int
    hyper: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    nodes: int = 0
    peak_bytes: int = 0
    region_bytes: int = 0
    defaults: dict[str, float] = dataclasses.field(default_factory=dict)
    variant: str = ""
    sums: tuple[str, ...] = ()
    figures: Figures | None = None

    @property
    def name(self) -> str:
        """Its name in the bundle: "adapt.b16", "adapt.b16.lean", "adapt-sums.b4", "adapt-update"."""
        return (f"{self.role}.b{self.batch}" if self.batch else self.role) + (f".{self.variant}" if self.variant else "")


def read_graph(node: Node) -> GraphSpec:
    """A graph as JSON values, checked.

    Raises:
        BundleError: a key is missing, unknown, wrongly typed or out of range.
    """
    node.keys({field.name for field in dataclasses.fields(GraphSpec)}, optional=OPTIONAL)
    role = node.child("role").text("|".join((*ROLES, *PIECES)))
    present = ["hyper", "reads", "writes", "metrics", *(["sums"] if node.has("sums") else [])]
    names = {key: node.child(key).items(_name) for key in present}
    for key, values in names.items():
        if len(set(values)) != len(values):
            raise node.child(key).wrong("every name once", "a name twice")
    return GraphSpec(
        path=node.child("path").text(),
        role=role,
        batch=node.child("batch").integer(0 if role.endswith(UPDATE) else 1),
        nodes=node.child("nodes").integer(0),
        peak_bytes=node.child("peak_bytes").integer(0),
        region_bytes=node.child("region_bytes").integer(0),
        defaults=node.child("defaults").mapping(Node.number, r"[a-z][a-z0-9_]*"),
        variant=node.child("variant").text("|".join(VARIANTS)),
        figures=read_figures(node.child("figures")) if node.has("figures") else None,
        **names,
    )


def read_figures(node: Node) -> Figures | None:
    """Figures as JSON values, checked; None for those by other rules, which may have other keys.

    Raises:
        BundleError: a key is missing, unknown or wrongly typed.
    """
    if node.child("rules").integer(1) != FIGURES:
        return None
    node.keys({field.name for field in dataclasses.fields(Figures)})
    seconds = node.child("seconds").number()
    if seconds < 0:
        raise node.child("seconds").wrong("a number of at least 0", str(seconds))
    numbers = {key: node.child(key).integer(0) for key in ("edges", "attributes", "initialisers", "inside", "beside")}
    return Figures(rules=FIGURES, exact=node.child("exact").truth(), seconds=seconds, **numbers)


def _name(node: Node) -> str:
    return node.text(NAME)
