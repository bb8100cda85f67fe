"""What each side loads when it is imported, seen from a fresh process: the device must not pay for the workstation's libraries."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterable

import pytest

import edgeadapt

pytestmark = pytest.mark.device

WORKSTATION = {"torch", "onnxscript", "scipy", "sklearn", "matplotlib", "pandas"}
SIDES = {
    "core": WORKSTATION | {"onnx", "onnxruntime", "serial", "PIL", "edgeadapt.exporters", "edgeadapt.runtime", "edgeadapt.devices"},
    "devices": WORKSTATION | {"onnx", "onnxruntime", "PIL", "edgeadapt.exporters", "edgeadapt.runtime"},
    "runtime": WORKSTATION | {"onnx", "PIL", "edgeadapt.exporters"},
    "prepare": WORKSTATION | {"PIL", "edgeadapt.exporters"},
}


def side_of(module: str) -> str:
    """The preparing child processes may import onnx, the serving process may not: runtime/prepare.py and prepare_*.py are a side of their own."""
    parts = module.split(".")
    if parts[1] not in ("runtime", "devices", "exporters"):
        return "core"
    return "prepare" if parts[1] == "runtime" and any(part == "prepare" or part.startswith("prepare_") for part in parts[2:]) else parts[1]


def modules_of(side: str) -> list[str]:
    names = [info.name for info in pkgutil.walk_packages(edgeadapt.__path__, "edgeadapt.")]
    return [name for name in names if side_of(name) == side and not name.endswith("__main__")]


def loaded_by(code: str) -> set[str]:
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    return set(json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout))


@pytest.mark.parametrize("side", SIDES)
def test_importing_every_module_of_a_side_loads_nothing_unwanted(side):
    modules = modules_of(side)
    assert modules or side == "prepare"
    unwanted = loaded_by("".join(f"import {name}\n" for name in modules)) & SIDES[side]
    # which module did it is what one wants to know
    blame = {name: sorted(found) for name in modules if unwanted and (found := loaded_by(f"import {name}") & SIDES[side])}
    assert blame == {}


def test_import_edgeadapt_is_nearly_free():
    assert loaded_by("import edgeadapt") & (WORKSTATION | {"numpy", "onnx", "onnxruntime", "asyncio"}) == set()


def grown(modules: Iterable[str]) -> int:
    """Bytes that importing them adds to numpy, onnxruntime and the standard modules that they use."""
    libraries = "import os, numpy, onnxruntime, serial\n"
    ours = "".join(f"import {name}\n" for name in modules)
    standard = sorted(name for name in loaded_by(libraries + ours) - loaded_by(libraries) if not name.startswith("edgeadapt"))
    before = "".join(f"import {name}\n" for name in standard if "." not in name)
    rss = "int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')"
    code = f"{libraries}{before}before = {rss}\n{ours}print({rss} - before)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.native
def test_serving_side_adds_little_to_its_libraries():
    """Our own code is a few megabytes. Commands, and what only they use, do not serve; the daemon comes on top."""
    tools = ("edgeadapt.bench", "edgeadapt.cli", "edgeadapt.config", "edgeadapt.corruptions", "edgeadapt.demo", "edgeadapt.report")
    serving = [*modules_of("core"), *modules_of("devices"), *modules_of("runtime")]
    modules = [name for name in serving if not name.startswith((*tools, "edgeadapt.runtime.daemon"))]
    assert grown(modules) < 8 << 20
    assert grown([*modules, "edgeadapt.runtime.daemon.daemon"]) < 12 << 20
