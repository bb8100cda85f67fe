"""The planner: what it chooses in which order, that its figures are those of the bundle that comes of it, and what it refuses before any training."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeadapt.bundle import Bundle, InputSpec
from edgeadapt.cli.main import main
from edgeadapt.errors import BudgetError, ExportError, UsageError
from edgeadapt.exporters import job, planner, schedules, training
from edgeadapt.exporters import pieces as cutting
from edgeadapt.exporters.data import Samples
from edgeadapt.exporters.export import ExportReport, export, plan_export
from edgeadapt.exporters.ir import Graph
from edgeadapt.exporters.planner import Candidate, Plan, Wishes, preference
from edgeadapt.memory import simulate
from tests.test_simulate import Bench
from tests.workplace import workplace
from tests.zoo.calibrate import calibrate
from tests.zoo.data import blobs
from tests.zoo.named import resnet_cifar

pytestmark = pytest.mark.usefixtures("light_start")

SHAPE, CLASSES, BATCH, BOARD = (3, 16, 16), 4, 4, Bench()
PARTS = 3  # of ResNet-8: a block each


@cache
def network() -> nn.Module:
    return calibrate(resnet_cifar(8, classes=CLASSES), SHAPE)


def samples() -> Samples:
    x, y = blobs(64, 16)
    return Samples(x, y, InputSpec(SHAPE))


def exported(path: Path | None, budget: int, method: str = "ecotta", **options: Any) -> ExportReport:
    chosen: dict[str, Any] = {"method": method, "warmup_batch": 16, "allow_drop": True, "threads": 1, **options}
    chosen |= {"epochs": 1} if method == "ecotta" else {}
    return export(network(), path, shape=SHAPE, data=samples(), budget=budget, board=BOARD, **chosen)


def listed(budget: int | None = None, **options: Any) -> Plan:
    return plan_export(network(), shape=SHAPE, board=BOARD, budget=budget, threads=1, **{"method": "ecotta", **options})


@cache
def at_four() -> Plan:
    """Every number of parts and trained parts at a batch of four, without a budget."""
    return listed(batches=(BATCH,))


def total(parts: int, trained: int) -> int:
    """Of the quickest step, compiled in a hurry."""
    return next(row.total for row in at_four().rows if (row.parts, row.trained) == (parts, trained))


# ------------------------------------------------------------------------------------------------ order


def test_order_of_preference() -> None:
    runs = preference(Wishes(), (5, 4, 3, 2, 1))
    assert runs[0] == [Candidate(4, trained, (16,)) for trained in (4, 3, 2, 1)], "four parts though there is room for five, all trained before fewer"
    assert [run[0].batches for run in runs[:5]] == [(16,), (8,), (4,), (2,), (1,)], "the batch before the parts"
    assert [run[0].parts for run in runs] == [4] * 5 + [3] * 5 + [2] * 5 + [1] * 5
    assert preference(Wishes(), (2, 1))[0] == [Candidate(2, 2, (16,)), Candidate(2, 1, (16,))]
    assert preference(Wishes(), (6,))[0][0] == Candidate(6, 6, (16,)), "taps that the user named"
    assert preference(Wishes(), ()) == [[Candidate(None, None, (size,))] for size in (16, 8, 4, 2, 1)]


def test_what_was_said_stays() -> None:
    assert preference(Wishes(5, 2, (8, 64)), (5, 4, 3, 2, 1)) == [[Candidate(5, 2, (8, 64))]]
    assert preference(Wishes(trained=2, batches=(8,)), (4, 3, 2, 1)) == [[Candidate(parts, 2, (8,))] for parts in (4, 3, 2)]
    assert preference(Wishes(trained=5, batches=(8,)), (5, 4, 3, 2, 1)) == [[Candidate(5, 5, (8,))]]


# ------------------------------------------------------------------------------------------------ figures


def test_the_list_shows_what_memory_and_time_each_candidate_takes() -> None:
    rows = at_four().rows
    assert {(row.parts, row.trained) for row in rows} <= {(parts, trained) for parts in (1, 2, 3) for trained in range(1, parts + 1)}
    assert (PARTS, PARTS) in {(row.parts, row.trained) for row in rows}
    assert {row.fits for row in rows} == {None}
    assert at_four().chosen is at_four().row is None
    assert total(3, 3) > total(3, 2) > total(3, 1)
    assert (2, 2) in {(row.parts, row.trained) for row in rows}, "three parts with one left out are not better than two with none left out"
    with pytest.raises(UsageError, match="without a budget"):
        at_four().check()


@pytest.mark.parametrize(
    ("method", "options", "chosen"),
    [
        ("ecotta", {"batches": (BATCH,)}, {"parts": 3, "train": 3}),
        ("ecotta", {"parts": 2, "train": 1, "batches": (2,)}, {"parts": 2, "train": 1}),
        ("ecotta", {"parts": 2, "statistics": "source", "micro": "none", "batches": (2, BATCH)}, {"parts": 2, "train": 2}),
        ("ecotta", {"parts": 2, "statistics": "source", "board_threads": 2, "batches": (2, BATCH)}, {"parts": 2, "train": 2}),
        ("side", {"train": 1, "batches": (BATCH,)}, {"train": 1}),
        ("tent", {"batches": (BATCH,)}, {}),
        ("norm", {}, {}),
    ],
)
def test_what_was_planned_is_what_the_bundle_takes(tmp_path: Path, method: str, options: dict[str, Any], chosen: dict[str, int]) -> None:
    """To the byte, and the graph that would be loaded: what `edgeadapt simulate` says of the file."""
    budget, path = 2**27, tmp_path / "net.edgeadapt"
    report = exported(path, budget, method, **options)
    assert report.plan is not None
    row = report.plan.row
    assert row is not None
    found = simulate(Bundle.open(path), BOARD, budget=budget, threads=options.get("board_threads", 1))
    assert (row.total, row.graph, row.batch, row.prepacking) == (found.choice.total, found.choice.graph, found.choice.batch, found.choice.prepacking)
    assert row.seconds == found.choice.seconds
    assert row.depth == "whole"
    assert {name: value for name, value in report.manifest["method"]["options"].items() if name in ("parts", "train")} == chosen
    assert row.batch == max(options.get("batches", (16,)))
    where = "a bench with 2 threads" if "board_threads" in options else "a bench"
    assert f"chosen for 128 MiB on {where}: {row.words}" in report.table()


def test_the_first_that_fits_is_taken(tmp_path: Path) -> None:
    """A budget in which only the last part of three can be trained at that batch, not even with the leanest step."""
    least = min(row.total for row in listed(total(3, 2) - 150_000, batches=(BATCH,), parts=3, train=2).rows)
    budget = (least + total(3, 1)) // 2
    path = tmp_path / "net.edgeadapt"
    report = exported(path, budget, batches=(BATCH,))
    assert report.plan is not None
    assert report.plan.chosen == Candidate(3, 1, (BATCH,))
    assert report.manifest["method"]["options"]["train"] == 1
    assert [part["trainable"] > 0 for part in report.manifest["partition"]] == [False, False, False, True]
    found = simulate(Bundle.open(path), BOARD, budget=budget)
    assert found.fits
    assert report.plan.row is not None
    assert report.plan.row.total == found.ledger.total <= budget
    marked = [row for row in report.plan.rows if row.chosen]
    assert marked == [report.plan.row]
    assert {(row.trained, row.fits) for row in report.plan.rows} == {(3, False), (2, False), (1, True)}


def test_the_largest_batch_that_fits_up_to_sixteen_is_taken() -> None:
    """In a budget for a batch of four and hardly more; and in one for all that is listed."""
    plan = listed(total(1, 1) + 2**16, parts=1)
    assert plan.chosen == Candidate(1, 1, (BATCH,))
    assert {(row.batch, row.fits) for row in plan.rows} == {(size, size <= BATCH) for size in planner.SIZES}
    assert [row.batch for row in plan.rows] == sorted(planner.SIZES, reverse=True)


def test_a_budget_that_only_a_step_in_pieces_fits(tmp_path: Path) -> None:
    given: dict[str, Any] = {"statistics": "source", "batches": (32,), "parts": 1, "train": 1}
    plans = [listed(2**27, micro=micro, **given) for micro in ("none", (8,))]
    whole, path = min(row.total for row in plans[0].rows), tmp_path / "net.edgeadapt"
    assert {row.micro for row in plans[0].rows} == {0}
    pieces = min(row.total for row in plans[1].rows if row.micro)
    assert pieces < whole - 2**19
    budget = (whole + pieces) // 2
    with pytest.raises(BudgetError, match="nothing that was asked for fits"):
        exported(path, budget, micro="none", **given)
    report = exported(path, budget, micro=(8,), **given)
    assert report.plan is not None
    row = report.plan.row
    assert row is not None
    assert (row.batch, row.micro, row.graph, row.words) == (32, 8, "adapt-sums.b8", "1 part, all trained, batch 32 (in pieces of 8)")
    found = simulate(Bundle.open(path), BOARD, budget=budget)
    assert (found.choice.micro, found.choice.total, found.fits) == (8, row.total, True)


class Wide(nn.Module):
    """With tensors of the side network's calibration that are large enough to be weights of the bundle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(inner, outer, 1, bias=False) for inner, outer in ((3, 256), (256, 512), (512, 512)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) for conv in self.convs)
        self.linear = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms):
            x = nn.functional.max_pool2d(norm(conv(x)).relu(), 2)
        return self.linear(x.mean((2, 3)))


def test_what_is_calibrated_does_not_depend_on_the_batches_that_were_tried(tmp_path: Path) -> None:
    """Graphs are shared by candidates of several batches, and equal tensors are stored once."""
    model, path = calibrate(Wide(), SHAPE), tmp_path / "net.edgeadapt"
    given: dict[str, Any] = {"shape": SHAPE, "board": BOARD, "method": "side", "train": 1, "threads": 1}
    small = next(row.total for row in plan_export(model, micro="none", **given).rows if row.batch == 2)
    report = export(model, path, data=samples(), budget=small + 2**16, warmup_batch=16, allow_drop=True, micro="none", **given)
    assert report.plan is not None
    assert report.plan.row is not None
    assert (report.plan.row.batch, report.plan.row.total) == (2, simulate(Bundle.open(path), BOARD, budget=small + 2**16).choice.total)


@pytest.mark.usefixtures("untrained")
def test_what_is_said_to_be_needed_is_what_is_needed(tmp_path: Path) -> None:
    """Where prediction fits no more, the step in pieces is looked at all the same."""
    given: dict[str, Any] = {"statistics": "source", "batches": (32,), "parts": 1, "train": 1, "micro": (8,)}
    with pytest.raises(BudgetError, match=r"batch 32 \(in pieces of 8") as refused:
        exported(tmp_path / "net.edgeadapt", 40 * 2**20, **given)
    needed = re.search(r"at least (\d+)MiB", refused.value.hint)
    assert needed is not None
    assert listed(int(needed[1]) * 2**20, **given).chosen == Candidate(1, 1, (32,))


@pytest.mark.usefixtures("untrained")
def test_what_is_needed_is_what_every_batch_needs(tmp_path: Path) -> None:
    """Of two batches the smaller one fits, and is not the answer."""
    given: dict[str, Any] = {"batches": (1, 32), "parts": 1, "train": 1}
    totals = {size: min(row.total for row in listed(batches=(size,), parts=1, train=1).rows) for size in (1, 32)}
    with pytest.raises(BudgetError, match="the nearest is 1 part, all trained, batch 32") as refused:
        exported(tmp_path / "net.edgeadapt", (totals[1] + totals[32]) // 2, **given)
    needed = re.search(r"at least (\d+)MiB", refused.value.hint)
    assert needed is not None
    assert listed(int(needed[1]) * 2**20, **given).chosen == Candidate(1, 1, (1, 32))


def test_batches_are_those_that_micro_batches_that_were_named_divide() -> None:
    assert [run[0].batches for run in preference(Wishes(micro=(4,)), ())] == [(16,), (8,)]
    assert [run[0].batches for run in preference(Wishes(micro=(16,)), ())] == [(32,)], "the smallest that can be"
    assert {item.batches for item in planner.listed(Wishes(micro=(2, 8)), (1,))} == {(64,), (32,), (16,)}
    plan = listed(2**28, statistics="source", parts=1, train=1, micro=(16,))
    assert plan.chosen == Candidate(1, 1, (32,))
    with pytest.raises(UsageError, match="no batch that is planned for can be taken in pieces of each of 5"):
        listed(2**28, statistics="source", micro=(5,))
    with pytest.raises(UsageError, match="a micro-batch of 8 is no part of a batch of 4"):
        listed(2**28, statistics="source", micro=(8,), batches=(4,))


def test_a_piece_that_fails_its_check_after_the_warm_up_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"statistics": "source", "batches": (32,), "parts": 1, "train": 1, "micro": (8,)}
    budget = listed(2**27, **given).rows[-1].total + 2**16
    real, train, warm = cutting._compare, training.warm_up, []

    def compare(*words: Any) -> Any:
        if warm:
            raise ExportError("the sums differ")
        return real(*words)

    monkeypatch.setattr(cutting, "_compare", compare)
    monkeypatch.setattr(training, "warm_up", lambda *words, **named: warm.append(1) or train(*words, **named))
    with pytest.raises(BudgetError, match=r"did not come out as planned \(adapt-sums\.b8 was left out: the sums differ;"):
        exported(tmp_path / "net.edgeadapt", budget, **given)
    assert warm
    assert not list(tmp_path.iterdir())


def test_threads_take_memory() -> None:
    totals = [plan.row.total for count in (1, 4) if (plan := listed(2**28, batches=(BATCH,), parts=2, board_threads=count)).row]
    assert totals[0] < totals[1]
    told = listed(2**28, batches=(1,), parts=1, board_threads=4)
    assert told.line().startswith("chosen for 256 MiB on a bench with 4 threads: ")
    for wrong in (0, -1, 1.5, True, 1025):
        with pytest.raises(UsageError, match="is not a number of threads"):
            listed(2**28, board_threads=wrong)


def test_the_same_every_time() -> None:
    one, other = (listed(2**27, batches=(BATCH,), parts=2) for _ in range(2))
    assert json.dumps(one.plain()) == json.dumps(other.plain())
    assert one == other


def test_a_model_that_cannot_be_cut_has_only_batches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    plan = plan_export(model, shape=(3, 8, 8), board=BOARD, budget=2**27, method="tent", threads=1)
    assert plan.chosen == Candidate(None, None, (16,))
    assert {row.batch for row in plan.rows} <= set(planner.SIZES)
    with pytest.raises(ExportError, match="too few to cut"):
        plan_export(model, shape=(3, 8, 8), board=BOARD, budget=2**27, method="ecotta", threads=1)


# ------------------------------------------------------------------------------------------------ schedules


def test_a_schedule_is_found_once_for_a_graph_whatever_its_weights() -> None:
    def made(seed: int, wide: int = 4) -> Graph:
        graph = Graph("g")
        x = graph.input("x", (1, wide))
        weight = graph.weight("w", np.random.default_rng(seed).standard_normal((wide, wide)).astype(np.float32))
        graph.output("y", graph.op("MatMul", [graph.op("Relu", [x], (1, wide)), weight], (1, wide)))
        return graph

    known = schedules.Schedules()
    first, second, third = made(0), made(1), made(1, 8)
    assert known.of(first, True)[0][1] is first
    again = known.of(second, True)[0][1]
    assert again is not second
    assert [node.op for node in again.nodes] == [node.op for node in first.nodes]
    assert (again.constants["w"] == second.constants["w"]).all()
    assert not (again.constants["w"] == first.constants["w"]).any()
    assert known.of(third, True)[0][1] is third, "another shape is another graph"


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_nothing_is_searched_for_again_after_the_warm_up(monkeypatch: pytest.MonkeyPatch, quantize: str) -> None:
    calls: list[str] = []
    search, train = schedules.order, training.warm_up
    monkeypatch.setattr(schedules, "order", lambda *given, **named: calls.append("order") or search(*given, **named))
    monkeypatch.setattr(training, "warm_up", lambda *given, **named: calls.append("warm-up") or train(*given, **named))
    exported(None, 2**27, batches=(2,), parts=2, statistics="source", micro=(1,), quantize=quantize)
    assert calls[-1] == "warm-up"
    assert calls.count("order") > 6


# ------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up would fail."""

    def never(*given: Any, **named: Any) -> Any:
        raise AssertionError("the warm-up began")

    monkeypatch.setattr(training, "warm_up", never)


@pytest.mark.usefixtures("untrained")
def test_nothing_fits_and_nothing_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "net.edgeadapt"
    with pytest.raises(BudgetError, match="nothing that was asked for fits the budget of 40 MiB on a bench") as caught:
        exported(path, 40 * 2**20)
    assert "; the nearest is 1 part, all trained, batch 1 (" in str(caught.value)
    assert "give a budget of at least" in caught.value.hint
    assert not path.exists()


@pytest.mark.usefixtures("untrained")
def test_what_would_fit_instead_is_told(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="the nearest is 3 parts, all trained, batch 64") as caught:
        exported(tmp_path / "net.edgeadapt", total(3, 1) + 2**16, batches=(64,), parts=3, train=3)
    assert "; what fits: 3 parts, the last 1 trained, batch " in caught.value.hint


def test_a_bundle_that_came_out_larger_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a graph had changed with the weights: what was planned is not what is compiled."""
    small = listed(2**27, batches=(1,), parts=3, train=1)
    assert small.row is not None
    wrong = replace(small, chosen=Candidate(3, 3, (BATCH,)))
    monkeypatch.setattr(job, "plan", lambda *given, **named: wrong)
    path = tmp_path / "net.edgeadapt"
    with pytest.raises(BudgetError, match="adapt at batch 4"):
        exported(path, small.row.total)
    assert not path.exists()


@pytest.mark.parametrize("given", [{"board": BOARD}, {"board_threads": 2}])
def test_a_board_without_a_budget_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="a board is where a budget holds"):
        export(network(), None, shape=SHAPE, method="norm", **given)


# ------------------------------------------------------------------------------------------------ from the shell


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return workplace(tmp_path, monkeypatch, "planned_models", "from tests.test_planner import network as tiny\n", *blobs(64, 16))


def shell(*words: str) -> int:
    method = () if "--method" in words else ("--method", "ecotta")
    return main(["export", "planned_models.py:tiny", "--input", "3x16x16", "--threads", "1", *method, *words])


@pytest.mark.usefixtures("here")
def test_a_plan_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell("--plan", "--board", "pi4-1gb", "--budget", "128MiB", "--batch", "2", "--parts", "2") == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].startswith("on Raspberry Pi 4, 1 GB, 1 thread: ")
    assert lines[1].split()[:4] == ["parts", "trained", "batch", "graph"]
    chosen = [line.split() for line in lines if line.endswith("chosen")]
    assert [row[:4] for row in chosen] == [["2", "2", "2", "adapt.b2"]]
    assert "chosen for 128 MiB on Raspberry Pi 4, 1 GB: 2 parts, all trained, batch 2 (adapt.b2)" in output.out
    assert "plan: " in output.err
    assert shell("--plan", "--board", "pi4-1gb", "--board-threads", "4", "--batch", "2", "--parts", "1", "--quiet") == 0
    assert capsys.readouterr().out.startswith("on Raspberry Pi 4, 1 GB, 4 threads: ")
    assert shell("--plan", "--board", "pi4-1gb", "--batch", "2", "--parts", "1", "--json", "--quiet") == 0
    output = capsys.readouterr()
    assert output.err == ""
    told = json.loads(output.out)
    assert (told["key"], told["budget"], told["chosen"]) == ("pi4-1gb", None, None)
    assert [(row["parts"], row["trained"], row["batch"]) for row in told["rows"]] == [(1, 1, 2)]


def test_an_export_within_a_budget(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "train.npz", "--batch", "2", "--parts", "1", "--epochs", "1", "--warmup-batch", "16", "--allow-drop", "--json"]
    assert shell(*words, "--board", "pi4-1gb", "--budget", "128MiB", "-o", "net.edgeadapt") == 0
    output = capsys.readouterr()
    told = json.loads(output.out)
    assert told["plan"]["chosen"]["graph"] == "adapt.b2"
    assert "chosen for 128 MiB on Raspberry Pi 4, 1 GB: 1 part, all trained, batch 2" in output.err
    assert output.err.index("chosen for") < output.err.index("warm-up")
    (here / "net.edgeadapt").unlink()
    assert shell(*words, "--board", "pi4-1gb", "--budget", "40MiB", "-o", "net.edgeadapt") == 5
    assert "fits the budget of 40 MiB" in capsys.readouterr().err
    assert not (here / "net.edgeadapt").exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--plan --budget 40MiB --batch 1 --parts 1 --board pi4-1gb", 5, "nothing that was asked for fits"),
        ("--plan --board pi4-3gb", 2, "there is no board 'pi4-3gb'"),
        ("--plan --train 7", 2, "train = 7, and the model has 3 parts"),
        ("--board pi4-1gb --method norm -o n.edgeadapt", 2, "give --budget or --plan too"),
        ("--board-threads 2 --method norm -o n.edgeadapt", 2, "--board-threads says where a budget holds"),
        ("--budget lots --method norm -o n.edgeadapt", 2, "'lots' is not a size in bytes"),
        ("--budget 96MiB --board pi4-1gb", 2, "the bundle's path is missing"),
        ("--budget 96MiB --board pi4-1gb -o n.edgeadapt", 8, "give training samples with --data"),
    ],
)
def test_errors_from_the_shell(words: str, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(*words.split(), "--quiet") == code
    assert says in capsys.readouterr().err
