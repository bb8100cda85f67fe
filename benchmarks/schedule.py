"""What the memory schedule finds: peaks in file order, by the greedy list and by the search, the bound for all orders, and the region.

Graphs come out of exports with random weights in the order they were created in (nothing is trained, checked or written), out of bundles, whose
graphs are ordered already, and out of a generator. `--shuffle` puts each into another order first.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgeadapt.bundle import Bundle
from edgeadapt.memory import Graph, Machine, Node, Plan, Tensor, best_order, read, smallest
from edgeadapt.memory.graph import GraphLike
from edgeadapt.memory.ordering import Budget
from edgeadapt.memory.ordering_lists import numbered
from edgeadapt.memory.ordering_search import Search
from edgeadapt.memory.schedule import VISITS, greedy

MODELS = {
    "resnet20": ("resnet_cifar", (3, 32, 32), (8, 64)),
    "wrn40-2": ("wideresnet", (3, 32, 32), (16,)),
    "resnet18": ("resnet18", (3, 224, 224), (1, 4)),
    "mobilenet_v2": ("mobilenet_v2", (3, 224, 224), (1, 4)),
    "tiny_vit": ("tiny_vit", (3, 32, 32), (8,)),
    "sensor_net": ("sensor_net", (6, 128), (16,)),
}
"""By name: the factory in tests/zoo/named.py, the input and the batches."""


class _Compiled(Exception):
    """The export is far enough."""


def copied(graph: GraphLike) -> Graph:
    """What the schedule reads of a graph, which later passes change."""
    nodes = [Node(node.op, list(node.inputs), list(node.outputs), dict(node.attributes), f":{node.module}") for node in graph.nodes]
    values = {name: Tensor(value.shape, 8 * value.nbytes // max(1, _count(value.shape))) for name, value in graph.values.items()}
    return Graph(nodes, values, dict.fromkeys(graph.constants, 0), list(graph.inputs), list(graph.outputs))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def exported(model: str, method: str) -> list[tuple[str, Graph]]:
    """The graphs of an export as they were created, all roles at all batches."""
    import numpy as np

    from edgeadapt.bundle import InputSpec
    from edgeadapt.exporters import compile as compiling
    from edgeadapt.exporters import export as exporting
    from edgeadapt.exporters import job, schedules
    from edgeadapt.exporters.data import Samples
    from tests.zoo import named

    factory, shape, batches = MODELS[model]
    found: list[tuple[str, Graph]] = []

    def keep(graph: Any, *others: Any, **named: Any) -> list[int]:
        found.append((f"{model} {method} {graph.name}", copied(graph)))
        return list(range(len(graph.nodes)))

    count = 24
    data = Samples(np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32), np.arange(count) % 2, InputSpec(shape))
    options: dict[str, Any] = {"method": method, "batches": batches, "allow_drop": True, "threads": 1}
    options |= {"epochs": 0, "parts": 4, "warmup_batch": 2} if method == "ecotta" else {"warmup_batch": 2} if method == "side" else {}
    with (
        mock.patch.object(schedules, "order", keep),
        mock.patch.object(schedules, "ALLOWANCES", {}),
        mock.patch.object(compiling, "to_onnx", mock.Mock()),
        mock.patch.object(job, "check", mock.Mock(side_effect=_Compiled)),
        contextlib.suppress(_Compiled),
    ):
        exporting.export(getattr(named, factory)(), None, shape=shape, data=data, **options)
    return found


def generated(count: int, seed: int) -> Graph:
    """Nodes of one or two inputs, mostly recent ones, and outputs of very different sizes."""
    choice, names = random.Random(seed), ["x"]
    graph = Graph(inputs=["x"], values={"x": Tensor((256,), 32)})
    for index in range(count):
        inputs = choice.sample(names[-30:], min(choice.randint(1, 2), len(names)))
        graph.nodes.append(Node("Add", inputs, [f"t{index}"]))
        graph.values[f"t{index}"] = Tensor((choice.choice((64, 256, 4096, 16384)),), 32)
        names.append(f"t{index}")
    read_names = {name for node in graph.nodes for name in node.inputs}
    graph.outputs = [name for name in names if name not in read_names]
    return graph


def shuffled(graph: Graph, seed: int) -> Graph:
    """The nodes in another possible order."""
    choice = random.Random(seed)
    producer = {out: index for index, node in enumerate(graph.nodes) for out in node.outputs}
    needs = [{producer[name] for name in node.inputs if name in producer} for node in graph.nodes]
    follow: list[list[int]] = [[] for _ in needs]
    for index, sources in enumerate(needs):
        for source in sources:
            follow[source].append(index)
    waits, order = [len(sources) for sources in needs], []
    ready = [index for index, count in enumerate(waits) if not count]
    while ready:
        order.append(ready.pop(choice.randrange(len(ready))))
        for index in follow[order[-1]]:
            waits[index] -= 1
            if not waits[index]:
                ready.append(index)
    return Graph([graph.nodes[index] for index in order], graph.values, graph.constants, graph.inputs, graph.outputs)


def graphs(choices: argparse.Namespace) -> Iterator[tuple[str, Graph]]:
    """All that were asked for."""
    for path in choices.bundles:
        bundle = Bundle.open(path)
        yield from ((f"{path.stem} {name}", read(bundle.graph_bytes(name))) for name in bundle.manifest.graphs)
    for model in choices.models:
        for method in choices.methods:
            if (model, method) != ("tiny_vit", "tent"):  # it has no batch normalisation
                yield from exported(model, method)
    for seed in range(choices.random):
        yield f"random {seed}", generated(60 * (seed + 1), seed)


def measure(name: str, graph: Graph, machine: Machine) -> None:
    """One line of the table."""
    first, listed = Plan(graph, None, machine), Plan(graph, greedy(graph), machine)
    started = time.perf_counter()
    best = Plan(graph, best_order(graph, machine), machine)
    seconds = time.perf_counter() - started
    search = Search(numbered(graph, machine), VISITS)
    search.run()
    search.raise_bound(Budget(10 * VISITS))
    peaks = f"{first.peak:12,}{listed.peak:12,}{best.peak:12,}{search.bound:12,}{best.peak / listed.peak:10.3f}{best.peak / search.bound:9.3f}"
    regions = f"{smallest(listed) / listed.peak:10.3f}{smallest(best) / best.peak:10.3f}{smallest(best) / smallest(listed):10.3f}"
    print(f"{name:34}{len(graph.nodes):6}{peaks}{regions}{seconds:9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--models", nargs="*", default=[], choices=tuple(MODELS))
    parser.add_argument("--methods", nargs="+", default=["ecotta", "tent", "side"], choices=("source", "norm", "tent", "ecotta", "side"))
    parser.add_argument("--random", type=int, default=0, help="how many random graphs")
    parser.add_argument("--roles", nargs="+", help="only graphs with one of these in their name")
    parser.add_argument("--shuffle", type=int, help="begin from a shuffled order, by this seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arm", action="store_true")
    choices = parser.parse_args()
    peaks = f"{'file':>12}{'greedy':>12}{'best':>12}{'bound':>12}{'best/gr.':>10}{'/bound':>9}"
    print(f"{'graph':34}{'nodes':>6}{peaks}{'reg. gr.':>10}{'reg. best':>10}{'reg./reg.':>10}{'seconds':>9}")
    for name, graph in graphs(choices):
        if not choices.roles or any(role in name for role in choices.roles):
            measure(name, graph if choices.shuffle is None else shuffled(graph, choices.shuffle), Machine(choices.threads, choices.arm))


if __name__ == "__main__":
    main()
