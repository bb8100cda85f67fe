"""`edgeadapt simulate`: what fits and what would, the page, JSON, and what a child process measures beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edgeadapt import memory
from edgeadapt.bundle import Bundle
from edgeadapt.cli.main import main
from edgeadapt.cli.simulate import chart
from edgeadapt.errors import BudgetError, EdgeAdaptError, UsageError
from edgeadapt.memory.measured import measure
from edgeadapt.memory.simulation import Choice, format_seconds
from edgeadapt.report import memory as page
from edgeadapt.report.page import render
from edgeadapt.terminal import Style
from tests.child import ROOT, environment
from tests.shapedtoy import ShapedToy

pytestmark = pytest.mark.device


@dataclass(frozen=True)
class Bench:
    key: str = "bench"
    name: str = "a bench"
    memory: int = 2**30
    page: int = 4096
    arm: bool = False
    floor: int = 50_000_000
    code: int | None = None
    floor_known: str = "measured"
    gflops: float = 10.0
    gbps: float = 5.0
    rates_known: str = "estimated"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toy = ShapedToy(width=32, depth=2, batches=(1, 4, 64), lean=True)
    return toy.write(tmp_path_factory.mktemp("toy") / "toy.edgeadapt")


@pytest.fixture(scope="module")
def bundle(path: Path) -> Bundle:
    return Bundle.open(path)


def test_without_a_budget_the_quickest_of_the_largest_batch_is_shown(bundle) -> None:
    found = memory.simulate(bundle, Bench())
    assert (found.choice.role, found.choice.batch, found.choice.graph, found.choice.prepacking) == ("adapt", 64, "adapt.b64", True)
    assert found.choice.graphs == ("predict.b1", "predict.b64", "adapt.b64")
    assert (found.fits, found.margin) == (None, None)
    assert found.ledger.total == found.choice.total
    assert [curve.graph for curve in found.curves] == ["adapt.b64", "predict.b64"]
    found.check()


@pytest.mark.usefixtures("light_start")
def test_every_choice_is_beaten_by_none_and_the_best_is_of_the_role_with_the_largest_batch(bundle) -> None:
    found = memory.simulate(bundle, Bench(), budget=2**30)
    assert {choice.role for choice in found.choices} == {"predict", "adapt"}
    assert {(choice.role, choice.batch) for choice in found.choices} == {(r, b) for r in ("predict", "adapt") for b in (1, 4, 64)} - {("adapt", 1)}
    adapting = [choice for choice in found.choices if choice.role == "adapt"]
    assert [choice for choice in found.choices if choice.best] == [max(adapting, key=lambda choice: (choice.batch, not choice.singly))]
    for one in found.choices:
        for other in found.choices:
            if one is not other and one.role == other.role:
                assert (other.total, other.per_frame, -other.batch) != (one.total, one.per_frame, -one.batch) or one.graph != other.graph
                assert not (other.total < one.total and other.per_frame < one.per_frame and other.batch >= one.batch)
    assert found.fits
    assert found.margin == 2**30 - found.ledger.total


@pytest.mark.usefixtures("light_start")
def test_a_budget_that_is_too_small_names_the_nearest_that_fit(bundle) -> None:
    every = memory.simulate(bundle, Bench()).choices
    large = min(choice.total for choice in every if choice.role == "adapt" and choice.batch == 64)
    found = memory.simulate(bundle, Bench(), budget=large - 1)
    assert found.fits is False
    with pytest.raises(BudgetError) as refused:
        found.check()
    assert "adapt at batch 64" in refused.value.message
    assert "activations" in refused.value.message
    assert refused.value.hint.startswith("what fits: adapt at batch 4 with ")
    assert "; predict at batch 64 with " in refused.value.hint
    with pytest.raises(BudgetError, match="nothing in this bundle fits; the least is predict at batch 1"):
        memory.simulate(bundle, Bench(), budget=2**20).check()


def test_a_leaner_form_is_taken_where_the_quickest_does_not_fit(bundle, monkeypatch) -> None:
    from edgeadapt.memory import simulation

    def halved(bundle, setup):
        found = real(bundle, setup)
        lean = any(name.endswith(".lean") for name in setup.graphs)
        return replace(found, lines=found.lines[:1]) if lean else found

    real = simulation.ledger
    monkeypatch.setattr(simulation, "ledger", halved)
    found = memory.simulate(bundle, Bench(), budget=50_000_000)
    assert found.choice.graph == "adapt.b64.lean"
    assert found.choice.words.startswith("adapt at batch 64 (adapt.b64.lean")


def test_roles_and_batches_that_are_not_there(bundle, tmp_path) -> None:
    with pytest.raises(UsageError, match="cannot adapt with batch 7"):
        memory.simulate(bundle, Bench(), batch=7)
    fixed = ShapedToy(method="norm").bundle(tmp_path / "norm.edgeadapt")
    assert memory.simulate(fixed, Bench()).choice.role == "predict"
    with pytest.raises(UsageError, match="no graph to learn") as refused:
        memory.simulate(fixed, Bench(), role="learn")
    assert refused.value.hint == "it can predict"
    assert memory.simulate(bundle, Bench(), role="learn").choice.graph == "learn.b64"


def test_the_command_prints_ledger_choices_and_curve(path, capsys) -> None:
    assert main(["simulate", str(path), "--budget", "1GiB", "--batch", "4"]) == 0
    text = capsys.readouterr().out
    for part in (
        "adapt at batch 4, 1 thread",
        "Python and libraries",
        "process's peak",
        "budget 1 GiB: fits, with",
        "adapt.b64",
        "best",
        "held there",
        "in use at node",
    ):
        assert part in text, part
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_budget_that_is_too_small_is_exit_code_5_with_the_ledger_in_the_error(path, capsys) -> None:
    assert main(["simulate", str(path), "--budget", "20MiB"]) == 5
    told = capsys.readouterr()
    assert "does not fit" in told.out
    assert "process's peak" in told.err
    assert "\n  fix: nothing in this bundle fits" in told.err


def test_json_has_everything(path, capsys) -> None:
    assert main(["simulate", str(path), "--board", "pi4-1gb", "--budget", "200MiB", "--json", "--threads", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        *("bundle", "digest", "board", "key", "memory", "threads", "budget", "fits", "margin", "rates_known"),
        *("provider", "passed_over", "on_processor", "choice", "ledger", "choices", "curves"),
    }
    assert (found["provider"], found["passed_over"], found["on_processor"]) == ("cpu", [], [])
    assert (found["key"], found["threads"], found["budget"], found["fits"]) == ("pi4-1gb", 2, 200 * 2**20, True)
    assert found["margin"] == found["budget"] - found["ledger"]["total"]
    assert sum(line["bytes"] for line in found["ledger"]["lines"]) == found["ledger"]["total"] == found["choice"]["total"]
    assert {line["known"] for line in found["ledger"]["lines"]} == {"counted", "measured", "estimated"}
    assert found["curves"][0]["bytes"] == max(found["curves"][0]["points"])
    assert sum(item["bytes"] for item in found["curves"][0]["standing"]) == found["curves"][0]["bytes"]


@pytest.mark.parametrize(
    ("options", "told"),
    [("--threads 0", "not a number of threads"), ("--board nowhere", "there is no board"), ("--plot /nowhere/x.html", "cannot be written")],
)
def test_wrong_options_are_told(path, options, told, capsys) -> None:
    assert main(["simulate", str(path), *options.split()]) == 2
    assert told in capsys.readouterr().err


def test_the_page_has_every_tensor_escaped_and_needs_nothing_else(bundle) -> None:
    found = memory.simulate(bundle, Bench(), budget=2**20)
    text = render(page.page_of(found))
    assert "does not fit" in text
    assert "block&lt;0&gt;.&amp;conv" in text
    assert "block<" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in text
    for item in found.curves[0].standing[:40]:
        assert f"<td>{item.tensor}</td>".replace("(workspace)", "(workspace)") in text
    assert text.count("<svg") == 1 + len(found.curves)


def test_plots_go_to_a_file_or_a_folder(path, tmp_path, capsys) -> None:
    assert main(["simulate", str(path), "--plot", str(tmp_path / "memory.html")]) == 0
    assert (tmp_path / "memory.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert main(["simulate", str(path), "--plot", str(tmp_path / "there")]) == 0
    capsys.readouterr()
    assert json.loads((tmp_path / "there" / "report.json").read_text(encoding="utf-8"))["bundle"] == "toy.edgeadapt"
    assert (tmp_path / "there" / "report.html").is_file()


def test_a_chart_reaches_its_top_at_the_peak_only() -> None:
    lines = chart([0, 50, 100, 50], Style(), 4, 2)
    assert [line.partition("│")[2] for line in lines] == ["  █", " ███"]
    assert lines[0].strip().startswith("100 B")
    assert chart([0, 100], Style(blocks=False), 2, 1) == ["      100 B | #"]


def test_durations() -> None:
    assert [format_seconds(value) for value in (0.0005, 0.5276, 2.0956)] == ["0.5 ms", "528 ms", "2.1 s"]


def test_nothing_heavy_is_loaded_without_measuring(path) -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'PIL'}"
    code = f"import sys; from edgeadapt.cli.main import main; main(sys.argv[1:]); print(sorted({heavy} & {{*sys.modules}}))"
    command = [sys.executable, "-c", code, "simulate", str(path), "--board", "pi5"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    assert ended.stdout.splitlines()[-1] == "[]"


@pytest.mark.native
@pytest.mark.parametrize("options", [["--role", "predict"], ["--role", "adapt"], ["--role", "learn", "--batch", "4"]])
def test_what_is_measured_is_what_was_predicted(path, options, capsys) -> None:
    assert main(["simulate", str(path), *options, "--measure", "--json"]) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)["measured"]}
    assert set(lines) == {"Python and libraries", "weights", "region for tensors", "state", "all else", "process's peak"}
    floor = lines["Python and libraries"]
    region = lines["region for tensors"]
    assert -65536 <= region["measured"] - region["predicted"] <= 2 * 4096  # a convolution does not fill its workspace on images this small
    assert lines["weights"]["measured"] == pytest.approx(lines["weights"]["predicted"], abs=65536)
    peak = lines["process's peak"]
    above_floor = [peak[kind] - floor[kind] for kind in ("predicted", "measured")]
    assert above_floor[0] == pytest.approx(above_floor[1], abs=3e6)


@pytest.mark.native
def test_a_child_that_fails_is_told_by_its_last_line(tmp_path) -> None:
    with pytest.raises(EdgeAdaptError, match="cannot be opened"):
        measure(tmp_path / "none.edgeadapt", Choice("predict", 1, "predict.b1", ("predict.b1",), True, 0, 0.0))


@pytest.mark.usefixtures("light_start")
def test_a_tight_budget_has_predictions_made_frame_by_frame(bundle) -> None:
    found = memory.simulate(bundle, Bench())
    assert not found.choice.singly
    assert "predict.b64" in found.choice.graphs
    alone = min((choice for choice in found.choices if (choice.role, choice.batch) == ("adapt", 64)), key=lambda choice: choice.total)
    assert alone.singly
    assert "predicting frame by frame" in alone.words
    assert "predict.b64" not in alone.graphs
    tight = memory.simulate(bundle, Bench(), batch=64, budget=alone.total)
    assert tight.fits
    assert tight.choice.singly
    assert tight.ledger.total <= alone.total


def test_what_is_predicted_at_once_is_what_the_loaded_graphs_take() -> None:
    def choice(*graphs: str) -> Choice:
        return Choice("adapt", 16, graphs[-1], graphs, True, 0, 0.0, micro=4)

    assert choice("predict.b1", "adapt-sums.b4", "adapt-update").predicts == 1
    assert choice("predict.b1", "predict.b4", "adapt-sums.b4", "adapt-update").predicts == 4
    assert choice("predict.b1", "predict.b16", "adapt.b16.lean").predicts == 16
