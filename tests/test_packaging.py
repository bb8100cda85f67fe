"""The package list in setup.cfg is the tree, the links are links, and what the documents tell people to type exists."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

import pytest

import edgeadapt._version

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("exporters", "runtime", "devices")


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def packages_in_tree() -> dict[str, str]:
    """Every folder with Python files under our four, as package name -> folder."""
    found = {}
    for top, package in (("edgeadapt", "edgeadapt"), *((folder, f"edgeadapt.{folder}") for folder in MAPPED)):
        for path, _, files in os.walk(ROOT / top):
            if any(file.endswith(".py") for file in files):
                inside = Path(path).relative_to(ROOT / top).parts
                found[".".join((package, *inside))] = Path(path).relative_to(ROOT).as_posix()
    return found


def test_packages_listed_are_the_folders_with_code(config):
    listed = config["options"]["packages"].split()
    assert sorted(listed) == sorted(packages_in_tree()), "setup.cfg: packages"


def test_package_dir_leads_each_package_to_its_folder(config):
    mapping = dict(line.split(" = ") for line in config["options"]["package_dir"].strip().splitlines())
    for package, folder in packages_in_tree().items():
        base = max((name for name in mapping if package == name or package.startswith(f"{name}.")), key=len)
        assert "/".join((mapping[base], *package[len(base) :].split(".")[1:])) == folder


def test_every_package_has_an_init():
    assert [folder for folder in packages_in_tree().values() if not (ROOT / folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("name", MAPPED)
def test_link_is_relative_and_leads_to_the_folder(name):
    link = ROOT / "edgeadapt" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_oldest_python_is_the_same_for_the_installer_and_the_checkers(config):
    assert config["options"]["python_requires"] == f">={config['mypy']['python_version']}" == ">=3.10"
    assert 'target-version = "py310"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_version_is_one(config):
    version = edgeadapt._version.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert importlib.metadata.version("edgeadapt") == version
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_entry_points_exist(config):
    for line in config["options.entry_points"]["console_scripts"].strip().splitlines():
        module, attribute = line.split("=", 1)[1].strip().split(":")
        assert callable(getattr(importlib.import_module(module), attribute))


def dev_commands() -> set[str]:
    text = subprocess.run([ROOT / "dev", "help"], capture_output=True, text=True, check=True, cwd="/").stdout
    return set(re.findall(r"^  ([a-z][a-z0-9-]*) ", text, re.MULTILINE))


def test_dev_helps_with_every_command_it_knows():
    cases = re.search(r"^case \$command in\n(.*?)^\*\)", (ROOT / "dev").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert cases is not None
    known = {name for line in re.findall(r"^([a-z][a-z0-9 |-]*)\)", cases[1], re.MULTILINE) for name in line.split(" | ")}
    assert known - {"-h", "--help"} == dev_commands()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_that_the_documents_name_exist(document):
    named = set(re.findall(r"\./dev ([a-z][a-z0-9-]*)", (ROOT / document).read_text(encoding="utf-8")))
    assert named, f"{document} names no ./dev command"
    assert named <= dev_commands()


def test_dev_refuses_an_unknown_command():
    run = subprocess.run([ROOT / "dev", "no-such-command"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "unknown command: no-such-command" in run.stderr


@pytest.mark.parametrize("script", ["dev", ".ci/run"])
def test_scripts_can_be_run(script):
    assert os.access(ROOT / script, os.X_OK)
