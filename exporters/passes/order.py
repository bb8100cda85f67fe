"""In which order a graph's nodes run. In a step that keeps small forms of its forward pass, all of that pass comes before the backward one."""

from __future__ import annotations

from edgeadapt.exporters.ir import Graph, Node
from edgeadapt.memory import Graph as Part
from edgeadapt.memory import Plan, best_order


def order(graph: Graph, effort: float = 1.0) -> list[int]:
    """The order of least memory that was found, as indices; effort: see `edgeadapt.memory.best_order`.

    Left to itself the search would put off the making of a small form until the backward pass needs it, and keep what it is made from until then.
    """
    early = _early(graph)
    if len(early) == len(graph.nodes):
        return best_order(graph, effort=effort)
    late = [index for index in range(len(graph.nodes)) if index not in early]
    first = sorted(early)
    return _halves(graph, first, late, effort)


def _early(graph: Graph) -> set[int]:
    """The nodes of the forward pass; all of them where there is no other. One that reads what the backward pass makes belongs to that."""
    after: set[str] = set()
    early: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if graph.late(node) or any(name in after for name in node.inputs):
            after.update(node.outputs)
        else:
            early.add(index)
    return early


def _halves(graph: Graph, first: list[int], late: list[int], effort: float) -> list[int]:
    made = {out for index in first for out in graph.nodes[index].outputs if out}
    kept = sorted({name for index in late for name in graph.nodes[index].inputs if name in made and name not in graph.outputs})
    one = [graph.nodes[index] for index in first]
    other = [Node("Saved", [], kept), *(graph.nodes[index] for index in late)]  # what the backward pass finds, and frees
    found = []
    for nodes, share in ((one, len(first)), (other, len(late))):
        part = Part(nodes, graph.values, graph.constants, graph.inputs, graph.outputs)  # type: ignore[arg-type]
        found.append(best_order(part, effort=effort * share / len(graph.nodes)))
    joined = [first[index] for index in found[0]] + [late[index - 1] for index in found[1] if index]
    return joined if Plan(graph, joined).peak <= Plan(graph, first + late).peak else first + late
