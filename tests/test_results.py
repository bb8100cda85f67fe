"""The page of results: what it says of figures, and that several goes add up."""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.results import Bench, Page, best_other, fitting, page, prepared
from tests.shapedtoy import ShapedToy


def interval(value: float, half: float = 0.2) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def made(**rows: dict[str, Any]) -> dict[str, Any]:
    """A stream of a bench, by row: error, and what else a cell has."""
    names = {"source": "source", "step": "step 0", "free": "eata", "guarded": "eata, guarded", "other": "ecotta", "tent": "tent"}
    usual = {"batch": 64, "seeds": [0, 1], "frames": 400, "scored": 400, "peak_bytes": 2**27, "ms_p50": 9.0, "ms_p95": 11.0}
    cells = [{"row": names[row], **usual, **{name: interval(value) for name, value in given.items()}} for row, given in rows.items()]
    settings = {"data": "images (400 frames)", "batch": "64"}
    return {"arguments": ["default"], "settings": settings, "digests": {"default.edgeadapt": "d"}, "cells": cells}


KNOWN: dict[str, Any] = {
    "toy": {
        "full": {"batch": 64, "bytes": 2**29},
        "guarded": {
            "mixed": made(source={"error": 30.0}, step={"error": 25.0}, guarded={"error": 22.0, "worse": -3.0}),
            "sorted": made(source={"error": 30.0}, step={"error": 25.0}, guarded={"error": 25.6, "worse": 0.6}),
            "gradual": made(source={"error": 30.0}, step={"error": 25.0}, guarded={"error": 24.0, "worse": -1.0}),
        },
        "kept": {
            "mixed": made(free={"error": 21.0}, guarded={"error": 22.0, "worse": -3.0, "kept": 0.9}),
            "gradual": made(free={"error": 20.0}, guarded={"error": 24.0, "worse": -1.0, "kept": 0.5}),
        },
        "default": {"mixed": made(source={"error": 30.5}, free={"error": 21.0}, guarded={"error": 22.0, "worse": -3.0})},
        "quarter": {"mixed": {"settings": {}, "digests": {}, "cells": [], "refused": "Adapting at batch 64 needs 172 MiB, and does not fit."}},
        "methods": {"mixed": made(source={"error": 30.5}, other={"error": 21.6}, tent={"error": 23.0})},
    }
}


def rows(text: str, begin: str) -> list[list[str]]:
    return [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(f"| {begin}")]


def test_among_other_methods_the_default_is_what_the_bench_calls_so() -> None:
    cells = [{"row": row, "batch": 64, "error": interval(value)} for row, value in (("default", 20.0), ("default, guarded", 19.0), ("eata", 30.0))]
    text = page({"toy": {"full": {"batch": 64, "bytes": 2**29}, "jpeg": {"own": {"settings": {}, "digests": {"a": "d"}, "cells": cells}}}})
    assert rows(text, "**default**") == [["**default**", "20.0 ±0.2"], ["**default**, guarded", "19.0 ±0.2"]]
    assert rows(text, "eata") == [["eata", "30.0 ±0.2"]]


@pytest.mark.data
def test_jpeg_and_source_images_are_of_all_classes(tmp_path: Path) -> None:
    """The pack's JPEG images are sorted by class."""
    choices = argparse.Namespace(output=tmp_path, images=100, source=300, jpeg=300)
    for path in prepared(choices, "resnet56")[1:]:
        assert path is not None
        with np.load(path) as found:
            assert np.bincount(found["y"]).min() > 10
            assert len(found["x"]) == 300


def test_what_is_not_as_promised_is_said() -> None:
    text = page(KNOWN)
    assert [line[-1] for line in rows(text, "mixed")] == ["as promised", "**not the best**"]
    assert rows(text, "sorted")[0][-3:] == ["+0.6 ±0.2", "–", "**not as promised**"]
    assert rows(text, "gradual")[0][-3:] == ["-1.0 ±0.2", "50 ±20", "**not as promised**"], "half of the gain is lost"
    assert rows(text, "mixed")[0][2:6] == ["30.0 ±0.2", "25.0 ±0.2", "21.0 ±0.2", "22.0 ±0.2"], "source, step 0, without and with a guard"
    assert rows(text, "mixed")[1][1:5] == ["2", "22.0 ±0.2", "–", "21.6 ±0.2 (ecotta)"]
    assert rows(text, "ecotta") == [["ecotta", "21.6 ±0.2"], ["ecotta", "128 MiB", "25", "9.0", "11.0"]]
    assert "Within a quarter of the memory of fine-tuning\n\nAdapting at batch 64 needs 172 MiB, and does not fit.\n" in text
    assert len(rows(text, "source")) == 2, "of the default, in errors and costs; of other methods it is the same"


def test_of_which_exports_figures_are_is_said() -> None:
    assert page(KNOWN).count("batch: 64; bundle d.\n") == 2
    known = json.loads(json.dumps(KNOWN))
    known["toy"]["guarded"]["sorted"]["digests"]["default.edgeadapt"] = "another"
    known["toy"]["default"]["mixed"]["digests"]["tent.edgeadapt"] = "third"
    text = page(known)
    assert "batch: 64; bundles of 2 exports.\n" in text
    assert "; bundle d" not in text


def test_what_takes_more_than_a_quarter_is_no_rival() -> None:
    text = page({"toy": {**KNOWN["toy"], "fits": {"ecotta": False, "tent": True}}})
    assert rows(text, "mixed")[1][4:] == ["23.0 ±0.2 (tent)", "best, or within 0.3"]
    assert "\nDo not fit: ecotta.\n" in text


def test_the_default_is_judged_in_the_memory_that_others_have() -> None:
    for error, verdict in ((23.2, "best, or within 0.3"), (23.4, "**not the best**")):
        quarter = {"mixed": made(source={"error": 30.5}, guarded={"error": error})}
        text = page({"toy": {**KNOWN["toy"], "quarter": quarter, "fits": {"ecotta": False}}})
        assert rows(text, "mixed")[1][1:] == ["2", "22.0 ±0.2", f"{error} ±0.2", "23.0 ±0.2 (tent)", verdict]
    quarter["mixed"]["cells"][1]["seeds"] = [0]
    text = page({"toy": {**KNOWN["toy"], "quarter": quarter}})
    assert rows(text, "mixed")[1][3] == "–", "of other seeds: not to be compared"


def test_the_best_other_method_is_compared_by_as_many_seeds() -> None:
    """What one seed says of two methods that are near each other is chance."""
    known = json.loads(json.dumps(KNOWN["toy"]))
    assert best_other(known, "mixed") == "ecotta"
    assert best_other({**known, "fits": {"ecotta": False}}, "mixed") == "tent"
    assert best_other(known, "gradual") is None
    known["default"]["mixed"]["cells"][2]["error"] = interval(22.6)
    known["guarded"]["mixed"]["cells"][2]["error"] = interval(22.1)
    known["rivals"] = {"mixed": made(source={"error": 30.5}, other={"error": 21.9})}
    assert rows(page({"toy": known}), "mixed")[1][1:] == ["2", "22.1 ±0.2", "–", "21.9 ±0.2 (ecotta)", "best, or within 0.3"]
    known["fits"] = {"ecotta": False}
    assert rows(page({"toy": known}), "mixed")[1][1:] == ["2", "22.6 ±0.2", "–", "23.0 ±0.2 (tent)", "best, or within 0.3"]


def test_what_fits_is_asked_of_the_simulator(tmp_path: Path) -> None:
    """Of each bundle but the default's."""
    for name, method in (("tent", "toy"), ("norm", "norm"), ("default", "toy")):
        ShapedToy(method=method).bundle(tmp_path / f"{name}.edgeadapt")
    assert fitting(tmp_path, 4, 2**30) == {"tent": True, "norm": True}
    assert fitting(tmp_path, 4, 2**20) == {"tent": False, "norm": False}


def test_several_goes_add_up(tmp_path: Path) -> None:
    """Of several processes too."""
    found = [Page(tmp_path) for _ in range(2)]
    found[0].put("toy", "full", {"batch": 64, "bytes": 2**29})

    def work(place: Page, bench: str) -> None:
        for number in range(20):
            place.put("toy", bench, made(source={"error": 30.0}), f"stream{number}")

    threads = [threading.Thread(target=work, args=(place, bench)) for place, bench in zip(found, ("guarded", "default"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known = json.loads((tmp_path / "results.json").read_text())["toy"]
    assert [len(known[bench]) for bench in ("guarded", "default")] == [20, 20]
    again = Page(tmp_path)
    asked = Bench("guarded", "default", ("stream3",), ())
    assert again.has("toy", asked, "stream3", ["default"])
    assert not again.has("toy", asked, "stream3", ["default", "--frames", "9"]), "with other arguments it is another"
    assert not again.has("toy", asked, "stream21", ["default"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]
