"""What graphs run on: options, errors, choice of variants and ledger of the CUDA provider, all without a GPU; and what needs one."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from edgeadapt import Adapter
from edgeadapt.bundle import Bundle
from edgeadapt.cli.main import main
from edgeadapt.devices import boards
from edgeadapt.errors import BudgetError, EdgeAdaptError, UsageError
from edgeadapt.memory import Graph, Node, Tensor, cuda, footprint, read, simulate, simulation
from edgeadapt.memory.ledger import Ledger, Line, Setup, ledger
from edgeadapt.runtime import loading, memory, providers, session
from edgeadapt.runtime.choice import choose, everything, wanted
from edgeadapt.runtime.claims import Claims
from edgeadapt.runtime.engine import Engine
from edgeadapt.runtime.memory import Needs, planned
from edgeadapt.runtime.state import FlatState
from tests.test_budget import frames, shaped
from tests.toybundle import Toy

pytestmark = pytest.mark.device

MIB = 2**20
SHARED, APART = cuda.Device(unified=True), cuda.Device(unified=False)


@pytest.fixture(autouse=True)
def nothing_claimed() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy with a lean variant of its step that keeps truths as bits, and a role whose only graph has what the GPU lacks."""
    toy = shaped(Toy(width=16, batches=(1, 4)))
    for name, op in (("adapt.b4.lean", "BitwiseNot"), ("learn.b4", "BitwiseAnd")):
        base = name.removesuffix(".lean")
        model = onnx.load_from_string(toy.graphs[base])
        nodes = [helper.make_node("Cast", ["x"], ["bytes"], to=onnx.TensorProto.UINT8)]
        nodes.append(helper.make_node(op, ["bytes"] * (2 if op == "BitwiseAnd" else 1), ["odd"]))
        for node in reversed(nodes):
            model.graph.node.insert(0, node)
        toy.graphs[name] = onnx.shape_inference.infer_shapes(model).SerializeToString()
        changes = {"variant": "lean", "path": f"graphs/{name}.onnx"} if name.endswith("lean") else {}
        toy.specs[name] = replace(toy.specs[base], nodes=toy.specs[base].nodes + 2, **changes)
    return toy.write(tmp_path_factory.mktemp("providers") / "toy.edgeadapt")


@pytest.fixture
def bundle(path: Path) -> Bundle:
    return Bundle.open(path)


# ------------------------------------------------------------------------------------------------ options and errors


def test_the_options_bound_memory_and_keep_the_numbers() -> None:
    assert providers.options(123 * MIB) == {
        "device_id": "0",
        "gpu_mem_limit": str(123 * MIB),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "0",
        "do_copy_in_default_stream": "1",
        "use_tf32": "0",
    }
    assert "gpu_mem_limit" not in providers.options(0)
    assert providers.arguments(None) == {"providers": ["CPUExecutionProvider"]}
    given = providers.arguments(MIB)
    assert given["providers"] == [("CUDAExecutionProvider", providers.options(MIB)), "CPUExecutionProvider"]
    assert given["enable_fallback"] == 0


def frame(path: Path) -> Path:
    """A source of one frame."""
    target = path.with_name("frame.npy")
    np.save(target, np.zeros((1, *Bundle.open(path).manifest.input.shape), np.float32))
    return target


def test_a_provider_that_does_not_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for call in (lambda: Adapter.open(path, provider="tpu"), lambda: simulate(Bundle.open(path), boards.load("pi4"), provider="tpu")):
        with pytest.raises(UsageError, match="there is no provider 'tpu'"):
            call()
    for command in (["simulate", str(path)], ["run", str(path), "--source", str(frame(path))], ["prepare", str(path)]):
        assert main([*command, "--provider", "tpu"]) == 2
        assert "fix: give cpu or cuda" in capsys.readouterr().err


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])


@pytest.mark.usefixtures("without_cuda")
def test_an_onnxruntime_without_the_provider_says_what_to_install(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for budget in (None, "2GiB"):
        with pytest.raises(UsageError, match="has no CUDA provider, only CPUExecutionProvider") as refused:
            Adapter.open(path, budget, provider="cuda")
        assert "pip install onnxruntime-gpu" in refused.value.hint
        assert "Jetson AI Lab" in refused.value.hint
    assert main(["run", str(path), "--source", str(frame(path)), "--provider", "cuda"]) == 2
    assert "has no CUDA provider" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime says that it has the provider, and it does not start: a GPU of that number is nowhere. What it does then is its own."""
    real = providers.options
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(providers, "options", lambda limit: {**real(limit), "device_id": "99"})
    monkeypatch.setattr(providers, "_STARTED", set())


@pytest.mark.usefixtures("failing")
@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("budget", [None, "4GiB"])
def test_a_provider_that_does_not_start_is_an_error_and_not_the_cpu(path: Path, budget: str | None) -> None:
    with pytest.raises(EdgeAdaptError, match="has the CUDA provider, but it does not start") as refused:
        Adapter.open(path, budget, provider="cuda")
    assert refused.value.exit_code == 1
    assert refused.value.hint.endswith("or take the provider cpu")
    with pytest.raises(EdgeAdaptError, match="has the CUDA provider, but it does not start"):
        providers.start()  # so that it is not a graph's fault


def test_a_graph_that_would_run_on_the_cpu_is_not_loaded(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the provider started with another graph before: a session without it, as onnxruntime makes where it does not start."""
    monkeypatch.setattr(providers, "arguments", lambda limit: {"providers": [providers.CPU]})
    with pytest.raises(EdgeAdaptError, match=r"does not start: graph predict\.b1 would run on the CPU"):
        session.load(bundle, "predict.b1", 1, session.Weights(bundle), limit=MIB)


def test_nothing_is_prepared_for_it(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(path), "--provider", "cuda", "--cache", str(tmp_path / "cache")]) == 0
    assert "for the cpu provider only" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


# -------------------------------------------------------------------------------------------------- operators


def graph_of(op: str, kinds: list[int], out: int = 1, **attributes: Any) -> Graph:
    names = [f"i{index}" for index in range(len(kinds))]
    values = {name: Tensor((4,), 32, kind) for name, kind in zip(names, kinds)} | {"y": Tensor((4,), 32, out)}
    return Graph([Node(op, names, ["y"], attributes)], values, {}, names, ["y"])


FLOAT, BYTE, INT, LONG, TRUTH = 1, 2, 6, 7, 9


@pytest.mark.parametrize(
    ("op", "kinds", "out", "told"),
    [
        ("Add", [FLOAT, FLOAT], FLOAT, ()),
        ("Conv", [FLOAT, FLOAT], FLOAT, ()),
        ("BitShift", [BYTE, BYTE], BYTE, ("BitShift",)),
        ("Tan", [FLOAT], FLOAT, ("Tan",)),
        ("LSTM", [FLOAT], FLOAT, ("LSTM",)),
        ("Equal", [TRUTH, TRUTH], TRUTH, ()),
        ("Equal", [BYTE, BYTE], TRUTH, ("Equal of uint8",)),
        ("Where", [TRUTH, FLOAT, FLOAT], FLOAT, ()),
        ("Where", [TRUTH, TRUTH, TRUTH], TRUTH, ("Where of bool",)),
        ("Pad", [LONG, LONG], LONG, ("Pad of int64",)),
        ("Cast", [TRUTH], FLOAT, ()),
        ("Cast", [FLOAT], 16, ("Cast of bfloat16",)),
        ("ReduceMean", [LONG], LONG, ("ReduceMean of int64",)),
        ("Gather", [FLOAT, LONG], FLOAT, ()),
        ("com.microsoft.FusedConv", [FLOAT, FLOAT], FLOAT, ("com.microsoft.FusedConv",)),
    ],
)
def test_what_the_provider_has_goes_by_operator_and_type(op: str, kinds: list[int], out: int, told: tuple[str, ...]) -> None:
    assert cuda.lacking(graph_of(op, kinds, out), 20) == told


def test_it_goes_by_opset_and_by_training_too() -> None:
    assert cuda.lacking(graph_of("Gelu", [FLOAT]), 20) == ()
    assert cuda.lacking(graph_of("Gelu", [FLOAT]), 19) == ("Gelu of opset 19",)
    assert cuda.lacking(graph_of("BatchNormalization", [FLOAT] * 5), 20) == ()
    assert cuda.lacking(graph_of("BatchNormalization", [FLOAT] * 5, training_mode=1), 20) == ("BatchNormalization in training",)


def test_types_are_read_from_the_file(bundle: Bundle) -> None:
    graph = read(bundle.graph_bytes("learn.b4"))
    assert graph.values["y"].kind == LONG
    assert graph.values["bytes"].kind == BYTE
    assert graph.values["stem"].kind == FLOAT


# --------------------------------------------------------------------------------------------------- variants


def test_variants_with_operators_that_it_lacks_are_passed_over(bundle: Bundle) -> None:
    here, there = Needs(bundle, 1), Needs(bundle, 1, device=SHARED)
    assert [form.graphs for form in here.forms("adapt", 4)] == [("adapt.b4",), ("adapt.b4.lean",)]
    assert [form.graphs for form in there.forms("adapt", 4)] == [("adapt.b4",)]
    assert [form.graphs for form in there.forms("learn", 4)] == [("learn.b4",)]  # there is no other
    assert here.passed_over() == ()
    assert there.passed_over() == ("adapt.b4.lean (BitwiseNot)",)
    items = wanted(bundle.manifest, None, None)
    found = choose(there, items, 8 << 30, 0)
    assert found.passed_over == ("adapt.b4.lean (BitwiseNot)",)
    assert "adapt.b4.lean" not in found.plan.graphs
    assert everything(Needs(bundle, 1, counted=False, device=APART), items).passed_over == found.passed_over


def test_a_graph_without_an_alternative_is_used_and_its_operators_are_named(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    needs = Needs(bundle, 1, device=SHARED)
    found = choose(needs, wanted(bundle.manifest, None, None), 8 << 30, 0)
    with caplog.at_level(logging.INFO, "edgeadapt"):
        loading._tell(needs, found)
    assert "of learn.b4, nodes run on the CPU, because the GPU lacks them: BitwiseAnd" in caplog.text
    assert "not used, because the GPU lacks operators of theirs: adapt.b4.lean (BitwiseNot)" in caplog.text
    assert needs["learn.b4"].region > footprint.LEAST_MARGIN == needs["adapt.b4"].region  # its tensors may be on the host


# ----------------------------------------------------------------------------------------------------- ledger


def test_the_limit_covers_tensors_weights_inputs_outputs_and_workspace(bundle: Bundle) -> None:
    graph = read(bundle.graph_bytes("adapt.b4"))
    region = memory.smallest(Needs(bundle, 1).layout("adapt.b4"))
    weights = sum(-(-size // 256) * 256 for size in graph.constants.values())
    given = sum(-(-graph.values[name].nbytes // 256) * 256 for name in (*graph.inputs, *graph.outputs))
    least = cuda.PIECES * region + weights + given + cuda.WORKSPACE
    assert least < cuda.limit(graph, region) <= least + 2 * cuda.LEAST
    graph.nodes = [node for node in graph.nodes if node.op != "Conv"]
    assert cuda.limit(graph, region) <= least - cuda.WORKSPACE + 2 * cuda.LEAST
    assert cuda.limit(graph, region) % MIB == 0


def test_the_limits_of_a_plan_are_its_line_of_the_ledger(bundle: Bundle) -> None:
    names = ["predict.b1", "adapt.b4"]
    plan = planned(Needs(bundle, 1, device=SHARED), names)
    assert plan.limits is not None
    assert set(plan.limits) == set(names)
    assert plan.lines()["GPU memory"] == sum(plan.limits.values())
    assert plan.ledger["GPU memory"].known == "counted"
    assert plan.ledger["CUDA context"].known == "estimated"
    assert plan.region.size == 0
    free = planned(Needs(bundle, 1, counted=False, device=SHARED), names, bounded=False)
    assert free.limits == dict.fromkeys(names, 0)
    assert free.ledger["GPU memory"].known == "estimated"
    assert planned(Needs(bundle, 1), names).limits is None


def test_where_the_memory_is_shared_the_gpus_part_counts_and_else_it_is_shown(bundle: Bundle) -> None:
    shared, apart = (planned(Needs(bundle, 1, device=device), ["predict.b1", "adapt.b4"]) for device in (SHARED, APART))
    away = shared.lines()["GPU memory"] + shared.lines()["CUDA context"]
    assert shared.lines() == apart.lines()
    assert shared.total == apart.total + away
    assert (shared.ledger.on_device, apart.ledger.on_device) == (away, 0)
    table = apart.ledger.table().splitlines()
    assert [line.split("  ")[1].strip() for line in table[-3:]] == ["process's peak", "GPU memory", "CUDA context"]
    assert all("not in the sum" in line for line in table[-2:])
    assert "process's peak" in shared.ledger.table().splitlines()[-1]
    again = planned(Needs(bundle, 1, device=cuda.Device(True, started=True)), ["predict.b1"])
    assert (again.lines()["CUDA context"], again.lines()["CUDA libraries"]) == (cuda.CONTEXT, 0)


def test_lines_elsewhere_are_marked_in_json() -> None:
    found = Ledger((Line("one", 5, "counted"), Line("two", 7, "counted", "", True)))
    assert found.total == 5
    assert found.plain() == {
        "total": 5,
        "lines": [
            {"name": "one", "bytes": 5, "known": "counted", "note": ""},
            {"name": "two", "bytes": 7, "known": "counted", "note": "", "elsewhere": True},
        ],
    }


def test_a_budget_without_room_for_the_gpu_is_refused_with_its_lines(bundle: Bundle) -> None:
    items = wanted(bundle.manifest, None, None)
    with pytest.raises(BudgetError) as refused:
        choose(Needs(bundle, 1, device=SHARED), items, 600 * MIB, 60 * MIB)
    assert re.search(r"GPU memory .* counted   of the board's memory", refused.value.message)
    assert choose(Needs(bundle, 1, device=APART), items, 600 * MIB, 60 * MIB).missing == ()


def test_what_lies_on_the_gpu_is_promised_and_never_resident(bundle: Bundle) -> None:
    plan = planned(Needs(bundle, 1, device=SHARED), ["predict.b1"])
    serving, code = plan.total - plan.ledger.passing, footprint.CODE
    claims = Claims()
    with claims.taken(4 << 30) as claim:
        claim.fill(100 * MIB, plan.ledger)
        assert claim.filled == 100 * MIB + plan.total
        assert claim.promised() == 100 * MIB + serving
        assert claim.resident() == ((4 << 30) - plan.ledger.on_device, claim.promised() - plan.ledger.on_device)
        with claims.taken(4 << 30) as other:
            other.fill(claim.before(), plan.ledger)
            assert other.promised() == 100 * MIB + 2 * (serving - code) + code
            assert other.resident()[0] == (4 << 30) - 2 * plan.ledger.on_device


def test_the_simulators_ledger_on_a_jetson_and_beside_a_card(bundle: Bundle) -> None:
    names = ("adapt.b4",)
    cpu, shared, apart = (ledger(bundle, Setup(names, 50_000_000, device=device)) for device in (None, SHARED, APART))
    assert {"GPU memory", "CUDA context", "CUDA libraries"} <= {line.name for line in shared.lines}
    assert not {"activations", "workspace", "gaps"} & {line.name for line in shared.lines}
    assert not any("GPU" in line.name or "CUDA" in line.name for line in cpu.lines)
    assert shared["GPU memory"] == replace(apart["GPU memory"], elsewhere=False, note=shared["GPU memory"].note)
    assert shared.total > apart.total + apart["GPU memory"].bytes


def test_the_simulator_passes_over_what_an_adapter_does(bundle: Bundle) -> None:
    board, setup = boards.load("orin-nano-8gb"), Setup((), 50_000_000, device=SHARED)
    found = simulate(bundle, board, provider="cuda")
    assert found.passed_over == Needs(bundle, 1, device=SHARED).passed_over()
    listed = (simulation._choices(bundle, board, setup, "adapt", passed, {"": 1.0}) for passed in ((), ("adapt.b4.lean",)))
    graphs = [{choice.graph for choice in each} for each in listed]
    assert graphs == [{"adapt.b4", "adapt.b4.lean"}, {"adapt.b4"}]
    assert "adapt.b4.lean" not in {choice.graph for choice in found.choices}


def test_simulate_on_the_gpu(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", str(path), "--board", "orin-nano-8gb", "--provider", "cuda", "--budget", "3GiB"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "on its GPU (cuda)" in text
    assert "of the board's memory: the limit of each session" in text
    assert "not used, because the GPU lacks operators of theirs: adapt.b4.lean (BitwiseNot)" in text
    assert "times are not known for a GPU" in text
    assert main([*command, "--role", "learn", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["provider"], found["passed_over"]) == ("cuda", ["adapt.b4.lean (BitwiseNot)"])
    assert found["on_processor"] == ["learn.b4 (BitwiseAnd)"]
    assert {choice["seconds"] for choice in found["choices"]} == {None}
    assert main([*command[:-1], "500MiB"]) == 5
    assert "GPU memory" in capsys.readouterr().err
    assert main(["simulate", str(path), "--board", "x86-64", "--provider", "cuda", "--budget", "500MiB"]) == 0
    assert "not in the sum" in capsys.readouterr().out
    assert main(["simulate", str(path), "--provider", "cuda", "--measure"]) == 2
    assert "--measure runs on the processor only" in capsys.readouterr().err


def test_the_page_has_the_gpus_lines_and_no_times(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "memory.html"
    assert main(["simulate", str(path), "--board", "orin-nano-8gb", "--provider", "cuda", "--plot", str(target)]) == 0
    text = target.read_text(encoding="utf-8")
    assert "GPU memory" in text
    assert "Times are not known for a GPU" in text
    assert "Not used, because the GPU lacks operators: adapt.b4.lean (BitwiseNot)." in text


def test_a_jetsons_memory_is_shared_and_a_pcs_is_not() -> None:
    assert boards.load("orin-nano-8gb").unified_gpu
    assert not boards.load("x86-64").unified_gpu
    assert providers.device(unified=True) == cuda.Device(True, providers.CUDA in providers._STARTED)
    assert providers.device().unified == boards.here().unified_gpu


# --------------------------------------------------------------------------------------------------- bindings


def engine_of(bundle: Bundle, fresh: bool) -> tuple[Engine, FlatState]:
    """fresh: bound anew for every run, as on a GPU, where what is bound is copied."""
    state = FlatState(bundle.manifest.state, bundle.manifest.graphs, bundle.initial_state())
    engine = Engine(bundle, state, 1)
    engine._fresh = fresh
    return engine, state


def test_bound_anew_for_every_run_the_numbers_are_the_same(bundle: Bundle) -> None:
    engines = [engine_of(bundle, fresh) for fresh in (False, True)]
    for seed in range(4):
        for name in ("adapt.b4", "predict.b4", "source.b4", "learn.b4"):
            found = []
            for engine, _ in engines:
                engine.frames(4)[...] = frames(4, seed)
                if name == "learn.b4":
                    engine.labels(name)[...] = seed % 3
                outcome = engine.run(name, {"rate": 0.01 * (seed + 1)})
                found.append((outcome.logits.tobytes(), outcome.metrics, outcome.finite))
            assert found[0] == found[1]
    first, second = (state.current() for _, state in engines)
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_a_binding_is_kept_on_the_cpu_and_not_on_a_gpu(bundle: Bundle) -> None:
    for fresh in (False, True):
        engine, state = engine_of(bundle, fresh)
        graph = engine._graph("adapt.b4")
        assert (graph.binding(state.parity) is graph.binding(state.parity)) is not fresh
        engine.settle()
        assert (not graph._bindings) is fresh


# ---------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("budget", [None, "6GiB"])
def test_on_a_gpu_predictions_and_steps_are_the_cpus(path: Path, budget: str | None) -> None:
    with Adapter.open(path) as cpu, Adapter.open(path, budget, provider="cuda") as gpu:
        for seed in range(5):
            x = frames(9, seed)
            np.testing.assert_allclose(gpu.predict(x), cpu.predict(x), atol=1e-4)
            np.testing.assert_allclose(gpu.adapt(x), cpu.adapt(x), atol=1e-4)
            np.testing.assert_allclose(gpu.learn(x, np.zeros(9, np.int64)), cpu.learn(x, np.zeros(9, np.int64)), atol=1e-4)
        for name, value in cpu.state.items():
            np.testing.assert_allclose(gpu.state[name], value, atol=1e-4)
        assert gpu.stats == cpu.stats


@pytest.mark.cuda
def test_on_a_gpu_every_node_that_the_table_has_runs_there(bundle: Bundle, tmp_path: Path) -> None:
    chosen = session.options(1)
    chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", bundle.folder)
    chosen.enable_profiling, chosen.profile_file_prefix = True, str(tmp_path / "run")
    made = onnxruntime.InferenceSession(bundle.graph("adapt.b4").data, chosen, **providers.arguments(256 * MIB))
    made.run(None, {node.name: np.zeros(node.shape, np.float32) for node in made.get_inputs()})
    events = json.loads(Path(made.end_profiling()).read_bytes())
    ran = {event["args"]["provider"] for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})}
    assert ran == {"CUDAExecutionProvider"}


@pytest.mark.cuda
def test_on_a_gpu_a_limit_that_is_too_small_fails_cleanly(bundle: Bundle) -> None:
    state = FlatState(bundle.manifest.state, bundle.manifest.graphs, bundle.initial_state())
    with pytest.raises(BudgetError, match="there is not enough memory"):
        Engine(bundle, state, 1, ["adapt.b4"], limits={"adapt.b4": 4096}).run("adapt.b4", {})


@pytest.mark.cuda
def test_on_a_gpu_it_starts() -> None:
    providers.start()
    assert providers.CUDA in providers._STARTED
    assert boards.here().key  # which board it is decides whether its memory counts
