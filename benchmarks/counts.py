"""Bytes in use after every node of a graph: counted from the graph beside what onnxruntime's profiler tells.

  python -m benchmarks.counts --folder bundles                      # the networks of benchmarks/memory.py, exported into the folder where needed
  python -m benchmarks.counts bundles/resnet20-ecotta.edgeadapt --prepared

Every graph is run in a process of its own, as an adapter runs it; with --prepared those that `edgeadapt prepare` made for this machine are run as
well, and are made first where they are not there; with --as-stored without copies of weights, where operators on bytes take more scratch. Needs
onnxruntime 1.28 or newer, which tells memory. A device needs nothing else for bundles that are there: on an emulated Raspberry Pi,
scripts/test-arm64.sh runs this script with --run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgeadapt.bundle import Bundle


def one(path: str, name: str, threads: int, prepared: bool, copies: bool) -> dict[str, Any]:
    """A graph's count beside its profile, in this process."""
    from edgeadapt.memory import Machine, Plan, read
    from edgeadapt.runtime import profiling, region
    from edgeadapt.runtime import session as sessions
    from edgeadapt.runtime.prepared import find

    bundle = Bundle.open(path, verify=False)
    entry = find(bundle, threads) if prepared else None
    ready = None if entry is None else entry.graphs.get(name)
    if prepared and ready is None:
        return {}
    weights = sessions.Weights(bundle, None if entry is None else entry.mapped())
    graph = bundle.graph(name) if ready is None else ready.read(bundle.weights_size, weights.own_size)
    with region.using(region.Region(prepacking=copies)):
        chosen = sessions.options(threads)
        weights.share(sessions.shared(graph, ready is None), chosen)
        profile = profiling.memory_of(graph.data, bundle.folder if ready is None else ready.folder, threads, options=chosen)
    if not profile.in_use:
        raise SystemExit("this onnxruntime does not tell memory: install 1.28 or newer")
    plan = Plan(read(graph.data), machine=Machine.here(threads, copies))
    differ = sum(held - profile.base != counted for held, counted in zip(profile.in_use, plan.after()))
    return {"nodes": len(plan.events), "differ": differ, "counted": max(plan.after()), "peak": plan.peak, "told": profile.peak - profile.base}


def child(arguments: Sequence[str]) -> dict[str, Any]:
    """That of one graph in a process of its own."""
    found = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def graphs(bundle: Bundle, batches: Sequence[int] | None) -> list[str]:
    """The graphs that predict and adapt, all variants."""
    specs = bundle.manifest.graphs
    return [name for name, spec in specs.items() if spec.role in ("predict", "adapt") and (not batches or spec.batch in batches)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--folder", type=Path, help="where the networks' bundles are and are put")
    parser.add_argument("--models", nargs="+", help="of those networks (default: all)")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prepared", action="store_true", help="also the graphs as prepared for this machine")
    parser.add_argument("--as-stored", action="store_true", help="without copies of weights")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one[0], given.one[1], given.threads, given.prepared, not given.as_stored)))
        return
    bundles = [Bundle.open(path) for path in given.bundles]
    if given.folder:
        from benchmarks.memory import MODELS, bundle_of

        bundles += [bundle_of(name, given.folder) for name in given.models or MODELS]
    print(f"{'graph':52}{'form':>10}{'nodes':>7}{'differ':>8}{'peak, counted':>16}{'told':>14}")
    total = wrong = 0
    for bundle in bundles:
        names = graphs(bundle, given.batches)
        if given.prepared:
            from edgeadapt.runtime.preparing import make

            make(bundle, given.threads, names=names)
        for name in names:
            for form in ("exported", "prepared")[: 1 + given.prepared]:
                extra = [*(["--prepared"] if form == "prepared" else []), *(["--as-stored"] if given.as_stored else [])]
                found = child(["--one", str(bundle.path), name, "--threads", str(given.threads), *extra])
                if not found:
                    continue
                total, wrong = total + 1, wrong + bool(found["differ"])
                sizes = f"{found['nodes']:7}{found['differ']:8}{found['peak']:16,}{found['told']:14,}"
                print(f"{bundle.path.stem + ' ' + name:52}{form:>10}{sizes}", flush=True)
    print(f"{total} graphs, {total - wrong} of them equal after every node")


if __name__ == "__main__":
    main()
