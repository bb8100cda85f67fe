"""A user's folder for tests of the command line: a file of models, and samples beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def workplace(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, models: str, x: Any, y: Any) -> Path:
    """Make `folder` the current one, with `train.npz` and `MODULE.py` in it; nothing of it stays imported afterwards.

    Args:
        folder: an empty one.
        monkeypatch: of the test.
        module: name of the models' file, one that no other test has.
        models: its text.
        x, y: samples and labels.
    """
    np.savez(folder / "train.npz", x=x, y=y)
    (folder / f"{module}.py").write_text(models, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, module, raising=False)
    return folder
