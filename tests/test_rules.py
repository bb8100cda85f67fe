"""Rules of the house that no linter knows, read from the files of the checkout."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeadapt
from edgeadapt import errors

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("edgeadapt", "exporters", "runtime", "devices")
NOT_OURS = re.compile(r"\.git|\.venv.*|\.cache|\.?build|dist|out|__pycache__|.*\.egg-info|\.(mypy|ruff|pytest|import_linter)_cache|\.hypothesis")
LONGEST = 450
FROM_THE_SYSTEM = {"picamera2"}  # of Raspberry Pi OS: it needs the libcamera that is installed there, so no extra brings it
BY_NAME = ("importlib.import_module", "import_module", "__import__")


def files() -> Iterator[Path]:
    """Every file of the checkout that is ours, links not followed."""
    for path, folders, names in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if not NOT_OURS.fullmatch(name))
        yield from (Path(path, name) for name in sorted(names) if not Path(path, name).is_symlink())


def sources(*tops: str) -> list[Path]:
    return [path for path in files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in tops]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def imports(module: ast.Module) -> Iterator[tuple[str, bool, int]]:
    """(top-level name, whether it is loaded with the module, line) of every import, `importlib.import_module("name")` included."""

    def visit(node: ast.AST, at_load: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], at_load, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0], at_load, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME and node.args and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value).split(".")[0], at_load, node.lineno
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        deferred = for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_load and not deferred)

    return visit(module, True)


def where(path: Path, line: int = 1) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_device_side_never_names_torch_and_only_prepare_names_onnx():
    found = []
    for path in sources("runtime", "devices"):
        prepares = any(part.startswith(("prepare", "_prepare")) for part in path.relative_to(ROOT).parts)
        found += [where(path, line) for name, _, line in imports(tree(path)) if name == "torch" or (name == "onnx" and not prepares)]
    assert not found, "\n".join(found)


def test_core_names_torch_and_onnx_runtime_only_inside_functions():
    heavy = {"torch", "onnx", "onnxruntime"}
    found = [where(path, line) for path in sources("edgeadapt") for name, at_load, line in imports(tree(path)) if at_load and name in heavy]
    assert not found, "\n".join(found)


def declared(extras: bool) -> set[str]:
    """Import names that setup.cfg's requirements bring: the base ones, or those of all extras but `dev` too."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["options"]["install_requires"].splitlines()
    if extras:
        lines += [line for name, text in config["options.extras_require"].items() if name != "dev" for line in text.splitlines()]
    wanted = {re.split(r"[\s<>=!;\[]", line.strip())[0].lower() for line in lines if line.strip()}
    names = {"pyserial": "serial", "pillow": "PIL", "paho-mqtt": "paho", "opencv-python-headless": "cv2"}
    return {names.get(name, name.replace("-", "_")) for name in wanted}


def test_every_library_is_declared():
    """At load: a base requirement (the exporters: any extra). Inside a function or for types only: one of the extras."""
    ours = {"edgeadapt", *FROM_THE_SYSTEM, *sys.stdlib_module_names}
    found = []
    for path in sources(*FOLDERS):
        for name, at_load, line in imports(tree(path)):
            if name not in ours | declared(extras=not at_load or path.relative_to(ROOT).parts[0] == "exporters"):
                found.append(f"{where(path, line)} {name}")
    assert not found, "\n".join(found)


def test_torch_load_takes_weights_only():
    found = []
    for path in sources(*FOLDERS, "benchmarks", "examples", "tests"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = any(word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True for word in node.keywords)
                found += [] if safe else [where(path, node.lineno)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", [*FOLDERS, "benchmarks", "examples", "scripts"])
def test_files_stay_short(folder):
    lines = {where(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(folder)}
    assert {place: count for place, count in lines.items() if count > LONGEST} == {}


# Written in pieces, so that this file passes its own test.
UNWANTED = re.compile(
    "|".join(
        (
            r"(?<![\w.])/wo" r"rk/",
            r"(?<![\w.])/tm" r"p/x\b",
            r"/opt/(pypi|whe" r"els)",
            r"\.libr" r"ary/",
            r"\b(helper|other|previous|next) sess" r"ions?\b",
            r"\bthis sess" r"ion of\b",
            r"\bsub-?ag" r"ents?\b",
            r"\b(issue|pull request|PR|GH) ?#\d+",
            r"\b(py" r"pi|pytho" r"nhosted|down" r"load\.pytorch)\.org",
            r"\bTO" r"DO\b",
            r"\bFIX" r"ME\b",
            r"\bX" r"XX\b",
            r"\bNotImple" r"mentedError\b",
            r"\bpytest\.(sk" r"ip|import" r"orskip|x" r"fail)\b|mark\.(sk" r"ip|x" r"fail)",
        )
    )
)


def test_no_file_speaks_of_how_or_where_it_was_made_or_of_what_is_left_to_do():
    found = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{where(path, number)}: {match[0]}" for number, line in enumerate(text.splitlines(), 1) if (match := UNWANTED.search(line))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["see /wo" "rk/shared", "# TO" "DO: later", "issue " "#12", "@pytest.mark.sk" "ip"])
def test_the_list_of_unwanted_words_finds_them(text):
    assert UNWANTED.search(text)


@pytest.mark.parametrize("text", ["/network/", "colour #123456", "a session of onnxruntime", "homework/x"])
def test_the_list_of_unwanted_words_is_not_too_wide(text):
    assert not UNWANTED.search(text)


def public_things() -> Iterator[tuple[str, object]]:
    """Every public class, function, method and property that a module of ours defines itself."""
    for info in pkgutil.walk_packages(edgeadapt.__path__, "edgeadapt."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != info.name or not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            yield f"{info.name}.{name}", thing
            if inspect.isclass(thing):
                for member, value in vars(thing).items():
                    if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)):
                        yield f"{info.name}.{name}.{member}", getattr(thing, member)


def test_everything_public_has_a_docstring():
    """A method may inherit that of the interface it implements."""
    found = [name for name, thing in public_things() if not inspect.getdoc(thing)]
    assert not found, "\n".join(found)


def error_types() -> list[type[errors.EdgeAdaptError]]:
    return [thing for thing in vars(errors).values() if inspect.isclass(thing) and issubclass(thing, errors.EdgeAdaptError)]


def test_exit_codes_are_distinct_and_documented():
    text = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    documented = {name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE)}
    assert documented == {error.__name__: error.exit_code for error in error_types()}
    assert len(set(documented.values())) == len(documented)


CHILD = """
import pytest

def test_left_out():
    pytest.{word}("no reason")

@pytest.mark.data
def test_without_the_pack():
    pass
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2", "--dist", "worksteal")], ids=["alone", "workers"])
@pytest.mark.parametrize(("continuous", "status", "closing"), [("true", 1, "1 failed"), ("", 0, "1 skipped")])
def test_a_skipped_test_fails_in_ci_and_what_is_left_out_is_counted(tmp_path, continuous, status, closing, workers):
    (tmp_path / "conftest.py").write_bytes((ROOT / "tests" / "conftest.py").read_bytes())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    data: needs the data pack\n", encoding="utf-8")
    (tmp_path / "test_child.py").write_text(CHILD.format(word="sk" "ip"), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "EDGEADAPT_DATA" and not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "pytest.ini", *workers, str(tmp_path)]
    run = subprocess.run(command, env={**environment, "CI": continuous}, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == status, run.stdout + run.stderr
    assert f"{closing}, 1 deselected in " in run.stdout.splitlines()[-1]
