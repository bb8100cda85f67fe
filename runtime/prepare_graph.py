"""One graph in a process of its own: every version of it is made, counted, compared, timed and run in a region of its size, and one is chosen.

Started by `edgeadapt.runtime.prepare`; the last line it prints is its result as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnxruntime

from edgeadapt.bundle import Bundle
from edgeadapt.errors import BudgetError, EdgeAdaptError
from edgeadapt.memory import Graph, Machine, Plan, footprint, quantised, read, smallest
from edgeadapt.memory.figures import figures
from edgeadapt.memory.rules import ALIGNMENT, misplaced_sums
from edgeadapt.runtime import memory, prepare_compare, prepare_optimise, profiling, region
from edgeadapt.runtime import session as sessions
from edgeadapt.runtime.prepare import end_with_parent
from edgeadapt.runtime.prepared import PreparedGraph, map_own
from edgeadapt.units import format_bytes

RUNS = 2  # in a region of exact size: what one run leaves, the next finds
ROOM = 1.05  # how much larger a region may be than the exported graph's, and than the layout that was played through
TRIES = 3
_PLENTY = 2**40  # bytes, to be counted down from
_PACKING = ("ConvTranspose", "MatMul", "Gemm", "com.microsoft.FusedMatMul", "com.microsoft.FusedGemm")
WORTH = 0.98  # share of the exported graph's time that is a gain of its own, and not noise


def prepare(bundle: Bundle, name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Makes the versions of a graph and chooses one.

    Args:
        bundle: the bundle.
        name: the graph.
        folder: of the entry in the making, which takes in the chosen version, unless the exported graph is.
        threads: of one operator.

    Returns:
        "runs" (a level, or "emitted"), "why", and "versions": what was found of each, by level.
    """
    spec = bundle.manifest.graphs[name]
    room = int(ROOM * footprint.stated(spec, threads)) + ALIGNMENT if spec.region_bytes else spec.peak_bytes
    added = spec.sums if spec.batch else ()  # the graph that ends a step only reads its sums
    found: dict[str, dict[str, Any]] = {"emitted": _emitted(bundle, name, threads)}
    if quantised.present(bundle.graph_bytes(name)):  # what it takes depends on the processor, and the plan is not this one's
        room = max(room, int(ROOM * found["emitted"]["region_bytes"]) + ALIGNMENT)
    versions: dict[str, PreparedGraph] = {}
    for level in prepare_optimise.levels(spec):
        place = folder / f"{name}.{level}"
        place.mkdir()
        try:
            version = prepare_optimise.optimise(bundle, name, level, place, threads)
        except EdgeAdaptError as reason:
            found[level] = {"refused": reason.message}
            continue
        made = version.prepared
        found[level] = facts(version.plan, made.nodes, made.own_bytes, version.base, version.peak, version.exact)
        found[level]["stored_bytes"] = version.stored
        more = found[level]["peak_bytes"] - room
        if any(other.digest == made.digest for other in versions.values()):
            found[level]["refused"] = "it is the same as a milder one"
        elif wrong := misplaced_sums(read(made.model.read_bytes()), added):
            found[level]["refused"] = f"it does not add {wrong[0]} in place"
        elif more > 0:
            found[level]["refused"] = f"its peak is {format_bytes(more)} over the plan"
        else:
            versions[level] = made
    _race(bundle, name, threads, versions, found)
    runs, why = _choose(bundle, name, threads, versions, found)
    if runs in versions:
        adopted = prepare_optimise.adopt(versions[runs], folder)
        found[runs]["figures"] = asdict(figures(read(adopted)))
    for level in prepare_optimise.LEVELS:
        shutil.rmtree(folder / f"{name}.{level}", ignore_errors=True)
    return {"runs": runs, "why": why, "planned_bytes": spec.peak_bytes, "versions": found}


def facts(plan: Plan, nodes: int, own: int, base: int | None, peak: int | None, exact: bool | None) -> dict[str, Any]:
    """What the record says of a version before it is timed.

    profiled_bytes: the peak as onnxruntime told it, less the base. exact: whether it told the counted bytes after every node. None: it does not tell.
    """
    return {
        "nodes": nodes,
        "peak_bytes": max(plan.peak, peak or 0),
        "profiled_bytes": peak,
        "exact": exact,
        "base_bytes": base,
        "region_bytes": smallest(plan),
        "own_bytes": own,
        "refused": "",
    }


def _emitted(bundle: Bundle, name: str, threads: int) -> dict[str, Any]:
    with region.using(region.Region()):
        weights, graph = sessions.Weights(bundle), bundle.graph(name)
        chosen = sessions.options(threads)
        weights.share(graph.external, chosen)
        profile = profiling.memory_of(graph.data, bundle.folder, threads, options=chosen)
    plan = Plan(read(graph.data), machine=Machine.here(threads))
    return facts(plan, len(plan.order), 0, *prepare_optimise.told(profile, plan))


def _race(bundle: Bundle, name: str, threads: int, versions: dict[str, PreparedGraph], found: dict[str, dict[str, Any]]) -> None:
    """Compares and times what is left of the versions beside the exported graph; those that compute something else go."""
    spec, kinds = bundle.manifest.graphs[name], {state.name: state.kind for state in bundle.manifest.state}
    allowed = prepare_compare.limits(bundle, name)
    with region.using(region.Region()):
        held = {"emitted": sessions.Weights(bundle)}  # they must outlive the sessions
        running = {"emitted": sessions.open_graph(bundle, name, threads, held["emitted"], None)}
        given = prepare_compare.feeds(bundle, name, running["emitted"])
        wanted = [prepare_compare.run(running["emitted"], inputs) for inputs in given]
        for level, graph in list(versions.items()):
            try:
                held[level] = sessions.Weights(bundle, map_own(graph))
                running[level] = sessions.open_graph(bundle, name, threads, held[level], graph)
                apart: dict[str, float] = {}
                for inputs, want in zip(given, wanted):
                    got = prepare_compare.run(running[level], inputs)
                    for what, value in prepare_compare.apart(spec, kinds, inputs, want, got).items():
                        apart[what] = max(apart.get(what, 0.0), value)
                found[level]["apart"] = apart
                found[level]["refused"] = prepare_compare.fault(apart, allowed)
            except EdgeAdaptError as reason:
                found[level]["refused"] = reason.message
            if found[level]["refused"]:
                del versions[level]
                running.pop(level, None)
        taken = dict(zip(running, prepare_compare.times(list(running.values()), given[0])))
        running.clear()
    for level, seconds in taken.items():
        found[level]["milliseconds"] = 1e3 * statistics.median(seconds)
        found[level]["time_ratio"] = prepare_compare.ratio(seconds, taken["emitted"])


def _choose(bundle: Bundle, name: str, threads: int, versions: dict[str, PreparedGraph], found: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """The fastest version that is worth its memory and runs in its region, and why."""
    _dry_run(bundle, name, threads, None, found["emitted"])
    for level in sorted(versions, key=lambda key: found[key]["time_ratio"]):
        entry = found[level]
        if entry["time_ratio"] > 1.0:
            entry["refused"] = "it is slower"
        elif entry["time_ratio"] > WORTH and _weight(entry, entry) >= _weight(found["emitted"], entry):
            entry["refused"] = "it is hardly faster, and takes as much memory"
        elif not _dry_run(bundle, name, threads, versions[level], entry):
            entry["refused"] = "it did not run in a region of its size"
        elif (more := _held(entry) - _held(found["emitted"]) - _margin(found["emitted"])) > 0:
            entry["refused"] = f"it needs {format_bytes(more)} more of a region than is allowed"
        else:
            return level, f"it takes {entry['time_ratio']:.2f} of the exported graph's time, within the memory that is allowed"
    return "emitted", "; ".join(f"{level}: {entry['refused']}" for level, entry in found.items() if entry["refused"])


def _weight(entry: dict[str, Any], version: dict[str, Any]) -> int:
    """What an entry takes of memory, to be compared with a version: with copies of weights where that has them in its file."""
    copies = entry["base_bytes"] or 0 if version["stored_bytes"] else 0
    return int(entry["peak_bytes"] + entry["own_bytes"] - entry.get("stored_bytes", 0) + copies)


def _held(entry: dict[str, Any]) -> int:
    """What a version takes of onnxruntime's memory, its region whole."""
    return sum(int(entry[key]) for key in ("region_bytes", "packed_bytes", "reserved_bytes"))


def _margin(entry: dict[str, Any]) -> int:
    """What a prepared graph may need of a region beyond the exported one: it gains time, and where a budget has no room for it, it is not served."""
    return max(int((ROOM - 1) * entry["region_bytes"]), footprint.LEAST_MARGIN)


def _dry_run(bundle: Bundle, name: str, threads: int, graph: PreparedGraph | None, entry: dict[str, Any]) -> bool:
    """Runs a version in a region of the planned size, or a little more; whether it went. Of the exported graph only what it takes is told.

    Small constants are reserved outside the region, weights in another layout lie in it: the entry is told how many bytes of each, and the size.
    """
    weights = sessions.Weights(bundle, None if graph is None else map_own(graph))
    data = bundle.graph_bytes(name) if graph is None else graph.model.read_bytes()
    packed = _rounded(_packed(read(data), Machine.here(threads)) if entry["base_bytes"] is None else entry["base_bytes"])
    large = _rounded(entry["region_bytes"] + 2 * packed)
    with region.using(region.Region(large, _PLENTY)):
        session = sessions.open_graph(bundle, name, threads, weights, graph)
        left = region.left()
        reserved = 0 if left is None else _PLENTY - left if left <= _PLENTY else large + _PLENTY - left
        del session
    entry["reserved_bytes"] = reserved
    entry["packed_bytes"] = packed = packed if entry["base_bytes"] is None else _rounded(max(0, entry["base_bytes"] - reserved))
    size = entry["region_bytes"]
    if graph is None:
        return True
    for _ in range(TRIES):
        with region.using(region.Region(size + packed, reserved)):
            session = sessions.open_graph(bundle, name, threads, weights, graph)
            if _runs(session):
                entry["region_bytes"] = size
                return True
            del session
        size = _rounded(round(size * ROOM))
    return False


def _packed(graph: Graph, machine: Machine) -> int:
    """About what weights in another layout take, where onnxruntime does not tell."""
    found = {name for node in graph.nodes if node.op in _PACKING for name in node.inputs[1:2] if name in graph.constants}
    on_bytes = replace(graph, nodes=[node for node in graph.nodes if quantised.weight_of(node)])
    return sum(_rounded(graph.constants[name]) for name in found) + sum(map(_rounded, footprint.prepacked(on_bytes, machine)))


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _runs(session: Any) -> bool:
    binding, held = profiling.bind(session)
    silent = onnxruntime.RunOptions()
    silent.log_severity_level = 4  # that it does not fit is an answer, not an error
    try:
        for _ in range(RUNS):
            session.run_with_iobinding(binding, silent)
    except Exception as reason:  # RuntimeError today, but the type has changed between releases
        if isinstance(failed := sessions.failure("the dry run", reason), BudgetError):
            return False
        raise failed from None
    del held
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepares one graph and prints what came of it."""
    parser = argparse.ArgumentParser()
    for option in ("bundle", "graph", "folder", "digest"):
        parser.add_argument(f"--{option}", required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args(arguments)
    if arguments is None:
        end_with_parent(signal.SIGKILL)
    bundle = Bundle.open(given.bundle, verify=False)
    if bundle.digest != given.digest:
        print(f"{given.bundle} was replaced")
        return 1
    try:
        result = prepare(bundle, given.graph, Path(given.folder), given.threads)
    except EdgeAdaptError as error:
        print(error.message)
        return error.exit_code
    except OSError as error:
        print(f"{error.filename or given.folder}: {error.strerror or error}")
        return os.EX_IOERR
    print(json.dumps({**result, "peak_of_preparing": memory.peak()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
